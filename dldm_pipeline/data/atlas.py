"""The anatomy behind simulated subjects: the ICBM 2009a nonlinear symmetric atlas, which nilearn ships and loads offline.

Its maps of T1, grey and white matter are averages of 152 brains and therefore blurred; they are sharpened here.

Licence: "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose
and without fee is hereby granted, provided that the above copyright notice appear in all copies." Cite Fonov et al.,
NeuroImage 54 (2011) 313, doi 10.1016/j.neuroimage.2010.07.033. No atlas file is copied into this package.
"""

import importlib.resources
from functools import lru_cache

import nibabel as nib
import numpy as np
from scipy import ndimage

# Corners of the part of the atlas that is kept, MNI mm: the whole brain across, more levels than a tilted slice needs.
_KEPT = ((-78.0, -114.0, -40.0), (78.0, 80.0, 76.0))


# The whole brain, cerebellum and brain stem included.
WHOLE_BRAIN = ((-78.0, -114.0, -72.0), (78.0, 80.0, 86.0))
_PIECE = 8192  # points that `interpolate` handles at once


@lru_cache(maxsize=2)
def load_atlas(
    corners: tuple[tuple[float, float, float], tuple[float, float, float]] = _KEPT,
) -> tuple[np.ndarray, np.ndarray]:
    """Sharpened atlas, computed once per process (about 4 s).

    Args:
        corners: lowest and highest MNI coordinates in mm of the part that is kept.

    Returns:
        Maps (X, Y, Z, 4) float32 at 1 mm: fluid and white matter, both as signed evidence (positive inside, about one unit
        at 1 mm from the border); depth below the brain's surface in mm (negative outside); distance from the lateral
        ventricles in mm. And the MNI coordinates (3,) in mm of voxel (0, 0, 0).
    """
    t1, grey, white = (_read(kind, corners) for kind in ("t1", "gm", "wm"))
    maps = np.empty((4, *t1.shape), dtype=np.float32)

    # The brain with its sulci closed and a thin film of fluid around it, as skull stripping leaves it.
    brain = ndimage.binary_closing(t1 > 0, iterations=4)
    brain = ndimage.gaussian_filter(brain.astype(np.float32), 2.0) > 0.45
    depth = distance(brain)
    depth -= distance(~brain)
    maps[2] = depth = ndimage.gaussian_filter(depth.astype(np.float32), 1.0)

    # The class maps hardly know the narrow sulci; the T1 average does, once its blur is undone (unsharp mask).
    filled = np.where(t1 > 0, t1, 0.35)
    del t1, brain
    sharp = filled + 1.6 * (filled - ndimage.gaussian_filter(filled, 2.0))
    del filled
    fluid = np.maximum((0.56 - sharp) / 0.10, 8 * (0.5 - (grey + white)))
    del sharp
    maps[0] = np.clip(np.maximum(fluid, 0.2 - depth), -4, 4)
    del fluid

    # Between ventricle and white matter the blur passes through grey: a rim that no brain has. Opening takes the rim
    # away and leaves the nuclei, which are thick; near the ventricles only, for the cortex is thin too.
    pools, _ = ndimage.label(ndimage.binary_opening((grey + white < 0.5) & (depth > 18)))
    del depth
    ventricles = pools == np.bincount(pools.ravel())[1:].argmax() + 1  # the lateral ones make the largest pool
    near = ndimage.binary_dilation(pools > 0, iterations=5)
    del pools
    opened = ndimage.grey_opening(grey, size=(4, 4, 4))
    white = np.where(near, white + (grey - opened), white)
    grey = np.where(near, opened, grey)
    del opened, near
    ratio = white / (white + grey + 1e-3)
    del white, grey
    ratio = ratio + 1.0 * (ratio - ndimage.gaussian_filter(ratio, 2.0))
    maps[1] = np.clip((ratio - 0.5) / 0.22, -4, 4)
    del ratio
    maps[3] = distance(~ventricles) - 0.5
    return np.moveaxis(maps, 0, -1), np.array(corners[0])


def _read(kind: str, corners: tuple) -> np.ndarray:
    """Part of a map of the atlas, scaled to [0, 1].

    From nilearn's file, as `nilearn.datasets.load_mni152_template` reads it: that import takes 110 MB and 2 s.
    """
    folder = importlib.resources.files("nilearn") / "datasets" / "data"
    image = nib.load(folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
    data = np.asanyarray(image.dataobj)
    first, last = (np.array(corners) - image.affine[:3, 3]).astype(int)
    kept = data[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
    return kept.astype(np.float32) / data.max().astype(np.float32)


def distance(inside: np.ndarray) -> np.ndarray:
    """`distance_transform_edt` with a third of the memory: voxels to the nearest one outside, float64."""
    nearest = ndimage.distance_transform_edt(inside, return_distances=False, return_indices=True)
    squares = np.zeros(inside.shape)
    for index, at in zip(nearest, np.ogrid[tuple(map(slice, inside.shape))], strict=True):
        index -= at
        index *= index
        squares += index
    return np.sqrt(squares, out=squares)


def interpolate(maps: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Trilinear interpolation of maps (X, Y, Z, C) at voxel coordinates (3, N): (N, C).

    Fastest with maps whose memory order is (C, X, Y, Z), as those of `load_atlas`. Works in pieces that stay in the
    processor's cache.
    """
    planes = np.ascontiguousarray(np.moveaxis(maps, 3, 0)).reshape(maps.shape[3], -1)
    across, up = maps.shape[1] * maps.shape[2], maps.shape[2]
    last = np.array(maps.shape[:3])[:, None] - 1.001
    values = np.zeros((maps.shape[3], where.shape[1]), dtype=np.float32)
    for start in range(0, where.shape[1], _PIECE):
        piece = values[:, start : start + _PIECE]
        part = np.clip(where[:, start : start + _PIECE], 0, last).astype(np.float32)
        corner = part.astype(np.int32)
        x1, y1, z1 = part = part - corner
        x0, y0, z0 = 1 - part
        base = np.ravel_multi_index(corner, maps.shape[:3])
        for along_x, weight_x in ((0, x0), (across, x1)):
            for along_y, weight_xy in ((0, weight_x * y0), (up, weight_x * y1)):
                for along_z, weight in ((0, weight_xy * z0), (1, weight_xy * z1)):
                    corner_index = base + (along_x + along_y + along_z)
                    for value, plane in zip(piece, planes, strict=True):
                        value += weight * plane.take(corner_index)
    return values.T
