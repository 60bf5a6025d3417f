"""Terms of the training losses, and the filters that they are made of.

The weights stand in the training scripts. All functions take and return torch tensors and keep gradients.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Filters
# ---------------------------------------------------------------------------------------------------------------------


def finite_differences(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbours of images (..., H, W): down (..., H - 1, W) and across (..., H, W - 1)."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def fine_detail(images: torch.Tensor) -> torch.Tensor:
    """Difference of images (B, n, H, W) from the mean of the 3x3 pixels around each pixel; same shape."""
    return images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def radial_power(images: torch.Tensor, rings: int) -> torch.Tensor:
    """Power of images (..., H, W) in rings of one cycle per image, without the mean: (..., rings).

    Args:
        rings: H / 4 rings reach half the Nyquist frequency, and H / sqrt(2) the corners of the spectrum.
    """
    size = images.shape[-1]
    y, x = torch.fft.fftfreq(size, 1 / size), torch.fft.rfftfreq(size, 1 / size)
    ring = torch.hypot(y[:, None], x).round().long().clamp(max=rings + 1).to(images.device).flatten()
    power = torch.fft.rfft2(images.float(), norm="ortho").abs().square().flatten(-2)
    return torch.zeros(*power.shape[:-1], rings + 2, device=power.device).index_add(-1, ring, power)[..., 1:-1]


def noise_std(images: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the noise in images (..., H, W), shape (...).

    Source: Immerkær, Computer Vision and Image Understanding 64 (1996) 300, eq. 3, with the median in place of the mean,
    and over the flattest tenth of the foreground only, because fine anatomy looks like noise. `benchmarks/noise.py`
    prints by how much it overestimates the noise of simulated subjects.

    Args:
        images: in [0, 1].
        foreground: bool, broadcasts with `images`; there is no noise elsewhere. NaN where it is empty.
    """
    pixels = images.reshape(-1, 1, *images.shape[-2:])
    taps = images.new_tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
    answer = F.conv2d(pixels, taps[None, None], padding=1).reshape(images.shape).abs()
    smooth = F.avg_pool2d(pixels, 3, 1, 1)
    variance = F.avg_pool2d(smooth.square(), 5, 1, 2) - F.avg_pool2d(smooth, 5, 1, 2).square()
    # The outline's own pixels are left out: beyond it there is no noise.
    background = (~foreground).to(images.dtype).expand(images.shape).reshape(pixels.shape)
    inside = F.max_pool2d(background, 3, 1, 1) == 0
    variance = torch.where(inside, variance, torch.nan).reshape(images.shape).flatten(-2)
    flattest = variance <= variance.nanquantile(0.1, dim=-1, keepdim=True)
    return torch.where(flattest, answer.flatten(-2), torch.nan).nanmedian(dim=-1).values / 0.6745


def to_channels(images: torch.Tensor, present: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A subject as the channels of one image.

    Args:
        images: (B, n, H, W) in [0, 1].
        present: (B, n) bool; a missing modality becomes black.
        mask: (B, H, W) in [0, 1]. It is blurred, because a mask of only 0 and 1 would give every decoded one away.

    Returns:
        (B, n or n + 1, H, W) in [-1, 1].
    """
    images = images * present[:, :, None, None]
    if mask is not None:
        taps = mask.new_tensor([0.25, 0.5, 0.25])
        mask = F.conv2d(F.pad(mask[:, None], [1] * 4, mode="replicate"), (taps[:, None] * taps)[None, None])
        images = torch.cat([images, mask], dim=1)
    return images * 2 - 1


def foreground_of(images: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Pixels above zero in at least one modality present: (B, n, H, W) and (B, n) to bool (B, H, W)."""
    return ((images > 0) & present[:, :, None, None]).any(dim=1)


def near_tumour(mask: torch.Tensor) -> torch.Tensor:
    """Pixels within 8 to 16 pixels of the tumour: mask (B, H, W) to bool (B, H, W)."""
    blocks = F.max_pool2d(F.max_pool2d(mask[:, None].float(), 8), 3, stride=1, padding=1)
    return F.interpolate(blocks, scale_factor=8.0, mode="nearest")[:, 0] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Rebuilt images
# ---------------------------------------------------------------------------------------------------------------------


def edge_loss(images: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Mean absolute error of the [`finite_differences`] of images (..., H, W), a scalar."""
    pairs = zip(finite_differences(images), finite_differences(targets), strict=True)
    return sum((weight * (a - b).abs()).mean() for a, b in pairs)


def spectrum_loss(images: torch.Tensor, targets: torch.Tensor, rings: int, weight: torch.Tensor | float = 1.0):
    """Mean absolute log ratio of the [`radial_power`] of images (..., H, W), a scalar.

    A squared error leaves power out in the outer rings. Source: Durall et al. (CVPR 2020).

    Args:
        weight: broadcasts with (..., rings).
    """
    ours, theirs = (radial_power(x, rings) for x in (images, targets))
    return (weight * ((ours + 1e-4).log() - (theirs + 1e-4).log()).abs()).mean()


def mask_loss(logits: torch.Tensor, mask: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Ten times the cross-entropy plus one minus the Dice coefficient, a scalar, averaged over regions.

    Tumour is about 2 % of the pixels: Dice keeps "no tumour" from being an answer, cross-entropy gives it edges.

    Args:
        logits, mask: (B, r, H, W).
        known: (B, r) bool, whether the subject's region is known.
    """
    known = known.float()[:, :, None, None]
    probability = logits.sigmoid() * known
    dice = (2 * (probability * mask).sum(dim=(2, 3)) + 1) / ((probability + mask * known).sum(dim=(2, 3)) + 1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, weight=known.expand_as(mask))
    return 10 * cross_entropy + (1 - dice).mean()


def nested_regions(batch: dict[str, torch.Tensor], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model's `regions` are to be: masks (B, r, H, W) float, and which are known (B, r) bool.

    Args:
        batch: `mask` (B, H, W), `labels` (B, H, W) of 1 necrotic core, 2 oedema, 3 enhancing tumour, and `has_mask` and
            `has_labels` (B,) bool.
        number: r, 1 (the whole tumour) or 3 (and its core, and what of it enhances).
    """
    labels = batch["labels"]
    regions = torch.stack([batch["mask"], ((labels == 1) | (labels == 3)).float(), (labels == 3).float()], dim=1)
    known = torch.stack([batch["has_mask"], batch["has_labels"], batch["has_labels"]], dim=1)
    return regions[:, :number], known[:, :number]


def reconstruction_terms(
    sample: torch.Tensor,
    targets: torch.Tensor,
    present: torch.Tensor,
    noise: torch.Tensor,
    foreground_logits: torch.Tensor,
    foreground: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Errors of rebuilt images, averaged over the modalities present.

    Args:
        sample, targets: (B, k, H, W), decoded and real images.
        present: (B, k) bool.
        noise: (B, k, 1, 1), standard deviation of the targets' noise. A decoder returns the mean image, so the spectrum
            is that of the sample with as much noise.
        foreground_logits, foreground: (B, H, W), decoded and real (bool).

    Returns:
        Scalars `l1`, `mse`, `edge`, `spectrum`, `foreground`, and `squared` (k,), the squared error of each modality.
    """
    weight = present[:, :, None, None].float()
    weight = weight / weight.mean().clamp(min=1e-6)
    squared = (weight * (sample - targets) ** 2).mean(dim=(0, 2, 3))
    noisy = sample + noise * foreground[:, None] * torch.randn_like(targets)
    # To the corners: patch artefacts show as too much power there.
    rings = round(sample.shape[-1] / 2**0.5)
    return {
        "l1": (weight * (sample - targets).abs()).mean(),
        "mse": squared.mean(),
        "edge": edge_loss(sample, targets, weight),
        "spectrum": spectrum_loss(noisy, targets, rings, weight[..., 0]),
        "foreground": F.binary_cross_entropy_with_logits(foreground_logits, foreground.float()),
        "squared": squared,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Subjects whose images nobody knows
# ---------------------------------------------------------------------------------------------------------------------


def patch_artefacts(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """How unlike the pixel positions within a decoder's patches are in [`fine_detail`], a scalar near zero without artefacts.

    For each of the `patch_size ** 2` positions, the log power of the detail and its mean (in units of its standard deviation)
    over all images of a modality are compared with the other positions. No power spectrum shows such a pattern, because it
    sums over positions.

    Args:
        images: (B, n, H, W), compared modality by modality.
        patch_size: side of the patches in pixels; H and W are multiples of it.
    """
    detail = fine_detail(images)
    power, mean = (
        F.pixel_unshuffle(x.mean(dim=0)[:, None], patch_size).mean(dim=(2, 3)) for x in (detail.square(), detail)
    )
    mean = mean / (power.detach().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    # A mean of 2 % of the deviation is enough to give every image away, so it weighs more.
    return sum(
        weight * (x - x.mean(dim=1, keepdim=True)).square().mean()
        for weight, x in ((1, (power + 1e-8).log()), (10, mean))
    )


def patch_distance(
    images: torch.Tensor,
    others: torch.Tensor,
    regions: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Squared sliced Wasserstein distance between the patches of two sets of images, a scalar.

    Random filters see all channels of a patch at once, so the channels must fit together as they do in the other set.
    The answers of each filter are sorted and compared in units of their standard deviation in `others`. The filters do not
    answer to a flat channel; smooth structures count on the coarser levels, each of half the size.

    Source: Elnekave & Weiss, "Generating natural images with direct patch distributions matching" (ECCV 2022); levels as in
    Karras et al., "Progressive Growing of GANs" (ICLR 2018), section 5.

    Args:
        images: (B, C, H, W).
        others: (N, C, H, W), towards which the gradient pulls.
        regions: pairs of bool (B, H, W) and (N, H, W), where the patches to compare have their centres; the distance is the
            mean over regions and levels, without those where one set has no patch.
    """
    num_filters, size, levels = 16, 7, 3
    distances = []
    for level in range(levels):
        if level:
            images, others = F.avg_pool2d(images, 2), F.avg_pool2d(others, 2)
            regions = [(a[:, ::2, ::2], b[:, ::2, ::2]) for a, b in regions]
        filters = torch.randn(num_filters, images.shape[1], size, size, device=images.device)
        filters = filters - filters.mean(dim=(2, 3), keepdim=True)
        filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
        # At full size every second patch is enough, from a random corner so that none is always left out.
        stride = 1 if level else 2
        top, left = torch.randint(stride, (2,)).tolist()
        answers = [F.conv2d(x[..., top:, left:], filters, stride=stride).transpose(0, 1) for x in (images, others)]
        rows, columns = (slice(corner + size // 2, None, stride) for corner in (top, left))
        height, width = answers[0].shape[2:]
        for region in regions:
            ours, theirs = (
                answer[:, where[:, rows, columns][:, :height, :width]].sort(dim=1).values
                for answer, where in zip(answers, region, strict=True)
            )
            if ours.shape[1] and theirs.shape[1] > 1:
                rank = (torch.arange(ours.shape[1], device=ours.device) + 0.5) / ours.shape[1] * theirs.shape[1]
                variance = theirs.var(dim=1, keepdim=True).clamp(min=1e-8)
                distances.append(((ours - theirs[:, rank.long()]).square() / variance).mean())
    return torch.stack(distances).mean() if distances else images.new_zeros(())


class PerceptualDistance:
    """Distance of decoded images from real ones in the features of EfficientNet-Lite1 (ImageNet), modality by modality.

    Rebuilt images are compared with their own real ones, position by position, channels at unit length (LPIPS without its
    learned weights: Zhang et al., CVPR 2018, eq. 1). The true images of new subjects are unknown; for them, and for the
    rebuilt ones too, the mean over subjects of each channel's mean and root mean square is compared with that of real ones, in
    units of their standard deviation (dos Santos et al., "Learning Implicit Generative Models by Matching Perceptual
    Features", ICCV 2019).

    `examples/evaluate.py` measures with EfficientNet-Lite0, a network with other weights but of the same family and trained
    on the same photographs. A model trained with this distance is likely to be flattered there.

    Args:
        batches: of real subjects, with `images` (B, n, H, W) in [0, 1] and `present` (B, n) bool.
        device: where to compute.
        show_progress: show a progress bar.

    Raises:
        ImportError: without the packages of the `eval` extra.
    """

    SMALLEST = 128  # pixels; smaller images are enlarged, because the network was trained on 240
    LARGEST_SHIFT = 8  # pixels; random shifts keep the decoder from drawing texture aligned with the network's strides
    FINEST_STRIDE = 8  # of the feature maps compared
    RATE = 0.06  # of a batch, in the running means: a few subjects alone have no mean
    PAIR_WEIGHT = 0.3  # of the distance between rebuilt and real images, against that of the means

    def __init__(
        self, batches: Iterable[dict[str, torch.Tensor]], device: torch.device | str = "cpu", show_progress: bool = True
    ):
        from dldm_pipeline.metrics.features import load_efficientnet_lite

        self._network = load_efficientnet_lite(1).to(device, memory_format=torch.channels_last)
        self._running: list[torch.Tensor] | None = None
        total = squares = count = 0.0
        with torch.no_grad():
            for batch in tqdm(batches, desc="features of real images", unit="batch", disable=not show_progress):
                features = self._pool(self._maps(batch["images"].to(device), self._random_shift())).double()
                there = batch["present"].to(device)
                features = torch.where(there[..., None], features, 0)
                total, squares = total + features.sum(dim=0), squares + features.square().sum(dim=0)
                count = count + there.sum(dim=0)[:, None]
        mean = total / count.clamp(min=1)
        self._mean = mean.float()
        self._std = (squares / count.clamp(min=1) - mean**2).clamp(min=1e-6).sqrt().float()

    def __call__(self, images: torch.Tensor, present: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The distance, a scalar. Means run on from call to call; the gradient is that of the images given.

        Args:
            images: (B, n, H, W) in [0, 1], the first P rebuilt and the others new.
            present: (B, n) bool; other images count for nothing.
            real: (P, n, H, W), what the rebuilt ones should be.
        """
        paired, there = len(real), present[..., None].float()
        shift = self._random_shift()
        maps = self._maps(images, shift)
        features = self._pool(maps) * there
        rate = 1.0 if self._running is None else self.RATE
        self._running = self._running or [self._mean, self._mean]
        distance = torch.zeros((), device=images.device)
        for i, rows in enumerate((slice(paired), slice(paired, None))):
            count = there[rows].sum(dim=0)
            mean = torch.where(count > 0, features[rows].sum(dim=0) / count.clamp(min=1), self._running[i])
            self._running[i] = self._running[i].lerp(mean.detach(), rate)
            # The running mean's value, this batch's gradient.
            compared = self._running[i] + mean - mean.detach()
            distance = distance + ((compared - self._mean) / self._std).square().mean()
        with torch.no_grad():
            real_maps = self._maps(real, shift)
        for ours, theirs in zip(maps, real_maps, strict=True):
            error = (F.normalize(ours[:paired], dim=2) - F.normalize(theirs, dim=2)).square().sum(dim=2).mean((2, 3))
            error = (error * there[:paired, :, 0]).sum() / there[:paired].sum().clamp(min=1)
            distance = distance + self.PAIR_WEIGHT * error
        return distance

    def _maps(self, images: torch.Tensor, shift: tuple[int, int]) -> list[torch.Tensor]:
        """Images (B, n, H, W), shifted down and to the right, to feature maps (B, n, C, h, w), the last of each stride."""
        pixels = images.flatten(0, 1)[:, None]
        size = max(self.SMALLEST, pixels.shape[-1])
        if pixels.shape[-1] < size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
        pixels = F.pad(pixels, (shift[1], -shift[1], shift[0], -shift[0]))
        pixels = ((255 * pixels - 127) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        network, maps = self._network, []
        h = network._swish(network._bn0(network._conv_stem(pixels)))
        for block, following in zip(network._blocks, [*network._blocks[1:], None], strict=True):
            h = block(h)
            is_last = following is None or following._depthwise_conv.stride[0] > 1
            if is_last and size // h.shape[-1] >= self.FINEST_STRIDE:
                maps.append(h.unflatten(0, images.shape[:2]))
        return maps

    def _random_shift(self) -> tuple[int, int]:
        down, right = torch.randint(-self.LARGEST_SHIFT, self.LARGEST_SHIFT + 1, (2,)).tolist()
        return down, right

    @staticmethod
    def _pool(maps: list[torch.Tensor]) -> torch.Tensor:
        """Mean and root mean square of each channel: maps (B, n, C, h, w) to (B, n, D)."""
        return torch.cat([x for h in maps for x in (h.mean((3, 4)), (h.square().mean((3, 4)) + 1e-6).sqrt())], dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial losses
# ---------------------------------------------------------------------------------------------------------------------


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss of Goodfellow et al. (2014), a scalar, from logits of any shape."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Logistic loss, a scalar, from logits of any shape."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared length of the logits' gradient at real images, a scalar (Mescheder et al. 2018).

    Args:
        real_logits: (B,), computed from `images`.
        images: (B, C, H, W), with `requires_grad`.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


class DetailDiscriminator:
    """Tells decoded from real subjects by their [`fine_detail`].

    The perceptual distance leaves a faint texture aligned with the decoder's patches, which a small network detects. Given
    the detail alone it learns within some fifty steps. It sees where pixels lie within the patches, because its first
    stride is theirs, and all channels of a subject at once. It trains itself, one step in each call; its state is in no
    checkpoint, so it starts anew after an interruption. Each process has its own.

    Source for showing subjects of earlier steps again: Shrivastava et al. (CVPR 2017), section 2.3.

    Args:
        image_channels: of a subject, as [`to_channels`] gives them.
        device: where to compute.
    """

    WIDTH = 96
    GAIN = 20.0  # detail has a standard deviation of about 0.05
    LEARNING_RATE = 2e-3
    PENALTY_INTERVAL = 8  # steps between gradient penalties, each as many times as heavy
    POOL = 64  # subjects of earlier steps, decoded and real ones, of which it sees some again

    def __init__(self, image_channels: int, device: torch.device | str = "cpu"):
        self._network = nn.Sequential(
            nn.Conv2d(image_channels, self.WIDTH, 8, stride=4),
            nn.LeakyReLU(0.2),
            nn.Conv2d(self.WIDTH, self.WIDTH, 3, stride=2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(self.WIDTH, 1, 1),
        ).to(device)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=self.LEARNING_RATE, betas=(0.0, 0.99))
        self._pools: list[torch.Tensor] = []  # decoded and real subjects
        self._step = 0

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, image_channels, H, W) in [-1, 1] to logits (B, h, w), above zero for real."""
        return self._network(self.GAIN * fine_detail(images))[:, 0]

    def __call__(self, decoded: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """One step of its own training, then the decoder's loss: a scalar, log 2 where the two cannot be told apart.

        Args:
            decoded: (B, image_channels, H, W) in [-1, 1].
            real: (B, image_channels, H, W) in [-1, 1].
        """
        self._step += 1
        now = [decoded.detach(), real.detach()]
        self._pools = [torch.cat(pair)[: self.POOL] for pair in zip(now, self._pools or now, strict=True)]
        seen = [
            torch.cat([x, pool[torch.randperm(len(pool), device=pool.device)[: len(x)]]])
            for x, pool in zip(now, self._pools, strict=True)
        ]
        self._network.requires_grad_(True)
        is_penalised = self._step % self.PENALTY_INTERVAL == 0
        seen[1].requires_grad_(is_penalised)
        fake_logits, real_logits = (self.logits(x) for x in seen)
        loss = discriminator_loss(real_logits, fake_logits)
        if is_penalised:
            loss = loss + self.PENALTY_INTERVAL / 2 * r1_penalty(real_logits.mean(dim=(1, 2)), seen[1])
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._network.requires_grad_(False)  # the loss below trains the decoder only
        return generator_loss(self.logits(decoded))
