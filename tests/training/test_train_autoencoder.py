import importlib.util
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from dldm_pipeline import BUNDLED_CHECKPOINT, DisentangledAutoencoder, DLDMPipeline
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.slices import write_slices
from dldm_pipeline.discriminator import DetailDiscriminator
from dldm_pipeline.perceptual import PerceptualDistance

SCRIPT = Path(__file__).parents[2] / "training" / "train_autoencoder.py"
spec = importlib.util.spec_from_file_location("train_autoencoder", SCRIPT)
train_autoencoder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_autoencoder)

MODALITIES = ("T1", "T2", "FLAIR")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten subjects with a disc each, the fourth without T1, the fifth without a mask."""
    folder = tmp_path_factory.mktemp("autoencoder") / "data"
    random = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]

    def row(i):
        disc = np.hypot(y - 16, x - 16) < random.uniform(6, 12)
        images = {name: (disc * (0.3 + 0.2 * m)).astype(np.float32) for m, name in enumerate(MODALITIES)}
        if i == 3:
            images["T1"] = None
        mask = None if i == 4 else ((np.hypot(y - 12, x - 16) < 4) & disc).astype(np.uint8)
        return {"subject": f"s{i}", "slice_index": i, "mask": mask, "source": "test", "pixel_spacing": [1, 1]} | images

    write_slices((row(i) for i in range(10)), folder, MODALITIES)
    return folder


def words(data, output, *more):
    return ["--config", "autoencoder_tiny", f"--dataset={data}", f"--output_dir={output}", *more]


def weights(folder):
    return DisentangledAutoencoder.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("style_type", ["vector", "map"])
def test_a_run_writes_an_autoencoder_with_its_scales_and_pictures(data, tmp_path, style_type):
    train_autoencoder.main(words(data, tmp_path, f"--style_type={style_type}"))
    model = DisentangledAutoencoder.from_pretrained(tmp_path)
    assert list(model.config.modalities) == list(MODALITIES)
    assert len(model.config.structure_scale) == 4 and min(model.config.structure_scale) > 0
    assert len(model.config.style_shift) == 2
    assert len(model.config.noise_level) == 3 and all(0 <= level < 0.2 for level in model.config.noise_level)
    assert model.structure_offset.abs().max() > 0
    for name in ("samples.png", "README.md", "validation/step-000003.png", "checkpoint-6/training_state.json"):
        assert (tmp_path / name).stat().st_size > 0


def test_resumed_training_goes_on_from_the_checkpoint(data, tmp_path):
    train_autoencoder.main(words(data, tmp_path, "--max_train_steps=3"))
    train_autoencoder.main(words(data, tmp_path, "--max_train_steps=6", "--resume_from_checkpoint=latest"))
    assert (tmp_path / "checkpoint-6").is_dir()


def test_the_same_seed_gives_the_same_weights(data, tmp_path):
    for name in ("a", "b"):
        train_autoencoder.main(words(data, tmp_path / name, "--max_train_steps=2", "--checkpointing_steps=0"))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def test_offsets_make_the_mean_structure_of_one_modality_that_of_all(tiny_autoencoder):
    batches = [{"images": torch.rand(4, 3, 32, 32), "present": torch.ones(4, 3, dtype=torch.bool)} for _ in range(3)]
    batches[1]["present"][0, 0] = False
    train_autoencoder.measure_latents(tiny_autoencoder, batches)
    for m in range(3):
        # Every slice that has the modality counts, with the structure of all that it has.
        difference = 0
        for batch in batches:
            alone = torch.zeros(4, 3, dtype=torch.bool)
            alone[:, m] = True
            full, single = (
                output.structure_dist.mode()
                for output in tiny_autoencoder.encode_subsets(batch["images"], [batch["present"], alone])
            )
            complete = batch["present"].all(dim=1)
            difference = difference + (single - full)[complete].sum(dim=0)
        if m == 0:  # only complete slices have T1, so here the mean is exactly that of all
            assert difference.abs().max() < 1e-3
    assert tiny_autoencoder.structure_offset.abs().max() > 1e-3


def test_measured_noise_is_that_of_the_images():
    torch.manual_seed(0)
    model = DLDMPipeline.from_pretrained(BUNDLED_CHECKPOINT).autoencoder
    subjects = [simulate_subject((3, i), 128, model.config.modalities) for i in range(32)]
    images, present = torch.from_numpy(np.stack([s.images for s in subjects])), torch.ones(32, 5, dtype=torch.bool)
    present[:16, 1] = False
    images[:16, 1] = torch.rand(16, 128, 128)  # what stands in place of a missing modality does not matter
    train_autoencoder.measure_noise(model, [{"images": images, "present": present}])
    true = np.array([s.factors["noise"] for s in subjects])
    expected = [true.mean(), true[16:].mean(), true.mean(), true.mean(), true.mean()]
    np.testing.assert_allclose(model.config.noise_level, expected, rtol=0.07)


def test_subsets_are_non_empty_and_of_what_is_present():
    torch.manual_seed(0)
    present = torch.rand(500, 5) < 0.5
    present[~present.any(dim=1), 0] = True
    subset = train_autoencoder.draw_subset(present)
    assert subset.any(dim=1).all() and not (subset & ~present).any()
    complete = train_autoencoder.draw_subset(torch.ones(2000, 5, dtype=torch.bool))
    counts = torch.bincount(complete.sum(dim=1), minlength=6)[1:]
    assert (counts[1:] > 140).all() and counts[0] > 1100  # one alone in six of ten, the other sizes equally likely


def test_styles_come_from_the_same_modality_of_subjects_that_have_it():
    torch.manual_seed(0)
    present = torch.rand(64, 4) < 0.7
    donors = train_autoencoder.draw_style_donors(present, 1.0)
    own = torch.arange(64)[:, None]
    exchanged = donors != own
    assert present.gather(0, donors)[exchanged].all()
    assert exchanged.float().mean() > 0.5
    assert torch.equal(train_autoencoder.draw_style_donors(present, 0.0), own.expand(64, 4))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resolution=64"], "--image_size"),
        (["--modalities", "T1", "BB"], "BB"),
        (["--dataset=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as caught, train_autoencoder.exit_on_user_error():
        train_autoencoder.main(words(data, tmp_path, *more))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns(data, tmp_path):
    train_autoencoder.main(words(data, tmp_path / "first", "--checkpointing_steps=0"))
    more = ["--freeze_encoder", "--spectrum_weight=0.1", "--checkpointing_steps=0"]
    train_autoencoder.main(words(data, tmp_path / "second", f"--init_from={tmp_path / 'first'}", *more))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    changed = {key.split(".")[0].split("_")[0] for key in first if not torch.equal(first[key], second[key])}
    assert changed == {"decoder", "style", "head", "mask", "foreground"}
    assert torch.equal(first["style_out.0.weight"], second["style_out.0.weight"])
    a, b = (DisentangledAutoencoder.from_pretrained(tmp_path / name).config for name in ("first", "second"))
    assert a.structure_scale == b.structure_scale


class Oracle(torch.nn.Module):
    """A denoiser that knows the clean pair (structure, style); it needs no training to be right."""

    def __init__(self, clean, scheduler):
        super().__init__()
        self.clean, self.alphas = clean, scheduler.alphas_cumprod

    def forward(self, noisy, times, class_labels):
        signal = self.alphas[times].sqrt()[:, None, None, None]
        return Namespace(sample=(signal * noisy - self.clean) / (1 - signal**2).sqrt())


def test_denoised_structures_are_the_clean_ones_if_the_denoiser_is_right(tiny_pipeline):
    model, scheduler = tiny_pipeline.autoencoder, tiny_pipeline.scheduler
    n, grid = model.num_modalities, model.latent_size
    structure = torch.randn(6, model.config.structure_channels, grid, grid)
    styles = torch.randn(6, 1, model.config.style_channels).expand(-1, n, -1)
    style = model.normalize_style(styles)[:, 0, :, None, None].expand(-1, -1, grid, grid)
    clean = torch.cat([model.normalize_structure(structure), style], dim=1)
    pipeline = Namespace(autoencoder=model, unet=Oracle(clean, scheduler), scheduler=scheduler)
    present = torch.rand(6, n) < 0.5
    present[:, 0] |= ~present.any(dim=1)
    start = torch.rand(6) / 2
    denoised = train_autoencoder.denoise_structure(pipeline, structure, styles, present, start, 4)
    torch.testing.assert_close(denoised, structure, rtol=1e-3, atol=1e-3)
    # From the last time on, nothing but the denoiser knows it.
    other = torch.randn_like(structure)
    generated = train_autoencoder.denoise_structure(pipeline, other, styles, present, torch.ones(6), 4)
    torch.testing.assert_close(generated, structure, rtol=1e-3, atol=1e-3)


def test_structures_are_generated_in_batches(tiny_pipeline):
    torch.manual_seed(0)
    structures = train_autoencoder.generate_structures(tiny_pipeline, 5, batch_size=2, show_progress=False)
    config, grid = tiny_pipeline.autoencoder.config, tiny_pipeline.autoencoder.latent_size
    assert structures.shape == (5, config.structure_channels, grid, grid) and structures.isfinite().all()
    assert (structures[0] - structures[4]).abs().max() > 0.1


def test_new_subjects_are_compared_with_real_ones_and_those_before_them(tiny_pipeline, monkeypatch):
    """Black structures decode to what no real patch looks like; the gradient does not shrink as the pool grows."""
    torch.manual_seed(0)
    model = tiny_pipeline.autoencoder
    n, size = model.num_modalities, model.config.sample_size
    args = train_autoencoder.build_parser().parse_args(["--patch_weight=1"])
    objective = train_autoencoder.DisentangledLoss(model, args, tiny_pipeline)
    objective.generated = torch.zeros(3, model.config.structure_channels, *[model.latent_size] * 2)
    batch = {
        "images": torch.rand(4, n, size, size).clamp(min=0.1),
        "present": torch.ones(4, n, dtype=torch.bool),
        "mask": (torch.rand(4, size, size) < 0.1).float(),
        "has_mask": torch.ones(4, dtype=torch.bool),
    }
    monkeypatch.setattr(train_autoencoder, "PATCH_POOL", 6)
    lengths = []
    for expected in ([2, 4], [4, 6], [6, 6]):
        patch = objective(batch)["patch"]
        assert patch > 0 and [len(images) for images, *_ in objective.pools] == expected
        lengths.append(torch.autograd.grad(patch, model.head_out[-1].weight)[0].norm().item())
    assert lengths[0] / 3 < lengths[2] < lengths[0] * 3
    assert objective(batch)["perceptual"] == 0
    objective.perceptual = PerceptualDistance([batch], show_progress=False)
    assert objective(batch)["perceptual"] > 0
    assert objective(batch)["adversarial"] == 0
    objective.discriminator = DetailDiscriminator(n + 1)
    terms = objective(batch)
    assert terms["adversarial"] > 0 and terms["grid"] > 0
    objective.generated = None
    terms = objective(batch)
    assert all(terms[name] == 0 for name in ("patch", "perceptual", "adversarial", "grid"))


def test_near_a_tumour_is_around_it_and_nowhere_else():
    mask = torch.zeros(2, 64, 64)
    mask[0, 30:34, 20] = 1
    near = train_autoencoder.near_tumour(mask)
    assert near.shape == mask.shape and not near[1].any()
    assert near[0, 22:42, 12:28].all() and not near[0, :, 45:].any() and not near[0, 55:].any()


def test_a_decoder_with_more_blocks_learns_from_denoised_structures(data, tmp_path):
    """New blocks start as the identity, and the denoiser and its latents stay what they are."""
    train_autoencoder.main(words(data, tmp_path / "first", "--checkpointing_steps=0"))
    first = DisentangledAutoencoder.from_pretrained(tmp_path / "first")
    channels = first.config.structure_channels + first.config.style_channels
    unet = UNet2DModel(
        sample_size=first.latent_size, in_channels=channels, out_channels=channels, block_out_channels=(8, 8),
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
        num_class_embeds=2 * (first.num_modalities + 1),
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    DLDMPipeline(first, unet, scheduler).save_pretrained(tmp_path / "pipeline")
    more = ["--decoder_blocks=3", "--checkpointing_steps=0"]
    start = [f"--init_from={tmp_path / 'pipeline'}", *more, "--learning_rate=1e-12", "--no-use_ema"]
    train_autoencoder.main(words(data, tmp_path / "same", *start))
    more += [f"--denoiser={tmp_path / 'pipeline'}"]
    train_autoencoder.main(words(data, tmp_path / "plain", *more, "--patch_weight=0"))
    train_autoencoder.main(words(data, tmp_path / "second", *more, "--perceptual_weight=1", "--adversarial_weight=0.3"))
    same = DisentangledAutoencoder.from_pretrained(tmp_path / "same")
    sharpened = DLDMPipeline.from_pretrained(tmp_path / "second")
    second = sharpened.autoencoder
    plain = DLDMPipeline.from_pretrained(tmp_path / "plain").autoencoder
    for name, weight in sharpened.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name])
    assert same.config.decoder_blocks == second.config.decoder_blocks == 3 > first.config.decoder_blocks
    images = torch.rand(2, first.num_modalities, first.config.sample_size, first.config.sample_size)
    with torch.no_grad():
        outputs = [model.eval()(images).sample for model in (first, same, second, plain)]
        structures = [model.encode(images).structure_dist.mode() for model in (first, second)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2], rtol=0, atol=1e-4)
    assert not torch.allclose(outputs[2], outputs[3], rtol=0, atol=1e-4)
    torch.testing.assert_close(*structures, rtol=0, atol=1e-5)

    same.register_to_config(structure_shift=[9.0] * channels)
    same.save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match="--train_batch_size 1: give 2 or more"):
        train_autoencoder.main(words(data, tmp_path / "refused", *more, "--train_batch_size=1"))
    start = [f"--init_from={tmp_path / 'moved'}", f"--denoiser={tmp_path / 'pipeline'}"]
    with pytest.raises(ValueError, match="--denoiser .* another structure_shift"):
        train_autoencoder.main(words(data, tmp_path / "refused", *start))


def test_an_autoencoder_can_start_from_one_of_other_modalities_and_size(data, tmp_path):
    source = DisentangledAutoencoder(
        modalities=["FLAIR", "BB"], sample_size=64, structure_channels=4, style_channels=2, encoder_channels=[8, 8],
        decoder_channels=[8, 8], head_channels=8, structure_scale=[9.0] * 4,
    )  # fmt: skip
    source.save_pretrained(tmp_path / "pipeline" / "autoencoder")
    more = [f"--init_from={tmp_path / 'pipeline'}", "--learning_rate=1e-12", "--no-use_ema", "--checkpointing_steps=0"]
    train_autoencoder.main(words(data, tmp_path / "out", *more))
    model = DisentangledAutoencoder.from_pretrained(tmp_path / "out")
    assert list(model.config.modalities) == list(MODALITIES) and model.config.sample_size == 32
    assert max(model.config.structure_scale) < 9  # measured anew
    old = source.modality_embedding.weight
    expected = torch.stack([old.mean(dim=0), old.mean(dim=0), old[0]])
    torch.testing.assert_close(model.modality_embedding.weight, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.decoder_in.weight, source.decoder_in.weight, rtol=0, atol=1e-6)


def test_noise_on_structures_is_of_many_levels_up_to_the_largest():
    variance = torch.tensor([1.0, 4.0]).view(1, 2, 1, 1)
    noise = train_autoencoder.add_noise(torch.zeros(200, 2, 32, 32), variance, 0.4)
    level = noise.std(dim=(2, 3)) / variance[0, :, 0, 0].sqrt()
    assert level.min() < 0.02 and 0.37 < level.max() < 0.43 and level.mean() == pytest.approx(0.2, abs=0.03)
    torch.testing.assert_close(level[:, 0], level[:, 1], rtol=0.15, atol=0)


def test_structure_noise_is_trained_with(data, tmp_path):
    for noise in ("0", "0.5"):
        train_autoencoder.main(words(data, tmp_path / noise, "--max_train_steps=2", f"--structure_noise={noise}"))
    without, with_noise = weights(tmp_path / "0"), weights(tmp_path / "0.5")
    assert not torch.equal(without["head_in.weight"], with_noise["head_in.weight"])


def test_foreground_is_what_any_present_modality_shows():
    images = torch.zeros(1, 2, 4, 4)
    images[0, 0, :2], images[0, 1, :, :2] = 0.5, 0.1
    both = train_autoencoder.foreground_of(images, torch.tensor([[True, True]]))
    first = train_autoencoder.foreground_of(images, torch.tensor([[True, False]]))
    assert both.sum() == 12 and torch.equal(first[0], images[0, 0] > 0)


def test_an_older_autoencoder_without_a_layer_can_be_started_from(data, tmp_path):
    train_autoencoder.main(words(data, tmp_path / "first", "--checkpointing_steps=0"))
    file = tmp_path / "first" / "diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if not key.startswith("foreground")}, file)
    more = ["--encoder_blocks=2", "--checkpointing_steps=0"]
    train_autoencoder.main(words(data, tmp_path / "second", f"--init_from={tmp_path / 'first'}", *more))
    model = DisentangledAutoencoder.from_pretrained(tmp_path / "second")
    assert model.config.encoder_blocks == 2
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_what_is_known_of_a_modality_goes_over_by_its_name(data, tmp_path):
    train_autoencoder.main(words(data, tmp_path / "first", "--checkpointing_steps=0"))
    more = [f"--init_from={tmp_path / 'first'}", "--modalities", "FLAIR", "T1", "--learning_rate=1e-12", "--no-use_ema"]
    train_autoencoder.main(words(data, tmp_path / "second", *more, "--checkpointing_steps=0"))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    rows = [MODALITIES.index(name) for name in ("FLAIR", "T1")]
    key = "modality_embedding.weight"
    torch.testing.assert_close(second[key], first[key][rows])
    # The answers to modalities are summed, and there are two now, not three.
    key = "encoder_linear.weight"
    expected = 3 / 2 * first[key].unflatten(1, (3, -1))[:, rows].flatten(1, 2)
    assert expected.abs().max() > 0
    torch.testing.assert_close(second[key], expected)


def test_radial_power_knows_a_wave_and_a_blur():
    image = torch.rand(2, 32, 32)
    power = train_autoencoder.radial_power(image, 8)
    assert power.shape == (2, 8)  # up to half the Nyquist frequency
    assert torch.allclose(power, train_autoencoder.radial_power(image + 1, 8), rtol=1e-3)
    wave = torch.cos(torch.arange(32) * 2 * torch.pi * 5 / 32).expand(1, 32, 32)
    assert train_autoencoder.radial_power(wave, 8)[0].argmax() == 4  # five cycles a picture
    blurred = torch.nn.functional.avg_pool2d(image[None], 3, stride=1, padding=1)[0]
    assert (train_autoencoder.radial_power(blurred, 8)[:, 4:].sum() < power[:, 4:].sum()).all()
    grid = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32))
    assert train_autoencoder.radial_power(grid[None], 23)[0].argmax() == 22  # its only wave lies in the corner
