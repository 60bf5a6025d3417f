"""8-bit images in memory, as every measure on pixels and on features takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm


def to_uint8(images: np.ndarray | torch.Tensor, name: str = "images") -> np.ndarray:
    """Images as 8-bit ones. Floats in [0, 1] are multiplied by 255 and rounded, as a PNG would hold them.

    Args:
        images: array or tensor of any shape: floats in [0, 1], or uint8, which is returned as it is.
        name: what an error message calls them.

    Raises:
        TypeError: if the images are neither floats nor uint8.
        ValueError: if floats leave [0, 1] or hold NaN.
    """
    images = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"{name} are {images.dtype}: give floats in [0, 1], or uint8 from 0 to 255.")
    if not ((images >= 0) & (images <= 1)).all():  # NaN fails both
        span = f"{name} span {images.min():g} to {images.max():g}: floats must be in [0, 1]."
        raise ValueError(f"{span} Scale them by one window per volume, or clip what a decoder put slightly outside.")
    return np.rint(images * 255.0).astype(np.uint8)


def check_images(images: np.ndarray, name: str = "images") -> None:
    """Raises one clear error unless `images`, an array or a memory map, are 8-bit grey ones that use the 0-255 range.

    Raises:
        TypeError: if the dtype is not uint8.
        ValueError: if the shape is not (N, H, W), N is 0, or no intensity exceeds 1.
    """
    if images.dtype != np.uint8:
        fix = "distances of images in [0, 1] are thousands of times too small: convert them by to_uint8(images)"
        raise TypeError(f"{name} are {images.dtype}: give uint8 images in 0-255; {fix}.")
    if len(images.shape) != 3 or images.shape[0] == 0:
        fix = "give at least one grey image, (N, H, W), one modality at a time, images[:, m]"
        raise ValueError(f"{name} have shape {tuple(images.shape)}: {fix}.")
    if max(int(np.max(images[start : start + 256])) for start in range(0, len(images), 256)) <= 1:
        fix = "[0, 1] images cast to uint8 without scaling. Convert the original floats by to_uint8(images)"
        raise ValueError(f"{name} hold nothing above 1 of 255: {fix}.")


def as_flags(flags: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """`flags` as a bool array; all True, of `shape`, for None."""
    return np.ones(shape, dtype=bool) if flags is None else np.asarray(flags, dtype=bool)


@dataclass(eq=False)
class Slices:
    """N slices of n modalities in memory.

    Args:
        images: (N, n, H, W), uint8 in 0-255, or floats in [0, 1], which are converted by [`to_uint8`].
        subjects: N subject names; every slice is a subject of its own if None.
        present: bool (N, n), which images are there; all if None.

    Raises:
        TypeError, ValueError: on an argument that does not fit, named in the message.
    """

    images: np.ndarray
    subjects: np.ndarray | Sequence[str] | None = None
    present: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.images = to_uint8(self.images)
        if self.images.ndim != 4 or 0 in self.images.shape:
            raise ValueError(f"images have shape {self.images.shape}; it must be (slices, modalities, height, width).")
        if self.subjects is not None:
            self.subjects = np.asarray(self.subjects).astype(str)
            if self.subjects.shape != (len(self),):
                raise ValueError(f"subjects has {len(self.subjects)} names for {len(self)} slices; give one for each.")
        shape = self.images.shape[:2]
        self.present = as_flags(self.present, shape)
        if self.present.shape != shape:
            raise ValueError(f"present has shape {self.present.shape}; with these images it must be {shape}.")

    def __len__(self) -> int:
        return len(self.images)

    def names(self, prefix: str) -> np.ndarray:
        """The N subject names; without any, `prefix` and a number for each slice."""
        return np.array([f"{prefix}-{i}" for i in range(len(self))]) if self.subjects is None else self.subjects

    def check_modalities(self, modalities: Sequence[str], name: str) -> None:
        """Raises an error that calls the slices `name` unless they have one channel for each of `modalities`."""
        if self.images.shape[1] != len(modalities):
            raise ValueError(
                f"{name} has images of shape {self.images.shape}: needed are (N, {len(modalities)}, H, W), one channel "
                f"for each of {', '.join(modalities)}. Leave out masks and colour channels."
            )


def evenly_spaced(dataset: Dataset, max_items: int | None = None) -> Subset:
    """At most `max_items` items, evenly spaced over the whole set; all if None.

    Raises:
        ValueError: if the data set is empty, or `max_items` is below 1.
    """
    count = len(dataset) if max_items is None else min(max_items, len(dataset))
    if count < 1:
        raise ValueError(f"dataset has {len(dataset)} slices, max_items={max_items}: at least one slice is needed.")
    return Subset(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())


def read_slices(dataset: Dataset, max_items: int | None = None) -> Slices:
    """Reads a data set, or `max_items` evenly spaced slices of it, into memory as 8-bit images.

    Args:
        dataset: a `SliceDataset`, or anything with its items: `images` (n, H, W), `present` (n,), `subject`.
        max_items: see [`evenly_spaced`].
    """
    images, subjects, present = [], [], []
    for batch in tqdm(DataLoader(evenly_spaced(dataset, max_items), batch_size=32), desc="read"):
        images.append(to_uint8(batch["images"]))
        subjects += list(batch["subject"])
        present.append(batch["present"].numpy())
    return Slices(np.concatenate(images), subjects, np.concatenate(present))
