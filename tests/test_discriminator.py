import pytest
import torch

from dldm_pipeline.discriminator import (
    Discriminator,
    default_channels,
    discriminator_loss,
    generator_loss,
    minibatch_deviation,
    r1_penalty,
    to_channels,
    translate,
)

CHANNELS = (16, 8, 8, 8)


def test_minibatch_deviation_shows_repetition():
    x = torch.randn(8, 3, 4, 4)
    output = minibatch_deviation(x, 4)
    assert output.shape == (8, 4, 4, 4) and torch.equal(output[:, :3], x)
    # Images 0, 2, 4, 6 are one group.
    expected = x[::2].std(dim=0, unbiased=False).mean()
    torch.testing.assert_close(output[0, 3], expected.expand(4, 4), rtol=1e-3, atol=1e-4)
    assert minibatch_deviation(x[:1].expand(8, -1, -1, -1))[:, 3].max() < 1e-3
    assert minibatch_deviation(x[:5]).shape == (5, 4, 4, 4)


def test_the_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())
    images, weight = torch.randn(4, 2, 8, 8, requires_grad=True), torch.randn(2, 8, 8)
    penalty = r1_penalty((images * weight).sum(dim=(1, 2, 3)), images)
    torch.testing.assert_close(penalty, weight.square().sum())


def test_the_penalty_reaches_the_weights():
    judge = Discriminator(2, 32, CHANNELS)
    images = torch.randn(4, 2, 32, 32, requires_grad=True)
    r1_penalty(judge(images), images).backward()
    assert judge.from_image.weight.grad.abs().sum() > 0


def test_translation_shifts_all_channels_alike_over_grey():
    images = torch.zeros(64, 2, 16, 16)
    images[:, :, 8, 8] = torch.tensor([1.0, 2.0])
    output = translate(images.requires_grad_(), 0.125)
    assert output.shape == images.shape
    spots = (output[:, 0] == 1).nonzero()
    assert len(spots) == 64 and torch.equal(spots, (output[:, 1] == 2).nonzero())
    assert spots[:, 1:].min() == 6 and spots[:, 1:].max() == 10
    assert translate(torch.ones(64, 1, 16, 16)).min() == 0
    output.sum().backward()
    assert (images.grad[:, :, 4:12, 4:12] == 1).all()
    assert translate(images, 0.0) is images


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


@pytest.mark.parametrize("size", [8, 32, 128])
def test_default_channels_fit_the_size(size):
    widths = default_channels(size)
    assert widths[0] == 256 and min(widths) >= 8
    assert Discriminator(2, size, widths)(torch.randn(2, 2, size, size)).shape == (2,)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="sample_size is 48"):
        Discriminator(2, 48, CHANNELS)
