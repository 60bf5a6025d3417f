"""A plain latent diffusion model of single modalities: what remains of DLDM without its disentanglement.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022). An autoencoder with a
weak KL term makes a latent of one image of whatever modality, and a denoiser, told the modality by a label, draws such
latents. A subject is the same starting noise under each label; nothing else ties its modalities together.

Noise schedule, prediction type and sampler are those of DLDM, so that the comparison is about the latents.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from baseline_utils import subject_generators
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from dldm_pipeline.denoiser import make_scheduler, make_unet, stratified_timesteps
from dldm_pipeline.modalities import check_modalities

NORM_GROUPS = 8


class PlainLDM(ModelMixin, ConfigMixin):
    """Autoencoder and denoiser, with what is needed to sample subjects.

    Args:
        modalities: names, in the order of the labels.
        sample_size: image height and width, pixels.
        patch_size: side in pixels of the patches that become channels, which saves most of the work at full size.
        autoencoder_channels: width of each grid; the first has sample_size / patch_size, each other one half.
        autoencoder_layers: residual blocks on each grid of the encoder; the decoder has one more.
        latent_channels: of the latent, whose grid is the autoencoder's last.
        block_out_channels, layers_per_block: width of, and residual blocks on, each grid of the denoiser.
        attention_sizes: grids of the denoiser with attention; the coarsest has one more.
        attention_head_dim: channels of one attention head.
        latents_mean, latents_std: of each latent channel over the training set; `None` until it is measured.

    Raises:
        ValueError: sizes cannot be halved that often, or widths do not divide.
    """

    @register_to_config
    def __init__(
        self,
        modalities: Sequence[str] = ("T1", "T2", "FLAIR", "WB", "BB"),
        sample_size: int = 64,
        patch_size: int = 2,
        autoencoder_channels: Sequence[int] = (32, 64, 96),
        autoencoder_layers: int = 1,
        latent_channels: int = 8,
        block_out_channels: Sequence[int] = (96, 128, 128),
        layers_per_block: int = 1,
        attention_sizes: Sequence[int] = (8, 4),
        attention_head_dim: int = 32,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        super().__init__()
        check_modalities(modalities)
        shrink = patch_size * 2 ** (len(autoencoder_channels) - 1)
        if sample_size % shrink:
            given = f"autoencoder_channels has {len(autoencoder_channels)} levels and patch_size is {patch_size}"
            raise ValueError(f"{given}: a sample_size of {sample_size} cannot be divided by {shrink}")
        self.latent_size = sample_size // shrink
        for width in autoencoder_channels:
            if width < 1 or width % NORM_GROUPS:
                raise ValueError(f"autoencoder_channels has a width of {width}; it must divide by {NORM_GROUPS}")
        depth = len(autoencoder_channels)
        self.autoencoder = AutoencoderKL(
            in_channels=patch_size**2,
            out_channels=patch_size**2,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=tuple(autoencoder_channels),
            layers_per_block=autoencoder_layers,
            latent_channels=latent_channels,
            norm_num_groups=NORM_GROUPS,
            sample_size=sample_size // patch_size,
            mid_block_add_attention=False,
        )
        widths, attention = (block_out_channels, layers_per_block), (attention_sizes, attention_head_dim)
        self.unet = make_unet(latent_channels, self.latent_size, len(modalities), *widths, *attention, NORM_GROUPS)

    def encode(self, images: torch.Tensor) -> DiagonalGaussianDistribution:
        """Images (B, 1, H, W) in [0, 1] to the posterior of their latents (B, latent_channels, h, w)."""
        patches = F.pixel_unshuffle(images * 2 - 1, self.config.patch_size)
        return self.autoencoder.encode(patches.contiguous(memory_format=torch.channels_last)).latent_dist

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, latent_channels, h, w) to images (B, 1, H, W), about 0 to 1."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.autoencoder.decode(latents).sample, self.config.patch_size) / 2 + 0.5

    def _shift_and_scale(self) -> list[torch.Tensor]:
        if self.config.latents_std is None:
            raise ValueError("latents_std is None: this model was not trained to its end; run train_plain_ldm.py again")
        numbers = self.config.latents_mean, self.config.latents_std
        return [torch.tensor(values, device=self.device, dtype=self.dtype)[:, None, None] for values in numbers]

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder gives them to mean 0 and deviation 1, channel by channel."""
        mean, std = self._shift_and_scale()
        return (latents - mean) / std

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`."""
        mean, std = self._shift_and_scale()
        return latents * std + mean

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The velocity of noisy, normalised latents (B, latent_channels, h, w) at times (B,) under labels (B,)."""
        return self.unet(latents.contiguous(memory_format=torch.channels_last), timesteps, class_labels=labels).sample

    @torch.no_grad()
    def sample(
        self,
        num_subjects: int,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int = 32,
        num_inference_steps: int = 20,
    ) -> torch.Tensor:
        """Draw subjects.

        Args:
            num_subjects: S, one or more.
            generator: CPU generator, or one for each subject. A seed fixes the subjects.
            batch_size: subjects at once; only memory and time depend on it.
            num_inference_steps: denoising steps.

        Returns:
            (S, n, H, W) float32 in [0, 1] on the CPU.

        Raises:
            ValueError: a number below 1, another number of generators, or a model that was not trained to its end.
        """
        generators = subject_generators(num_subjects, generator, batch_size)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; give 1 or more")
        n, scheduler = len(self.config.modalities), make_scheduler()
        results = []
        for start in range(0, num_subjects, batch_size):
            part = generators[start : start + batch_size]
            shape = (len(part), self.config.latent_channels, self.latent_size, self.latent_size)
            latents = randn_tensor(shape, part, self.device, self.dtype).repeat_interleave(n, 0)
            labels = torch.arange(n, device=self.device).repeat(len(part))
            scheduler.set_timesteps(num_inference_steps)
            for t in scheduler.timesteps:
                velocity = self(latents, t.to(self.device).expand(len(latents)), labels)
                latents = scheduler.step(velocity, t, latents).prev_sample
            images = torch.cat([self.decode(part) for part in self.denormalize(latents).split(32)])
            results.append(images[:, 0].unflatten(0, (-1, n)).clamp(0, 1).float().cpu())
        return torch.cat(results)


def diffusion_loss(
    model: torch.nn.Module,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean squared error of the velocity that a `PlainLDM` predicts, a scalar.

    `latents` (B, latent_channels, h, w) are normalised, `labels` (B,) say which modality, `generator` draws times and noise.
    """
    device = latents.device
    times = stratified_timesteps(len(latents), scheduler.config.num_train_timesteps, device, generator)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    velocity = model(scheduler.add_noise(latents, noise, times), times, labels)
    return F.mse_loss(velocity.float(), scheduler.get_velocity(latents, noise, times))
