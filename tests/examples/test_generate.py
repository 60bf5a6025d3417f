"""examples/generate.py as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dldm_pipeline.data import generation
from dldm_pipeline.data.export_blocks import write_block
from dldm_pipeline.data.generation import subject_seed
from dldm_pipeline.data.slices import SliceDataset, split_subjects

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}


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
    hashed = {Path(name).name for name in manifest["checkpoint"]["sha256"]}
    weights, configs = {"diffusion_pytorch_model.safetensors"}, {"config.json", "scheduler_config.json"}
    assert hashed == weights | configs | {"model_index.json"}
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > sheet.height  # two rows, four columns
    # The files hold what the manifest's seeds and settings give.
    settings = {name: manifest["settings"][name] for name in ("num_inference_steps", "num_style_inference_steps")}
    assert [subject["seed"] for subject in manifest["subjects"]] == [subject_seed(3, k) for k in range(2)]
    generators = [torch.Generator().manual_seed(subject["seed"]) for subject in manifest["subjects"]]
    expected = tiny_pipeline(2, generator=generators, output_type="np", **settings).by_modality["T2"][1]
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
    generators = [torch.Generator().manual_seed(subject_seed(0, k)) for k in range(3)]
    drawn = tiny_pipeline(3, generator=generators, **options)
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
        (["--num_workers", "-1"], "--num_workers -1: must be at least 0"),
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


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(blocks: int, patch: pytest.MonkeyPatch) -> None:
    """Write some blocks, and fail in the next one."""
    written = iter(range(blocks))

    def write_or_fail(folder, block):
        if next(written, None) is None:
            raise OSError("the disk is gone")
        write_block(folder, block)

    patch.setattr(generation, "write_block", write_or_fail)


def begin(words: list[str], refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an export with its first block written."""
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        refused(*words)


@pytest.fixture
def batches_of_8(script, monkeypatch):
    monkeypatch.setattr(script, "default_batch_size", lambda device: 8)


@pytest.mark.usefixtures("batches_of_8")
@pytest.mark.parametrize("format", ["nifti", "dataset"])
def test_a_stopped_run_goes_on_with_the_same_command(script, refused, words, tmp_path, monkeypatch, format):
    words = [*words, "--num_subjects", "20", "--format", format]  # blocks of 8, 8 and 4
    script.main([*words, "--output", str(tmp_path / "whole")])
    expected = files_of(tmp_path / "whole")
    for blocks in range(3):
        with monkeypatch.context() as patch:
            stop_after(blocks, patch)
            assert "error: the disk is gone" in refused(*words)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".unfinished"]
        script.main(words)
        assert files_of(tmp_path / "out") == expected
        assert "is not empty" in refused(*words)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.usefixtures("batches_of_8")
def test_another_command_does_not_go_on_with_an_unfinished_run(script, refused, words, tmp_path, monkeypatch):
    words = [*words, "--num_subjects", "10"]
    begin(words, refused, monkeypatch)
    before = files_of(tmp_path / "out")
    for more, message in (
        (["--seed", "4"], "seed 0, not 4"),
        (["--num_subjects", "12"], "num_subjects 10, not 12"),
        (["--format", "dataset"], "format nifti, not dataset"),
        (["--modalities", "T1"], "modalities ['T1', 'T2', 'WB'], not ['T1']"),
        (["--num_style_inference_steps", "2"], "num_style_inference_steps 1, not 2"),
        (["--appearances", "2"], "appearances 1, not 2"),
        (["--pipeline", str(other_weights(tmp_path))], "files of another checkpoint"),
        (["--pipeline", str(other_settings(tmp_path))], "files of another checkpoint"),
    ):
        line = refused(*words, *more)
        assert f"holds an unfinished export with {message}; go on with the command that began it" in line
    assert files_of(tmp_path / "out") == before
    # With --overwrite the same command goes on, and another begins anew.
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        script.main([*words, "--overwrite"])
    assert len(list((tmp_path / "out").glob("synthetic-*"))) == 10
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        refused(*words, "--seed", "4", "--overwrite")
    script.main([*words, "--seed", "5", "--overwrite"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 5
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] == "."] == []


@pytest.mark.usefixtures("batches_of_8")
def test_a_run_is_alone_and_a_lost_subject_is_noticed(script, refused, words, tmp_path, monkeypatch):
    words = [*words, "--num_subjects", "10"]
    begin(words, refused, monkeypatch)
    with script.one_run(tmp_path / "out"):
        assert "another run is writing there" in refused(*words)
    # What was written is not given up for lost.
    shutil.rmtree(tmp_path / "out" / ".unfinished" / "block-000000000" / "synthetic-0003")
    assert "synthetic-0003 was written and is gone. Delete" in refused(*words)
    shutil.rmtree(tmp_path / "out" / ".unfinished" / "block-000000000")
    script.main(words)
    assert len(list((tmp_path / "out").glob("synthetic-*"))) == 10


def other_settings(tmp_path: Path) -> Path:
    folder = shutil.copytree(tmp_path / "pipeline", tmp_path / "settings")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"style_grid": None}))
    return folder


def other_weights(tmp_path: Path) -> Path:
    folder = shutil.copytree(tmp_path / "pipeline", tmp_path / "other")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    save_file({name: weight + 0.01 for name, weight in weights.items()}, unet, {"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_killed_run_goes_on(words, tmp_path):
    words = [sys.executable, str(SCRIPT), *words, "--num_subjects", "400", "--num_workers", "2", "--format", "dataset"]
    subprocess.run([*words, "--output", str(tmp_path / "whole")], env=ENVIRONMENT, check=True)
    out, kills = tmp_path / "out", 0
    for blocks in (1, 5, 12):
        with subprocess.Popen(words, env=ENVIRONMENT) as process:
            while process.poll() is None and len(list(out.glob(".unfinished/block-*"))) < blocks:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        assert not (out / "manifest.json").exists() and not (out / "data").exists()
    assert kills == 3
    subprocess.run(words, env=ENVIRONMENT, check=True)
    assert files_of(out) == files_of(tmp_path / "whole")


def launched(*words: str) -> subprocess.CompletedProcess:
    """`accelerate launch` of two processes; without --multi_gpu it would ask for MPI on a machine that has no GPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", str(SCRIPT)]
    return subprocess.run([*launch, *words], env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_share_the_subjects(script, words, tmp_path):
    words = [*words, "--num_subjects", "12", "--format", "dataset"]
    script.main([*words, "--output", str(tmp_path / "one")])
    done = launched(*words)
    assert done.returncode == 0 and done.stdout.count("12 subjects x 3 modalities") == 1
    assert "process 1 of 2" in done.stderr and "6/6" in done.stderr
    splits = split_subjects(f"synthetic-{k:04d}" for k in range(12))
    for split, names in zip(("train", "validation"), splits, strict=True):
        ours, expected = (list(SliceDataset(tmp_path / folder, split)) for folder in ("out", "one"))
        assert [item["subject"] for item in ours] == names == [item["subject"] for item in expected]
        for item, other in zip(ours, expected, strict=True):
            assert ((item["images"] - other["images"]).abs() > 1e-4).float().mean() < 1e-3
    manifests = [json.loads((tmp_path / folder / "manifest.json").read_text()) for folder in ("out", "one")]
    seeds = [[subject["seed"] for subject in manifest["subjects"]] for manifest in manifests]
    assert seeds[0] == seeds[1] == [subject_seed(0, k) for k in range(12)]
    # Neither writes again, and one line says so.
    refusal = launched(*words)
    assert refusal.returncode != 0 and refusal.stderr.count("error: ") == 1 and "is not empty" in refusal.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("batches_of_8")
def test_two_processes_go_on_with_what_one_began(script, refused, words, tmp_path, monkeypatch):
    words = [*words, "--num_subjects", "20"]
    script.main([*words, "--output", str(tmp_path / "one")])
    begin(words, refused, monkeypatch)
    done = launched(*words)
    assert done.returncode == 0 and "8/8" in done.stderr  # a block each is left
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")
