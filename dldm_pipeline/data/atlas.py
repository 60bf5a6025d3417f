"""The anatomy behind simulated subjects: the ICBM 2009a nonlinear symmetric atlas, which nilearn ships and loads offline.

Its maps of T1, grey and white matter are averages of 152 brains and therefore blurred; they are sharpened here.

Licence: "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose
and without fee is hereby granted, provided that the above copyright notice appear in all copies." Cite Fonov et al.,
NeuroImage 54 (2011) 313, doi 10.1016/j.neuroimage.2010.07.033. No atlas file is copied into this package.
"""

from functools import lru_cache

import numpy as np
from scipy import ndimage

# Corners of the part of the atlas that is kept, MNI mm: the whole brain across, more levels than a tilted slice needs.
_KEPT = ((-78.0, -114.0, -40.0), (78.0, 80.0, 76.0))


# The whole brain, cerebellum and brain stem included.
WHOLE_BRAIN = ((-78.0, -114.0, -72.0), (78.0, 80.0, 86.0))


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
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template  # slow import

    template = load_mni152_template(resolution=1)
    first, last = (np.array(corners) - template.affine[:3, 3]).astype(int)
    keep = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    t1, grey, white = (
        image.get_fdata(dtype=np.float32)[keep]
        for image in (template, load_mni152_gm_template(resolution=1), load_mni152_wm_template(resolution=1))
    )

    # The brain with its sulci closed and a thin film of fluid around it, as skull stripping leaves it.
    brain = ndimage.binary_closing(t1 > 0, iterations=4)
    brain = ndimage.gaussian_filter(brain.astype(np.float32), 2.0) > 0.45
    depth = ndimage.distance_transform_edt(brain) - ndimage.distance_transform_edt(~brain)
    depth = ndimage.gaussian_filter(depth.astype(np.float32), 1.0)

    # The class maps hardly know the narrow sulci; the T1 average does, once its blur is undone (unsharp mask).
    filled = np.where(t1 > 0, t1, 0.35)
    sharp = filled + 1.6 * (filled - ndimage.gaussian_filter(filled, 2.0))
    fluid = np.maximum((0.56 - sharp) / 0.10, 8 * (0.5 - (grey + white)))
    fluid = np.maximum(fluid, 0.2 - depth)

    # Between ventricle and white matter the blur passes through grey: a rim that no brain has. Opening takes the rim
    # away and leaves the nuclei, which are thick; near the ventricles only, for the cortex is thin too.
    pools, _ = ndimage.label(ndimage.binary_opening((grey + white < 0.5) & (depth > 18)))
    ventricles = pools == np.bincount(pools.ravel())[1:].argmax() + 1  # the lateral ones make the largest pool
    near = ndimage.binary_dilation(pools > 0, iterations=5)
    opened = ndimage.grey_opening(grey, size=(4, 4, 4))
    white = np.where(near, white + (grey - opened), white)
    grey = np.where(near, opened, grey)
    ratio = white / (white + grey + 1e-3)
    ratio = ratio + 1.0 * (ratio - ndimage.gaussian_filter(ratio, 2.0))
    matter = (ratio - 0.5) / 0.22
    away = ndimage.distance_transform_edt(~ventricles) - 0.5
    maps = np.stack([np.clip(fluid, -4, 4), np.clip(matter, -4, 4), depth, away], axis=-1).astype(np.float32)
    return maps, np.array(corners[0])


def interpolate(maps: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Trilinear interpolation of maps (X, Y, Z, C) at voxel coordinates (3, N), all C at once: (N, C).

    Reads each corner's C values together, which is several times faster than `map_coordinates` map by map.
    """
    where = np.clip(where, 0, np.array(maps.shape[:3])[:, None] - 1.001).astype(np.float32)
    corner = where.astype(np.int32)
    (x1, y1, z1) = part = where - corner
    x0, y0, z0 = 1 - part
    base, flat = np.ravel_multi_index(corner, maps.shape[:3]), maps.reshape(-1, maps.shape[3])
    across, up = maps.shape[1] * maps.shape[2], maps.shape[2]
    values = np.zeros((where.shape[1], maps.shape[3]), dtype=np.float32)
    for along_x, weight_x in ((0, x0), (across, x1)):
        for along_y, weight_xy in ((0, weight_x * y0), (up, weight_x * y1)):
            for along_z, weight in ((0, weight_xy * z0), (1, weight_xy * z1)):
                values += weight[:, None] * flat.take(base + (along_x + along_y + along_z), axis=0)
    return values
