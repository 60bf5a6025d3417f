"""StyleGAN2 for multi-modal slices: networks and augmentation, written from the papers in plain torch operations.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020): mapping network, modulated and
demodulated convolutions, noise inputs, skip generator, residual discriminator, lazy R1. Karras et al., "Progressive
Growing of GANs" (ICLR 2018): equalised learning rates and minibatch standard deviation. Zhao et al., "Differentiable
Augmentation for Data-Efficient GAN Training" (NeurIPS 2020): translation. Left out: path-length regularisation and style
mixing, which Karras et al. (NeurIPS 2020) found to be of no use for small images and data sets.

All modalities of a subject, and its tumour mask, are channels of one image, so that they share one anatomy.

Inside, images run from -1 to 1; `sample` gives [0, 1].
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from baseline_utils import subject_generators
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from dldm_pipeline.modalities import check_modalities


def lrelu(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU that keeps the variance of normal input."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def blur(x: torch.Tensor, stride: int = 1, padding: int = 1, gain: float = 1.0) -> torch.Tensor:
    """The paper's low-pass filter [1, 3, 3, 1] along both axes, (B, C, H, W), for smooth resampling."""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = (gain * taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Twice the size. Bilinear interpolation is zero insertion followed by `blur`."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class EqualLinear(nn.Module):
    """A linear layer whose weights are stored at unit variance and scaled in use, so that all learn at one speed.

    `bias` is the initial value of all biases, `speed` the learning rate against that of the other layers.
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


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by a style, and its output channels back to unit variance.

    Scaling the activations gives the same numbers as giving each image a kernel of its own (equations 1 to 3 of the
    paper, there run as a grouped convolution), and lets all images share one fast convolution. `up` doubles the size, with
    a blur after.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, style_dim: int, demodulate: bool = True, up: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.style = EqualLinear(style_dim, inputs, bias=1.0)
        self.scale, self.kernel, self.demodulate, self.up = 1 / math.sqrt(inputs * kernel**2), kernel, demodulate, up

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) and (B, style_dim) to (B, outputs, H, W), or twice that size."""
        style, weight = self.style(w), self.weight * self.scale
        x = x * style[:, :, None, None]
        if self.up:
            x = blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), gain=4.0)
        else:
            x = F.conv2d(x, weight, padding=self.kernel // 2)
        if self.demodulate:
            power = style.square() @ weight.square().sum(dim=(2, 3)).T
            x = x * (power + 1e-8).rsqrt()[:, :, None, None]
        return x


class MappingNetwork(nn.Module):
    """z (B, d) to w (B, d)."""

    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(EqualLinear(dim, dim, speed=0.01) for _ in range(layers))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            x = lrelu(layer(x))
        return x


class StyledConv(nn.Module):
    """Modulated convolution, noise of a learned strength, bias, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(inputs, outputs, 3, style_dim, up=up)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor, w: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        x = self.conv(x, w)
        if noise is None:
            noise = torch.randn(len(x), 1, *x.shape[2:], device=x.device, dtype=x.dtype)
        return lrelu(x + (noise * self.noise_strength + self.bias[:, None, None]))


class StyleGAN2(ModelMixin, ConfigMixin):
    """The generator, with what is needed to sample subjects.

    Args:
        modalities: names, in the order of the images' channels; the tumour mask is one more.
        sample_size: image height and width, pixels: 8, 16, 32, ...
        channels: width on the grid of 4x4, 8x8, ..., sample_size.
        latent_dim: length of z and w.
        mapping_layers: layers of the mapping network.

    Raises:
        ValueError: sizes and widths do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        modalities: Sequence[str] = ("T1", "T2", "FLAIR", "WB", "BB"),
        sample_size: int = 64,
        channels: Sequence[int] = (256, 128, 64, 32, 16),
        latent_dim: int = 256,
        mapping_layers: int = 4,
    ):
        super().__init__()
        check_grids(sample_size, channels)
        check_modalities(modalities)
        self.image_channels = len(modalities) + 1
        self.mapping = MappingNetwork(latent_dim, mapping_layers)
        self.const = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        convs = [StyledConv(channels[0], channels[0], latent_dim)]
        for a, b in zip(channels, channels[1:], strict=False):
            convs += [StyledConv(a, b, latent_dim, up=True), StyledConv(b, b, latent_dim)]
        to_image = [ModulatedConv2d(a, self.image_channels, 1, latent_dim, demodulate=False) for a in channels]
        self.convs, self.to_image = nn.ModuleList(convs), nn.ModuleList(to_image)
        self.image_bias = nn.Parameter(torch.zeros(self.image_channels))

    def forward(self, z: torch.Tensor, noises: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Images (B, image_channels, H, W), about -1 to 1, of z (B, latent_dim), normal.

        `noises` are one (B, 1, h, w) for each convolution, from 4x4 up, by default drawn.
        """
        w = self.mapping(z)
        noises = [None] * len(self.convs) if noises is None else noises
        x = self.const.expand(len(z), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        x = self.convs[0](x, w, noises[0])
        image = self.to_image[0](x, w)
        for level in range(1, len(self.to_image)):
            for i in (2 * level - 1, 2 * level):
                x = self.convs[i](x, w, noises[i])
            image = upsample(image) + self.to_image[level](x, w)
        return image + self.image_bias[:, None, None]

    def noise_sizes(self) -> list[int]:
        """Height of the noise of each convolution."""
        return [4 * 2 ** ((i + 1) // 2) for i in range(len(self.convs))]

    @torch.no_grad()
    def sample(
        self,
        num_subjects: int,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int = 32,
        return_masks: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Draw subjects.

        Args:
            num_subjects: S, one or more.
            generator: CPU generator, or one for each subject. A seed fixes the subjects.
            batch_size: subjects at once; only memory and time depend on it.

        Returns:
            (S, n, H, W) float32 in [0, 1] on the CPU; with `return_masks`, also (S, H, W) of 0 and 1.

        Raises:
            ValueError: `num_subjects` or `batch_size` below 1, or another number of generators.
        """
        generators = subject_generators(num_subjects, generator, batch_size)
        shapes = [(self.config.latent_dim,), *[(1, size, size) for size in self.noise_sizes()]]
        results = []
        for start in range(0, num_subjects, batch_size):
            part = generators[start : start + batch_size]
            z, *noises = (randn_tensor((len(part), *shape), part, self.device, self.dtype) for shape in shapes)
            results.append((self(z, noises) / 2 + 0.5).float().cpu())
        images = torch.cat(results)
        masks, images = (images[:, -1] > 0.5).float(), images[:, :-1].clamp(0, 1)
        return (images, masks) if return_masks else images


def check_grids(sample_size: int, channels: Sequence[int]) -> None:
    """Raise a `ValueError` unless `channels` has one positive width for each of 4, 8, ..., `sample_size`."""
    if sample_size < 8 or sample_size & (sample_size - 1):
        raise ValueError(f"sample_size is {sample_size}; StyleGAN2 doubles 4 pixels, so give 8, 16, 32, 64, 128 or 256")
    grids = int(math.log2(sample_size)) - 1
    if len(channels) != grids or min(channels) < 1:
        sizes = ", ".join(str(4 * 2**level) for level in range(grids))
        raise ValueError(f"channels is {list(channels)}; give {grids} positive widths, one for each grid: {sizes}")


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
    """Add a channel to (B, C, H, W): the mean deviation over groups of images, which shows a generator that repeats itself.

    A group has the largest divisor of B up to `group_size` images.
    """
    size = next(g for g in range(min(group_size, len(x)), 0, -1) if len(x) % g == 0)
    groups = x.unflatten(0, (size, -1))
    deviation = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    channel = deviation.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel], dim=1)


class Discriminator(nn.Module):
    """Images (B, image_channels, H, W) to logits (B,), above zero for real.

    `sample_size` and `channels` are as in [`StyleGAN2`].
    """

    def __init__(self, image_channels: int, sample_size: int, channels: Sequence[int]):
        super().__init__()
        check_grids(sample_size, channels)
        widths = list(channels)[::-1]
        self.from_image = EqualConv2d(image_channels, widths[0], 1)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.conv = EqualConv2d(widths[-1] + 1, widths[-1], 3)
        self.linear = EqualLinear(widths[-1] * 16, widths[-1])
        self.logit = EqualLinear(widths[-1], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(lrelu(self.from_image(images.contiguous(memory_format=torch.channels_last))))
        x = lrelu(self.conv(minibatch_deviation(x)))
        return self.logit(lrelu(self.linear(x.flatten(1))))[:, 0]


def translate(images: torch.Tensor, largest: float = 0.125) -> torch.Tensor:
    """Shift each image of (B, C, H, W) by up to a share of its size, every channel alike.

    The border is filled with grey, 0: black would hide the shift, as slices have black borders, and the generator would
    then learn to shift its brains as well.
    """
    reach, (height, width) = round(largest * images.shape[-1]), images.shape[-2:]
    if not reach:
        return images
    corners = torch.randint(2 * reach + 1, (len(images), 2)).tolist()
    pairs = zip(F.pad(images, [reach] * 4), corners, strict=True)
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in pairs])
