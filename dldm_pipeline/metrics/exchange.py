"""Whether a style is an appearance: exchanged styles against the truth, which simulated subjects have.

Three questions, each with a figure for each modality:

1. Is (structure of A, style of B's scanner) A as B's scanner shows it? PSNR against the simulated image
   ([`exchange_against_truth`]).
2. Where does the appearance sit? R² of tissue means and scanner settings from a linear probe of styles, and of the structure
   ([`appearance_probes`]).
3. Does the anatomy stay where it is? Dice of thresholded white matter with exchanged styles, over that with own styles.

Of real scans the truth is unknown. There two subjects get random intensity curves, and an exchanged style should bring the
donor's white matter with it ([`exchange_of_curves`]).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from dldm_pipeline.appearance import random_curves
from dldm_pipeline.data.sheet import appearances_sheet
from dldm_pipeline.data.simulation import SimulatedSubject, simulate_subject

from .reconstruction import dice, mean_of_known, psnr

SEED = 977_004  # no training run has seen subjects of this seed
TISSUES = ("white", "grey", "csf")
FACTORS = ("top", "exponent", "noise")  # of each modality's acquisition: what is white, intensity curve, noise
PENALTIES = np.logspace(-1, 6, 15)  # of the ridge regressions
PURE = 0.9  # fraction of a tissue from which on a pixel counts to its mean
FEWEST_PIXELS = 20  # for a tissue's mean
FEWEST_SUBJECTS = 4  # for exchanged curves


@torch.no_grad()
def _encode(
    autoencoder: torch.nn.Module, images: np.ndarray, batch_size: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Modes (N, c_s, h, w) and (N, n, c_t) of images (N, n, H, W) in [0, 1]."""
    parts = []
    for rows in torch.from_numpy(images).split(batch_size):
        posterior = autoencoder.encode(rows.to(autoencoder.device))
        parts.append((posterior.structure_dist.mode().cpu(), posterior.style_dist.mode().cpu()))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@torch.no_grad()
def _decode(autoencoder: torch.nn.Module, structure: torch.Tensor, styles: torch.Tensor, batch_size: int = 32):
    """Images (N, n, H, W) in [0, 1] of structures and styles."""
    device = autoencoder.device
    pairs = zip(structure.split(batch_size), styles.split(batch_size), strict=True)
    return np.concatenate([autoencoder.decode(z.to(device), s.to(device)).sample.clamp(0, 1).cpu() for z, s in pairs])


def tissue_means(subject: SimulatedSubject) -> np.ndarray:
    """(n, 3): mean of white matter, grey matter and CSF in each image of a subject; NaN where there is too little."""
    means = []
    for name in TISSUES:
        pure = subject.tissues[name] > PURE
        means.append(
            subject.images[:, pure].mean(1) if pure.sum() >= FEWEST_PIXELS else np.full(len(subject.images), np.nan)
        )
    return np.stack(means, axis=1)


def exchange_against_truth(autoencoder: torch.nn.Module, num_families: int = 60, seed: int = SEED) -> dict:
    """Rebuilds simulated subjects from another image of their anatomy and another anatomy's style.

    A family is two anatomies, each under the same two acquisitions: four images. Each is rebuilt from the structure of the
    other image of its anatomy and the style of the other anatomy under its acquisition.

    Args:
        autoencoder: of modalities that can be simulated.
        num_families: how many.

    Returns:
        dict with, each name -> dB by modality, `own` (own structure and style), `exchanged`, `mean_style` (the mean of the
        modality's styles in place of the donor's), `copied` (the other image of the anatomy itself); their means
        `own_mean`, `exchanged_mean`, `mean_style_mean`, `copied_mean`; `exchange_cost` (dB); `gap_closed` (of the way from
        mean style to own style, 1 is all of it); `white_dice_kept`, see above.
    """
    names, size = list(autoencoder.config.modalities), autoencoder.config.sample_size
    subjects = [
        simulate_subject((seed, 2 * k + i), (seed, 1, 2 * k + a), size, modalities=names)
        for k in tqdm(range(num_families), desc="simulate families")
        for i in range(2)
        for a in range(2)
    ]
    images = np.stack([subject.images for subject in subjects])
    structure, styles = _encode(autoencoder, images)
    rows = np.arange(len(subjects))
    twin, donor = rows ^ 1, rows ^ 2  # other acquisition, other anatomy
    mean = styles.mean(dim=0, keepdim=True).expand_as(styles)
    rebuilt = {
        "own": _decode(autoencoder, structure, styles),
        "exchanged": _decode(autoencoder, structure[twin], styles[donor]),
        "mean_style": _decode(autoencoder, structure[twin], mean),
        "copied": images[twin],
    }
    scores = {key: psnr(images, other).mean(axis=0) for key, other in rebuilt.items()}
    result: dict = {key: dict(zip(names, map(float, values), strict=True)) for key, values in scores.items()}
    result |= {f"{key}_mean": float(values.mean()) for key, values in scores.items()}
    own, exchanged, none = (result[f"{key}_mean"] for key in ("own", "exchanged", "mean_style"))
    result |= {"exchange_cost": own - exchanged, "gap_closed": (exchanged - none) / (own - none)}
    if "T1" in names:
        t1 = names.index("T1")
        kept = [_white_dice(subjects, rebuilt[key][:, t1], t1) for key in ("own", "exchanged")]
        result["white_dice"] = dict(zip(("own", "exchanged"), map(float, kept), strict=True))
        result["white_dice_kept"] = float(kept[1] / kept[0])
    return result


def _white_dice(subjects: Sequence[SimulatedSubject], rebuilt: np.ndarray, t1: int) -> float:
    """Mean Dice of white matter, by a threshold half way between the true means of white and grey matter in T1."""
    scores = []
    for subject, image in zip(subjects, rebuilt, strict=True):
        white, grey, _ = tissue_means(subject)[t1]
        healthy = (subject.tissues["white"] + subject.tissues["grey"] + subject.tissues["csf"]) > PURE
        if np.isfinite(white + grey):
            scores.append(dice((subject.tissues["white"] > 0.5) & healthy, (image > (white + grey) / 2) & healthy))
    return mean_of_known(np.array(scores))


@lru_cache(maxsize=1)
def _probe_subjects(number: int, size: int, names: tuple[str, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, n, H, W) of subjects with an anatomy and an acquisition each, and their `tissue_means` and then `FACTORS`
    (N, n, 6)."""
    images, means = np.empty((number, len(names), size, size), np.float32), []
    for index in tqdm(range(number), desc="simulate subjects for the probes"):
        subject = simulate_subject((seed, 2, index), (seed, 3, index), size, modalities=names)
        images[index] = subject.images
        factors = [[subject.factors[f"{name}_{factor}"] for factor in FACTORS] for name in names]
        means.append(np.hstack([tissue_means(subject), factors]))
    return images, np.stack(means)


def appearance_probes(
    autoencoder: torch.nn.Module, num_train: int = 1000, num_test: int = 500, seed: int = SEED
) -> dict:
    """R² with which ridge regressions tell tissue means and `FACTORS` from the modality's style, and from the whole structure.

    The penalty is chosen by leave-one-out among the training subjects.

    Returns:
        dict with `style` and `structure`, tissue or factor -> modality -> R² on the test subjects (0: no better than their
        mean; NaN where the images are too small to show the tissue), and for each `..._white_grey_min`,
        `..._white_grey_max` and `..._csf_min`.
    """
    names, size = list(autoencoder.config.modalities), autoencoder.config.sample_size
    images, means = _probe_subjects(num_train + num_test, size, tuple(names), seed)
    structure, styles = (code.numpy() for code in _encode(autoencoder, images))
    structure = structure.reshape(len(structure), -1)
    result: dict = {kind: {target: {} for target in (*TISSUES, *FACTORS)} for kind in ("style", "structure")}
    in_train = np.arange(len(means)) < num_train
    for t, target in enumerate((*TISSUES, *FACTORS)):
        known = np.isfinite(means[:, 0, t])  # a tissue is there in all images of a subject or in none
        train, test = known & in_train, known & ~in_train
        for kind in result:
            for m, name in enumerate(names):
                codes = structure if kind == "structure" else styles[:, m]
                probe = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
                score = np.nan
                if min(train.sum(), test.sum()) > 1:
                    score = probe.fit(codes[train], means[train, m, t]).score(codes[test], means[test, m, t])
                result[kind][target][name] = float(score)
    for kind in ("style", "structure"):
        both = [value for tissue in ("white", "grey") for value in result[kind][tissue].values()]
        result[f"{kind}_white_grey_min"], result[f"{kind}_white_grey_max"] = min(both), max(both)
        result[f"{kind}_csf_min"] = min(result[kind]["csf"].values())
    return result


def encode_styles(autoencoder: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Styles (N, n, c_t) of images (N, n, H, W) in [0, 1]."""
    return _encode(autoencoder, images)[1].numpy()


def compare_styles(drawn: np.ndarray, encoded: np.ndarray, modalities: Sequence[str]) -> dict[str, dict[str, float]]:
    """Whether drawn styles are as varied as encoded ones, and as related between the modalities of a subject.

    Args:
        drawn, encoded: (S, n, c_t) and (N, n, c_t), of all modalities of a subject each.
        modalities: the n names.

    Returns:
        Each modality -> number, with everything in units of the encoded styles' standard deviation: `shift` (root mean
        square over channels of the difference of means; 0 is best), `spread` (root mean square of the drawn styles'
        deviation; 1 is best), `covariance` (distance of the covariance matrices over the size of the encoded one,
        Frobenius; 0 is best) and `relation` (how much of the covariance with the other modalities' styles is there, by
        regression of its entries; 1 is best, and 0 where modalities are drawn without regard to each other).
    """
    n, channels = encoded.shape[1:]
    scale = np.maximum(encoded.std(axis=0), 1e-6)
    ours, theirs = ((styles / scale).astype(np.float64) for styles in (drawn, encoded))
    covariances = []
    for styles in (ours, theirs):
        centred = (styles - styles.mean(axis=0)).reshape(len(styles), -1)
        covariances.append((centred.T @ centred / len(styles)).reshape(n, channels, n, channels))
    result: dict[str, dict[str, float]] = {key: {} for key in ("shift", "spread", "covariance", "relation")}
    for m, name in enumerate(modalities):
        mine, true = (one[m, :, m] for one in covariances)
        mine_other, true_other = (np.delete(one[m], m, axis=1) for one in covariances)
        result["shift"][name] = float(np.sqrt(((ours[:, m].mean(axis=0) - theirs[:, m].mean(axis=0)) ** 2).mean()))
        result["spread"][name] = float(np.sqrt(np.trace(mine) / channels))
        result["covariance"][name] = float(np.linalg.norm(mine - true) / np.linalg.norm(true))
        related = np.sum(true_other**2)
        result["relation"][name] = float(np.sum(mine_other * true_other) / related) if related else np.nan
    return result


@torch.no_grad()
def exchange_of_curves(
    autoencoder: torch.nn.Module, dataset: Dataset, num_pairs: int = 200, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Whether white matter follows the donor of a style, on slices whose appearance is changed by random curves.

    Pixels of white matter are found once, in the untouched T1 (the brightest of three clusters outside the tumour). Each
    slice then gets a random curve in each modality ([`~dldm_pipeline.appearance.random_curves`]) and is rendered in the
    styles of another subject's slice.

    Args:
        dataset: items of a held-out `SliceDataset`. Those that lack a modality, or show little but tumour, are left out.
        num_pairs: how many; a slice is in several where there are fewer slices.

    Returns:
        `donor` and `own`, modality -> correlation over pairs of the mean of white matter with that of the donor, and with
        that of the slice itself, both under their curves; `num_slices`, that the pairs are of.

    Raises:
        ValueError: if the model does not know T1, or too few subjects have all modalities.
    """
    names = list(autoencoder.config.modalities)
    if "T1" not in names:
        raise ValueError("Exchanged intensity curves need T1.")
    t1 = names.index("T1")
    whole = [
        item
        for item in dataset
        if item["present"].all() and ((item["images"][t1] > 0) & (item["mask"] < 0.5)).sum() > 3 * FEWEST_PIXELS
    ]
    if len({item["subject"] for item in whole}) < FEWEST_SUBJECTS:
        raise ValueError(f"Exchanged intensity curves need {FEWEST_SUBJECTS} subjects with all modalities.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Evenly spread over the slices, and each under another curve if it comes again.
        rows = torch.linspace(0, len(whole) - 1, num_pairs).long() if num_pairs < len(whole) else None
        rows = torch.arange(num_pairs) % len(whole) if rows is None else rows
        items = next(iter(DataLoader([whole[row] for row in rows], len(rows))))
        curved = torch.cat([random_curves(part) for part in items["images"].split(32)])
        subjects = np.array(items["subject"])
        donors = np.array([torch.randint(len(rows), ()).item() for _ in rows])
        while (same := subjects[donors] == subjects).any():
            donors[same] = torch.randint(len(rows), (int(same.sum()),)).numpy()
    tumour = items["mask"].numpy() > 0.5
    pairs = zip(items["images"][:, t1].numpy(), tumour, strict=True)
    white = np.stack([_brightest(image, (image > 0) & ~lesion) for image, lesion in pairs])
    structure, styles = _encode(autoencoder, curved.numpy())
    rendered = _decode(autoencoder, structure, styles[donors])

    def means(images: np.ndarray) -> np.ndarray:
        return np.stack([image[:, where].mean(axis=1) for image, where in zip(images, white, strict=True)])

    after, before = means(rendered), means(curved.numpy())
    return {
        key: {name: float(np.corrcoef(after[:, m], other[:, m])[0, 1]) for m, name in enumerate(names)}
        for key, other in (("donor", before[donors]), ("own", before))
    } | {"num_slices": len(set(rows.tolist()))}


def exchange_sheet(autoencoder: torch.nn.Module, dataset: Dataset, path: str | os.PathLike, count: int = 4) -> bool:
    """Saves as PNG `count` subjects, each rebuilt in its own appearance and in those of the others.

    Args:
        dataset: as in [`exchange_of_curves`], of any modalities.

    Returns:
        Whether there were enough subjects; nothing is written else.
    """
    subjects = list({item["subject"]: item["images"] for item in dataset if item["present"].all()}.values())
    if len(subjects) < count:
        return False
    chosen = np.linspace(0, len(subjects) - 1, count).astype(int)  # neighbours may be of one scanner
    structure, styles = _encode(autoencoder, torch.stack([subjects[i] for i in chosen]).numpy())
    grid = _decode(autoencoder, structure.repeat_interleave(count, dim=0), styles.repeat(count, 1, 1))
    appearances_sheet(grid.reshape(count, count, *grid.shape[1:]), autoencoder.config.modalities, path)
    return True


def _brightest(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The brightest of three clusters of an image's values, as a mask."""
    values = image[where][:, None]
    clusters = KMeans(3, n_init=2, random_state=0).fit(values)
    found = np.zeros_like(where)
    found[where] = clusters.labels_ == clusters.cluster_centers_[:, 0].argmax()
    return found
