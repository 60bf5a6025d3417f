"""Where the information on the modality sits: it should fill z_style and be absent from z_struct.

A linear probe (logistic regression) is trained on one half of the *subjects* to name the modality a code came from, and
tested on the other half. Style codes should be told apart always; structure codes, each encoded from one modality
alone, no better than by guessing.
"""

from __future__ import annotations

import numpy as np
from tqdm.auto import tqdm

from .reconstruction import EncodedSubjects

# From strong to weak L2 regularisation (scikit-learn's C). The features are scaled so that their squared norm is about
# 1 whatever their number, which puts the best C for a few numbers and for many thousands in the same range.
REGULARISATION = (1e-2, 1e0, 1e2, 1e4)


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
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold
    except ImportError as error:
        raise ImportError(
            'The linear probe needs scikit-learn, which is not installed: pip install "dldm_pipeline[eval]".'
        ) from error

    codes = np.asarray(codes)
    count, n = codes.shape[:2]
    present = np.ones((count, n), dtype=bool) if present is None else np.asarray(present, dtype=bool)
    names = np.unique(subjects)
    if len(names) < 8:
        raise ValueError(
            f"The linear probe needs at least 8 subjects to split by subject, got {len(names)}: "
            "give more held-out subjects."
        )
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
        dict with `style`, `structure_mean`, `structure_full`, `structure_mean_deviation`, `structure_full_shuffled`
        (labels exchanged within each slice: what there is to score by chance) and `images` (mean over 8×8 blocks: what
        there is to tell from intensities), each as in [`modality_probe`]; `style_accuracy`; `structure_accuracy` (the
        higher of the first two structure probes); `structure_over_chance` (that minus chance, in points of 0.01 each).
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
    result = {}
    for name, (codes, shuffle) in tqdm(probes.items(), desc="probe", disable=not progress):
        result[name] = modality_probe(codes, subjects, present, shuffle, seed)
    worse = max(result["structure_mean"], result["structure_full"], key=lambda probe: probe["accuracy"])
    return {
        **result,
        "style_accuracy": result["style"]["accuracy"],
        "structure_accuracy": worse["accuracy"],
        "structure_over_chance": 100.0 * (worse["accuracy"] - worse["chance"]),
    }
