"""The script from end to end on tiny models: an untrained pipeline, both compared systems, twenty simulated subjects."""

import copy
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.slices import SliceDataset, write_slices
from dldm_pipeline.metrics.features import FeatureExtractor

BASELINES = Path(__file__).parents[2] / "training" / "baselines"
NAMES = ["T1", "T2", "WB"]  # of `tiny_pipeline`
# Few of everything.
QUICK = ["--num_subjects=6", "--num_inference_steps=2", "--num_style_inference_steps=1", "--step_counts", "1", "2"]
QUICK += ["--step_subjects=4", "--segmenter_steps=2"]


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    """A tiny random convolution, so that features cost nothing."""
    weights = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 700

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(pixels - 127, weights, stride=4).relu().mean(dim=(2, 3))

    return FeatureExtractor("tiny", "a tiny convolution", 32, 16, forward, "0" * 64)


@pytest.fixture(scope="module")
def folders(tiny_pipeline_folder, tmp_path_factory) -> dict[str, Path]:
    """Untrained systems, and a data set with ten validation subjects."""
    root = tmp_path_factory.mktemp("evaluate")
    sys.path.insert(0, str(BASELINES))
    from plain_ldm import PlainLDM
    from stylegan2 import StyleGAN2

    # Other orders of the modalities: the script must sort them.
    StyleGAN2(["WB", "T1", "T2"], 32, (8, 8, 8, 8), 8, 1).save_pretrained(root / "stylegan2")
    StyleGAN2(NAMES[:2], 32, (8, 8, 8, 8), 8, 1).save_pretrained(root / "two_modalities")
    options = dict(block_out_channels=(8, 8), attention_sizes=(), attention_head_dim=8)
    options |= dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    PlainLDM(NAMES, 32, 2, (8, 16), 1, 4, **options).save_pretrained(root / "plain_ldm")
    write_slices(phantom_rows(20, 32, modalities=NAMES), root / "data", NAMES, val_fraction=0.5)
    return {path.name: path for path in root.iterdir()} | {"pipeline": tiny_pipeline_folder}


@pytest.fixture(scope="module")
def full(script, folders, extractor, tmp_path_factory) -> tuple[Path, dict]:
    """One run with all there is: its output and its results."""
    output = tmp_path_factory.mktemp("full") / "new" / "report"
    return output, script.main(full_arguments(folders, output), extractor)


@pytest.fixture(scope="module")
def broken(folders, tmp_path_factory) -> Path:
    """A pipeline, a compared system and an extractor with truncated weights."""
    root = tmp_path_factory.mktemp("broken")
    for name in ("pipeline", "stylegan2"):
        shutil.copytree(folders[name], root / name)
        weights = next((root / name).rglob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
    (root / "extractor").write_bytes(b"0" * 100)
    return root


def full_arguments(folders: dict[str, Path], output: Path) -> list[str]:
    given = [f"--pipeline={folders['pipeline']}", f"--dataset={folders['data']}", f"--output={output}", *QUICK]
    return [*given, "--baselines", str(folders["stylegan2"]), str(folders["plain_ldm"])]


def cached(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}


def test_full_report(script, full):
    output, results = full
    stored = json.loads((output / "metrics.json").read_text())
    written = {path.name for path in output.iterdir()}
    assert written == {"cache", "figures", "metrics.json", "report.html", "report.md"}
    systems = ["DLDM", "StyleGAN2", "plain LDM"]
    assert list(stored["systems"]) == list(stored["fidelity"]) == list(stored["memorization"]) == systems
    assert list(stored["alignment"]) == ["validation", "rebuilt", *systems]
    assert stored["fidelity"]["plain LDM"]["num_images"]["T1"] == {"real": 6, "generated": 6, "floor": 6}
    assert stored["fidelity"]["DLDM"]["floor"] == stored["fidelity"]["StyleGAN2"]["floor"]
    assert stored["styles"]["spread"]["T2"] > 0 and len(stored["styles"]["validation_halves"]) == 4
    assert stored["reconstruction"]["num_subjects"] == 10 and set(stored["segmenter_dice"]) == set(NAMES)
    assert stored["alignment"]["DLDM"]["mask_agreement"]["WB"] is not None
    assert stored["alignment"]["plain LDM"]["mask_agreement"]["WB"] is None  # it has no masks
    assert [entry["num_inference_steps"] for entry in stored["steps"]["entries"]] == [1, 2]
    assert stored["generation"]["num_subjects"] == 6 and stored["generation"]["num_inference_steps"] == 2
    assert stored["memorization"]["DLDM"]["channels"] == [*NAMES, "z_struct"]
    assert stored["memorization"]["DLDM"]["num_train_slices"] == 10
    values = [results["fidelity"][name]["scores"]["frechet_distance"]["mean"]["value"] for name in systems[:2]]
    assert results["claims"]["frechet_ratio"] == pytest.approx(values[0] / values[1])

    report, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    assert len(re.findall("^## ", report, re.M)) == page.count("<h2>") == 12
    assert "a tiny convolution, so the distance is not an FID" in report
    assert f"{results['reconstruction']['psnr_mean']:.2f} dB" in page
    links = re.findall(r"!\[.*?\]\((.*?)\)", report)
    sizes = {Path(link).stem: Image.open(output / link).size for link in links}
    assert list(sizes) == ["appearances", "scores", "systems", "steps", "closest_pairs"]
    assert min(map(min, sizes.values())) > 100 and stored["exchange"]["curves"]["num_slices"] == 10
    # Two real subjects and two of each of three systems, tiles of 128 pixels, one column a modality.
    assert sizes["systems"][0] > 3 * 128 and sizes["systems"][1] > 8 * 128
    assert script.finite({"a": [math.nan, 1.0], "b": math.inf}) == {"a": [None, 1.0], "b": None}  # JSON has no NaN


def test_a_second_run_computes_only_what_changed(script, folders, extractor, full, tmp_path):
    from stylegan2 import StyleGAN2

    output, results = full[0], copy.deepcopy(full[1])
    again = tmp_path / "again"
    shutil.copytree(output, again)
    before = cached(again)
    changed = dict(folders, stylegan2=tmp_path / "stylegan2")
    torch.manual_seed(1)
    StyleGAN2(NAMES, 32, (8, 8, 8, 8), 8, 1).save_pretrained(changed["stylegan2"])
    other = script.main(full_arguments(changed, again), extractor)
    assert {name: time for name, time in cached(again).items() if name in before} == before
    new = sorted(name.rsplit("-", 1)[0] for name in set(cached(again)) - set(before))
    assert new == ["alignment", "fidelity", "memorization", "subjects", "tiny", "tiny", "tiny"]
    assert other["fidelity"]["StyleGAN2"]["scores"] != results["fidelity"]["StyleGAN2"]["scores"]
    for one in (other, results):
        for figures in (one["systems"], one["fidelity"], one["alignment"], one["memorization"]):
            del figures["StyleGAN2"]
        del one["claims"], one["seconds"]
    assert json.dumps(other) == json.dumps(results)


def test_modalities_of_a_compared_system_are_sorted(script, folders):
    system = script.open_baseline(folders["stylegan2"], NAMES, 32, "cpu")
    block = system.generate([torch.Generator().manual_seed(3)])
    images, masks = block["images"], block["masks"]
    from stylegan2 import StyleGAN2

    expected = StyleGAN2.from_pretrained(folders["stylegan2"]).sample(1, [torch.Generator().manual_seed(3)])
    np.testing.assert_array_equal(images, expected[:, [1, 2, 0]].numpy())
    assert masks.shape == (1, 32, 32)


def test_without_a_dataset_and_without_the_extras(script, folders, extractor, tmp_path):
    results = script.main(
        [f"--pipeline={folders['pipeline']}", f"--output={tmp_path}", "--max_validation=5", *QUICK]
        + ["--step_subjects=0", "--segmenter_steps=0", "--num_subjects=4"],
        extractor,
    )
    assert results["reconstruction"]["num_subjects"] == 5 and "5 simulated subjects" in results["dataset"]
    assert results["second_real"] == "other simulated subjects"
    assert set(results["exchange"]["truth"]["own"]) == set(NAMES) == set(results["exchange"]["probes"]["style"]["csf"])
    assert "steps" not in results and "memorization" not in results  # it is unknown what it was trained on
    assert results["alignment"]["DLDM"]["mask_agreement"] is None
    assert set(results["claims"]) == {"precision_share", "recall_share"}


def test_training_subjects_are_the_second_real_sample(script, folders):
    args = script.parse_args([f"--dataset={folders['data']}"])
    held_out, others = script.open_data(args, 32, NAMES)
    assert not {held_out[i]["subject"] for i in range(10)} & {others[i]["subject"] for i in range(10)}
    assert held_out[0]["subject"] == SliceDataset(folders["data"], "validation")[0]["subject"]
    args.split = "train"
    held_out, others = script.open_data(args, 32, NAMES)
    assert len(held_out) == 10 and others is None
    with pytest.raises(ValueError, match="has 32 pixel images, the model needs 64"):
        script.open_data(args, 64, NAMES)


def test_an_autoencoder_alone_gives_the_same_figures(script, folders, full, tmp_path):
    shutil.copytree(full[0] / "cache", tmp_path / "cache")
    before = cached(tmp_path)
    options = [f"--dataset={folders['data']}", f"--output={tmp_path}", *QUICK]
    alone = script.main([f"--autoencoder={folders['pipeline'] / 'autoencoder'}", *options])
    assert cached(tmp_path) == before and alone["reconstruction"] == full[1]["reconstruction"]
    assert list(alone["alignment"]) == ["validation", "rebuilt"] and "generation" not in alone
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"cache", "figures", "metrics.json", "report.html", "report.md"}


def test_bad_input_is_named_in_one_line(refused, folders, broken, tmp_path):
    for options, message in (
        (["--num_subjects=3"], "--num_subjects 3: give 4 or more"),
        (["--max_validation=0"], "--max_validation 0"),
        (["--step_subjects=2"], "--step_subjects 2"),
        (["--step_counts", "0"], "--step_counts 0"),
        (["--segmenter_steps=-1"], "--segmenter_steps -1"),
        (["--autoencoder=x"], "--autoencoder is measured alone"),
        (["--autoencoder=x", "--pipeline="], "--autoencoder x holds no config.json"),
        (["--pipeline=./nowhere"], "--pipeline nowhere: no such folder"),
        (["--baselines", "nowhere"], "--baselines nowhere holds no config.json"),
        (["--dataset=/nowhere/data"], "/nowhere/data"),
        (["--dataset=DATA", "--baselines", "TWO"], "generates T1, T2 at 32 pixels, the pipeline T1, T2, WB at 32"),
        (["--dataset=DATA", "--baselines", "PLAIN", "PLAIN"], "one system twice: DLDM, plain LDM, plain LDM"),
        (["--dataset=DATA", "--baselines", "UNET"], "holds a UNet2DModel; known are StyleGAN2, PlainLDM"),
        (["--dataset=DATA", "--extractor=vgg16", "--extractor_weights=no.pth"], "VGG16 weight file no.pth does not"),
        # Truncated weights: of the pipeline, of a compared system, of the feature extractor.
        (["--pipeline=BROKEN/pipeline"], "BROKEN/pipeline"),
        (["--baselines", "BROKEN/stylegan2"], "BROKEN/stylegan2"),
        (["--extractor_weights=BROKEN/extractor"], "BROKEN/extractor"),
    ):
        places = {"DATA": folders["data"], "TWO": folders["two_modalities"], "PLAIN": folders["plain_ldm"]}
        places |= {"UNET": folders["pipeline"] / "unet", "BROKEN": broken}
        for word, folder in places.items():
            options = [option.replace(word, str(folder)) for option in options]
            message = message.replace(word, str(folder))
        assert message in refused(f"--pipeline={folders['pipeline']}", *options, f"--output={tmp_path}")
        assert list(tmp_path.iterdir()) == []
