"""Simulated brains with tumours: any anatomy under any scanner, as slices or volumes, with the truth behind.

    subject = simulate_subject(seed=1, acquisition_seed=2)
    volume = simulate_volume(seed=1, acquisition_seed=2, spacing=1.0)

An anatomy (`anatomy.py`) and an acquisition (`acquisition.py`) are drawn from seeds of their own. A slice is a cut through
the anatomy, the same to the bit whether it is drawn alone or with its volume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np

from dldm_pipeline.data.acquisition import SEQUENCES, Acquisition, image_slice, sample_acquisition
from dldm_pipeline.data.anatomy import Anatomy, entropy
from dldm_pipeline.modalities import DEFAULT_MODALITIES, check_modalities

SIMULATOR_VERSION = 2
"""Raised whenever a seed gives other images than before; part of the name of a cached data set."""

_HEIGHT_STEP = 1e-6  # heights are rounded to it, so that a slice of a volume has a height that can be given again

Seed = int | tuple[int, ...]


@dataclass
class SimulatedSubject:
    """One slice of a simulated subject.

    Attributes:
        images: (n, H, W) float32 in [0, 1], one per modality; 0 outside the brain. Row 0 is anterior.
        labels: (H, W) uint8: 1 necrotic core, 2 oedema, 3 enhancing tumour, 0 else.
        tissues: name in `TISSUES` -> (H, W) float32 partial-volume fraction in [0, 1]; they sum to 1 inside the brain, to at
            least 0.5 at its rim.
        factors: name -> number drawn, of the anatomy and of the acquisition.
        modalities: names of the images, in order.
        height: relative level of the slice in the brain: 0 lowest, 1 highest.
        pixel_spacing: (row, column) in mm.
        seeds: of the anatomy and of the acquisition.
    """

    images: np.ndarray
    labels: np.ndarray
    tissues: dict[str, np.ndarray]
    factors: dict[str, float]
    modalities: tuple[str, ...]
    height: float
    pixel_spacing: tuple[float, float]
    seeds: tuple[Seed, Seed]

    @property
    def mask(self) -> np.ndarray:
        """(H, W) uint8 in {0, 1}: the whole tumour."""
        return (self.labels > 0).astype(np.uint8)


@dataclass
class SimulatedVolume:
    """A simulated subject as a stack of axial slices, from the lowest to the highest.

    Attributes:
        images: (n, D, H, W) float32 in [0, 1], one per modality; 0 outside the brain.
        labels: (D, H, W) uint8, as in [`SimulatedSubject`].
        factors: name -> number drawn.
        modalities: names of the images, in order.
        heights: (D,) relative levels: each slice is `simulate_subject(..., height=heights[i])`.
        spacing: (slice, row, column) in mm.
        seeds: of the anatomy and of the acquisition.
    """

    images: np.ndarray
    labels: np.ndarray
    factors: dict[str, float]
    modalities: tuple[str, ...]
    heights: np.ndarray
    spacing: tuple[float, float, float]
    seeds: tuple[Seed, Seed]

    @property
    def mask(self) -> np.ndarray:
        """(D, H, W) uint8 in {0, 1}: the whole tumour."""
        return (self.labels > 0).astype(np.uint8)


def simulate_subject(
    seed: Seed,
    acquisition_seed: Seed | None = None,
    size: int = 128,
    height: float | None = None,
    tumour: bool = True,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
) -> SimulatedSubject:
    """Simulates one slice; the same arguments give the same slice.

    Args:
        seed: of the anatomy: a non-negative integer, or several in a tuple.
        acquisition_seed: of the scanner; by default `seed`.
        size: height and width of the images in pixels, 32 to 1024.
        height: relative level of the slice in the brain, 0 to 1. By default it is drawn from `seed`: a level that shows a
            lesion or, without tumour, one between 0.2 and 0.9.
        tumour: whether the subject has lesions; the rest of the anatomy is the same without.
        modalities: names out of `SEQUENCES`, in the order wanted. An image does not depend on the others asked for.

    Raises:
        ValueError: a seed, size, height or modality that cannot be simulated.
    """
    modalities = _check(size, modalities)
    seeds = _seeds(seed, acquisition_seed)
    anatomy, acquisition = _anatomy(seeds[0], tumour), sample_acquisition(seeds[1])
    if height is not None and not (isinstance(height, Real) and 0 <= height <= 1):
        raise ValueError(f"height is {height!r}; give the relative level of the slice, 0 (lowest) to 1 (highest).")
    drawn = height is None
    height = _sample_height(anatomy, seeds[0]) if drawn else _round(height)
    images, labels, tissues = _render(anatomy, acquisition, seeds, height, size, modalities)
    if drawn and tumour and not labels.any():  # the lesion's margin: take its middle
        height = _round(anatomy.relative_height(anatomy.lesions[0]["centre"][2]))
        images, labels, tissues = _render(anatomy, acquisition, seeds, height, size, modalities)
    return SimulatedSubject(
        images,
        labels,
        tissues,
        {"height": height, **anatomy.factors, **acquisition.factors},
        modalities,
        height,
        (anatomy.field_of_view / size,) * 2,
        seeds,
    )


def simulate_volume(
    seed: Seed,
    acquisition_seed: Seed | None = None,
    spacing: float = 1.0,
    size: int = 128,
    tumour: bool = True,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
) -> SimulatedVolume:
    """Simulates the axial slices of a whole brain.

    Args:
        seed, acquisition_seed, size, tumour, modalities: as in [`simulate_subject`].
        spacing: mm between two slices, 0.5 to 20.

    Raises:
        ValueError: a seed, spacing, size or modality that cannot be simulated.
    """
    modalities = _check(size, modalities)
    seeds = _seeds(seed, acquisition_seed)
    if not (isinstance(spacing, Real) and 0.5 <= spacing <= 20):
        raise ValueError(f"spacing is {spacing!r}; give the mm between two slices, from 0.5 to 20.")
    anatomy, acquisition = _anatomy(seeds[0], tumour), sample_acquisition(seeds[1])
    step = spacing / (anatomy.top - anatomy.bottom)
    heights = np.array([_round(h) for h in np.arange(0.5 * step, 1, step)])
    images = np.empty((len(modalities), len(heights), size, size), dtype=np.float32)
    labels = np.empty((len(heights), size, size), dtype=np.uint8)
    for index, height in enumerate(heights):
        images[:, index], labels[index], _ = _render(anatomy, acquisition, seeds, float(height), size, modalities)
    return SimulatedVolume(
        images,
        labels,
        {**anatomy.factors, **acquisition.factors},
        modalities,
        heights,
        (spacing, anatomy.field_of_view / size, anatomy.field_of_view / size),
        seeds,
    )


@lru_cache(maxsize=2)
def _anatomy(seed: Seed, tumour: bool) -> Anatomy:
    return Anatomy(seed, tumour)


def _round(height: float) -> float:
    return round(float(height) / _HEIGHT_STEP) * _HEIGHT_STEP


def _seeds(seed: Any, acquisition_seed: Any) -> tuple[Seed, Seed]:
    """Both seeds, checked, as an integer or a tuple of integers each."""
    checked = []
    for name, value in (("seed", seed), ("acquisition_seed", seed if acquisition_seed is None else acquisition_seed)):
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not numbers or not all(isinstance(number, (int, np.integer)) and number >= 0 for number in numbers):
            raise ValueError(f"{name} is {value!r}; give a whole number of at least 0, or several in a tuple.")
        numbers = tuple(int(number) for number in numbers)
        checked.append(numbers if isinstance(value, (list, tuple)) else numbers[0])
    return tuple(checked)


def _sample_height(anatomy: Anatomy, seed: Seed) -> float:
    rng = np.random.default_rng(np.random.SeedSequence(entropy(seed), spawn_key=(7,)))
    if not anatomy.lesions:
        return _round(rng.uniform(0.2, 0.9))
    lesion = anatomy.lesions[int(rng.integers(len(anatomy.lesions)))]
    reach = lesion["radius"] + 0.5 * lesion["reach"]
    height = anatomy.relative_height(lesion["centre"][2] + reach * rng.uniform(-0.9, 0.9))
    return _round(np.clip(height, 0.05, 0.95))


def _render(
    anatomy: Anatomy,
    acquisition: Acquisition,
    seeds: tuple[Seed, Seed],
    height: float,
    size: int,
    modalities: tuple[str, ...],
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Images, labels and tissues of one slice. The noise depends on the seeds and the height only."""
    tissues, textures, labels = anatomy.cut(height, size)
    noise = np.random.default_rng([*entropy(seeds[0]), *entropy(seeds[1]), round(height / _HEIGHT_STEP)])
    images = image_slice(anatomy, acquisition, tissues, textures, height, modalities, noise)
    return images, labels, tissues


def _check(size: int, modalities: Sequence[str]) -> tuple[str, ...]:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 32 <= size <= 1024:
        raise ValueError(f"size is {size!r}; give a whole number of pixels from 32 to 1024, such as 64, 128 or 256.")
    modalities = check_modalities(modalities)
    for name in modalities:
        if name not in SEQUENCES:
            raise ValueError(f"{name!r} in modalities cannot be simulated; choose from {', '.join(SEQUENCES)}.")
    return modalities
