import pytest
import torch
import torch.nn.functional as F

from dldm_pipeline import perceptual
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([torch.from_numpy(simulate_subject(seed, 64).images) for seed in range(8)])


def batches(images, present=None):
    present = torch.ones(images.shape[:2], dtype=torch.bool) if present is None else present
    return [{"images": x, "present": there} for x, there in zip(images.split(4), present.split(4), strict=True)]


@pytest.fixture(autouse=True)
def no_shift(monkeypatch):
    monkeypatch.setattr(perceptual, "LARGEST_SHIFT", 0)


@pytest.fixture(scope="module")
def everyone() -> torch.Tensor:
    return torch.ones(8, 5, dtype=torch.bool)


def test_real_images_lie_at_zero_and_blurred_ones_do_not(images, everyone):
    blurred = F.avg_pool2d(images, 3, 1, 1)

    def distance(given, real):
        present = everyone.repeat(2, 1)[: len(given)]
        return PerceptualDistance(batches(images), show_progress=False)(given, present, real)

    assert distance(images, images) < 1e-3
    rebuilt, new = distance(blurred, images), distance(blurred, images[:0])
    assert rebuilt > new > 0.05
    # One set that is right does not make up for one that is not.
    torch.testing.assert_close(distance(torch.cat([images, blurred]), images), new, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(distance(torch.cat([blurred, images]), images), rebuilt, rtol=0.02, atol=1e-3)
    # Rebuilt ones are to be themselves, and not anybody real.
    assert distance(images.roll(1, 0), images) > 0.02


def test_the_gradient_points_to_the_contrast_of_real_images(images, everyone):
    for start, sign in ((0.7, -1), (1.3, 1)):
        contrast = torch.tensor(start, requires_grad=True)
        distance = PerceptualDistance(batches(images), show_progress=False)
        distance((contrast * images).clamp(0, 1), everyone, images[:0]).backward()
        assert contrast.grad * sign > 0


def test_the_mean_runs_on_and_the_gradient_does_not_shrink(images, everyone):
    distance = PerceptualDistance(batches(images), show_progress=False)
    dark = (0.5 * images).requires_grad_()
    values, lengths = [], []
    for x in (dark, images, dark):
        value = distance(x, everyone, images[:0])
        values.append(value.item())
        lengths.append(torch.autograd.grad(value, x)[0].norm().item() if x is dark else 0)
    assert values[0] > values[1] > 0.5 * values[0]  # one batch moves the mean a little
    assert lengths[2] > 0.5 * lengths[0]


def test_a_missing_modality_counts_for_nothing(images):
    present = torch.ones(8, 5, dtype=torch.bool)
    present[:3, 1] = False
    present[:, 4] = False
    spoilt = torch.where(present[..., None, None], images, torch.rand_like(images))
    values = [
        PerceptualDistance(batches(real, present), show_progress=False)(0.8 * given, present, real)
        for real, given in ((images, images), (spoilt, spoilt))
    ]
    assert values[0] > 0.01 and values[0].isfinite()
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)


def test_an_image_of_more_pixels_is_not_made_smaller(images, everyone):
    large = F.interpolate(images, size=(256, 256), mode="bicubic").clamp(0, 1)
    detail = (large + 0.1 * (-1.0) ** torch.arange(256)).clamp(0, 1)
    distance = PerceptualDistance(batches(large), show_progress=False)
    assert distance(detail, everyone, large) > 0.05


def test_shifts_move_every_value_and_not_the_mean(images, everyone, monkeypatch):
    monkeypatch.setattr(perceptual, "LARGEST_SHIFT", 8)
    torch.manual_seed(0)
    distance = PerceptualDistance([b for b in batches(images) for _ in range(8)], show_progress=False)
    values = [distance(images, everyone, images).item() for _ in range(24)]
    assert len(set(values)) > 20
    assert sum(values[-4:]) / 4 < 0.08 < distance(F.avg_pool2d(images, 3, 1, 1), everyone, images)
