"""examples/push_to_hub.py as a user runs it, against a Hub on localhost."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.slices import SliceDataset, write_slices
from dldm_pipeline.hub import write_model_card

ROOT = Path(__file__).parents[2]
REPO = "tester/brains"


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def push_to_hub():
    return load("push_to_hub", ROOT / "examples" / "push_to_hub.py")


@pytest.fixture
def trained(tiny_pipeline, tmp_path) -> Path:
    """A folder as train_ldm.py leaves it."""
    folder = tmp_path / "trained"
    tiny_pipeline.save_pretrained(folder)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    (folder / "samples.png").write_bytes(b"real and generated subjects")
    write_model_card(folder, "Title", "It draws. Trained on 80 slices of mice.", {"v-loss": 0.3}, {"steps": 7})
    return folder


@pytest.fixture
def metrics(tmp_path) -> Path:
    """What evaluate.py and `evaluate_memorization` write, in part."""
    row = {"refused_share": 0.02, "authenticity_mean": 0.75}
    figures = {
        "reconstruction": {"psnr_mean": 31.27, "mask_dice": None, "exchange_cost": {"T1": 0.3, "T2": 0.5, "WB": None}},
        "fidelity": {"DLDM": {"scores": {"recall": {"T1": {"value": 0.9}, "mean": {"value": 0.875, "low": 0.8}}}}},
        "alignment": {"DLDM": {"edge_correlation": {"T1-T2": 0.9, "T1-WB": 0.7}}},
        "memorization": {
            "DLDM": {
                "num_samples": 100,
                "num_train_subjects": 64,
                "refused": 3,
                "false_alarm_rate": 0.05,
                "samples": row,
                "held_out": {**row, "authenticity_mean": 0.8},
                "closest": [{"train_subject": "patient-7"}],
            }
        },
    }
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    return tmp_path / "metrics.json"


def test_a_pipeline_arrives_with_its_card(push_to_hub, hub, trained, metrics, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    push_to_hub.main([str(trained), "--repo_id", REPO, "--metrics", str(metrics), "--license", "cc-by-4.0"])
    assert capsys.readouterr().out.startswith(f"{hub.url}/{REPO}/commit/")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before

    card = ModelCard(hub.read("models", REPO, "README.md").decode())
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers"
    assert len(card.data.widget) == 4
    for picture in card.data.widget:
        assert "synthetic" in picture["text"] and "T1, T2, WB" in picture["text"]
        (tmp_path / "picture.png").write_bytes(hub.read("models", REPO, picture["output"]["url"]))
        with Image.open(tmp_path / "picture.png") as image:
            assert image.width > 4 * 128 and image.getextrema() != ((16, 16), (16, 16), (20, 20))
    text = card.text
    for line in (
        "# brains",
        "T1, T2, WB with the tumour mask",
        "| rebuilt images, PSNR (dB) | 31.27 |",
        "| PSNR lost when styles are exchanged between subjects (dB) | 0.4 |",
        "| generated images, recall | 0.875 |",
        "| generated modalities, correlation of edges | 0.8 |",
        f'DLDMPipeline.from_pretrained("{REPO}")',
        f'DiffusionPipeline.from_pretrained("{REPO}", trust_remote_code=True)',
        "Trained on 80 slices of mice.",
        "| steps | 7 |",
        "| generated subjects, authenticity | 0.75 |",
        "Of 100 generated subjects, 3 came closer to one of 64 training subjects, in pixels or in anatomy, than 95%",
        "## Intended use and limits",
        "## Licence\n\ncc-by-4.0",
    ):
        assert line in text, line
    assert "Dice" not in text and "v-loss" not in text and "None" not in text
    # Nothing of the training subjects goes along.
    repo = hub.repos["models", REPO]
    paths = [path for path in repo.commits[repo.branches["main"]] if not path.startswith(("unet/", "autoencoder/"))]
    assert not any("checkpoint" in path or "samples" in path or "metrics" in path for path in paths)
    assert not any(b"patient-7" in hub.read("models", REPO, path) for path in paths)
    assert isinstance(DLDMPipeline.from_pretrained(REPO), DLDMPipeline)


def test_private_on_a_branch_without_figures(push_to_hub, hub, trained):
    words = [str(trained), "--repo_id", REPO, "--private", "--revision", "trial", "--training_data", "Rats."]
    push_to_hub.main(words)
    repo = hub.repos["models", REPO]
    assert repo.private and set(repo.branches) == {"main", "trial"} and not repo.commits[repo.branches["main"]]
    text = hub.read("models", REPO, "README.md", "trial").decode()
    assert "## Training data\n\nRats." in text and "## Memorisation\n\nNot measured." in text
    assert f'from_pretrained("{REPO}", revision="trial")' in text and "Figures on held-out subjects" not in text


def test_a_data_set_comes_back_as_it_went(push_to_hub, hub, tmp_path):
    write_slices(phantom_rows(6, 32, modalities=["T1", "WB"]), tmp_path / "data", ["T1", "WB"], val_fraction=0.5)
    (tmp_path / "data" / "README.md").write_text("---\npretty_name: Slices\n---\n")
    push_to_hub.main(["--dataset", str(tmp_path / "data"), "--repo_id", REPO])
    assert len(hub.repos["datasets", REPO].commits) == 2 and ("models", REPO) not in hub.repos
    code = (
        "import sys\nfrom safetensors.torch import save_file\nfrom dldm_pipeline.data.slices import SliceDataset\n"
        "items = SliceDataset(sys.argv[1], 'validation')\n"
        "save_file({str(i): item['images'] for i, item in enumerate(items)}, sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, REPO, tmp_path / "pulled.safetensors"]
    done = subprocess.run(arguments, env=hub.environment(tmp_path / "other-home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pulled, went = load_file(tmp_path / "pulled.safetensors"), SliceDataset(tmp_path / "data", "validation")
    assert len(pulled) == len(went) == 3
    assert all(torch.equal(pulled[str(i)], went[i]["images"]) for i in range(3))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "either the FOLDER of a pipeline or --dataset"),
        (["{trained}", "--dataset", "{trained}"], "either the FOLDER of a pipeline or --dataset"),
        (["nowhere"], "nowhere holds no model_index.json"),
        (["--dataset", "{trained}"], "holds no data/train-*.parquet"),
        (["{trained}", "--metrics", "{trained}/README.md"], "README.md is not JSON"),
        (["{trained}", "--metrics", "nowhere.json"], "nowhere.json"),
        (["{trained}", "--repo_id", "brains"], "--repo_id brains: give owner/name"),
        (["{trained}", "--repo_id", "tester/a b"], "Repo id must use alphanumeric"),
        (["{trained}", "--token", "wrong"], "check the connection and your token"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_pushed(push_to_hub, hub, trained, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        push_to_hub.main(["--repo_id", REPO, *(word.format(trained=trained) for word in words)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert hub.repos == {}


def test_a_broken_upload_is_one_line_and_leaves_the_repository(push_to_hub, hub, trained, capsys):
    hub.break_at = "/commit/"
    with pytest.raises(SystemExit) as stop:
        push_to_hub.main([str(trained), "--repo_id", REPO])
    assert stop.value.code == 2 and f"to {REPO} failed" in capsys.readouterr().err
    assert len(hub.repos["models", REPO].commits) == 1


def test_help_teaches(push_to_hub, capsys):
    with pytest.raises(SystemExit):
        push_to_hub.main(["--help"])
    text = capsys.readouterr().out
    assert "python examples/push_to_hub.py outputs/mine --repo_id me/brains" in text and "--private" in text
