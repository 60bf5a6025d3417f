"""examples/generate.py as a user runs it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def words(pipeline_folder, tmp_path) -> list[str]:
    few = ["--num_subjects", "2", "--num_inference_steps", "2", "--num_style_inference_steps", "1", "--device", "cpu"]
    return ["--pipeline", str(pipeline_folder), "--output", str(tmp_path / "out"), *few]


def test_writes_subjects_sheet_and_manifest(script, refused, tiny_pipeline, words, tmp_path, capsys):
    out = tmp_path / "out"
    script.main([*words, "--seed", "3"])
    assert "2 subjects x 3 modalities" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["seed"] == 3 and manifest["settings"]["num_inference_steps"] == 2
    assert len(manifest["checkpoint"]["sha256"]) == 2
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > sheet.height  # two rows, four columns
    # The files hold what the manifest's seed and settings give.
    settings = {name: manifest["settings"][name] for name in ("num_inference_steps", "num_style_inference_steps")}
    generator = torch.Generator().manual_seed(manifest["seed"])
    expected = tiny_pipeline(2, generator=generator, output_type="np", **settings).by_modality["T2"][1]
    pixels = np.asarray(Image.open(out / manifest["subjects"][1]["files"]["T2"]["png"]))
    assert np.array_equal(pixels, np.rint(expected * 65535).astype(np.uint16))

    # Again, otherwise, and over the first.
    more = ["--modalities", "WB", "T1", "--format", "dataset", "--guidance_scale", "2"]
    assert "--overwrite" in refused(*words, *more, "--pipeline", "./nowhere")  # said before anything is loaded
    script.main([*words, *more, "--overwrite"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["modalities"] == ["WB", "T1"] and manifest["settings"]["guidance_scale"] == 2
    assert len(list(out.glob("data/*.parquet"))) == 2 and not list(out.glob("synthetic-*"))


def test_anatomies_in_the_same_appearances(script, words, tmp_path, tiny_pipeline):
    script.main([*words, "--appearances", "3"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_subjects"] == 6 and manifest["settings"]["appearances"] == 3
    read = [
        {name: np.asarray(Image.open(tmp_path / "out" / subject["files"][name]["png"])) for name in ("mask", "T1")}
        for subject in manifest["subjects"]
    ]
    for k in range(6):
        same = [np.array_equal(read[k]["mask"], other["mask"]) for other in read]
        assert same == [other // 3 == k // 3 for other in range(6)]
    # Subject k without --appearances has anatomy k and appearance k.
    options = dict(num_inference_steps=2, num_style_inference_steps=1, output_type="latent")
    drawn = tiny_pipeline(3, generator=torch.Generator().manual_seed(0), **options)
    again = tiny_pipeline(1, structure=drawn.structure[1:2], styles=drawn.styles[2:3], noise_scale=0, output_type="np")
    inside = again.images[0, 0] > 0
    difference = read[5]["T1"] / 65535 - again.images[0, 0]
    assert np.array_equal(read[5]["mask"] > 0, again.masks[0]) and abs(difference[inside].mean()) < 0.01
    with Image.open(tmp_path / "out" / "appearances.png") as sheet:
        assert sheet.width > 9 * 128 and 2 * 128 < sheet.height < 3 * 128


def test_bad_input_is_one_line_and_leaves_nothing(refused, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    for more, message in (
        (["--num_subjects", "0"], "num_subjects"),
        (["--modalities", "PET"], "PET"),
        (["--appearances", "0"], "--appearances 0"),
        (
            ["--appearances", "2", "--format", "dataset"],
            "--appearances: one anatomy could be in training and validation",
        ),
        (["--pipeline", "./nowhere"], "nowhere: no such folder"),
        (["--output", "/dev/null/out"], "cannot write"),
        (["--format", "dicom", "--pipeline", "./nowhere"], "writing DICOM needs highdicom"),
    ):
        assert message in refused(*words, *more)
        assert [path.name for path in tmp_path.iterdir()] == ["pipeline"], more
