"""A small segmenter of the tumour, trained on real images of one modality: a judge of where an image shows the tumour."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from dldm_pipeline.data.slices import split_subjects
from dldm_pipeline.optimization import MuonAdamW

from .reconstruction import dice, mean_over_subjects


def make_segmenter() -> torch.nn.Sequential:
    """An untrained segmenter: images (B, 1, H, W) to mask logits (B, 1, H, W), H and W divisible by 4.

    Patches of 4×4 pixels become channels; dilated convolutions then see 23×23 of them around each. 0.16 GFLOP for an
    image of 128×128, a multiplication and an addition counted as two.
    """
    layers: list[torch.nn.Module] = [torch.nn.PixelUnshuffle(4)]
    for width, dilation in zip((16, 40, 40, 40, 40, 40), (1, 1, 2, 4, 2, 1), strict=True):
        layers += [torch.nn.Conv2d(width, 40, 3, padding=dilation, dilation=dilation, bias=False)]
        layers += [torch.nn.BatchNorm2d(40), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(40, 16, 1), torch.nn.PixelShuffle(4))


def train_segmenter(
    images: np.ndarray,
    masks: np.ndarray,
    subjects: list[str] | None = None,
    steps: int = 400,
    batch_size: int = 8,
    held_out: float = 0.2,
    seed: int = 0,
) -> tuple[torch.nn.Module, float]:
    """Trains a segmenter; half a minute on two cores at 128×128.

    The loss is cross-entropy (tumour weighs ten times as much as the rest) plus soft Dice; images are mirrored at random.
    The same seed gives the same weights on the same machine and number of threads; the caller's random state is left as it
    was. Train it on other subjects than those it will judge.

    Args:
        images, masks: (N, H, W) in [0, 1], all of one modality, H and W divisible by 4; (N, H, W), non-zero is tumour.
        subjects: N subject names; None if every image is a subject of its own.
        steps, batch_size: optimizer steps, and images in each.
        held_out: fraction of the subjects that is not trained on.
        seed: of split, initial weights and order.

    Returns:
        The segmenter, in evaluation mode, and its mean Dice on the held-out subjects.

    Raises:
        ValueError: on wrong shapes, fewer than 2 subjects, or no tumour to learn from.
    """
    images, masks = np.asarray(images, dtype=np.float32), np.asarray(masks).astype(bool)
    if images.ndim != 3 or images.shape[1] % 4 or images.shape[2] % 4:
        raise ValueError(f"images has shape {images.shape}: give one modality, (N, H, W), with H and W divisible by 4.")
    if masks.shape != images.shape:
        raise ValueError(f"masks has shape {masks.shape} and images {images.shape}: give one mask for each image.")
    subjects = [f"subject-{i}" for i in range(len(images))] if subjects is None else list(subjects)
    learnt, tested = (np.flatnonzero(np.isin(subjects, part)) for part in split_subjects(subjects, held_out, seed))
    if len(learnt) == 0 or len(tested) == 0:
        given = f"subjects holds {len(set(subjects))} subject(s), held_out is {held_out}"
        raise ValueError(f"{given}: give at least 2, one to learn from and one to be tested on, and a fraction.")
    if not masks[learnt].any():
        raise ValueError(f"masks shows no tumour in {len(learnt)} training images: give slices with tumour.")

    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        segmenter = make_segmenter()
    # Muon and the weight: without either, a faint tumour (T1) is not found for hundreds of steps.
    optimizer, tumour_weight = MuonAdamW(segmenter, lr=2e-2), torch.tensor(10.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps, cycle_momentum=False)
    for _ in tqdm(range(steps), desc="train segmenter"):
        rows = rng.choice(learnt, batch_size)
        image, mask = torch.from_numpy(images[rows])[:, None], torch.from_numpy(masks[rows]).float()
        if rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        logits = segmenter(image)[:, 0]
        probability = logits.sigmoid()
        overlap = (2 * (probability * mask).sum(dim=(1, 2)) + 1) / ((probability + mask).sum(dim=(1, 2)) + 1)
        loss = F.binary_cross_entropy_with_logits(logits, mask, pos_weight=tumour_weight) + 1 - overlap.mean()
        segmenter.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    segmenter.eval()
    scores = dice(masks[tested], predict_masks(segmenter, images[tested]))
    return segmenter, float(mean_over_subjects(scores, [subjects[i] for i in tested]))


@torch.no_grad()
def predict_masks(segmenter: torch.nn.Module, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Tumour masks, bool (N, H, W), that a segmenter finds in images (N, H, W) in [0, 1] of its modality."""
    images = np.asarray(images, dtype=np.float32)
    device = next(segmenter.parameters()).device
    batches = (torch.from_numpy(images[i : i + batch_size]).to(device) for i in range(0, len(images), batch_size))
    return np.concatenate([(segmenter(batch[:, None])[:, 0] > 0).cpu().numpy() for batch in batches])
