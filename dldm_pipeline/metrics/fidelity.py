"""How close generated images come to real ones, as sets: fidelity and diversity, each beside what real images score.

On features (see `features.py`), each a plain function of two arrays (N, D):

- [`frechet_distance`]: distance of two Gaussians fitted to the features (Heusel et al. 2017); 0 is best. On Inception-v3
  with clean-fid's resizing it is clean-FID (Parmar et al. 2022).
- [`kernel_distance`]: unbiased squared MMD with a cubic kernel, clean-KID (Bińkowski et al. 2018); 0 is best.
- [`neighbour_scores`]: improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

[`evaluate_fidelity`] gives them, the diversity (`diversity.py`) and the two-sample test (`two_sample.py`), per modality
and averaged, with intervals over subjects, beside those of a second real sample of the same size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from .diversity import diversity, pair_similarity, ssim_window, subject_pairs
from .features import FeatureExtractor
from .images import Slices
from .two_sample import auc, two_sample_scores

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
NEIGHBOURS = 3  # k of Kynkäänniemi et al. and of the paper; Naeem et al. used 5
CONFIDENCE = 0.95  # of the intervals
ROWS = 1024  # of a distance or kernel matrix held at a time, so that memory grows with N and not with N²


def _check_features(real: np.ndarray, generated: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, or one clear error."""
    real, generated = np.asarray(real, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"real has shape {real.shape} and generated {generated.shape}: give (N, D) of one extractor.")
    for name, features in (("real", real), ("generated", generated)):
        if len(features) < least:
            raise ValueError(f"{name} has {len(features)} samples: give at least {least}.")
        bad = (~np.isfinite(features)).any(axis=1).sum()
        if bad:
            raise ValueError(f"{name}: {bad} of {len(features)} feature rows hold NaN or infinity; check the images.")
    return real, generated


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance `|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)` of the Gaussians fitted to two sets of features.

    It is clean-fid's and torch-fidelity's figure, computed another way. With centred features divided by √(N - 1) as A1
    and A2, the covariances are A1ᵀA1 and A2ᵀA2, and the trace of the square root of their product is the sum of the
    singular values of A1 A2ᵀ: exact where covariances are singular, too. clean-fid's own function does not run with SciPy
    1.18. `real` is (N, D) and `generated` (M, D). Compare at equal N only: the value falls with N.

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

    clean-fid and torch-fidelity average it over 100 random subsets of at most 1,000 samples: the same value for equal N up
    to 1,000, and an estimate of it for larger sets. An unbiased estimate of 0 is negative half the time. Arguments and
    errors are those of [`frechet_distance`].
    """
    real, generated = _check_features(real, generated, 2)

    def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
        return sum(((x[i : i + ROWS] @ y.T / x.shape[1] + 1.0) ** 3).sum() for i in range(0, len(x), ROWS))

    def within(x: np.ndarray) -> float:
        itself = ((np.sum(x**2, axis=1) / x.shape[1] + 1.0) ** 3).sum()
        return (kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))

    return float(within(real) + within(generated) - 2.0 * kernel_sum(real, generated) / (len(real) * len(generated)))


def neighbour_scores(real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage from balls around each sample that reach its k-th nearest neighbour.

    - precision: fraction of generated samples inside the ball of at least one real sample;
    - recall: fraction of real samples inside the ball of at least one generated sample;
    - density: number of real balls a generated sample lies in, over k, on average; may exceed 1;
    - coverage: fraction of real samples whose ball holds at least one generated sample.

    Precision and recall are torch-fidelity's; density and coverage are those of `prdc`. The sample itself is not counted
    in k. Raises a ValueError on fewer than k + 1 samples in either set, NaN, or unequal D.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    arrays = _check_features(real, generated, k + 1)
    real, generated = (torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)
    precision, recall = calculate_precision_recall_part(generated, real, neighborhood=k, batch_size=ROWS)
    inside = covered = 0
    for part in real.split(ROWS):
        # The nearest of the k + 1 is the sample itself.
        radius = torch.cdist(part, real).kthvalue(k + 1).values
        within = torch.cdist(part, generated) < radius[:, None]
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
    density, coverage = inside / (k * len(generated)), covered / len(real)
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


def feature_scores(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """All six scores on features: [`frechet_distance`], [`kernel_distance`] and [`neighbour_scores`] in one dict."""
    distances = {"frechet_distance": frechet_distance(real, generated)}
    return distances | {"kernel_distance": kernel_distance(real, generated)} | neighbour_scores(real, generated)


def half_samples(subjects: Sequence[str], count: int, seed: int = 0) -> list[np.ndarray]:
    """`count` random halves of the subjects, as bool masks (N,) over their images; odd numbers are rounded by turns."""
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    rng = np.random.default_rng(seed)
    halves = []
    for i in range(count):
        chosen = np.zeros(len(names), dtype=bool)
        chosen[rng.permutation(len(names))[: (len(names) + i % 2) // 2]] = True
        halves.append(chosen[owner])
    return halves


@dataclass
class _Sample:
    """What takes part of one set in one modality."""

    images: np.ndarray
    subjects: np.ndarray
    features: list[np.ndarray]  # one array a network


def _scores(
    real: _Sample, other: _Sample, num_resamples: int, num_pairs: int, epochs: int, seed: int
) -> dict[str, list[float]]:
    """Score → its value on the full samples, then its values on half-samples."""
    if num_pairs:
        pairs = subject_pairs(other.subjects, num_pairs, seed)
        similarity = pair_similarity(other.images, pairs)
    if epochs:
        logits = two_sample_scores(real.images, other.images, real.subjects, other.subjects, epochs, seed)

    def measure(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        scores = dict.fromkeys(list(SCORES)[:6], np.nan)
        if min(a.sum(), b.sum()) > NEIGHBOURS:
            scores = feature_scores(real.features[0][a], other.features[0][b])
            if len(real.features) == 2:
                scores |= neighbour_scores(real.features[1][a], other.features[1][b])
        if num_pairs:
            inside = b[pairs].all(axis=1)
            scores["diversity"] = float(similarity[inside].mean()) if inside.any() else np.nan
        if epochs:
            # Only held-out images have a logit; half of their subjects are in the half-sample on average.
            scores["two_sample_auc"] = auc(logits[0][a], logits[1][b])
        return scores

    # One seed for all modalities: their subjects are resampled together, as modalities of a subject are not independent.
    halves = (half_samples(s.subjects, num_resamples, seed + i) for i, s in enumerate((real, other)))
    whole = tuple(np.ones(len(s.subjects), dtype=bool) for s in (real, other))
    measured = [measure(*parts) for parts in [whole, *zip(*halves, strict=True)]]
    return {score: [one[score] for one in measured] for score in measured[0]}


def _interval(values: np.ndarray, limits: tuple[float, float]) -> dict[str, float | None]:
    """`value`, the first one, and `low` and `high` from the others, the resampled ones; None where there are too few."""
    known = values[1:][np.isfinite(values[1:])]
    low = high = None
    if len(known) >= 2 and np.isfinite(values[0]):
        tail = (1.0 - CONFIDENCE) / 2.0
        ends = values[0] + np.quantile(known, [tail, 1.0 - tail]) - known.mean()
        low, high = np.clip(ends, *limits).tolist()
    return {"value": float(values[0]), "low": low, "high": high}


def evaluate_fidelity(
    real: Slices,
    generated: Slices,
    modalities: Sequence[str],
    extractor: FeatureExtractor,
    second: Slices | None = None,
    neighbour_extractor: FeatureExtractor | None = None,
    floor: dict | None = None,
    num_resamples: int = 50,
    num_pairs: int = 1000,
    epochs: int = 6,
    cache: str | os.PathLike | None = None,
    seed: int = 0,
) -> dict:
    """Every score of generated against real images, per modality and averaged, beside the real-against-real floor.

    **Floor.** The same scores for a second set of real images, of other subjects, in place of the generated ones. Without
    `second`, the real *subjects* are split into two halves at random: everything is compared with one half, and the other
    is the floor. The generated set and the floor are cut to the same number of images in each modality, at random.

    **Intervals.** Subjects of both sets are resampled by random halves without replacement (the delete-half jackknife of
    Shao and Wu 1989), whose deviations have the variance of the full sample; with replacement, a repeated subject would be
    its own nearest neighbour. The two-sample test's network is not trained again: its interval is that of testing on other
    subjects. For diversity, pairs inside the half are averaged: the interval is too wide rather than too narrow.

    Args:
        real, generated: slices of the n modalities. A generated image is usually a subject of its own (no `subjects`).
        modalities: the n names.
        extractor, neighbour_extractor: the latter, such as VGG16, for [`neighbour_scores`]; None for the same one.
        second: a second real sample, of other subjects, for the floor.
        floor: `["floor"]` of an earlier result, to save time; refused if its numbers of images or settings differ.
        num_resamples: half-samples for the 95 % intervals; 0 for none.
        num_pairs: pairs for the diversity; 0 leaves it out. Images under 33 pixels have none.
        epochs: of the two-sample test's network; 0 leaves the test out.
        cache: folder of cached features, or None.
        seed: of all random choices.

    Returns:
        dict of plain numbers:

        - `scores`: key of `SCORES` → modality, or `mean` for their average → `value`, `low`, `high` (None if unknown)
        - `floor`: `scores` of the same form, `source` (what the second real set was), `settings`, `num_images`
        - `diversity_real`: modality or `mean` → mean MS-SSIM of the real images (None without diversity)
        - `num_images`: modality → `real`, `generated`, `floor`; `num_subjects`: the same
        - `extractor`, `neighbour_extractor`: see [`~dldm_pipeline.metrics.features.FeatureExtractor.describe`]
        - `titles`: what the two distances may be called; `best`: score → best value
        - `window` (how intensities were scaled), `ssim_window`, `k`, `num_resamples`, `confidence`, `seed`, `modalities`

    Raises:
        ValueError: on wrong shapes or counts, fewer than 4 images in a modality, fewer than 2 subjects.
    """
    sets = {"real": real, "generated": generated, "floor": real if second is None else second}
    for title, slices in sets.items():
        slices.check_modalities(modalities, title)
    sizes = {title: slices.images.shape[2:] for title, slices in sets.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"image sizes differ: {sizes}. Bring all sets to one size before they are compared.")
    subjects = {title: slices.names(title) for title, slices in sets.items()}
    eligible = {title: np.ones(len(slices), dtype=bool) for title, slices in sets.items()}
    source = "a second real set"
    if second is None:
        source = "half of the real subjects against the other half"
        subjects["floor"] = subjects["real"]
        names = np.unique(subjects["real"])
        if len(names) < 2:
            raise ValueError("real has 1 subject: the floor needs at least 2. Give more, or a second real set.")
        eligible["floor"] = np.isin(subjects["real"], np.random.default_rng(seed).permutation(names)[: len(names) // 2])
        eligible["real"] = ~eligible["floor"]
    side = min(sizes["real"])
    num_pairs = num_pairs if side > 32 else 0

    # Which images of each set take part, per modality. The modalities share one permutation: subjects stay together.
    rng = np.random.default_rng(seed)
    order = {title: rng.permutation(len(slices)) for title, slices in sets.items()}
    rows: dict[str, dict[str, np.ndarray]] = {}
    for m, name in enumerate(modalities):
        found = {t: order[t][(eligible[t] & s.present[:, m])[order[t]]] for t, s in sets.items()}
        least = min(len(found["generated"]), len(found["floor"]))
        rows[name] = {t: np.sort(chosen if t == "real" else chosen[:least]) for t, chosen in found.items()}
        for title, chosen in found.items():
            if len(rows[name][title]) <= NEIGHBOURS:
                needed = f"k={NEIGHBOURS} needs at least {NEIGHBOURS + 1}"
                raise ValueError(f"{title} has {len(chosen)} images of {name}: {needed}.")
    counts = {name: {title: len(chosen) for title, chosen in each.items()} for name, each in rows.items()}
    options = {"num_resamples": num_resamples, "num_pairs": num_pairs, "epochs": epochs, "seed": seed}
    networks = {"extractor": extractor, "neighbour_extractor": neighbour_extractor or extractor}
    used = [extractor] if neighbour_extractor is None else [extractor, neighbour_extractor]
    hashes = {name: network.weights_hash for name, network in networks.items()}
    conditions = {
        "source": source,
        "settings": {"k": NEIGHBOURS, **options, "confidence": CONFIDENCE, **hashes},
        "num_images": {name: {title: counts[name][title] for title in ("real", "floor")} for name in modalities},
    }
    if floor is not None and {key: floor[key] for key in conditions} != conditions:
        raise ValueError("floor was measured with other settings or numbers of images: leave it out.")

    def sample(title: str, m: int, name: str) -> _Sample:
        chosen, slices = rows[name][title], sets[title]
        # All images of a set go through the network, so that the cache serves any choice of rows.
        present = np.flatnonzero(slices.present[:, m])
        where, images = np.searchsorted(present, chosen), slices.images[present, m]
        features = [network(images, cache, f"{network.name}: {title} {name}")[where] for network in used]
        return _Sample(images[where], subjects[title][chosen], features)

    def compare(title: str) -> dict[str, dict]:
        """Score → modality, or `mean` → value and interval."""
        names = enumerate(tqdm(modalities, desc=f"score: {title}"))
        each = {name: _scores(real_samples[name], sample(title, m, name), **options) for m, name in names}
        result = {}
        for score in each[modalities[0]]:
            entries = {name: np.array(one[score]) for name, one in each.items()}
            entries["mean"] = np.mean(list(entries.values()), axis=0)
            result[score] = {name: _interval(values, SCORES[score][1]) for name, values in entries.items()}
        return result

    real_samples = {name: sample("real", m, name) for m, name in enumerate(modalities)}
    scores = compare("generated")
    if floor is None:
        floor = {"scores": compare("floor"), **conditions}
    real_diversity = None
    if num_pairs:
        each = {name: diversity(one.images, one.subjects, num_pairs, seed) for name, one in real_samples.items()}
        real_diversity = each | {"mean": float(np.mean(list(each.values())))}
    return {
        "scores": scores,
        "floor": floor,
        "diversity_real": real_diversity,
        "num_images": counts,
        "num_subjects": {
            name: {title: len(np.unique(subjects[title][chosen])) for title, chosen in each.items()}
            for name, each in rows.items()
        },
        "modalities": list(modalities),
        **{name: network.describe() for name, network in networks.items()},
        "titles": extractor.titles,
        "best": {score: best for score, (best, _) in SCORES.items()},
        "window": "1 of the [0, 1] window of each volume is 255",
        "ssim_window": ssim_window(side) if num_pairs else None,
        "k": NEIGHBOURS,
        "num_resamples": num_resamples,
        "confidence": CONFIDENCE,
        "seed": seed,
    }
