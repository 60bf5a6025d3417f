"""training/prepare_dataset.py from folder to folder."""

import re
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import prepare_dataset
import pytest
from PIL import Image

from dldm_pipeline.data.slices import SliceDataset

SHAPE = (32, 40, 16)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_subject(folder: Path, names: tuple[str, ...] = ("t1", "t2"), mask_value: int = 1, core: int = 0) -> None:
    folder.mkdir(parents=True)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    brain = np.where(x**2 + y**2 + z**2 < 0.7, 300 + 100 * x, 0)
    for name in names:
        nib.save(nib.Nifti1Image(brain.astype(np.int16), np.eye(4)), folder / f"{name}.nii.gz")
    mask = np.zeros(SHAPE, np.uint8)
    mask[12:20, 12:20, 6:10] = mask_value
    mask[14:18, 14:18, 6:10] = core or mask_value
    nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / "seg.nii.gz")


def test_scans_to_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(4):
        make_subject(tmp_path / "scans" / f"p{number}", mask_value=2, core=4 if number < 3 else 0)
    make_subject(tmp_path / "scans" / "p4", ("t1", "flair"))
    make_subject(tmp_path / "scans" / "p5", mask_value=0)
    prepare_dataset.main([str(tmp_path / "scans"), "--output", str(tmp_path / "data"), "--image_size", "32"])
    printed = capsys.readouterr().out
    card = (tmp_path / "data" / "README.md").read_text()
    for text in (printed, card):
        text = re.sub(" +", " ", text)
        assert "| p5 | T1 T2 mask | 0 | LEFT OUT: seg.nii.gz holds no tumour" in text
        assert "| p4 | T1 FLAIR mask | 4 | lacks T2 |" in text
    assert "warning: p5 left out: seg.nii.gz" in printed and "warning: p4: lacks T2" in printed
    assert "3 subjects have regions, taken for BraTS's: 1 necrotic core, 2 oedema, 3 enhancing tumour" in printed
    assert printed.count("2 subjects have a mask without regions") == 1
    assert "| p0   | T1 T2 mask labels |      4 |" in printed
    assert "train: 16 slices of 4 subjects" in printed and "validation: 4 slices of 1 subjects" in printed
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["README.md", "contact_sheet.png", "data"]
    assert Image.open(tmp_path / "data" / "contact_sheet.png").width > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "scans"]

    loaded = datasets.load_dataset(str(tmp_path / "data"))  # with the card and the sheet beside the shards
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 16, "validation": 4}
    data = [item for split in ("train", "validation") for item in SliceDataset(tmp_path / "data", split)]
    assert data[0]["images"].shape == (3, 32, 32)
    assert {item["subject"] for item in data} == {"p0", "p1", "p2", "p3", "p4"}
    assert {item["subject"] for item in data if item["has_labels"]} == {"p0", "p1", "p2"}
    assert {int(value) for item in data for value in item["labels"].unique()} == {0, 2, 3}
    assert [item["present"].tolist() for item in data if item["subject"] == "p4"] == [[True, False, True]] * 4


def test_phantom(tmp_path: Path) -> None:
    out = str(tmp_path / "data")
    prepare_dataset.main(["--phantom", "3", "--output", out, "--image_size", "64", "--modalities", "BB", "T1"])
    data = SliceDataset(out)
    assert len(data) == 2 and data.modalities == ("BB", "T1") and data.image_size == 64
    assert "No patient's data" in (tmp_path / "data" / "README.md").read_text()
    words = ["--phantom", "3", "--image_size", "64", "--modalities", "BB", "T1", "--seed", "1"]
    prepare_dataset.main([*words, "--output", str(tmp_path / "other")])
    other = SliceDataset(tmp_path / "other")
    assert not any((item["images"] == mine["images"]).all() for item in other for mine in data)


def test_simulation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = "--simulation 4 --image_size 32 --modalities T1 --slices_per_subject 2 --tumour_free_fraction 0.5".split()
    prepare_dataset.main([*words, "--output", str(tmp_path / "data")])
    data = [item for split in ("train", "validation") for item in SliceDataset(tmp_path / "data", split)]
    assert [bool(item["mask"].any()) for item in data] == [int(item["subject"][-1]) % 2 == 0 for item in data]
    assert len(data) == 8 and all(item["has_labels"] for item in data)
    assert "simulation.py" in (tmp_path / "data" / "README.md").read_text()
    colours = np.asarray(Image.open(tmp_path / "data" / "contact_sheet.png")).astype(int)
    assert (np.ptp(colours, axis=-1) > 50).any(), "regions are coloured"
    assert "train: 6 slices of 3 subjects" in capsys.readouterr().out


def test_the_sheet_shows_the_largest_tumour_of_each_subject() -> None:
    def row(subject: str, index: int, tumour: int) -> dict:
        mask = np.arange(16).reshape(4, 4) < tumour
        return {"subject": subject, "slice_index": index, "T1": np.full((4, 4), 1.0 - tumour / 16), "mask": mask}

    rows, largest = [row("a", 0, 2), row("b", 0, 1), row("a", 1, 6), row("a", 2, 3)], {}
    assert [r["slice_index"] for r in prepare_dataset.keep_largest(iter(rows), largest)] == [0, 0, 1, 2]
    assert {subject: kept["slice_index"] for subject, kept in largest.items()} == {"a": 1, "b": 0}


def test_bad_arguments(tmp_path: Path, refused) -> None:
    make_subject(tmp_path / "scans" / "p0")
    make_subject(tmp_path / "bad" / "p0", mask_value=0)
    make_subject(tmp_path / "bad" / "p1")
    damaged = tmp_path / "bad" / "p1" / "t2.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    make_subject(tmp_path / "several" / "synthetic-0000")
    (tmp_path / "several" / "manifest.json").write_text('{"synthetic": true, "settings": {"appearances": 2}}')
    (tmp_path / "begun" / ".unfinished").mkdir(parents=True)
    (tmp_path / "begun" / ".unfinished" / "manifest.json").write_text('{"synthetic": true}')
    there = sorted(path for path in tmp_path.rglob("*"))

    def check(message: str, *words: object, out: object = "out") -> None:
        line = refused(prepare_dataset.main, [*map(str, words), "--output", str(tmp_path / out)])
        assert line.startswith(f"error: {message}") or f" {message}" in line

    scans, bad = tmp_path / "scans", tmp_path / "bad"
    check("give one of a folder of scans, --phantom N and --simulation N.")
    check("give one of a folder of scans, --phantom N and --simulation N.", scans, "--phantom", 2)
    check(
        "--slices_per_subject, --acquisitions and --tumour_free_fraction need --simulation N.",
        scans,
        "--acquisitions=2",
    )
    check("tumour_free_fraction is 1.5", "--simulation", 2, "--tumour_free_fraction", 1.5)
    check("--image_size is 100; the autoencoder needs a multiple of 8", scans, "--image_size", 100)
    check("--num_workers is 0", scans, "--num_workers", 0)
    check("has each anatomy in several appearances", tmp_path / "several")
    check("is an unfinished export", tmp_path / "begun")
    check("unknown modality 'PET'", scans, "--modalities", "T1", "PET")
    check("names T1 twice", scans, "--modalities", "T1", "T1")
    check(f"{scans}: no subject has WB; found are T1, T2", scans, "--modalities", "T1", "WB")
    check(f"{tmp_path / 'empty'} holds no scans", tmp_path / "empty")
    check("does not exist", tmp_path / "nowhere")
    check("val_fraction is 2.0", scans, "--val_fraction", 2)
    check("num_subjects is 0", "--phantom", 0)
    check("already exists and is not an empty folder", scans, out="full")
    check("cannot write", scans, out="full/mine.txt/out")
    check(f"{bad}: no subject can be used. p0: seg.nii.gz holds no tumour", bad)
    check("p1: t2.nii.gz cannot be read", bad)
    check("p0: seg.nii.gz holds no tumour: no voxel is above 0.5.", bad, "--strict")
    assert sorted(path for path in tmp_path.rglob("*")) == there
