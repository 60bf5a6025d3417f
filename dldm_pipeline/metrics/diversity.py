"""Diversity of images: mean MS-SSIM over pairs of different subjects (Odena et al. 2017).

It has no best value: compare it with that of real images. A clearly higher one means that the model repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .images import check_images


def subject_pairs(subjects: Sequence[str], num_pairs: int, seed: int = 0) -> np.ndarray:
    """Random pairs of images of *different subjects*, every subject equally often: image indices, int (num_pairs, 2).

    Args:
        subjects: the N subject names, one an image.
        num_pairs, seed: how many, and the seed of the choice.

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
    """Width in pixels of the MS-SSIM window for images whose shorter side has `side` pixels.

    It is 11 from 161 pixels on, and for smaller images the widest odd one that still fits the coarsest of the five scales
    (64 pixels: 3; 128: 7). Raises a ValueError below 33 pixels, where five scales do not fit.
    """
    if side <= 32:
        raise ValueError(f"images are {side} pixels wide: MS-SSIM has five scales and needs at least 33.")
    return max(width for width in range(3, 12, 2) if (width - 1) * 16 < side)


def pair_similarity(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MS-SSIM (Wang et al. 2003) in [0, 1] of pairs of images, by pytorch-msssim, in a window of [`ssim_window`].

    Args:
        images: uint8 (N, H, W), 0-255, at least 33 pixels wide.
        pairs: int (P, 2), indices of images.

    Raises:
        TypeError, ValueError: see [`~dldm_pipeline.metrics.images.check_images`] and [`ssim_window`].
    """
    from pytorch_msssim import ms_ssim

    check_images(images)
    window = ssim_window(min(images.shape[1:]))
    values = []
    for part in np.array_split(pairs, -(-len(pairs) // 32)):
        first, second = (torch.from_numpy(images[part[:, side]]).float()[:, None] for side in (0, 1))
        values.append(ms_ssim(first, second, data_range=255, win_size=window, size_average=False).numpy())
    return np.concatenate(values).astype(np.float64)


def diversity(images: np.ndarray, subjects: Sequence[str], num_pairs: int = 1000, seed: int = 0) -> float:
    """Mean [`pair_similarity`] of images (N, H, W) over [`subject_pairs`]."""
    return float(pair_similarity(images, subject_pairs(subjects, num_pairs, seed)).mean())
