import json
import shutil

import pytest
import torch
import train_plain_ldm
from baseline_utils import Slices
from plain_ldm import PlainLDM
from safetensors.torch import load_file

from dldm_pipeline.training_args import PlainLDMArgs


@pytest.fixture(scope="module")
def run(words, extractor, tmp_path_factory):
    """Output of a run."""
    output = tmp_path_factory.mktemp("plain_ldm")
    more = ("--validation_steps=2", "--checkpointing_steps=2", "--max_train_steps=4")
    train_plain_ldm.main(words("plain_ldm", output, *more), extractor)
    return output


def test_a_run_writes_a_model_that_generates_subjects(run):
    model = PlainLDM.from_pretrained(run)
    assert model.sample(2, torch.Generator().manual_seed(0)).shape == (2, 3, 32, 32)
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    entries = json.loads((run / "selection.json").read_text())
    assert [entry["step"] for entry in entries] == [2, 4]
    card = (run / "README.md").read_text()
    assert "T1, T2, FLAIR" in card and "PSNR of held-out images" in card and "Not for diagnosis" in card
    assert (run / "samples.png").is_file() and (run / "validation" / "step-000002.png").is_file()
    assert not [path for path in run.rglob("*") if "tmp" in path.name or "partial" in path.name]
    # The autoencoder is that of the first stage, and its latents are of deviation 1.
    first = PlainLDM.from_pretrained(run / "first_stage")
    torch.testing.assert_close(first.autoencoder.state_dict(), model.autoencoder.state_dict(), rtol=0, atol=0)
    assert first.config.latents_std == model.config.latents_std
    # Its denoiser is that of the second stage.
    assert not torch.equal(first.unet.conv_in.weight, model.unet.conv_in.weight)


def test_a_resumed_run_ends_like_one_that_never_stopped(run, words, extractor, tmp_path):
    for name in ("checkpoint-2", "first_stage"):  # as if the run had been killed after it
        shutil.copytree(run / name, tmp_path / name)
    more = ("--validation_steps=2", "--checkpointing_steps=2", "--max_train_steps=4", "--resume_from_checkpoint=latest")
    train_plain_ldm.main(words("plain_ldm", tmp_path, *more), extractor)
    weights = [load_file(folder / "checkpoint-4" / "ema.safetensors") for folder in (run, tmp_path)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_no_missing_modality_is_chosen():
    present = torch.tensor([[True, False, True], [False, True, False]])
    images = torch.arange(1, 7).reshape(2, 3, 1, 1).expand(-1, -1, 4, 4) / 10
    drawn = train_plain_ldm.random_images(Slices(images.half(), present), 200)
    assert drawn.shape == (200, 1, 4, 4) and set((drawn[:, 0, 0, 0] * 10).round().tolist()) == {1, 3, 5}
    latents = torch.arange(12).reshape(2, 2, 3, 1, 1, 1)
    drawn, labels = train_plain_ldm.random_latents(latents, present, 200)
    values = drawn[:, 0, 0, 0].long()
    assert torch.equal(values % 3, labels) and set(values.tolist()) == {0, 2, 3, 5, 7, 10}


def test_training_lowers_both_losses():
    args = train_plain_ldm.parse_args(PlainLDMArgs, "", train_plain_ldm.PRESETS, ["--config=plain_ldm_tiny"])
    model = train_plain_ldm.build_model(args, ("T1", "T2", "FLAIR"))
    objective = train_plain_ldm.AutoencoderLoss(model)
    # Smooth pictures: what a small latent can hold.
    images = torch.nn.functional.interpolate(torch.rand(16, 1, 4, 4), 32, mode="bicubic").clamp(0, 1)
    latents, labels = torch.randn(16, 4, 8, 8) * 0.1 + 1, torch.zeros(16).long()
    scheduler = train_plain_ldm.make_scheduler()
    for part, loss_of in (
        (model.autoencoder, lambda: objective(images)),
        (model.unet, lambda: train_plain_ldm.diffusion_loss(model, scheduler, latents, labels)),
    ):
        optimizer, losses = torch.optim.AdamW(part.parameters(), lr=3e-3), []
        for _ in range(30):
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]


def test_bad_input_is_refused(words, extractor, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, expected in (
        (["--resolution", "64"], "--image_size 64"),
        (["--block_out_channels", "8", "12"], "width of 12"),
        (["--patch_size", "0"], "--patch_size 0"),
        (["--autoencoder_fraction", "1"], "--autoencoder_fraction 1.0"),
        (["--selection_subjects", "1"], "--selection_subjects 1"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps 2"),
        (["--dataset", "./absent"], "absent"),
    ):
        assert expected in refused(train_plain_ldm.main, words("plain_ldm", "out", *more), extractor)


def test_the_presets_build():
    for preset, most in (("plain_ldm_small", 8e6), ("plain_ldm_tiny", 1e5)):
        args = train_plain_ldm.parse_args(PlainLDMArgs, "", train_plain_ldm.PRESETS, ["--config", preset])
        with torch.device("meta"):
            model = train_plain_ldm.build_model(args, ("T1", "T2", "FLAIR", "WB", "BB"))
        assert model.num_parameters() < most
