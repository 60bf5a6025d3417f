"""Where the information is: the modality should be in z_style and not in z_struct, the subject in z_struct and not in z_style.

- [`modality_probe`]: a linear probe is trained on one half of the *subjects* to predict the modality of a code, and tested
  on the other half. It should always be right for styles, and no better than chance for structures, each encoded from one
  modality alone.
- [`subject_probe`]: the structure from one modality looks for its own subject among those from another modality. It should
  always be right. (The styles of a subject's modalities are related, too: one scanner made them.)
- [`structure_agreement`]: distance between the structures from two modalities of one subject, over that between two subjects.

Cross-reconstruction and the exchange of styles need the decoder: `psnr["single"]` of
[`~dldm_pipeline.metrics.reconstruction.evaluate_reconstruction`], and [`~dldm_pipeline.metrics.exchange`].
"""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import torch
from tqdm.auto import tqdm

from .images import as_flags
from .reconstruction import EncodedSubjects, mean_of_known, mean_over_subjects
from .two_sample import auc

try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.model_selection import GridSearchCV, GroupKFold
except ImportError as error:
    message = 'The probes need scikit-learn, which is not installed: pip install "dldm_pipeline[eval]".'
    raise ImportError(message) from error

# From strong to weak L2 regularisation (scikit-learn's C). The features are scaled so that their squared norm is about
# 1 whatever their number, so the best C for a few numbers and for many thousands is in the same range.
REGULARISATION = (1e-2, 1e0, 1e2, 1e4)


def _half_of(subjects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The names of a random half of the subjects."""
    names = np.unique(subjects)
    if len(names) < 8:
        raise ValueError(
            f"The probes need at least 8 subjects to split by subject, got {len(names)}: give more held-out subjects."
        )
    return rng.permutation(names)[: len(names) // 2]


def _standardise(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Features (N, F) with mean and std of `reference` (M, F) removed; 0 where it is constant."""
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    return np.where(std > 0, (features - mean) / np.where(std > 0, std, 1.0), 0.0)


def pool_structure(codes: np.ndarray) -> np.ndarray:
    """Spatial mean and std of each channel: (..., c, h, w) in, (..., 2c) out."""
    return np.concatenate([codes.mean(axis=(-2, -1)), codes.std(axis=(-2, -1))], axis=-1)


def modality_probe(
    codes: np.ndarray, subjects: list[str], present: np.ndarray | None = None, shuffle: bool = False, seed: int = 0
) -> dict:
    """Accuracy with which a linear probe predicts the modality of a code of an unseen subject.

    A multinomial logistic regression with L2 penalty is trained on the standardised features of a random half of the
    subjects and tested on the other, then the other way round. The penalty is the one of `REGULARISATION` with the highest
    accuracy in a three-fold cross-validation, by subject, inside the training half: the tested half chooses nothing.

    Args:
        codes: (N, n, ...); each code is flattened.
        subjects: the N subject names.
        present: bool (N, n), which codes exist; None for all.
        shuffle: exchange the labels at random within each slice: the accuracy is then what these codes score by chance.
        seed: of the split and of the shuffling.

    Returns:
        dict with `accuracy` (in [0, 1], mean of the two halves), `chance` (fraction of the commonest modality), `recall`
        (n fractions of each modality's codes that are predicted correctly), `features` (their number), `num_codes`.

    Raises:
        ValueError: if there are fewer than 8 subjects.
    """
    codes, subjects = np.asarray(codes), np.asarray(subjects)
    count, n = codes.shape[:2]
    present = as_flags(present, (count, n))
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(n), (count, 1))
    if shuffle:
        for row, here in zip(labels, present, strict=True):
            row[here] = rng.permutation(row[here])
    x, y = codes.reshape(count, n, -1)[present].astype(np.float64), labels[present]
    groups = np.repeat(subjects[:, None], n, axis=1)[present]
    first_half = np.isin(groups, _half_of(subjects, rng))

    accuracies, predicted = [], np.full(len(y), -1)
    for train in (first_half, ~first_half):
        features = _standardise(x, x[train]) / np.sqrt(x.shape[1])  # the squared norm of a code is about 1
        if x.shape[1] > train.sum():
            # Rotated onto the span of the training codes, for speed alone: the weights of the model lie in it.
            features = features @ np.linalg.svd(features[train], full_matrices=False)[2].T
        probe = GridSearchCV(
            LogisticRegression(max_iter=500, tol=1e-3), {"C": REGULARISATION}, cv=GroupKFold(n_splits=3)
        ).fit(features[train], y[train], groups=groups[train])
        predicted[~train] = probe.predict(features[~train])
        accuracies.append(float(np.mean(predicted[~train] == y[~train])))
    return {
        "accuracy": float(np.mean(accuracies)),
        "chance": float(np.bincount(y, minlength=n).max() / len(y)),
        "recall": [float(np.mean(predicted[y == m] == m)) if np.any(y == m) else None for m in range(n)],
        "features": int(x.shape[1]),
        "num_codes": int(len(y)),
    }


def subject_probe(codes: np.ndarray, subjects: list[str], present: np.ndarray | None = None) -> dict:
    """How often the code of one modality finds its own subject among the codes of another modality.

    Every code of modality A is a query, all codes of modality B are the gallery, and the most similar one (cosine) should
    be of the query's subject. Features are standardised within each modality first, because the difference between two
    modalities would hide the subject.

    Args:
        codes, subjects, present: as in [`modality_probe`].

    Returns:
        dict with `accuracy` (in [0, 1], mean over ordered pairs of modalities), `accuracy_by_pair` (n lists of n,
        [query][gallery]; NaN on the diagonal, and for two that no slice has), `chance` (fraction of the gallery that is of
        the query's subject: the accuracy of a random pick), `auc` (probability that a code of the own subject is more
        similar than one of another; 0.5 is chance, whatever N) and `features` (their number).
    """
    codes = np.array(codes, dtype=np.float64)
    count, n = codes.shape[:2]
    codes, subjects = codes.reshape(count, n, -1), np.asarray(subjects)
    present = as_flags(present, (count, n))
    for m in np.flatnonzero(present.any(axis=0)):
        codes[present[:, m], m] = _standardise(codes[present[:, m], m], codes[present[:, m], m])

    accuracy = np.full((n, n), np.nan)
    chances, areas = [], []
    for a, b in permutations(range(n), 2):
        gallery = present[:, a] & present[:, b]
        if len(np.unique(subjects[gallery])) < 2:
            continue
        similarity = cosine_similarity(codes[gallery, a], codes[gallery, b])
        same = subjects[gallery][:, None] == subjects[gallery]
        accuracy[a, b] = same[np.arange(len(same)), similarity.argmax(axis=1)].mean()
        chances.append(same.mean())
        areas.append(auc(similarity[~same], similarity[same]))
    return {
        "accuracy": float(mean_of_known(accuracy)),
        "chance": float(mean_of_known(chances)),
        "auc": float(mean_of_known(areas)),
        "accuracy_by_pair": accuracy.tolist(),
        "features": int(codes.shape[2]),
    }


def structure_agreement(codes: np.ndarray, subjects: list[str], present: np.ndarray | None = None) -> dict:
    """Distance between two modalities' structures of one slice, over the distance between two subjects' structures.

    Euclidean, each channel divided by its std, as the denoiser sees it. The distance between subjects is the mean over
    all pairs of different subjects, for the same two modalities.

    `codes` (N, n, c, h, w) are each from one modality alone; `subjects` and `present` are as in [`modality_probe`].

    Returns:
        dict with `ratio` (0: the modality does not matter; 1: two modalities of one subject differ as much as two
        subjects do), `ratio_by_pair` (n lists of n, NaN on the diagonal), `within`, `between` (the two mean distances).
    """
    codes, subjects = np.asarray(codes, dtype=np.float64), np.asarray(subjects)
    count, n = codes.shape[:2]
    present = as_flags(present, (count, n))
    std = codes[present].std(axis=(0, 2, 3))[:, None, None]
    codes = (codes / np.where(std > 0, std, 1.0)).reshape(count, n, -1)
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
    means = {"ratio": ratio, "within": within, "between": between}
    return {"ratio_by_pair": ratio.tolist()} | {name: float(mean_of_known(v[known])) for name, v in means.items()}


def evaluate_disentanglement(encoded: EncodedSubjects, seed: int = 0) -> dict:
    """Probes the styles, the structures from single modalities, and, for comparison, the images themselves.

    Two linear probes see the structure: one its spatial mean, one the whole code; the higher of the two counts. A third
    one also sees the std over space, which is no linear function of the code. It is expected to find something, as a
    modality that shows less of the anatomy gives a code that varies less, and does not count.

    Args:
        encoded: from [`~dldm_pipeline.metrics.reconstruction.encode_subjects`].
        seed: of the split into halves.

    Returns:
        dict with

        - `style`, `structure_mean`, `structure_full`, `structure_mean_deviation`, `structure_full_shuffled` (labels
          exchanged within each slice: what there is to score by chance) and `images` (mean over 8×8 blocks: what there
          is to tell from intensities), each as in [`modality_probe`]; `style_accuracy`; `structure_accuracy` (the higher
          of the first two structure probes); `structure_over_chance` (that minus chance, in points of 0.01 each)
        - `subject_structure` and `subject_images` (the same blocks), each as in [`subject_probe`];
          `subject_structure_accuracy`
        - `structure_agreement`: see [`structure_agreement`]
    """
    present, subjects = encoded.present, encoded.subjects
    styles, single = np.nan_to_num(encoded.styles), np.nan_to_num(encoded.single_structures)
    height, width = (size // 8 * 8 for size in encoded.images.shape[-2:])
    blocks = encoded.images[..., :height, :width]
    blocks = blocks.reshape(*blocks.shape[:2], height // 8, 8, width // 8, 8).mean(axis=(3, 5))
    probes = {
        "style": (styles, False),
        "structure_mean": (single.mean(axis=(-2, -1)), False),
        "structure_full": (single, False),
        "structure_mean_deviation": (pool_structure(single), False),
        "structure_full_shuffled": (single, True),
        "images": (blocks, False),
    }
    result = {
        name: modality_probe(codes, subjects, present, shuffle, seed)
        for name, (codes, shuffle) in tqdm(probes.items(), desc="probe")
    }
    for name, codes in (("subject_structure", single), ("subject_images", blocks)):
        result[name] = subject_probe(codes, subjects, present)
    structure = max(result["structure_mean"], result["structure_full"], key=lambda probe: probe["accuracy"])
    return {
        **result,
        "style_accuracy": result["style"]["accuracy"],
        "structure_accuracy": structure["accuracy"],
        "structure_over_chance": 100.0 * (structure["accuracy"] - structure["chance"]),
        "subject_structure_accuracy": result["subject_structure"]["accuracy"],
        "structure_agreement": structure_agreement(single, subjects, present),
    }
