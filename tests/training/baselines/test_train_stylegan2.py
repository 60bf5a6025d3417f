import json
import shutil

import numpy as np
import pytest
import torch
import train_stylegan2
from baseline_utils import Slices
from PIL import Image
from safetensors.torch import load_file
from stylegan2 import StyleGAN2

from dldm_pipeline.data.slices import SliceDataset, write_slices
from dldm_pipeline.training_args import StyleGAN2Args

MORE = ("--validation_steps=2", "--checkpointing_steps=2", "--max_train_steps=4")


@pytest.fixture(scope="module")
def run(words, extractor, tmp_path_factory):
    output = tmp_path_factory.mktemp("stylegan2")
    train_stylegan2.main(words("stylegan2", output, *MORE), extractor)
    return output


def test_a_run_writes_a_generator_that_generates_subjects(run):
    output = run
    model = StyleGAN2.from_pretrained(output)
    images, masks = model.sample(2, torch.Generator().manual_seed(0), return_masks=True)
    assert images.shape == (2, 3, 32, 32) and masks.shape == (2, 32, 32)
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    entries = json.loads((output / "selection.json").read_text())
    assert [entry["step"] for entry in entries] == [2, 4]
    assert Image.open(output / "samples.png").size[1] > Image.open(output / "validation/step-000002.png").size[1]
    card = (output / "README.md").read_text()
    assert "T1, T2, FLAIR" in card and "KID (validation)" in card and "Not for diagnosis" in card
    assert str(output) not in (output / "config.json").read_text()
    assert not [path for path in output.rglob("*") if "tmp" in path.name or "partial" in path.name]
    # Averaged weights are what is published.
    best = min(entries, key=lambda entry: entry["KID"])["step"]
    average = load_file(output / f"checkpoint-{best}" / "ema.safetensors")
    assert torch.equal(next(iter(model.parameters())), average["0000"])


def test_a_resumed_run_ends_like_one_that_never_stopped(run, words, extractor, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")  # as if the run had been killed after it
    train_stylegan2.main(words("stylegan2", tmp_path, *MORE, "--resume_from_checkpoint=latest"), extractor)
    for name in ("ema", "model", "model_1"):
        weights = [load_file(folder / "checkpoint-4" / f"{name}.safetensors") for folder in (run, tmp_path)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_batches_are_real_images_with_soft_masks():
    images = torch.arange(1, 9).reshape(4, 2, 1, 1).expand(-1, -1, 8, 8) / 10
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[:, 2:4, 2:4] = True
    slices = Slices(images.half(), torch.tensor([[True, True], [True, False], [False, True], [True, True]]), masks)
    joint = train_stylegan2.random_batch(slices, 64)
    assert joint.shape == (64, 3, 8, 8)
    mask = joint[:, 2] / 2 + 0.5
    assert mask.min() == 0 and mask.max() == pytest.approx(0.5625) and mask[0].sum() == pytest.approx(4)
    assert (mask > 0.5).sum() == 4 * 64
    assert 0 < (mask[:, 2, 2] > 0.5).sum() < 64  # some are mirrored


def test_bad_input_is_refused(words, extractor, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, expected in (
        (["--resolution", "64"], "--image_size 64"),
        (["--channels", "8", "8"], "give 4 positive widths"),
        (["--translation", "0.5"], "--translation 0.5"),
        (["--r1_interval", "0"], "--r1_interval 0"),
        (["--selection_subjects", "1"], "--selection_subjects 1"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps 2"),
        (["--modalities", "T1", "WB"], "WB wanted"),
        (["--dataset", "./absent"], "absent"),
        (["--resume_from_checkpoint", "absent"], "--resume_from_checkpoint absent"),
    ):
        assert expected in refused(train_stylegan2.main, words("stylegan2", "out", *more), extractor)


def test_the_presets_build():
    for preset, most in (("stylegan2_small", 8e6), ("stylegan2_tiny", 1e5)):
        args = train_stylegan2.parse_args(StyleGAN2Args, "", train_stylegan2.PRESETS, ["--config", preset])
        with torch.device("meta"):
            generator, discriminator = train_stylegan2.build_networks(args, ("T1", "T2", "FLAIR", "WB", "BB"))
        assert generator.num_parameters() < most and sum(p.numel() for p in discriminator.parameters()) < most


@pytest.mark.slow
def test_it_learns_bright_discs(words, extractor, tmp_path):
    """Minutes: discs on black, all of them inside the picture, are drawn as such."""
    random, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32]

    def row(i):
        disc = np.hypot(y - random.uniform(12, 20), x - random.uniform(12, 20)) < random.uniform(6, 10)
        return {"subject": f"s{i}", "slice_index": 0, "T1": 0.7 * disc, "T2": 0.3 * disc, "mask": disc}

    write_slices((row(i) for i in range(500)), tmp_path / "data", ("T1", "T2"))
    more = ("--max_train_steps", "1500", "--train_batch_size", "16", "--channels", "64", "32", "16", "16")
    more += ("--selection_subjects", "100", "--validation_steps", "25", "--ema_decay", "0.99")
    train_stylegan2.main(words("stylegan2", tmp_path / "out", f"--dataset={tmp_path / 'data'}", *more), extractor)
    entries = json.loads((tmp_path / "out" / "selection.json").read_text())
    # The first entry is that of a model that has hardly begun.
    assert min(entry["KID"] for entry in entries) < 0.1 * entries[0]["KID"] or entries[0]["KID"] < 1e-3
    images, masks = StyleGAN2.from_pretrained(tmp_path / "out").sample(64, return_masks=True)
    real = SliceDataset(tmp_path / "data", "validation")
    area = torch.stack([real[i]["mask"] for i in range(len(real))]).mean()
    assert masks.mean() == pytest.approx(area.item(), rel=0.3)
    inside = masks.bool() & (images[:, 0] > 0.35)
    assert inside.sum() > 0.9 * masks.sum()
    # Both contrasts show the same disc.
    assert torch.corrcoef(torch.stack([images[:, 0].flatten(), images[:, 1].flatten()]))[0, 1] > 0.9
