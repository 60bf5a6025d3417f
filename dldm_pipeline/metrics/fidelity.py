"""How close generated images come to real ones, as sets: fidelity and diversity, each beside what real images score.

On features (see `features.py`), each a plain function of two arrays (N, D):

- [`frechet_distance`]: distance of two Gaussians fitted to the features (Heusel et al. 2017); 0 is best. On Inception-v3
  with clean-fid's resizing it is clean-FID (Parmar et al. 2022).
- [`kernel_distance`]: unbiased squared MMD with a cubic kernel, clean-KID (Bińkowski et al. 2018); 0 is best.
- [`neighbour_scores`]: improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

On 8-bit images:

- [`diversity`]: mean MS-SSIM of pairs of different subjects (Odena et al. 2017); read against the real images' value,
  for a higher one means less variety.
- [`two_sample_auc`]: how well a small CNN tells generated from real images of subjects it has not seen (Lopez-Paz and
  Oquab 2017); 0.5 is best.

[`evaluate_fidelity`] gives all of them per modality and averaged, with the real-against-real floor at the same N, sample
sizes, and intervals over subjects. The floor is no formality: every one of these figures depends on N, and a split that
cuts through subjects flatters all of them, so the split here is always by subject.

[`range_sweep`] shows what the distance becomes when images in [0, 1] are given to networks that read 0-255.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .features import FeatureExtractor, check_images

# Every score with its best value and the range it cannot leave.
SCORES = {
    "frechet_distance": (0.0, (0.0, np.inf)),
    "kernel_distance": (0.0, (-np.inf, np.inf)),
    "precision": (1.0, (0.0, 1.0)),
    "recall": (1.0, (0.0, 1.0)),
    "density": (1.0, (0.0, np.inf)),
    "coverage": (1.0, (0.0, 1.0)),
    "diversity": (None, (0.0, 1.0)),
    "two_sample_auc": (0.5, (0.0, 1.0)),
}
# Rows of a distance or kernel matrix held at a time: memory grows with N, as the features do, and not with N².
ROWS = 1024


def _check_features(real: np.ndarray, generated: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, or one clear error."""
    arrays = []
    for name, features in (("real", real), ("generated", generated)):
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2:
            raise ValueError(f"{name} has shape {features.shape}: features are (N, D), one row an image.")
        if len(features) < least:
            raise ValueError(
                f"{name} has {len(features)} samples: this score needs at least {least}. Give more images."
            )
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features)).any(axis=1).sum())
            raise ValueError(
                f"{name}: {bad} of {len(features)} feature rows hold NaN or infinity. Look for NaN in the images "
                "or a damaged weight file; leaving the rows out would hide it."
            )
        arrays.append(features)
    if arrays[0].shape[1] != arrays[1].shape[1]:
        raise ValueError(
            f"real has {arrays[0].shape[1]} features and generated {arrays[1].shape[1]}: "
            "take both with the same extractor."
        )
    return arrays[0], arrays[1]


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance `|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)` of the Gaussians fitted to two sets of features.

    It is clean-fid's and torch-fidelity's figure, computed another way. With centred features divided by √(N - 1) as A1
    and A2, the covariances are A1ᵀA1 and A2ᵀA2, and the trace of the square root of their product is the sum of the
    singular values of A1 A2ᵀ. That is exact for fewer samples than features too, where the covariances are singular and
    clean-fid's matrix square root is slow and inexact; and it needs no `scipy.linalg.sqrtm(disp=)`, which SciPy 1.18 has
    dropped and clean-fid calls.

    The value falls with N even for two samples of one distribution: compare at equal N only.

    Args:
        real, generated: (N, D) and (M, D).

    Returns:
        The distance, at least 0 up to rounding, in squared feature units.

    Raises:
        ValueError: on fewer than 2 samples, NaN, or unequal D.
    """
    real, generated = _check_features(real, generated, 2)
    difference = real.mean(axis=0) - generated.mean(axis=0)
    first, second = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (real, generated))
    traces = np.sum(first**2) + np.sum(second**2)
    # Orthogonal factors do not change singular values, so a tall A is replaced by its D x D triangle.
    first, second = (np.linalg.qr(a, mode="r") if len(a) > a.shape[1] else a for a in (first, second))
    root = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    return float(difference @ difference + traces - 2.0 * root)


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel `(x·y / D + 1)³` over all samples (KID).

    clean-fid and torch-fidelity average it over 100 random subsets of at most 1,000 samples, which bounds memory and adds
    noise. Where a subset is the whole set, as with equal N up to 1,000, they return this value; for larger sets they
    estimate it.

    Args:
        real, generated: (N, D) and (M, D).

    Returns:
        The squared discrepancy; an unbiased estimate of 0 is negative half the time.

    Raises:
        ValueError: on fewer than 2 samples, NaN, or unequal D.
    """
    real, generated = _check_features(real, generated, 2)

    def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
        return sum(((x[i : i + ROWS] @ y.T / x.shape[1] + 1.0) ** 3).sum() for i in range(0, len(x), ROWS))

    def within(x: np.ndarray) -> float:
        itself = ((np.sum(x**2, axis=1) / x.shape[1] + 1.0) ** 3).sum()
        return (kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))

    return float(within(real) + within(generated) - 2.0 * kernel_sum(real, generated) / (len(real) * len(generated)))


def neighbour_scores(real: np.ndarray, generated: np.ndarray, k: int = 3) -> dict[str, float]:
    """Precision, recall, density and coverage from balls around each sample that reach its k-th nearest neighbour.

    - precision: share of generated samples inside the ball of at least one real sample;
    - recall: share of real samples inside the ball of at least one generated sample;
    - density: number of real balls a generated sample lies in, over k, on average; may exceed 1;
    - coverage: share of real samples whose ball holds at least one generated sample.

    Precision and recall are torch-fidelity's; density and coverage are those of `prdc`. Distances are in float64, as an
    image beside its near-copy decides whole counts.

    Args:
        real, generated: (N, D) and (M, D).
        k: neighbours, the sample itself not counted. 3 is Kynkäänniemi's (and the paper's); Naeem used 5.

    Returns:
        dict with `precision`, `recall`, `density`, `coverage`.

    Raises:
        ValueError: on k < 1, fewer than k + 1 samples in either set, NaN, or unequal D.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    if k < 1:
        raise ValueError(f"k={k}: give at least 1 neighbour; the literature uses 3 or 5.")
    arrays = _check_features(real, generated, k + 1)
    real, generated = (torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)
    precision, recall = calculate_precision_recall_part(generated, real, neighborhood=k, batch_size=ROWS)
    inside, covered = 0, 0
    for part in real.split(ROWS):
        # The nearest of the k + 1 is the sample itself.
        radius = torch.cdist(part, real).kthvalue(k + 1).values
        within = torch.cdist(part, generated) < radius[:, None]
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
    return {
        "precision": precision,
        "recall": recall,
        "density": inside / (k * len(generated)),
        "coverage": covered / len(real),
    }


def feature_scores(real: np.ndarray, generated: np.ndarray, k: int = 3) -> dict[str, float]:
    """All six scores on features: [`frechet_distance`], [`kernel_distance`] and [`neighbour_scores`] in one dict."""
    return {
        "frechet_distance": frechet_distance(real, generated),
        "kernel_distance": kernel_distance(real, generated),
        **neighbour_scores(real, generated, k),
    }


def subject_pairs(subjects: Sequence[str], num_pairs: int, seed: int = 0) -> np.ndarray:
    """Random pairs of images of *different subjects*, every subject equally often, whatever its number of images.

    In each round subjects are put in a random order and taken two by two, each with one of its images at random.

    Args:
        subjects: the N subject names, one an image.
        num_pairs: pairs to draw.
        seed: seed of the draw.

    Returns:
        int array (num_pairs, 2) of image indices.

    Raises:
        ValueError: on fewer than 2 subjects.
    """
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"subjects holds {len(names)} subject: pairs of different subjects need at least 2.")
    rng = np.random.default_rng(seed)
    images = [np.flatnonzero(owner == s) for s in range(len(names))]
    pairs: list[list[int]] = []
    while len(pairs) < num_pairs:
        order = rng.permutation(len(names))
        pairs += [[rng.choice(images[a]), rng.choice(images[b])] for a, b in zip(order[::2], order[1::2], strict=False)]
    return np.array(pairs[:num_pairs])


def ssim_window(side: int) -> int:
    """Width in pixels of the MS-SSIM window: 11 from 161 pixels on, and for smaller images the widest odd one that
    still fits the coarsest of the five scales, at least 3 (64 pixels: 3; 128: 7).

    Args:
        side: the shorter side of the images.

    Raises:
        ValueError: below 33 pixels, where five scales do not fit.
    """
    if side <= 32:
        raise ValueError(f"images are {side} pixels wide: MS-SSIM has five scales and needs at least 33.")
    return max(width for width in range(3, 12, 2) if (width - 1) * 16 < side)


def pair_similarity(images: np.ndarray, pairs: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """MS-SSIM (Wang et al. 2003) of pairs of images, through pytorch-msssim; five scales, the usual weights.

    Args:
        images: uint8 (N, H, W), 0-255, at least 33 pixels wide. The window is that of [`ssim_window`].
        pairs: int (P, 2), indices of images.
        batch_size: pairs at a time.

    Returns:
        float array (P,) in [0, 1]; 1 for equal images.

    Raises:
        TypeError, ValueError: see [`~dldm_pipeline.metrics.features.check_images`] and [`ssim_window`].
    """
    from pytorch_msssim import ms_ssim

    check_images(images)
    window = ssim_window(min(images.shape[1:]))
    values = []
    for part in np.array_split(pairs, max(1, -(-len(pairs) // batch_size))):
        first, second = (torch.from_numpy(images[part[:, side]]).float()[:, None] for side in (0, 1))
        values.append(ms_ssim(first, second, data_range=255, win_size=window, size_average=False).numpy())
    return np.concatenate(values).astype(np.float64)


def diversity(images: np.ndarray, subjects: Sequence[str], num_pairs: int = 1000, seed: int = 0) -> float:
    """Mean MS-SSIM over random pairs of different subjects: the more alike they are, the higher. No best value: read it
    against that of real images; well above means that the model repeats itself.

    Args:
        images: uint8 (N, H, W) of one modality.
        subjects: the N subject names.
        num_pairs: pairs to average over.
        seed: seed of [`subject_pairs`].

    Returns:
        Value in [0, 1].
    """
    return float(pair_similarity(images, subject_pairs(subjects, num_pairs, seed)).mean())


def auc(real: np.ndarray, generated: np.ndarray) -> float:
    """Probability that a generated sample has a higher value than a real one, ties counted half (Mann and Whitney).

    Args:
        real, generated: values (N,) and (M,).

    Returns:
        Area under the ROC curve in [0, 1]; NaN if a set is empty.
    """
    from scipy.stats import rankdata

    if len(real) == 0 or len(generated) == 0:
        return float("nan")
    ranks = rankdata(np.concatenate([real, generated]))[len(real) :]
    return float((ranks.sum() - len(generated) * (len(generated) + 1) / 2) / (len(real) * len(generated)))


def _held_out(real: Sequence[str], generated: Sequence[str], share: float, seed: int) -> set[str]:
    """Names of the subjects to test on: `share` of each set; a name in both sets is on one side only."""
    rng = np.random.default_rng(seed)
    first = np.unique(np.asarray(real))
    second = np.setdiff1d(np.unique(np.asarray(generated)), first)
    chosen: set[str] = set()
    for title, names in (("real", first), ("generated", second)):
        if len(names) == 0:  # all generated names are real ones too
            continue
        if len(names) < 2:
            raise ValueError(
                f"{title} holds {len(names)} subject: the two-sample test needs at least 2, one to learn from "
                "and one to be tested on."
            )
        count = min(max(1, round(share * len(names))), len(names) - 1)
        chosen.update(rng.permutation(names)[:count].tolist())
    return chosen


def two_sample_scores(
    real: np.ndarray,
    generated: np.ndarray,
    real_subjects: Sequence[str],
    generated_subjects: Sequence[str],
    epochs: int = 6,
    batch_size: int = 32,
    held_out: float = 0.3,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains a small CNN to tell generated from real images and scores those of held-out subjects.

    Three convolutions with batch norm (8x8 with stride 4 and 32 channels, then twice 3x3 with stride 2 and 64), the mean
    over the grid and one linear layer; AdamW with a one-cycle rate. Small on purpose: it finds what is plainly wrong. The
    same seed gives the same scores on the same machine and number of threads; the caller's random state is left as it was.

    Args:
        real, generated: uint8 (N, H, W) and (M, H, W) of one modality.
        real_subjects, generated_subjects: N and M subject names. All images of a subject fall on one side.
        epochs: passes over the training images.
        batch_size: images a step.
        held_out: share of the subjects to test on.
        seed: seed of split, initial weights and order.

    Returns:
        (N,) and (M,) float arrays: the logit for "generated" of held-out images, NaN for those trained on.

    Raises:
        TypeError, ValueError: see [`~dldm_pipeline.metrics.features.check_images`]; ValueError on fewer than 2 subjects
            in a set, or unequal image sizes.
    """
    check_images(real, "real")
    check_images(generated, "generated")
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(f"real images are {real.shape[1:]} and generated {generated.shape[1:]}: give equal sizes.")
    tested = _held_out(real_subjects, generated_subjects, held_out, seed)
    is_tested = np.isin(np.concatenate([np.asarray(real_subjects), np.asarray(generated_subjects)]), list(tested))
    label = np.r_[np.zeros(len(real)), np.ones(len(generated))].astype(np.float32)
    rows = np.flatnonzero(~is_tested)

    def batch(chosen: np.ndarray) -> torch.Tensor:
        first, second = chosen[chosen < len(real)], chosen[chosen >= len(real)] - len(real)
        pixels = np.empty((len(chosen), *real.shape[1:]), dtype=np.uint8)
        pixels[chosen < len(real)], pixels[chosen >= len(real)] = real[first], generated[second]
        return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1.0

    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[torch.nn.Module] = []
        # Wide, overlapping patches first: every pixel is seen, and the costly fine grid is left at once.
        for width_in, width, kernel, stride in ((1, 32, 8, 4), (32, 64, 3, 2), (64, 64, 3, 2)):
            layers += [torch.nn.Conv2d(width_in, width, kernel, stride, padding=(kernel - 1) // 2, bias=False)]
            layers += [torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 1))
    steps = epochs * -(-len(rows) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 1))
    model.train()
    for _ in range(epochs):
        order = rng.permutation(rows)
        for part in np.array_split(order, -(-len(order) // batch_size)):
            logits = model(batch(part))[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(label[part]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    model.eval()
    scores = np.full(len(label), np.nan)
    with torch.no_grad():
        for part in np.array_split(np.flatnonzero(is_tested), -(-int(is_tested.sum()) // 256)):
            scores[part] = model(batch(part))[:, 0].numpy()
    return scores[: len(real)], scores[len(real) :]


def two_sample_auc(
    real: np.ndarray,
    generated: np.ndarray,
    real_subjects: Sequence[str],
    generated_subjects: Sequence[str],
    epochs: int = 6,
    seed: int = 0,
) -> float:
    """Area under the ROC curve of [`two_sample_scores`] on held-out subjects: 0.5 cannot be told apart, 1 always.

    Args and errors: as in [`two_sample_scores`].
    """
    first, second = two_sample_scores(real, generated, real_subjects, generated_subjects, epochs=epochs, seed=seed)
    return auc(first[~np.isnan(first)], second[~np.isnan(second)])


def half_samples(subjects: Sequence[str], count: int, seed: int = 0) -> list[np.ndarray]:
    """Random halves of the subjects, drawn without replacement, as masks over images.

    Odd numbers are rounded up and down by turns.

    Args:
        subjects: the N subject names, one an image.
        count: number of halves.
        seed: seed of the draw.

    Returns:
        `count` bool arrays (N,).
    """
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    rng = np.random.default_rng(seed)
    halves = []
    for i in range(count):
        chosen = np.zeros(len(names), dtype=bool)
        chosen[rng.permutation(len(names))[: (len(names) + i % 2) // 2]] = True
        halves.append(chosen[owner])
    return halves


def _interval(value: float, resampled: np.ndarray, confidence: float, limits: tuple[float, float]) -> tuple:
    """(low, high) around `value` from the spread of resampled values; (None, None) where there is no spread to see."""
    known = resampled[np.isfinite(resampled)]
    if len(known) < 2 or not np.isfinite(value):
        return None, None
    tail = (1.0 - confidence) / 2.0
    low, high = value + np.quantile(known, [tail, 1.0 - tail]) - known.mean()
    return float(np.clip(low, *limits)), float(np.clip(high, *limits))


def _compare(
    real: dict,
    other: dict,
    modalities: Sequence[str],
    k: int,
    num_resamples: int,
    confidence: float,
    num_pairs: int,
    epochs: int,
    seed: int,
    progress: bool,
    desc: str,
) -> dict:
    """Scores `other` against `real` in every modality; both hold, by modality, the lists made in `evaluate_fidelity`."""
    values: dict[str, list[float]] = {}
    resampled: dict[str, list[np.ndarray]] = {}
    bar = tqdm(total=len(modalities) * (1 + num_resamples), desc=desc, disable=not progress)

    for name in modalities:
        x, y = real[name], other[name]
        # One seed for all modalities: where they show the same subjects they are resampled together, so the interval of
        # the average over modalities is right although the modalities of a subject are no independent samples.
        halves_x, halves_y = (half_samples(s["subjects"], num_resamples, seed + i) for i, s in enumerate((x, y)))
        own: dict[str, float] = feature_scores(x["features"], y["features"], k)
        if x["neighbour_features"] is not None:
            own.update(neighbour_scores(x["neighbour_features"], y["neighbour_features"], k))
        if num_pairs:
            pairs = subject_pairs(y["subjects"], num_pairs, seed)
            similarity = pair_similarity(y["images"][y["rows"]], pairs)
            own["diversity"] = float(similarity.mean())
        if epochs:
            images = (s["images"][s["rows"]] for s in (x, y))
            logits = two_sample_scores(*images, x["subjects"], y["subjects"], epochs, seed=seed)
            own["two_sample_auc"] = auc(*(part[~np.isnan(part)] for part in logits))
        bar.update()

        drawn: dict[str, list[float]] = {score: [] for score in own}
        for a, b in zip(halves_x, halves_y, strict=True):
            if min(a.sum(), b.sum()) > k:
                part = feature_scores(x["features"][a], y["features"][b], k)
                if x["neighbour_features"] is not None:
                    part.update(neighbour_scores(x["neighbour_features"][a], y["neighbour_features"][b], k))
            else:
                part = dict.fromkeys(SCORES, np.nan)
            if num_pairs:
                inside = b[pairs].all(axis=1)
                part["diversity"] = float(similarity[inside].mean()) if inside.any() else np.nan
            if epochs:
                # Only held-out images have a logit; half of their subjects are in the half-sample on average.
                here = (logit[half & ~np.isnan(logit)] for logit, half in zip(logits, (a, b), strict=True))
                part["two_sample_auc"] = auc(*here)
            for score in own:
                drawn[score].append(part[score])
            bar.update()
        for score, value in own.items():
            values.setdefault(score, []).append(value)
            resampled.setdefault(score, []).append(np.array(drawn[score]))
    bar.close()

    result: dict[str, dict] = {}
    for score in values:
        entries = list(zip(modalities, values[score], resampled[score], strict=True))
        entries.append(("mean", float(np.mean(values[score])), np.mean(resampled[score], axis=0)))
        result[score] = {}
        for name, value, spread in entries:
            low, high = _interval(value, spread, confidence, SCORES[score][1])
            result[score][name] = {"value": float(value), "low": low, "high": high}
    return result


def evaluate_fidelity(
    real: np.ndarray,
    generated: np.ndarray,
    modalities: Sequence[str],
    extractor: FeatureExtractor,
    real_subjects: Sequence[str],
    generated_subjects: Sequence[str] | None = None,
    second_real: np.ndarray | None = None,
    second_subjects: Sequence[str] | None = None,
    real_present: np.ndarray | None = None,
    generated_present: np.ndarray | None = None,
    second_present: np.ndarray | None = None,
    neighbour_extractor: FeatureExtractor | None = None,
    floor: dict | None = None,
    k: int = 3,
    num_resamples: int = 50,
    confidence: float = 0.95,
    num_pairs: int = 1000,
    epochs: int = 6,
    window: str = "1 of the [0, 1] window of each volume is 255",
    cache: str | os.PathLike | None = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> dict:
    """Every score of generated against real images, per modality and averaged, beside the real-against-real floor.

    **Floor.** The same scores for a second set of real images, of other subjects, in place of the generated ones. Without
    `second_real`, the real *subjects* are split into two halves at random: one is what everything is compared with, the
    other is the floor. Either way the generated set and the floor are cut to the same number of images in each modality
    (a random choice), because all of these figures depend on it.

    **Intervals.** Subjects of both sets are resampled, and every score on features is computed anew. The resampling is by
    random halves without replacement (the delete-half jackknife of Shao and Wu 1989), whose deviations have the variance
    of the full sample. The ordinary bootstrap would not do: a subject drawn twice is its own nearest neighbour at
    distance 0, which ruins every k-th neighbour distance, and repeats inflate the Fréchet distance. The interval is the
    full sample's value plus the quantiles of the deviations from their mean. For the two-sample test the network is not
    trained again: the interval is that of testing on other subjects. For diversity, pairs inside the half are averaged,
    which errs on the wide side. Subjects of the modalities are resampled together.

    Memory: images are read in batches, and distances and kernels in blocks of rows, so beyond the images themselves it
    grows by the features alone.

    Args:
        real, generated: uint8 (N, n, H, W) and (M, n, H, W), 0-255, as [`~dldm_pipeline.metrics.features.to_uint8`]
            makes them.
        modalities: the n names.
        extractor: from [`~dldm_pipeline.metrics.features.load_extractor`].
        real_subjects: N subject names.
        generated_subjects: M subject names; None if each image is a subject of its own, as generated ones are.
        second_real, second_subjects: uint8 (K, n, H, W) and K subject names: a second real sample for the floor.
        real_present, generated_present, second_present: bool (N, n) and so on; None if all modalities are there.
        neighbour_extractor: another network for precision, recall, density and coverage, as the literature has them on
            VGG16; None for the same one.
        floor: `["floor"]` of an earlier result for the same real images, number of generated ones and settings, so that
            it is not computed again for each compared system; refused if its counts or settings differ.
        k: neighbours.
        num_resamples: half-samples for the intervals; 0 for none.
        confidence: share of the deviations inside the interval.
        num_pairs: pairs for the diversity; 0 leaves it out. Images under 33 pixels have none.
        epochs: of the two-sample test's network; 0 leaves the test out.
        window: how intensities were scaled, for the report.
        cache: folder of cached features, or None.
        batch_size: images per forward pass of the extractors.
        progress: show progress bars.
        seed: seed of all random choices.

    Returns:
        dict of plain numbers:

        - `scores`: score → modality, or `mean` for their average → `value`, `low`, `high` (None without interval). Scores
          are the keys of `SCORES`.
        - `floor`: `scores` of the same form, `source` (what the second real set was), `settings`, `num_images`
        - `diversity_real`: modality or `mean` → mean MS-SSIM of the real images (None without diversity)
        - `num_images`: modality → `real`, `generated`, `floor`; `num_subjects`: the same
        - `extractor`, `neighbour_extractor`: see [`~dldm_pipeline.metrics.features.FeatureExtractor.describe`]
        - `titles`: what the two distances may be called; `best`: score → best value
        - `window`, `ssim_window`, `k`, `num_resamples`, `confidence`, `seed`, `modalities`

    Raises:
        TypeError: if images are not uint8.
        ValueError: on wrong shapes or counts, fewer than k + 1 images in a modality, fewer than 2 subjects.
    """
    sets = {
        "real": _as_set("real", real, real_subjects, real_present, modalities),
        "generated": _as_set("generated", generated, generated_subjects, generated_present, modalities),
    }
    if second_real is not None:
        sets["floor"] = _as_set("second_real", second_real, second_subjects, second_present, modalities)
        source = "a second real set"
    else:
        names = np.unique(sets["real"]["subjects"])
        if len(names) < 2:
            raise ValueError(
                f"real_subjects holds {len(names)} subject: the floor needs at least 2 to split by subject. "
                "Give more subjects, or a second_real set."
            )
        chosen = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
        second = np.isin(sets["real"]["subjects"], chosen)
        sets["floor"] = {**sets["real"], "rows": second}
        sets["real"] = {**sets["real"], "rows": ~second}
        source = "half of the real subjects against the other half"
    if len({s["images"].shape[2:] for s in sets.values()}) > 1:
        sizes = {title: s["images"].shape[2:] for title, s in sets.items()}
        raise ValueError(f"image sizes differ: {sizes}. Bring all sets to one size before they are compared.")
    side = min(real.shape[2:])
    num_pairs = num_pairs if side > 32 else 0

    # Which images of each set take part, per modality; a permutation of the rows shared by the modalities keeps subjects
    # with all modalities together.
    rng = np.random.default_rng(seed)
    order = {title: rng.permutation(len(s["images"])) for title, s in sets.items()}
    parts: dict[str, dict[str, dict]] = {title: {} for title in sets}
    for m, name in enumerate(modalities):
        rows = {t: order[t][(s["rows"] & s["present"][:, m])[order[t]]] for t, s in sets.items()}
        least = min(len(rows["generated"]), len(rows["floor"]))
        for title, s in sets.items():
            chosen = np.sort(rows[title] if title == "real" else rows[title][:least])
            if len(chosen) < k + 1:
                raise ValueError(
                    f"{title} has {len(chosen)} images of {name}: k={k} neighbours need at least {k + 1}. "
                    "Give more subjects."
                )
            parts[title][name] = {"rows": chosen, "subjects": s["subjects"][chosen]}
    counts = {name: {title: len(parts[title][name]["rows"]) for title in sets} for name in modalities}
    settings = {
        "k": k, "num_resamples": num_resamples, "confidence": confidence, "num_pairs": num_pairs, "epochs": epochs,
        "seed": seed, "extractor": extractor.weights_hash,
        "neighbour_extractor": (neighbour_extractor or extractor).weights_hash,
    }  # fmt: skip
    if floor is not None and (
        floor["settings"] != settings
        or floor["source"] != source
        or any(floor["num_images"][name] != {t: counts[name][t] for t in ("real", "floor")} for name in modalities)
    ):
        raise ValueError(
            "floor was measured with other settings or numbers of images; leave it out to measure it anew."
        )

    for title, s in sets.items():
        for m, name in enumerate(modalities):
            part = parts[title][name]
            # All rows of a set are featurised, whatever the choice above: the cache then serves any choice.
            present = np.flatnonzero(s["present"][:, m])
            part["images"] = s["images"][:, m]  # a view: images are copied one modality at a time, where they are used
            images = part["images"] if len(present) == len(part["images"]) else part["images"][present]
            where = np.searchsorted(present, part["rows"])
            for key, network in (("features", extractor), ("neighbour_features", neighbour_extractor)):
                part[key] = None
                if network is not None and not (title == "floor" and floor is not None):
                    desc = f"{network.name}: {title} {name}"
                    part[key] = network(images, batch_size, cache, progress, desc)[where]

    options = (modalities, k, num_resamples, confidence, num_pairs, epochs, seed, progress)
    scores = _compare(parts["real"], parts["generated"], *options, "score")
    if floor is None:
        floor = {
            "scores": _compare(parts["real"], parts["floor"], *options, "floor"),
            "source": source,
            "settings": settings,
            "num_images": {name: {t: counts[name][t] for t in ("real", "floor")} for name in modalities},
        }
    real_diversity = None
    if num_pairs:
        real_diversity = {
            name: diversity(part["images"][part["rows"]], part["subjects"], num_pairs, seed)
            for name, part in parts["real"].items()
        }
        real_diversity["mean"] = float(np.mean(list(real_diversity.values())))
    return {
        "scores": scores,
        "floor": floor,
        "diversity_real": real_diversity,
        "num_images": counts,
        "num_subjects": {
            name: {title: len(np.unique(parts[title][name]["subjects"])) for title in sets} for name in modalities
        },
        "modalities": list(modalities),
        "extractor": extractor.describe(),
        "neighbour_extractor": (neighbour_extractor or extractor).describe(),
        "titles": {"frechet_distance": extractor.frechet_title, "kernel_distance": extractor.kernel_title},
        "best": {score: best for score, (best, _) in SCORES.items()},
        "window": window,
        "ssim_window": ssim_window(side) if num_pairs else None,
        "k": k,
        "num_resamples": num_resamples,
        "confidence": confidence,
        "seed": seed,
    }


def _as_set(
    title: str,
    images: np.ndarray,
    subjects: Sequence[str] | None,
    present: np.ndarray | None,
    modalities: Sequence[str],
) -> dict:
    """Checks one set of images and puts it with its subject names and presence into a dict."""
    if len(images.shape) != 4 or images.shape[1] != len(modalities):
        raise ValueError(
            f"{title} has shape {tuple(images.shape)}: needed are (N, {len(modalities)}, H, W), one channel for each of "
            f"{', '.join(modalities)}. Give the modalities in this order and leave out masks and colour channels."
        )
    if images.dtype != np.uint8:
        check_images(images[:1, 0], title)
    count = len(images)
    names = np.array([f"{title}-{i}" for i in range(count)] if subjects is None else [str(s) for s in subjects])
    present = np.ones(images.shape[:2], dtype=bool) if present is None else np.asarray(present, dtype=bool)
    if len(names) != count or present.shape != images.shape[:2]:
        raise ValueError(
            f"{title} has {count} images, {len(names)} subject names and presence of shape {present.shape}: "
            "give one name and one row of presence for each image."
        )
    return {"images": images, "subjects": names, "present": present, "rows": np.ones(count, dtype=bool)}


def range_sweep(
    extractor: FeatureExtractor,
    real: np.ndarray,
    generated: np.ndarray,
    white: Sequence[float] = (255.0, 128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0),
    batch_size: int = 8,
    progress: bool = True,
) -> dict:
    """Fréchet distance of the same two sets of images when white is 255, as the networks expect, down to 1.

    White at 1 is the mistake of giving [0, 1] images to clean-fid. It normalises by (x - 128) / 128, so all of them lie
    within 1/128 of one value and the features with them. Were the features linear in the intensities, the distance would
    shrink 255² = 65,025 times. Measured with EfficientNet-Lite0, which normalises in the same way up to one intensity,
    on 150 against 150 simulated T1 slices: 19.0 for two real halves becomes 0.00026 (73,889 times smaller), and 61.0 for
    real against blurred ones becomes 0.0083 (7,361 times). The paper's clean-FID of 0.0007 is probably of that kind. As
    the factor differs from pair to pair (the ratio of those two distances goes from 3.2 to 32), the *ratio* of two
    systems measured with the same mistake is not their right ratio either.

    Args:
        extractor: any of them; what it shows is its own factor, not another network's.
        real, generated: uint8 (N, H, W) and (M, H, W), 0-255.
        white: intensities that white is brought to.
        batch_size: images per forward pass.
        progress: show a progress bar.

    Returns:
        dict with `white` (list), `frechet_distance` (list), `shrink_factor` (the distance at 255 over that at 1),
        `linear_factor` (65,025) and `extractor` (its title).

    Raises:
        TypeError, ValueError: see [`~dldm_pipeline.metrics.features.check_images`]; ValueError if `white` lacks 255 or 1.
    """
    check_images(real, "real")
    check_images(generated, "generated")
    white = [float(value) for value in white]
    if 255.0 not in white or 1.0 not in white:
        raise ValueError(f"white={white}: it must hold 255 and 1, whose distances give the factor.")
    distances = []
    for value in tqdm(white, desc="range", disable=not progress):
        sets = (_Scaled(images, value / 255.0) for images in (real, generated))
        distances.append(frechet_distance(*(extractor._compute(images, batch_size) for images in sets)))
    return {
        "white": white,
        "frechet_distance": distances,
        "shrink_factor": distances[white.index(255.0)] / distances[white.index(1.0)],
        "linear_factor": 255.0**2,
        "extractor": extractor.title,
    }


class _Scaled:
    """Images times a factor, scaled as they are read, so that no float copy of the whole set is made."""

    def __init__(self, images: np.ndarray, factor: float) -> None:
        self.images, self.factor = images, factor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.images[rows].astype(np.float32) * np.float32(self.factor)


def plot_range_sweep(result: dict, path: str | os.PathLike) -> Path:
    """Figure of [`range_sweep`]: distance against the intensity of white, both logarithmic, with the linear law beside.

    Args:
        result: from [`range_sweep`].
        path: where to write it; the ending (.png, .svg) sets the format.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    white, distance = np.array(result["white"]), np.array(result["frechet_distance"])
    figure = Figure(figsize=(5.0, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(white, distance, "o-", label=result["extractor"])
    law = distance[white == 255.0][0] * (white / 255.0) ** 2
    axes.loglog(white, law, ":", color="grey", label="features linear in intensity")
    axes.set_xlabel("intensity of white (255 expected; 1 is [0, 1] images)")
    axes.set_ylabel("Fréchet distance")
    axes.set_title(f"[0, 1] images: {result['shrink_factor']:,.0f} times too small")
    axes.legend()
    figure.savefig(path, dpi=150)
    return Path(path)
