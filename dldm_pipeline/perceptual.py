"""How unlike real images decoded ones look to a network that knows photographs.

What a squared error leaves soft and random filters do not see either, such as thin sulci, shifts the features of such a
network for all generated images alike. `PerceptualDistance` measures that shift, and its gradient takes it off.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from dldm_pipeline.metrics.features import load_efficientnet_lite

SMALLEST = 128  # pixels: smaller images are enlarged to it, for the network was trained on 240
LARGEST_SHIFT = 8  # pixels of the images as the network sees them, down or up, right or left
FINEST_STRIDE = 8  # of the feature maps compared: those of finer strides brought little in a short trial
RATE = 0.06  # of a batch, in the running means: a few subjects alone have no mean
PAIR_WEIGHT = 0.3  # of the distance between rebuilt and real images, against that of the means


class PerceptualDistance:
    """How far decoded images lie from real ones in the features of EfficientNet-Lite1 (ImageNet), each modality for itself.

    Rebuilt images are compared with their own real ones, place by place, channels at unit length (LPIPS without its learned
    weights: Zhang et al., CVPR 2018, eq. 1). Of new subjects nobody knows the images; for them, and for the rebuilt ones too,
    the mean over subjects of each channel's mean and root mean square is compared with that of real ones, in units of their
    deviation (dos Santos et al., "Learning Implicit Generative Models by Matching Perceptual Features", ICCV 2019).

    `examples/evaluate.py` measures with EfficientNet-Lite0: another network with other weights, but of the same family and
    trained on the same photographs. A model trained with this is likely to be flattered there.

    Args:
        batches: of real subjects, with `images` (B, n, H, W) in [0, 1] and `present` (B, n) bool.
        device: where to compute.
        show_progress: show a progress bar.

    Raises:
        ImportError: without the packages of the `eval` extra.
    """

    def __init__(
        self, batches: Iterable[dict[str, torch.Tensor]], device: torch.device | str = "cpu", show_progress: bool = True
    ):
        self._network = load_efficientnet_lite(1).to(device, memory_format=torch.channels_last)
        self._running: list[torch.Tensor] | None = None
        total = squares = count = 0.0
        with torch.no_grad():
            for batch in tqdm(batches, desc="features of real images", unit="batch", disable=not show_progress):
                features = _pool(self._maps(batch["images"].to(device), _draw_shift())).double()
                there = batch["present"].to(device)
                features = torch.where(there[..., None], features, 0)
                total, squares = total + features.sum(dim=0), squares + features.square().sum(dim=0)
                count = count + there.sum(dim=0)[:, None]
        mean = total / count.clamp(min=1)
        self._mean = mean.float()
        self._deviation = (squares / count.clamp(min=1) - mean**2).clamp(min=1e-6).sqrt().float()

    def __call__(self, images: torch.Tensor, present: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The distance, a scalar.

        Means run on from call to call, and those are compared; the gradient is that of the images given.

        Args:
            images: (B, n, H, W) in [0, 1], the first P rebuilt and the others new.
            present: (B, n) bool; other images count for nothing.
            real: (P, n, H, W), what the rebuilt ones should be.
        """
        paired, there = len(real), present[..., None].float()
        shift = _draw_shift()
        maps = self._maps(images, shift)
        features = _pool(maps) * there
        rate = 1.0 if self._running is None else RATE
        self._running = self._running or [self._mean, self._mean]
        distance = torch.zeros((), device=images.device)
        for i, rows in enumerate((slice(paired), slice(paired, None))):
            count = there[rows].sum(dim=0)
            mean = torch.where(count > 0, features[rows].sum(dim=0) / count.clamp(min=1), self._running[i])
            self._running[i] = self._running[i].lerp(mean.detach(), rate)
            # The running mean's value, this batch's gradient.
            compared = self._running[i] + mean - mean.detach()
            distance = distance + ((compared - self._mean) / self._deviation).square().mean()
        with torch.no_grad():
            real_maps = self._maps(real, shift)
        for ours, theirs in zip(maps, real_maps, strict=True):
            error = (
                (F.normalize(ours[:paired], dim=2) - F.normalize(theirs, dim=2)).square().sum(dim=2).mean(dim=(2, 3))
            )
            distance = distance + PAIR_WEIGHT * (error * there[:paired, :, 0]).sum() / there[:paired].sum().clamp(min=1)
        return distance

    def _maps(self, images: torch.Tensor, shift: tuple[int, int]) -> list[torch.Tensor]:
        """Images (B, n, H, W), shifted down and to the right, to feature maps (B, n, C, h, w), the last of each stride."""
        pixels = images.flatten(0, 1)[:, None]
        size = max(SMALLEST, pixels.shape[-1])
        if pixels.shape[-1] < size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
        pixels = F.pad(pixels, (shift[1], -shift[1], shift[0], -shift[0]))
        pixels = ((255 * pixels - 127) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        network, maps = self._network, []
        h = network._swish(network._bn0(network._conv_stem(pixels)))
        for block, following in zip(network._blocks, [*network._blocks[1:], None], strict=True):
            h = block(h)
            is_last = following is None or following._depthwise_conv.stride[0] > 1
            if is_last and size // h.shape[-1] >= FINEST_STRIDE:
                maps.append(h.unflatten(0, images.shape[:2]))
        return maps


def _draw_shift() -> tuple[int, int]:
    """Another one each time, or the decoder would draw texture that pleases the network's strides where they now lie."""
    down, right = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (2,)).tolist()
    return down, right


def _pool(maps: list[torch.Tensor]) -> torch.Tensor:
    """Mean and root mean square of each channel: maps (B, n, C, h, w) to (B, n, D)."""
    return torch.cat([x for h in maps for x in (h.mean((3, 4)), (h.square().mean((3, 4)) + 1e-6).sqrt())], dim=2)
