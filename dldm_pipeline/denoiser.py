"""Denoiser, noise schedule and training times, as the training scripts of latent diffusion build them."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, UNet2DModel, UniPCMultistepScheduler


def make_scheduler() -> DDIMScheduler:
    """Noise schedule of training: v-prediction, no signal left at the last step.

    The cosine schedule (Nichol & Dhariwal 2021) spends its time where these latents need it: edges are decided at a
    signal-to-noise ratio of 10 to 500, which Stable Diffusion's schedule passes in a tenth of its steps.
    """
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def make_sampler() -> UniPCMultistepScheduler:
    """Sampler of a trained pipeline: UniPC (Zhao et al. 2023) on the noise schedule of training.

    In five steps its styles are as varied as encoded ones (`benchmarks/samplers.py --styles_only`).
    """
    return UniPCMultistepScheduler.from_config(make_scheduler().config)


def make_unet(
    channels: int,
    latent_size: int,
    num_labels: int,
    block_out_channels: Sequence[int],
    layers_per_block: int,
    attention_sizes: Sequence[int],
    attention_head_dim: int,
    norm_num_groups: int | None = None,
    dropout: float = 0.0,
) -> UNet2DModel:
    """A class-conditioned denoiser.

    Args:
        channels: of the latents, in and out.
        latent_size: height and width of the latents.
        num_labels: number of class labels.
        block_out_channels: width of each level, the first of the latents' size, each other one of half the size.
        layers_per_block: residual blocks on each level.
        attention_sizes: sizes of the levels with attention; the last level has one more.
        attention_head_dim: channels of one attention head.
        norm_num_groups: of group norms; by default 32, 16 or 8, the largest that divides all widths.
        dropout: in residual blocks.

    Raises:
        ValueError: widths, groups and heads do not divide, or the latents cannot be halved often enough.
    """
    if latent_size % 2 ** (len(block_out_channels) - 1):
        raise ValueError(
            f"block_out_channels: {len(block_out_channels)} levels, but the latents' size of {latent_size} cannot be halved "
            "that often; give fewer"
        )
    groups = norm_num_groups or max(g for g in (8, 16, 32) if g == 8 or all(w % g == 0 for w in block_out_channels))
    attention = [latent_size // 2**level in attention_sizes for level in range(len(block_out_channels))]
    for width, attends in zip(block_out_channels, [*attention[:-1], True], strict=True):
        if width < 1 or width % groups:
            raise ValueError(f"block_out_channels: a width of {width} does not divide by {groups}")
        if attends and width % attention_head_dim:
            raise ValueError(f"attention_head_dim: {attention_head_dim} does not divide a width of {width}")
    return UNet2DModel(
        sample_size=latent_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        attention_head_dim=attention_head_dim,
        norm_num_groups=groups,
        dropout=dropout,
        num_class_embeds=num_labels,
    )


def stratified_timesteps(
    size: int, num_train_timesteps: int, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random timesteps (size,) int64, one in each of `size` equal parts of the schedule: the loss varies less."""
    strata = torch.randperm(size, generator=generator, device=device)
    times = strata + torch.rand(size, generator=generator, device=device)
    return (times / size * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
