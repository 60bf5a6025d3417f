"""Do the modalities of one subject, and its tumour mask, show one anatomy?

The figures need no ground truth, so they are the same for real and generated subjects; what a good value is, the real
subjects tell. `evaluate_alignment` measures one set of subjects. Beside each figure it gives the value that the same
subjects have when shuffled (one modality, or the mask, of one subject beside another modality of a second subject), which
is what "no alignment at all" scores.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from .reconstruction import exchange_partners, mean_over_subjects

# Modalities in which a contrast agent makes tumour bright.
ENHANCED = ("WB", "BB", "T1CE")


def _pixels(length: float, shape: tuple[int, ...]) -> float:
    """A length in pixels of a 128-pixel image, scaled to images of another size: figures then mean the same there."""
    return length * min(shape[-2:]) / 128


def brain_region(images: np.ndarray) -> np.ndarray:
    """The brain as one region without holes, found from the images themselves.

    The images are averaged over modalities (fluid is dark in one and bright in another), smoothed (sigma 1 pixel of a
    128-pixel image) and cut at a quarter of their 95th percentile; the largest connected part is kept and its holes are
    filled.

    Args:
        images: array of shape (k, H, W): the modalities present, background near 0.

    Returns:
        bool array of shape (H, W); empty if the images are.
    """
    mean = ndimage.gaussian_filter(np.mean(images, axis=0, dtype=np.float64), _pixels(1.0, images.shape))
    labels, count = ndimage.label(mean > max(0.25 * np.percentile(mean, 95), 1e-6))
    if count == 0:
        return np.zeros(mean.shape, dtype=bool)
    return ndimage.binary_fill_holes(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]))


def edge_map(image: np.ndarray) -> np.ndarray:
    """Gradient magnitude of the smoothed image (Gaussian derivatives, sigma 1 pixel of a 128-pixel image).

    Magnitude forgets which side is the brighter one, so the same border looks alike in every contrast.

    Args:
        image: array of shape (H, W).
    """
    return ndimage.gaussian_gradient_magnitude(np.asarray(image, dtype=np.float64), _pixels(1.0, image.shape))


def edge_correlation(first: np.ndarray, second: np.ndarray, region: np.ndarray) -> float:
    """Pearson correlation of two edge maps over a region; NaN if the region or the edges are empty.

    Args:
        first, second: arrays of shape (H, W) from [`edge_map`].
        region: bool array of shape (H, W).
    """
    a, b = first[region], second[region]
    if a.size < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def enhancement_ratio(image: np.ndarray, mask: np.ndarray, brain: np.ndarray) -> float:
    """Mean intensity inside the tumour mask over the mean in the rest of the brain; NaN if either is empty.

    The mask is taken as it is: where it leaves the brain it covers dark background, and the ratio falls.

    Args:
        image: array of shape (H, W).
        mask, brain: bool arrays of shape (H, W).
    """
    rest = brain & ~mask
    if not mask.any() or not rest.any() or image[rest].mean() == 0:
        return float("nan")
    return float(image[mask].mean() / image[rest].mean())


def vessel_contrast(
    white_blood: np.ndarray, black_blood: np.ndarray, mask: np.ndarray, brain: np.ndarray, quantile: float = 0.99
) -> tuple[float, float]:
    """Brightness of the likely vessels in the white-blood and in the black-blood image.

    Likely vessels are the brain pixels, away from the tumour (mask dilated by 2 pixels of a 128-pixel image), in the top
    `1 - quantile` of white blood minus black blood.

    Args:
        white_blood, black_blood: arrays of shape (H, W).
        mask, brain: bool arrays of shape (H, W).
        quantile: of the difference; 0.99 takes the top hundredth of the pixels.

    Returns:
        (mean white blood over them / its brain mean, mean black blood over them / its brain mean): above 1 is brighter
        than the brain (without the tumour), below 1 darker. NaN if there is no brain.
    """
    near = ndimage.binary_dilation(mask, iterations=max(1, round(_pixels(2, mask.shape)))) if mask.any() else mask
    rest = brain & ~near
    if not rest.any() or white_blood[rest].mean() == 0 or black_blood[rest].mean() == 0:
        return float("nan"), float("nan")
    difference = (white_blood - black_blood)[rest]
    vessels = difference >= np.quantile(difference, quantile)
    white, black = white_blood[rest], black_blood[rest]
    return float(white[vessels].mean() / white.mean()), float(black[vessels].mean() / black.mean())


def evaluate_alignment(
    images: np.ndarray,
    masks: np.ndarray,
    modalities: list[str],
    subjects: list[str] | None = None,
    present: np.ndarray | None = None,
    has_mask: np.ndarray | None = None,
    reference: dict | None = None,
    progress: bool = True,
    seed: int = 0,
) -> dict:
    """Measures how well the modalities and masks of a set of subjects fit together. Means are over subjects.

    Edges are compared inside the brain, eroded by 3 pixels (of a 128-pixel image): the outline of the head is left out,
    for it is alike in everybody. Two shuffled subjects are compared where both have brain.

    Args:
        images: (N, n, H, W) in [0, 1].
        masks: (N, H, W), non-zero is tumour.
        modalities: the n names.
        subjects: N subject names; None if every slice is a subject of its own, as generated ones are.
        present: bool (N, n); None for all.
        has_mask: bool (N,); None for all.
        reference: what this function returned for real subjects; adds the comparison with them.
        progress: show a progress bar.
        seed: seed of the shuffling.

    Returns:
        dict of plain numbers:

        - `num_slices`, `num_subjects`, `num_empty_masks` (masks that are known and have no tumour)
        - `edge_correlation`, `edge_correlation_shuffled`: pair "A-B" → mean correlation
        - `edge_correlation_shuffled_p95`: pair → 95th percentile over the shuffled slices
        - `apart`: share of all (slice, pair) whose correlation is no higher than that percentile (of the `reference`, if
          there is one): pairs that might as well be of two subjects
        - `enhancement`, `enhancement_shuffled`: name in `ENHANCED` → mean [`enhancement_ratio`], own mask and another
          subject's
        - `vessels`, `vessels_shuffled`: {"WB": …, "BB": …} from [`vessel_contrast`], own images and WB of one subject with
          BB of another; None without WB and BB
        - with a `reference`: `edge_correlation_change` (pair → relative change, -0.1 is 10 % lower),
          `edge_correlation_change_worst` (the largest in size, with its sign), `enhancement_change` (name → relative
          change)
    """
    images, masks = np.asarray(images), np.asarray(masks).astype(bool)
    count, n = images.shape[:2]
    subjects = [f"subject-{i}" for i in range(count)] if subjects is None else list(subjects)
    present = np.ones((count, n), dtype=bool) if present is None else np.asarray(present, dtype=bool)
    has_mask = np.ones(count, dtype=bool) if has_mask is None else np.asarray(has_mask, dtype=bool)
    partners = exchange_partners(subjects, np.ones((count, 1), dtype=bool), seed)[:, 0]

    brains = np.stack([brain_region(image[here]) for image, here in zip(images, present, strict=True)])
    margin = max(1, round(_pixels(3, images.shape)))
    cores = np.stack([ndimage.binary_erosion(brain, iterations=margin) for brain in brains])
    edges = np.stack([[edge_map(image) for image in slice_images] for slice_images in images])
    pairs = list(combinations(range(n), 2))
    enhanced = [m for m, name in enumerate(modalities) if name in ENHANCED]
    blood = [modalities.index(name) for name in ("WB", "BB") if name in modalities]
    blood = blood if len(blood) == 2 else []

    own, other = np.full((count, len(pairs)), np.nan), np.full((count, len(pairs)), np.nan)
    ratio, ratio_other = np.full((count, len(enhanced)), np.nan), np.full((count, len(enhanced)), np.nan)
    vessels, vessels_other = np.full((count, 2), np.nan), np.full((count, 2), np.nan)
    for i, j in enumerate(tqdm(partners, desc="align", disable=not progress)):
        for p, (a, b) in enumerate(pairs):
            if present[i, a] and present[i, b]:
                own[i, p] = edge_correlation(edges[i, a], edges[i, b], cores[i])
            if j >= 0 and present[i, a] and present[j, b]:
                other[i, p] = edge_correlation(edges[i, a], edges[j, b], cores[i] & cores[j])
        for e, m in enumerate(enhanced):
            if present[i, m] and has_mask[i]:
                ratio[i, e] = enhancement_ratio(images[i, m], masks[i], brains[i])
            if j >= 0 and present[i, m] and has_mask[j]:
                ratio_other[i, e] = enhancement_ratio(images[i, m], masks[j] & brains[i], brains[i])
        if blood and present[i, blood].all():
            vessels[i] = vessel_contrast(images[i, blood[0]], images[i, blood[1]], masks[i], brains[i])
        if blood and j >= 0 and present[i, blood[0]] and present[j, blood[1]]:
            both = masks[i] | masks[j], brains[i] & brains[j]
            vessels_other[i] = vessel_contrast(images[i, blood[0]], images[j, blood[1]], *both)

    def by_name(values: np.ndarray, names: list[str]) -> dict[str, float]:
        return {name: float(value) for name, value in zip(names, mean_over_subjects(values, subjects), strict=True)}

    pair_names = [f"{modalities[a]}-{modalities[b]}" for a, b in pairs]
    enhanced_names = [modalities[m] for m in enhanced]
    p95 = {
        name: float(np.nanpercentile(other[:, p], 95)) if np.isfinite(other[:, p]).any() else float("nan")
        for p, name in enumerate(pair_names)
    }
    limits = np.array([(reference or {}).get("edge_correlation_shuffled_p95", p95)[name] for name in pair_names])
    known = np.isfinite(own) & np.isfinite(limits)
    result = {
        "num_slices": count,
        "num_subjects": len(set(subjects)),
        "num_empty_masks": int(np.sum(has_mask & ~masks.any(axis=(1, 2)))),
        "edge_correlation": by_name(own, pair_names),
        "edge_correlation_shuffled": by_name(other, pair_names),
        "edge_correlation_shuffled_p95": p95,
        "apart": float(np.mean((own <= limits)[known])) if known.any() else float("nan"),
        "enhancement": by_name(ratio, enhanced_names),
        "enhancement_shuffled": by_name(ratio_other, enhanced_names),
        "vessels": by_name(vessels, ["WB", "BB"]) if blood else None,
        "vessels_shuffled": by_name(vessels_other, ["WB", "BB"]) if blood else None,
    }
    if reference is not None:
        for key in ("edge_correlation", "enhancement"):
            result[f"{key}_change"] = {name: value / reference[key][name] - 1 for name, value in result[key].items()}
        changes = [value for value in result["edge_correlation_change"].values() if np.isfinite(value)]
        result["edge_correlation_change_worst"] = max(changes, key=abs, default=float("nan"))
    return result
