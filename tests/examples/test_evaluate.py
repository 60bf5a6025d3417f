"""The script from end to end on tiny models: an untrained pipeline, both compared systems, twenty simulated subjects."""

import base64
import importlib.util
import io
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.slices import write_slices
from dldm_pipeline.metrics.features import FeatureExtractor
from dldm_pipeline.pipeline_dldm import DLDMPipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"
BASELINES = Path(__file__).parents[2] / "training" / "baselines"
NAMES = ["T1", "WB", "BB"]
# Few of everything.
QUICK = ["--num_subjects=6", "--num_inference_steps=2", "--num_style_inference_steps=1", "--step_counts", "1", "2"]
QUICK += ["--step_subjects=4", "--segmenter_steps=3"]


@pytest.fixture(scope="module")
def evaluate():
    spec = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    """A tiny random convolution, so that features cost nothing."""
    weights = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 700

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(pixels - 127, weights, stride=4).relu().mean(dim=(2, 3))

    return FeatureExtractor("tiny", "a tiny convolution", 32, 16, forward, "0" * 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Untrained systems, and a data set with ten validation subjects."""
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
    for parameter in autoencoder.parameters():  # untrained, its images would be black
        torch.nn.init.normal_(parameter, std=0.3)
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
    sys.path.insert(0, str(BASELINES))
    from plain_ldm import PlainLDM
    from stylegan2 import StyleGAN2

    # Other orders of the modalities: the script must sort them.
    StyleGAN2(["BB", "T1", "WB"], 32, (8, 8, 8, 8), 8, 1).save_pretrained(root / "stylegan2")
    StyleGAN2(NAMES[:2], 32, (8, 8, 8, 8), 8, 1).save_pretrained(root / "two_modalities")
    options = dict(block_out_channels=(8, 8), attention_sizes=(), attention_head_dim=8)
    options |= dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    PlainLDM(NAMES, 32, 2, (8, 16), 1, 4, **options).save_pretrained(root / "plain_ldm")
    write_slices(phantom_rows(20, 32, modalities=NAMES), root / "data", NAMES, val_fraction=0.5)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def full(evaluate, folders, extractor, tmp_path_factory) -> tuple[Path, dict]:
    """One run with all there is: its output and its results."""
    output = tmp_path_factory.mktemp("full") / "new" / "report"
    return output, evaluate.main(full_arguments(folders, output), extractor)


def full_arguments(folders: dict[str, Path], output: Path, *more: str) -> list[str]:
    given = [f"--pipeline={folders['pipeline']}", f"--dataset={folders['data']}", f"--output={output}", *QUICK, *more]
    return [*given, "--baselines", str(folders["stylegan2"]), str(folders["plain_ldm"])]


def cached(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}


def test_full_report(full, capsys):
    output, results = full
    stored = json.loads((output / "metrics.json").read_text())
    assert sorted(path.name for path in output.iterdir()) == [
        "cache", "figures", "metrics.json", "report.html", "report.md"
    ]  # fmt: skip
    systems = ["DLDM", "StyleGAN2", "plain LDM"]
    assert list(stored["systems"]) == list(stored["fidelity"]) == list(stored["memorization"]) == systems
    assert list(stored["alignment"]) == ["validation", "rebuilt", *systems]
    assert stored["fidelity"]["plain LDM"]["num_images"]["T1"] == {"real": 6, "generated": 6, "floor": 6}
    assert stored["fidelity"]["DLDM"]["floor"] == stored["fidelity"]["StyleGAN2"]["floor"]
    assert stored["reconstruction"]["num_subjects"] == 10 and set(stored["segmenter_dice"]) == set(NAMES)
    assert stored["alignment"]["DLDM"]["mask_agreement"]["WB"] is not None
    assert stored["alignment"]["plain LDM"]["mask_agreement"]["WB"] is None  # it draws no masks
    assert [entry["num_inference_steps"] for entry in stored["steps"]["entries"]] == [1, 2]
    assert stored["generation"]["num_subjects"] == 6 and stored["generation"]["num_inference_steps"] == 2
    assert stored["memorization"]["DLDM"]["channels"] == [*NAMES, "z_struct"]
    assert stored["memorization"]["DLDM"]["num_train_slices"] == 10
    ratio = results["claims"]["frechet_ratio"]
    values = [results["fidelity"][name]["scores"]["frechet_distance"]["mean"]["value"] for name in systems[:2]]
    assert ratio == pytest.approx(values[0] / values[1])


def test_report_as_text_and_as_a_page_of_its_own(full):
    output, results = full
    report, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    for heading in (
        "The paper's table",
        "Fidelity and diversity",
        "Figure 2 of the paper, rebuilt",
        "Alignment",
        "Steps against fidelity",
        "Memorisation",
        "Reconstruction",
        "Disentanglement",
        "Sharpness of generated images",
        "How it was measured",
    ):
        assert f"## {heading}\n" in report and f"<h2>{heading.replace(chr(39), '&#x27;')}</h2>" in page
    assert "a tiny convolution) and no FID" in report or "a tiny convolution and no FID" in report
    for link in re.findall(r"!\[.*?\]\((.*?)\)", report):
        assert Image.open(output / link).size > (100, 100)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    embedded = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    # Two real subjects and two of each of three systems, tiles of 128 pixels, one column a modality.
    assert any(picture.height > 8 * 128 and picture.width > 3 * 128 for picture in embedded)
    assert f"{results['reconstruction']['psnr_mean']:.2f} dB" in page


def test_a_second_run_computes_only_what_changed(evaluate, folders, extractor, full, tmp_path):
    output, results = full
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    before = cached(copy)
    again = evaluate.main(full_arguments(folders, copy), extractor)
    assert cached(copy) == before
    again["seconds"] = results["seconds"]
    assert json.dumps(again) == json.dumps(results)

    changed = dict(folders, stylegan2=tmp_path / "stylegan2")
    from stylegan2 import StyleGAN2

    torch.manual_seed(1)
    StyleGAN2(NAMES, 32, (8, 8, 8, 8), 8, 1).save_pretrained(changed["stylegan2"])
    other = evaluate.main(full_arguments(changed, copy), extractor)
    assert other["fidelity"]["DLDM"] == again["fidelity"]["DLDM"]
    assert other["fidelity"]["StyleGAN2"]["scores"] != again["fidelity"]["StyleGAN2"]["scores"]
    new = sorted(name.rsplit("-", 1)[0] for name in set(cached(copy)) - set(before))
    assert new == ["alignment", "fidelity", "memorization", "subjects", "tiny", "tiny", "tiny"]
    assert {name: time for name, time in cached(copy).items() if name in before} == before


def test_modalities_of_a_compared_system_are_sorted(evaluate, folders):
    system = evaluate.open_baseline(folders["stylegan2"], NAMES, 32, "cpu")
    images, masks, structure = system.draw([torch.Generator().manual_seed(3)])
    from stylegan2 import StyleGAN2

    expected = StyleGAN2.from_pretrained(folders["stylegan2"]).sample(1, [torch.Generator().manual_seed(3)])
    np.testing.assert_array_equal(images, expected[:, [1, 2, 0]].numpy())
    assert masks.shape == (1, 32, 32) and structure is None


def test_without_a_dataset_and_without_the_extras(evaluate, folders, extractor, tmp_path):
    results = evaluate.main(
        [f"--pipeline={folders['pipeline']}", f"--output={tmp_path}", "--max_validation=8", *QUICK]
        + ["--step_subjects=0", "--segmenter_steps=0"],
        extractor,
    )
    assert results["reconstruction"]["num_subjects"] == 8 and "8 simulated subjects" in results["dataset"]
    assert results["second_real"] == "other simulated subjects"
    assert "steps" not in results and "memorization" not in results  # nobody knows what it was trained on
    assert results["alignment"]["DLDM"]["mask_agreement"] is None
    assert set(results["claims"]) == {"precision_share", "recall_share"}


def test_training_subjects_are_the_second_real_sample(evaluate, folders):
    args = evaluate.parse_args([f"--dataset={folders['data']}"])
    held_out, others = evaluate.open_data(args, 32, NAMES)
    assert not {held_out[i]["subject"] for i in range(10)} & {others[i]["subject"] for i in range(10)}
    args.split = "train"
    held_out, others = evaluate.open_data(args, 32, NAMES)
    assert len(held_out) == 10 and others is None
    with pytest.raises(ValueError, match="has 32 pixel images, the model needs 64"):
        evaluate.open_data(args, 64, NAMES)


def test_autoencoder_only_gives_the_same_figures(evaluate, folders, tmp_path):
    pipeline = folders["pipeline"]
    options = ["--autoencoder_only", f"--dataset={folders['data']}", "--max_validation=9", "--segmenter_steps=0"]
    alone = evaluate.main([*options, f"--autoencoder={pipeline / 'autoencoder'}", f"--output={tmp_path / 'a'}"])
    inside = evaluate.main([*options, f"--pipeline={pipeline}", f"--output={tmp_path / 'b'}"])
    assert "generation" not in alone and alone["reconstruction"]["num_slices"] == 9
    assert alone["reconstruction"] == inside["reconstruction"]


def test_json_holds_no_nan(evaluate):
    assert evaluate.finite({"a": [math.nan, 1.0], "b": math.inf}) == {"a": [None, 1.0], "b": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_subjects=3"], "--num_subjects 3: .* need 4 or more"),
        (["--max_validation=0"], "--max_validation 0"),
        (["--step_subjects=2"], "--step_subjects 2"),
        (["--step_counts", "0"], "--step_counts 0"),
        (["--segmenter_steps=-1"], "--segmenter_steps -1"),
        (["--autoencoder=x"], "--autoencoder_only"),
        (["--pipeline=nowhere"], "nowhere holds no model_index.json"),
        (["--baselines", "nowhere"], "nowhere holds no config.json"),
        (["--dataset=/nowhere/data"], "/nowhere/data"),
        (["--dataset=DATA", "--baselines", "TWO"], "draws T1, WB at 32 pixels, the pipeline T1, WB, BB at 32"),
        (["--dataset=DATA", "--baselines", "PLAIN", "PLAIN"], "one system twice: DLDM, plain LDM, plain LDM"),
        (["--dataset=DATA", "--baselines", "UNET"], "holds a UNet2DModel; known are StyleGAN2, PlainLDM"),
        (["--dataset=DATA", "--extractor=vgg16", "--extractor_weights=no.pth"], "VGG16 weight file no.pth does not"),
    ],
)
def test_bad_arguments_are_named(evaluate, folders, tmp_path, options, message):
    places = {"DATA": folders["data"], "TWO": folders["two_modalities"], "PLAIN": folders["plain_ldm"]}
    places["UNET"] = folders["pipeline"] / "unet"
    for word, folder in places.items():
        options = [option.replace(word, str(folder)) for option in options]
    given = any("--pipeline" in option or "--autoencoder" in option for option in options)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main([*([] if given else [f"--pipeline={folders['pipeline']}"]), *options, f"--output={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["pipeline", "stylegan2", "extractor"])
def test_the_script_prints_one_line_and_exits_with_2(folders, tmp_path, monkeypatch, capsys, broken):
    """With truncated weights: of the pipeline, of a compared system, of the feature extractor."""
    own = {name: tmp_path / name for name in ("pipeline", "stylegan2", "extractor")}
    for name in ("pipeline", "stylegan2"):
        shutil.copytree(folders[name], own[name])
    own["extractor"].write_bytes(b"0" * 100)
    if broken != "extractor":
        weights = next(own[broken].rglob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
    options = [f"--pipeline={own['pipeline']}", f"--dataset={folders['data']}", f"--output={tmp_path / 'out'}", *QUICK]
    options += ["--baselines", str(own["stylegan2"]), f"--extractor_weights={own['extractor']}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and str(tmp_path / broken) in error
    assert list((tmp_path / "out").iterdir()) == []
