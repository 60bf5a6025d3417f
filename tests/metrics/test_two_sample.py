"""A small CNN finds what is there to find, on subjects that it has not seen."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from dldm_pipeline.metrics.two_sample import auc, two_sample_scores


def pictures(count: int, seed: int, noise: float) -> np.ndarray:
    """Smooth textures with the given grain: uint8 (count, 32, 32)."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(count, 32, 32)), (0, 5, 5))
    return np.clip(128 + 500 * smooth + noise * rng.normal(size=smooth.shape), 0, 255).astype(np.uint8)


def test_auc_is_the_probability_of_a_higher_value():
    rng = np.random.default_rng(0)
    real, generated = rng.integers(0, 9, 40), rng.integers(2, 11, 30)
    difference = generated[:, None] - real
    assert auc(real, generated) == pytest.approx(np.mean(difference > 0) + np.mean(difference == 0) / 2)
    assert auc(np.append(real, np.nan), generated) == auc(real, generated) and np.isnan(auc(real, generated[:0]))


def test_grain_is_found_and_nothing_where_nothing_is():
    names = [f"s{i}" for i in range(60)], [f"g{i}" for i in range(60)]
    real, second, grainy = pictures(60, 0, 8), pictures(60, 1, 8), pictures(60, 2, 20)
    state = torch.get_rng_state()
    found = two_sample_scores(real, grainy, *names)
    np.testing.assert_array_equal(two_sample_scores(real, grainy, *names), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert auc(*found) > 0.9 and abs(auc(*two_sample_scores(real, second, *names)) - 0.5) < 0.25


def test_held_out_subjects_are_on_one_side():
    subjects = np.repeat([f"s{i}" for i in range(10)], 3)
    first, second = two_sample_scores(pictures(30, 0, 8), pictures(30, 1, 8), subjects, subjects, epochs=1)
    held_out = np.unique(subjects[~np.isnan(first)])
    assert len(held_out) == 3 and np.array_equal(~np.isnan(first), np.isin(subjects, held_out))
    assert np.array_equal(np.isnan(first), np.isnan(second))  # the same names in both sets
    with pytest.raises(ValueError, match="generated holds 1 subject"):
        two_sample_scores(pictures(30, 0, 8), pictures(3, 1, 8), subjects, ["x"] * 3)
