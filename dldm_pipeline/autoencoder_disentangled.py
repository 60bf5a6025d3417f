"""The disentangled autoencoder of DLDM: one structure latent for a subject, one style latent for each of its modalities.

Source: Na et al., "Generation of Multi-modal Brain Tumor MRIs with Disentangled Latent Diffusion Model", MIDL 2023 (the
n + 1 latents, pair decoding, style mixing and averaged loss). Encoding any subset of modalities and decoding the tumour mask
from the structure are ours. This file imports torch and diffusers only: it is also published as remote code.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


@dataclass
class DisentangledEncoderOutput(BaseOutput):
    """What `DisentangledAutoencoder.encode` returns.

    Args:
        structure_dist: posterior of `z_struct`, mode of shape (B, c_s, h, w): one for each subject, whatever was present.
        style_dist: posterior of the n styles, mode of shape (B, n, c_t).
    """

    structure_dist: DiagonalGaussianDistribution
    style_dist: "StyleDistribution"


@dataclass
class DisentangledDecoderOutput(BaseOutput):
    """What `DisentangledAutoencoder.decode` returns.

    Args:
        sample: (B, k, H, W), one image for each of the k styles given, about [0, 1], not clamped, without noise.
        regions: (B, r, H, W) logits of the tumour's nested regions, from the structure alone: the whole tumour and, with
            r = 3, its core (all but the oedema) and what of the core enhances.
        foreground: (B, H, W) logits of what is not background, from the structure alone; `foreground > 0` is imaged.
    """

    sample: torch.Tensor
    regions: torch.Tensor
    foreground: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """(B, H, W) logits of the whole tumour; `mask > 0` is tumour."""
        return self.regions[:, 0]

    @property
    def labels(self) -> torch.Tensor | None:
        """(B, H, W) uint8 of BraTS's labels in the foreground: 1 necrotic core, 2 oedema, 3 enhancing tumour, 0 else.

        `None` if the model knows the whole tumour only.
        """
        if self.regions.shape[1] == 1:
            return None
        whole, core, enhancing = ((self.regions > 0) & (self.foreground > 0)[:, None]).cumprod(dim=1).unbind(dim=1)
        return (2 * whole - core + 2 * enhancing).to(torch.uint8)


class StyleDistribution(DiagonalGaussianDistribution):
    """A diagonal Gaussian over style vectors, from parameters (B * n, 2 * c_t, 1, 1); samples and mode are (B, n, c_t)."""

    def __init__(self, parameters: torch.Tensor, num_modalities: int):
        super().__init__(parameters)
        self._num_modalities = num_modalities

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        return super().sample(generator)[:, :, 0, 0].unflatten(0, (-1, self._num_modalities))

    def mode(self) -> torch.Tensor:
        return super().mode()[:, :, 0, 0].unflatten(0, (-1, self._num_modalities))


def intensity_quantiles(images: torch.Tensor, number: int) -> torch.Tensor:
    """Quantiles of what is above 0 in images (N, H, W): (N, number) float32, spaced as in a normal distribution."""
    values = images.flatten(1).float().sort(dim=1).values
    count = (values > 0).sum(dim=1, keepdim=True)
    last = values.shape[1] - 1
    levels = torch.special.ndtr(torch.linspace(-2.5, 2.5, number, device=images.device))
    # From the smallest value to the largest.
    place = last - (count - 1).clamp(min=0) * (levels[-1] - levels) / (levels[-1] - levels[0])
    below = place.floor().long()
    low, high = values.gather(1, below), values.gather(1, (below + 1).clamp(max=last))
    return low + (place - below) * (high - low)


def equalize(images: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W) with intensities replaced by their rank among `intensity_quantiles` (N, k), 0.1 to 1; 0 stays 0."""
    values = images.flatten(1).float()
    place = torch.searchsorted(quantiles[:, 1:-1].contiguous(), values)
    low, high = quantiles.gather(1, place), quantiles.gather(1, place + 1)
    rank = place + ((values - low) / (high - low).clamp(min=1e-4)).clamp(0, 1)
    return torch.where(values > 0, 0.1 + 0.9 * rank / (quantiles.shape[1] - 1), 0).view_as(images).to(images.dtype)


class ResBlock(nn.Module):
    """Pre-activation residual block; `condition` (N, d, 1, 1) shifts and scales it (FiLM, Perez et al. 2018)."""

    def __init__(self, channels: int, condition_channels: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Conv2d(condition_channels, 2 * channels, 1) if condition_channels else None
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h)
        if self.film is not None:
            scale, shift = self.film(condition).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class DisentangledAutoencoder(ModelMixin, ConfigMixin):
    """Encodes aligned modalities of a subject into (z_struct, z_style_1..n) and decodes each pair (z_struct, z_style_m).

    One encoder is shared by all modalities and told which one it sees. Its features are fused over the modalities present by
    a learned weighting at every position, so that any non-empty subset gives a structure. No convolution runs at full size:
    the image is patchified first (as in deep-compression autoencoders, Chen et al. 2024), then each level has half the size
    of the one before, down to that of the latents. The decoder's trunk sees the structure alone and runs once a subject; a
    small head modulated by one style renders one image. A linear map runs beside both: from all pixels of a place to its
    structure, and from structure to pixels, where the style weighs a sum of matrices.

    Args:
        modalities: names of the n modalities, in the order of the images' second axis.
        sample_size: height and width of the images in pixels; must divide by `patch_size * 2 ** (levels - 1)`, the number
            of pixels that a place of the latents stands for in each direction.
        patch_size: side of the patches that become channels.
        structure_channels: channels c_s of z_struct.
        style_channels: length c_t of each z_style, a vector, which cannot carry anatomy.
        encoder_channels: widths of the encoder's levels, from `sample_size / patch_size` down to the latents' size.
        decoder_channels: widths of the decoder's levels, as many, from the latents' size up.
        encoder_blocks, decoder_blocks: residual blocks on each level, of the encoder and of the decoder's trunk.
        head_channels: width of the part that runs once for each image.
        num_regions: 3 decodes the regions of the tumour, 1 the whole tumour only.
        num_quantiles: how many quantiles describe an image's intensities. The structure then sees ranks only, which no
            monotone intensity curve changes, and the style gets the quantiles. With 0 both see the images as they are.
        structure_shift, structure_scale: c_s values; `(z - shift) / scale` is what the diffusion model learns. Measured
            over the whole training set at the end of training; None until then.
        style_shift, style_scale: c_t values, likewise.
        style_relation: (n * c_t, n * c_t), correlation of the noise from which the styles of one subject are drawn.
        noise_level: n values, the standard deviation of the scanner's noise in each modality's images. A decoder trained with
            squared error predicts the mean, so rebuilt images lack it; `DLDMPipeline` adds as much.

    Raises:
        ValueError: on a size that does not divide, an encoder and a decoder of different depth, or empty or duplicate
            modality names.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock"]

    @register_to_config
    def __init__(
        self,
        modalities: tuple[str, ...] = ("T1", "T2", "FLAIR", "WB", "BB"),
        sample_size: int = 128,
        patch_size: int = 4,
        structure_channels: int = 16,
        style_channels: int = 8,
        encoder_channels: tuple[int, ...] = (32, 96),
        encoder_blocks: int = 1,
        decoder_channels: tuple[int, ...] = (128, 64),
        decoder_blocks: int = 2,
        head_channels: int = 64,
        num_regions: int = 1,
        num_quantiles: int = 0,
        structure_shift: list[float] | None = None,
        structure_scale: list[float] | None = None,
        style_shift: list[float] | None = None,
        style_scale: list[float] | None = None,
        style_relation: list[list[float]] | None = None,
        noise_level: list[float] | None = None,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        named = isinstance(modalities, (list, tuple)) and all(isinstance(n, str) and n.strip() for n in modalities)
        if not named or not modalities or len(set(modalities)) < len(modalities):
            raise ValueError(f"`modalities` must be a non-empty list of different names, got {modalities!r}.")
        if num_regions not in (1, 3):
            raise ValueError(f"`num_regions` must be 1 or 3, got {num_regions!r}.")
        if not encoder_channels or len(encoder_channels) != len(decoder_channels):
            raise ValueError(
                f"`encoder_channels` {list(encoder_channels)} and `decoder_channels` {list(decoder_channels)} must name one "
                "width for each level, as many in both."
            )
        ratio = self.spatial_compression_ratio
        if sample_size % ratio:
            raise ValueError(
                f"`sample_size` {sample_size} does not divide by {ratio}, `patch_size` {patch_size} doubled with each of the "
                f"{len(encoder_channels)} levels but the first; take {max(1, sample_size // ratio) * ratio} or another "
                "`patch_size`."
            )
        n, patch_channels = len(modalities), patch_size**2
        e0, e1 = encoder_channels[0], encoder_channels[-1]
        d1, d0 = decoder_channels[0], decoder_channels[-1]

        self.modality_embedding = nn.Embedding(n, e0)
        self.encoder_in = nn.Conv2d(patch_channels, e0, 3, padding=1)
        self.encoder_grids = nn.ModuleList(
            nn.ModuleList(ResBlock(width, e0) for _ in range(encoder_blocks)) for width in encoder_channels
        )
        self.encoder_down = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for fine, coarse in pairwise(encoder_channels))
        self.fusion_weight = nn.Conv2d(e1, e1, 1)
        self.fusion = nn.ModuleList(ResBlock(e1) for _ in range(encoder_blocks))
        # Linear maps beside the network, here to the structure and in the decoder back: a network is slow to learn what a
        # linear map can do.
        self.encoder_linear = nn.Conv2d(n * ratio**2, structure_channels, 1)
        self.structure_out = nn.Sequential(nn.GroupNorm(8, e1), nn.SiLU(), nn.Conv2d(e1, 2 * structure_channels, 1))
        self.quantiles_in = nn.Conv2d(num_quantiles, e1, 1) if num_quantiles else None
        self.style_out = nn.Sequential(nn.Conv2d(e1, e1, 1), nn.SiLU(), nn.Conv2d(e1, 2 * style_channels, 1))

        self.decoder_in = nn.Conv2d(structure_channels, d1, 3, padding=1)
        self.decoder_grids = nn.ModuleList(
            nn.ModuleList(ResBlock(width) for _ in range(decoder_blocks)) for width in decoder_channels
        )
        self.decoder_up = nn.ModuleList(nn.Conv2d(coarse, 4 * fine, 1) for coarse, fine in pairwise(decoder_channels))
        self.decoder_linear = nn.Conv2d(structure_channels, style_channels * ratio**2, 1)
        self.decoder_linear_style = nn.Conv2d(style_channels, style_channels, 1)
        self.style_in = nn.Sequential(nn.Conv2d(style_channels, d0, 1), nn.SiLU(), nn.Conv2d(d0, d0, 1), nn.SiLU())
        self.head_in = nn.Conv2d(d0, head_channels, 1)
        self.head = nn.ModuleList([ResBlock(head_channels, d0)])
        self.head_out = nn.Sequential(
            nn.GroupNorm(8, head_channels), nn.SiLU(), nn.Conv2d(head_channels, patch_channels, 3, padding=1)
        )
        mask_convs = nn.Conv2d(d0, d0, 3, padding=1), nn.Conv2d(d0, num_regions * patch_channels, 3, padding=1)
        self.mask_out = nn.Sequential(nn.GroupNorm(8, d0), nn.SiLU(), mask_convs[0], nn.SiLU(), mask_convs[1])
        self.foreground_out = nn.Sequential(nn.GroupNorm(8, d0), nn.SiLU(), nn.Conv2d(d0, patch_channels, 3, padding=1))

        # How the mean structure of each modality alone differs from that of all of them, over the training set.
        offset = torch.zeros(n, structure_channels, self.latent_size, self.latent_size)
        self.register_buffer("structure_offset", offset)
        for head, channels in ((self.structure_out[-1], structure_channels), (self.style_out[-1], style_channels)):
            # Posteriors start narrow (standard deviation 0.05), or their noise would hide the first signal.
            nn.init.constant_(head.bias[channels:], -6.0)
        for layer in (self.encoder_linear, self.decoder_linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.foreground_out[-1].weight)
        nn.init.constant_(self.foreground_out[-1].bias, 3.0)  # all is foreground, or no image would have a gradient

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DisentangledAutoencoder":
        """Loads from a folder or the Hub as [`ModelMixin.from_pretrained`] does, from safetensors only: never a pickle."""
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs) -> "DisentangledAutoencoder":
        """Builds a model as [`ConfigMixin.from_config`] does; refuses a config with another kind of style than vectors."""
        if config.get("style_type", "vector") != "vector":  # the same weights would load and mean something else
            raise ValueError(
                f"`style_type` is {config['style_type']!r} in the config; this class has style vectors only."
            )
        return super().from_config(config, **kwargs)

    @property
    def num_modalities(self) -> int:
        return len(self.config.modalities)

    @property
    def latent_size(self) -> int:
        """Height and width of the latent grid."""
        return self.config.sample_size // self.spatial_compression_ratio

    @property
    def spatial_compression_ratio(self) -> int:
        """How many pixels, in each direction, a place of the latents stands for."""
        return self.config.patch_size * 2 ** (len(self.config.encoder_channels) - 1)

    @apply_forward_hook
    def encode(
        self, images: torch.Tensor, present: torch.Tensor | None = None, return_dict: bool = True
    ) -> DisentangledEncoderOutput | tuple:
        """Encodes subjects of which any non-empty subset of modalities is present; a ValueError if none is.

        Args:
            images: (B, n, H, W) in [0, 1]; what stands in place of a missing modality does not matter.
            present: (B, n) bool, which modalities feed the structure; None for all of them.
            return_dict: False returns the tuple `(structure_dist, style_dist)`.

        Returns:
            [`DisentangledEncoderOutput`]. Styles are given for every modality; that of a missing one means nothing.
        """
        output = self.encode_subsets(images, [present])[0]
        return output if return_dict else (output.structure_dist, output.style_dist)

    def encode_subsets(
        self, images: torch.Tensor, presents: Sequence[torch.Tensor | None]
    ) -> list[DisentangledEncoderOutput]:
        """`encode` for several choices of what is present in the same images, at little more than the cost of one.

        Args:
            images: (B, n, H, W) in [0, 1].
            presents: choices as in `encode`.
        """
        size, n = self.config.sample_size, self.num_modalities
        if images.ndim != 4 or images.shape[1:] != (n, size, size):
            raise ValueError(
                f"`images` must be (subjects, {n}, {size}, {size}) for the modalities {list(self.config.modalities)}, "
                f"got {tuple(images.shape)}."
            )
        batch = images.shape[0]
        # The module is called, because the hooks of offloading act on calls.
        condition = self.modality_embedding(torch.arange(n, device=images.device)).repeat(batch, 1)[:, :, None, None]
        seen = images
        if self.config.num_quantiles:
            quantiles = intensity_quantiles(images.flatten(0, 1), self.config.num_quantiles)
            seen = equalize(images.flatten(0, 1), quantiles).view_as(images)
        h = F.pixel_unshuffle(seen.reshape(batch * n, 1, size, size), self.config.patch_size)
        h = self._run(self.encoder_grids[0], self.encoder_in(h), condition)
        for down, blocks in zip(self.encoder_down, self.encoder_grids[1:], strict=True):
            h = self._run(blocks, down(F.pixel_unshuffle(h, 2)), condition)

        pooled = h.mean(dim=(2, 3), keepdim=True)
        if self.config.num_quantiles:
            pooled = pooled + self.quantiles_in(4 * quantiles[:, :, None, None].to(h.dtype))
        style_dist = StyleDistribution(self.style_out(pooled), n)
        features = h.unflatten(0, (batch, n))
        # Scaled to about zero mean and unit standard deviation.
        blocks = F.pixel_unshuffle(4 * seen - 1, self.spatial_compression_ratio).unflatten(1, (n, -1))
        weight = self.fusion_weight(h).unflatten(0, (batch, n))
        outputs = []
        for present in presents:
            w = weight
            if present is not None:
                if present.shape != (batch, n):
                    raise ValueError(f"`present` must be (subjects, {n}) = ({batch}, {n}), got {tuple(present.shape)}.")
                # A compiled program cannot raise an error that depends on a tensor's values.
                if not torch.compiler.is_compiling() and not present.any(dim=1).all():
                    raise ValueError("`present` has a subject without any modality; at least one must be present.")
                w = w.masked_fill(~present[:, :, None, None, None], float("-inf"))
            z = self._run(self.fusion, (w.softmax(dim=1) * features).sum(dim=1))
            mean, logvar = self.structure_out(z).chunk(2, dim=1)
            pixels = blocks
            if present is not None:
                # The sum over those present, scaled to that over all.
                weights = n * present / present.sum(dim=1, keepdim=True)
                pixels = blocks * weights[:, :, None, None, None].to(blocks.dtype)
            mean = mean + self.encoder_linear(pixels.flatten(1, 2))
            structure_dist = DiagonalGaussianDistribution(torch.cat([mean - self._offset(present), logvar], dim=1))
            outputs.append(DisentangledEncoderOutput(structure_dist=structure_dist, style_dist=style_dist))
        return outputs

    def _run(self, blocks: nn.ModuleList, h: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, condition)
            else:
                h = block(h, condition)
        return h

    def _offset(self, present: torch.Tensor | None) -> torch.Tensor | float:
        # Exact for one modality, and zero for all; in between it falls with the number k of modalities as an average does.
        n = self.num_modalities
        if present is None or n == 1:
            return 0.0
        weights = present.to(self.structure_offset.dtype)
        k = weights.sum(dim=1)[:, None, None, None]
        mean = torch.einsum("bm,mchw->bchw", weights, self.structure_offset) / k
        return mean - self.structure_offset.mean(dim=0) * (1 - 1 / k) * n / (n - 1)

    @apply_forward_hook
    def decode(
        self, z_struct: torch.Tensor, z_style: torch.Tensor, return_dict: bool = True
    ) -> DisentangledDecoderOutput | tuple:
        """Decodes each pair of a subject's structure and one of its k styles, and from the structure alone the tumour mask.

        Args:
            z_struct: (B, c_s, h, w).
            z_style: (B, k, c_t); k may be any number.
            return_dict: False returns the tuple `(sample, regions, foreground)`.

        Returns:
            [`DisentangledDecoderOutput`]. An image depends on nothing but its own pair.

        Raises:
            ValueError: on a wrong shape.
        """
        c_t, grid = self.config.style_channels, self.latent_size
        expected = (self.config.structure_channels, grid, grid)
        if z_struct.ndim != 4 or z_struct.shape[1:] != expected:
            raise ValueError(f"`z_struct` must be (subjects, *{expected}), got {tuple(z_struct.shape)}.")
        if z_style.shape[2:] != (c_t,) or z_style.shape[0] != z_struct.shape[0]:
            raise ValueError(
                f"`z_style` must be ({z_struct.shape[0]} subjects, k styles, {c_t}), got {tuple(z_style.shape)}."
            )
        batch, k = z_style.shape[:2]
        h = self._run(self.decoder_grids[0], self.decoder_in(z_struct))
        for up, blocks in zip(self.decoder_up, self.decoder_grids[1:], strict=True):
            h = self._run(blocks, F.pixel_shuffle(up(h), 2))
        regions = F.pixel_shuffle(self.mask_out(h), self.config.patch_size)
        foreground = F.pixel_shuffle(self.foreground_out(h), self.config.patch_size)

        style = z_style.flatten(0, 1)[:, :, None, None]
        # The structure alone gives as many images as a style has values; the style weighs their sum.
        weights = self.decoder_linear_style(style).unflatten(0, (batch, k))
        blocks = self.decoder_linear(z_struct).unflatten(1, (c_t, -1))
        linear = torch.einsum("bkcyx,bcpyx->bkpyx", weights.expand(-1, -1, -1, grid, grid), blocks)
        h = self._run(self.head, self.head_in(h).repeat_interleave(k, dim=0), self.style_in(style))
        sample = F.pixel_shuffle(self.head_out(h), self.config.patch_size)
        sample = sample + F.pixel_shuffle(linear.flatten(0, 1), self.spatial_compression_ratio)
        sample = sample.reshape(batch, k, *regions.shape[2:]) * foreground.sigmoid()
        output = DisentangledDecoderOutput(sample=sample, regions=regions, foreground=foreground[:, 0])
        return output if return_dict else (output.sample, output.regions, output.foreground)

    def forward(
        self, images: torch.Tensor, present: torch.Tensor | None = None, return_dict: bool = True
    ) -> DisentangledDecoderOutput | tuple:
        """Rebuilds every modality and the mask from the posterior modes; shapes as in `encode` and `decode`."""
        structure, style = (posterior.mode() for posterior in self.encode(images, present, return_dict=False))
        return self.decode(structure, style, return_dict)

    def normalize_structure(self, z: torch.Tensor) -> torch.Tensor:
        """Structure (B, c_s, h, w) to the scale of the diffusion model: zero mean and unit standard deviation a channel."""
        shift, scale = self._scales("structure", z)
        return (z - shift[:, None, None]) / scale[:, None, None]

    def denormalize_structure(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize_structure`."""
        shift, scale = self._scales("structure", z)
        return z * scale[:, None, None] + shift[:, None, None]

    def normalize_style(self, z: torch.Tensor) -> torch.Tensor:
        """Styles (..., c_t) to the scale of the diffusion model."""
        shift, scale = self._scales("style", z)
        return (z - shift) / scale

    def denormalize_style(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize_style`."""
        shift, scale = self._scales("style", z)
        return z * scale + shift

    def _scales(self, latent: str, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels = self.config[f"{latent}_channels"]
        shift = self.config[f"{latent}_shift"] or [0.0] * channels
        scale = self.config[f"{latent}_scale"] or [1.0] * channels
        return z.new_tensor(shift), z.new_tensor(scale)
