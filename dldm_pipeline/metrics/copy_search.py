"""Search for copies: the nearest training slice of an image, whatever its contrast, flip or shift.

The *orientation* of the edges is correlated, not the intensities: a remapping of the intensities (gamma, window, inversion)
does not change it. z_struct is compared through the decoder: each anatomy is rendered under one appearance
([`StructureRenderer`]) and searched like an image, because a flip or a small shift changes the latent array itself too much.

A copy that was rotated, scaled or bent by more than a pixel or two, or of which only a part was taken, is not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from tqdm.auto import tqdm

from dldm_pipeline.autoencoder_disentangled import DisentangledEncoderOutput

from .images import Slices, to_uint8

FLIPS = ((), (-1,), (-2,), (-2, -1))  # axes of the image

# Lengths are in pixels of a 128-pixel image and scaled to images of another size.
_MAX_SHIFT = 10  # largest shift in either direction
_EDGE_WIDTH = 1.5  # standard deviation of the Gaussian whose derivative finds the edges
_FLAT = 0.5  # an edge of this fraction of the mean steepness counts half: flat tissue is mostly noise
_FREQUENCIES = 8  # the coarse search keeps this many cycles per image, up to 16 pixels a wave...
_COARSE_SHIFTS = 5  # ...and so needs only this many shifts along each axis
_CANDIDATES = 3  # how many of the best go on to full resolution
_BATCH_SIZE = 32  # slices at a time


def orientation_field(images: torch.Tensor) -> torch.Tensor:
    """Orientation of the edges, whatever the contrast; after the normalised gradient fields of Haber and Modersitzki (2006).

    The gradient of the smoothed images (N, H, W) as a complex number g, squared, over |g|² plus a floor: complex64
    (N, H, W). An edge has about unit size and twice its angle, so that its two sides can be exchanged; flat regions are
    near zero, and a constant image is zero.
    """
    images, (height, width) = images.to(torch.float32), images.shape[-2:]
    smooth_y, slope_y = _edge_filters(height, min(height, width))
    smooth_x, slope_x = _edge_filters(width, min(height, width))
    gradient = torch.complex(smooth_y @ (images @ slope_x.T), slope_y @ (images @ smooth_x.T))
    size = gradient.abs()
    floor = (_FLAT * size.mean(dim=(1, 2), keepdim=True)).clamp_min(1e-12)
    return gradient**2 / (size**2 + floor**2)


@lru_cache(maxsize=16)
def _edge_filters(side: int, shorter: int) -> tuple[torch.Tensor, ...]:
    """A Gaussian and its derivative as (side, side) matrices, on small images faster than convolutions of one channel."""
    sigma = _EDGE_WIDTH * shorter / 128
    both = (ndimage.gaussian_filter1d(np.eye(side), sigma, axis=0, order=o, mode="nearest") for o in (0, 1))
    return tuple(torch.tensor(matrix, dtype=torch.float32) for matrix in both)


@dataclass
class Matches:
    """The nearest reference image of each of Q queries in each of C channels.

    Attributes:
        similarity: (Q, C) correlation in [-1, 1] at the best flip and shift; NaN where there is nothing to compare.
        index: (Q, C) number of the reference slice; -1 where `similarity` is NaN.
        flip: (Q, C, 2) bool: (up-down, left-right). The query, flipped and then rolled by `shift`, lies on the reference.
        shift: (Q, C, 2) whole pixels: (down, right).
    """

    similarity: np.ndarray
    index: np.ndarray
    flip: np.ndarray
    shift: np.ndarray


class CopySearch:
    """Finds the most similar of N reference slices under flips and shifts, channel by channel.

    All pairs are compared on the low frequencies of their [`orientation_field`], for every flip and a coarse set of
    shifts; the best few again at full resolution, at every shift up to 10 pixels of a 128-pixel image.

    Args:
        reference: N slices with C channels.
    """

    def __init__(self, reference: Slices) -> None:
        self.images, self.present, self.subjects = reference.images, reference.present, reference.names("slice")
        count, channels, height, width = self.images.shape
        self._max_shift = round(_MAX_SHIFT * min(height, width) / 128)

        keep = min(_FREQUENCIES, (min(height, width) - 1) // 2)
        self._frequencies = torch.arange(-keep, keep + 1)
        shifts = torch.linspace(-self._max_shift, self._max_shift, _COARSE_SHIFTS)
        # A shift turns the phase of each frequency.
        turn_y, turn_x = (torch.exp(-2j * torch.pi * shifts[:, None] * self._frequencies / n) for n in (height, width))
        self._turns = (turn_y[:, None, :, None] * turn_x[None, :, None, :]).flatten(0, 1).to(torch.complex64)
        self._coarse = torch.empty(channels, count, 2 * len(self._frequencies) ** 2)
        for start in range(0, count, _BATCH_SIZE):
            rows = slice(start, start + _BATCH_SIZE)
            for channel in range(channels):
                field = orientation_field(torch.from_numpy(self.images[rows, channel]))
                self._coarse[channel, rows] = _as_vectors(self._low(torch.fft.fft2(field)))

    def _low(self, spectra: torch.Tensor) -> torch.Tensor:
        """The low frequencies (..., k, k) of spectra (..., H, W), scaled to unit length."""
        low = spectra[..., self._frequencies, :][..., self._frequencies]
        return low / low.abs().square().sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-9)

    @torch.no_grad()
    def search(self, queries: Slices, other_subjects: bool = False) -> Matches:
        """The nearest reference slice of every query.

        Args:
            queries: Q slices of the reference's channels and size; a ValueError if they do not fit.
            other_subjects: do not compare a query with reference slices of its own subject.
        """
        images, wanted = queries.images, self.images.shape[1:]
        if images.shape[1:] != wanted:
            raise ValueError(f"images have shape {images.shape}; it must be (queries, *{wanted}), as the reference is.")
        count, channels = images.shape[:2]
        names = queries.names("slice")
        flip, shift = (np.zeros((count, channels, 2), dtype=kind) for kind in (bool, int))
        found = Matches(np.full((count, channels), np.nan), np.full((count, channels), -1), flip, shift)
        for start in tqdm(range(0, count, _BATCH_SIZE), desc="search for copies", delay=2):
            for channel in range(channels):
                rows = start + np.flatnonzero(queries.present[start : start + _BATCH_SIZE, channel])
                allowed = np.repeat(self.present[None, :, channel], len(rows), axis=0)
                if other_subjects:
                    allowed &= names[rows, None] != self.subjects
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
        candidates = best.topk(min(_CANDIDATES, len(self.images)), dim=1).indices
        near = self._coarse[channel][candidates]  # (rows, candidates, numbers)
        by_flip = torch.stack([torch.einsum("srd,rkd->rks", turned, near).amax(dim=2) for turned in vectors])
        flips = by_flip.argmax(dim=0)

        # Fine: the best few at full resolution, in the flip found, at every whole shift.
        spectra, reach = torch.stack(spectra), self._max_shift
        similarity, place = torch.empty(candidates.shape), torch.empty(candidates.shape, dtype=torch.long)
        for k in range(candidates.shape[1]):
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
        value, winner = similarity.max(dim=1, keepdim=True)
        place, flip, index = (x.gather(1, winner)[:, 0].numpy() for x in (place, flips, candidates))
        found.similarity[rows, channel] = value[:, 0].clamp(-1, 1).numpy()
        found.index[rows, channel] = index
        found.flip[rows, channel] = np.array([(-2 in axes, -1 in axes) for axes in FLIPS])[flip]
        found.shift[rows, channel] = np.stack(np.divmod(place, 2 * reach + 1), axis=1) - reach


def _as_vectors(spectra: torch.Tensor) -> torch.Tensor:
    """Complex (..., k, k) to real (..., 2 k²): the real part of a complex correlation becomes a plain dot product."""
    return torch.view_as_real(spectra.contiguous()).flatten(-3)


class StructureRenderer:
    """Renders anatomies under one appearance, the mean style of the first modality that the training slices show.

    Args:
        autoencoder: a `DisentangledAutoencoder` in evaluation mode, on the device to use.
        train: training slices of its modalities.
    """

    def __init__(self, autoencoder: torch.nn.Module, train: Slices) -> None:
        self.autoencoder = autoencoder
        modality = train.present.any(axis=0).argmax()
        known = np.flatnonzero(train.present[:, modality])
        # A mean needs no more than 256 of them.
        known = known[np.linspace(0, len(known) - 1, min(len(known), 256)).round().astype(int)]
        styles = [posterior.style_dist.mode() for _, posterior in self._encode(train, known)]
        self.style = torch.cat(styles)[:, modality].mean(dim=0)

    @torch.no_grad()
    def _encode(self, slices: Slices, rows: np.ndarray) -> Iterator[tuple[np.ndarray, DisentangledEncoderOutput]]:
        """Batches of the rows, and what the autoencoder makes of them."""
        device, dtype = self.autoencoder.device, self.autoencoder.dtype
        for start in tqdm(range(0, len(rows), 16), desc="encode", delay=2):
            part = rows[start : start + 16]
            pixels = torch.from_numpy(slices.images[part]).to(device, dtype) / 255
            yield part, self.autoencoder.encode(pixels, torch.from_numpy(slices.present[part]).to(device))

    @torch.no_grad()
    def render(self, structure: torch.Tensor | np.ndarray) -> np.ndarray:
        """z_struct (S, c_s, h, w), in the autoencoder's own scale, as images: uint8 (S, H, W)."""
        images = []
        for z in torch.as_tensor(structure).split(16):
            z = z.to(self.autoencoder.device, self.autoencoder.dtype)
            sample = self.autoencoder.decode(z, self.style.expand(len(z), 1, *self.style.shape)).sample[:, 0]
            images.append(to_uint8(sample.float().clamp(0, 1)))
        return np.concatenate(images)

    def add_channel(self, slices: Slices, structure: torch.Tensor | np.ndarray | None = None) -> Slices:
        """The slices with one more channel: z_struct rendered, `structure` or, where that is None, that of the images."""
        rendered = np.zeros((len(slices), 1, *slices.images.shape[2:]), dtype=np.uint8)
        known = slices.present.any(axis=1) if structure is None else np.ones(len(slices), dtype=bool)
        if structure is not None:
            rendered[:, 0] = self.render(structure)
        else:
            for rows, posterior in self._encode(slices, np.flatnonzero(known)):
                rendered[rows, 0] = self.render(posterior.structure_dist.mode())
        images = np.concatenate([slices.images, rendered], axis=1)
        return Slices(images, slices.subjects, np.column_stack([slices.present, known]))
