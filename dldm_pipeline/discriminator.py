"""A discriminator of fine detail for the decoder's last training.

Where sharpness comes from a distance between features, it comes with texture that is bound to the decoder's patches. Means and
spectra do not show it, a small network does. Such a network here learns beside the decoder, which is to leave it nothing.
"""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 96
GAIN = 20.0  # detail has a deviation of about 0.05
LEARNING_RATE = 2e-3
PENALTY_INTERVAL = 8  # steps between gradient penalties, each as many times as heavy
POOL = 64  # decoded subjects of steps before, of which it sees some again


class DetailDiscriminator:
    """Tells decoded from real subjects by their detail: what differs from the mean of its neighbourhood.

    Without the rest of the image, beside which detail is small, it learns within some fifty steps. It sees where pixels lie
    within the decoder's patches, for its own have a stride of 4; and all channels of a subject at once. It trains itself, a
    step each call. Its state is in no checkpoint: after an interruption it starts anew.

    Losses: Goodfellow et al. (2014), the non-saturating one; gradient penalty R1: Mescheder et al. (ICML 2018); decoded
    subjects of steps before: Shrivastava et al. (CVPR 2017), section 2.3.

    Args:
        image_channels: of a subject, as [`~dldm_pipeline.training_utils.to_channels`] gives them.
        device: where to compute.
    """

    def __init__(self, image_channels: int, device: torch.device | str = "cpu"):
        self._network = nn.Sequential(
            nn.Conv2d(image_channels, WIDTH, 8, stride=4),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 1, 1),
        ).to(device)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.99))
        self._pools: list[torch.Tensor] = []  # decoded and real subjects
        self._step = 0

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, image_channels, H, W) in [-1, 1] to logits (B, h, w), above zero for real."""
        around = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return self._network(GAIN * (images - around))[:, 0]

    def __call__(self, decoded: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """One step of its own training, then what the decoder is to make small: a scalar, log 2 where it cannot tell.

        Args:
            decoded: (B, image_channels, H, W) in [-1, 1].
            real: (B, image_channels, H, W) in [-1, 1].
        """
        self._step += 1
        now = [decoded.detach(), real.detach()]
        self._pools = [torch.cat(pair)[:POOL] for pair in zip(now, self._pools or now, strict=True)]
        seen = [
            torch.cat([x, pool[torch.randperm(len(pool), device=pool.device)[: len(x)]]])
            for x, pool in zip(now, self._pools, strict=True)
        ]
        self._network.requires_grad_(True)
        is_penalised = self._step % PENALTY_INTERVAL == 0
        seen[1].requires_grad_(is_penalised)
        fake_logits, real_logits = (self.logits(x) for x in seen)
        loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
        if is_penalised:
            (gradient,) = torch.autograd.grad(real_logits.mean(dim=(1, 2)).sum(), seen[1], create_graph=True)
            loss = loss + PENALTY_INTERVAL / 2 * gradient.square().sum(dim=(1, 2, 3)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._network.requires_grad_(False)  # from what follows only the decoder is to learn
        return F.softplus(-self.logits(decoded)).mean()
