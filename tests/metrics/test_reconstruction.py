import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from dldm_pipeline.autoencoder_disentangled import DisentangledDecoderOutput
from dldm_pipeline.metrics.reconstruction import (
    compare_spectra,
    dice,
    encode_subjects,
    evaluate_reconstruction,
    mean_over_subjects,
    psnr,
    radial_power_spectrum,
    rebuild,
)

NAMES = ["T1", "T2", "WB"]  # of `tiny_autoencoder`


def slices(count: int = 6, missing: tuple[tuple[int, int], ...] = (), has_mask: bool = True) -> list[dict]:
    """Random items like those of a `SliceDataset`; `missing` lists (slice, modality)."""
    rng = np.random.default_rng(0)
    mask = torch.zeros(32, 32)
    mask[4:12, 4:12] = 1
    items = []
    for i in range(count):
        present = torch.tensor([(i, m) not in missing for m in range(3)])
        images = torch.from_numpy(rng.random((3, 32, 32), dtype=np.float32)) * present[:, None, None]
        items.append({"images": images, "present": present, "subject": f"s{i}"})
        items[i] |= {"mask": mask, "has_mask": torch.tensor(has_mask)}
    return items


def test_psnr_of_known_errors():
    image = np.random.default_rng(0).random((2, 3, 8, 8)) * 0.5
    for error, level in ((0.1, 20.0), (0.01, 40.0), (0.0, np.inf)):
        np.testing.assert_allclose(psnr(image, image + error), np.full((2, 3), level))
        tensor = torch.from_numpy(image)
        assert torch.allclose(psnr(tensor, tensor + error), torch.full((2, 3), level, dtype=torch.double))
    one_pixel = np.zeros((10, 10))
    one_pixel[0, 0] = 1.0  # mean square error 1/100
    assert psnr(np.zeros((10, 10)), one_pixel) == pytest.approx(20.0)


def test_dice_of_known_overlaps():
    a, b = np.zeros((2, 4, 4))
    a[0, :4], b[0, 2:] = 1, 1
    assert dice(a, b) == pytest.approx(2 * 2 / 6) and dice(a, a) == dice(0 * a, 0 * a) == 1 and dice(a, 0 * a) == 0
    for measure in (psnr, dice):
        with pytest.raises(ValueError, match="equal shapes"):
            measure(np.zeros((1, 4, 4)), np.zeros((2, 4, 4)))


def test_spectrum_puts_a_wave_into_its_ring_and_is_flat_for_white_noise():
    x = np.arange(32)
    for cycles in (3, 8):
        spectrum = radial_power_spectrum(np.cos(2 * np.pi * cycles * x / 32)[None, :].repeat(32, axis=0))
        assert spectrum.shape == (9,) and spectrum.argmax() == cycles
        assert spectrum[np.arange(9) != cycles].max() < 1e-9 * spectrum[cycles]
    noise = np.random.default_rng(0).normal(size=(400, 32, 32))
    spectrum = radial_power_spectrum(noise).mean(axis=0)
    np.testing.assert_allclose(spectrum[2:] / 32**2, 1.0, atol=0.1)


def test_blur_fails_the_spectrum_check_and_a_copy_passes():
    rng = np.random.default_rng(0)
    real = ndimage.gaussian_filter(rng.random((20, 2, 64, 64)), (0, 0, 1, 1))
    spectra = [radial_power_spectrum(images) for images in (real, ndimage.gaussian_filter(real, (0, 0, 1.5, 1.5)))]
    sharp, soft = (compare_spectra(spectra[0], other, NAMES[:2]) for other in spectra)
    assert sharp["largest_deviation_worst"] == 0
    assert soft["largest_deviation_worst"] > 0.8 and soft["ratio"]["T1"][-1] < 0.2
    # Opposite errors cancel in the mean ratio, but not in the worst.
    real = np.ones((5, 2, 9))
    result = compare_spectra(real, real * np.array([1.3, 0.6])[None, :, None], NAMES[:2])
    assert result["largest_deviation"] == pytest.approx({"T1": 0.3, "T2": 0.4})
    assert result["largest_deviation_worst"] == pytest.approx(0.4)
    assert result["largest_deviation_mean_ratio"] == pytest.approx(0.05)


def test_a_subject_with_many_slices_counts_once():
    values = np.array([[1.0], [1.0], [1.0], [5.0], [np.nan]])
    assert mean_over_subjects(values, ["a", "a", "a", "b", "c"])[0] == 3.0
    assert math.isnan(mean_over_subjects(values[-1:], ["c"])[0])


def test_encoding_a_modality_alone_matches_the_model_and_hides_the_others(tiny_autoencoder):
    items = slices(3, missing=((1, 2),))
    encoded = encode_subjects(tiny_autoencoder, items, batch_size=2)
    alone = torch.tensor([[False, True, False]])
    images = items[0]["images"][None] * alone[:, :, None, None]
    with torch.no_grad():
        expected = tiny_autoencoder.encode(images, alone).structure_dist.mode()[0].numpy()
    np.testing.assert_allclose(encoded.single_structures[0, 1], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(encoded.single_structures[1, 2]).all() and np.isnan(encoded.styles[1, 2]).all()
    assert not np.isnan(encoded.structure).any()


def test_encoding_takes_slices_from_the_whole_set_and_refuses_bad_ones(tiny_autoencoder):
    assert encode_subjects(tiny_autoencoder, slices(6), max_items=3).subjects == ["s0", "s2", "s5"]
    with pytest.raises(ValueError, match="0 slices"):
        encode_subjects(tiny_autoencoder, [])
    with pytest.raises(ValueError, match="max_items=0"):
        encode_subjects(tiny_autoencoder, slices(1), max_items=0)
    item = slices(1)[0]
    item["images"], item["present"] = item["images"][:2], item["present"][:2]
    with pytest.raises(ValueError, match="2 modalities"):
        encode_subjects(tiny_autoencoder, [item])


def test_evaluation_agrees_with_a_plain_forward_pass(tiny_autoencoder):
    items = slices(6)
    encoded = encode_subjects(tiny_autoencoder, items)
    result = evaluate_reconstruction(tiny_autoencoder, encoded, batch_size=4)
    images = torch.stack([item["images"] for item in items])
    with torch.no_grad():
        output = tiny_autoencoder(images)
    expected = psnr(images.numpy(), output.sample.clamp(0, 1).numpy())
    assert result["psnr"]["all"] == pytest.approx(dict(zip(NAMES, expected.mean(axis=0), strict=True)), rel=1e-4)
    assert result["mask_dice"] == pytest.approx(dice(encoded.masks, output.mask.numpy() > 0).mean(), rel=1e-4)
    assert result["psnr_spread"] == pytest.approx(result["psnr_best"] - result["psnr_worst"])
    rebuilt, masks = rebuild(tiny_autoencoder, encoded, batch_size=4)
    np.testing.assert_allclose(rebuilt, output.sample.clamp(0, 1).numpy(), atol=1e-5)
    assert masks.dtype == bool and masks.shape == (6, 32, 32)


def test_costs_show_a_structure_that_needs_all_modalities(tiny_autoencoder):
    encoded = encode_subjects(tiny_autoencoder, slices(6))
    # A model that renders what the latents say: the image is the style's first number plus the structure's.
    generator = np.random.default_rng(0)
    level, offset = 0.1 + generator.random((6, 1)) * 0.4, np.array([[0.0, 0.2, 0.4]])
    encoded.images = np.broadcast_to((level + offset)[:, :, None, None], (6, 3, 32, 32)).astype(np.float32).copy()
    encoded.images += 0.01
    encoded.structure[:] = encoded.styles[:] = 0
    encoded.structure[:, 0] = level[:, :, None]
    encoded.single_structures[:] = encoded.structure[:, None]
    encoded.styles[:, :, 0] = offset

    class Renderer:
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, z_struct, z_style):
            value = z_struct[:, 0].mean(dim=(1, 2))[:, None] + z_style[:, :, 0]
            mask = torch.from_numpy(encoded.masks[: len(z_struct)]).float() - 0.5
            sample = value[:, :, None, None].expand(-1, -1, 32, 32)
            return DisentangledDecoderOutput(sample=sample, regions=mask[:, None], foreground=mask)

    clean = evaluate_reconstruction(Renderer(), encoded)
    assert clean["psnr_mean"] == pytest.approx(40.0, abs=0.01) and clean["mask_dice"] == 1.0
    assert clean["single_cost_mean"] == pytest.approx(0.0, abs=1e-6)

    # Now the structure from the last modality alone is off by 0.09.
    encoded.single_structures[:, 2, 0] -= 0.09
    worse = evaluate_reconstruction(Renderer(), encoded)
    assert worse["psnr_mean"] == pytest.approx(40.0, abs=0.01)
    assert worse["single_cost"] == pytest.approx({"T1": 0.0, "T2": 0.0, "WB": 20.0}, abs=0.01)
    assert worse["single_cost_mean"] == pytest.approx(20 / 3, abs=0.01)


def test_missing_modalities_and_masks_are_left_out(tiny_autoencoder):
    encoded = encode_subjects(tiny_autoencoder, slices(6, ((0, 0), (3, 1)), has_mask=False))
    result = evaluate_reconstruction(tiny_autoencoder, encoded)
    assert result["mask_dice"] is None and result["mask_dice_single"] is None
    assert all(math.isfinite(value) for value in result["psnr"]["all"].values())
    images, _ = rebuild(tiny_autoencoder, encoded)
    assert (images[0, 0] == 0).all() and (images[0, 1] > 0).any()
