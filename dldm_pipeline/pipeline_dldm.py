"""Generates synthetic subjects: aligned images of every modality, with the tumour mask, from noise alone.

Source: Na et al., "Generation of Multi-modal Brain Tumor MRIs with Disentangled Latent Diffusion Model", MIDL 2023. The paper
fixes z_struct while z_style varies and does not say how; here the structure is sampled once and every style is then sampled
given the clean structure (docs/method.md compares this with the other ways). This file imports torch, diffusers and its
sibling only: it is also published as remote code.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

# Relative, because the siblings lie side by side as remote code and no package is there.
from .pipeline_utils import DLDMPipelineOutput, PipelineMixin, check_components, check_scheduler, default_batch_size


class DLDMPipeline(PipelineMixin, DiffusionPipeline):
    r"""
    Pipeline that generates subjects whose modalities share one anatomy, with their tumour masks.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Notation: S subjects, n modalities known, M modalities asked for. The denoiser's class labels are m for the pair
    (z_struct, z_style_m) with both noised, n for its null; (n + 1) + m for z_style_m noised beside the clean z_struct
    averaged to a coarse grid, 2n + 1 for its null. A style is noised as a vector, shown to the denoiser as a flat map, and
    read back as its mean.

    Parameters:
        autoencoder ([`DisentangledAutoencoder`]):
            Decodes (z_struct, z_style) into an image and z_struct into the mask; holds the names of the modalities and
            the scales of the latents.
        unet ([`UNet2DModel`]):
            Denoises the latents; `in_channels = out_channels = c_s + c_t`, `num_class_embeds = 2 * (n + 1)`.
        scheduler ([`SchedulerMixin`]):
            Any of diffusers for a beta schedule with noise from a generator; take it `from_config` of the pipeline's own.
        style_grid (`int`, *optional*):
            Styles are sampled beside the structure averaged to this height and width, as the `unet` was trained to; `None`
            is the structure as it is.

    Raises:
        ValueError: if the `unet` does not fit the `autoencoder`, or on a scheduler or a `style_grid` that cannot work.
    """

    model_cpu_offload_seq = "unet->autoencoder"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, autoencoder: ModelMixin, unet: UNet2DModel, scheduler: SchedulerMixin, style_grid: int | None = None
    ):
        super().__init__()
        check_components(autoencoder, unet, style_grid)
        check_scheduler(scheduler)
        self.register_modules(autoencoder=autoencoder, unet=unet, scheduler=scheduler)
        self.register_to_config(style_grid=style_grid)
        unet.to(memory_format=torch.channels_last)  # the layout in which its convolutions work
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        """The guidance of the call that runs; a callback changes it for the steps to come by setting `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps up to the end of the phase that runs, as a callback's `step` counts them."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        num_subjects: int = 1,
        modalities: str | Sequence[str] | None = None,
        num_inference_steps: int = 10,
        num_style_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        noise_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        structure: torch.Tensor | None = None,
        styles: torch.Tensor | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DLDMPipeline", int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DLDMPipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation.

        A seed fixes a subject: its structure and its image in one modality do not depend, to 1e-4 on one machine, on the
        other modalities wanted, their order, the number of subjects, `batch_size`, or the output type. (Foreground and mask
        are thresholds: a pixel at their rim can change sides.)

        Args:
            num_subjects (`int`, *optional*, defaults to 1):
                The number S of subjects.
            modalities (`str` or `list[str]`, *optional*):
                The modalities wanted, in the order wanted; all of the autoencoder's by default.
            num_inference_steps (`int`, *optional*, defaults to 10):
                Denoising steps of the structure. With few, subjects look the most real and are more alike than real ones;
                with 50 they are as varied (`examples/evaluate.py` prints the curve).
            num_style_inference_steps (`int`, *optional*, defaults to 5):
                Denoising steps of the styles. Of UniPC, five draw styles as varied as encoded ones; DDIM needs more.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Classifier-free guidance towards the modality, at least 1; above 1 it is on and doubles the time.
            eta (`float`, *optional*, defaults to 0.0):
                The noise of a DDIM step, from 0 (deterministic) to below 1, where a schedule with zero terminal SNR gives
                NaN. Ignored by schedulers that do not take it.
            noise_scale (`float`, *optional*, defaults to 1.0):
                The noise of the images as a fraction of the training images' (the autoencoder's `noise_level`).
            generator (`torch.Generator` or a list of them, *optional*):
                One, or one a subject. Each subject in turn takes 2n + 1 integers from its generator: the seeds of its
                structure, of its style in each modality, and of their noise.
            structure (`torch.Tensor`, *optional*):
                (S or 1, c_s, h, w), anatomies to render instead of new ones: an output's `structure`, or encoded ones.
            styles (`torch.Tensor`, *optional*):
                (S or 1, M, c_t), appearances to use instead of new ones, in the order of `modalities`.
            batch_size (`int`, *optional*):
                Subjects that the denoiser sees at a time, by default 32 on a CPU and 256 on other devices: a trade of memory
                for time. It gets `batch_size * M` rows in the styles' steps; a quarter of the subjects are decoded at a time.
            output_type (`str`, *optional*, defaults to `"pil"`):
                "pil", "np", "pt", or "latent" for no decoding (`images` and `masks` are then `None`).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`DLDMPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, {"latents": ...})` after each step, of all S subjects whatever
                the `batch_size`; `step` counts on from the structure's steps to the styles'. The latents are (S, c_s + c_t,
                h, w), then (S * M, c_s + c_t, g, g) with g = `style_grid`; those in the dictionary it returns replace them.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What the callback is given.

        Examples:

        ```py
        >>> import torch
        >>> from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline

        >>> pipe = DLDMPipeline.from_pretrained(BUNDLED_CHECKPOINT)
        >>> output = pipe(num_subjects=8, generator=torch.Generator().manual_seed(0))
        >>> output.by_modality["T2"][0].save("t2.png")
        >>> output.masks[0].save("mask.png")

        >>> # the same eight anatomies as another scanner would show them
        >>> again = pipe(num_subjects=8, structure=output.structure)
        ```

        Returns:
            [`DLDMPipelineOutput`] or `tuple`:
                If `return_dict` is `True`, [`DLDMPipelineOutput`] is returned, otherwise the tuple
                `(images, masks, structure, styles, modalities, labels)`.

        Raises:
            ValueError: on an argument that does not fit, named in the message.
        """
        # 1. Check the inputs
        known = list(self.autoencoder.config.modalities)
        names = known if modalities is None else [modalities] if isinstance(modalities, str) else list(modalities)
        self.check_inputs(
            num_subjects=num_subjects,
            modalities=names,
            num_inference_steps=num_inference_steps,
            num_style_inference_steps=num_style_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            noise_scale=noise_scale,
            generator=generator,
            structure=structure,
            styles=styles,
            batch_size=batch_size,
            output_type=output_type,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )

        # 2. Prepare the seeds and what both phases of sampling share
        wanted = [known.index(name) for name in names]
        seeds = self._draw_seeds(num_subjects, generator)
        self._guidance_scale = guidance_scale
        self._num_timesteps = 0
        options = dict(
            batch_size=batch_size,
            eta=eta,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )

        # 3. Sample the structures, which do not depend on the modalities wanted
        if structure is None:
            structure = self._draw_structures(num_subjects, num_inference_steps, seeds=seeds, **options)
        structure = structure.to(self._execution_device, torch.float32).expand(num_subjects, -1, -1, -1)

        # 4. Sample the style of each modality given the clean structure
        if styles is None:
            options["first_step"] = self.num_timesteps
            styles = self._draw_styles(structure, wanted, seeds, num_style_inference_steps, **options)

        # 5. Decode, and offload all models
        output = self._decode(structure, styles, names, seeds, noise_scale, output_type, batch_size)
        self.maybe_free_model_hooks()
        return output if return_dict else tuple(vars(output).values())

    def _batch_size(self, batch_size: int | None) -> int:
        return batch_size or default_batch_size(self._execution_device)

    def _draw_seeds(
        self, num_subjects: int, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> list[list[int]]:
        # One for the structure and two for each modality (style, noise), wanted or not, so that none depends on another.
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_subjects
        shape = (1 + 2 * len(self.autoencoder.config.modalities),)
        return [torch.randint(2**63 - 1, shape, generator=g, device=g and g.device).tolist() for g in generators]

    @torch.no_grad()
    def _draw_structures(
        self,
        num_subjects: int,
        num_inference_steps: int,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        start: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        strength: float = 1.0,
        batch_size: int | None = None,
        seeds: list[list[int]] | None = None,
        **options,
    ) -> torch.Tensor:
        """Samples structures alone, for `__call__` and for the training of the decoder.

        A new structure is one half of a pair under label 0. With `start`, given pairs are noised and denoised under their
        own labels, as in image-to-image pipelines: only the last `strength * num_inference_steps` steps are run, and the
        noise is that of the first of them. (LMS and PNDM schedulers start wrongly there, in diffusers' own pipelines too.)

        Args:
            num_subjects: S.
            generator, batch_size: as in `__call__`; `seeds` from `_draw_seeds` replace the generator.
            start: structures (S, c_s, h, w), a style (S, c_t) of each, both on the autoencoder's scale, and its modality (S,).
            strength: in (0, 1], used with `start` only; small values return nearly the given structures, and 1 ignores them
                on a schedule with zero terminal SNR.
            options: `eta`, `callback` and `callback_inputs` of `_denoise`. The guidance is that of the last call, 1 at first.

        Returns:
            (S, c_s, h, w) float32, on the autoencoder's scale.
        """
        config, grid = self.autoencoder.config, (self.autoencoder.latent_size,) * 2
        options |= {"strength": strength, "batch_size": batch_size}
        modality = torch.zeros(num_subjects, dtype=torch.long)
        if start is not None:
            structure, style, modality = start
            structure = self.autoencoder.normalize_structure(structure.float()).flatten(1)
            options["start"] = torch.cat([structure, self.autoencoder.normalize_style(style.float())], dim=1)
        seeds = seeds or self._draw_seeds(num_subjects, generator)
        generators = [torch.Generator().manual_seed(seed[0]) for seed in seeds]
        noise = self._draw_noise(generators, config.structure_channels * grid[0] * grid[1] + config.style_channels)
        state = self._denoise(modality, noise, generators, num_inference_steps, **options)
        structure = state[:, : -config.style_channels].unflatten(1, (config.structure_channels, *grid))
        return self.autoencoder.denormalize_structure(structure)

    def _draw_styles(
        self, structure: torch.Tensor, wanted: list[int], seeds: list[list[int]], num_inference_steps: int, **options
    ) -> torch.Tensor:
        """Samples the styles (S, M, c_t) of the modalities `wanted` given structures (S, c_s, h, w), both on the
        autoencoder's scale; `options` go to `_denoise`."""
        config, subjects = self.autoencoder.config, len(structure)
        n, channels = len(config.modalities), config.style_channels
        z_struct = self.autoencoder.normalize_structure(structure)
        if self.config.style_grid:
            z_struct = F.adaptive_avg_pool2d(z_struct, self.config.style_grid)
        # The noise of all modalities, wanted or not, because it is related as the styles of one subject are.
        generators = [torch.Generator().manual_seed(seed) for one in seeds for seed in one[1 : n + 1]]
        noise = self._draw_noise(generators, channels).view(subjects, n * channels)
        if config.get("style_relation") is not None:
            noise = noise @ torch.linalg.cholesky(torch.tensor(config.style_relation)).T.to(noise)
        noise = noise.view(subjects, n, channels)[:, wanted].flatten(0, 1)
        generators = [generators[s * n + m] for s in range(subjects) for m in wanted]
        modality = torch.tensor(wanted * subjects)
        state = self._denoise(modality, noise, generators, num_inference_steps, z_struct=z_struct, **options)
        return self.autoencoder.denormalize_style(state.unflatten(0, (subjects, len(wanted))))

    def _draw_noise(self, generators: list[torch.Generator], numbers: int) -> torch.Tensor:
        shape = (len(generators), numbers)
        return randn_tensor(shape, generators, self._execution_device, torch.float32)

    def _denoise(
        self,
        modality: torch.Tensor,
        noise: torch.Tensor,
        generators: list[torch.Generator],
        num_inference_steps: int,
        batch_size: int | None = None,
        z_struct: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        strength: float = 1.0,
        eta: float = 0.0,
        first_step: int = 0,
        callback: Callable | None = None,
        callback_inputs: Sequence[str] = (),
    ) -> torch.Tensor:
        """Samples R pairs (z_struct, z_style), or R = S * M styles given S clean `z_struct`.

        Args:
            modality: (R,) indices, those of a subject side by side.
            noise: of R rows as they are returned; `generators` are R for the noise of further steps.
            z_struct: (S, c_s, g, g), normalised, or `None`.
            start: clean rows as they are returned, to begin from with the noise that `strength` says; `None` for pure noise.

        Returns:
            Structure and style of each row, flat and normalised: (R, c_s * h * w + c_t), or (R, c_t) with `z_struct`.
        """
        device, config, grid = self._execution_device, self.autoencoder.config, self.autoencoder.latent_size
        sampled, first_label, rows = config.structure_channels, 0, self._batch_size(batch_size)
        if z_struct is not None:
            count, grid = len(noise) // len(z_struct), z_struct.shape[-1]
            sampled, first_label, rows = 0, len(config.modalities) + 1, rows * count
            z_struct = z_struct.repeat_interleave(count, dim=0)
        labels = modality.to(device) + first_label
        null_labels = torch.full_like(labels, first_label + len(config.modalities))

        # Schedulers work number by number. In a flat state a style is c_t numbers, and gets one noise even from those
        # schedulers that add noise at each step.
        def to_map(state):
            structure, style = state.split([sampled * grid**2, config.style_channels], dim=1)
            structure = structure.unflatten(1, (sampled, grid, grid)) if z_struct is None else z_struct
            return torch.cat([structure, style[:, :, None, None].expand(-1, -1, grid, grid)], dim=1)

        def to_state(latents):
            style = latents[:, config.structure_channels :].mean(dim=(2, 3))
            return torch.cat([latents[:, :sampled].flatten(1), style], dim=1)

        def predict(latents, t, labels):
            latents = latents.to(self.unet.dtype, memory_format=torch.channels_last)
            batches = zip(latents.split(rows), labels.split(rows), strict=True)
            return torch.cat([to_state(self.unet(x, t, class_labels=y).sample.float()) for x, y in batches])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        if start is None:
            state = noise * self.scheduler.init_noise_sigma
        else:
            skipped = (num_inference_steps - max(round(strength * num_inference_steps), 1)) * self.scheduler.order
            timesteps = timesteps[skipped:]
            state = self.scheduler.add_noise(start.to(device), noise, timesteps[:1].expand(len(noise)))

        accepted = inspect.signature(self.scheduler.step).parameters
        step_options = {k: v for k, v in (("eta", eta), ("generator", generators)) if k in accepted}
        self._num_timesteps = first_step + len(timesteps)
        progress_bar = self.progress_bar(timesteps)
        progress_bar.set_description("structure" if z_struct is None else "styles")
        for i, t in enumerate(progress_bar):
            latents = to_map(self.scheduler.scale_model_input(state, t))
            prediction = predict(latents, t, labels)
            if self.guidance_scale > 1:
                unguided = predict(latents, t, null_labels)
                prediction = unguided + self.guidance_scale * (prediction - unguided)
            state = self.scheduler.step(prediction, t, state, **step_options, return_dict=False)[0]
            if callback is not None:
                latents = to_map(state)
                given = {"latents": latents} if "latents" in callback_inputs else {}
                returned = (callback(self, first_step + i, t, given) or {}).get("latents", latents)
                state = state if returned is latents else to_state(returned)
        return state

    def _decode(
        self,
        structure: torch.Tensor,
        styles: torch.Tensor,
        names: list[str],
        seeds: list[list[int]],
        noise_scale: float,
        output_type: str,
        batch_size: int | None,
    ) -> DLDMPipelineOutput:
        """Decodes each subject's structure with its styles (S or 1, M, c_t), of the modalities `names`, and adds the noise."""
        styles = styles.to(structure).expand(len(structure), -1, -1)
        if output_type == "latent":
            return DLDMPipelineOutput(None, None, structure, styles, names)
        config, dtype = self.autoencoder.config, self.autoencoder.dtype
        size = max(1, self._batch_size(batch_size) // 4)  # at full size, memory is another matter
        wanted = [config.modalities.index(name) for name in names]
        images, masks, labels = [], [], []
        for first in range(0, len(seeds), size):
            part = slice(first, first + size)
            decoded = self.autoencoder.decode(structure[part].to(dtype), styles[part].to(dtype))
            image, foreground = decoded.sample.float(), decoded.foreground > 0
            if not image.isfinite().all():  # NaN would pass for background
                raise ValueError("The images are not finite numbers: the weights, `structure` or `styles` hold NaN.")
            if noise_scale and config.noise_level is not None:
                noise_seeds = [seed[1 + len(config.modalities) + m] for seed in seeds[part] for m in wanted]
                generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
                noise = randn_tensor((len(generators), *image.shape[2:]), generators, image.device, torch.float32)
                level = noise_scale * torch.tensor([config.noise_level[m] for m in wanted], device=image.device)
                image = image + level[:, None, None] * noise.view_as(image)
            images.append(torch.where(foreground[:, None], image, 0).clamp(0, 1))
            masks.append((decoded.mask > 0) & foreground)
            labels.append(decoded.labels)
        images, masks = torch.cat(images), torch.cat(masks)
        labels = None if labels[0] is None else torch.cat(labels)
        if output_type != "pt":
            images, masks = images.cpu().numpy(), masks.cpu().numpy()
            labels = None if labels is None else labels.cpu().numpy()
        if output_type == "pil":
            grey = (images * 255).round().astype(np.uint8)
            images = [[PIL.Image.fromarray(image) for image in subject] for subject in grey]
            masks = [PIL.Image.fromarray(mask) for mask in masks.astype(np.uint8) * 255]
            labels = None if labels is None else [PIL.Image.fromarray(label) for label in labels]
        return DLDMPipelineOutput(images, masks, structure, styles, names, labels)
