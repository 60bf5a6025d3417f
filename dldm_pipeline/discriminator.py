"""Losses of adversarial training, and a discriminator of fine detail for the decoder's last training.

Where sharpness comes from a distance between features, it comes with texture that is bound to the decoder's patches. Means and
spectra do not show it, a small network does. Such a network here learns beside the decoder, which is to leave it nothing.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dldm_pipeline.training_utils import fine_detail

WIDTH = 96
GAIN = 20.0  # detail has a deviation of about 0.05
LEARNING_RATE = 2e-3
PENALTY_INTERVAL = 8  # steps between gradient penalties, each as many times as heavy
POOL = 64  # subjects of steps before, decoded and real ones, of which it sees some again


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The non-saturating loss of Goodfellow et al. (2014), a scalar, from logits of any shape."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Logistic loss, a scalar, from logits of any shape."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared length of the logits' gradient by real images, a scalar (Mescheder et al. 2018).

    Args:
        real_logits: (B,), computed from `images`.
        images: (B, C, H, W), with `requires_grad`.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


class DetailDiscriminator:
    """Tells decoded from real subjects by their detail: what differs from the mean of its neighbourhood.

    Without the rest of the image, beside which detail is small, it learns within some fifty steps. It sees where pixels lie
    within the decoder's patches, for its own have a stride of 4; and all channels of a subject at once. It trains itself, a
    step each call. Its state is in no checkpoint: after an interruption it starts anew. Each process has its own.

    Source for showing subjects of steps before again: Shrivastava et al. (CVPR 2017), section 2.3.

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
        return self._network(GAIN * fine_detail(images))[:, 0]

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
        loss = discriminator_loss(real_logits, fake_logits)
        if is_penalised:
            loss = loss + PENALTY_INTERVAL / 2 * r1_penalty(real_logits.mean(dim=(1, 2)), seen[1])
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._network.requires_grad_(False)  # from what follows only the decoder is to learn
        return generator_loss(self.logits(decoded))
