"""Do the modalities of one subject, and its tumour mask, show one anatomy?

The figures need no ground truth, so they are the same for real and generated subjects; the values of real subjects say what
is good. Beside each figure stands its value for the same subjects *shuffled*: one modality, or the mask, of one subject
with another modality of a second subject. That is the value without any alignment.

Two modalities are compared by their edges and by the mutual information of their intensities. An image and the mask are
compared by the enhancement inside the mask, and by a segmenter trained on real images of that modality alone
([`~dldm_pipeline.metrics.segmenter.train_segmenter`]): does it find the tumour where the mask is?
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import entropy
from tqdm.auto import tqdm

from .images import as_flags
from .reconstruction import dice, mean_over_subjects
from .segmenter import predict_masks

# Modalities in which a contrast agent makes tumour bright.
ENHANCED = ("WB", "BB", "T1CE")


def _pixels(length: float, shape: tuple[int, ...]) -> float:
    """A length in pixels of a 128-pixel image, scaled to images of another size: figures then mean the same there."""
    return length * min(shape[-2:]) / 128


def brain_region(images: np.ndarray) -> np.ndarray:
    """The brain as one region without holes, bool (H, W), found from the images themselves; empty if they are.

    The images (k, H, W), of the modalities present and with a background near 0, are averaged (fluid is dark in one and
    bright in another), smoothed (sigma 1 pixel of a 128-pixel image) and cut at a quarter of their 95th percentile; the
    largest connected part is kept and its holes are filled.
    """
    mean = ndimage.gaussian_filter(np.mean(images, axis=0, dtype=np.float64), _pixels(1.0, images.shape))
    labels, count = ndimage.label(mean > max(0.25 * np.percentile(mean, 95), 1e-6))
    if count == 0:
        return np.zeros(mean.shape, dtype=bool)
    return ndimage.binary_fill_holes(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]))


def edge_map(image: np.ndarray) -> np.ndarray:
    """Gradient magnitude of the smoothed image (H, W) (Gaussian derivatives, sigma 1 pixel of a 128-pixel image).

    Magnitude forgets which side is the brighter one, so the same border looks alike in every contrast.
    """
    return ndimage.gaussian_gradient_magnitude(np.asarray(image, dtype=np.float64), _pixels(1.0, image.shape))


def edge_correlation(first: np.ndarray, second: np.ndarray, region: np.ndarray) -> float:
    """Pearson correlation of two maps by [`edge_map`] (H, W) over a region, bool (H, W); NaN if it or the edges are empty."""
    a, b = first[region], second[region]
    if a.size < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def normalized_mutual_information(first: np.ndarray, second: np.ndarray, region: np.ndarray) -> float:
    """`(H(A) + H(B)) / H(A, B)` of two images (H, W) in [0, 1] over a region, from their joint histogram of 16×16 bins.

    Source: Studholme, Hill and Hawkes, Pattern Recognition 32 (1999) 71. 1 is independent, 2 the same up to a one-to-one
    curve; NaN if the region is empty or both images are constant there. A histogram of few pixels scores above 1 by chance,
    and noise lowers the value: read it beside that of shuffled subjects, and compare images of one size and noise.
    """
    joint = np.histogram2d(first[region], second[region], bins=16, range=((0, 1), (0, 1)))[0]
    together = entropy(joint.ravel()) if joint.any() else 0.0
    return float((entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0))) / together) if together > 0 else float("nan")


def enhancement_ratio(image: np.ndarray, mask: np.ndarray, brain: np.ndarray) -> float:
    """Mean intensity inside the tumour mask over the mean in the rest of the brain; NaN if either is empty.

    The mask is taken as it is: where it leaves the brain it covers dark background, and the ratio falls. All are (H, W).
    """
    rest = brain & ~mask
    if not mask.any() or not rest.any() or image[rest].mean() == 0:
        return float("nan")
    return float(image[mask].mean() / image[rest].mean())


def vessel_contrast(
    white_blood: np.ndarray, black_blood: np.ndarray, mask: np.ndarray, brain: np.ndarray
) -> tuple[float, float]:
    """Brightness of the likely vessels in the white-blood and in the black-blood image; all are (H, W).

    Likely vessels are the hundredth of the brain, away from the tumour (mask dilated by 2 pixels of a 128-pixel image), in
    which white blood minus black blood is highest. Both means over them are divided by those of the brain (without the
    tumour): above 1 is brighter, below 1 darker. NaN if there is no brain.
    """
    near = ndimage.binary_dilation(mask, iterations=max(1, round(_pixels(2, mask.shape)))) if mask.any() else mask
    rest = brain & ~near
    white, black = white_blood[rest], black_blood[rest]
    if not white.any() or not black.any():
        return float("nan"), float("nan")
    vessels = white - black >= np.quantile(white - black, 0.99)
    return float(white[vessels].mean() / white.mean()), float(black[vessels].mean() / black.mean())


def slices_of_others(subjects: list[str], seed: int = 0) -> np.ndarray:
    """For each of N slices, given its subject's name, a slice of *another subject*, every one used once.

    Subjects are put in a random order. Every slice takes the one that is as many places further on as the largest subject
    has slices. Returns int (N,); -1 for all where one subject has more than half of the slices.
    """
    names, own, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    place = np.argsort(np.random.default_rng(seed).permutation(len(names)))
    order = np.argsort(place[own], kind="stable")
    partners, shift = np.full(len(order), -1), counts.max()
    if 2 * shift <= len(order):
        partners[order] = np.roll(order, -shift)
    return partners


def evaluate_alignment(
    images: np.ndarray,
    masks: np.ndarray,
    modalities: list[str],
    subjects: list[str] | None = None,
    present: np.ndarray | None = None,
    has_mask: np.ndarray | None = None,
    reference: dict | None = None,
    seed: int = 0,
    segmenters: dict[str, torch.nn.Module] | None = None,
) -> dict:
    """Measures how well the modalities and masks of a set of subjects fit together. Means are over subjects.

    Edges and intensities are compared inside the brain, eroded by 3 pixels (of a 128-pixel image): the outline of the
    head is left out, because it is alike in all subjects. Two shuffled subjects are compared where both have brain.

    Args:
        images, masks: (N, n, H, W) in [0, 1], and (N, H, W), non-zero is tumour.
        modalities: the n names.
        subjects: N subject names; None if every slice is a subject of its own, as generated ones are.
        present, has_mask: bool (N, n) and (N,); None for all.
        reference: what this function returned for real subjects; adds the comparison with them.
        seed: of the shuffling.
        segmenters: name → segmenter of that modality, not trained on these subjects; adds the mask agreement.

    Returns:
        dict of plain numbers; each of the first five has a twin with `_shuffled` appended to its key:

        - `edge_correlation`: pair "A-B" → mean [`edge_correlation`]
        - `mutual_information`: pair → mean [`normalized_mutual_information`]
        - `mask_agreement`: name in `segmenters` → mean Dice of the mask and what the segmenter finds in the image (1 where
          both are empty); None without segmenters
        - `enhancement`: name in `ENHANCED` → mean [`enhancement_ratio`]
        - `vessels`: {"WB": …, "BB": …} from [`vessel_contrast`]; None without WB and BB
        - `num_slices`, `num_subjects`, `num_empty_masks` (masks that are known and have no tumour)
        - `edge_correlation_shuffled_p95`: pair → 95th percentile over the shuffled slices
        - `misaligned`: fraction of all (slice, pair) whose correlation is no higher than that percentile (of the
          `reference`, if there is one): pairs that may as well be of two subjects
        - with a `reference`: `edge_correlation_change` (pair → relative change, -0.1 is 10 % lower),
          `edge_correlation_change_worst` (the largest in size, with its sign), `enhancement_change` (name → relative
          change)

    Raises:
        ValueError: if there is a segmenter of a modality that is not in `modalities`.
    """
    segmenters = segmenters or {}
    unknown = set(segmenters) - set(modalities)
    if unknown:
        raise ValueError(f"segmenters names {sorted(unknown)}, but the modalities are {', '.join(modalities)}.")
    masks = np.asarray(masks).astype(bool)
    count, n = images.shape[:2]
    subjects = [f"subject-{i}" for i in range(count)] if subjects is None else list(subjects)
    present, has_mask = as_flags(present, (count, n)), as_flags(has_mask, (count,))
    partners = slices_of_others(subjects, seed)

    brains = np.stack([brain_region(image[here]) for image, here in zip(images, present, strict=True)])
    margin = max(1, round(_pixels(3, images.shape)))
    cores = np.stack([ndimage.binary_erosion(brain, iterations=margin) for brain in brains])
    edges = np.stack([[edge_map(image) for image in slice_images] for slice_images in images])
    channels = {name: m for m, name in enumerate(modalities)}
    pairs = {f"{a}-{b}": (channels[a], channels[b]) for a, b in combinations(modalities, 2)}
    segmented = {name: m for name, m in channels.items() if name in segmenters}
    enhanced = {name: m for name, m in channels.items() if name in ENHANCED}
    found = {m: predict_masks(segmenters[name], images[:, m]) for name, m in segmented.items()}
    blood = [channels[name] for name in ("WB", "BB")] if {"WB", "BB"} <= set(modalities) else []

    columns = {"edge_correlation": list(pairs), "mutual_information": list(pairs), "mask_agreement": list(segmented)}
    columns |= {"enhancement": list(enhanced), "vessels": ["WB", "BB"] if blood else []}
    keys = [(key, key + kind) for key in columns for kind in ("", "_shuffled")]
    values = {one: np.full((count, len(columns[key])), np.nan) for key, one in keys}
    for i, partner in enumerate(tqdm(partners, desc="align")):
        # An image of slice i with another image, or the mask, of slice j: first of its own subject, then of another one.
        for kind, j in (("", i), ("_shuffled", partner)):
            if j < 0:
                continue
            row = {key: values[key + kind][i] for key in columns}
            core = cores[i] & cores[j]
            for p, (a, b) in enumerate(pairs.values()):
                if present[i, a] and present[j, b]:
                    row["edge_correlation"][p] = edge_correlation(edges[i, a], edges[j, b], core)
                    row["mutual_information"][p] = normalized_mutual_information(images[i, a], images[j, b], core)
            if blood and present[i, blood[0]] and present[j, blood[1]]:
                both = images[i, blood[0]], images[j, blood[1]]
                row["vessels"][:] = vessel_contrast(*both, masks[i] | masks[j], brains[i] & brains[j])
            if not has_mask[j]:
                continue
            for p, m in enumerate(segmented.values()):
                if present[i, m]:
                    row["mask_agreement"][p] = dice(masks[j], found[m][i])
            mask = masks[i] if i == j else masks[j] & brains[i]  # another subject's mask may leave this brain
            for p, m in enumerate(enhanced.values()):
                if present[i, m]:
                    row["enhancement"][p] = enhancement_ratio(images[i, m], mask, brains[i])

    result: dict = {
        "num_slices": count,
        "num_subjects": len(set(subjects)),
        "num_empty_masks": int(np.sum(has_mask & ~masks.any(axis=(1, 2)))),
    }
    for key, one in keys:
        means = mean_over_subjects(values[one], subjects).tolist()
        unknown = key in ("mask_agreement", "vessels") and not columns[key]
        result[one] = None if unknown else dict(zip(columns[key], means, strict=True))
    own, shuffled = values["edge_correlation"], values["edge_correlation_shuffled"]
    result["edge_correlation_shuffled_p95"] = {
        name: float(np.nanpercentile(shuffled[:, p], 95)) if np.isfinite(shuffled[:, p]).any() else float("nan")
        for p, name in enumerate(pairs)
    }
    limits = (reference or result)["edge_correlation_shuffled_p95"]
    limits = np.array([limits[name] for name in pairs])
    known = np.isfinite(own) & np.isfinite(limits)
    result["misaligned"] = float(np.mean((own <= limits)[known])) if known.any() else float("nan")
    if reference is not None:
        for key in ("edge_correlation", "enhancement"):
            result[f"{key}_change"] = {name: value / reference[key][name] - 1 for name, value in result[key].items()}
        changes = [value for value in result["edge_correlation_change"].values() if np.isfinite(value)]
        result["edge_correlation_change_worst"] = max(changes, key=abs, default=float("nan"))
    return result
