"""Fills in missing sequences: from any of a subject's modalities to the others, with the tumour mask.

Source: the autoencoder and denoiser of Na et al., "Generation of Multi-modal Brain Tumor MRIs with Disentangled Latent
Diffusion Model", MIDL 2023. Translation is ours: z_struct is not sampled but encoded from the images that are there, and each
missing z_style is sampled given it, as in the second phase of `DLDMPipeline`. This file imports torch, diffusers and its
siblings only: it is also published as remote code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch

# Relative, because the siblings lie side by side as remote code and no package is there.
from .pipeline_dldm import DLDMPipeline
from .pipeline_utils import DLDMPipelineOutput

ImageInput: TypeAlias = np.ndarray | torch.Tensor | PIL.Image.Image | Sequence["ImageInput"]

# What is white in a grey image of each mode. Older versions of Pillow open 16-bit files in mode "I".
PIL_WHITE = {"L": 255, "I": 65535, "I;16": 65535, "I;16B": 65535, "F": 1}


class DLDMTranslationPipeline(DLDMPipeline):
    r"""
    Pipeline that fills in the missing modalities of subjects, and their tumour masks.

    It has the components of [`DLDMPipeline`]: load it by `from_pretrained` from any folder that this or the other class
    saved, or make it from a pipeline in memory by `DLDMTranslationPipeline.from_pipe(pipe)`.

    An image is one likely look of a sequence that was never acquired. It is synthetic and not for diagnosis.

    Notation: S subjects, n modalities known, M modalities asked for; labels of the denoiser as in [`DLDMPipeline`].

    Parameters:
        autoencoder ([`DisentangledAutoencoder`]):
            Encodes any subset of modalities into z_struct and decodes (z_struct, z_style) into an image.
        unet ([`UNet2DModel`]):
            Denoises the styles.
        scheduler ([`SchedulerMixin`]):
            As in [`DLDMPipeline`].
    """

    @torch.no_grad()
    def __call__(
        self,
        images: Mapping[str, ImageInput],
        modalities: str | Sequence[str] | None = None,
        reference_images: Mapping[str, ImageInput] | None = None,
        styles: torch.Tensor | None = None,
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        noise_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DLDMPipeline, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DLDMPipelineOutput | tuple:
        r"""
        The call function to the pipeline for translation.

        A subject's images and seed fix what it gets in a modality: that does not depend on the other modalities asked for,
        their order, the other subjects, `batch_size`, or the output type (to the same accuracy as in [`DLDMPipeline`]).

        Args:
            images (`dict`):
                The modalities that are there, the same for all S subjects, by name: for each an array or tensor (S, H, W)
                or (H, W) of floats in [0, 1], a grey PIL image of 8 or 16 bits, or a list of such, one a subject. H and W
                are the model's (`autoencoder.config.sample_size`); the brain should fill the image and the window be that
                of the training images, as `dldm_pipeline.data.volumes.read_scan` makes them from scans.
            modalities (`str` or `list[str]`, *optional*):
                The modalities wanted, in the order wanted; those that are not in `images` by default. One of `images` is
                rendered in its own style.
            reference_images (`dict`, *optional*):
                Like `images`, of one subject or of S: a modality that is among them is rendered in their style. They show
                other anatomies and need not be aligned with `images`; those that are not wanted are not used.
            styles (`torch.Tensor`, *optional*):
                (S or 1, M, c_t), the styles of all modalities wanted, in their order, such as an output's `styles`.
            num_inference_steps (`int`, *optional*, defaults to 5):
                Denoising steps of the styles (`num_style_inference_steps` of [`DLDMPipeline`]).
            guidance_scale, eta, noise_scale, batch_size, output_type, return_dict, callback_on_step_end_tensor_inputs:
                As in [`DLDMPipeline`].
            generator (`torch.Generator` or a list of them, *optional*):
                As in [`DLDMPipeline`]: the same generator and structure give the same images there and here.
            callback_on_step_end (`Callable`, *optional*):
                As in [`DLDMPipeline`], with the latents (S * k, c_s + c_t, g, g) of the k modalities whose style is sampled.

        Examples:

        ```py
        >>> from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMTranslationPipeline
        >>> from dldm_pipeline.data.phantom import simulate_subject

        >>> pipe = DLDMTranslationPipeline.from_pretrained(BUNDLED_CHECKPOINT)
        >>> t1, flair = simulate_subject(0, modalities=["T1", "FLAIR"]).images
        >>> output = pipe({"T1": t1, "FLAIR": flair})
        >>> output.modalities
        ['T2', 'WB', 'BB']
        >>> output.by_modality["T2"][0].save("t2.png")
        >>> output.masks[0].save("mask.png")
        ```

        Returns:
            [`DLDMPipelineOutput`] or `tuple`:
                If `return_dict` is `True`, [`DLDMPipelineOutput`] is returned, otherwise the tuple
                `(images, masks, structure, styles, modalities, labels)`.

        Raises:
            ValueError: on an argument that does not fit, named in the message.
        """
        # 1. Read the images and check the inputs
        known = list(self.autoencoder.config.modalities)
        given = self._read_images("images", images)
        references = {} if reference_images is None else self._read_images("reference_images", reference_images)
        num_subjects = len(next(iter(given.values())))
        if modalities is None:
            names = [name for name in known if name not in given]
            if not names:
                raise ValueError(
                    f"`images` has every modality that this model knows, {known}: none is missing. Leave some out, or name "
                    "in `modalities` those to render again."
                )
        else:
            names = [modalities] if isinstance(modalities, str) else list(modalities)
        self.check_inputs(
            num_subjects=num_subjects,
            modalities=names,
            num_inference_steps=num_inference_steps,
            num_style_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            noise_scale=noise_scale,
            generator=generator,
            structure=None,
            styles=styles,
            batch_size=batch_size,
            output_type=output_type,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        if references:
            if styles is not None:
                raise ValueError("`styles` and `reference_images` both say which styles to use; give one of them.")
            if not set(references) & set(names):
                raise ValueError(f"`reference_images` has {list(references)}, of which none is wanted ({names}).")
            count = len(next(iter(references.values())))
            if count not in (1, num_subjects):
                raise ValueError(f"`reference_images` must show 1 subject or {num_subjects} as `images`, got {count}.")

        # 2. Encode the structure, and the styles of what is there
        wanted = [known.index(name) for name in names]
        seeds = self._draw_seeds(num_subjects, generator)
        self._guidance_scale = guidance_scale
        self._num_timesteps = 0
        structure, encoded = self._encode(given, batch_size)

        # 3. Take the styles of the references, or sample them given the structure
        if styles is None:
            if references:
                borrowed = [known.index(name) for name in references]
                encoded[:, borrowed] = self._encode(references, batch_size)[1][:, borrowed]
            missing = [m for m in wanted if known[m] not in {**given, **references}]
            if missing:
                encoded[:, missing] = self._draw_styles(
                    structure,
                    missing,
                    seeds,
                    num_inference_steps,
                    batch_size=batch_size,
                    eta=eta,
                    callback=callback_on_step_end,
                    callback_inputs=callback_on_step_end_tensor_inputs,
                )
            styles = encoded[:, wanted]

        # 4. Decode, and offload all models
        output = self._decode(structure, styles, names, seeds, noise_scale, output_type, batch_size)
        self.maybe_free_model_hooks()
        return output if return_dict else tuple(vars(output).values())

    def _read_images(self, argument: str, images: Mapping[str, ImageInput]) -> dict[str, torch.Tensor]:
        """Each modality of `images` as float32 (S, H, W); a `ValueError` names the `argument` and what does not fit."""
        known = list(self.autoencoder.config.modalities)
        if not isinstance(images, Mapping) or not images:
            raise ValueError(
                f"`{argument}` must be a dictionary with the images of at least one of {known}, such as "
                f"{{{known[0]!r}: image}}, got {'an empty one' if isinstance(images, Mapping) else type(images).__name__}."
            )
        unknown = [name for name in images if name not in known]
        if unknown:
            raise ValueError(f"`{argument}` has {unknown}, which this model does not know; it knows {known}.")
        size = self.autoencoder.config.sample_size
        read = {name: _read_image(image, f"{argument}[{name!r}]", size) for name, image in images.items()}
        counts = {name: len(image) for name, image in read.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"`{argument}` must show the same subjects in each modality, got {counts} of them.")
        return read

    def _encode(self, images: dict[str, torch.Tensor], batch_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, c_s, h, w) and (S, n, c_t) float32; the styles of modalities that are not in `images` mean nothing."""
        known = self.autoencoder.config.modalities
        blank = torch.zeros_like(next(iter(images.values())))
        subjects = torch.stack([images.get(name, blank) for name in known], dim=1)
        subjects = subjects.to(self._execution_device, self.autoencoder.dtype)
        present = torch.tensor([name in images for name in known], device=subjects.device)
        structures, styles = [], []
        for part in subjects.split(self._batch_size(batch_size)):
            posterior = self.autoencoder.encode(part, present.expand(len(part), -1))
            structures.append(posterior.structure_dist.mode().float())
            styles.append(posterior.style_dist.mode().float())
        return torch.cat(structures), torch.cat(styles)


def _read_image(image: ImageInput, where: str, size: int) -> torch.Tensor:
    """An image, several in one array, or a list of images as float32 (S, size, size) on the CPU."""
    if isinstance(image, (list, tuple)) and image:
        return torch.cat([_read_image(item, f"{where}[{i}]", size) for i, item in enumerate(image)])
    if isinstance(image, PIL.Image.Image):
        if image.mode not in PIL_WHITE:
            raise ValueError(
                f"`{where}` is a PIL image of mode {image.mode!r} and must be grey, of 8 or 16 bits (mode 'L' or 'I;16'); "
                "use its `.convert('L')`."
            )
        image = np.asarray(image, dtype=np.float32) / PIL_WHITE[image.mode]
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        what = "an empty list" if isinstance(image, (list, tuple)) else type(image).__name__
        raise ValueError(f"`{where}` must be an array, a tensor, a PIL image or a list of them, got {what}.")
    if not (image.is_floating_point() if torch.is_tensor(image) else image.dtype.kind == "f"):
        raise ValueError(
            f"`{where}` has the dtype {image.dtype} and must hold floats in [0, 1]; divide it by its white, such as 255."
        )
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"`{where}` must have the shape (subjects, H, W) or (H, W), got {tuple(image.shape)}.")
    if tuple(image.shape[-2:]) != (size, size):
        height, width = image.shape[-2:]
        raise ValueError(f"`{where}` is {height}x{width} and must be {size}x{size}, the size of this model; resize it.")
    # NumPy's copy takes any byte order and stride, which torch does not.
    tensor = image.to("cpu", torch.float32) if torch.is_tensor(image) else torch.from_numpy(np.array(image, np.float32))
    if not tensor.isfinite().all():
        raise ValueError(f"`{where}` has values that are NaN or infinite.")
    low, high = tensor.min().item(), tensor.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"`{where}` has values from {low:g} to {high:g} and must be in [0, 1]; rescale it by the window of its scan."
        )
    return tensor.reshape(-1, size, size)


# diffusers takes the one pipeline class that a remote module holds, and refuses a module that holds two.
del DLDMPipeline
