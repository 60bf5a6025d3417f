"""What a segmenter is and what it refuses; that it finds tumours is in `test_alignment.py`."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.slices import split_subjects
from dldm_pipeline.metrics.segmenter import make_segmenter, predict_masks, train_segmenter


@pytest.fixture(scope="module")
def subjects() -> tuple[np.ndarray, np.ndarray]:
    """BB images and masks of six simulated subjects, two slices each."""
    simulated = [simulate_subject((7, i), 32, ["BB"]) for i in range(12)]
    return np.stack([s.images[0] for s in simulated]), np.stack([s.mask for s in simulated])


@pytest.mark.parametrize("size", [64, 128])
def test_segmenter_is_small_and_fits_the_image(size):
    with FlopCounterMode(display=False) as counter:
        assert make_segmenter()(torch.zeros(1, 1, size, size)).shape == (1, 1, size, size)
    assert counter.get_total_flops() < 0.2e9 * (size / 128) ** 2


def test_segmenter_is_seeded_and_never_sees_held_out_subjects(subjects):
    images, masks = subjects[0].copy(), subjects[1]
    names = [f"s{i // 2}" for i in range(12)]

    def train(seed: int = 0) -> tuple[torch.nn.Module, float]:
        return train_segmenter(images, masks, names, 3, batch_size=2, held_out=0.3, seed=seed)

    before = torch.get_rng_state()
    first, score = train()
    assert torch.equal(torch.get_rng_state(), before) and 0 <= score <= 1 and not first.training
    images[np.isin(names, split_subjects(names, 0.3)[1])] = 0.5
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), train()[0].parameters(), strict=True))
    assert not torch.equal(first[1].weight, train(seed=1)[0][1].weight)
    np.testing.assert_array_equal(predict_masks(first, images, batch_size=5), predict_masks(first, images))


def test_segmenter_refuses_what_it_cannot_learn_from(subjects):
    images, masks = subjects
    with pytest.raises(ValueError, match=r"images has shape \(2, 12, 32, 32\): give one modality"):
        train_segmenter(np.stack([images, images]), masks)
    with pytest.raises(ValueError, match=r"masks has shape \(11, 32, 32\)"):
        train_segmenter(images, masks[1:])
    with pytest.raises(ValueError, match="subjects holds 1 subject"):
        train_segmenter(images, masks, ["one"] * 12)
    with pytest.raises(ValueError, match="masks shows no tumour"):
        train_segmenter(images, 0 * masks)
