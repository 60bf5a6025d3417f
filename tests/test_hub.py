"""Model folders and their cards; pipelines on the Hub: what is refused, pushed and pulled, with this package and without."""

import errno
import json
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file

from dldm_pipeline import DLDMPipeline, DLDMTranslationPipeline, pipeline_dldm
from dldm_pipeline.data.slices import SliceDataset, write_slices
from dldm_pipeline.hub import push_folder, read_card_data, write_model_card, write_pretrained
from dldm_pipeline.pipeline_utils import add_modules

ROOT = Path(__file__).parents[1]
REPO = "tester/brains"
PIPELINES = ["pipeline.py", "pipeline_dldm.py", "pipeline_dldm_translation.py", "pipeline_utils.py"]
MODULES = ["autoencoder/autoencoder_disentangled.py", *PIPELINES]


@pytest.fixture
def folder(tiny_pipeline_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_pipeline_folder, tmp_path / "saved")


def images(pipeline: DLDMPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, None, 2, 1, generator=torch.Generator().manual_seed(5), output_type="np").images


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- what the training scripts write


def test_a_model_replaces_the_old_one_only_when_complete(tmp_path):
    def save(folder: Path, value="new"):
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text(json.dumps({"state": value, "_name_or_path": "/home/somebody"}))
        (folder / "model_index.json").write_text(value)

    def fail(folder: Path):
        save(folder, "half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "checkpoint-1").mkdir()
    write_pretrained(lambda folder: save(folder, "old"), tmp_path)
    write_pretrained(save, tmp_path)
    with pytest.raises(OSError, match=f"could not write the model to {tmp_path}: .*No space left"):
        write_pretrained(fail, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "model_index.json", "unet"]
    assert (tmp_path / "model_index.json").read_text() == "new"
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == {"state": "new"}


def test_a_model_card_says_what_it_must_and_is_read_back(tmp_path):
    figures = {"v-loss": np.float64(0.123456), "PSNR (dB)": torch.tensor(31.0), "none": None}
    training = {"seed": 0, "none": None, "data": Path("a|b"), "learning rate": 1e-5}
    more = {"Caption": "samples.png"}, ["x"], "80 mice."
    path = write_model_card(tmp_path, "Title", "Text.", figures, training, *more)
    text = path.read_text()
    for words in (
        "# Title\n\nText.",
        "## Training data\n\n80 mice.",
        "| v-loss | 0.1235 |\n| PSNR (dB) | 31 |",
        "| seed | 0 |\n| data | a\\|b |\n| learning rate | 1e-05 |",
        "![Caption](samples.png)",
        "Not for diagnosis",
    ):
        assert words in text and "none" not in text
    data = read_card_data(tmp_path)
    assert data.license == "apache-2.0" and data.library_name == "diffusers" and "x" in data.tags
    assert data.training == {"seed": 0, "data": "a|b", "learning rate": 1e-5} and data.training_data == "80 mice."
    assert {each.metric_name: each.metric_value for each in data.eval_results} == {"v-loss": 0.123456, "PSNR (dB)": 31}

    write_model_card(tmp_path, "Title", "Text.", {}, {})
    assert "## Figures" not in path.read_text() and "## Training" not in path.read_text()
    path.write_text("---\ntags: [\n---\n")
    with pytest.raises(ValueError, match="README.md: its YAML cannot be read"):
        read_card_data(tmp_path)
    path.unlink()
    assert read_card_data(tmp_path).to_dict() == {}


# -- what a saved pipeline holds, and what is loaded of it


def test_a_saved_pipeline_carries_the_modules_that_load_it(folder, tiny_pipeline):
    def modules() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*.py")}

    assert sorted(path.relative_to(folder).as_posix() for path in modules()) == MODULES
    for name in MODULES:
        if name != "pipeline.py":
            assert (folder / name).read_bytes() == Path(pipeline_dldm.__file__).with_name(Path(name).name).read_bytes()
    index = (folder / "model_index.json").read_bytes()
    assert json.loads(index)["_class_name"] == ["pipeline_dldm", "DLDMPipeline"]
    assert json.loads(index)["autoencoder"] == ["autoencoder_disentangled", "DisentangledAutoencoder"]

    # They are added to an older folder, once.
    wanted = modules()
    for path in wanted:
        path.unlink()
    autoencoder = ["dldm_pipeline.autoencoder_disentangled", "DisentangledAutoencoder"]
    old = {"_class_name": "DLDMPipeline", "autoencoder": autoencoder, "_name_or_path": "/home/me"}
    edit_json(folder / "model_index.json", **old)
    assert np.array_equal(images(DLDMPipeline.from_pretrained(folder)), images(tiny_pipeline))
    for _ in range(2):
        add_modules(folder)
        assert modules() == wanted and (folder / "model_index.json").read_bytes() == index


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


@pytest.mark.parametrize("component", ["autoencoder", "unet"])
def test_pickled_weights_are_refused(folder, component):
    weights = folder / component / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    DLDMPipeline.from_pretrained(folder, use_safetensors=False)  # there still are safetensors, and those are read
    weights.unlink()
    with pytest.raises(ValueError, match=f"{component} has no .safetensors weights. Pickle files"):
        DLDMPipeline.from_pretrained(folder)


def test_malformed_modalities_and_absent_folders_are_refused(folder):
    with pytest.raises(ValueError, match="nowhere.* neither a valid local path"):
        DLDMPipeline.from_pretrained(folder / "nowhere")
    for names in (None, 3, "T1", [], ["T1", ""], ["T1", "T1", "WB"], ["T1", 2, "WB"], [["T1"]], {"T1": 0}):
        edit_json(folder / "autoencoder" / "config.json", modalities=names)
        with pytest.raises(ValueError, match="`modalities` must be a non-empty list of different names"):
            DLDMPipeline.from_pretrained(folder)


# -- the Hub

NEW_PROCESS = """
import importlib.util, sys
import datasets, numpy, torch
from diffusers import DiffusionPipeline

def images(pipeline):
    generator = torch.Generator().manual_seed(5)
    return pipeline(2, None, 2, 1, generator=generator, output_type="np").images

repo, root, path = sys.argv[1:]
assert importlib.util.find_spec("dldm_pipeline") is None
try:
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo)
    sys.exit("modules were run without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
found = []
for options in ({"custom_pipeline": repo}, {}):
    pipeline = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, **options)
    found.append(images(pipeline))
pipeline.save_pretrained("again")
found.append(images(DiffusionPipeline.from_pretrained("again", trust_remote_code=True)))
translation = {"custom_pipeline": "pipeline_dldm_translation", "trust_remote_code": True}
output = DiffusionPipeline.from_pretrained(repo, **translation)({"T1": found[0][:, 0]}, output_type="np")
assert output.modalities == ["T2", "WB"] and numpy.isfinite(output.images).all()
rows = datasets.load_dataset(repo, split="validation")["T1"]

sys.path.insert(0, root)
from dldm_pipeline import DLDMPipeline
from dldm_pipeline.data.slices import SliceDataset
pipeline = DLDMPipeline.from_pretrained(repo)
assert type(pipeline) is DLDMPipeline
found.append(images(pipeline))
slices = [item["images"] for item in SliceDataset(repo, "validation")]
numpy.savez(path, images=found, rows=[numpy.asarray(image) for image in rows], slices=torch.stack(slices))
"""


def test_a_new_process_pulls_the_same_pipeline_and_data_set(hub, tiny_pipeline, tmp_path):
    """In a virtual environment without this package, and then with it. The pipeline is pushed by diffusers' own method."""
    tiny_pipeline.push_to_hub(REPO)
    rows = [{"subject": name, "slice_index": 0, "T1": np.eye(32) * k / 8} for k, name in enumerate("abcdef")]
    write_slices(rows, tmp_path / "data", ["T1", "WB"], val_fraction=0.5)
    push_folder(tmp_path / "data", REPO, "dataset")

    venv.create(tmp_path / "venv")
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "dldm_pipeline" not in entry.name:
            (site_packages / entry.name).symlink_to(entry)
    home = tmp_path / "other-home"
    home.mkdir()
    command = [tmp_path / "venv" / "bin" / "python", "-c", NEW_PROCESS, REPO, ROOT, tmp_path / "found.npz"]
    done = subprocess.run(command, env=hub.environment(home), cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    expected = images(tiny_pipeline)
    assert len(found["images"]) == 4 and all(np.array_equal(each, expected) for each in found["images"])
    sent = torch.stack([item["images"] for item in SliceDataset(tmp_path / "data", "validation")]).numpy()
    assert np.array_equal(found["slices"], sent) and sent.shape == (3, 2, 32, 32)
    assert np.array_equal(np.rint(sent[:, 0] * 65535), found["rows"])


def test_private_repositories(hub_server, hub, folder, monkeypatch):
    push_folder(folder, REPO, private=True)
    push_folder(folder, "tester/public")
    before = dict(hub.repos["models", "tester/public"].branches)
    with pytest.raises(ValueError, match="exists and is public"):
        push_folder(folder, "tester/public", private=True)
    assert hub.repos["models", "tester/public"].branches == before

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        DLDMPipeline.from_pretrained(REPO)
    with pytest.raises(OSError, match="token"):
        push_folder(folder, REPO)
    assert isinstance(DLDMPipeline.from_pretrained(REPO, token=hub_server.TOKEN), DLDMPipeline)


@pytest.mark.parametrize("revision", [None, "maps/first"])
def test_a_broken_upload_leaves_the_repository_as_it_was(hub, folder, tiny_pipeline, other_tiny_pipeline, revision):
    url = push_folder(folder, REPO)
    before = dict(hub.repos["models", REPO].branches)
    assert url == f"{hub.url}/{REPO}/commit/{before['main']}"
    other_tiny_pipeline.save_pretrained(folder)
    hub.break_at = "POST .*/commit/"
    with pytest.raises(OSError, match=f"to {REPO} failed: .*disconnected.*run it again"):
        push_folder(folder, REPO, revision=revision)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    repo = hub.repos["models", REPO]
    assert set(repo.branches.values()) == set(before.values()) and len(repo.commits) == 2
    assert np.array_equal(images(DLDMPipeline.from_pretrained(REPO)), images(tiny_pipeline))

    hub.break_at = None
    push_folder(folder, REPO, revision=revision)
    assert (repo.branches["main"] == before["main"]) == (revision is not None)
    loaded = DLDMPipeline.from_pretrained(REPO, revision=revision)
    assert np.array_equal(images(loaded), images(other_tiny_pipeline))


def test_old_weights_go_and_what_is_private_stays_here(hub, folder):
    old = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "old/x.safetensors.index.json"]
    private = ["checkpoint-10/x.safetensors", "logs/events", "validation/1.png", ".secret", "unet/w.bin", "w.pkl"]
    kept = sorted([*(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), "LICENSE"])
    for name in (*old, *private, "LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    push_folder(folder, REPO)
    assert sorted(hub.files("models", REPO)) == sorted([*kept, *old])
    for name in old:
        (folder / name).unlink()
    push_folder(folder, REPO)
    assert sorted(hub.files("models", REPO)) == kept
    assert len(hub.repos["models", REPO].commits) == 3  # the empty one, and one for each push
