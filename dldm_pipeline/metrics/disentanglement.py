"""Where the information sits: on the modality in z_style and not in z_struct, on the subject in z_struct and not in z_style.

- [`modality_probe`]: a linear probe (logistic regression) is trained on one half of the *subjects* to name the modality a
  code came from, and tested on the other half. Style codes should be told apart always; structure codes, each encoded
  from one modality alone, no better than by guessing.
- [`subject_probe`]: who is it? The code of one modality looks for its own subject among the codes of another modality.
  Structure codes should find it always; style codes hardly better than by guessing (not at all, where the appearances of
  a subject's modalities are independent; a dose of contrast agent shows in two of them).
- [`structure_agreement`]: how far the structures that two modalities of one subject give lie apart, over the distance
  between two subjects.

The swap test (styles exchanged) and cross-reconstruction (structure from one modality, style of another) need the decoder;
they are `psnr["exchanged"]` and `psnr["single"]` of [`~dldm_pipeline.metrics.reconstruction.evaluate_reconstruction`].
"""

from __future__ import annotations

from importlib import import_module
from itertools import combinations, permutations
from types import ModuleType

import numpy as np
import torch
from tqdm.auto import tqdm

from .reconstruction import EncodedSubjects, mean_over_subjects
from .two_sample import auc

# From strong to weak L2 regularisation (scikit-learn's C). The features are scaled so that their squared norm is about
# 1 whatever their number, which puts the best C for a few numbers and for many thousands in the same range.
REGULARISATION = (1e-2, 1e0, 1e2, 1e4)
# The same for ridge regression on standardised features (scikit-learn's alpha), from weak to strong.
PENALTIES = (1e-1, 1e1, 1e3, 1e5)


def _sklearn(module: str) -> ModuleType:
    """A module of scikit-learn, or one clear error."""
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            'The probes need scikit-learn, which is not installed: pip install "dldm_pipeline[eval]".'
        ) from error


def _check_subjects(subjects: list[str]) -> np.ndarray:
    """The different names, or one clear error where they are too few to split."""
    names = np.unique(subjects)
    if len(names) < 8:
        raise ValueError(
            f"The probes need at least 8 subjects to split by subject, got {len(names)}: give more held-out subjects."
        )
    return names


def pool_structure(codes: np.ndarray) -> np.ndarray:
    """Spatial mean and standard deviation of each channel.

    Args:
        codes: array of shape (..., c, h, w).

    Returns:
        Array of shape (..., 2c).
    """
    return np.concatenate([codes.mean(axis=(-2, -1)), codes.std(axis=(-2, -1))], axis=-1)


def modality_probe(
    codes: np.ndarray, subjects: list[str], present: np.ndarray | None = None, shuffle: bool = False, seed: int = 0
) -> dict:
    """Accuracy with which a linear probe names the modality of a code of an unseen subject.

    Subjects are split into two halves at random. A multinomial logistic regression with L2 penalty is trained on the
    standardised features of the first half and tested on the second, then the other way round, and the two accuracies
    are averaged. The penalty is the one of `REGULARISATION` with the highest accuracy in a three-fold cross-validation,
    by subject, inside the training half: the tested half chooses nothing.

    Features are rotated onto the span of the training codes before the fit. The weights of an L2-penalised linear model
    lie in that span, so this changes the speed alone, not the probe: it is no reduction of dimension that might discard
    a faint trace of the modality.

    Args:
        codes: array of shape (N, n, ...); each code is flattened.
        subjects: the N subject names; all codes of a subject fall into the same half.
        present: bool array (N, n), which codes exist; None for all.
        shuffle: exchange the modality labels at random within each slice. Nothing is left to find then; what the probe
            still scores is its chance level on these very codes.
        seed: seed of the split and of the shuffling.

    Returns:
        dict with `accuracy` (in [0, 1], mean of the two halves), `chance` (share of the commonest modality, 1/n if
        every subject has all), `recall` (list of n: share of each modality's codes that are named rightly), `features`
        (their number), `num_codes`.

    Raises:
        ImportError: without scikit-learn.
        ValueError: if there are fewer than 8 subjects.
    """
    LogisticRegression = _sklearn("linear_model").LogisticRegression
    GroupKFold = _sklearn("model_selection").GroupKFold
    codes = np.asarray(codes)
    count, n = codes.shape[:2]
    present = np.ones((count, n), dtype=bool) if present is None else np.asarray(present, dtype=bool)
    names = _check_subjects(subjects)
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(n), (count, 1))
    if shuffle:
        for row, here in zip(labels, present, strict=True):
            row[here] = rng.permutation(row[here])
    x = codes.reshape(count, n, -1)[present].astype(np.float64)
    y = labels[present]
    groups = np.repeat(np.asarray(subjects)[:, None], n, axis=1)[present]
    first_half = np.isin(groups, rng.permutation(names)[: len(names) // 2])

    accuracies, predicted = [], np.full(len(y), -1)
    for train in (first_half, ~first_half):
        centre, spread = x[train].mean(axis=0), x[train].std(axis=0)
        # A feature that never varies carries nothing; the square root brings the squared norm of a code to about 1.
        standardised = np.where(spread > 0, (x - centre) / np.where(spread > 0, spread, 1.0), 0.0) / np.sqrt(x.shape[1])
        if x.shape[1] > train.sum():
            standardised = standardised @ np.linalg.svd(standardised[train], full_matrices=False)[2].T

        def fit(rows: np.ndarray, c: float, features: np.ndarray = standardised) -> LogisticRegression:
            return LogisticRegression(C=c, max_iter=500, tol=1e-3).fit(features[rows], y[rows])

        rows = np.flatnonzero(train)
        scores = np.zeros(len(REGULARISATION))
        for inner, outer in GroupKFold(n_splits=3).split(rows, groups=groups[rows]):
            for i, c in enumerate(REGULARISATION):
                scores[i] += fit(rows[inner], c).score(standardised[rows[outer]], y[rows[outer]])
        probe = fit(rows, REGULARISATION[int(scores.argmax())])
        predicted[~train] = probe.predict(standardised[~train])
        accuracies.append(float(np.mean(predicted[~train] == y[~train])))
    return {
        "accuracy": float(np.mean(accuracies)),
        "chance": float(np.bincount(y, minlength=n).max() / len(y)),
        "recall": [float(np.mean(predicted[y == m] == m)) if np.any(y == m) else None for m in range(n)],
        "features": int(x.shape[1]),
        "num_codes": int(len(y)),
    }


def subject_probe(
    codes: np.ndarray, subjects: list[str], present: np.ndarray | None = None, linear: bool = False, seed: int = 0
) -> dict:
    """How often the code of one modality finds its own subject among the codes of another modality.

    Every code of modality A is a query, all codes of modality B are the gallery, and the most similar one (cosine) should
    be of the query's subject. Features are standardised within each modality first: what sets two modalities apart would
    hide the subject. It is well defined for one slice a subject and for many.

    Args:
        codes: array of shape (N, n, ...); each code is flattened.
        subjects: the N subject names.
        present: bool array (N, n), which codes exist; None for all.
        linear: predict the code of B from that of A by a ridge regression before the search, fitted on one half of the
            *subjects* and searching among the other half, both ways round. This also finds a subject that shows in other
            features of B than of A: the stricter test of codes that should *not* tell it.
        seed: seed of the split into halves.

    Returns:
        dict with

        - `accuracy`: in [0, 1], mean over ordered pairs of modalities
        - `accuracy_by_pair`: n lists of n, [query][gallery]; NaN for a modality and itself, and for two never both there
        - `chance`: share of the gallery that is of the query's subject, what a random pick scores
        - `auc`: probability that a code of the own subject is more similar than one of another; 0.5 is chance, whatever N
        - `features`: their number

    Raises:
        ImportError: without scikit-learn.
        ValueError: if there are fewer than 8 subjects.
    """
    RidgeCV = _sklearn("linear_model").RidgeCV
    cosine_similarity = _sklearn("metrics.pairwise").cosine_similarity
    codes = np.array(codes, dtype=np.float64)
    count, n = codes.shape[:2]
    codes = codes.reshape(count, n, -1)
    present = np.ones((count, n), dtype=bool) if present is None else np.asarray(present, dtype=bool)
    subjects, names = np.asarray(subjects), _check_subjects(subjects)
    half = np.isin(subjects, np.random.default_rng(seed).permutation(names)[: len(names) // 2])
    for m in np.flatnonzero(present.any(axis=0)):
        known = codes[present[:, m], m]
        spread = known.std(axis=0)
        codes[present[:, m], m] = (known - known.mean(axis=0)) / np.where(spread > 0, spread, 1.0)

    accuracy = np.full((n, n), np.nan)
    chances, areas = [], []
    for a, b in permutations(range(n), 2):
        both = present[:, a] & present[:, b]
        hits = []
        for gallery in (both & half, both & ~half) if linear else (both,):
            query, rest = codes[gallery, a], both & ~gallery
            if len(np.unique(subjects[gallery])) < 2 or (linear and rest.sum() < 2):
                continue
            if linear:
                query = RidgeCV(alphas=PENALTIES).fit(codes[rest, a], codes[rest, b]).predict(query)
            similarity = cosine_similarity(query, codes[gallery, b])
            same = subjects[gallery][:, None] == subjects[gallery]
            hits.append(same[np.arange(len(same)), similarity.argmax(axis=1)].mean())
            chances.append(same.mean())
            areas.append(auc(similarity[~same], similarity[same]))
        accuracy[a, b] = np.mean(hits) if hits else np.nan
    return {
        "accuracy": float(np.nanmean(accuracy)) if chances else float("nan"),
        "chance": float(np.mean(chances)) if chances else float("nan"),
        "auc": float(np.mean(areas)) if chances else float("nan"),
        "accuracy_by_pair": accuracy.tolist(),
        "features": int(codes.shape[2]),
    }


def structure_agreement(codes: np.ndarray, subjects: list[str], present: np.ndarray | None = None) -> dict:
    """Distance between two modalities' structures of one slice, over the distance between two subjects' structures.

    Euclidean, each channel divided by its deviation, as the denoiser sees it. The distance between subjects is the mean
    over all pairs of different subjects, for the same two modalities.

    Args:
        codes: array of shape (N, n, c, h, w), each from one modality alone.
        subjects: the N subject names.
        present: bool array (N, n), which codes exist; None for all.

    Returns:
        dict with `ratio` (0: the modality does not matter; 1: two modalities of one subject are as far apart as two
        subjects), `ratio_by_pair` (n lists of n, NaN on the diagonal), `within`, `between` (the two mean distances).
    """
    codes = np.asarray(codes, dtype=np.float64)
    count, n = codes.shape[:2]
    present = np.ones((count, n), dtype=bool) if present is None else np.asarray(present, dtype=bool)
    subjects = np.asarray(subjects)
    deviation = codes[present].std(axis=(0, 2, 3))[:, None, None]
    codes = (codes / np.where(deviation > 0, deviation, 1.0)).reshape(count, n, -1)
    within, between = np.full((n, n), np.nan), np.full((n, n), np.nan)
    for a, b in combinations(range(n), 2):
        both = present[:, a] & present[:, b]
        different = subjects[both][:, None] != subjects[both]
        if not different.any():
            continue
        distance = torch.cdist(torch.from_numpy(codes[both, a]), torch.from_numpy(codes[both, b])).numpy()
        within[a, b] = within[b, a] = mean_over_subjects(np.diag(distance), subjects[both])
        between[a, b] = between[b, a] = distance[different].mean()
    ratio = within / between
    known = np.isfinite(ratio)
    return {
        "ratio": float(ratio[known].mean()) if known.any() else float("nan"),
        "ratio_by_pair": ratio.tolist(),
        "within": float(within[known].mean()) if known.any() else float("nan"),
        "between": float(between[known].mean()) if known.any() else float("nan"),
    }


def evaluate_disentanglement(encoded: EncodedSubjects, progress: bool = True, seed: int = 0) -> dict:
    """Probes the styles, the structures from single modalities, and, as a yardstick, the images themselves.

    Two linear probes look at the structure: one at its spatial mean, one at the whole flattened code. The figure that
    counts is the higher of the two, for a trace in either is a trace. A third one also sees the standard deviation over
    the grid. That is no linear function of the code, and it is expected to find something: a modality that shows less
    of the anatomy gives a code that varies less. It is reported and does not count.

    Args:
        encoded: from [`~dldm_pipeline.metrics.reconstruction.encode_subjects`].
        progress: show a progress bar.
        seed: seed of the split into halves.

    Returns:
        dict with

        - `style`, `structure_mean`, `structure_full`, `structure_mean_deviation`, `structure_full_shuffled` (labels
          exchanged within each slice: what there is to score by chance) and `images` (mean over 8×8 blocks: what there
          is to tell from intensities), each as in [`modality_probe`]; `style_accuracy`; `structure_accuracy` (the higher
          of the first two structure probes); `structure_over_chance` (that minus chance, in points of 0.01 each)
        - `subject_structure`, `subject_style`, `subject_style_linear` and `subject_images` (the same blocks), each as in
          [`subject_probe`]; `subject_structure_accuracy`; `subject_style_accuracy` and `subject_style_over_chance` of
          the style probe that finds more
        - `structure_agreement`: see [`structure_agreement`]
    """
    present, subjects = encoded.present, encoded.subjects
    single = np.nan_to_num(encoded.single_structures)
    height, width = (size // 8 * 8 for size in encoded.images.shape[-2:])
    blocks = encoded.images[..., :height, :width]
    blocks = blocks.reshape(*blocks.shape[:2], height // 8, 8, width // 8, 8).mean(axis=(3, 5))
    probes = {
        "style": (np.nan_to_num(encoded.styles), False),
        "structure_mean": (single.mean(axis=(-2, -1)), False),
        "structure_full": (single, False),
        "structure_mean_deviation": (pool_structure(single), False),
        "structure_full_shuffled": (single, True),
        "images": (blocks, False),
    }
    subject_probes = {
        "subject_structure": (single, False),
        "subject_style": (probes["style"][0], False),
        "subject_style_linear": (probes["style"][0], True),
        "subject_images": (blocks, False),
    }
    result = {}
    with tqdm(total=len(probes) + len(subject_probes), desc="probe", disable=not progress) as bar:
        for name, (codes, shuffle) in probes.items():
            result[name] = modality_probe(codes, subjects, present, shuffle, seed)
            bar.update()
        for name, (codes, linear) in subject_probes.items():
            result[name] = subject_probe(codes, subjects, present, linear, seed)
            bar.update()
    told = max(
        result["subject_style"], result["subject_style_linear"], key=lambda probe: probe["accuracy"] - probe["chance"]
    )
    worse = max(result["structure_mean"], result["structure_full"], key=lambda probe: probe["accuracy"])
    return {
        **result,
        "style_accuracy": result["style"]["accuracy"],
        "structure_accuracy": worse["accuracy"],
        "structure_over_chance": 100.0 * (worse["accuracy"] - worse["chance"]),
        "subject_structure_accuracy": result["subject_structure"]["accuracy"],
        "subject_style_accuracy": told["accuracy"],
        "subject_style_over_chance": 100.0 * (told["accuracy"] - told["chance"]),
        "structure_agreement": structure_agreement(single, subjects, present),
    }
