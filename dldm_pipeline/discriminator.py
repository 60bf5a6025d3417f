"""A discriminator of slices for the decoder's last training, and the adversarial losses.

It sees all modalities of a subject and its mask as channels of one image, so that it also judges whether they fit together.
"""

import torch
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """Judges patches of a subject, as in Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks"
    (CVPR 2017), on the grid to which the autoencoder patchifies.

    Args:
        image_channels: of an image, modalities and mask.
        patch_size: side of the patches that become channels first.
        width: of the convolutions at `1 / patch_size` of the image size; twice that at half of it.
    """

    def __init__(self, image_channels: int, patch_size: int = 4, width: int = 64):
        super().__init__()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(image_channels * patch_size**2, width, 3, padding=1)
        widths = [width, width, 2 * width, 2 * width]
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.conv_out = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, image_channels, H, W) in [-1, 1] to logits (B, h, w), above zero for real; h = H / (2 * patch_size)."""
        x = F.pixel_unshuffle(images, self.patch_size).contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.conv_in(x), 0.2)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1:
                x = F.avg_pool2d(x, 2)
        return self.conv_out(x)[:, 0]


class _Block(nn.Module):
    # Without norms, which would hide how bright an image is.
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return (h + self.skip(x)) * 0.7  # the variance of a sum of two


def to_channels(images: torch.Tensor, present: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A subject as channels of one image, as the discriminator wants it.

    Args:
        images: (B, n, H, W) in [0, 1].
        present: (B, n) bool; what is missing becomes black.
        mask: (B, H, W) in [0, 1]. It is blurred: one of nothing but 0 and 1 would give every decoded one away.

    Returns:
        (B, n or n + 1, H, W) in [-1, 1].
    """
    images = images * present[:, :, None, None]
    if mask is not None:
        taps = mask.new_tensor([0.25, 0.5, 0.25])
        mask = F.conv2d(F.pad(mask[:, None], [1] * 4, mode="replicate"), (taps[:, None] * taps)[None, None])
        images = torch.cat([images, mask], dim=1)
    return images * 2 - 1


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The non-saturating loss of Goodfellow et al. (2014), a scalar, from logits of any shape."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Logistic loss, a scalar, from logits of any shape."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared length of the logits' gradient by real images, a scalar (Mescheder et al. 2018).

    Args:
        real_logits: (B,), computed from `images`.
        images: (B, C, H, W), with `requires_grad`.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
