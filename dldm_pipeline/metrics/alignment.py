"""Do the modalities of one subject, and its tumour mask, show one anatomy?

The figures need no ground truth, so they are the same for real and generated subjects; what a good value is, the real
subjects tell. `evaluate_alignment` measures one set of subjects. Beside each figure it gives the value that the same
subjects have when shuffled (one modality, or the mask, of one subject beside another modality of a second subject), which
is what "no alignment at all" scores.

Two modalities are compared by their edges and by the mutual information of their intensities. An image and the mask are
compared by its enhancement and by small segmenters, each trained on real images of one modality alone
([`train_segmenter`]): do they find the tumour where the mask has it?
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.stats import entropy
from tqdm.auto import tqdm

from dldm_pipeline.data.slices import split_subjects
from dldm_pipeline.optimization import MuonAdamW

from .reconstruction import dice, exchange_partners, mean_over_subjects

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


def normalized_mutual_information(first: np.ndarray, second: np.ndarray, region: np.ndarray, bins: int = 16) -> float:
    """`(H(A) + H(B)) / H(A, B)` of the intensities of two images over a region, from their joint histogram.

    Source: Studholme, Hill and Hawkes, Pattern Recognition 32 (1999) 71. 1 is independent, 2 the same up to a one-to-one
    curve. A histogram of few pixels scores above 1 by chance, the more so the more bins it has, and noise lowers the
    value: read it beside that of shuffled subjects, and compare images of one size and noise.

    Args:
        first, second: arrays of shape (H, W) in [0, 1].
        region: bool array of shape (H, W).
        bins: intensity bins of each image, of equal width over [0, 1].

    Returns:
        Value in [1, 2]; NaN if the region is empty or both images are constant there.
    """
    joint = np.histogram2d(first[region], second[region], bins=bins, range=((0, 1), (0, 1)))[0]
    together = entropy(joint.ravel()) if joint.any() else 0.0
    return float((entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0))) / together) if together > 0 else float("nan")


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


def make_segmenter(channels: int = 40) -> torch.nn.Sequential:
    """An untrained segmenter: images (B, 1, H, W) to mask logits (B, 1, H, W), H and W divisible by 4.

    Patches of 4x4 pixels become channels; dilated convolutions then see 23 x 23 of them around each. 0.16 GFLOP for an
    image of 128x128, a multiplication and an addition counted as two.
    """
    layers: list[torch.nn.Module] = [torch.nn.PixelUnshuffle(4)]
    for width, dilation in zip((16, *[channels] * 5), (1, 1, 2, 4, 2, 1), strict=True):
        layers += [torch.nn.Conv2d(width, channels, 3, padding=dilation, dilation=dilation, bias=False)]
        layers += [torch.nn.BatchNorm2d(channels), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, 16, 1), torch.nn.PixelShuffle(4))


def train_segmenter(
    images: np.ndarray,
    masks: np.ndarray,
    subjects: list[str] | None = None,
    steps: int = 400,
    batch_size: int = 8,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> tuple[torch.nn.Module, float]:
    """Trains a small segmenter of the tumour on real images of one modality: half a minute on two cores at 128x128.

    Cross-entropy (tumour weighs ten times as much as the rest) plus soft Dice, Muon with a one-cycle rate, images mirrored
    at random. The same seed gives the same weights on the same machine and number of threads; the caller's random state is
    left as it was.

    Train it on other subjects than those that it will be the judge of.

    Args:
        images: (N, H, W) in [0, 1], all of one modality; H and W divisible by 4.
        masks: (N, H, W), non-zero is tumour.
        subjects: N subject names; None if every image is a subject of its own.
        steps: optimizer steps.
        batch_size: images a step.
        held_out: share of the subjects that is not trained on.
        seed: seed of split, initial weights and order.
        progress: show a progress bar.

    Returns:
        The segmenter, in evaluation mode, and its mean Dice on the held-out subjects: what it is worth.

    Raises:
        ValueError: on wrong shapes, fewer than 2 subjects, or no tumour to learn from.
    """
    images, masks = np.asarray(images, dtype=np.float32), np.asarray(masks).astype(bool)
    if images.ndim != 3 or images.shape[1] % 4 or images.shape[2] % 4:
        raise ValueError(f"images has shape {images.shape}: give one modality, (N, H, W), with H and W divisible by 4.")
    if masks.shape != images.shape:
        raise ValueError(f"masks has shape {masks.shape} and images {images.shape}: give one mask for each image.")
    subjects = [f"subject-{i}" for i in range(len(images))] if subjects is None else list(subjects)
    learnt, tested = (np.flatnonzero(np.isin(subjects, part)) for part in split_subjects(subjects, held_out, seed))
    if len(learnt) == 0 or len(tested) == 0:
        raise ValueError(
            f"subjects holds {len(set(subjects))} subject(s), held_out is {held_out}: a segmenter needs at least 2, "
            "one to learn from and one to be tested on, and a share between 0 and 1."
        )
    if not masks[learnt].any():
        raise ValueError(f"masks shows no tumour in {len(learnt)} training images: give slices with tumour.")

    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        segmenter = make_segmenter()
    # Muon and the weight: without either, a faint tumour (T1) stays unfound for hundreds of steps.
    optimizer, tumour_weight = MuonAdamW(segmenter, lr=2e-2), torch.tensor(10.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps, cycle_momentum=False)
    for _ in tqdm(range(steps), desc="train segmenter", disable=not progress):
        rows = rng.choice(learnt, batch_size)
        image, mask = torch.from_numpy(images[rows])[:, None], torch.from_numpy(masks[rows]).float()
        if rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        logits = segmenter(image)[:, 0]
        probability = logits.sigmoid()
        overlap = (2 * (probability * mask).sum(dim=(1, 2)) + 1) / ((probability + mask).sum(dim=(1, 2)) + 1)
        loss = F.binary_cross_entropy_with_logits(logits, mask, pos_weight=tumour_weight) + 1 - overlap.mean()
        segmenter.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    segmenter.eval()
    scores = dice(masks[tested], predict_masks(segmenter, images[tested]))
    return segmenter, float(mean_over_subjects(scores, [subjects[i] for i in tested]))


@torch.no_grad()
def predict_masks(segmenter: torch.nn.Module, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Tumour masks that a segmenter sees in images of its modality.

    Args:
        segmenter: from [`train_segmenter`], of images of this size.
        images: (N, H, W) in [0, 1].
        batch_size: images at a time.

    Returns:
        bool array (N, H, W).
    """
    images = np.asarray(images, dtype=np.float32)
    device = next(segmenter.parameters()).device
    batches = (torch.from_numpy(images[i : i + batch_size]).to(device) for i in range(0, len(images), batch_size))
    return np.concatenate([(segmenter(batch[:, None])[:, 0] > 0).cpu().numpy() for batch in batches])


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
    segmenters: dict[str, torch.nn.Module] | None = None,
) -> dict:
    """Measures how well the modalities and masks of a set of subjects fit together. Means are over subjects.

    Edges and intensities are compared inside the brain, eroded by 3 pixels (of a 128-pixel image): the outline of the
    head is left out, for it is alike in everybody. Two shuffled subjects are compared where both have brain.

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
        segmenters: name → segmenter of that modality from [`train_segmenter`], not trained on these subjects; adds the
            mask agreement of those modalities.

    Returns:
        dict of plain numbers:

        - `num_slices`, `num_subjects`, `num_empty_masks` (masks that are known and have no tumour)
        - `edge_correlation`, `edge_correlation_shuffled`: pair "A-B" → mean correlation
        - `edge_correlation_shuffled_p95`: pair → 95th percentile over the shuffled slices
        - `apart`: share of all (slice, pair) whose correlation is no higher than that percentile (of the `reference`, if
          there is one): pairs that might as well be of two subjects
        - `mutual_information`, `mutual_information_shuffled`: pair → mean [`normalized_mutual_information`]
        - `mask_agreement`, `mask_agreement_shuffled`: name in `segmenters` → mean Dice of what the segmenter sees in the
          image with the subject's own mask and with another subject's (1 where both are empty); None without segmenters
        - `enhancement`, `enhancement_shuffled`: name in `ENHANCED` → mean [`enhancement_ratio`], own mask and another
          subject's
        - `vessels`, `vessels_shuffled`: {"WB": …, "BB": …} from [`vessel_contrast`], own images and WB of one subject with
          BB of another; None without WB and BB
        - with a `reference`: `edge_correlation_change` (pair → relative change, -0.1 is 10 % lower),
          `edge_correlation_change_worst` (the largest in size, with its sign), `enhancement_change` (name → relative
          change)

    Raises:
        ValueError: if there is a segmenter of a modality that is not in `modalities`.
    """
    unknown = set(segmenters or ()) - set(modalities)
    if unknown:
        raise ValueError(f"segmenters names {sorted(unknown)}, but the modalities are {', '.join(modalities)}.")
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
    segmented = [m for m, name in enumerate(modalities) if name in (segmenters or ())]
    seen = [predict_masks(segmenters[modalities[m]], images[:, m]) for m in segmented]

    own, other = np.full((count, len(pairs)), np.nan), np.full((count, len(pairs)), np.nan)
    shared, shared_other = np.full((count, len(pairs)), np.nan), np.full((count, len(pairs)), np.nan)
    found, found_other = np.full((count, len(segmented)), np.nan), np.full((count, len(segmented)), np.nan)
    ratio, ratio_other = np.full((count, len(enhanced)), np.nan), np.full((count, len(enhanced)), np.nan)
    vessels, vessels_other = np.full((count, 2), np.nan), np.full((count, 2), np.nan)
    for i, j in enumerate(tqdm(partners, desc="align", disable=not progress)):
        for p, (a, b) in enumerate(pairs):
            if present[i, a] and present[i, b]:
                own[i, p] = edge_correlation(edges[i, a], edges[i, b], cores[i])
                shared[i, p] = normalized_mutual_information(images[i, a], images[i, b], cores[i])
            if j >= 0 and present[i, a] and present[j, b]:
                other[i, p] = edge_correlation(edges[i, a], edges[j, b], cores[i] & cores[j])
                shared_other[i, p] = normalized_mutual_information(images[i, a], images[j, b], cores[i] & cores[j])
        for e, m in enumerate(enhanced):
            if present[i, m] and has_mask[i]:
                ratio[i, e] = enhancement_ratio(images[i, m], masks[i], brains[i])
            if j >= 0 and present[i, m] and has_mask[j]:
                ratio_other[i, e] = enhancement_ratio(images[i, m], masks[j] & brains[i], brains[i])
        for s, m in enumerate(segmented):
            if present[i, m] and has_mask[i]:
                found[i, s] = dice(masks[i], seen[s][i])
            if j >= 0 and present[i, m] and has_mask[j]:
                found_other[i, s] = dice(masks[j], seen[s][i])
        if blood and present[i, blood].all():
            vessels[i] = vessel_contrast(images[i, blood[0]], images[i, blood[1]], masks[i], brains[i])
        if blood and j >= 0 and present[i, blood[0]] and present[j, blood[1]]:
            both = masks[i] | masks[j], brains[i] & brains[j]
            vessels_other[i] = vessel_contrast(images[i, blood[0]], images[j, blood[1]], *both)

    def by_name(values: np.ndarray, names: list[str]) -> dict[str, float]:
        return {name: float(value) for name, value in zip(names, mean_over_subjects(values, subjects), strict=True)}

    pair_names = [f"{modalities[a]}-{modalities[b]}" for a, b in pairs]
    enhanced_names, segmented_names = ([modalities[m] for m in which] for which in (enhanced, segmented))
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
        "mutual_information": by_name(shared, pair_names),
        "mutual_information_shuffled": by_name(shared_other, pair_names),
        "mask_agreement": by_name(found, segmented_names) if segmented else None,
        "mask_agreement_shuffled": by_name(found_other, segmented_names) if segmented else None,
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
