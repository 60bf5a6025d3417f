import pytest
import torch
from plain_ldm import PlainLDM, diffusion_loss

from dldm_pipeline.denoiser import make_scheduler

TINY = {
    "modalities": ["T1", "T2"],
    "sample_size": 32,
    "autoencoder_channels": [8, 16],
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "attention_sizes": [0],
    "attention_head_dim": 8,
}


def make_model(**options):
    torch.manual_seed(0)
    numbers = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 0.9, 2.0]}
    return PlainLDM(**(TINY | numbers | options)).eval()


def test_images_become_latents_and_back():
    model = make_model()
    images = torch.rand(3, 1, 32, 32)
    latents = model.encode(images).mode()
    assert latents.shape == (3, 4, 8, 8) and model.latent_size == 8 and model.decode(latents).shape == images.shape
    normal = model.normalize(latents)
    torch.testing.assert_close(normal[:, 1], (latents[:, 1] + 0.2) / 1.5)
    torch.testing.assert_close(model.denormalize(normal), latents)


def test_a_seed_fixes_the_subjects(tmp_path):
    model = make_model()
    images = model.sample(5, torch.Generator().manual_seed(1), num_inference_steps=2)
    assert images.shape == (5, 2, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert (images[0] - images[1]).abs().max() > 1e-4 and (images[0, 0] - images[0, 1]).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = PlainLDM.from_pretrained(tmp_path)
    again = loaded.sample(5, torch.Generator().manual_seed(1), batch_size=2, num_inference_steps=2)
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-5)
    own = [torch.Generator().manual_seed(i) for i in (7, 8)]
    pair = model.sample(2, own, num_inference_steps=2)
    one = model.sample(1, [torch.Generator().manual_seed(8)], num_inference_steps=2)
    torch.testing.assert_close(one[0], pair[1], rtol=1e-4, atol=1e-5)


def test_the_true_velocity_has_no_loss_and_times_are_spread():
    scheduler, latents, labels, seen = make_scheduler(), torch.randn(20, 4, 8, 8), torch.zeros(20).long(), []

    def oracle(noisy, times, labels):
        seen.append(times)
        alpha = scheduler.alphas_cumprod[times][:, None, None, None].clamp(max=1 - 1e-6)
        noise = (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        return scheduler.get_velocity(latents, noise, times)

    assert diffusion_loss(oracle, scheduler, latents, labels).item() == pytest.approx(0, abs=1e-4)
    assert (seen[0] // 50).sort().values.tolist() == list(range(20)) and scheduler.alphas_cumprod[-1] == 0


def test_bad_input_is_refused():
    for options, expected in (
        ({"sample_size": 34}, "cannot be divided by 4"),
        ({"block_out_channels": [8, 12]}, "block_out_channels: a width of 12"),
        ({"autoencoder_channels": [8, 4]}, "autoencoder_channels has a width of 4"),
        ({"modalities": ["T1", "T1"]}, "twice"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_model(**options)


def test_a_model_without_scales_does_not_sample():
    with pytest.raises(ValueError, match="latents_std is None"):
        make_model(latents_std=None).sample(1)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        make_model().sample(1, num_inference_steps=0)
