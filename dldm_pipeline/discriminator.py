"""A discriminator of slices, and its losses: for the decoder's last training, and for the StyleGAN2 DLDM is compared with.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020): residual discriminator, lazy R1.
Karras et al., "Progressive Growing of GANs" (ICLR 2018): equalised learning rates and minibatch standard deviation. Zhao et
al., "Differentiable Augmentation for Data-Efficient GAN Training" (NeurIPS 2020): translation. It sees all modalities of a
subject and its mask as channels of one image, so that it also judges whether they fit together.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def lrelu(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU that keeps the variance of normal input."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def blur(x: torch.Tensor, stride: int = 1, padding: int = 1, gain: float = 1.0) -> torch.Tensor:
    """The paper's low-pass filter [1, 3, 3, 1] along both axes, (B, C, H, W), for smooth resampling."""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = (gain * taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


class EqualLinear(nn.Module):
    """A linear layer whose weights are stored at unit variance and scaled in use, so that all learn at one speed.

    Args:
        inputs: features in.
        outputs: features out.
        bias: initial value of all biases.
        speed: learning rate against that of the other layers.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, speed: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / speed)
        self.bias = nn.Parameter(torch.full((outputs,), bias / speed))
        self.scale, self.speed = speed / math.sqrt(inputs), speed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.speed)


class EqualConv2d(nn.Module):
    """A convolution of equalised learning rate; `down` halves the size, with a blur before."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True, down: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.kernel, self.down = 1 / math.sqrt(inputs * kernel**2), kernel, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.down:
            return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.kernel // 2)
        if self.kernel == 1:
            return F.conv2d(blur(x, stride=2), self.weight * self.scale, self.bias)
        # Four taps over H with two zeros each side leave H + 1, of which the strided convolution makes H / 2.
        return F.conv2d(blur(x, padding=2), self.weight * self.scale, self.bias, stride=2)


class ResidualBlock(nn.Module):
    """Two convolutions beside a short-cut, half the size."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = EqualConv2d(inputs, inputs, 3)
        self.conv2 = EqualConv2d(inputs, outputs, 3, down=True)
        self.skip = EqualConv2d(inputs, outputs, 1, bias=False, down=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (lrelu(self.conv2(lrelu(self.conv1(x)))) + self.skip(x)) / math.sqrt(2)


def minibatch_deviation(x: torch.Tensor, group_size: int = 4) -> torch.Tensor:
    """Add a channel with the mean deviation over groups of images, which shows a generator that repeats itself.

    Args:
        x: (B, C, H, W).
        group_size: images in a group; the largest divisor of B up to it is taken.

    Returns:
        (B, C + 1, H, W).
    """
    size = next(g for g in range(min(group_size, len(x)), 0, -1) if len(x) % g == 0)
    groups = x.unflatten(0, (size, -1))
    deviation = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    channel = deviation.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel], dim=1)


def check_grids(sample_size: int, channels: Sequence[int]) -> None:
    """Raise a `ValueError` unless `channels` has one positive width for each of 4, 8, ..., `sample_size`."""
    if sample_size < 8 or sample_size & (sample_size - 1):
        raise ValueError(f"sample_size is {sample_size}; grids double from 4 pixels, so give 8, 16, 32, 64, 128 or 256")
    grids = int(math.log2(sample_size)) - 1
    if len(channels) != grids or min(channels) < 1:
        sizes = ", ".join(str(4 * 2**level) for level in range(grids))
        raise ValueError(f"channels is {list(channels)}; give {grids} positive widths, one for each grid: {sizes}")


class Discriminator(nn.Module):
    """Images (B, image_channels, H, W) and, if there are labels, (B,) to logits (B,), above zero for real.

    Args:
        image_channels: of an image.
        sample_size: image height and width, pixels.
        channels: width on the grid of 4x4, 8x8, ..., sample_size.
        num_labels: how many labels there are; 0 for none.
    """

    def __init__(self, image_channels: int, sample_size: int, channels: Sequence[int], num_labels: int = 0):
        super().__init__()
        check_grids(sample_size, channels)
        widths = list(channels)[::-1]
        self.from_image = EqualConv2d(image_channels, widths[0], 1)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.conv = EqualConv2d(widths[-1] + 1, widths[-1], 3)
        self.linear = EqualLinear(widths[-1] * 16, widths[-1])
        self.logit = EqualLinear(widths[-1], 1)
        self.label = nn.Embedding(num_labels, widths[-1]) if num_labels else None

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.blocks(lrelu(self.from_image(images.contiguous(memory_format=torch.channels_last))))
        x = lrelu(self.conv(minibatch_deviation(x)))
        x = lrelu(self.linear(x.flatten(1)))
        logits = self.logit(x)[:, 0]
        if self.label is not None:
            logits = logits + (self.label(labels) * x).sum(dim=1) / math.sqrt(x.shape[1])
        return logits


def default_channels(sample_size: int) -> list[int]:
    """Widths of a small discriminator on the grid of 4x4, 8x8, ..., `sample_size`: 256, 128, 64, ... down to 8."""
    return [max(8, 256 >> level) for level in range(int(math.log2(sample_size)) - 1)]


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


def translate(images: torch.Tensor, largest: float = 0.125) -> torch.Tensor:
    """Shift each image by up to a share of its size, (B, C, H, W); every channel alike.

    The border is filled with grey, 0. Black would hide the shift, as slices have black borders, and the generator would
    then learn to shift its brains as well; so the discriminator sees what the shift was.
    """
    reach, size = round(largest * images.shape[-1]), images.shape[-2:]
    if not reach:
        return images
    padded = F.pad(images, [reach] * 4).unbind()
    corners = torch.randint(2 * reach + 1, (len(images), 2)).tolist()
    return torch.stack(
        [image[:, y : y + size[0], x : x + size[1]] for image, (y, x) in zip(padded, corners, strict=True)]
    )


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The non-saturating loss of Goodfellow et al. (2014), a scalar, from logits (B,)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Logistic loss, a scalar, from logits (B,) and (B,)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared length of the logits' gradient by real images, a scalar (Mescheder et al. 2018).

    Args:
        real_logits: (B,), computed from `images`.
        images: (B, C, H, W), with `requires_grad`.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
