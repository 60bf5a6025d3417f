import json

import pytest
import torch
import train_plain_ldm
from baseline_utils import Slices
from plain_ldm import PlainLDM
from safetensors.torch import load_file


def words(data, output, *more):
    return ["--config", "plain_ldm_tiny", f"--dataset={data}", f"--output_dir={output}", *more]


def test_a_run_writes_a_model_that_draws_subjects(baseline_data, extractor, tmp_path):
    more = ("--validation_steps", "2", "--checkpointing_steps", "2", "--max_train_steps", "3")
    train_plain_ldm.main(words(baseline_data, tmp_path, *more), extractor)
    model = PlainLDM.from_pretrained(tmp_path)
    assert model.sample(2, torch.Generator().manual_seed(0)).shape == (2, 3, 32, 32)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    entries = json.loads((tmp_path / "selection.json").read_text())
    assert [entry["step"] for entry in entries] == [2, 3]
    card = (tmp_path / "README.md").read_text()
    assert "T1, T2, FLAIR" in card and "PSNR of held-out images" in card and "Not for diagnosis" in card
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "validation" / "step-000002.png").is_file()
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    # The autoencoder is that of the first stage, and its latents are of deviation 1.
    first = PlainLDM.from_pretrained(tmp_path / "first_stage")
    torch.testing.assert_close(first.autoencoder.state_dict(), model.autoencoder.state_dict(), rtol=0, atol=0)
    assert first.config.latents_std == model.config.latents_std


def test_a_resumed_run_ends_like_one_that_never_stopped(baseline_data, extractor, tmp_path):
    weights = {}
    for name, stops in {"whole": [4], "halves": [2, 4]}.items():
        for steps in stops:
            # A constant rate: the cosine of a shorter run would be another one.
            more = ("--max_train_steps", f"{steps}", "--checkpointing_steps", "2", "--lr_scheduler", "constant")
            more += ("--selection_subjects", "0", "--resume_from_checkpoint", "latest")
            train_plain_ldm.main(words(baseline_data, tmp_path / name, *more), extractor)
        weights[name] = load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(weights["whole"], weights["halves"], rtol=0, atol=0)


def test_no_missing_modality_is_drawn():
    present = torch.tensor([[True, False, True], [False, True, False]])
    images = torch.arange(1, 7).reshape(2, 3, 1, 1).expand(-1, -1, 4, 4) / 10
    drawn = train_plain_ldm.draw_images(Slices(images.half(), present), 200)
    assert drawn.shape == (200, 1, 4, 4) and set((drawn[:, 0, 0, 0] * 10).round().tolist()) == {1, 3, 5}
    latents = torch.arange(12).reshape(2, 2, 3, 1, 1, 1)
    drawn, labels = train_plain_ldm.draw_latents(latents, present, 200)
    values = drawn[:, 0, 0, 0].long()
    assert torch.equal(values % 3, labels) and set(values.tolist()) == {0, 2, 3, 5, 7, 10}


def test_training_lowers_both_losses(baseline_data):
    args = train_plain_ldm.parse_args(train_plain_ldm.build_parser(), ["--config", "plain_ldm_tiny"])
    model = train_plain_ldm.build_model(args, ("T1", "T2", "FLAIR"))
    objective = train_plain_ldm.AutoencoderLoss(model, args)
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


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--resolution", "64"], "the slices in"),
        (["--block_out_channels", "8", "12"], "width of 12"),
        (["--patch_size", "0"], "--patch_size 0"),
        (["--autoencoder_share", "1"], "--autoencoder_share 1.0"),
        (["--selection_subjects", "1"], "--selection_subjects 1"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps 2"),
        (["--dataset", "./absent"], "absent"),
    ],
)
def test_bad_input_is_refused(baseline_data, extractor, refused, tmp_path, monkeypatch, more, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(train_plain_ldm.main, words(baseline_data, tmp_path / "out", *more), extractor)


def test_the_presets_build():
    for preset, most in (("plain_ldm_small", 8e6), ("plain_ldm_tiny", 1e5)):
        args = train_plain_ldm.parse_args(train_plain_ldm.build_parser(), ["--config", preset])
        with torch.device("meta"):
            model = train_plain_ldm.build_model(args, ("T1", "T2", "FLAIR", "WB", "BB"))
        assert model.num_parameters() < most
