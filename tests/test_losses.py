import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.losses import (
    DetailDiscriminator,
    PerceptualDistance,
    discriminator_loss,
    edge_loss,
    fine_detail,
    foreground_of,
    generator_loss,
    mask_loss,
    near_tumour,
    nested_regions,
    noise_std,
    patch_artefacts,
    patch_distance,
    r1_penalty,
    radial_power,
    reconstruction_terms,
    spectrum_loss,
    to_channels,
)

CHECKERS = (-1.0) ** (torch.arange(64) + torch.arange(64)[:, None])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def simulated():
    """Images (32, 5, 64, 64) and masks (32, 64, 64)."""
    subjects = [simulate_subject(seed, 64) for seed in range(32)]
    images = torch.stack([torch.from_numpy(subject.images) for subject in subjects])
    return images, torch.stack([torch.from_numpy(subject.mask) for subject in subjects]).float()


# Filters


def test_radial_power_knows_a_wave_and_a_blur():
    image = torch.rand(2, 32, 32)
    power = radial_power(image, 8)
    assert power.shape == (2, 8)  # up to half the Nyquist frequency
    assert torch.allclose(power, radial_power(image + 1, 8), rtol=1e-3)
    wave = torch.cos(torch.arange(32) * 2 * torch.pi * 5 / 32).expand(1, 32, 32)
    assert radial_power(wave, 8)[0].argmax() == 4  # five cycles an image
    blurred = F.avg_pool2d(image[None], 3, stride=1, padding=1)[0]
    assert (radial_power(blurred, 8)[:, 4:].sum() < power[:, 4:].sum()).all()
    assert radial_power(CHECKERS[None, :32, :32], 23)[0].argmax() == 22  # its only wave lies in the corner


def test_fine_detail_and_noise_are_told_from_edges_and_shading():
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    detail = fine_detail((x + y + 0.1 * CHECKERS)[None, None])[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(detail, (0.1 * 8 / 9 * CHECKERS)[1:-1, 1:-1], rtol=0, atol=1e-5)

    disc = torch.hypot(y, x) < 0.8
    clean = disc * (0.4 + 0.2 * x + 0.2 * (y > 0.2))
    assert noise_std(clean, disc) < 1e-3
    for std in (0.01, 0.05):
        noisy = clean + std * torch.randn(3, 2, 64, 64) * disc
        assert noise_std(noisy, disc).shape == (3, 2) and abs(noise_std(noisy, disc).mean() / std - 1) < 0.15
    assert noise_std(noisy, torch.zeros_like(disc)).isnan().all()


def test_a_subject_becomes_channels_of_one_image():
    images, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16)
    mask[:, 4:8, 4:8] = 1
    present = torch.tensor([[True, True, True], [True, False, True]])
    output = to_channels(images, present, mask)
    assert output.shape == (2, 4, 16, 16) and (output[1, 1] == -1).all()
    torch.testing.assert_close(output[0, :3], images[0] * 2 - 1)
    # Blurred, but as much of it as before.
    assert len(output[0, 3].unique()) > 2
    torch.testing.assert_close((output[:, 3] + 1).sum(), 2 * mask.sum())
    assert to_channels(images, present).shape == (2, 3, 16, 16)


def test_foreground_and_surroundings_of_a_tumour():
    images = torch.zeros(1, 2, 4, 4)
    images[0, 0, :2], images[0, 1, :, :2] = 0.5, 0.1
    both = foreground_of(images, torch.tensor([[True, True]]))
    first = foreground_of(images, torch.tensor([[True, False]]))
    assert both.sum() == 12 and torch.equal(first[0], images[0, 0] > 0)
    mask = torch.zeros(2, 64, 64)
    mask[0, 30:34, 20] = 1
    near = near_tumour(mask)
    assert near.shape == mask.shape and not near[1].any()
    assert near[0, 22:42, 12:28].all() and not near[0, :, 45:].any() and not near[0, 55:].any()


# Rebuilt images


def test_terms_of_a_known_error():
    """Only modalities that are present count, each as much as the others."""
    targets = torch.rand(2, 2, 32, 32)
    sample = targets.clone()
    sample[:, 0] += 0.1
    sample[1, 1] += 9
    present = torch.tensor([[True, True], [True, False]])
    foreground = torch.ones(2, 32, 32, dtype=torch.bool)
    noise, logits = torch.zeros(2, 2, 1, 1), torch.full((2, 32, 32), 20.0)
    terms = reconstruction_terms(sample, targets, present, noise, logits, foreground)
    assert terms["l1"].item() == pytest.approx(0.1 * 2 / 3, rel=1e-4)
    assert terms["mse"].item() == pytest.approx(0.01 * 2 / 3, rel=1e-4)
    torch.testing.assert_close(terms["squared"], torch.tensor([0.01 * 4 / 3, 0.0]), rtol=1e-4, atol=1e-8)
    assert terms["edge"].item() == pytest.approx(0, abs=1e-6) and terms["foreground"] < 1e-6
    assert terms["spectrum"] < 1e-3
    # With as much noise as its target, a sample without noise has the right spectrum.
    noisy = targets + 0.3 * torch.randn_like(targets)
    mean_image = reconstruction_terms(targets, noisy, present, noise, logits, foreground)["spectrum"]
    assert reconstruction_terms(targets, noisy, present, noise + 0.3, logits, ~foreground)["spectrum"] == mean_image
    assert reconstruction_terms(targets, noisy, present, noise + 0.3, logits, foreground)["spectrum"] < mean_image


def test_edges_and_spectrum_see_a_blur():
    images = torch.rand(2, 1, 32, 32)
    blurred = F.avg_pool2d(images, 3, 1, 1)
    assert edge_loss(images, images) == 0 == spectrum_loss(images, images, 22)
    assert edge_loss(blurred, images) > 0.1 and spectrum_loss(blurred, images, 22) > 0.5


def test_no_tumour_is_no_answer_to_a_small_one():
    mask = torch.zeros(2, 32, 32)
    mask[0, 8:12, 8:12] = 1
    mask, known = mask[:, None], torch.tensor([[True], [False]])
    right, none = (mask * 2 - 1) * 20, torch.full_like(mask, -20.0)
    assert mask_loss(right, mask, known) < 1e-3 < 0.4 < mask_loss(none, mask, known)
    other = none.clone()
    other[1] = 20  # nobody knows this mask
    assert mask_loss(other, mask, known) == mask_loss(none, mask, known)


def test_regions_are_nested_and_known_only_with_labels():
    labels = torch.tensor([[[0, 1, 2, 3]], [[0, 0, 0, 0]]], dtype=torch.uint8)
    batch = {"labels": labels, "mask": torch.tensor([[[0.0, 1, 1, 1]], [[1.0, 0, 0, 0]]])}
    batch |= {"has_mask": torch.tensor([True, True]), "has_labels": torch.tensor([True, False])}
    regions, known = nested_regions(batch, 3)
    assert regions[0, :, 0].tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert known.tolist() == [[True, True, True], [True, False, False]]
    whole, known = nested_regions(batch, 1)
    assert torch.equal(whole[:, 0], batch["mask"]) and known.tolist() == [[True], [True]]


# Subjects whose images nobody knows


@pytest.mark.parametrize("patch_size", [2, 4])
def test_detail_at_some_positions_of_every_patch_is_found(patch_size):
    images = F.avg_pool2d(torch.rand(8, 3, 66, 66), 3, 1)
    detail = 0.05 * torch.randn(8, 3, 64, 64)
    at_corners = (torch.arange(64) % patch_size == 0) & (torch.arange(64)[:, None] % patch_size == 0)
    # As much power in both, spread evenly in the first.
    without, with_artefacts = (
        patch_artefacts(images + x, patch_size) for x in (detail, patch_size * detail * at_corners)
    )
    assert without < 0.01 and with_artefacts > 0.2
    ripple = images + 0.01 * (-1.0) ** torch.arange(64)
    assert patch_artefacts(ripple, patch_size) > 0.05  # as much power at every position, and not the same mean
    # One modality's artefacts are seen among others without, and its gradient takes them away.
    only = (patch_size * detail * at_corners)[:, :1].requires_grad_()
    one = patch_artefacts(torch.cat([images[:, :1] + only, images[:, 1:]], dim=1), patch_size)
    one.backward()
    assert one > with_artefacts / 5 and (only.grad * only).sum() > 0


def test_patches_of_two_sets_lie_apart_by_what_they_show_and_not_by_how_many_there_are():
    def make(count, blur=1, joint=True):
        images = F.avg_pool2d(torch.randn(count, 1, 64, 64), blur, 1, blur // 2)
        second = images if joint else images.flip(0)
        images = torch.cat([images, second], dim=1) / images.std()
        return images, torch.ones(count, 64, 64, dtype=torch.bool)

    def distance(a, b):
        return patch_distance(a[0], b[0], [(a[1], b[1])]).item()

    same = distance(make(6, 3), make(12, 3))
    assert distance(make(6, 5), make(12, 3)) > 5 * same  # blurred
    assert distance(make(6, 3, joint=False), make(12, 3)) > 5 * same  # channels that do not fit together
    # What is not inside does not count, and nothing inside is no distance.
    images, where = make(6, 3)
    half = where & (torch.arange(64) < 32)
    changed = torch.where(half[:, None], images, 0)
    away = half & (torch.arange(64) < 16)
    torch.manual_seed(1)
    kept = patch_distance(images, images, [(away, away)])
    torch.manual_seed(1)
    torch.testing.assert_close(patch_distance(changed, images, [(away, away)]), kept)
    assert patch_distance(images, images, [(~where, where)]) == 0
    torch.manual_seed(1)
    assert patch_distance(images, images, [(away, away), (~where, where)]) == kept


def test_patches_become_alike_by_its_gradient():
    others, where = torch.randn(8, 1, 32, 32), torch.ones(8, 32, 32, dtype=torch.bool)
    contrast = torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.Adam([contrast], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        patch_distance(contrast * torch.randn(8, 1, 32, 32), others, [(where, where)]).backward()
        optimizer.step()
    assert contrast.item() == pytest.approx(1, abs=0.1)


# Perceptual distance


@pytest.fixture(scope="module")
def images(simulated):
    return simulated[0][:4, :3]


@pytest.fixture(scope="module")
def everyone():
    return torch.ones(4, 3, dtype=torch.bool)


def make_distance(images, present=None, times=1):
    present = torch.ones(images.shape[:2], dtype=torch.bool) if present is None else present
    return PerceptualDistance([{"images": images, "present": present}] * times, show_progress=False)


@pytest.fixture(scope="module")
def unused(images):
    """The distance from `images` before its first call, to be copied: its means run on. Nothing is shifted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerceptualDistance, "LARGEST_SHIFT", 0)
        yield make_distance(images)


def test_real_images_lie_at_zero_and_blurred_ones_do_not(unused, images, everyone):
    blurred = F.avg_pool2d(images, 3, 1, 1)

    def distance(given, real):
        return copy.copy(unused)(given, everyone.repeat(2, 1)[: len(given)], real)

    assert distance(images, images) < 1e-3
    rebuilt, new = distance(blurred, images), distance(blurred, images[:0])
    assert rebuilt > new > 0.05
    # One set that is right does not make up for one that is not.
    torch.testing.assert_close(distance(torch.cat([images, blurred]), images), new, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(distance(torch.cat([blurred, images]), images), rebuilt, rtol=0.02, atol=1e-3)
    # Rebuilt ones are to be themselves, and not anybody real.
    assert distance(images.roll(1, 0), images) > 0.02
    # The gradient points to the contrast of real images.
    for start, sign in ((0.7, -1), (1.3, 1)):
        contrast = torch.tensor(start, requires_grad=True)
        distance((contrast * images).clamp(0, 1), images[:0]).backward()
        assert contrast.grad * sign > 0


def test_the_mean_runs_on_and_the_gradient_does_not_shrink(unused, images, everyone):
    distance, dark = copy.copy(unused), (0.5 * images).requires_grad_()
    values, lengths = [], []
    for x in (dark, images, dark):
        value = distance(x, everyone, images[:0])
        values.append(value.item())
        lengths.append(torch.autograd.grad(value, x)[0].norm().item() if x is dark else 0)
    assert values[0] > values[1] > 0.5 * values[0]  # one batch moves the mean a little
    assert lengths[2] > 0.5 * lengths[0]


def test_a_missing_modality_counts_for_nothing(unused, images, everyone):
    present = everyone.clone()
    present[:2, 1] = False
    present[:, 2] = False
    spoilt = torch.where(present[..., None, None], images, torch.rand_like(images))
    values = [make_distance(real, present)(0.8 * real, present, real) for real in (images, spoilt)]
    assert values[0] > 0.01 and values[0].isfinite()
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)


def test_an_image_of_more_pixels_is_not_made_smaller(unused, images, everyone):
    large = F.interpolate(images[:2], size=(256, 256), mode="bicubic").clamp(0, 1)
    detail = (large + 0.1 * (-1.0) ** torch.arange(256)).clamp(0, 1)
    assert make_distance(large)(detail, everyone[:2], large) > 0.05


def test_shifts_move_every_value_and_not_the_mean(images, everyone, monkeypatch):
    monkeypatch.setattr(PerceptualDistance, "LARGEST_SHIFT", 3)
    images, everyone = images[:, :1], everyone[:, :1]
    distance = make_distance(images, times=8)
    values = [distance(images, everyone, images).item() for _ in range(10)]
    assert len(set(values)) > 8
    assert sum(values[-4:]) / 4 < 0.1 < distance(F.avg_pool2d(images, 3, 1, 1), everyone, images)


# Adversarial losses


def test_the_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())
    images, weight = torch.randn(4, 2, 8, 8, requires_grad=True), torch.randn(2, 8, 8)
    penalty = r1_penalty((images * weight).sum(dim=(1, 2, 3)), images)
    torch.testing.assert_close(penalty, weight.square().sum())


@pytest.fixture(scope="module")
def subjects(simulated):
    images, mask = simulated
    return to_channels(images, torch.ones(images.shape[:2], dtype=torch.bool), mask)


def train(decoded: torch.Tensor, real: torch.Tensor, steps: int) -> tuple[DetailDiscriminator, torch.Tensor]:
    discriminator = DetailDiscriminator(real.shape[1])
    for i in range(steps):
        rows = slice(8 * (i % 2), 8 * (i % 2) + 8)
        value = discriminator(decoded[rows], real[rows])
    return discriminator, value


def test_a_faint_pattern_is_found_and_the_gradient_takes_it_away(subjects):
    # An amplitude of 0.01 in [0, 1], less than the noise.
    pattern = (0.02 * CHECKERS).expand_as(subjects[16:]).clone().requires_grad_()
    discriminator, value = train(subjects[16:] + pattern.detach(), subjects[:16], steps=60)
    assert value > 1.5
    discriminator(subjects[16:24] + pattern[:8], subjects[:8]).backward()
    assert (pattern.grad * pattern).sum() > 0
    # What has no detail gives no hint: other terms compare brightness.
    shifted, plain = discriminator.logits(subjects[:4] + 0.3), discriminator.logits(subjects[:4])
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-3)


def test_real_subjects_are_not_told_from_other_real_ones(subjects):
    _, value = train(subjects[16:], subjects[:16], steps=12)
    assert abs(value - math.log(2)) < 0.3
