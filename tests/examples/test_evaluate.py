import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.slices import write_slices
from dldm_pipeline.pipeline_dldm import DLDMPipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"
NAMES = ["T1", "WB", "BB"]


@pytest.fixture(scope="module")
def evaluate():
    spec = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny untrained pipeline and a data set with ten validation subjects."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    autoencoder = DisentangledAutoencoder(
        modalities=NAMES,
        sample_size=32,
        structure_channels=4,
        style_channels=4,
        encoder_channels=(8, 16),
        decoder_channels=(16, 8),
        decoder_blocks=1,
        head_channels=8,
    )
    unet = UNet2DModel(
        sample_size=4,
        in_channels=8,
        out_channels=8,
        num_class_embeds=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    DLDMPipeline(autoencoder, unet, scheduler).save_pretrained(root / "pipeline")
    write_slices(phantom_rows(20, 32, modalities=NAMES), root / "data", NAMES, val_fraction=0.5)
    return root / "pipeline", root / "data"


def test_pipeline_report(evaluate, folders, tmp_path, capsys):
    pipeline, data = folders
    output = tmp_path / "new" / "report"
    results = evaluate.main(
        [f"--pipeline={pipeline}", f"--dataset={data}", f"--output={output}", "--num_subjects=9"]
        + ["--num_inference_steps=2", "--num_style_inference_steps=1"]
    )
    stored = json.loads((output / "metrics.json").read_text())
    assert sorted(path.name for path in output.iterdir()) == ["metrics.json", "report.md"]
    assert stored["reconstruction"]["num_subjects"] == 10
    assert stored["generation"]["num_subjects"] == 9 and stored["generation"]["num_inference_steps"] == 2
    assert set(stored["alignment"]) == {"validation", "rebuilt", "generated"}
    assert stored["reconstruction"]["psnr_mean"] == results["reconstruction"]["psnr_mean"]
    report = (output / "report.md").read_text()
    for heading in ("Reconstruction", "Disentanglement", "Alignment", "Sharpness of generated images"):
        assert f"## {heading}" in report
    assert report in capsys.readouterr().out


def test_autoencoder_only_gives_the_same_figures(evaluate, folders, tmp_path):
    pipeline, data = folders
    options = ["--autoencoder_only", f"--dataset={data}", "--max_validation=9"]
    alone = evaluate.main([*options, f"--autoencoder={pipeline / 'autoencoder'}", f"--output={tmp_path / 'a'}"])
    inside = evaluate.main([*options, f"--pipeline={pipeline}", f"--output={tmp_path / 'b'}"])
    assert "generation" not in alone and alone["reconstruction"]["num_slices"] == 9
    assert alone["reconstruction"] == inside["reconstruction"]


def test_fresh_simulated_subjects_without_a_dataset(evaluate, folders, tmp_path):
    results = evaluate.main(
        ["--autoencoder_only", f"--pipeline={folders[0]}", "--max_validation=8", f"--output={tmp_path}"]
    )
    assert results["reconstruction"]["num_subjects"] == 8


def test_tables_and_json_hold_no_nan(evaluate):
    assert evaluate.finite({"a": [math.nan, 1.0], "b": math.inf}) == {"a": [None, 1.0], "b": None}
    text = evaluate.table(["x", "y"], [["row", math.nan], ["other", 1.23456]])
    assert text.splitlines() == ["| x | y |", "|---|---:|", "| row | - |", "| other | 1.235 |"]


def test_a_failed_write_leaves_nothing(evaluate, tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("old")
    monkeypatch.setattr(evaluate.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        evaluate.write_text(tmp_path / "report.md", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "old"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_subjects=0"], "--num_subjects 0"),
        (["--max_validation=0"], "--max_validation 0"),
        (["--autoencoder=x"], "--autoencoder_only"),
        (["--pipeline=nowhere"], "nowhere holds no model_index.json"),
        (["--dataset=/nowhere/data"], "/nowhere/data"),
    ],
)
def test_bad_arguments_are_named(evaluate, folders, tmp_path, options, message):
    given = (
        options
        if any("--pipeline" in option or "--autoencoder" in option for option in options)
        else [
            f"--pipeline={folders[0]}",
            *options,
        ]
    )
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main([*given, f"--output={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_the_script_prints_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--pipeline=nowhere", f"--output={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
