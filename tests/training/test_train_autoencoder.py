from pathlib import Path

import pytest
import torch
import train_autoencoder
from safetensors.torch import load_file

from dldm_pipeline import DisentangledAutoencoder, encoding
from dldm_pipeline.training_args import AutoencoderArgs

MODALITIES = ("T1", "T2", "FLAIR")
TINY = {"encoder_channels": (8, 8), "decoder_channels": (8, 8), "head_channels": 8}
STILL = ("--learning_rate=1e-12", "--ema_decay=0", "--checkpointing_steps=0", "--max_train_steps=1")


def weights(folder):
    return DisentangledAutoencoder.from_pretrained(folder).state_dict()


def batch(size=4):
    images = torch.rand(size, 3, 32, 32).clamp(min=0.1)
    images[:, :, :4] = 0
    labels, known = torch.randint(4, (size, 32, 32), dtype=torch.uint8), torch.ones(size, dtype=torch.bool)
    masks = {"mask": (labels > 0).float(), "labels": labels, "has_mask": known, "has_labels": known}
    order = torch.arange(size)
    groups = {"anatomy": order // 2, "acquisition": order % 2}
    return {"images": images, "present": torch.ones(size, 3, dtype=torch.bool), **masks, **groups}


def test_a_run_writes_an_autoencoder_with_its_scales_and_pictures(autoencoder_run):
    model = DisentangledAutoencoder.from_pretrained(autoencoder_run)
    assert list(model.config.modalities) == list(MODALITIES)
    assert len(model.config.structure_scale) == 4 and min(model.config.structure_scale) > 0
    assert len(model.config.style_shift) == 2
    assert len(model.config.noise_level) == 3 and all(0 <= level < 0.4 for level in model.config.noise_level)
    assert model.structure_offset.abs().max() > 0
    for name in ("samples.png", "README.md", "validation/step-000003.png", "checkpoint-6/training_state.json"):
        assert (autoencoder_run / name).stat().st_size > 0
    # Averaged weights are what is published.
    average = load_file(autoencoder_run / "checkpoint-6" / "ema.safetensors")
    assert torch.equal(next(iter(model.parameters())), average["0000"])


def test_a_seed_fixes_the_weights_and_resumed_training_goes_on_from_the_checkpoint(words, autoencoder_run, tmp_path):
    train_autoencoder.main(words("autoencoder", tmp_path / "same"))
    first, same = weights(autoencoder_run), weights(tmp_path / "same")
    assert all(torch.equal(first[key], same[key]) for key in first)
    # Another seed would give other weights, but the run is over when it is resumed.
    checkpoint = autoencoder_run / "checkpoint-6"
    more = ("--seed=1", f"--resume_from_checkpoint={checkpoint}")
    train_autoencoder.main(words("autoencoder", tmp_path / "resumed", *more))
    resumed = weights(tmp_path / "resumed")
    assert all(torch.equal(first[name], resumed[name]) for name in first)


def test_bad_input_is_one_line(words, tmp_path, refused):
    for more, message in (
        (["--resolution=64"], "--image_size"),
        (["--modalities", "T1", "BB"], "BB"),
        (["--dataset=/nowhere"], "/nowhere"),
        (["--train_batch_size=17"], "--train_batch_size 17: too many for the 12 training slices"),
        (["--init_from=absent"], "--init_from absent: no autoencoder there"),
        (["--subset_probability=2"], "--subset_probability 2.0: must be between 0 and 1"),
        (["--encoder_channels", "8", "0"], "--encoder_channels 0"),
    ):
        assert message in refused(train_autoencoder.main, words("autoencoder", tmp_path, *more))


def test_every_term_of_the_loss_reaches_the_weights_it_is_for(monkeypatch):
    model = DisentangledAutoencoder(MODALITIES, 32, 4, 4, 2, **TINY)
    objective = train_autoencoder.DisentangledLoss(model, AutoencoderArgs(target_modalities=1))
    terms = objective(batch())
    assert set(terms) == set(train_autoencoder.WEIGHTS) | {"spectrum"}
    for name, term in terms.items():
        reached = {
            key.split(".")[0]
            for key, p in model.named_parameters()
            if (g := torch.autograd.grad(term, p, retain_graph=True, allow_unused=True)[0]) is not None and g.any()
        }
        expected = {"mask": "mask_out", "foreground": "foreground_out"}.get(name, "structure_out")
        assert expected in reached, name
        assert ("head_out" in reached) == (name in ("l1", "mse", "edge", "spectrum")), name
    # The subset's structure learns from that of all modalities, which does not move towards it.
    monkeypatch.setattr(encoding, "random_subset", lambda present: present & (torch.arange(3) == 0))
    subjects = batch()
    for anatomy, moves in ((torch.arange(4), False), (torch.arange(4) // 2, True)):  # but towards its twin's
        images = subjects["images"].clone().requires_grad_()
        agreement = objective(subjects | {"images": images, "anatomy": anatomy})["agreement"]
        gradient = torch.autograd.grad(agreement, images)[0]
        assert gradient[:, 0].any() and bool(gradient[:, 1:].any()) == moves
    # The modality that is rebuilt worst is chosen the most often.
    objective.errors = torch.tensor([1e-6, 1e-6, 1.0])
    objective(batch())
    assert objective.errors[2] < 1 and torch.equal(objective.errors[:2], torch.tensor([1e-6, 1e-6]))


def test_noise_on_structures_is_of_many_levels_up_to_the_largest_and_trained_with(monkeypatch):
    variance = torch.tensor([1.0, 4.0]).view(1, 2, 1, 1)
    noise = train_autoencoder.add_noise(torch.zeros(200, 2, 32, 32), variance, 0.4)
    level = noise.std(dim=(2, 3)) / variance[0, :, 0, 0].sqrt()
    assert level.min() < 0.02 and 0.37 < level.max() < 0.43 and level.mean() == pytest.approx(0.2, abs=0.03)
    torch.testing.assert_close(level[:, 0], level[:, 1], rtol=0.15, atol=0)
    # The decoder is given the structure with the noise, and nothing else changes.
    model = DisentangledAutoencoder(MODALITIES, 32, 4, 4, 2, **TINY)
    monkeypatch.setattr(train_autoencoder, "add_noise", lambda structure, variance, largest: structure + 7 * largest)
    given, decode, subjects = [], model.decode, batch()
    monkeypatch.setattr(model, "decode", lambda structure, styles: given.append(structure) or decode(structure, styles))
    for noise in (0.0, 1.0):
        torch.manual_seed(0)
        train_autoencoder.DisentangledLoss(model, AutoencoderArgs(structure_noise=noise))(subjects)
    torch.testing.assert_close(given[1], given[0] + 7)


def test_further_blocks_start_as_the_identity(words, autoencoder_run, tmp_path):
    more = (f"--init_from={autoencoder_run}", "--decoder_blocks=3", "--encoder_blocks=2", *STILL)
    train_autoencoder.main(words("autoencoder", tmp_path, *more))
    first, second = (DisentangledAutoencoder.from_pretrained(folder).eval() for folder in (autoencoder_run, tmp_path))
    assert (second.config.encoder_blocks, second.config.decoder_blocks) == (2, 3)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        first.structure_offset.zero_()
        second.structure_offset.zero_()
        torch.testing.assert_close(first(images).sample, second(images).sample, rtol=0, atol=1e-4)


def test_an_autoencoder_can_start_from_one_of_other_modalities_and_size(words, tmp_path):
    source = DisentangledAutoencoder(["FLAIR", "BB"], 64, 4, 4, 2, **TINY, structure_scale=[9.0] * 4)
    torch.nn.init.normal_(source.encoder_linear.weight, std=0.01)
    source.save_pretrained(tmp_path / "pipeline" / "autoencoder")
    train_autoencoder.main(words("autoencoder", tmp_path / "out", f"--init_from={tmp_path / 'pipeline'}", *STILL))
    model = DisentangledAutoencoder.from_pretrained(tmp_path / "out")
    assert list(model.config.modalities) == list(MODALITIES) and model.config.sample_size == 32
    assert max(model.config.structure_scale) < 9  # measured anew
    old = source.modality_embedding.weight
    expected = torch.stack([old.mean(dim=0), old.mean(dim=0), old[0]])
    torch.testing.assert_close(model.modality_embedding.weight, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.decoder_in.weight, source.decoder_in.weight, rtol=0, atol=1e-6)
    # The answers to modalities are summed, and there are three now, not two.
    rows = source.encoder_linear.weight.unflatten(1, (2, -1))
    expected = 2 / 3 * torch.stack([rows.mean(dim=1), rows.mean(dim=1), rows[:, 0]], dim=1).flatten(1, 2)
    torch.testing.assert_close(model.encoder_linear.weight, expected, rtol=0, atol=1e-6)


def test_the_presets_build():
    for preset, most in (("autoencoder_small", 3e6), ("autoencoder_64", 3e6), ("autoencoder_paper", 20e6)):
        args = train_autoencoder.parse_args(AutoencoderArgs, "", train_autoencoder.PRESETS, ["--config", preset])
        with torch.device("meta"):
            model = train_autoencoder.build_autoencoder(args, MODALITIES)
        assert model.num_parameters() < most and model.config.sample_size == args.resolution
    assert Path(train_autoencoder.PRESETS).is_dir()
