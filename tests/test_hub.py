"""Pipelines on the Hub: what is refused, pushed and pulled, with this package and without it."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file

from dldm_pipeline import DLDMPipeline, DLDMTranslationPipeline, pipeline_dldm
from dldm_pipeline.hub import push_folder
from dldm_pipeline.pipeline_dldm import add_modules

REPO = "tester/brains"
MODULES = ["autoencoder/autoencoder_disentangled.py", "pipeline.py", "pipeline_dldm.py", "pipeline_dldm_translation.py"]


@pytest.fixture
def folder(tiny_pipeline, tmp_path) -> Path:
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def images(pipeline: DLDMPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    steps = {"num_inference_steps": 3, "num_style_inference_steps": 2}
    return pipeline(num_subjects=2, generator=generator, output_type="np", **steps).images


def run(code: str, arguments: list[str], environment: dict[str, str], python: str | Path = sys.executable) -> None:
    """Run code in a new process, in a folder that is not the repository's."""
    code = f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n{code}"
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        env=environment,
        cwd=environment["HF_HOME"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- folders


def test_a_saved_pipeline_carries_the_modules_that_load_it(folder):
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")) == MODULES
    for name in MODULES:
        if name != "pipeline.py":
            assert (folder / name).read_bytes() == Path(pipeline_dldm.__file__).with_name(Path(name).name).read_bytes()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_dldm", "DLDMPipeline"]
    assert index["autoencoder"] == ["autoencoder_disentangled", "DisentangledAutoencoder"]


def test_modules_are_added_to_an_older_folder_once(folder, tiny_pipeline):
    wanted = {path: path.read_bytes() for path in folder.rglob("*.py")}
    index = (folder / "model_index.json").read_bytes()
    for path in wanted:
        path.unlink()
    autoencoder = ["dldm_pipeline.autoencoder_disentangled", "DisentangledAutoencoder"]
    edit_json(
        folder / "model_index.json", _class_name="DLDMPipeline", autoencoder=autoencoder, _name_or_path="/home/me"
    )
    assert np.array_equal(images(DLDMPipeline.from_pretrained(folder)), images(tiny_pipeline))
    for _ in range(2):
        add_modules(folder)
        assert {path: path.read_bytes() for path in folder.rglob("*.py")} == wanted
        assert (folder / "model_index.json").read_bytes() == index


def test_the_package_loads_its_own_classes_and_runs_no_file_of_the_folder(folder, tiny_pipeline, tmp_path):
    for name in MODULES:
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for trust in (False, True):
        for pipeline_class in (DLDMPipeline, DLDMTranslationPipeline):
            pipeline = pipeline_class.from_pretrained(folder, trust_remote_code=trust)
            assert type(pipeline) is pipeline_class and type(pipeline.autoencoder) is type(tiny_pipeline.autoencoder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, class_name", [("unet", "unet"), (".", "_class_name")])
def test_foreign_modules_are_not_run_without_trust(folder, tmp_path, name, class_name):
    (folder / name / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_json(folder / "model_index.json", **{class_name: ["foreign", "Foreign"]})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DLDMPipeline.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_that_is_not_there_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match="nowhere.* neither a valid local path"):
        DLDMPipeline.from_pretrained(kind(tmp_path / "nowhere"))


@pytest.mark.parametrize("component", ["autoencoder", "unet"])
def test_pickled_weights_are_refused(folder, component):
    weights = folder / component / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    DLDMPipeline.from_pretrained(folder, use_safetensors=False)  # there still are safetensors, and those are read
    weights.unlink()
    with pytest.raises(ValueError, match=f"{component} has no .safetensors weights. Pickle files"):
        DLDMPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "names", [None, 3, "T1", [], ["T1", ""], ["T1", "T1", "WB"], ["T1", 2, "WB"], [["T1"]], {"T1": 0}]
)
def test_malformed_modalities_are_refused(folder, names):
    edit_json(folder / "autoencoder" / "config.json", modalities=names)
    with pytest.raises(ValueError, match="config.json: `modalities` must be a list of different, non-empty names"):
        DLDMPipeline.from_pretrained(folder)


# -- the Hub


def test_a_new_process_pulls_the_same_images(hub, folder, tiny_pipeline, tmp_path):
    url = push_folder(folder, REPO)
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    code = (
        "import sys, numpy\nfrom dldm_pipeline import DLDMPipeline\n"
        "pipeline = DLDMPipeline.from_pretrained(sys.argv[1])\n"
        "generator = torch.Generator().manual_seed(5)\n"
        "output = pipeline(2, None, 3, 2, generator=generator, output_type='np')\n"
        "numpy.save(sys.argv[2], output.images)"
    )
    (tmp_path / "other-home").mkdir()
    run(code, [REPO, tmp_path / "images.npy"], hub.environment(tmp_path / "other-home", token=None))
    assert np.array_equal(np.load(tmp_path / "images.npy"), images(tiny_pipeline))


def test_diffusers_alone_pulls_the_same_images(hub, tiny_pipeline, tmp_path):
    """In a virtual environment without this package, from what diffusers' own `push_to_hub` has pushed."""
    tiny_pipeline.push_to_hub(REPO)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "dldm_pipeline" not in entry.name:
            (site_packages / entry.name).symlink_to(entry)
    code = """
import importlib.util, sys
import numpy
assert importlib.util.find_spec("dldm_pipeline") is None
from diffusers import DiffusionPipeline

repo, path = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo)
    sys.exit("modules were run without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
found = []
for options in ({"custom_pipeline": repo}, {}):
    pipeline = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, **options)
    generator = torch.Generator().manual_seed(5)
    found.append(pipeline(2, None, 3, 2, generator=generator, output_type="np").images)
assert numpy.array_equal(*found)
numpy.save(path, found[0])

# Saved again and loaded again.
pipeline.save_pretrained("again")
pipeline = DiffusionPipeline.from_pretrained("again", trust_remote_code=True)
generator = torch.Generator().manual_seed(5)
assert numpy.array_equal(pipeline(2, None, 3, 2, generator=generator, output_type="np").images, found[0])

translation = {"custom_pipeline": "pipeline_dldm_translation", "trust_remote_code": True}
output = DiffusionPipeline.from_pretrained(repo, **translation)({"T1": found[0][:, 0]}, output_type="np")
assert output.modalities == ["T2", "WB"] and numpy.isfinite(output.images).all()
"""
    (tmp_path / "other-home").mkdir()
    run(code, [REPO, tmp_path / "images.npy"], hub.environment(tmp_path / "other-home", token=None), python)
    assert np.array_equal(np.load(tmp_path / "images.npy"), images(tiny_pipeline))


def test_a_private_repository_needs_the_token(hub_server, hub, folder, monkeypatch):
    push_folder(folder, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        DLDMPipeline.from_pretrained(REPO)
    with pytest.raises(OSError, match="token"):
        push_folder(folder, REPO)
    assert isinstance(DLDMPipeline.from_pretrained(REPO, token=hub_server.TOKEN), DLDMPipeline)


def test_private_is_not_taken_for_granted(hub, folder):
    push_folder(folder, REPO)
    before = dict(hub.repos["models", REPO].branches)
    with pytest.raises(ValueError, match="exists and is public"):
        push_folder(folder, REPO, private=True)
    assert hub.repos["models", REPO].branches == before


def test_a_revision_is_a_branch_of_its_own(hub, folder, tiny_pipeline, other_tiny_pipeline, tmp_path):
    push_folder(folder, REPO)
    main = hub.repos["models", REPO].branches["main"]
    other_tiny_pipeline.save_pretrained(tmp_path / "other")
    push_folder(tmp_path / "other", REPO, revision="others/first")
    assert hub.repos["models", REPO].branches["main"] == main
    assert np.array_equal(images(DLDMPipeline.from_pretrained(REPO)), images(tiny_pipeline))
    other = DLDMPipeline.from_pretrained(REPO, revision="others/first")
    assert np.array_equal(images(other), images(other_tiny_pipeline))


@pytest.mark.parametrize("revision", [None, "trial"])
def test_a_broken_upload_leaves_the_repository_as_it_was(
    hub, folder, tiny_pipeline, other_tiny_pipeline, tmp_path, revision
):
    push_folder(folder, REPO)
    before = dict(hub.repos["models", REPO].branches)
    other_tiny_pipeline.save_pretrained(tmp_path / "other")
    hub.break_at = "POST .*/commit/"
    with pytest.raises(OSError, match=f"to {REPO} failed: .*disconnected.*run it again"):
        push_folder(tmp_path / "other", REPO, revision=revision)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert hub.repos["models", REPO].branches == before
    assert np.array_equal(images(DLDMPipeline.from_pretrained(REPO)), images(tiny_pipeline))
    hub.break_at = None
    push_folder(tmp_path / "other", REPO, revision=revision)
    loaded = DLDMPipeline.from_pretrained(REPO, revision=revision)
    assert np.array_equal(images(loaded), images(other_tiny_pipeline))


def test_old_weights_go_and_what_is_private_stays_here(hub, folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"old")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    push_folder(folder, REPO)
    for path in folder.glob("unet/*0000*"):
        path.unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for name in (
        "checkpoint-10/model.safetensors",
        "logs/events",
        "validation/1.png",
        ".secret",
        "unet/w.bin",
        "w.pkl",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "LICENSE").write_text("mine")
    push_folder(folder, REPO)
    repo = hub.repos["models", REPO]
    components = ["scheduler/scheduler_config.json"] + [
        f"{name}/{file}"
        for name in ("autoencoder", "unet")
        for file in ("config.json", "diffusion_pytorch_model.safetensors")
    ]
    assert sorted(repo.commits[repo.branches["main"]]) == sorted([*MODULES, *components, "LICENSE", "model_index.json"])
    assert len(repo.commits) == 3  # the empty one, and one for each push
