import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import train_ldm
from PIL import Image
from safetensors.torch import load_file

from dldm_pipeline import DisentangledAutoencoder, DLDMPipeline
from dldm_pipeline.denoiser import make_scheduler
from dldm_pipeline.encoding import Latents
from dldm_pipeline.training_args import LDMArgs

STILL = ("--learning_rate=1e-12", "--ema_decay=0", "--max_train_steps=1")
UNET = "unet/diffusion_pytorch_model.safetensors"


def make_latents(present):
    count, n = len(present), len(present[0])
    return Latents(torch.randn(count, 2, 4, 4, 4), torch.randn(count, 2, n, 2), torch.tensor(present))


def test_a_run_writes_a_pipeline_that_generates_subjects(ldm_run, autoencoder_run):
    pipeline = DLDMPipeline.from_pretrained(ldm_run)
    images = pipeline(1, num_inference_steps=2, num_style_inference_steps=2, output_type="np").images
    assert images.shape == (1, 3, 32, 32)
    assert str(autoencoder_run) not in (ldm_run / "autoencoder" / "config.json").read_text(encoding="utf-8")
    assert pipeline.scheduler.config.clip_sample is False and pipeline.scheduler.config.rescale_betas_zero_snr
    assert [path.name for path in sorted(ldm_run.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    assert Image.open(ldm_run / "samples.png").size[1] > Image.open(ldm_run / "validation/step-000002.png").size[1]
    card = (ldm_run / "README.md").read_text()
    assert "T1, T2, FLAIR" in card and "structure v-loss" in card and "Not for diagnosis" in card
    assert not [path for path in ldm_run.rglob("*") if "tmp" in path.name or "partial" in path.name]
    # Averaged weights are what is published.
    average = load_file(ldm_run / "checkpoint-4" / "ema.safetensors")
    assert torch.equal(next(iter(pipeline.unet.parameters())), average["0000"])
    assert "optimization_step" not in json.loads((ldm_run / "unet" / "config.json").read_text())


def test_a_resumed_run_ends_like_one_that_never_stopped(words, autoencoder_run, ldm_run, tmp_path):
    shutil.copytree(ldm_run / "checkpoint-2", tmp_path / "checkpoint-2")  # as if the run had been killed after it
    more = ("--resume_from_checkpoint=latest", "--checkpointing_steps=2", "--validation_steps=2")
    train_ldm.main(words("ldm", tmp_path, f"--autoencoder={autoencoder_run}", *more))
    torch.testing.assert_close(load_file(tmp_path / UNET), load_file(ldm_run / UNET), rtol=0, atol=0)


def test_batches_have_the_fractions_asked_for_and_no_missing_modality():
    latents = make_latents([[True, False, True], [False, True, False]])
    args = LDMArgs(conditional_fraction=0.25, label_dropout=0.1)
    batch = train_ldm.sample_batch(latents, 4000, make_scheduler(), args, torch.Generator().manual_seed(0))
    labels, conditional = batch["labels"], batch["conditional"]
    assert conditional.float().mean().item() == 0.25
    assert torch.equal(labels >= 4, conditional)
    assert (labels % 4 == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)
    found = (batch["style"][:, None, None, None] == latents.style).all(dim=-1)
    subject = found.flatten(1).nonzero()[:, 1].div(6, rounding_mode="floor")
    modality = found.any(dim=2).any(dim=1).nonzero()[:, 1]
    assert latents.present[subject, modality].all()
    named = labels % 4 != 3
    assert torch.equal((labels % 4)[named], modality[named])


class Oracle(torch.nn.Module):
    """Predicts the velocity exactly, and remembers what it was shown."""

    def __init__(self, scheduler, batch):
        super().__init__()
        self.scheduler, self.batch, self.seen = scheduler, batch, []

    def forward(self, sample, timesteps, class_labels):
        self.seen.append(sample)
        rows = (timesteps[:, None] == self.batch["timesteps"]).float().argmax(dim=1)  # no time is there twice
        given = {name: value[rows] for name, value in self.batch.items()}
        structure = self.scheduler.get_velocity(given["structure"], given["structure_noise"], timesteps)
        style = self.scheduler.get_velocity(given["style"], given["style_noise"], timesteps)
        style = style[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        structure = structure[..., : sample.shape[2], : sample.shape[3]]
        return Namespace(sample=torch.cat([structure, style], dim=1))


def test_the_true_velocity_has_no_loss_and_a_conditional_pair_shows_its_mean_structure():
    scheduler, args = make_scheduler(), LDMArgs(conditional_fraction=0.5, label_dropout=0.1, style_grid=2)
    batch = train_ldm.sample_batch(make_latents([[True, True]] * 3), 32, scheduler, args)
    oracle = Oracle(scheduler, batch)
    assert train_ldm.training_loss(oracle, scheduler, batch, args).item() == pytest.approx(0, abs=1e-9)
    joint, conditional = oracle.seen
    clean = batch["structure"][batch["conditional"]].unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5))
    torch.testing.assert_close(conditional[:, :4], clean)
    noisy = batch["structure"][~batch["conditional"]]
    assert len(joint) == len(conditional) == 16 and not (joint[:, :4] == noisy).flatten(1).all(dim=1).any()
    for seen in (joint, conditional):  # a style is shown as a flat map
        assert torch.equal(seen[:, 4:].amax(dim=(2, 3)), seen[:, 4:].amin(dim=(2, 3)))


def test_every_time_counts_alike_and_both_errors_by_their_weight():
    scheduler, args = make_scheduler(), LDMArgs(conditional_fraction=0.0, label_dropout=0.0, style_weight=0.5)
    batch = train_ldm.sample_batch(make_latents([[True, True]] * 3), 4, scheduler, args)

    def zero(sample, timesteps, class_labels):
        return Namespace(sample=torch.zeros_like(sample))

    for step in (0, 500, 999):
        batch["timesteps"] = torch.full((4,), step)
        structure, style = (
            scheduler.get_velocity(batch[name], batch[f"{name}_noise"], batch["timesteps"]).square().mean()
            for name in ("structure", "style")
        )
        loss = train_ldm.training_loss(zero, scheduler, batch, args)
        assert loss.item() == pytest.approx((structure + 0.5 * style).item(), rel=1e-5)
        # The structure of a conditional pair is shown, and is no target.
        conditional = batch | {"conditional": torch.ones(4, dtype=torch.bool)}
        loss = train_ldm.training_loss(zero, scheduler, conditional, args)
        assert loss.item() == pytest.approx(0.5 * style.item(), rel=1e-5)


def test_training_lowers_the_loss(words, autoencoder_run, tmp_path):
    args = train_ldm.parse_args(LDMArgs, "", train_ldm.PRESETS, words("ldm", tmp_path))
    unet = train_ldm.load_unet(args, DisentangledAutoencoder.from_pretrained(autoencoder_run))
    scheduler = make_scheduler()
    batch = train_ldm.sample_batch(make_latents([[True] * 3] * 2), 16, scheduler, args)
    optimizer, losses = torch.optim.AdamW(unet.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = train_ldm.training_loss(unet, scheduler, batch, args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_can_start_from_a_pipeline(words, autoencoder_run, ldm_run, tmp_path):
    train_ldm.main(words("ldm", tmp_path, f"--init_from={ldm_run}", *STILL))
    torch.testing.assert_close(load_file(tmp_path / UNET), load_file(ldm_run / UNET), rtol=0, atol=1e-6)


def test_labels_of_a_pipeline_of_other_modalities_go_over_by_name(autoencoder_run, ldm_run, tmp_path):
    shutil.copytree(ldm_run / "unet", tmp_path / "unet")
    config = json.loads((ldm_run / "autoencoder" / "config.json").read_text())
    (tmp_path / "autoencoder").mkdir()
    config["modalities"] = ["FLAIR", "T1CE", "T1"]
    (tmp_path / "autoencoder" / "config.json").write_text(json.dumps(config))
    autoencoder = DisentangledAutoencoder.from_pretrained(autoencoder_run)
    unet = train_ldm.load_unet(LDMArgs(init_from=str(tmp_path)), autoencoder)
    old = load_file(ldm_run / UNET)
    for half in (0, 4):  # joint labels and conditional ones: T1, T2, FLAIR, null
        theirs = old["class_embedding.weight"][half : half + 4]
        expected = torch.stack([theirs[2], theirs.mean(dim=0), theirs[0], theirs[3]])
        torch.testing.assert_close(unet.class_embedding.weight[half : half + 4], expected)
    torch.testing.assert_close(unet.conv_in.weight, old["conv_in.weight"])


def test_bad_input_is_refused(words, autoencoder_run, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    for more, expected in (
        (["--autoencoder=absent"], "--autoencoder absent: no autoencoder there"),
        (["--dataset=./absent"], "absent"),
        (["--output_dir=FILE"], "cannot write here"),
        (["--block_out_channels", "8", "12"], "block_out_channels: a width of 12 does not divide by 8"),
        (["--init_from=absent"], "--init_from absent: no pipeline there"),
        (["--conditional_fraction=2"], "--conditional_fraction 2.0: must be between 0 and 1"),
        (["--resume_from_checkpoint=absent"], "--resume_from_checkpoint absent"),
    ):
        given = words("ldm", tmp_path / "out", f"--autoencoder={autoencoder_run}", *more)
        assert expected in refused(train_ldm.main, given)


def test_an_autoencoder_that_does_not_fit_is_refused(words, autoencoder_run, tmp_path, refused):
    for changes, expected in (
        ({"modalities": ["T1", "WB", "BB"]}, "modalities do not match: WB, BB wanted"),
        ({"structure_scale": None}, "no latent scales"),
    ):
        folder = shutil.copytree(autoencoder_run, tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        assert expected in refused(train_ldm.main, words("ldm", tmp_path / "out", f"--autoencoder={folder}"))
    # The bundled autoencoder is the default, of other modalities and 128 pixels.
    assert "modalities do not match" in refused(train_ldm.main, words("ldm", tmp_path / "out"))
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_the_presets_build():
    for preset, size, most in (("ldm_small", 128, 6.6e6), ("ldm_paper", 256, 300e6), ("ldm_tiny", 32, 1e5)):
        args = train_ldm.parse_args(LDMArgs, "", train_ldm.PRESETS, ["--config", preset])
        with torch.device("meta"):
            unet = train_ldm.load_unet(args, DisentangledAutoencoder(sample_size=size))
        assert unet.num_parameters() < most and unet.config.num_class_embeds == 12
