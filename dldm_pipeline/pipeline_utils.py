"""What the pipelines share beside the sampling: their output, checks of the components, and loading and saving.

This file imports torch and diffusers only: it is also published as remote code.
"""

import copy
import inspect
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download

# The modules that a saved pipeline carries with it.
PIPELINE_MODULES = {"DLDMPipeline": "pipeline_dldm", "DLDMTranslationPipeline": "pipeline_dldm_translation"}
AUTOENCODER_MODULE = "autoencoder_disentangled"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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
            (S, c_s, h, w), the anatomies on the autoencoder's own scale; give it back as `structure=`.
        styles (`torch.Tensor`):
            (S, M, c_t), the appearances on the autoencoder's own scale; give it back as `styles=`.
        modalities (`list[str]`): the M names.
        labels (`np.ndarray`, `torch.Tensor` or `list[PIL.Image.Image]`):
            The tumours' regions as BraTS labels them: (S, H, W) uint8 for "np" and "pt", S 8-bit images for "pil", of 1
            necrotic core, 2 oedema, 3 enhancing tumour and 0 else; `None` for "latent" and from an autoencoder that knows
            the whole tumour only.
    """

    images: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]] | None
    masks: np.ndarray | torch.Tensor | list[PIL.Image.Image] | None
    structure: torch.Tensor
    styles: torch.Tensor
    modalities: list[str]
    labels: np.ndarray | torch.Tensor | list[PIL.Image.Image] | None = None

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


def check_components(autoencoder: ModelMixin, unet: UNet2DModel, style_grid: int | None = None) -> None:
    """Raises a `ValueError` if the denoiser's input, output or labels are not those that the autoencoder needs."""
    smallest, grid = 2 ** (len(unet.config.block_out_channels) - 1), autoencoder.latent_size
    fitting = [size for size in range(smallest, grid + 1, smallest) if grid % size == 0]
    if style_grid is not None and style_grid not in fitting:
        raise ValueError(f"`style_grid` must be one of {fitting} for this unet and autoencoder, got {style_grid!r}.")
    n = len(autoencoder.config.modalities)
    relation, side = autoencoder.config.get("style_relation"), n * autoencoder.config.style_channels
    if relation is not None:
        matrix = torch.tensor(relation) if all(len(row) == side for row in relation) else torch.zeros(0)
        fits = matrix.shape == (side, side) and bool(matrix.isfinite().all())
        fits = fits and torch.allclose(matrix, matrix.T) and torch.allclose(matrix.diag(), torch.ones(side), atol=1e-3)
        if not fits or torch.linalg.cholesky_ex(matrix).info:
            raise ValueError(
                f"`style_relation` of the autoencoder must be a correlation matrix of {side} rows, for {n} modalities; set "
                "it to None, or train the autoencoder again."
            )
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


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` that says what to take instead of a scheduler with which a [`DLDMPipeline`] cannot work."""
    name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type")
    advice = (
        "take `DDIMScheduler`, `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`, by `from_config` of the config of "
        "the scheduler that came with the pipeline."
    )
    # The config also keeps options of the scheduler whose config this one was made from.
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

    # Other faults (an unknown kind of prediction, a division by a signal of zero, a correction that grows with the noise) show
    # when it samples a number of unit standard deviation, as latents are, with the ideal denoiser of such numbers.
    scheduler = copy.deepcopy(scheduler)
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
                f"{name} diverges on this noise schedule (in {steps} steps it gives {state.item():.3g} where about 1 is "
                f"right) with `prediction_type={kind!r}`; {advice}"
            )


def default_batch_size(device: str | torch.device) -> int:
    """Subjects that a pipeline's denoiser takes at a time on a device."""
    return 32 if torch.device(device).type == "cpu" else 256


class PipelineMixin:
    """Loading and saving of a pipeline whose folder carries its modules, and checks of a call's arguments; to be inherited
    before `DiffusionPipeline`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DiffusionPipeline":
        """Loads a pipeline from a folder or from the Hub, with the classes of this package: no code of the repository is run.

        Without this package installed, type `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)`, with
        `custom_pipeline=repo` or without it; diffusers then runs the modules that `save_pretrained` puts beside the weights.

        Args:
            pretrained_model_name_or_path: a folder, or a repository such as "owner/name".
            kwargs: as in [`DiffusionPipeline.from_pretrained`]; weights are read from safetensors only, never a pickle.

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
            ValueError: on a folder without safetensors.
        """
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if index.get("_class_name") in [[module, name] for name, module in PIPELINE_MODULES.items()]:
            index["_class_name"] = cls.__name__
        if index.get("autoencoder", [None])[0] == AUTOENCODER_MODULE:
            index["autoencoder"][0] = f"{__package__}.{AUTOENCODER_MODULE}"
        for folder in (Path(pretrained_model_name_or_path, name) for name in ("autoencoder", "unet")):
            if folder.is_dir() and not any(folder.glob("*.safetensors")):
                raise ValueError(
                    f"{folder} has no .safetensors weights. Pickle files (.bin, .pt, .ckpt) are not loaded, as reading one "
                    "can run code; save the model again with `safe_serialization=True`."
                )
        return loaded

    def save_config(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes `model_index.json` and the modules beside the weights; `save_pretrained` calls it, `push_to_hub` too."""
        super().save_config(save_directory, **kwargs)
        add_modules(save_directory)

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
        callback_inputs: Sequence[str],
    ) -> None:
        """Raises a `ValueError` that names the first argument of `__call__` that does not fit."""
        config, grid = self.autoencoder.config, (self.autoencoder.latent_size,) * 2
        known, inputs = list(config.modalities), {*self._callback_tensor_inputs}
        distinct = len(set(modalities)) == len(modalities) > 0
        counts = {
            "num_subjects": num_subjects,
            "num_inference_steps": num_inference_steps,
            "num_style_inference_steps": num_style_inference_steps,
            "batch_size": 1 if batch_size is None else batch_size,
        }
        for name, value, fits, expected in (
            *((k, v, type(v) is int and v >= 1, "a whole number of at least 1") for k, v in counts.items()),
            ("modalities", modalities, distinct and {*modalities} <= {*known}, f"some of {known}, none twice"),
            ("guidance_scale", guidance_scale, 1 <= guidance_scale < math.inf, "at least 1 (no guidance)"),
            ("eta", eta, 0 <= eta < 1, "at least 0 and below 1, such as 0.9"),
            ("noise_scale", noise_scale, 0 <= noise_scale < math.inf, "at least 0 (no noise)"),
            ("output_type", output_type, output_type in OUTPUT_TYPES, f"one of {list(OUTPUT_TYPES)}"),
            ("callback_on_step_end_tensor_inputs", callback_inputs, {*callback_inputs} <= inputs, f"some of {inputs}"),
        ):
            if not fits:
                raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
        if isinstance(generator, (list, tuple)) and len(generator) != num_subjects:
            raise ValueError(
                f"`generator` must be one generator or one for each of the {num_subjects} subjects, got {len(generator)}."
            )
        for name, value, shape in (
            ("structure", structure, (config.structure_channels, *grid)),
            ("styles", styles, (len(modalities), config.style_channels)),
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
        check_scheduler(self.scheduler)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DiffusionPipeline":
        """Makes a pipeline of this class from the components of another, without a copy of them.

        diffusers' own `from_pipe` takes a component only if it is exactly of the annotated class, which as remote code has
        no fixed module; components that are passed, it takes.

        Args:
            pipeline: a [`DLDMPipeline`] or [`DLDMTranslationPipeline`].
            kwargs: components to use in place of the other pipeline's, and `dtype`, by default `torch.float32`: as the two
                share them, the other pipeline's components get it, too.
        """
        return super().from_pipe(pipeline, **{**pipeline.components, **kwargs})


def add_modules(folder: str | os.PathLike) -> None:
    """Makes a saved pipeline load where this package is not installed; where it is, it loads as before.

    The modules of the pipelines and `autoencoder/autoencoder_disentangled.py` are put beside the weights and named in
    `model_index.json`, and a `pipeline.py` for diffusers' argument `custom_pipeline`.

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
    for module in (*PIPELINE_MODULES.values(), Path(__file__).stem):
        if (modules / f"{module}.py").is_file():
            shutil.copyfile(modules / f"{module}.py", folder / f"{module}.py")
    (folder / "pipeline.py").write_text("from .pipeline_dldm import DLDMPipeline  # noqa: F401\n", encoding="utf-8")
    index["_class_name"] = [PIPELINE_MODULES[name], name]
    index["autoencoder"][0] = AUTOENCODER_MODULE
    index.pop("_name_or_path", None)  # the folder it was loaded from, which others should not see
    temporary = index_file.with_name(".model_index.json.tmp")
    temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(index_file)
