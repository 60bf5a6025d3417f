"""Two-sample test: how well a small CNN tells generated from real images of subjects it has not seen.

After Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests" (ICLR 2017). The area under its ROC curve is 0.5 where
the two sets cannot be told apart, and 1 where they always can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .images import check_images

HELD_OUT = 0.3  # of the subjects are tested on
BATCH_SIZE = 32


def two_sample_scores(
    real: np.ndarray,
    generated: np.ndarray,
    real_subjects: Sequence[str],
    generated_subjects: Sequence[str],
    epochs: int = 6,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains a small CNN to tell generated from real images and scores those of held-out subjects.

    Three convolutions with batch norm (8x8 with stride 4 and 32 channels, then twice 3x3 with stride 2 and 64), the mean
    over the feature map and one linear layer; AdamW with a one-cycle rate. The same seed gives the same scores on the same
    machine and number of threads; the caller's random state is left as it was.

    Args:
        real, generated: uint8 (N, H, W) and (M, H, W) of one modality and size.
        real_subjects, generated_subjects: N and M names. All images of a subject are on one side of the split.
        epochs: passes over the training images.
        seed: of split, initial weights and order.

    Returns:
        (N,) and (M,) floats: the logit for "generated" of held-out images, NaN for those trained on. Their [`auc`] is the
        result of the test.

    Raises:
        TypeError, ValueError: see [`~dldm_pipeline.metrics.images.check_images`]; ValueError on fewer than 2 subjects
            in a set.
    """
    check_images(real, "real")
    check_images(generated, "generated")
    tested = _held_out(real_subjects, generated_subjects, seed)
    is_tested = np.isin(np.concatenate([real_subjects, generated_subjects]), tested)
    label = np.r_[np.zeros(len(real)), np.ones(len(generated))].astype(np.float32)
    images = torch.from_numpy(np.concatenate([real, generated]))[:, None]
    rows = np.flatnonzero(~is_tested)

    def batch(chosen: np.ndarray) -> torch.Tensor:
        return images[chosen].float() / 127.5 - 1.0

    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[torch.nn.Module] = []
        # Wide, overlapping patches first: every pixel is seen at a fraction of the cost of full resolution.
        for width_in, width, kernel, stride in ((1, 32, 8, 4), (32, 64, 3, 2), (64, 64, 3, 2)):
            layers += [torch.nn.Conv2d(width_in, width, kernel, stride, padding=(kernel - 1) // 2, bias=False)]
            layers += [torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 1))
    num_batches = -(-len(rows) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(epochs * num_batches, 1))
    for _ in range(epochs):
        for part in np.array_split(rng.permutation(rows), num_batches):
            logits = model(batch(part))[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(label[part]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    model.eval()
    scores = np.full(len(label), np.nan)
    with torch.no_grad():
        for part in np.array_split(np.flatnonzero(is_tested), -(-int(is_tested.sum()) // 256)):
            scores[part] = model(batch(part))[:, 0].numpy()
    return scores[: len(real)], scores[len(real) :]


def _held_out(real: Sequence[str], generated: Sequence[str], seed: int) -> np.ndarray:
    """Names to test on: a fraction of each set; a name in both sets is on one side only."""
    rng = np.random.default_rng(seed)
    chosen = []
    for title, names in (("real", np.unique(real)), ("generated", np.setdiff1d(generated, real))):
        if len(names) == 1:
            raise ValueError(f"{title} holds 1 subject: the test needs at least 2, one to train on and one to test on.")
        chosen.append(rng.permutation(names)[: round(HELD_OUT * len(names))])
    return np.concatenate(chosen)


def auc(real: np.ndarray, generated: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a generated value is higher than a real one; ties count half.

    `real` (N,) and `generated` (M,) may hold NaN, which is left out. NaN if one of them is empty.
    """
    from sklearn.metrics import roc_auc_score

    real, generated = (values[~np.isnan(values)] for values in (real, generated))
    if len(real) == 0 or len(generated) == 0:
        return float("nan")
    is_generated = np.r_[np.zeros(len(real)), np.ones(len(generated))]
    return float(roc_auc_score(is_generated, np.concatenate([real, generated])))
