import torch

from dldm_pipeline.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    to_channels,
)


def test_the_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())
    images, weight = torch.randn(4, 2, 8, 8, requires_grad=True), torch.randn(2, 8, 8)
    penalty = r1_penalty((images * weight).sum(dim=(1, 2, 3)), images)
    torch.testing.assert_close(penalty, weight.square().sum())


def test_patches_are_judged_where_they_are():
    torch.manual_seed(0)
    judge = PatchDiscriminator(3, width=8)
    images = torch.randn(2, 3, 128, 128)
    logits = judge(images)
    assert logits.shape == (2, 16, 16)
    changed = images.clone()
    changed[0, :, 96:, 96:] = 0
    difference = (judge(changed) - logits).abs()
    assert difference[0, 12:, 12:].min() > 0 and difference[0, :4].max() == 0 and difference[1].max() == 0


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
