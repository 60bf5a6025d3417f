"""examples/translate.py as a user runs it."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from dldm_pipeline import DLDMTranslationPipeline
from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.volumes import read_scan


@pytest.fixture
def words(pipeline_folder, tmp_path) -> list[str]:
    few = ["--num_inference_steps", "1", "--device", "cpu"]
    return ["--pipeline", str(pipeline_folder), "--output", str(tmp_path / "out"), *few]


def make_subject(folder: Path, names=("t1", "wb"), mask=True) -> Path:
    """A small brain, brighter at the front, with a tumour in four of its sixteen slices."""
    folder.mkdir(parents=True)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in (40, 48, 16)), indexing="ij")
    inside = (x / 0.7) ** 2 + (y / 0.9) ** 2 + (z / 0.9) ** 2 < 1
    tumour = np.zeros(x.shape, np.uint8)
    tumour[25:31, 30:36, 6:10] = 1
    for number, name in enumerate(names, 1):
        brain = np.where(inside, 300 + 200 * y + 100.0 * number * tumour, 0).astype(np.float32)
        nib.save(nib.Nifti1Image(brain, np.eye(4)), folder / f"{folder.name}_{name}.nii.gz")
    if mask:
        nib.save(nib.Nifti1Image(tumour, np.eye(4)), folder / f"{folder.name}_seg.nii.gz")
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_simulated_subjects_by_default(script, refused, words, tmp_path, capsys):
    out = tmp_path / "out"
    script.main(words)
    assert "2 slices: T2 and masks from T1, WB" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["synthetic"] is True and manifest["modalities"] == ["T2"]
    assert manifest["settings"]["given"] == ["T1", "WB"] and manifest["seed"] == 0
    assert manifest["settings"]["sources"] == ["phantom-000000, slice 0", "phantom-000001, slice 0"]
    assert "--overwrite" in refused(*words, "--pipeline", "./nowhere")  # said before anything is loaded
    script.main([*words, "--overwrite", "--given", "T2"])
    assert json.loads((out / "manifest.json").read_text())["modalities"] == ["T1", "WB"]


def test_fills_in_what_a_folder_lacks(script, words, tmp_path):
    folder, out = make_subject(tmp_path / "patient"), tmp_path / "out"
    script.main([str(folder), *words, "--seed", "3"])
    rows, _ = read_scan(find_scans(folder)[0], ["T1", "T2", "WB"], 32)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["sources"] == [f"patient, slice {k}" for k in range(6, 10)] and len(rows) == 4
    assert manifest["pixel_spacing_mm"] == list(rows[0]["pixel_spacing"])
    assert "from other images of the subject" in manifest["notice"]  # it does show the patient's anatomy

    given = {name: np.stack([row[name] for row in rows]) for name in ("T1", "WB")}
    generators = [torch.Generator().manual_seed(3) for _ in rows]  # slices of one scan look alike
    pipeline = DLDMTranslationPipeline.from_pretrained(words[1])
    expected = pipeline(given, num_inference_steps=1, generator=generators, output_type="np")
    for k, subject in enumerate(manifest["subjects"]):
        assert list(subject["files"]) == ["T2", "mask"]
        wanted = np.rint(expected.images[k, 0] * 65535).astype(np.uint16)
        assert np.array_equal(pixels(out / subject["files"]["T2"]["png"]), wanted)
        assert np.array_equal(pixels(out / subject["files"]["mask"]["png"]) > 0, expected.masks[k])


def test_sheet_shows_given_filled_in_and_real(script, words, tmp_path, capsys):
    folder, out = make_subject(tmp_path / "patient", ("t1", "t2", "wb"), mask=False), tmp_path / "out"
    script.main([str(folder), *words, "--given", "WB", "--modalities", "T1"])
    assert "note: no mask: all slices" in capsys.readouterr().out
    rows, _ = read_scan(find_scans(folder)[0], ["T1", "T2", "WB"], 32)
    files = [subject["files"] for subject in json.loads((out / "manifest.json").read_text())["subjects"]]
    assert len(rows) == len(files) == 12
    filled = [pixels(out / file["T1"]["png"]) / 65535 for file in files]
    masks = [pixels(out / file["mask"]["png"]) for file in files]
    images = [[row["WB"], image, row["T1"]] for row, image in zip(rows, filled, strict=True)]
    names = [f"synthetic-{k:04d}" for k in range(len(rows))]
    contact_sheet(images, masks, ["WB given", "T1 filled in", "T1 real"], names, tmp_path / "expected.png")
    sheet, expected = (pixels(path).astype(int) for path in (out / "sheet.png", tmp_path / "expected.png"))
    assert sheet.shape == expected.shape and np.abs(sheet - expected).max() <= 1  # files hold 16 bits


def test_bad_input_is_one_line_and_leaves_nothing(refused, words, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"several/one": "t1 wb", "several/two": "t1", "foreign": "flair", "complete": "t1 t2 wb"}
    for name, sequences in folders.items():
        make_subject(tmp_path / name, sequences.split())
    for more, message in (
        (["nowhere"], "nowhere does not exist"),
        (["several"], "several holds 2 subjects, one and others; give the folder of one"),
        (["foreign"], "foreign: none of T1, T2, WB among its files; it has FLAIR"),
        (["complete"], "every modality"),
        (["several/one", "--given", "T2"], "--given T2: the pipeline knows and the subject has T1 WB"),
        (["several/one", "--modalities", "PET"], "PET"),
        (["several/one", "--num_inference_steps", "0"], "num_inference_steps"),
        (["--pipeline", "./nowhere"], "nowhere: no such folder"),
        (["--output", "/dev/null/out"], "cannot write"),
    ):
        assert message in refused(*words, *more)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["complete", "foreign", "pipeline", "several"], more
    config = pipeline_folder / "autoencoder" / "config.json"
    config.write_text(config.read_text().replace('"WB"', '"T1CE"'))
    assert "T1, T2, T1CE cannot be simulated; give SUBJECT_FOLDER" in refused(*words)
