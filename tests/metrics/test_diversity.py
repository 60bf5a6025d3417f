"""MS-SSIM of pairs of different subjects."""

import numpy as np
import pytest

from dldm_pipeline.metrics.diversity import diversity, pair_similarity, ssim_window, subject_pairs


def test_pairs_are_of_different_subjects_each_equally_often():
    subjects = ["a"] * 7 + ["b"] * 2 + ["c", "d"]
    pairs = subject_pairs(subjects, 100)
    owner = np.array(subjects)[pairs]
    assert pairs.shape == (100, 2) and (owner[:, 0] != owner[:, 1]).all()
    assert all((owner == name).sum() == 50 for name in "abcd")
    assert len(np.unique(pairs[owner == "a"])) == 7  # every image of a subject has its turn
    assert np.array_equal(pairs, subject_pairs(subjects, 100)) and len(subject_pairs(["a", "b"], 3)) == 3
    with pytest.raises(ValueError, match="at least 2"):
        subject_pairs(["a", "a"], 3)


def test_ssim_window_fits_five_scales():
    assert [ssim_window(side) for side in (33, 64, 96, 128, 160, 161, 256)] == [3, 3, 5, 7, 9, 11, 11]
    with pytest.raises(ValueError, match="32 pixels wide"):
        ssim_window(32)


def test_similarity_rises_as_images_become_alike():
    rng = np.random.default_rng(0)
    base, other = rng.integers(60, 190, size=(2, 1, 48, 40)).astype(np.uint8)
    images = np.concatenate([base, base, base // 2 + other // 2, other])
    values = pair_similarity(images, np.array([[0, 1], [0, 2], [0, 3]]))
    assert values[0] == pytest.approx(1.0) and values[0] > values[1] + 0.1 > values[2] + 0.2
    names = list("abcd")
    pairs = subject_pairs(names, 9, seed=1)
    assert diversity(images, names, 9, seed=1) == pytest.approx(pair_similarity(images, pairs).mean())
    with pytest.raises(TypeError, match="to_uint8"):
        pair_similarity(images / 255, pairs)
