"""Whose appearance on whose anatomy: the pairs from which an autoencoder learns what a style is.

Na et al. (MIDL 2023, strategy 3) exchange styles within the mini-batch. If the target then stays the image of the structure's
own subject, the network learns to ignore a style but for its modality. Here the target is what the style says: the
structure's anatomy in the style's appearance. For simulated subjects that image is known, because each anatomy is imaged by
two scanners and each scanner images several anatomies ([`AcquisitionSampler`]). Of a real slice two copies are made, each with
an appearance of its own ([`two_appearances`]).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # quantiles of a modality's intensities at which random curves bend
CONTRAST = 0.5  # standard deviation of the logarithm of a curve's slope between two knots
BRIGHTNESS = 0.2  # of the logarithm of a curve's end
SHADING = 0.05  # standard deviation of the logarithm of the coil field put on an input
NOISE = 0.02  # largest standard deviation of the noise put on an input


def random_partners(groups: torch.Tensor, probability: float) -> torch.Tensor:
    """For each row, with a probability, a random other row of its group; the row itself where there is none.

    Args:
        groups: (B,) int, which rows belong together.

    Returns:
        (B,) index.
    """
    own = torch.arange(len(groups), device=groups.device)
    others = (groups[:, None] == groups) & (own[:, None] != own)
    chosen = torch.rand(others.shape, device=groups.device).masked_fill(~others, -1.0).argmax(dim=1)
    exchanged = others.any(dim=1) & (torch.rand(len(groups), device=groups.device) < probability)
    return torch.where(exchanged, chosen, own)


class AcquisitionSampler(torch.utils.data.Sampler):
    """Batches of rows in which anatomies share acquisitions: pairs of anatomies with all their rows, in random order.

    Args:
        anatomies, acquisitions: (N,) which anatomy and which acquisition each row of a data set shows.
        batch_size: rows of a batch. Batches are full; what is left over in an epoch is left out.
    """

    def __init__(self, anatomies: Sequence[int], acquisitions: Sequence[int], batch_size: int):
        rows = defaultdict(list)
        scanners = defaultdict(set)
        for row, (anatomy, acquisition) in enumerate(zip(anatomies, acquisitions, strict=True)):
            rows[anatomy].append(row)
            scanners[anatomy].add(acquisition)
        families = defaultdict(list)
        for anatomy, seen in scanners.items():
            families[frozenset(seen)].append(rows[anatomy])
        self.families, self.num_rows = list(families.values()), len(anatomies)
        self.batch_size, self.drop_last = batch_size, True

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        pairs = []
        for family in self.families:
            order = torch.randperm(len(family)).tolist()
            pairs += [sum((family[k] for k in order[i : i + 2]), []) for i in range(0, len(order), 2)]
        rows = np.concatenate([pairs[i] for i in torch.randperm(len(pairs)).tolist()])
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            yield rows[first : first + self.batch_size].tolist()


def random_curves(images: torch.Tensor) -> torch.Tensor:
    """Each image under a random monotone intensity curve, which changes brightness and the contrast between tissues.

    The curves are linear between knots at the quantiles `KNOTS` of the modality's intensities in the batch; 0 stays 0.

    Args:
        images: (B, n, H, W) in [0, 1], 0 in the background and where a modality is missing.

    Returns:
        The same shape and range.
    """
    batch, n = images.shape[:2]
    quantiles = images.new_tensor([0.0, *KNOTS, 1.0])
    ends = images.new_tensor([0.0, 1.0])
    knots = torch.stack(
        [
            torch.quantile(torch.cat([values[values > 0][:: 1 + values.numel() // 1_000_000], ends]), quantiles)
            for values in images.transpose(0, 1)
        ]
    )
    knots = knots + 1e-4 * torch.arange(len(quantiles), device=images.device)  # none twice
    knots[:, 0] = 0
    slopes = (CONTRAST * torch.randn(batch, n, len(quantiles) - 1, device=images.device)).exp()
    heights = F.pad((knots.diff(dim=1) * slopes).cumsum(dim=2), (1, 0))
    # The brightest tissue, not the single brightest pixel, keeps its place.
    end = (knots[:, -2] * (BRIGHTNESS * torch.randn(batch, n, device=images.device)).exp()) / heights[:, :, -2]
    heights, slopes = heights * end[..., None], slopes * end[..., None]
    values = images.flatten(2)
    place = torch.searchsorted(knots[:, 1:-1].contiguous(), values.transpose(0, 1).flatten(1).contiguous())
    place = place.unflatten(1, (batch, -1)).transpose(0, 1)
    below = knots.expand(batch, -1, -1).gather(2, place)
    curved = heights.gather(2, place) + slopes.gather(2, place) * (values - below)
    return curved.clamp(0, 1).view_as(images)


def two_appearances(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each slice of a batch twice, each copy with a random appearance of its own.

    `images` are the targets, under one curve each ([`random_curves`]). `inputs` are what the encoder sees: the same with a
    coil field and noise, which are nobody's appearance.

    Args:
        batch: items of a [`~dldm_pipeline.data.slices.SliceDataset`].

    Returns:
        The batch with twice as many rows, and `inputs` (2B, n, H, W), `anatomy` and `acquisition` (2B,).
    """
    doubled = {
        key: torch.cat([value, value]) if torch.is_tensor(value) else [*value, *value] for key, value in batch.items()
    }
    images = random_curves(doubled["images"])
    field = SHADING * torch.randn(*images.shape[:2], 4, 4, device=images.device)
    field = F.interpolate(field, images.shape[2:], mode="bicubic", align_corners=True).exp()
    noise = NOISE * torch.rand(*images.shape[:2], 1, 1, device=images.device) * torch.randn_like(images)
    inputs = torch.where(images > 0, images * field + noise, 0).clamp(0, 1)
    own = torch.arange(len(images), device=images.device)
    return doubled | {"images": images, "inputs": inputs, "anatomy": own % (len(images) // 2), "acquisition": own}
