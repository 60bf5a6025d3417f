"""Does a sample copy a training subject?

Three questions, asked in every *channel*: the image of each modality, and z_struct, since DLDM can put a copied anatomy
under a new appearance.

1. How close is the nearest training subject?  Correlation, searched over flips and shifts.
2. Is that closer than chance brings any two subjects?  The nearest-neighbour ratio: distance to the nearest training
   subject over distance to the nearest held-out subject. Copies lie far below 1.
3. Is the sample closer to its training subject than that one is to its own neighbour?  Authenticity (Alaa et al., "How
   Faithful is your Synthetic Data?", ICML 2022): the share of samples for which this is not so.

What is correlated is the *orientation* of the edges, not the intensities: a curve that remaps the intensities (gamma, window,
inversion) changes how steep an edge is and which side is brighter, but not which way it runs. z_struct is compared
through the decoder: each anatomy is rendered under one and the same appearance (the mean style of a modality) and
searched like an image. The latent grid itself knows no flips, and a shift by less than a cell changes it beyond recognition.

[`MemorizationFilter`] is built once from training and held-out images and then refuses copies in what a pipeline draws;
`evaluate_memorization` applies it to a whole set of samples and reports. A copy that was rotated, scaled or bent by more
than a pixel or two, or of which a part alone was taken, is not looked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage, stats
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

STRUCTURE = "z_struct"  # name of the channel in which anatomies are compared

FLIPS = ((), (-1,), (-2,), (-2, -1))  # axes of the image

# Lengths are in pixels of a 128-pixel image and scaled to images of another size, so that figures mean the same there.
_EDGE_WIDTH = 1.5  # standard deviation of the Gaussian whose derivative finds the edges
_FLAT = 0.5  # an edge of this share of the mean steepness counts half: flat tissue, where noise rules, counts little
_FREQUENCIES = 8  # the coarse search keeps this many cycles per image, up to 16 pixels a wave...
_COARSE_STEP = 5.0  # ...and therefore need not try every shift


def orientation_field(images: torch.Tensor) -> torch.Tensor:
    """Which way the edges run, whatever the contrast.

    The gradient of the smoothed image as a complex number g, squared, over |g|² plus a floor: an edge has about unit size
    and twice its angle, so that the two sides of an edge can be exchanged; flat regions are near zero. After the
    normalised gradient fields of Haber and Modersitzki (MICCAI 2006).

    Args:
        images: (N, H, W), any scale of intensities.

    Returns:
        complex64 (N, H, W); all zeros for a constant image.
    """
    images = images.to(torch.float32)
    (smooth_y, slope_y), (smooth_x, slope_x) = (
        (torch.from_numpy(m).to(images.device) for m in _edge_filters(side, min(images.shape[-2:])))
        for side in images.shape[-2:]
    )
    along_x, along_y = smooth_y @ (images @ slope_x.T), slope_y @ (images @ smooth_x.T)
    gradient = torch.complex(along_x, along_y)
    size = gradient.abs()
    floor = (_FLAT * size.mean(dim=(1, 2), keepdim=True)).clamp_min(1e-12)
    return gradient**2 / (size**2 + floor**2)


@lru_cache(maxsize=16)
def _edge_filters(side: int, shorter: int) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian and its derivative as (side, side) float32 matrices; the border pixel is repeated outwards.

    As matrices they are several times faster on small images than convolutions of one channel.
    """
    sigma = _EDGE_WIDTH * shorter / 128
    both = (ndimage.gaussian_filter1d(np.eye(side), sigma, axis=0, order=o, mode="nearest") for o in (0, 1))
    return tuple(np.ascontiguousarray(matrix, dtype=np.float32) for matrix in both)


@dataclass
class Matches:
    """The nearest reference image of each of Q queries in each of C channels.

    Attributes:
        similarity: (Q, C) correlation in [-1, 1] at the best flip and shift; NaN where the query has no image, or the
            reference has none to compare with.
        index: (Q, C) number of the reference slice; -1 where `similarity` is NaN.
        flip: (Q, C, 2) bool: (up-down, left-right). The query, first flipped and then rolled by `shift`, lies on the
            reference.
        shift: (Q, C, 2) whole pixels: (down, right).
    """

    similarity: np.ndarray
    index: np.ndarray
    flip: np.ndarray
    shift: np.ndarray


class CopySearch:
    """Finds the most similar of N reference slices under flips and shifts, channel by channel.

    All pairs are compared on the low frequencies of their [`orientation_field`], for every flip and a grid of shifts, by one
    matrix product; the best few again at full resolution, at every shift. The search keeps the images as bytes and
    about 600 numbers for each; nothing else grows with N but one block of scores.

    Args:
        images: (N, C, H, W), uint8, or float in [0, 1].
        subjects: N names; slices of one subject are not compared with each other when `search` is given names, too. Every
            slice is a subject of its own if None.
        present: bool (N, C), which images are there; all if None.
        max_shift: largest shift in pixels of a 128-pixel image, in either direction.
        candidates: how many of the best go on to full resolution.

    Raises:
        ValueError: on an argument that does not fit, named in the message.
    """

    def __init__(
        self,
        images: np.ndarray,
        subjects: Sequence[str] | None = None,
        present: np.ndarray | None = None,
        max_shift: float = 10.0,
        candidates: int = 3,
    ) -> None:
        self.images = as_bytes(images, "images")
        count, channels, height, width = self.images.shape
        if count == 0:
            raise ValueError("images has no slices: there is nothing to compare with. Give at least one.")
        if not 0 <= max_shift <= 32:
            raise ValueError(f"max_shift={max_shift}: give pixels of a 128-pixel image from 0 to 32, such as 10.")
        if candidates < 1:
            raise ValueError(f"candidates={candidates}: at least one must go on to full resolution, such as 3.")
        self.subjects = _names(subjects, count, "subjects")
        self.present = _presence(present, (count, channels), "present")
        self.candidates = min(candidates, count)
        self.max_shift = round(max_shift * min(height, width) / 128)

        keep = min(_FREQUENCIES, (min(height, width) - 1) // 2)
        self._frequencies = torch.arange(-keep, keep + 1)
        steps = int(np.ceil(max_shift / _COARSE_STEP))
        grid = torch.linspace(-self.max_shift, self.max_shift, 2 * steps + 1) if steps else torch.zeros(1)
        turn_y = torch.exp(-2j * torch.pi * grid[:, None] * self._frequencies / height)
        turn_x = torch.exp(-2j * torch.pi * grid[:, None] * self._frequencies / width)
        turns = turn_y[:, None, :, None] * turn_x[None, :, None, :]  # a shift turns the phase of each frequency
        self._turns = turns.flatten(0, 1).to(torch.complex64)
        self._coarse = torch.empty(channels, count, 2 * len(self._frequencies) ** 2)
        for start in range(0, count, 64):
            rows = slice(start, start + 64)
            for channel in range(channels):
                field = orientation_field(torch.from_numpy(self.images[rows, channel]))
                self._coarse[channel, rows] = _as_vectors(self._low(torch.fft.fft2(field)))

    def _low(self, spectra: torch.Tensor) -> torch.Tensor:
        """The low frequencies (..., k, k) of spectra (..., H, W), scaled to unit length."""
        low = spectra[..., self._frequencies, :][..., self._frequencies]
        return low / low.abs().square().sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-9)

    @torch.no_grad()
    def search(
        self,
        images: np.ndarray,
        subjects: Sequence[str] | None = None,
        present: np.ndarray | None = None,
        batch_size: int = 32,
        progress: bool = True,
        description: str = "search",
    ) -> Matches:
        """The nearest reference slice of every query.

        Args:
            images: (Q, C, H, W), uint8, or float in [0, 1], of the reference's size.
            subjects: Q names; a query is not compared with reference slices of its own name. None compares with all.
            present: bool (Q, C), which images are there; all if None.
            batch_size: queries at a time.
            progress, description: show a progress bar, and its text.

        Raises:
            ValueError: if the images do not fit the reference.
        """
        images = as_bytes(images, "images")
        if images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"images has shape {images.shape}; it must be (queries, *{self.images.shape[1:]}) as the reference is."
            )
        count, channels = images.shape[:2]
        names = None if subjects is None else _names(subjects, count, "subjects")
        present = _presence(present, (count, channels), "present")
        found = Matches(
            similarity=np.full((count, channels), np.nan),
            index=np.full((count, channels), -1),
            flip=np.zeros((count, channels, 2), dtype=bool),
            shift=np.zeros((count, channels, 2), dtype=int),
        )
        for start in tqdm(range(0, count, batch_size), desc=description, disable=not progress):
            for channel in range(channels):
                rows = start + np.flatnonzero(present[start : start + batch_size, channel])
                allowed = np.repeat(self.present[None, :, channel], len(rows), axis=0)
                if names is not None:
                    allowed &= names[rows, None] != self.subjects[None, :]
                rows, allowed = rows[allowed.any(axis=1)], allowed[allowed.any(axis=1)]
                if len(rows):
                    self._search_channel(images, rows, channel, torch.from_numpy(allowed), found)
        return found

    def _search_channel(
        self, images: np.ndarray, rows: np.ndarray, channel: int, allowed: torch.Tensor, found: Matches
    ) -> None:
        """Searches for some rows of one channel and writes into `found`."""
        field = orientation_field(torch.from_numpy(images[rows, channel]))
        # Coarse: every flip and shift of each query against every reference slice.
        spectra, vectors, best = [], [], None
        for flip in FLIPS:
            # An image flipped along one axis has the conjugate field: the double angle changes its sign.
            flipped = field.flip(flip) if flip else field
            spectrum = torch.fft.fft2(flipped.conj() if len(flip) == 1 else flipped)
            turned = _as_vectors(self._low(spectrum)[None] * self._turns[:, None])  # (shifts, rows, numbers)
            score = (turned.flatten(0, 1) @ self._coarse[channel].T).unflatten(0, turned.shape[:2]).amax(dim=0)
            best = score if best is None else torch.maximum(best, score, out=best)
            spectra.append(spectrum)
            vectors.append(turned)
        best.masked_fill_(~allowed, -torch.inf)
        candidates = best.topk(self.candidates, dim=1).indices
        near = self._coarse[channel][candidates]  # (rows, candidates, numbers)
        by_flip = torch.stack([torch.einsum("srd,rkd->rks", turned, near).amax(dim=2) for turned in vectors])
        flips = by_flip.argmax(dim=0)

        # Fine: the best few at full resolution, in the flip found, at every whole shift.
        spectra, reach = torch.stack(spectra), self.max_shift
        similarity, place = torch.empty(candidates.shape), torch.empty(candidates.shape, dtype=torch.long)
        for k in range(self.candidates):
            query = spectra[flips[:, k], torch.arange(len(rows))]
            stored = torch.from_numpy(self.images[candidates[:, k].numpy(), channel])
            reference = torch.fft.fft2(orientation_field(stored))
            # Only shifts within reach are wanted: the inverse transform of few rows first, then of few columns.
            correlation = torch.fft.ifft(reference * query.conj(), dim=1).roll(reach, dims=1)[:, : 2 * reach + 1]
            correlation = torch.fft.ifft(correlation, dim=2).real.roll(reach, dims=2)[..., : 2 * reach + 1]
            energy = torch.linalg.vector_norm(query, dim=(1, 2)) * torch.linalg.vector_norm(reference, dim=(1, 2))
            peak, place[:, k] = correlation.flatten(1).max(dim=1)
            similarity[:, k] = peak * query[0].numel() / energy.clamp_min(1e-12)
        similarity.masked_fill_(~allowed.gather(1, candidates), -torch.inf)
        value, winner = similarity.max(dim=1)
        take = winner[:, None]
        place = place.gather(1, take)[:, 0].numpy()
        flip = flips.gather(1, take)[:, 0].numpy()
        found.similarity[rows, channel] = value.clamp(-1, 1).numpy()
        found.index[rows, channel] = candidates.gather(1, take)[:, 0].numpy()
        found.flip[rows, channel] = np.array([(-2 in axes, -1 in axes) for axes in FLIPS])[flip]
        found.shift[rows, channel] = np.stack([place // (2 * reach + 1), place % (2 * reach + 1)], axis=1) - reach


def _as_vectors(spectra: torch.Tensor) -> torch.Tensor:
    """Complex (..., k, k) to real (..., 2 k²): the real part of a complex correlation becomes a plain dot product."""
    return torch.view_as_real(spectra.contiguous()).flatten(-3)


def as_bytes(images: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Images as uint8, 255 for white: a fourth of the memory, and as exact as a saved picture.

    Args:
        images: (N, C, H, W), uint8, or float in [0, 1].
        name: what the argument is called in an error message.

    Raises:
        ValueError: on another shape or type, or values outside [0, 1], NaN included.
    """
    images = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"{name} has shape {images.shape}; it must be (slices, channels, height, width).")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} has dtype {images.dtype}; give float in [0, 1], or uint8 from 0 to 255.")
    out = np.empty(images.shape, dtype=np.uint8)
    for start in range(0, len(images), 64):  # in blocks, so that no second float copy of everything is made
        block = images[start : start + 64]
        low, high = block.min(), block.max()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails this, too
            raise ValueError(f"{name} has values from {low} to {high}; scale them to [0, 1], or give uint8.")
        out[start : start + 64] = np.rint(np.clip(block, 0, 1) * 255)
    return out


def _names(subjects: Sequence[str] | None, count: int, name: str) -> np.ndarray:
    if subjects is None:
        return np.array([f"slice-{i}" for i in range(count)])
    if len(subjects) != count:
        raise ValueError(f"{name} has {len(subjects)} names for {count} slices; give one name for each slice.")
    return np.asarray(subjects).astype(str)


def _presence(present: np.ndarray | None, shape: tuple[int, int], name: str) -> np.ndarray:
    if present is None:
        return np.ones(shape, dtype=bool)
    present = np.asarray(present, dtype=bool)
    if present.shape != shape:
        raise ValueError(f"{name} has shape {present.shape}; with these images it must be {shape}.")
    return present


class StructureRenderer:
    """Shows anatomies under one fixed appearance, so that two of them can be compared like images.

    Args:
        autoencoder: a `DisentangledAutoencoder` in evaluation mode, on the device to use.
        images: (N, n, H, W), uint8, or float in [0, 1]: training images, whose mean styles are the appearance.
        present: bool (N, n), which images are there; all if None.
        modality: the name of the modality to render in; the first by default.
        batch_size: slices per call of the autoencoder.

    Raises:
        ValueError: if the modality is unknown to the autoencoder, or no slice has it.
    """

    def __init__(
        self,
        autoencoder: torch.nn.Module,
        images: np.ndarray,
        present: np.ndarray | None = None,
        modality: str | None = None,
        batch_size: int = 16,
    ) -> None:
        known = list(autoencoder.config.modalities)
        modality = known[0] if modality is None else modality
        if modality not in known:
            raise ValueError(f"modality={modality!r} is unknown to the autoencoder; choose from {', '.join(known)}.")
        self.autoencoder, self.batch_size = autoencoder, batch_size
        present = _presence(present, np.shape(images)[:2], "present")
        having = np.flatnonzero(present[:, known.index(modality)])
        if len(having) == 0:
            raise ValueError(f"modality={modality!r}: no slice has it; name one that the images show.")
        # A mean needs no more than 256 of them.
        having = having[np.linspace(0, len(having) - 1, min(len(having), 256)).round().astype(int)]
        styles = [self._encode(images[rows], present[rows])[1] for rows in self._batches(having)]
        self.style = torch.cat(styles)[:, known.index(modality)].mean(dim=0)

    def _batches(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    @torch.no_grad()
    def _encode(self, images: np.ndarray, present: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior modes of structure and styles."""
        device, dtype = self.autoencoder.device, self.autoencoder.dtype
        pixels = torch.from_numpy(as_bytes(images, "images")).to(device, dtype) / 255
        output = self.autoencoder.encode(pixels, torch.from_numpy(present).to(device))
        return output.structure_dist.mode(), output.style_dist.mode()

    @torch.no_grad()
    def render(self, structure: torch.Tensor | np.ndarray) -> np.ndarray:
        """z_struct (S, c_s, h, w), in the autoencoder's own scale, as pictures: uint8 (S, H, W)."""
        structure = torch.as_tensor(structure)
        pictures = []
        for z in structure.split(self.batch_size):
            z = z.to(self.autoencoder.device, self.autoencoder.dtype)
            sample = self.autoencoder.decode(z, self.style.expand(len(z), 1, *self.style.shape)).sample[:, 0]
            pictures.append((sample.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(pictures).numpy()

    def render_images(self, images: np.ndarray, present: np.ndarray | None = None, progress: bool = True) -> np.ndarray:
        """Encodes images (S, n, H, W) and renders their z_struct: uint8 (S, H, W)."""
        present = _presence(present, np.shape(images)[:2], "present")
        batches = tqdm(self._batches(np.arange(len(images))), desc="encode structure", disable=not progress)
        return np.concatenate([self.render(self._encode(images[rows], present[rows])[0]) for rows in batches])


@dataclass
class CopyCheck:
    """What [`MemorizationFilter`] says about S subjects in C channels (the modalities, then z_struct).

    Attributes:
        channels: the C names.
        keep: (S,) bool; False for a likely copy.
        score: (S,) how unusually close the closest channel is: in deviations of held-out subjects from their median.
        threshold: `keep` is `score <= threshold`.
        similarity: (S, C) correlation with the nearest training slice; NaN where the channel is missing.
        ratio: (S, C) distance to it (1 - similarity) over the distance to the nearest held-out slice.
        channel_scores: (S, C); `score` is their maximum.
        nearest: (S, C) number of the nearest training slice; -1 where the channel is missing.
        nearest_subjects: (S, C) its subject's name.
        flip, shift: (S, C, 2) what lays the sample over it, as in [`Matches`].
    """

    channels: list[str]
    keep: np.ndarray
    score: np.ndarray
    threshold: float
    similarity: np.ndarray
    ratio: np.ndarray
    channel_scores: np.ndarray
    nearest: np.ndarray
    nearest_subjects: np.ndarray
    flip: np.ndarray
    shift: np.ndarray

    @property
    def num_refused(self) -> int:
        return int((~self.keep).sum())


class MemorizationFilter:
    """Refuses copies of training subjects; built once, then called on what a [`DLDMPipeline`] returns.

    The decision rests on the nearest-neighbour ratio of every channel. How low it gets by chance is measured on held-out
    subjects, which copy nobody: half of them (drawn by subject) set the threshold, so that at most a share of
    `false_alarm_rate` of such subjects is refused; the other half, `held_out_check`, only reports whether that holds. The
    threshold is a tolerance limit (Wilks, Ann. Math. Stat. 12 (1941) 91): the lowest of the k calibrating scores that keeps
    the promise with a confidence of 95 %. With fewer than 149 slices for a rate of 0.02 none does; it is then the highest
    score, which refuses 1 / (k + 1) on average.

    Args:
        train_images, held_out_images: (N, n, H, W), uint8, or float in [0, 1].
        modalities: the n names.
        autoencoder: the model whose z_struct is compared; None compares images alone.
        train_subjects, held_out_subjects: N names each; every slice is a subject of its own if None.
        train_present, held_out_present: bool (N, n), which images are there; all if None.
        false_alarm_rate: share of innocent subjects that may be refused.
        max_shift: largest shift looked for, in pixels of a 128-pixel image.
        batch_size: subjects at a time.
        seed: seed of the split of the held-out subjects.
        progress: show progress bars.

    Attributes:
        channels: names of what is compared: the modalities, then "z_struct" if there is an autoencoder.
        threshold: of the score, see [`CopyCheck`].
        held_out_check: the [`CopyCheck`] of the held-out slices that had no say in the threshold.
        num_checked, num_refused: counts over all calls.

    Examples:

    ```py
    >>> from dldm_pipeline.data.slices import SliceDataset
    >>> from dldm_pipeline.metrics.memorization import MemorizationFilter, keep_subjects

    >>> train, held_out = SliceDataset(path, "train"), SliceDataset(path, "validation")
    >>> is_new = MemorizationFilter.from_datasets(train, held_out, pipe.autoencoder)
    >>> output = pipe(num_subjects=8)
    >>> check = is_new(output)
    >>> output, check.num_refused
    >>> output = keep_subjects(output, check.keep)
    ```

    Raises:
        ValueError: on an argument that does not fit, named in the message.
    """

    def __init__(
        self,
        train_images: np.ndarray,
        held_out_images: np.ndarray,
        modalities: Sequence[str],
        autoencoder: torch.nn.Module | None = None,
        train_subjects: Sequence[str] | None = None,
        held_out_subjects: Sequence[str] | None = None,
        train_present: np.ndarray | None = None,
        held_out_present: np.ndarray | None = None,
        false_alarm_rate: float = 0.02,
        max_shift: float = 10.0,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate={false_alarm_rate}: give a share between 0 and 1, such as 0.02.")
        self.modalities = list(modalities)
        self.false_alarm_rate, self.batch_size = false_alarm_rate, batch_size
        train_images = as_bytes(train_images, "train_images")
        held_out_images = as_bytes(held_out_images, "held_out_images")
        for name, images in (("train_images", train_images), ("held_out_images", held_out_images)):
            if images.shape[1] != len(self.modalities):
                raise ValueError(
                    f"{name} has {images.shape[1]} modalities, but {len(self.modalities)} are named: "
                    f"{', '.join(self.modalities)}. Name each image's modality, in order."
                )
        if autoencoder is not None and list(autoencoder.config.modalities) != self.modalities:
            raise ValueError(
                f"modalities are {', '.join(self.modalities)}, the autoencoder's {', '.join(autoencoder.config.modalities)}: "
                "read the data with modalities=autoencoder.config.modalities."
            )
        train_present = _presence(train_present, train_images.shape[:2], "train_present")
        held_out_present = _presence(held_out_present, held_out_images.shape[:2], "held_out_present")
        subjects = _names(held_out_subjects, len(held_out_images), "held_out_subjects")
        names = np.unique(subjects)
        if len(names) < 2:
            raise ValueError(
                f"held_out_images shows {len(names)} subjects: one half sets the threshold and one half checks it, "
                "so give at least 2, and 100 or more to trust the threshold."
            )
        if train_subjects is not None:
            both = sorted(set(map(str, train_subjects)) & set(map(str, held_out_subjects or ())))
            if both:
                raise ValueError(
                    f"held_out_subjects has {len(both)} subjects of train_subjects, {both[0]!r} for one: "
                    "split by subject, or copies will pass for chance."
                )

        self.channels = self.modalities + ([STRUCTURE] if autoencoder is not None else [])
        self.renderer = None
        if autoencoder is not None:
            self.renderer = StructureRenderer(autoencoder, train_images, train_present)
        train, train_present = self._with_structure(train_images, train_present, None, progress)
        held_out, held_out_present = self._with_structure(held_out_images, held_out_present, None, progress)
        self.train = CopySearch(train, train_subjects, train_present, max_shift)
        self.held_out = CopySearch(held_out, subjects, held_out_present, max_shift)
        self._own_distance: dict[tuple[int, int], float] = {}  # (training slice, channel) -> distance to its neighbour

        # Every held-out slice against the training set, and against the other held-out subjects.
        matches, ratio = self._compare(held_out, held_out_present, subjects, progress)
        calibrating = np.isin(subjects, np.random.default_rng(seed).permutation(names)[: (len(names) + 1) // 2])
        logs = np.log(ratio[calibrating])
        self._centre, self._spread = np.zeros(len(self.channels)), np.ones(len(self.channels))
        for c in range(len(self.channels)):
            known = logs[np.isfinite(logs[:, c]), c]
            if len(known):
                self._centre[c] = np.median(known)
                # Robust, as scores of different channels are compared; the floor is for a handful of subjects.
                self._spread[c] = max(1.4826 * np.median(np.abs(known - self._centre[c])), 0.02)
        scores = np.sort(self._score(ratio)[1][calibrating])
        # If more than the tolerated share of all subjects scored above the threshold, then so few of the k would be above it
        # with a probability of 5 % at most.
        above = max(0, int(stats.binom.ppf(0.05, len(scores), false_alarm_rate)) - 1)
        self.threshold = float(scores[len(scores) - 1 - above])
        self.num_calibrating = len(scores)
        self.held_out_check = self._check(matches, ratio, ~calibrating)
        self.held_out_rows = np.flatnonzero(~calibrating)
        self.num_checked = self.num_refused = 0

    @classmethod
    def from_datasets(
        cls,
        train: Dataset,
        held_out: Dataset,
        autoencoder: torch.nn.Module | None = None,
        max_items: int | None = None,
        progress: bool = True,
        **options,
    ) -> MemorizationFilter:
        """Builds the filter from two splits of a data set.

        Args:
            train, held_out: `SliceDataset`s, or anything with their items and `modalities`.
            autoencoder: see the class.
            max_items: at most this many slices of each, taken at even distances; all if None. Copies of those left out
                are not found.
            progress: show progress bars.
            options: further arguments of the class.
        """
        images, subjects, present = read_slices(train, max_items, progress=progress)
        others, other_subjects, other_present = read_slices(held_out, max_items, progress=progress)
        return cls(
            images, others, train.modalities, autoencoder, subjects, other_subjects, present, other_present,
            progress=progress, **options,
        )  # fmt: skip

    def _with_structure(
        self, images: np.ndarray, present: np.ndarray, structure: torch.Tensor | None, progress: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adds the channel of z_struct: of `structure`, or of the images' own where that is None."""
        if self.renderer is None:
            return images, present
        there = np.ones((len(images), 1), dtype=bool)
        if structure is not None:
            pictures = self.renderer.render(structure)
        else:
            there[:, 0] = present.any(axis=1)
            pictures = np.zeros((len(images), *images.shape[2:]), dtype=np.uint8)
            if there.any():
                rows = np.flatnonzero(there[:, 0])
                pictures[rows] = self.renderer.render_images(images[rows], present[rows], progress)
        return np.concatenate([images, pictures[:, None]], axis=1), np.concatenate([present, there], axis=1)

    def _compare(
        self, images: np.ndarray, present: np.ndarray, held_out_names: np.ndarray | None, progress: bool
    ) -> tuple[Matches, np.ndarray]:
        """Nearest training slices and nearest-neighbour ratios. The names keep a held-out slice from its own subject."""
        options = dict(present=present, batch_size=self.batch_size, progress=progress)
        matches = self.train.search(images, description="against training", **options)
        others = self.held_out.search(images, held_out_names, description="against held-out", **options)
        return matches, _distance(matches) / np.maximum(_distance(others), 1e-6)

    def _score(self, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(S, C) scores of the channels and (S,) the highest of each subject; NaN and -inf where there is nothing."""
        each = (self._centre - np.log(ratio)) / self._spread
        return each, np.where(np.isfinite(each), each, -np.inf).max(axis=1)

    def _check(self, matches: Matches, ratio: np.ndarray, rows: np.ndarray) -> CopyCheck:
        each, score = self._score(ratio[rows])
        return CopyCheck(
            channels=self.channels,
            keep=score <= self.threshold,
            score=score,
            threshold=self.threshold,
            similarity=matches.similarity[rows],
            ratio=ratio[rows],
            channel_scores=each,
            nearest=matches.index[rows],
            nearest_subjects=np.where(matches.index[rows] >= 0, self.train.subjects[matches.index[rows]], ""),
            flip=matches.flip[rows],
            shift=matches.shift[rows],
        )

    def check(
        self,
        images: np.ndarray | None,
        structure: torch.Tensor | np.ndarray | None = None,
        modalities: Sequence[str] | None = None,
        progress: bool = False,
    ) -> CopyCheck:
        """Compares subjects that no pipeline's output holds, such as those of another generator.

        Args:
            images: (S, M, H, W), uint8, or float in [0, 1]; None for structures alone.
            structure: (S, c_s, h, w) in the autoencoder's own scale; None encodes the images, where an autoencoder is
                known.
            modalities: the M names, any of the filter's; all of them if None.
            progress: show progress bars.

        Raises:
            ValueError: on an argument that does not fit, named in the message.
        """
        if images is None and (structure is None or self.renderer is None):
            raise ValueError(
                "images is None and there is no structure to compare: give images, "
                "or build the filter with an autoencoder and give a structure."
            )
        modalities = self.modalities if modalities is None else list(modalities)
        for name in modalities:
            if name not in self.modalities:
                raise ValueError(f"modalities names {name!r}; the filter was built with {', '.join(self.modalities)}.")
        count = len(structure) if images is None else len(images)
        size = self.train.images.shape[2:]
        full = np.zeros((count, len(self.modalities), *size), dtype=np.uint8)
        present = np.zeros(full.shape[:2], dtype=bool)
        if images is not None:
            images = as_bytes(images, "images")
            if images.shape[1:] != (len(modalities), *size):
                raise ValueError(
                    f"images has shape {images.shape}; for {', '.join(modalities)} it must be "
                    f"(subjects, {len(modalities)}, {size[0]}, {size[1]}), as the training images are."
                )
            columns = [self.modalities.index(name) for name in modalities]
            full[:, columns], present[:, columns] = images, True
        if structure is not None and len(structure) != count:
            raise ValueError(f"structure has {len(structure)} subjects and images {count}; give one for each.")
        full, present = self._with_structure(full, present, structure, progress)
        check = self._check(*self._compare(full, present, None, progress), np.arange(count))
        self.num_checked += count
        self.num_refused += check.num_refused
        return check

    def __call__(self, output: DLDMPipelineOutput) -> CopyCheck:
        """Says which subjects of a pipeline's output to keep, whatever its `output_type`.

        With `output_type="latent"` the structures alone are compared.

        Args:
            output: what the pipeline returned; its modalities may be any of the filter's, in any order.
        """
        images = output.images
        if isinstance(images, list):
            images = np.stack([np.stack([np.asarray(image) for image in subject]) for subject in images])
        return self.check(images, output.structure, output.modalities)

    def authentic(self, check: CopyCheck, progress: bool = True) -> np.ndarray:
        """Is a sample at least as far from its nearest training slice as that one is from another training subject?

        What is found about a training slice is kept, so that later calls are quick.

        Args:
            check: what the filter said about S subjects.
            progress: show a progress bar.

        Returns:
            (S, C) float: 1 for yes (authentic), 0 for no, NaN where the channel is missing, or where there is no second
            training subject.
        """
        known = check.nearest >= 0
        wanted = {(int(i), int(c)) for i, c in zip(check.nearest[known], np.nonzero(known)[1], strict=True)}
        wanted = sorted(wanted - set(self._own_distance))
        rows = sorted({i for i, _ in wanted})
        if rows:
            present = np.zeros((len(rows), len(self.channels)), dtype=bool)
            place = {i: row for row, i in enumerate(rows)}
            for i, c in wanted:
                present[place[i], c] = True
            matches = self.train.search(
                self.train.images[rows], self.train.subjects[rows], present, self.batch_size, progress, "training pairs"
            )
            distance = _distance(matches)
            self._own_distance.update({(i, c): float(distance[place[i], c]) for i, c in wanted})
        own = np.full(check.nearest.shape, np.nan)
        for s, c in zip(*np.nonzero(known), strict=True):
            own[s, c] = self._own_distance[int(check.nearest[s, c]), int(c)]
        return np.where(np.isfinite(own), (1 - check.similarity >= own).astype(float), np.nan)


def _distance(matches: Matches) -> np.ndarray:
    """1 - similarity, never quite 0, so that its logarithm exists."""
    return np.maximum(1 - matches.similarity, 1e-6)


def read_slices(
    dataset: Dataset, max_items: int | None = None, batch_size: int = 32, progress: bool = True
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Reads a data set into memory as bytes.

    Args:
        dataset: a `SliceDataset`, or anything with its items: `images` (n, H, W), `present` (n,), `subject`.
        max_items: at most this many slices, taken at even distances over the whole set; all if None.
        batch_size: slices at a time.
        progress: show a progress bar.

    Returns:
        images uint8 (N, n, H, W), N subject names, present bool (N, n).

    Raises:
        ValueError: if the data set is empty.
    """
    if len(dataset) == 0:
        raise ValueError("dataset has no slices: nothing to compare with. Give a set with subjects.")
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items={max_items}: at least one slice is needed.")
    if max_items is not None and max_items < len(dataset):
        dataset = Subset(dataset, np.linspace(0, len(dataset) - 1, max_items).round().astype(int).tolist())
    images, subjects, present = [], [], []
    for batch in tqdm(DataLoader(dataset, batch_size=batch_size), desc="read", disable=not progress):
        images.append(as_bytes(batch["images"], "images"))
        subjects += list(batch["subject"])
        present.append(batch["present"].numpy().astype(bool))
    return np.concatenate(images), subjects, np.concatenate(present)


def keep_subjects(output: DLDMPipelineOutput, keep: np.ndarray) -> DLDMPipelineOutput:
    """The same output with some of its subjects only.

    Args:
        output: what a pipeline returned for S subjects.
        keep: (S,) bool, as in [`CopyCheck`].

    Raises:
        ValueError: if `keep` has not one entry for each subject.
    """
    keep = np.asarray(keep, dtype=bool)
    if keep.shape != (len(output.structure),):
        raise ValueError(f"keep has shape {keep.shape}; it must be ({len(output.structure)},), one for each subject.")
    rows = np.flatnonzero(keep).tolist()

    def chosen(value):
        return [value[i] for i in rows] if isinstance(value, list) else value if value is None else value[rows]

    return DLDMPipelineOutput(
        images=chosen(output.images),
        masks=chosen(output.masks),
        structure=output.structure[rows],
        styles=output.styles[rows],
        modalities=output.modalities,
    )


def evaluate_memorization(
    memorization_filter: MemorizationFilter,
    images: np.ndarray,
    structure: torch.Tensor | np.ndarray | None = None,
    modalities: Sequence[str] | None = None,
    num_pairs: int = 8,
    progress: bool = True,
) -> dict:
    """Measures how far a set of samples copies the training set, beside held-out subjects as the reference row.

    Args:
        memorization_filter: built from the training and the held-out images.
        images: (S, M, H, W), uint8, or float in [0, 1].
        structure: (S, c_s, h, w), as the pipeline gave them; None encodes the images, where the filter has an autoencoder.
        modalities: the M names; all of the filter's if None.
        num_pairs: how many of the closest pairs to list; [`closest_pairs_sheet`] draws them.
        progress: show progress bars.

    Returns:
        dict of plain numbers; "channel" is a modality or "z_struct":

        - `num_samples`, `num_train_slices`, `num_train_subjects`, `num_calibrating`, `channels`
        - `threshold`, `false_alarm_rate` (tolerated), `false_alarm_rate_promised` (with 95 % confidence, given that number
          of calibrating slices: higher than the tolerated one where they are few)
        - `refused`, `refused_share`: samples whose score exceeds the threshold; `refused_by` (channel → samples that this
          channel alone would refuse)
        - `samples`, `held_out` (the half that had no say in the threshold), each: `num`, `refused_share`, `similarity`,
          `similarity_max`, `ratio` (channel → mean, largest, and median over subjects), `ratio_min`, `authenticity`
          (channel → share), `authenticity_mean`
        - `closest`: list of the `num_pairs` pairs of highest score: `sample`, `channel`, `train_subject`, `train_slice`,
          `similarity`, `ratio`, `score`, `flip` ([up-down, left-right]), `shift` ([down, right])
    """
    check = memorization_filter.check(images, structure, modalities, progress)
    held_out = memorization_filter.held_out_check
    channels = memorization_filter.channels

    def by_channel(values: np.ndarray, reduce) -> dict[str, float]:
        known = [values[np.isfinite(values[:, c]), c] for c in range(len(channels))]
        return {name: float(reduce(v)) if len(v) else float("nan") for name, v in zip(channels, known, strict=True)}

    def row(one: CopyCheck) -> dict:
        authentic = memorization_filter.authentic(one, progress)
        shares = by_channel(authentic, np.mean)
        return {
            "num": len(one.keep),
            "refused_share": float(np.mean(~one.keep)),
            "similarity": by_channel(one.similarity, np.mean),
            "similarity_max": by_channel(one.similarity, np.max),
            "ratio": by_channel(one.ratio, np.median),
            "ratio_min": by_channel(one.ratio, np.min),
            "authenticity": shares,
            "authenticity_mean": float(np.mean([v for v in shares.values() if np.isfinite(v)] or [np.nan])),
        }

    pairs = closest_pairs(check, num_pairs)
    rate = memorization_filter.false_alarm_rate
    return {
        "num_samples": len(check.keep),
        "num_train_slices": len(memorization_filter.train.subjects),
        "num_train_subjects": len(set(memorization_filter.train.subjects)),
        "num_calibrating": memorization_filter.num_calibrating,
        "channels": list(channels),
        "threshold": check.threshold,
        "false_alarm_rate": rate,
        "false_alarm_rate_promised": max(rate, 1 - 0.05 ** (1 / memorization_filter.num_calibrating)),
        "refused": check.num_refused,
        "refused_share": float(np.mean(~check.keep)),
        "refused_by": dict(zip(channels, (check.channel_scores > check.threshold).sum(axis=0).tolist(), strict=True)),
        "samples": row(check),
        "held_out": row(held_out),
        "closest": [
            {
                "sample": int(s),
                "channel": channels[c],
                "train_subject": str(check.nearest_subjects[s, c]),
                "train_slice": int(check.nearest[s, c]),
                "similarity": float(check.similarity[s, c]),
                "ratio": float(check.ratio[s, c]),
                "score": float(check.channel_scores[s, c]),
                "flip": check.flip[s, c].tolist(),
                "shift": check.shift[s, c].tolist(),
            }
            for s, c in pairs
        ],
    }


def closest_pairs(check: CopyCheck, rows: int = 8) -> list[tuple[int, int]]:
    """(sample, channel) of the samples with the highest score, highest first; one entry each, its closest channel."""
    each = np.where(np.isfinite(check.channel_scores), check.channel_scores, -np.inf)
    order = [s for s in np.argsort(-check.score, kind="stable") if np.isfinite(check.score[s])]
    return [(int(s), int(each[s].argmax())) for s in order[:rows]]


def closest_pairs_sheet(
    closest: Sequence[dict],
    images: np.ndarray,
    train_images: np.ndarray,
    modalities: Sequence[str],
    path: str | os.PathLike,
) -> None:
    """Draws the pairs of highest score: for each a row of the sample, laid over its training slice, and a row of that.

    The z_struct pair of a sample is shown by its images, like any other.

    Args:
        closest: `closest` of [`evaluate_memorization`]'s result.
        images: (S, M, H, W), uint8, or float in [0, 1]: the samples.
        train_images: (N, M, H, W), uint8: the training slices.
        modalities: the M names.
        path: PNG file to write.

    Raises:
        ValueError: if there is no pair to draw.
    """
    images = as_bytes(images, "images")
    if not closest:
        raise ValueError("closest is empty: no sample could be compared, and there is no pair to draw.")
    pictures, names = [], []
    for pair in closest:
        flips = tuple(axis for axis, flipped in zip((-2, -1), pair["flip"], strict=True) if flipped)
        sample = np.flip(images[pair["sample"]], flips)
        pictures.append(np.roll(sample, pair["shift"], axis=(-2, -1)))
        pictures.append(train_images[pair["train_slice"]])
        names.append(f"synthetic {pair['sample']}: {pair['channel']}, ratio {pair['ratio']:.2f}")
        names.append(f"training: {pair['train_subject']}")
    contact_sheet(np.stack(pictures) / np.float32(255), None, modalities, names, path)
