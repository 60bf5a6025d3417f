import numpy as np
import pytest
from scipy import ndimage

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.metrics.alignment import (
    brain_region,
    edge_correlation,
    edge_map,
    enhancement_ratio,
    evaluate_alignment,
    vessel_contrast,
)

NAMES = ["T1", "FLAIR", "WB", "BB"]


@pytest.fixture(scope="module")
def subjects() -> tuple[np.ndarray, np.ndarray]:
    drawn = [simulate_subject((7, i), 64, NAMES) for i in range(12)]
    return np.stack([s.images for s in drawn]), np.stack([s.mask for s in drawn])


@pytest.fixture(scope="module")
def real(subjects) -> dict:
    return evaluate_alignment(*subjects, NAMES, progress=False)


def test_edges_do_not_mind_contrast_but_mind_position():
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((128, 128)), 2)
    everywhere = np.ones((128, 128), dtype=bool)
    assert edge_correlation(edge_map(image), edge_map(0.8 - 3 * image), everywhere) == pytest.approx(1.0)
    assert edge_correlation(edge_map(image), edge_map(np.roll(image, 12, axis=0)), everywhere) < 0.2
    assert np.isnan(edge_correlation(edge_map(image), edge_map(np.zeros((128, 128))), everywhere))
    assert np.isnan(edge_correlation(edge_map(image), edge_map(image), ~everywhere))


def test_brain_region_finds_the_simulated_brain():
    subject = simulate_subject(3, 128, NAMES)
    truth = ndimage.binary_fill_holes(sum(subject.tissues.values()) > 0.5)
    found = brain_region(subject.images)
    assert 2 * np.sum(truth & found) / (truth.sum() + found.sum()) > 0.97
    assert not brain_region(np.zeros((2, 16, 16))).any()


def test_brain_region_is_one_part_without_holes():
    image = np.zeros((64, 64))
    image[16:48, 16:48] = 0.5
    image[28:36, 28:36] = 0  # ventricles, dark in every modality
    image[2:5, 2:5] = 0.5  # a speck outside
    region = brain_region(np.stack([image, image]))
    assert region[32, 32] and not region[3, 3]
    assert ndimage.label(region)[1] == 1


def test_enhancement_of_known_intensities():
    image, brain, mask = np.zeros((8, 8)), np.zeros((8, 8), dtype=bool), np.zeros((8, 8), dtype=bool)
    brain[1:7, 1:7], mask[2:4, 2:4] = True, True
    image[brain], image[mask] = 0.2, 0.6
    assert enhancement_ratio(image, mask, brain) == pytest.approx(3.0)
    mask[0, 0:4] = True  # half of the mask now lies outside the brain, where it is dark
    assert enhancement_ratio(image, mask, brain) == pytest.approx(1.5)
    assert np.isnan(enhancement_ratio(image, np.zeros((8, 8), dtype=bool), brain))
    assert np.isnan(enhancement_ratio(image, mask, mask))


def test_vessels_of_known_intensities():
    brain, mask = np.ones((100, 100), dtype=bool), np.zeros((100, 100), dtype=bool)
    white, black = np.full((100, 100), 0.4), np.full((100, 100), 0.4)
    white[50, :], black[50, :] = 0.8, 0.0  # a vessel of a hundredth of the pixels
    white_level, black_level = vessel_contrast(white, black, mask, brain)
    assert white_level == pytest.approx(0.8 / white.mean())
    assert black_level == 0
    # Beneath a tumour the same pixels are no vessels.
    mask[48:53, :] = True
    assert vessel_contrast(white, black, mask, brain) == pytest.approx((1.0, 1.0))
    assert np.isnan(vessel_contrast(white, black, mask, ~brain)).all()


def test_simulated_subjects_are_aligned_and_shuffled_ones_are_not(real):
    for pair, value in real["edge_correlation"].items():
        assert value > 0.5 > 0.3 > real["edge_correlation_shuffled"][pair]
    assert real["apart"] == 0
    assert min(real["enhancement"].values()) > 1.5
    assert max(real["enhancement_shuffled"].values()) < 1.3
    assert real["vessels"]["WB"] > 1.5 > 0.4 > real["vessels"]["BB"]
    assert real["vessels_shuffled"]["BB"] > real["vessels"]["BB"] + 0.2
    assert real["num_empty_masks"] == 0


def test_one_modality_of_another_subject_is_noticed(subjects, real):
    images, masks = subjects[0].copy(), subjects[1]
    images[:, 3] = np.roll(images[:, 3], 1, axis=0)
    mixed = evaluate_alignment(images, masks, NAMES, reference=real, progress=False)
    assert mixed["edge_correlation_change_worst"] < -0.5
    # The pairs without BB stay as they were, but for the brain region, which is found from all modalities.
    assert mixed["edge_correlation_change"]["T1-FLAIR"] == pytest.approx(0, abs=0.02)
    assert mixed["edge_correlation_change"]["WB-BB"] < -0.5
    assert mixed["apart"] == pytest.approx(0.5, abs=0.1)  # three of the six pairs
    assert mixed["enhancement_change"]["BB"] < -0.3 and mixed["enhancement_change"]["WB"] == pytest.approx(0, abs=0.02)


def test_one_wrong_subject_shows_in_apart_although_the_means_hide_it(subjects, real):
    images, masks = subjects[0].copy(), subjects[1]
    images[0, 3] = images[1, 3]
    mixed = evaluate_alignment(images, masks, NAMES, reference=real, progress=False)
    assert mixed["edge_correlation_change_worst"] > -0.15
    assert mixed["apart"] > 0


def test_missing_modalities_masks_and_other_names(subjects):
    images, masks = subjects[0].copy(), subjects[1].copy()
    present, has_mask = np.ones((12, 4), dtype=bool), np.ones(12, dtype=bool)
    present[0, 2], images[0, 2] = False, 0
    has_mask[1], masks[1], masks[2] = False, 0, 0
    result = evaluate_alignment(images, masks, ["T1", "FLAIR", "T1CE", "T2"], None, present, has_mask, progress=False)
    assert result["vessels"] is None
    assert list(result["enhancement"]) == ["T1CE"] and np.isfinite(result["enhancement"]["T1CE"])
    assert result["num_empty_masks"] == 1
    assert all(np.isfinite(value) for value in result["edge_correlation"].values())


def test_a_single_modality_has_no_pairs(subjects):
    images, masks = subjects
    alone = evaluate_alignment(images[:, :1], masks, ["T1"], progress=False)
    again = evaluate_alignment(images[:, :1], masks, ["T1"], reference=alone, progress=False)
    assert again["edge_correlation"] == {} and np.isnan(again["edge_correlation_change_worst"])
