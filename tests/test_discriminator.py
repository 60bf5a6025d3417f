import math

import pytest
import torch

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.discriminator import DetailDiscriminator, discriminator_loss, generator_loss, r1_penalty
from dldm_pipeline.training_utils import to_channels

CHECKERS = (-1.0) ** (torch.arange(64) + torch.arange(64)[:, None])


@pytest.fixture(scope="module")
def subjects() -> torch.Tensor:
    drawn = [simulate_subject(seed, 64) for seed in range(32)]
    images = torch.stack([torch.from_numpy(subject.images) for subject in drawn])
    mask = torch.stack([torch.from_numpy(subject.mask) for subject in drawn]).float()
    return to_channels(images, torch.ones(images.shape[:2], dtype=torch.bool), mask)


def test_the_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())
    images, weight = torch.randn(4, 2, 8, 8, requires_grad=True), torch.randn(2, 8, 8)
    penalty = r1_penalty((images * weight).sum(dim=(1, 2, 3)), images)
    torch.testing.assert_close(penalty, weight.square().sum())


def train(decoded: torch.Tensor, real: torch.Tensor, steps: int = 60) -> tuple[DetailDiscriminator, torch.Tensor]:
    torch.manual_seed(0)
    discriminator = DetailDiscriminator(real.shape[1])
    for i in range(steps):
        rows = slice(8 * (i % 2), 8 * (i % 2) + 8)
        value = discriminator(decoded[rows], real[rows])
    return discriminator, value


def test_a_faint_grid_is_found_and_the_gradient_takes_it_away(subjects):
    # An amplitude of 0.01 in [0, 1], less than the noise.
    grid = (0.02 * CHECKERS).expand_as(subjects[16:]).clone().requires_grad_()
    discriminator, value = train(subjects[16:] + grid.detach(), subjects[:16])
    assert value > 1.5
    discriminator(subjects[16:24] + grid[:8], subjects[:8]).backward()
    assert (grid.grad * grid).sum() > 0


def test_real_subjects_are_not_told_from_other_real_ones(subjects):
    _, value = train(subjects[16:], subjects[:16], steps=12)
    assert abs(value - math.log(2)) < 0.3


def test_what_has_no_detail_gives_no_hint(subjects):
    """Brightness alone is the business of other terms."""
    discriminator, _ = train(subjects[16:] + 0.02 * CHECKERS, subjects[:16], steps=20)
    torch.testing.assert_close(
        discriminator.logits(subjects[:4] + 0.3), discriminator.logits(subjects[:4]), rtol=1e-3, atol=1e-3
    )
