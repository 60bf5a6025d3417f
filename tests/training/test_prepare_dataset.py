"""training/prepare_dataset.py from folder to folder."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from dldm_pipeline.data.slices import SliceDataset

SHAPE = (32, 40, 16)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "training" / "prepare_dataset.py"
    spec = importlib.util.spec_from_file_location("prepare_dataset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def make_subject(folder: Path, names: tuple[str, ...] = ("t1", "t2"), mask_value: int = 1) -> None:
    folder.mkdir(parents=True)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    brain = np.where(x**2 + y**2 + z**2 < 0.7, 300 + 100 * x, 0)
    for name in names:
        nib.save(nib.Nifti1Image(brain.astype(np.int16), np.eye(4)), folder / f"{name}.nii.gz")
    mask = np.zeros(SHAPE, np.uint8)
    mask[12:20, 12:20, 6:10] = mask_value
    nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / "seg.nii.gz")


def fails(script: ModuleType, capsys: pytest.CaptureFixture, *argv: str) -> str:
    """Run, expect exit status 2 and return the last line of stderr, which is the error."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_scans_to_data_set(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(4):
        make_subject(tmp_path / "scans" / f"p{number}")
    make_subject(tmp_path / "scans" / "p4", ("t1", "flair"))
    make_subject(tmp_path / "scans" / "p5", mask_value=0)
    script.main([str(tmp_path / "scans"), "--output", str(tmp_path / "data"), "--image_size", "32"])
    printed = capsys.readouterr().out
    card = (tmp_path / "data" / "README.md").read_text()
    for text in (printed, card):
        assert "| p5   | T1 T2 mask    |      0 | LEFT OUT: seg.nii.gz holds no tumour" in text
        assert "| p4   | T1 FLAIR mask |      4 | lacks T2 |" in text
    assert "train: 16 slices of 4 subjects" in printed and "validation: 4 slices of 1 subjects" in printed
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["README.md", "contact_sheet.png", "data"]
    assert Image.open(tmp_path / "data" / "contact_sheet.png").width > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "scans"]

    loaded = datasets.load_dataset(str(tmp_path / "data"))  # with the card and the sheet beside the shards
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 16, "validation": 4}
    data = [item for split in ("train", "validation") for item in SliceDataset(tmp_path / "data", split)]
    assert data[0]["images"].shape == (3, 32, 32)
    assert {item["subject"] for item in data} == {"p0", "p1", "p2", "p3", "p4"}
    assert [item["present"].tolist() for item in data if item["subject"] == "p4"] == [[True, False, True]] * 4


def test_phantom(script: ModuleType, tmp_path: Path) -> None:
    out = str(tmp_path / "data")
    script.main(["--phantom", "3", "--output", out, "--image_size", "64", "--modalities", "BB", "T1"])
    data = SliceDataset(out)
    assert len(data) == 2 and data.modalities == ("BB", "T1") and data.image_size == 64
    assert "No patient's data" in (tmp_path / "data" / "README.md").read_text()


def test_bad_arguments(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_subject(tmp_path / "scans" / "p0")
    scans, out = tmp_path / "scans", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")

    def error(*argv: object) -> str:
        return fails(script, capsys, *argv)

    assert error("--output", out) == "error: give either a folder of scans or --phantom N."
    assert "--image_size is 100; the autoencoder needs a multiple of 8" in error(
        scans, "--output", out, "--image_size", 100
    )
    assert "unknown modality 'PET'" in error(scans, "--output", out, "--modalities", "T1", "PET")
    assert "names T1 twice" in error(scans, "--output", out, "--modalities", "T1", "T1")
    assert "no subject has WB; found are T1, T2" in error(scans, "--output", out, "--modalities", "T1", "WB")
    assert "empty holds no scans" in error(tmp_path / "empty", "--output", out)
    assert "does not exist" in error(tmp_path / "nowhere", "--output", out)
    assert "val_fraction is 2.0" in error(scans, "--output", out, "--val_fraction", 2)
    assert "num_subjects is 0" in error("--phantom", 0, "--output", out)
    assert "full already exists and is not an empty folder" in error(scans, "--output", tmp_path / "full")
    assert "cannot write" in error(scans, "--output", tmp_path / "full" / "mine.txt" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "scans"]


def test_no_usable_subject(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_subject(tmp_path / "scans" / "p0", mask_value=0)
    make_subject(tmp_path / "scans" / "p1")
    path = tmp_path / "scans" / "p1" / "t2.nii.gz"
    path.write_bytes(path.read_bytes()[:500])
    message = fails(script, capsys, tmp_path / "scans", "--output", tmp_path / "out")
    assert message.startswith(f"error: {tmp_path / 'scans'}: no subject can be used. p0: seg.nii.gz holds no tumour")
    assert "p1: t2.nii.gz cannot be read" in message
    assert [path.name for path in tmp_path.iterdir()] == ["scans"]


def test_strict(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_subject(tmp_path / "scans" / "p0")
    make_subject(tmp_path / "scans" / "p1", mask_value=0)
    message = fails(script, capsys, tmp_path / "scans", "--output", tmp_path / "out", "--strict")
    assert message == "error: p1: seg.nii.gz holds no tumour: every voxel is 0."
    assert [path.name for path in tmp_path.iterdir()] == ["scans"]
