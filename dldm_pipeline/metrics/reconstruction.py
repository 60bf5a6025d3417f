"""How faithfully the autoencoder rebuilds held-out slices.

Four questions, each answered by one figure per modality:

1. How close is the rebuilt image?  PSNR with the structure of all modalities.
2. Is the structure the same whichever modality it came from?  PSNR with the structure of one modality alone.
3. Does the style carry appearance only?  PSNR with the style of another subject (same modality); the target stays the
   structure's own subject, because exchanging appearance must not move anatomy.
4. Is the image sharp?  Radial power spectrum of the rebuilt images over that of the real ones.

A fifth figure, Dice, scores the tumour mask, which is decoded from the structure alone.

The figures are plain functions of numpy arrays. `encode_subjects` and `evaluate_reconstruction` apply them to a
[`~dldm_pipeline.autoencoder_disentangled.DisentangledAutoencoder`].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

Images = TypeVar("Images", np.ndarray, torch.Tensor)


def psnr(real: Images, rebuilt: Images) -> Images:
    """Peak signal-to-noise ratio in dB over the whole image, for a data range of 1.

    `10 log10(1 / mean((real - rebuilt)²))`, with the background counted like every other pixel. Identical images give
    infinity.

    Args:
        real, rebuilt: arrays or tensors of the same shape (..., H, W), intensities in [0, 1].

    Returns:
        Array or tensor of shape (...,): one value per image.

    Raises:
        ValueError: if the shapes differ.
    """
    if real.shape != rebuilt.shape:
        raise ValueError(f"real has shape {real.shape} and rebuilt {rebuilt.shape}: PSNR needs equal shapes.")
    if torch.is_tensor(real):
        return -10.0 * (real - rebuilt).square().mean(dim=(-2, -1)).log10()
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(np.mean((real.astype(np.float64) - rebuilt) ** 2, axis=(-2, -1)))


def dice(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Dice overlap `2 |A∩B| / (|A| + |B|)` of binary masks; 1 where both are empty.

    Args:
        real, predicted: arrays of the same shape (..., H, W); non-zero means tumour.

    Returns:
        Array of shape (...,): one value in [0, 1] per mask.

    Raises:
        ValueError: if the shapes differ.
    """
    real, predicted = np.asarray(real, dtype=bool), np.asarray(predicted, dtype=bool)
    if real.shape != predicted.shape:
        raise ValueError(f"real has shape {real.shape} and predicted {predicted.shape}: Dice needs equal shapes.")
    both = np.sum(real & predicted, axis=(-2, -1))
    total = np.sum(real, axis=(-2, -1)) + np.sum(predicted, axis=(-2, -1))
    return np.where(total == 0, 1.0, 2.0 * both / np.maximum(total, 1))


def radial_power_spectrum(images: np.ndarray) -> np.ndarray:
    """Mean power |FFT|² in each frequency ring, from zero up to and including half the Nyquist frequency.

    Rings are one cycle per image wide (per shorter side, if the image is not square): ring r holds the frequencies
    whose radius rounds to r, so ring 0 is the mean intensity alone, and the last of the `min(H, W) // 4 + 1` rings is
    half the Nyquist frequency. No window is applied: the brain lies on an empty background.

    Args:
        images: array of shape (..., H, W).

    Returns:
        Array of shape (..., rings).
    """
    images = np.asarray(images, dtype=np.float64)
    height, width = images.shape[-2:]
    side = min(height, width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]) * side
    ring = np.rint(radius).astype(int)
    power = np.abs(np.fft.fft2(images)) ** 2
    return np.stack([power[..., ring == r].mean(axis=-1) for r in range(side // 4 + 1)], axis=-1)


def largest_deviation(ratio: np.ndarray) -> float:
    """Largest |ratio - 1| over the frequency rings: 0.2 means that every ring's power is within 20 % of the real one's.

    Args:
        ratio: array of shape (rings,): power of the rebuilt (or generated) images over that of the real ones.
    """
    return float(np.max(np.abs(np.asarray(ratio) - 1.0)))


def compare_spectra(real: np.ndarray, other: np.ndarray, modalities: list[str]) -> dict:
    """Compares ring powers, averaged over images, of two sets of images, modality by modality.

    Args:
        real, other: arrays of shape (N, n, rings) and (M, n, rings) from [`radial_power_spectrum`]; NaN for an image
            that is missing. The sets need not show the same subjects.
        modalities: the n names.

    Returns:
        dict with `ratio` (name → list: mean power of `other` over mean power of `real`, per ring), `ratio_mean` (its
        mean over modalities), `largest_deviation` (name → largest |ratio - 1|), `largest_deviation_worst` (the highest
        of those) and `largest_deviation_mean_ratio` (of `ratio_mean`, where opposite errors cancel out).
    """
    ratio = np.nanmean(other, axis=0) / np.maximum(np.nanmean(real, axis=0), 1e-12)
    deviations = {name: largest_deviation(ratio[m]) for m, name in enumerate(modalities)}
    return {
        "ratio": {name: ratio[m].tolist() for m, name in enumerate(modalities)},
        "ratio_mean": ratio.mean(axis=0).tolist(),
        "largest_deviation": deviations,
        "largest_deviation_worst": max(deviations.values()),
        "largest_deviation_mean_ratio": largest_deviation(ratio.mean(axis=0)),
    }


def mean_over_subjects(values: np.ndarray, subjects: list[str]) -> np.ndarray:
    """Mean within each subject's slices, then over subjects, so that a subject with many slices counts once.

    Args:
        values: array of shape (N, ...); NaN is left out.
        subjects: the N subject names.

    Returns:
        Array of shape (...,); NaN where there was no value at all.
    """
    values, names = np.asarray(values, dtype=np.float64), np.asarray(subjects)
    means = np.stack([_nanmean(values[names == name]) for name in np.unique(names)])
    return _nanmean(means)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """`np.nanmean` over the first axis that gives NaN for an empty slice without a warning."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def exchange_partners(subjects: list[str], present: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each slice and modality, a slice of *another subject* that has this modality.

    Subjects are put in a random order and every slice takes the one that lies as many places further on as the largest
    subject has slices; this always leaves the subject and uses every slice once.

    Args:
        subjects: the N subject names.
        present: bool array of shape (N, n).
        seed: seed of the random order.

    Returns:
        int array of shape (N, n): the partner's index; -1 where the modality is missing or where one subject holds
        more than half of its slices, so that no such exchange exists.
    """
    names, present = np.asarray(subjects), np.asarray(present, dtype=bool)
    partners = np.full(present.shape, -1)
    place = {name: i for i, name in enumerate(np.random.default_rng(seed).permutation(np.unique(names)))}
    order = np.argsort([place[name] for name in names], kind="stable")
    for m in range(present.shape[1]):
        having = order[present[order, m]]
        if len(having) == 0:
            continue
        shift = np.unique(names[having], return_counts=True)[1].max()
        if 2 * shift <= len(having):
            partners[having, m] = np.roll(having, -shift)
    return partners


@dataclass
class EncodedSubjects:
    """Held-out slices with their latents (posterior modes), as numpy arrays.

    Attributes:
        modalities: the n names.
        subjects: N subject names, one per slice.
        images: (N, n, H, W) float32 in [0, 1]; zeros where missing.
        present: (N, n) bool.
        masks: (N, H, W) bool.
        has_mask: (N,) bool.
        structure: (N, c_s, h, w), from all modalities present.
        single_structures: (N, n, c_s, h, w), from modality m alone; NaN where missing.
        styles: (N, n, c_t) or (N, n, c_t, h, w); NaN where missing.
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
    autoencoder: torch.nn.Module,
    dataset: Dataset,
    max_items: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> EncodedSubjects:
    """Encodes slices once with every modality present and once with each modality alone.

    Args:
        autoencoder: a `DisentangledAutoencoder` in evaluation mode, on the device to use.
        dataset: a `SliceDataset`, or anything with its items: `images` (n, H, W), `present` (n,), `mask` (H, W),
            `has_mask`, `subject`.
        max_items: at most this many slices, taken at even distances over the whole set; all if None.
        batch_size: slices per encoder call.
        progress: show a progress bar.

    Returns:
        [`EncodedSubjects`].

    Raises:
        ValueError: if the dataset is empty or its images do not have the model's number of modalities.
    """
    modalities = list(autoencoder.config.modalities)
    total = len(dataset)
    if total == 0:
        raise ValueError("dataset has no slices: nothing to evaluate. Give a set with held-out subjects.")
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items={max_items}: at least one slice is needed.")
    if max_items is not None and max_items < total:
        dataset = Subset(dataset, np.linspace(0, total - 1, max_items).round().astype(int).tolist())

    parts: dict[str, list] = {name: [] for name in EncodedSubjects.__dataclass_fields__ if name != "modalities"}
    for batch in tqdm(DataLoader(dataset, batch_size=batch_size), desc="encode", disable=not progress):
        images, present = batch["images"], batch["present"].bool()
        if images.shape[1] != len(modalities):
            raise ValueError(
                f"dataset has {images.shape[1]} modalities, the model {len(modalities)}: {', '.join(modalities)}. "
                "Read the data with modalities=autoencoder.config.modalities."
            )
        presents = [present]
        for m in range(len(modalities)):
            alone = torch.zeros_like(present)
            alone[:, m] = True
            presents.append(alone)
        # Several subsets of the same images share the per-modality features, which are nearly all of the cost.
        subsets = autoencoder.encode_subsets(
            images.to(autoencoder.device), [p.to(autoencoder.device) for p in presents]
        )
        full, *single = [output.structure_dist.mode().float().cpu() for output in subsets]
        single = torch.stack(single, dim=1)
        styles = subsets[0].style_dist.mode().float().cpu()
        single[~present] = torch.nan
        styles[~present] = torch.nan
        parts["subjects"] += list(batch["subject"])
        parts["images"].append(images.numpy())
        parts["present"].append(present.numpy())
        parts["masks"].append(batch["mask"].numpy() > 0.5)
        parts["has_mask"].append(batch["has_mask"].bool().numpy())
        parts["structure"].append(full.numpy())
        parts["single_structures"].append(single.numpy())
        parts["styles"].append(styles.numpy())
    arrays = {name: np.concatenate(value) for name, value in parts.items() if name != "subjects"}
    return EncodedSubjects(modalities=modalities, subjects=parts["subjects"], **arrays)


@torch.no_grad()
def _decode(autoencoder: torch.nn.Module, structure: np.ndarray, styles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images clipped to [0, 1] and bool masks. A missing latent is NaN: zeros are decoded in its place."""
    pair = (torch.from_numpy(np.nan_to_num(z)).to(autoencoder.device, autoencoder.dtype) for z in (structure, styles))
    output = autoencoder.decode(*pair)
    return output.sample.float().clamp(0, 1).cpu().numpy(), output.mask.float().cpu().numpy() > 0


def rebuild(
    autoencoder: torch.nn.Module, encoded: EncodedSubjects, batch_size: int = 16, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every slice from the structure of all its modalities and its own styles.

    Args:
        autoencoder: the model that made `encoded`.
        encoded: from [`encode_subjects`].
        batch_size: slices per decoder call.
        progress: show a progress bar.

    Returns:
        images (N, n, H, W) float32 in [0, 1], zeros where the modality is missing, and masks (N, H, W) bool.
    """
    parts = []
    for start in tqdm(range(0, len(encoded.subjects), batch_size), desc="rebuild", disable=not progress):
        rows = slice(start, start + batch_size)
        parts.append(_decode(autoencoder, encoded.structure[rows], encoded.styles[rows]))
    images, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images * encoded.present[:, :, None, None], masks


def evaluate_reconstruction(
    autoencoder: torch.nn.Module, encoded: EncodedSubjects, batch_size: int = 16, progress: bool = True, seed: int = 0
) -> dict:
    """Decodes the latents of held-out slices in every way that matters and scores the outcome.

    Rebuilt images are clipped to [0, 1] first, as a saved image is. A mask pixel is tumour where its logit is positive.
    Means are over subjects (see [`mean_over_subjects`]). Styles always come from the full set of modalities, so that
    "structure from one alone" changes the structure and nothing else.

    Args:
        autoencoder: the model that made `encoded`.
        encoded: from [`encode_subjects`].
        batch_size: slices per decoder call.
        progress: show a progress bar.
        seed: seed of the choice of partners for the exchange of styles.

    Returns:
        dict of plain numbers:

        - `num_slices`, `num_subjects`, `modalities`
        - `psnr`: `all`, `exchanged`, `another_subject` (name → dB; the last one is the floor: another subject's real
          image in place of the rebuilt one) and `single` (source → target → dB)
        - `psnr_mean`, `psnr_worst`, `psnr_best`, `psnr_spread`: of `psnr["all"]` over modalities
        - `exchange_cost`: name → dB lost by exchanging styles; `exchange_cost_mean`, `exchange_cost_worst`
        - `single_cost`: source → dB lost against `all`, mean over targets; `single_cost_mean` (over all sources and
          targets, the source itself included) and `single_cost_mean_others` (targets other than the source)
        - `mask_dice` (structure from all), `mask_dice_single` (source → Dice), None without masks
        - `spectrum`: see [`compare_spectra`]
    """
    names, count, n = encoded.modalities, len(encoded.subjects), len(encoded.modalities)
    partners = exchange_partners(encoded.subjects, encoded.present, seed)
    columns = np.arange(n)
    full, swapped, floor = (np.full((count, n), np.nan) for _ in range(3))
    single = np.full((count, n, n), np.nan)
    overlap, overlap_single = np.full(count, np.nan), np.full((count, n), np.nan)
    spectra: dict[str, list[np.ndarray]] = {"real": [], "rebuilt": []}

    for start in tqdm(range(0, count, batch_size), desc="rebuild in all ways", disable=not progress):
        rows = slice(start, min(start + batch_size, count))
        real, present, partner = encoded.images[rows], encoded.present[rows], partners[rows]
        labelled = encoded.has_mask[rows]

        rebuilt, mask = _decode(autoencoder, encoded.structure[rows], encoded.styles[rows])
        full[rows] = np.where(present, psnr(real, rebuilt), np.nan)
        overlap[rows] = np.where(labelled, dice(encoded.masks[rows], mask), np.nan)
        spectra["real"].append(np.where(present[..., None], radial_power_spectrum(real), np.nan))
        spectra["rebuilt"].append(np.where(present[..., None], radial_power_spectrum(rebuilt), np.nan))

        rebuilt, _ = _decode(autoencoder, encoded.structure[rows], encoded.styles[partner, columns])
        swapped[rows] = np.where(partner >= 0, psnr(real, rebuilt), np.nan)
        floor[rows] = np.where(partner >= 0, psnr(real, encoded.images[partner, columns]), np.nan)

        for m in range(n):
            rebuilt, mask = _decode(autoencoder, encoded.single_structures[rows, m], encoded.styles[rows])
            known = present & present[:, m : m + 1]
            single[rows, m] = np.where(known, psnr(real, rebuilt), np.nan)
            alone = labelled & present[:, m]
            overlap_single[rows, m] = np.where(alone, dice(encoded.masks[rows], mask), np.nan)

    def by_name(values: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(names, values, strict=True)}

    full_mean = mean_over_subjects(full, encoded.subjects)
    single_mean = mean_over_subjects(single, encoded.subjects)
    # Costs are differences within the same slice, so a missing modality cannot tilt them.
    exchange_cost = mean_over_subjects(full - swapped, encoded.subjects)
    single_cost = mean_over_subjects(full[:, None, :] - single, encoded.subjects)
    others = np.where(np.eye(n, dtype=bool), np.nan, single_cost)
    overlap_mean = float(mean_over_subjects(overlap, encoded.subjects))
    return {
        "num_slices": count,
        "num_subjects": len(set(encoded.subjects)),
        "modalities": list(names),
        "psnr": {
            "all": by_name(full_mean),
            "exchanged": by_name(mean_over_subjects(swapped, encoded.subjects)),
            "another_subject": by_name(mean_over_subjects(floor, encoded.subjects)),
            "single": {name: by_name(single_mean[m]) for m, name in enumerate(names)},
        },
        "psnr_mean": float(np.nanmean(full_mean)),
        "psnr_worst": float(np.nanmin(full_mean)),
        "psnr_best": float(np.nanmax(full_mean)),
        "psnr_spread": float(np.nanmax(full_mean) - np.nanmin(full_mean)),
        "exchange_cost": by_name(exchange_cost),
        "exchange_cost_mean": float(_nanmean(exchange_cost)),
        "exchange_cost_worst": float(np.max(exchange_cost)),
        "single_cost": by_name(_nanmean(single_cost.T)),
        "single_cost_mean": float(_nanmean(single_cost.ravel())),
        "single_cost_mean_others": float(_nanmean(others.ravel())),
        "mask_dice": None if np.isnan(overlap_mean) else overlap_mean,
        "mask_dice_single": None
        if np.isnan(overlap_mean)
        else by_name(mean_over_subjects(overlap_single, encoded.subjects)),
        "spectrum": compare_spectra(np.concatenate(spectra["real"]), np.concatenate(spectra["rebuilt"]), list(names)),
    }
