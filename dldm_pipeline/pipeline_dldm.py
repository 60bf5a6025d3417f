"""Draws synthetic subjects: aligned images of every modality, with the tumour mask, from noise alone.

Source: Na et al., "Generation of Multi-modal Brain Tumor MRIs with Disentangled Latent Diffusion Model", MIDL 2023. The paper
fixes z_struct while z_style varies and does not say how; here the structure is drawn once and every style is then drawn
given the clean structure (`benchmarks/structure_ways.py` compares this with the other ways). This file imports torch and
diffusers only: it is also published as remote code.
"""

import copy
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# The modules that a saved pipeline carries with it.
PIPELINE_MODULES = {"DLDMPipeline": "pipeline_dldm", "DLDMTranslationPipeline": "pipeline_dldm_translation"}
AUTOENCODER_MODULE = "autoencoder_disentangled"


@dataclass
class DLDMPipelineOutput(BaseOutput):
    """What [`DLDMPipeline`] returns: S subjects in M modalities.

    Args:
        images (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`):
            (S, M, H, W) float32 in [0, 1] for `output_type` "np" and "pt"; for "pil" one list a subject of M 8-bit grey
            images; `None` for "latent".
        masks (`np.ndarray`, `torch.Tensor` or `list[PIL.Image.Image]`):
            The tumour masks: (S, H, W) bool for "np" and "pt"; for "pil" S grey images of 0 and 255; `None` for "latent".
        structure (`torch.Tensor`):
            (S, c_s, h, w), the anatomies in the autoencoder's own scale; give it back as `structure=`.
        styles (`torch.Tensor`):
            (S, M, c_t), the appearances in the autoencoder's own scale; give it back as `styles=`.
        modalities (`list[str]`): the M names.
    """

    images: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]] | None
    masks: np.ndarray | torch.Tensor | list[PIL.Image.Image] | None
    structure: torch.Tensor
    styles: torch.Tensor
    modalities: list[str]

    @property
    def by_modality(self) -> dict[str, np.ndarray | torch.Tensor | list[PIL.Image.Image]]:
        """The images by modality name: (S, H, W), or a list of S PIL images.

        Raises:
            ValueError: if there are no images (`output_type="latent"`).
        """
        if self.images is None:
            raise ValueError("There are no images: the pipeline was called with `output_type='latent'`.")
        if isinstance(self.images, list):
            return {name: [subject[m] for subject in self.images] for m, name in enumerate(self.modalities)}
        return {name: self.images[:, m] for m, name in enumerate(self.modalities)}


class DLDMPipeline(DiffusionPipeline):
    r"""
    Pipeline that generates subjects whose modalities share one anatomy, with their tumour masks.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Notation: S subjects, n modalities known, M modalities asked for. The denoiser's class labels are m for the pair
    (z_struct, z_style_m) with both noised, n for its null; (n + 1) + m for z_style_m noised beside the clean z_struct,
    2n + 1 for its null. A style is noised as a vector, shown to the denoiser as a flat map, and read back as the
    mean over the map.

    Parameters:
        autoencoder ([`DisentangledAutoencoder`]):
            Decodes (z_struct, z_style) into an image and z_struct into the mask; holds the names of the modalities and
            the scales of the latents.
        unet ([`UNet2DModel`]):
            Denoises the latents; `in_channels = out_channels = c_s + c_t`, `num_class_embeds = 2 * (n + 1)`.
        scheduler ([`SchedulerMixin`]):
            Any scheduler of diffusers for denoisers trained on a beta schedule that draws its noise from a generator;
            take it `from_config` of the one that came with the pipeline.

    Raises:
        ValueError: if the `unet` does not fit the `autoencoder`, or on a scheduler that cannot work.
    """

    model_cpu_offload_seq = "unet->autoencoder"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, autoencoder: ModelMixin, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        n, grid = len(autoencoder.config.modalities), autoencoder.latent_size
        channels = autoencoder.config.structure_channels + autoencoder.config.style_channels
        size = unet.config.sample_size
        for name, value, expected in (
            ("in_channels", unet.config.in_channels, channels),
            ("out_channels", unet.config.out_channels, channels),
            ("num_class_embeds", unet.config.num_class_embeds, 2 * (n + 1)),
            ("sample_size", tuple(size) if isinstance(size, (list, tuple)) else (size, size), (grid, grid)),
        ):
            if value != expected:
                raise ValueError(
                    f"The unet does not fit the autoencoder: its `{name}` is {value} and must be {expected} for an "
                    f"autoencoder of {n} modalities, {channels} latent channels and a {grid}x{grid} latent grid."
                )
        check_scheduler(scheduler)
        self.register_modules(autoencoder=autoencoder, unet=unet, scheduler=scheduler)
        self._guidance_scale = 1.0
        self._num_timesteps = 0

        # Weights loaded from safetensors are mapped from the file and start at any byte; the CPU kernels then take other
        # paths and round differently than with the weights that were saved (measured). A copy is aligned.
        for module in (autoencoder, unet):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                    tensor.data = tensor.data.clone()

    @property
    def guidance_scale(self) -> float:
        """The guidance of the call that runs; a callback changes it for the steps to come by setting `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps up to the end of the phase that runs, as a callback's `step` counts them."""
        return self._num_timesteps

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DLDMPipeline":
        """Loads a pipeline from a folder or from the Hub, with the classes of this package: no code of the repository is run.

        Without this package installed, type `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)`, with
        `custom_pipeline=repo` or without it; diffusers then runs the modules that `save_pretrained` puts beside the weights.

        Args:
            pretrained_model_name_or_path: a folder, or a repository such as "owner/name".
            kwargs: as in [`DiffusionPipeline.from_pretrained`]; weights are read from safetensors only.

        Raises:
            ValueError: if it is neither a folder that is there nor a name that a repository can have, if there are no
                safetensors but, say, a pickle, if the list of modalities is malformed, or if there are classes of unknown
                modules, which only `trust_remote_code=True` runs.
            RepositoryNotFoundError: if the Hub has no such repository, or it is private and the token is missing.
        """
        # diffusers takes what is no folder for the name of a repository, and then it must be a string.
        name = os.fspath(pretrained_model_name_or_path)
        return super().from_pretrained(name, **{**kwargs, "use_safetensors": True})

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Downloads a pipeline from the Hub into the cache and returns its folder.

        diffusers' own `download` looks for the components' classes inside diffusers and fails on ours.

        Args:
            pretrained_model_name: a repository such as "owner/name".
            kwargs: `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`; others are ignored.
        """
        known = ("revision", "cache_dir", "token", "force_download", "local_files_only")
        options = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=["*.json", "*.safetensors", "*.py"], **options)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> dict[str, Any] | tuple:
        """Reads `model_index.json`, with this package's classes in place of the modules beside the weights.

        Raises:
            ValueError: on a folder that `from_pretrained` refuses.
        """
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if index.get("_class_name") in [[module, name] for name, module in PIPELINE_MODULES.items()]:
            index["_class_name"] = cls.__name__
        if index.get("autoencoder", [None])[0] == AUTOENCODER_MODULE:
            index["autoencoder"][0] = f"{__package__}.{AUTOENCODER_MODULE}"

        folder = Path(pretrained_model_name_or_path)
        for name in ("autoencoder", "unet"):
            if (folder / name).is_dir() and not any((folder / name).glob("*.safetensors")):
                raise ValueError(
                    f"{folder / name} has no .safetensors weights. Pickle files (.bin, .pt, .ckpt) are not loaded, as "
                    "reading one can run code; save the model again with `safe_serialization=True`."
                )
        config = folder / "autoencoder" / "config.json"
        if config.is_file():
            names = super().load_config(config).get("modalities")
            is_names = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
            if not is_names or not names or len(set(names)) < len(names):
                raise ValueError(f"{config}: `modalities` must be a list of different, non-empty names, got {names!r}.")
        return loaded

    def save_config(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes `model_index.json` and the modules beside the weights; `save_pretrained` calls it, `push_to_hub` too."""
        super().save_config(save_directory, **kwargs)
        add_modules(save_directory)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DLDMPipeline":
        """Makes a pipeline of this class from the components of another, without a copy of them.

        diffusers' own `from_pipe` takes a component only if it is exactly of the annotated class, which as remote code has
        no fixed module; components that are passed, it takes.

        Args:
            pipeline: a [`DLDMPipeline`] or [`DLDMTranslationPipeline`].
            kwargs: components to use in place of the other pipeline's, and `dtype`, by default `torch.float32`: as the two
                share them, the other pipeline's components get it, too.
        """
        return super().from_pipe(pipeline, **{**pipeline.components, **kwargs})

    @torch.no_grad()
    def __call__(
        self,
        num_subjects: int = 1,
        modalities: str | Sequence[str] | None = None,
        num_inference_steps: int = 10,
        num_style_inference_steps: int = 10,
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

        A seed fixes a subject: its structure and its image in one modality do not depend on the other modalities asked for,
        their order, the number of subjects, `batch_size`, or the output type. (To 1e-4, on one machine and for one number of
        steps; at the rim of foreground or tumour a pixel within this of the threshold can change sides.)

        Args:
            num_subjects (`int`, *optional*, defaults to 1):
                The number S of subjects.
            modalities (`str` or `list[str]`, *optional*):
                The modalities wanted, in the order wanted; all of the autoencoder's by default.
            num_inference_steps (`int`, *optional*, defaults to 10):
                Denoising steps of the structure. Few draw subjects that look the most real and are more alike than real ones;
                50 draw them as varied (`examples/evaluate.py` prints the curve, and MS-SSIM for any number).
            num_style_inference_steps (`int`, *optional*, defaults to 10):
                Denoising steps of the styles.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Classifier-free guidance towards the modality, at least 1; above 1 it is on and doubles the time.
            eta (`float`, *optional*, defaults to 0.0):
                The noise of a DDIM step, from 0 (deterministic) to below 1: at 1 the first step of a schedule with zero
                terminal SNR is not a number. Ignored by schedulers that do not take it.
            noise_scale (`float`, *optional*, defaults to 1.0):
                How much of the scanner's noise the images get, of what the autoencoder measured in the training images
                (`noise_level` of its config); 0 for images without noise.
            generator (`torch.Generator` or a list of them, *optional*):
                One, or one a subject. Each subject takes 2n + 1 integers from its generator (subject after subject, where
                there is one generator): the seeds of its structure, of its style in each modality, and of their noise.
            structure (`torch.Tensor`, *optional*):
                (S or 1, c_s, h, w), anatomies to render instead of new ones, from an output's `structure` or the
                autoencoder's `encode`.
            styles (`torch.Tensor`, *optional*):
                (S or 1, M, c_t), appearances to use instead of new ones, in the order of `modalities`.
            batch_size (`int`, *optional*):
                Subjects that the networks see at a time, by default 8 on a CPU and 64 on other devices. It changes the time
                and the memory that a call takes, and the result by rounding only.
            output_type (`str`, *optional*, defaults to `"pil"`):
                "pil", "np", "pt", or "latent" for no decoding (`images` and `masks` are then `None`).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`DLDMPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, {"latents": ...})` after each step; `step` counts on from
                the structure's steps to the styles'. The latents are (S, c_s + c_t, h, w) in the structure's steps and
                (S * M, c_s + c_t, h, w) in the styles'; those in the dictionary it returns replace them.
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
                `(images, masks, structure, styles, modalities)`.

        Raises:
            ValueError: on an argument that does not fit, named in the message.
        """
        known = list(self.autoencoder.config.modalities)
        names = known if modalities is None else [modalities] if isinstance(modalities, str) else list(modalities)
        self.check_inputs(
            num_subjects,
            names,
            num_inference_steps,
            num_style_inference_steps,
            guidance_scale,
            eta,
            noise_scale,
            generator,
            structure,
            styles,
            batch_size,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        wanted = [known.index(name) for name in names]
        device = self._execution_device
        seeds = self._draw_seeds(num_subjects, generator)
        self._guidance_scale = guidance_scale
        self._num_timesteps = 0
        options = {
            "batch_size": batch_size,
            "eta": eta,
            "callback": callback_on_step_end,
            "callback_inputs": callback_on_step_end_tensor_inputs,
        }

        # 1. The structure, always as one half of a pair under label 0, so that it does not depend on what is asked for.
        steps_done = 0
        if structure is None:
            structure = self._draw_structures(num_subjects, num_inference_steps, seeds=seeds, **options)
            steps_done = self.num_timesteps
        structure = structure.to(device, torch.float32).expand(num_subjects, -1, -1, -1)

        # 2. The style of each modality given the clean structure.
        if styles is None:
            styles = self._draw_styles(
                structure, wanted, seeds, num_style_inference_steps, first_step=steps_done, **options
            )
        styles = styles.to(device, torch.float32).expand(num_subjects, *styles.shape[1:])

        # 3. The images and masks.
        images, masks = self._render(structure, styles, wanted, seeds, noise_scale, output_type, batch_size)

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, masks, structure, styles, names)
        return DLDMPipelineOutput(images=images, masks=masks, structure=structure, styles=styles, modalities=names)

    def check_inputs(
        self,
        num_subjects: int,
        modalities: list[str],
        num_inference_steps: int,
        num_style_inference_steps: int,
        guidance_scale: float,
        eta: float,
        noise_scale: float,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        structure: torch.Tensor | None,
        styles: torch.Tensor | None,
        batch_size: int | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises a `ValueError` that names the first argument of `__call__` that does not fit."""
        for name, value in (
            ("num_subjects", num_subjects),
            ("num_inference_steps", num_inference_steps),
            ("num_style_inference_steps", num_style_inference_steps),
            ("batch_size", 1 if batch_size is None else batch_size),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        known = list(self.autoencoder.config.modalities)
        unknown = [name for name in modalities if name not in known]
        if unknown:
            raise ValueError(f"`modalities` has {unknown}, which this model does not know; it knows {known}.")
        if not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(f"`modalities` must name at least one of {known} and none twice, got {modalities}.")
        if not guidance_scale >= 1:
            raise ValueError(f"`guidance_scale` must be at least 1 (no guidance), got {guidance_scale!r}.")
        if not 0 <= eta < 1:
            raise ValueError(f"`eta` must be at least 0 and below 1, such as 0.9, got {eta!r}.")
        if not 0 <= noise_scale < math.inf:
            raise ValueError(f"`noise_scale` must be at least 0 (no noise), got {noise_scale!r}.")
        if isinstance(generator, (list, tuple)) and len(generator) != num_subjects:
            raise ValueError(
                f"`generator` must be one generator or one for each of the {num_subjects} subjects, got {len(generator)}."
            )
        c_s, c_t = self.autoencoder.config.structure_channels, self.autoencoder.config.style_channels
        grid = (self.autoencoder.latent_size,) * 2
        for name, value, shape in (
            ("structure", structure, (c_s, *grid)),
            ("styles", styles, (len(modalities), c_t)),
        ):
            if value is None:
                continue
            if not torch.is_tensor(value):
                raise ValueError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}.")
            if tuple(value.shape[1:]) != shape or value.shape[0] not in (1, num_subjects):
                raise ValueError(
                    f"`{name}` must have the shape {(num_subjects, *shape)} for `num_subjects={num_subjects}` and "
                    f"`modalities={modalities}` (or 1 in place of {num_subjects}), got {tuple(value.shape)}."
                )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; only {self._callback_tensor_inputs} can be given."
            )
        check_scheduler(self.scheduler)

    def _draw_seeds(
        self, num_subjects: int, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> list[list[int]]:
        # A stream for the structure and two for each modality (style, noise), asked for or not: what one draws does not
        # move another.
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_subjects
        count = 1 + 2 * len(self.autoencoder.config.modalities)
        return [
            torch.randint(2**63 - 1, (count,), generator=g, device="cpu" if g is None else g.device).tolist()
            for g in generators
        ]

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
        """Draws structures alone, without styles and without decoding; `__call__` does so, and the decoder's training.

        New structures are one half of a pair under label 0. With `start`, given pairs are noised and denoised under their own
        labels, as in image-to-image pipelines: only the last `strength * num_inference_steps` steps are run, and the noise
        is that of the first of them.

        Args:
            num_subjects: S.
            generator: as in `__call__`; not used if `seeds` are given.
            start: structures (S, c_s, h, w), a style (S, c_t) of each, both on the autoencoder's scale, and its modality (S,).
            strength: in (0, 1]; small values return nearly the given structures, and 1 ignores them on a schedule with zero
                terminal SNR. Not used without `start`.
            batch_size: as in `__call__`.
            seeds: from `_draw_seeds`.
            options: `eta`, `callback` and `callback_inputs` of `_denoise`. The guidance is that of the last call, 1 at first.

        Returns:
            (S, c_s, h, w) float32, on the autoencoder's scale.
        """
        device, config = self._execution_device, self.autoencoder.config
        seeds = self._draw_seeds(num_subjects, generator) if seeds is None else seeds
        labels = torch.zeros(num_subjects, dtype=torch.long, device=device)
        if start is not None:
            structure, style, labels = (tensor.to(device) for tensor in start)
            structure = self.autoencoder.normalize_structure(structure.float()).flatten(1)
            style = self.autoencoder.normalize_style(style.float()[:, None])[:, 0]
            start = torch.cat([structure, style], dim=1)
        state = self._denoise(
            labels,
            len(config.modalities),
            [seed[0] for seed in seeds],
            num_inference_steps,
            self._batch_size(batch_size),
            start=start,
            strength=strength,
            **options,
        )
        structure = state[:, : -config.style_channels]
        return self.autoencoder.denormalize_structure(
            structure.unflatten(1, (config.structure_channels, *[self.autoencoder.latent_size] * 2))
        )

    def _draw_styles(
        self,
        structure: torch.Tensor,
        wanted: list[int],
        seeds: list[list[int]],
        num_inference_steps: int,
        batch_size: int | None = None,
        **options,
    ) -> torch.Tensor:
        """Draws the styles (S, M, c_t) of the modalities `wanted` given a structure (S, c_s, h, w), both in the
        autoencoder's own scale; `options` go to `_denoise`, which gets S * M rows, subject by subject."""
        n = len(self.autoencoder.config.modalities)
        state = self._denoise(
            torch.tensor([n + 1 + m for _ in seeds for m in wanted], device=structure.device),
            2 * n + 1,
            [seed[1 + m] for seed in seeds for m in wanted],
            num_inference_steps,
            self._batch_size(batch_size) * len(wanted),
            z_struct=self.autoencoder.normalize_structure(structure).repeat_interleave(len(wanted), dim=0),
            **options,
        )
        return self.autoencoder.denormalize_style(state.unflatten(0, (len(seeds), len(wanted))))

    def _batch_size(self, batch_size: int | None) -> int:
        return batch_size or (8 if self._execution_device.type == "cpu" else 64)

    def _denoise(
        self,
        labels: torch.Tensor,
        null_label: int,
        seeds: list[int],
        num_inference_steps: int,
        batch_rows: int,
        z_struct: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        strength: float = 1.0,
        eta: float = 0.0,
        first_step: int = 0,
        callback: Callable | None = None,
        callback_inputs: Sequence[str] = (),
    ) -> torch.Tensor:
        """Draws the pair (z_struct, z_style) of each row, or z_style alone where a clean `z_struct` is given.

        Args:
            labels: (R,) class labels; `null_label` is the one that stands for no label.
            seeds: R seeds, one for all the noise of a row.
            batch_rows: rows of one call of the denoiser.
            z_struct: (R, c_s, h, w) on the normalised scale, or `None`.
            start: clean rows as they are returned, to begin from with the noise that `strength` says; `None` for pure noise.

        Returns:
            Structure and style of each row, flat and normalised: (R, c_s * h * w + c_t), or (R, c_t) with `z_struct`.
        """
        device, config, grid = self._execution_device, self.autoencoder.config, self.autoencoder.latent_size
        drawn = config.structure_channels if z_struct is None else 0  # channels of the structure that are drawn

        # Schedulers work number by number. In a flat state a style is c_t numbers, and gets one noise even from those
        # schedulers that add noise at each step.
        def to_map(state):
            structure, style = state.split([drawn * grid**2, config.style_channels], dim=1)
            structure = structure.unflatten(1, (drawn, grid, grid)) if z_struct is None else z_struct
            return torch.cat([structure, style[:, :, None, None].expand(-1, -1, grid, grid)], dim=1)

        def to_state(latents):
            style = latents[:, config.structure_channels :].mean(dim=(2, 3))
            return torch.cat([latents[:, :drawn].flatten(1), style], dim=1)

        def predict(latents, t, labels):
            batches = zip(latents.to(self.unet.dtype).split(batch_rows), labels.split(batch_rows), strict=True)
            return torch.cat([to_state(self.unet(x, t, class_labels=y).sample.float()) for x, y in batches])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (len(seeds), drawn * grid**2 + config.style_channels)
        state = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        if start is None:
            state = state * self.scheduler.init_noise_sigma
        else:
            skipped = (num_inference_steps - max(round(strength * num_inference_steps), 1)) * self.scheduler.order
            timesteps = timesteps[skipped:]
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(skipped)
            state = self.scheduler.add_noise(start, state, timesteps[:1].expand(len(state)))

        accepted = inspect.signature(self.scheduler.step).parameters
        step_options = {k: v for k, v in (("eta", eta), ("generator", generators)) if k in accepted}
        self._num_timesteps = first_step + len(timesteps)
        progress_bar = self.progress_bar(timesteps)
        progress_bar.set_description("structure" if z_struct is None else "styles")
        for i, t in enumerate(progress_bar):
            latents = to_map(self.scheduler.scale_model_input(state, t))
            prediction = predict(latents, t, labels)
            if self.guidance_scale > 1:
                unguided = predict(latents, t, torch.full_like(labels, null_label))
                prediction = unguided + self.guidance_scale * (prediction - unguided)
            state = self.scheduler.step(prediction, t, state, **step_options, return_dict=False)[0]
            if callback is not None:
                latents = to_map(state)
                given = {"latents": latents} if "latents" in callback_inputs else {}
                returned = (callback(self, first_step + i, t, given) or {}).get("latents", latents)
                state = state if returned is latents else to_state(returned)
        return state

    def _render(
        self,
        structure: torch.Tensor,
        styles: torch.Tensor,
        wanted: list[int],
        seeds: list[list[int]],
        noise_scale: float,
        output_type: str,
        batch_size: int | None,
    ) -> tuple:
        """The images and masks of a `DLDMPipelineOutput`."""
        if output_type == "latent":
            return None, None
        config, dtype, rows = self.autoencoder.config, self.autoencoder.dtype, self._batch_size(batch_size)
        images, masks = [], []
        for first in range(0, len(seeds), rows):
            part = slice(first, first + rows)
            decoded = self.autoencoder.decode(structure[part].to(dtype), styles[part].to(dtype))
            image, foreground = decoded.sample.float(), decoded.foreground > 0
            if noise_scale and config.noise_level is not None:
                noise_seeds = [seed[1 + len(config.modalities) + m] for seed in seeds[part] for m in wanted]
                generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
                shape = (len(generators), *image.shape[2:])
                noise = randn_tensor(shape, generators, image.device, torch.float32).view_as(image)
                level = noise_scale * torch.tensor([config.noise_level[m] for m in wanted], device=image.device)
                image = image + level[:, None, None] * noise
            images.append(torch.where(foreground[:, None], image, 0).clamp(0, 1))
            masks.append((decoded.mask > 0) & foreground)
        images, masks = torch.cat(images), torch.cat(masks)
        if output_type == "pt":
            return images, masks
        images, masks = images.cpu().numpy(), masks.cpu().numpy()
        if output_type == "np":
            return images, masks
        grey = (images * 255).round().astype(np.uint8)
        return (
            [[PIL.Image.fromarray(image) for image in subject] for subject in grey],
            [PIL.Image.fromarray(mask) for mask in masks.astype(np.uint8) * 255],
        )


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` that says what to take instead of a scheduler with which a [`DLDMPipeline`] cannot work."""
    name = type(scheduler).__name__
    advice = (
        "take `DDIMScheduler`, `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`, by `from_config` of the config of "
        "the scheduler that came with the pipeline."
    )
    # The config also keeps what was meant for another scheduler, from whose config this one was made.
    taken = inspect.signature(type(scheduler).__init__).parameters
    for option, value, reason in (
        ("clip_sample", False, "is for pixels and destroys latents"),
        ("thresholding", False, "is for pixels and destroys latents"),
        ("skip_prk_steps", True, "fails on fewer than 4 steps"),
    ):
        if option in taken and scheduler.config[option] != value:
            raise ValueError(
                f"The scheduler has `{option}={scheduler.config[option]}`, which {reason}; build it with "
                f"`{name}.from_config(scheduler.config, {option}={value})`."
            )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"The denoiser was trained on a beta schedule, and {name} has none; {advice}")
    if "noise_sampler_seed" in taken:
        raise ValueError(f"{name} has one noise for all subjects and takes no generator of each; {advice}")

    # What else can be wrong (a kind of prediction that it does not know, a division by a signal of zero, a correction that
    # grows with the noise) shows when it draws a number of unit deviation, as latents are, by the ideal denoiser of those.
    scheduler, kind = copy.deepcopy(scheduler), scheduler.config.get("prediction_type")
    options = {"generator": torch.Generator()} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for steps in (2, 10):
        try:
            scheduler.set_timesteps(steps)
            state = torch.ones(1, 1) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                latent, signal = scheduler.scale_model_input(state, t), scheduler.alphas_cumprod[int(t)]
                ideal = {"epsilon": (1 - signal).sqrt() * latent, "sample": signal.sqrt() * latent}
                prediction = {**ideal, "v_prediction": torch.zeros_like(latent)}[kind]
                state = scheduler.step(prediction, t, state, **options, return_dict=False)[0]
        except Exception as error:  # each scheduler has its own
            raise ValueError(f"{name} fails with `prediction_type={kind!r}`: {error}; {advice}") from error
        if not state.abs().item() < 100:
            raise ValueError(
                f"{name} diverges on this noise schedule (in {steps} steps it draws {state.item():.3g} where about 1 is "
                f"right) with `prediction_type={kind!r}`; {advice}"
            )


def add_modules(folder: str | os.PathLike) -> None:
    """Makes a saved pipeline load where this package is not installed; where it is, it loads as before.

    `pipeline_dldm.py`, `pipeline_dldm_translation.py` and `autoencoder/autoencoder_disentangled.py` are put beside the
    weights and named in `model_index.json`, and a `pipeline.py` for diffusers' argument `custom_pipeline`.

    Args:
        folder: written by `DLDMPipeline.save_pretrained`. One whose classes are not this package's is left as it is.
    """
    folder, modules = Path(folder), Path(__file__).parent
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    name = index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][1]
    source = modules / f"{AUTOENCODER_MODULE}.py"
    is_ours = name in PIPELINE_MODULES and index["autoencoder"][0].split(".")[-1] == AUTOENCODER_MODULE
    if not is_ours or not source.is_file():
        return

    (folder / "autoencoder").mkdir(exist_ok=True)
    shutil.copyfile(source, folder / "autoencoder" / source.name)
    for module in PIPELINE_MODULES.values():
        if (modules / f"{module}.py").is_file():
            shutil.copyfile(modules / f"{module}.py", folder / f"{module}.py")
    (folder / "pipeline.py").write_text("from .pipeline_dldm import DLDMPipeline  # noqa: F401\n", encoding="utf-8")
    index["_class_name"] = [PIPELINE_MODULES[name], name]
    index["autoencoder"][0] = AUTOENCODER_MODULE
    index.pop("_name_or_path", None)  # the place it was loaded from, nobody's business
    temporary = index_file.with_name(".model_index.json.tmp")
    temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(index_file)
