"""examples/push_to_hub.py as a user runs it, against a Hub on localhost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.data.slices import write_slices
from dldm_pipeline.hub import write_model_card

ROOT = Path(__file__).parents[2]
REPO = "tester/brains"
MEASURED = ROOT / "docs" / "comparison" / "metrics.json"  # of examples/evaluate.py


@pytest.fixture
def trained(pipeline_folder) -> Path:
    """A folder as train_ldm.py leaves it."""
    (pipeline_folder / "checkpoint-10").mkdir()
    (pipeline_folder / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    unet = pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(unet).items()}, unet, {"format": "pt"})
    (pipeline_folder / "samples.png").write_bytes(b"real and generated subjects")
    (pipeline_folder / "LICENSE").write_bytes(b"as you like")
    figures, settings = {"v-loss": 0.3}, {"steps": 7}
    write_model_card(pipeline_folder, "Title", "It works.", figures, settings, training_data="80 slices of mice.")
    return pipeline_folder


def test_a_pipeline_arrives_with_its_card(script, hub, trained, tmp_path, capsys):
    metrics = json.loads(MEASURED.read_text())
    metrics["reconstruction"] |= {"mask_dice": None, "single_cost_mean": {"T1": 0.3, "T2": 0.5, "WB": None}}
    metrics["exchange"] = {"truth": {"exchange_cost": 0.7, "gap_closed": 0.85}}
    metrics["memorization"]["DLDM"] |= {"num_samples": 100, "num_train_subjects": 64, "refused": 3}
    metrics["memorization"]["DLDM"] |= {"false_alarm_rate": 0.05, "closest": [{"train_subject": "patient-7"}]}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    words = ["--metrics", str(tmp_path / "metrics.json"), "--license", "cc-by-4.0"]
    script.main([str(trained), "--repo_id", REPO, *words])
    assert capsys.readouterr().out.startswith(f"{hub.url}/{REPO}/commit/")

    files = hub.files("models", REPO)
    weights = "unet/diffusion_pytorch_model.safetensors"  # as they are, whatever their precision
    assert files[weights] == (trained / weights).read_bytes() and files["LICENSE"] == b"as you like"
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers" and len(card.data.widget) == 4
    for picture in card.data.widget:
        assert "synthetic" in picture["text"] and "T1, T2, WB" in picture["text"]
        (tmp_path / "picture.png").write_bytes(files[picture["output"]["url"]])
        with Image.open(tmp_path / "picture.png") as image:
            assert image.width > 4 * 128  # three images and the mask
    # evaluate.py writes each figure that the card names, and the card says which they are.
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert set(script.FIGURES) - set(figures) == {"tumour mask, Dice"}
    assert figures["rebuilt images, PSNR (dB)"] == metrics["reconstruction"]["psnr_mean"]
    assert figures["generated images, recall"] == metrics["fidelity"]["DLDM"]["scores"]["recall"]["mean"]["value"]
    edges = metrics["alignment"]["DLDM"]["edge_correlation"].values()
    assert figures["generated modalities, correlation of edges"] == pytest.approx(sum(edges) / len(edges))
    for line in (
        "# brains",
        "T1, T2, WB with the tumour mask",
        "| PSNR lost when structure comes from one modality (dB) | 0.4 |",
        "| PSNR lost when the style comes from another anatomy (dB) | 0.7 |",
        f'DLDMPipeline.from_pretrained("{REPO}")',
        f'DiffusionPipeline.from_pretrained("{REPO}", trust_remote_code=True)',
        "## Training data\n\n80 slices of mice.",
        "| steps | 7 |",
        "Of 100 generated subjects, 3 came closer to one of 64 training subjects, in pixels or in anatomy, than 95%",
        "## Intended use and limits",
        "## Licence\n\ncc-by-4.0",
    ):
        assert line in card.text, line
    assert "v-loss" not in card.content and "None" not in card.text
    # Nothing of the training subjects goes along.
    assert not any("checkpoint" in path or "samples" in path or "metrics" in path for path in files)
    assert not any(b"patient-7" in content for content in files.values())
    assert isinstance(DLDMPipeline.from_pretrained(REPO), DLDMPipeline)


def test_private_on_a_branch_without_figures(script, hub, trained):
    words = [str(trained), "--repo_id", REPO, "--private", "--revision", "trial"]
    script.main([*words, "--training_data", "Rats."])
    repo = hub.repos["models", REPO]
    assert repo.private and set(repo.branches) == {"main", "trial"} and not repo.commits[repo.branches["main"]]
    text = hub.files("models", REPO, "trial")["README.md"].decode()
    assert "## Training data\n\nRats." in text and "## Memorisation\n\nNot measured." in text
    assert f'from_pretrained("{REPO}", revision="trial")' in text and "Figures on held-out subjects" not in text

    # A card that nobody's training script wrote, as that of the bundled pipeline, says nothing of the training.
    shutil.copy(ROOT / "model_card.md", trained / "README.md")
    script.main(words)
    text = hub.files("models", REPO, "trial")["README.md"].decode()
    assert "## Training data\n\nNot stated by the uploader." in text and "## Training\n" not in text


def test_a_data_set_is_pushed_as_it_is(script, hub, tmp_path):
    folder = tmp_path / "data"
    rows = [{"subject": name, "slice_index": 0, "T1": np.eye(32)} for name in "abc"]
    write_slices(rows, folder, ["T1"], val_fraction=0.5)
    (folder / "README.md").write_text("---\npretty_name: Slices\n---\n")
    script.main(["--dataset", str(folder), "--repo_id", REPO])
    assert len(hub.repos["datasets", REPO].commits) == 2 and ("models", REPO) not in hub.repos
    sent = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files("datasets", REPO) == sent and len(sent) == 3


def test_bad_input_is_one_line_and_nothing_is_pushed(refused, hub, trained):
    for words, message in (
        ([], "one of the arguments FOLDER --dataset is required"),
        ([trained, "--dataset", trained], "--dataset: not allowed with argument FOLDER"),
        (["nowhere"], "nowhere holds no model_index.json"),
        (["--dataset", trained], "holds no data/train-*.parquet"),
        ([trained, "--metrics", trained / "README.md"], "README.md is not JSON"),
        ([trained, "--metrics", "nowhere.json"], "nowhere.json"),
        ([trained, "--repo_id", "brains"], "--repo_id brains: give owner/name"),
        ([trained, "--repo_id", "tester/a b"], "Repo id must use alphanumeric"),
        ([trained, "--token", "wrong"], "check the connection and your token"),
    ):
        assert message in refused("--repo_id", REPO, *words)
        assert hub.repos == {}, words
    hub.break_at = "/commit/"
    assert f"to {REPO} failed" in refused(trained, "--repo_id", REPO) and len(hub.repos["models", REPO].commits) == 1
