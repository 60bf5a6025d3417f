"""Simulated brain-metastasis subjects: one axial slice, five aligned contrasts, the tumour mask and the truth behind.

Anatomy: an atlas (`atlas.py`), tilted, bent by a smooth diffeomorphism and given one to five metastases with oedema, and
vessels. Contrast: the MR signal equations (`mr_signal.py`).
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from dldm_pipeline.data.anatomy import shrink, sigmoid
from dldm_pipeline.data.atlas import interpolate, load_atlas
from dldm_pipeline.data.mr_signal import SEQUENCES, TISSUES, sample_sequence, sample_tissue_values, signal
from dldm_pipeline.data.slices import write_slices
from dldm_pipeline.data.workers import map_in_order
from dldm_pipeline.modalities import DEFAULT_MODALITIES, check_modalities

# Anatomy is computed on about this many pixels across, then averaged down: anti-aliased, and the same at every size.
_SUPERSAMPLED = 256
POINT_SPREAD = 0.6  # standard deviation in pixels of the acquisition
_SCOUT = 64  # pixels of the coarse look that finds the brain and places lesions


@dataclass
class PhantomSubject:
    """One simulated subject.

    Attributes:
        images: (n, H, W) float32 in [0, 1], one per modality, background exactly 0.
        mask: (H, W) uint8 in {0, 1}, tumour core (enhancing and necrotic, not oedema); never empty.
        tissues: name in `TISSUES` -> (H, W) float32 partial-volume fraction in [0, 1]; they sum to 1 inside the brain.
        factors: name -> number drawn for this subject (level, angles, tissue values, sequence timings, lesions, ...).
        modalities: names of the images, in order.
        pixel_spacing: (row, column) in mm.
    """

    images: np.ndarray
    mask: np.ndarray
    tissues: dict[str, np.ndarray]
    factors: dict[str, float]
    modalities: tuple[str, ...]
    pixel_spacing: tuple[float, float]


def simulate_subject(
    seed: int | Sequence[int], size: int = 128, modalities: Sequence[str] = DEFAULT_MODALITIES
) -> PhantomSubject:
    """Simulates one subject; the same seed gives the same subject, and the same anatomy at every size.

    Args:
        seed: non-negative integer, or a sequence of them.
        size: height and width of the images in pixels, 32 to 1024.
        modalities: names out of `SEQUENCES`, in the order wanted. An image does not depend on the others asked for.

    Raises:
        ValueError: a size or modality that cannot be simulated.
    """
    modalities = tuple(modalities)
    _check(size, modalities)
    # Streams of their own for anatomy, acquisition and noise, so that one does not shift with the other's draws.
    anatomy, acquisition, *noise = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2 + len(SEQUENCES))
    )
    factors = {}
    tissues, textures, pixel_spacing = _sample_anatomy(anatomy, size, factors)
    brain = sum(tissues.values())
    inside = brain >= 0.5
    for name in tissues:
        tissues[name] *= inside
    mask = ((tissues["enhancing"] + tissues["necrosis"] >= 0.5 * brain) & inside).astype(np.uint8)

    values = sample_tissue_values(acquisition, factors)
    axis = np.linspace(1, 4, size)
    coils = 0.035 * _smooth_field(acquisition.normal(size=(6, 6)), axis, axis)
    coils = coils + 0.01 * _smooth_field(acquisition.normal(size=(len(SEQUENCES), 6, 6)), axis, axis)
    coils = 1 + np.clip(coils, -0.12, 0.12)
    images = []
    for name, coil, noise_rng in zip(SEQUENCES, coils, noise, strict=True):
        # Draw for every sequence, wanted or not: the order of the draws must not depend on the choice.
        sequence = sample_sequence(acquisition, name, factors)
        if name not in modalities:
            continue
        signals = {tissue: signal(sequence, tissue, *values[tissue]) for tissue in TISSUES}
        image = sum(np.float32(signals[t]) * tissues[t] * textures.get(t, 1) for t in TISSUES)
        if name in ("T2", "FLAIR"):  # iron in the deep grey nuclei shortens T2
            image -= np.float32(0.16 * signals["grey"]) * tissues["grey"] * textures["iron"]
        image *= coil
        healthy = [signals[t] for t in ("white", "grey", "csf")]
        low, high = 0.6 * min(healthy), sequence["headroom"] * max(healthy)
        # What k-space has left of a point: full width at half maximum of 1.4 pixels.
        image = ndimage.gaussian_filter(image, POINT_SPREAD)
        sigma = factors["noise"] * (high - low)
        gauss = noise_rng.standard_normal((2, size, size), dtype=np.float32) * np.float32(sigma)
        image = np.hypot(image + gauss[0], gauss[1])  # magnitude of a noisy complex signal: Rician
        images.append(np.clip((image - low) / (high - low), 0, 1) * inside)
    order = [name for name in SEQUENCES if name in modalities]
    images = np.stack([images[order.index(name)] for name in modalities]).astype(np.float32)
    return PhantomSubject(images, mask, tissues, factors, modalities, pixel_spacing)


def phantom_rows(
    num_subjects: int,
    size: int = 128,
    seed: int = 0,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    num_workers: int = 0,
) -> Iterator[dict]:
    """Yields rows for `dldm_pipeline.data.slices.write_slices`, one subject at a time and in order.

    Subject i is drawn from (seed, i), whatever the number of subjects or workers.

    Args:
        num_subjects: at least 1.
        size, modalities: as in `simulate_subject`.
        seed: non-negative integer.
        num_workers: processes; 0 or 1 works in this one.
    """
    modalities = tuple(modalities)
    _check(size, modalities)
    if num_subjects < 1:
        raise ValueError(f"num_subjects is {num_subjects}; ask for at least 1 simulated subject.")
    jobs = [(seed, index, size, modalities) for index in range(num_subjects)]
    load_atlas()  # forked workers then share it
    yield from map_in_order(_row, jobs, num_workers if num_workers > 1 else 0)


def phantom_dataset(
    num_subjects: int = 2000,
    size: int = 128,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    seed: int = 0,
    root: str | Path = "data",
    num_workers: int | None = None,
    show_progress: bool = True,
) -> Path:
    """The folder of a simulated data set, `root/phantom-{size}-{num_subjects}`; it is made first if it is not there.

    Other modalities and seeds than the default stand in the folder's name.

    Args:
        num_subjects: subjects, one slice each; one in five is held out for validation.
        size, modalities, seed: as in `phantom_rows`.
        root: folder in which such folders are kept.
        num_workers: processes; by default one per core.
        show_progress: whether to show a progress bar.
    """
    modalities = tuple(modalities)
    name = "-".join([f"phantom-{size}-{num_subjects}", *(modalities if modalities != DEFAULT_MODALITIES else ())])
    folder = Path(root) / (f"{name}-seed{seed}" if seed else name)
    if not folder.is_dir():
        rows = phantom_rows(num_subjects, size, seed, modalities, num_workers or os.cpu_count())
        rows = tqdm(rows, total=num_subjects, desc="simulating subjects", unit="subject", disable=not show_progress)
        write_slices(rows, folder, modalities, seed=seed)
    return folder


def _row(job: tuple) -> dict:
    seed, index, size, modalities = job
    subject = simulate_subject((seed, index), size, modalities)
    return {
        "subject": f"phantom-{index:06d}",
        "slice_index": 0,
        **dict(zip(modalities, subject.images, strict=True)),
        "mask": subject.mask,
        "source": "phantom",
        "pixel_spacing": subject.pixel_spacing,
    }


def _check(size: int, modalities: tuple[str, ...]) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 32 <= size <= 1024:
        raise ValueError(f"size is {size!r}; give a whole number of pixels from 32 to 1024, such as 64, 128 or 256.")
    for name in check_modalities(modalities):
        if name not in SEQUENCES:
            raise ValueError(f"{name!r} in modalities cannot be simulated; choose from {', '.join(SEQUENCES)}.")


def _sample_anatomy(
    rng: np.random.Generator, size: int, factors: dict
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], tuple[float, float]]:
    """Tissue fractions and smooth within-tissue variation, both (size, size), and the pixel spacing."""
    level, tilt_x, tilt_y = rng.triangular(-5, 10, 46), rng.normal(0, 5), rng.normal(0, 2.5)
    turn, aspect = rng.normal(0, 3), rng.normal(1, 0.035)
    flip, fill = rng.choice([-1.0, 1.0]), rng.uniform(0.86, 0.90)
    fluid_bias, white_bias = rng.normal(-0.7, 0.35), rng.normal(-0.5, 0.2)
    ventricle_growth = 4.5 * rng.beta(1.2, 2)  # mm
    warp = rng.normal(size=(3, 12, 12)) * np.array([2.3, 2.3, 3.5])[:, None, None]
    factors.update(
        level_mm=level, tilt_x_deg=tilt_x, tilt_y_deg=tilt_y, turn_deg=turn, aspect=aspect, flipped=float(flip < 0),
        fluid_bias=fluid_bias, ventricle_growth_mm=ventricle_growth, white_bias=white_bias,
    )  # fmt: skip
    warp *= _unfolding(warp)
    fine = rng.normal(size=(4, 60, 60))
    maps, origin = load_atlas()

    def place(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Voxel coordinates (3, rows, columns) in the atlas of points of the slice, given in mm from its middle."""
        shift = _smooth_field(warp, rows / 36 + 5.5, columns / 36 + 5.5)
        y, x = -rows[:, None] + shift[0], columns[None, :] + shift[1]  # row 0 is the forehead
        angle = np.deg2rad(turn)
        x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
        x, y = flip * x * aspect, y / aspect - 17
        z = level + np.tan(np.deg2rad(tilt_x)) * y + np.tan(np.deg2rad(tilt_y)) * x + shift[2]
        return np.stack([x - origin[0], y - origin[1], z - origin[2]])

    # Where is the brain? A coarse look, then the field of view that it fills to the wanted part.
    axis = np.linspace(-115, 115, _SCOUT)
    inside = interpolate(maps, place(axis, axis).reshape(3, -1))[:, 2].reshape(_SCOUT, _SCOUT) > 0
    rows, columns = axis[inside.any(1)], axis[inside.any(0)]
    step = axis[1] - axis[0]
    field_of_view = (max(np.ptp(rows), np.ptp(columns)) + step) / fill
    pixels = size * max(1, round(_SUPERSAMPLED / size))
    offset = (np.arange(pixels) + 0.5) / pixels - 0.5
    rows, columns = (np.float32(0.5 * (a[0] + a[-1]) + field_of_view * offset) for a in (rows, columns))
    factors["field_of_view_mm"] = field_of_view

    where = place(rows, columns)
    sampled = np.ascontiguousarray(interpolate(maps, where.reshape(3, -1)).T)
    fluid, matter, depth, away = sampled.reshape(4, pixels, pixels)
    ripples = _smooth_field(fine, rows / 6 + 29.5, columns / 6 + 29.5)
    fluid = np.maximum(fluid + fluid_bias + 0.2 * ripples[0], ventricle_growth - away)
    csf = sigmoid(1.7 * fluid)
    white = (1 - csf) * sigmoid(1.9 * (matter + white_bias + 0.15 * ripples[1]))
    tissues = {"white": white, "grey": 1 - csf - white, "csf": csf}
    lesions = _sample_lesions(rng, rows, columns, tissues, depth, ripples[2:], factors)
    vessel = _sample_vessels(rng, rows, np.where(away < 6, 0, csf), depth, where[0] + origin[0], factors)
    vessel = vessel * (1 - lesions["enhancing"] - lesions["necrosis"])
    for name in tissues:
        tissues[name] = tissues[name] * (1 - lesions["enhancing"] - lesions["necrosis"] - vessel)
    # Oedema spreads along white matter and stops at the cortex.
    swollen = lesions.pop("oedema")
    oedema = swollen * (tissues["white"] + 0.2 * tissues["grey"])
    tissues["white"] = tissues["white"] * (1 - swollen)
    tissues["grey"] = tissues["grey"] * (1 - 0.2 * swollen)
    tissues.update(lesions, oedema=oedema, vessel=vessel)
    edge = sigmoid(depth / 0.3)
    tissues = {name: shrink((tissues[name] * edge).astype(np.float32), size) for name in TISSUES}
    textures = {
        "white": shrink(1 + 0.012 * ripples[2] + 0.01 * ripples[3], size),
        "grey": shrink(1 + 0.015 * ripples[3], size),
        "enhancing": shrink(1 + 0.06 * ripples[2], size),
        "iron": shrink(sigmoid((depth - 36) / 4), size),
    }
    textures = {name: np.asarray(t, dtype=np.float32) for name, t in textures.items()}
    return tissues, textures, (field_of_view / size,) * 2


def _sample_lesions(
    rng: np.random.Generator,
    rows: np.ndarray,
    columns: np.ndarray,
    tissues: dict[str, np.ndarray],
    depth: np.ndarray,
    ripples: list[np.ndarray],
    factors: dict,
) -> dict[str, np.ndarray]:
    """Metastases: fractions of enhancing rim, necrotic core and (before white matter is asked) oedema."""
    count = int(rng.choice([1, 2, 3, 4, 5], p=[0.35, 0.28, 0.18, 0.12, 0.07]))
    radii = np.sort(np.clip(rng.lognormal(np.log(6.5), 0.42, count), 4.0, 14.0))[::-1]
    radii[0] = max(radii[0], rng.uniform(6.5, 12))
    # Room: mm to the nearest large fluid space, brain surface or earlier lesion, on a coarse grid.
    step = max(1, len(rows) // _SCOUT)
    spacing = (rows[1] - rows[0]) * step
    large_fluid = ndimage.gaussian_filter(tissues["csf"], 2.0 * step / 4)[step // 2 :: step, step // 2 :: step] > 0.5
    parenchyma = ~large_fluid & (depth[step // 2 :: step, step // 2 :: step] > 2)
    room = ndimage.distance_transform_edt(parenchyma) * spacing
    y, x = rows[step // 2 :: step, None], columns[None, step // 2 :: step]
    white = tissues["white"][step // 2 :: step, step // 2 :: step]

    enhancing, necrosis, healthy = np.zeros_like(depth), np.zeros_like(depth), np.ones_like(depth)
    placed = 0
    for radius in radii:
        candidates = room > 1.1 * radius
        while not candidates.any():
            radius *= 0.9
            candidates = room > 1.1 * radius
        # Metastases seed where grey meets white matter: prefer places near the border of what is allowed.
        weight = candidates * (0.1 + white) * np.exp(-np.maximum(room - 1.3 * radius, 0) / 6)
        index = rng.choice(weight.size, p=(weight / weight.sum()).ravel())
        centre_y, centre_x = y[index // weight.shape[1], 0], x[0, index % weight.shape[1]]
        room = np.minimum(room, np.hypot(y - centre_y, x - centre_x) - radius - 4)
        reach = radius * rng.uniform(0.3, 1.5) + 2
        # Rim: 2 to 4 mm of living tumour around a core that outgrew its blood supply; small ones are solid.
        thickness = rng.uniform(0.28, 0.5) * radius if radius > 6 and rng.random() < 0.8 else 2 * radius
        thickness = max(thickness, 2.4)

        # Signed distances in mm, in a window wide enough for the oedema.
        extent = 1.6 * radius + 2 * reach + 12
        window = tuple(
            slice(*np.searchsorted(axis, (centre - extent, centre + extent)))
            for axis, centre in ((rows, centre_y), (columns, centre_x))
        )
        dy, dx = rows[window[0], None] - np.float32(centre_y), columns[None, window[1]] - np.float32(centre_x)
        angle, distance = np.arctan2(dy, dx), np.hypot(dy, dx)
        coarse, fine = ripples[0][window], ripples[1][window]
        outside = distance - radius * _wobble(rng, angle, 0.09) + 0.25 * coarse
        core = sigmoid(-outside / 0.35)
        inner = max(radius - thickness, -radius) * _wobble(rng, angle, 0.14)
        dead = core * sigmoid(-(distance - inner + 0.4 * fine) / 0.45)
        fingers = 2.8 * coarse + 2.2 * fine + reach * (_wobble(rng, angle, 0.22) - 1)
        wet = np.float32(rng.uniform(0.7, 1.0)) * sigmoid((reach + fingers - outside) / 1.2)
        enhancing[window] = np.maximum(enhancing[window], core - dead)
        necrosis[window] = np.maximum(necrosis[window], dead)
        healthy[window] *= 1 - wet
        placed += 1
        factors.update({f"lesion_{placed}_radius_mm": radius, f"lesion_{placed}_rim_mm": min(thickness, radius)})
    factors["lesions"] = placed
    return {"enhancing": enhancing, "necrosis": necrosis, "oedema": 1 - healthy}


def _wobble(rng: np.random.Generator, angle: np.ndarray, amount: float) -> np.ndarray:
    """A smooth closed outline around 1: low harmonics of the angle with random size and phase."""
    turn = np.linspace(-np.pi, np.pi, 181)
    outline = np.ones_like(turn)
    for order in range(2, 6):
        outline += amount * rng.normal() * 2 / order * np.cos(order * turn + rng.uniform(0, 2 * np.pi))
    return np.interp(angle, turn, np.clip(outline, 0.6, 1.5)).astype(np.float32)


def _sample_vessels(
    rng: np.random.Generator,
    rows: np.ndarray,
    csf: np.ndarray,
    depth: np.ndarray,
    midline: np.ndarray,
    factors: dict,
) -> np.ndarray:
    """Fraction of blood: cortical vessels that follow the sulci, cut across or along, and the sagittal sinus.

    `midline` is the distance in mm, with sign, from the plane between the hemispheres.
    """
    spacing, last = float(rows[1] - rows[0]), len(rows) - 1
    fluid = ndimage.gaussian_filter(csf, 1.0 / spacing, truncate=2.5)
    seeds = np.flatnonzero((fluid > 0.35) & (depth > 1.0) & (depth < 32))
    vessel = np.zeros_like(csf)
    count = int(rng.integers(8, 18))
    factors["vessels"] = count
    for _ in range(count):
        y, x = map(float, np.divmod(rng.choice(seeds), len(rows)))
        radius, length = rng.uniform(0.9, 1.6), rng.choice([0.0, rng.uniform(4, 18)])
        heading = rng.uniform(0, 2 * np.pi)
        path = [(y, x)]
        for _ in range(int(length / 1.5)):  # 1.5 mm a step, turning towards the deepest fluid
            deepest = -1.0
            for turn in (-0.6, -0.3, 0.0, 0.3, 0.6):
                dy, dx = math.sin(heading + turn) / spacing, math.cos(heading + turn) / spacing
                found = fluid[min(max(int(y + 2.5 * dy), 0), last), min(max(int(x + 2.5 * dx), 0), last)]
                if found > deepest:
                    deepest, ahead = found, (turn, y + 1.5 * dy, x + 1.5 * dx)
            heading, y, x = heading + ahead[0], ahead[1], ahead[2]
            path += [((path[-1][0] + y) / 2, (path[-1][1] + x) / 2), (y, x)]
        _paint_tube(vessel, np.array(path), radius / spacing)
    # The superior sagittal sinus, front and back: where the midline meets the margin of the brain.
    line = np.abs(midline).argmin(1)
    along = depth[np.arange(len(rows)), line]
    for radius, end in ((rng.uniform(1.2, 1.8), 0), (rng.uniform(2.0, 3.0), -1)):
        y = np.flatnonzero(along > 0.7 * radius)[end]
        inward = (1 if end == 0 else -1) * radius / spacing
        _paint_tube(vessel, np.array([(y, line[y]), (y + inward, line[y])]), radius / spacing)
    return vessel


def _paint_tube(canvas: np.ndarray, path: np.ndarray, radius: float) -> None:
    """Adds a tube of the given radius around a path of (row, column) points, in pixels, anti-aliased, in place."""
    low = np.maximum(np.floor(path.min(0) - radius - 2), 0).astype(int)
    high = np.ceil(path.max(0) + radius + 3).astype(int)
    window = canvas[low[0] : high[0], low[1] : high[1]]
    y, x = np.ogrid[low[0] : low[0] + window.shape[0], low[1] : low[1] + window.shape[1]]
    distance = np.sqrt(((y - path[:, 0, None, None]) ** 2 + (x - path[:, 1, None, None]) ** 2).min(0))
    np.maximum(window, np.clip(radius + 0.5 - distance, 0, 1), out=window)


def _smooth_field(coefficients: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cubic B-spline surfaces with random coefficients (..., n, n), about unit variance, at rows x columns (in knots)."""

    def basis(at: np.ndarray) -> np.ndarray:
        t = np.abs(at[:, None] - np.arange(coefficients.shape[-1])).astype(np.float32)
        return np.where(t < 1, 2 / 3 - t * t * (1 - t / 2), np.maximum(2 - t, 0) ** 3 / 6).astype(np.float32)

    return basis(rows) @ (coefficients / 0.479).astype(np.float32) @ basis(columns).T


def _unfolding(warp: np.ndarray) -> float:
    """Factor up to 1 that keeps the in-plane warp a diffeomorphism: Jacobian determinant at least 0.35 everywhere."""
    axis = np.linspace(-110, 110, 45)
    shift = _smooth_field(warp[:2], axis / 36 + 5.5, axis / 36 + 5.5)
    (yy, yx), (xy, xx) = (np.gradient(s, axis[1] - axis[0]) for s in shift)
    scale = 1.0
    # Rows run against y (see `place`), hence the signs.
    while ((1 - scale * yy) * (1 + scale * xx) + scale**2 * yx * xy).min() < 0.35:
        scale *= 0.85
    return scale
