"""How well the autoencoder rebuilds held-out slices.

Four questions, each with one figure for each modality:

1. How close is the rebuilt image? PSNR with the structure of all modalities.
2. Is the structure the same whichever modality it came from? PSNR with the structure of one modality alone.
3. Is the image sharp? Radial power spectrum of the rebuilt images over that of the real ones.
4. Is the tumour found? Dice of the mask, which is decoded from the structure alone.

What a style does on another anatomy is measured in [`~dldm_pipeline.metrics.exchange`].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .images import evenly_spaced

Images = TypeVar("Images", np.ndarray, torch.Tensor)


def psnr(real: Images, rebuilt: Images) -> Images:
    """Peak signal-to-noise ratio in dB, `10 log10(1 / mean((real - rebuilt)²))` over the whole image, background included.

    Of arrays or tensors (..., H, W) in [0, 1]: (...,), infinity for identical images. A ValueError where shapes differ.
    """
    if real.shape != rebuilt.shape:
        raise ValueError(f"real has shape {real.shape} and rebuilt {rebuilt.shape}: PSNR needs equal shapes.")
    if torch.is_tensor(real):
        return -10.0 * (real - rebuilt).square().mean(dim=(-2, -1)).log10()
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(np.mean((real.astype(np.float64) - rebuilt) ** 2, axis=(-2, -1)))


def dice(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Dice overlap `2 |A∩B| / (|A| + |B|)` in [0, 1] of binary masks; 1 where both are empty.

    Of arrays (..., H, W), in which non-zero means tumour: (...,). A ValueError where shapes differ.
    """
    real, predicted = np.asarray(real, dtype=bool), np.asarray(predicted, dtype=bool)
    if real.shape != predicted.shape:
        raise ValueError(f"real has shape {real.shape} and predicted {predicted.shape}: Dice needs equal shapes.")
    both = np.sum(real & predicted, axis=(-2, -1))
    total = np.sum(real, axis=(-2, -1)) + np.sum(predicted, axis=(-2, -1))
    return np.where(total == 0, 1.0, 2.0 * both / np.maximum(total, 1))


def radial_power_spectrum(images: np.ndarray) -> np.ndarray:
    """Mean power |FFT|² in each frequency ring, from zero up to and including half the Nyquist frequency.

    Rings are one cycle per image wide (per shorter side, if the image is not square). Ring r holds the frequencies whose
    radius rounds to r: ring 0 is the mean intensity alone, and the last of the `min(H, W) // 4 + 1` rings is half the
    Nyquist frequency. No window is applied, because the brain lies on an empty background. From (..., H, W) to (..., rings).
    """
    images = np.asarray(images, dtype=np.float64)
    height, width = images.shape[-2:]
    side = min(height, width)
    ring = np.rint(np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]) * side)
    power = np.abs(np.fft.fft2(images)) ** 2
    return np.stack([power[..., ring == r].mean(axis=-1) for r in range(side // 4 + 1)], axis=-1)


def compare_spectra(real: np.ndarray, other: np.ndarray, modalities: list[str]) -> dict:
    """Compares mean ring powers, (N, n, rings) and (M, n, rings) with NaN for a missing image, of `modalities`.

    Returns:
        dict with `ratio` (name → list: mean power of `other` over mean power of `real`, per ring), `ratio_mean` (its
        mean over modalities), `largest_deviation` (name → largest |ratio - 1| of all rings), `largest_deviation_worst`
        (the highest of those) and `largest_deviation_mean_ratio` (of `ratio_mean`, where opposite errors cancel out).
    """
    ratio = np.nanmean(other, axis=0) / np.maximum(np.nanmean(real, axis=0), 1e-12)
    largest = np.abs(ratio - 1).max(axis=1)
    return {
        "ratio": dict(zip(modalities, ratio.tolist(), strict=True)),
        "ratio_mean": ratio.mean(axis=0).tolist(),
        "largest_deviation": dict(zip(modalities, largest.tolist(), strict=True)),
        "largest_deviation_worst": float(largest.max()),
        "largest_deviation_mean_ratio": float(np.abs(ratio.mean(axis=0) - 1).max()),
    }


def mean_over_subjects(values: np.ndarray, subjects: list[str]) -> np.ndarray:
    """Mean of `values` (N, ...) within each subject's slices, then over subjects: one with many slices counts once.

    NaN is left out, and stands in the result (...,) where there was no value at all.
    """
    values, names = np.asarray(values, dtype=np.float64), np.asarray(subjects)
    return mean_of_known(np.stack([mean_of_known(values[names == name], 0) for name in np.unique(names)]), 0)


def mean_of_known(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """`np.nanmean`, which gives NaN without a warning where nothing is known."""
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=axis) / np.maximum(count, 1), np.nan)


@dataclass
class EncodedSubjects:
    """Held-out slices with their latents (posterior modes), as numpy arrays.

    Attributes:
        modalities, subjects: the n names, and those of the N slices' subjects.
        images: (N, n, H, W) float32 in [0, 1]; zeros where missing.
        present: (N, n) bool.
        masks, has_mask: (N, H, W) and (N,) bool.
        structure: (N, c_s, h, w), from all modalities present.
        single_structures: (N, n, c_s, h, w), from modality m alone; NaN where missing.
        styles: (N, n, c_t); NaN where missing.
    """

    modalities: list[str]
    subjects: list[str]
    images: np.ndarray
    present: np.ndarray
    masks: np.ndarray
    has_mask: np.ndarray
    structure: np.ndarray
    single_structures: np.ndarray
    styles: np.ndarray


@torch.no_grad()
def encode_subjects(
    autoencoder: torch.nn.Module, dataset: Dataset, max_items: int | None = None, batch_size: int = 16
) -> EncodedSubjects:
    """Encodes slices once with every modality present and once with each modality alone.

    Args:
        autoencoder: a `DisentangledAutoencoder` in evaluation mode, on the device to use.
        dataset, max_items: a `SliceDataset`, or a list of its items; see [`~dldm_pipeline.metrics.images.evenly_spaced`].
        batch_size: slices per encoder call.

    Raises:
        ValueError: if the dataset is empty or its images do not have the model's number of modalities.
    """
    modalities = list(autoencoder.config.modalities)
    parts = []
    for batch in tqdm(DataLoader(evenly_spaced(dataset, max_items), batch_size=batch_size), desc="encode"):
        images, present = batch["images"], batch["present"].bool()
        if images.shape[1] != len(modalities):
            raise ValueError(
                f"dataset has {images.shape[1]} modalities, the model {len(modalities)}: {', '.join(modalities)}. "
                "Read the data with modalities=autoencoder.config.modalities."
            )
        alone = [present, *torch.eye(len(modalities), dtype=torch.bool)[:, None].expand(-1, len(present), -1)]
        # Several subsets of the same images share the per-modality features, which are nearly all of the cost.
        device = autoencoder.device
        subsets = autoencoder.encode_subsets(images.to(device), [one.to(device) for one in alone])
        full, *single = [output.structure_dist.mode().float().cpu() for output in subsets]
        single, styles = torch.stack(single, dim=1), subsets[0].style_dist.mode().float().cpu()
        single[~present] = styles[~present] = torch.nan
        mask, has_mask = batch["mask"].numpy() > 0.5, batch["has_mask"].bool().numpy()
        latents = [latent.numpy() for latent in (full, single, styles)]
        parts.append([np.array(batch["subject"]), images.numpy(), present.numpy(), mask, has_mask, *latents])
    subjects, *arrays = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return EncodedSubjects(modalities, subjects.tolist(), *arrays)


@torch.no_grad()
def _decode(autoencoder: torch.nn.Module, structure: np.ndarray, styles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images clipped to [0, 1] and bool masks. A missing latent is NaN: zeros are decoded in its place."""
    pair = (torch.from_numpy(np.nan_to_num(z)).to(autoencoder.device, autoencoder.dtype) for z in (structure, styles))
    output = autoencoder.decode(*pair)
    return output.sample.float().clamp(0, 1).cpu().numpy(), output.mask.float().cpu().numpy() > 0


def rebuild(
    autoencoder: torch.nn.Module, encoded: EncodedSubjects, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every slice from the structure of all its modalities and its own styles, with the model that encoded it.

    Returns:
        images (N, n, H, W) float32 in [0, 1], zeros where the modality is missing, and masks (N, H, W) bool.
    """
    parts = []
    for start in tqdm(range(0, len(encoded.subjects), batch_size), desc="rebuild"):
        rows = slice(start, start + batch_size)
        parts.append(_decode(autoencoder, encoded.structure[rows], encoded.styles[rows]))
    images, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images * encoded.present[:, :, None, None], masks


def evaluate_reconstruction(autoencoder: torch.nn.Module, encoded: EncodedSubjects, batch_size: int = 16) -> dict:
    """Decodes the latents of held-out slices in all ways that the questions above need, and scores the results.

    Rebuilt images are clipped to [0, 1] first, as a saved image is. Means are [`mean_over_subjects`]. Styles always come
    from the full set of modalities, so that "structure from one alone" changes the structure only.

    Args:
        autoencoder, encoded: the model, and what [`encode_subjects`] made of it.
        batch_size: slices per decoder call.

    Returns:
        dict of plain numbers:

        - `num_slices`, `num_subjects`, `modalities`
        - `psnr`: `all` (name → dB) and `single` (source → target → dB)
        - `psnr_mean`, `psnr_worst`, `psnr_best`, `psnr_spread`: of `psnr["all"]` over modalities
        - `single_cost`: source → dB lost against `all`, mean over targets; `single_cost_mean` (over all sources and
          targets, the source itself included) and `single_cost_mean_others` (targets other than the source)
        - `mask_dice` (structure from all), `mask_dice_single` (source → Dice), None without masks
        - `spectrum`: see [`compare_spectra`]
    """
    names, subjects, count, n = encoded.modalities, encoded.subjects, len(encoded.subjects), len(encoded.modalities)
    full, overlap_single = np.full((count, n), np.nan), np.full((count, n), np.nan)
    single, overlap = np.full((count, n, n), np.nan), np.full(count, np.nan)
    spectra: dict[str, list[np.ndarray]] = {"real": [], "rebuilt": []}

    for start in tqdm(range(0, count, batch_size), desc="rebuild in all ways"):
        rows = slice(start, start + batch_size)
        real, present = encoded.images[rows], encoded.present[rows]
        true, labelled = encoded.masks[rows], encoded.has_mask[rows]

        rebuilt, mask = _decode(autoencoder, encoded.structure[rows], encoded.styles[rows])
        full[rows] = np.where(present, psnr(real, rebuilt), np.nan)
        overlap[rows] = np.where(labelled, dice(true, mask), np.nan)
        for key, images in (("real", real), ("rebuilt", rebuilt)):
            spectra[key].append(np.where(present[..., None], radial_power_spectrum(images), np.nan))

        for m in range(n):
            rebuilt, mask = _decode(autoencoder, encoded.single_structures[rows, m], encoded.styles[rows])
            single[rows, m] = np.where(present & present[:, m : m + 1], psnr(real, rebuilt), np.nan)
            overlap_single[rows, m] = np.where(labelled & present[:, m], dice(true, mask), np.nan)

    def mean(values: np.ndarray) -> np.ndarray:
        return mean_over_subjects(values, subjects)

    def by_name(values: np.ndarray) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    all_given, overlap = mean(full), mean(overlap)
    # Costs are differences within the same slice, so that a missing modality does not change them.
    single_cost = mean(full[:, None, :] - single)
    others = np.where(np.eye(n, dtype=bool), np.nan, single_cost)
    return {
        "num_slices": count,
        "num_subjects": len(set(subjects)),
        "modalities": list(names),
        "psnr": {
            "all": by_name(all_given),
            "single": dict(zip(names, map(by_name, mean(single)), strict=True)),
        },
        "psnr_mean": float(np.nanmean(all_given)),
        "psnr_worst": float(np.nanmin(all_given)),
        "psnr_best": float(np.nanmax(all_given)),
        "psnr_spread": float(np.nanmax(all_given) - np.nanmin(all_given)),
        "single_cost": by_name(mean_of_known(single_cost, 1)),
        "single_cost_mean": float(mean_of_known(single_cost)),
        "single_cost_mean_others": float(mean_of_known(others)),
        "mask_dice": None if np.isnan(overlap) else float(overlap),
        "mask_dice_single": None if np.isnan(overlap) else by_name(mean(overlap_single)),
        "spectrum": compare_spectra(np.concatenate(spectra["real"]), np.concatenate(spectra["rebuilt"]), list(names)),
    }
