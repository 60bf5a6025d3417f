"""examples/generate.py as a user runs it."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"
FEW = ["--num_subjects", "2", "--num_inference_steps", "2", "--num_style_inference_steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pipeline_folder(tiny_pipeline, tmp_path) -> Path:
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_writes_subjects_sheet_and_manifest(generate, tiny_pipeline, pipeline_folder, tmp_path, capsys):
    out = tmp_path / "out"
    generate.main(["--pipeline", str(pipeline_folder), "--output", str(out), "--seed", "3", *FEW])
    assert "2 subjects x 3 modalities" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["seed"] == 3 and manifest["settings"]["num_inference_steps"] == 2
    assert sorted(manifest["checkpoint"]["sha256"]) == [
        "autoencoder/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > sheet.height  # two rows, four columns
    # What is in the files is what the manifest's seed and settings give.
    expected = tiny_pipeline(
        2,
        num_inference_steps=2,
        num_style_inference_steps=1,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).by_modality["T2"][1]
    pixels = np.asarray(Image.open(out / manifest["subjects"][1]["files"]["T2"]["png"]))
    assert np.array_equal(pixels, np.rint(expected * 65535).astype(np.uint16))


def test_modalities_and_overwrite(generate, pipeline_folder, tmp_path, capsys):
    words = ["--pipeline", str(pipeline_folder), "--output", str(tmp_path / "out"), *FEW]
    generate.main(words)
    with pytest.raises(SystemExit) as stop:
        generate.main([*words, "--modalities", "WB", "T1"])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    generate.main([*words, "--modalities", "WB", "T1", "--overwrite"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["modalities"] == ["WB", "T1"]


def test_dicom(generate, pipeline_folder, tmp_path, capsys, monkeypatch):
    words = ["--pipeline", str(pipeline_folder), "--output", str(tmp_path / "out"), "--format", "dicom", *FEW]
    generate.main(words)
    assert len(list((tmp_path / "out").glob("synthetic-*/*.dcm"))) == 8
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(SystemExit):
        generate.main([*words, "--overwrite"])
    assert "error: writing DICOM needs highdicom" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num_subjects", "0"], "num_subjects"),
        (["--modalities", "PET"], "PET"),
        (["--pipeline", "./nowhere"], "nowhere: no such folder"),
        (["--output", "/dev/null/out"], "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(generate, pipeline_folder, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--pipeline", str(pipeline_folder), "--output", str(tmp_path / "out"), *FEW, *words])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_help_teaches(generate, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    text = capsys.readouterr().out
    assert "python examples/generate.py" in text and "sheet.png" in text
