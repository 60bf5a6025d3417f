import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import mutual_info_score

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.metrics.alignment import (
    brain_region,
    edge_correlation,
    edge_map,
    enhancement_ratio,
    evaluate_alignment,
    normalized_mutual_information,
    slices_of_others,
    vessel_contrast,
)
from dldm_pipeline.metrics.segmenter import train_segmenter

NAMES = ["T1", "FLAIR", "WB", "BB"]


@pytest.fixture(scope="module")
def subjects() -> tuple[np.ndarray, np.ndarray]:
    simulated = [simulate_subject((7, i), 64, NAMES) for i in range(12)]
    return np.stack([s.images for s in simulated]), np.stack([s.mask for s in simulated])


@pytest.fixture(scope="module")
def segmenters() -> dict[str, torch.nn.Module]:
    simulated = [simulate_subject((8, i), 64, ["FLAIR", "BB"]) for i in range(24)]
    images, masks = np.stack([s.images for s in simulated]), np.stack([s.mask for s in simulated])
    names = enumerate(["FLAIR", "BB"])
    return {name: train_segmenter(images[:, m], masks, steps=40)[0] for m, name in names}


@pytest.fixture(scope="module")
def real(subjects, segmenters) -> dict:
    return evaluate_alignment(*subjects, NAMES, segmenters=segmenters)


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=30), st.integers(0, 5))
def test_partners_are_slices_of_other_subjects(subjects, seed):
    partners = slices_of_others(subjects, seed)
    if max(map(subjects.count, subjects)) > len(subjects) / 2:
        assert (partners == -1).all()
    else:
        assert sorted(partners) == list(range(len(subjects)))
        assert all(subjects[i] != subjects[j] for i, j in enumerate(partners))


def test_edges_depend_on_position_and_not_on_contrast():
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((128, 128)), 2)
    everywhere = np.ones((128, 128), dtype=bool)
    assert edge_correlation(edge_map(image), edge_map(0.8 - 3 * image), everywhere) == pytest.approx(1.0)
    assert edge_correlation(edge_map(image), edge_map(np.roll(image, 12, axis=0)), everywhere) < 0.2
    assert np.isnan(edge_correlation(edge_map(image), edge_map(np.zeros((128, 128))), everywhere))
    assert np.isnan(edge_correlation(edge_map(image), edge_map(image), ~everywhere))


def test_mutual_information_is_that_of_scikit_learn_and_does_not_depend_on_contrast():
    rng = np.random.default_rng(0)
    image, other = rng.random((64, 64)), rng.random((64, 64))
    mixed, region = 0.7 * image + 0.3 * other, other > 0.3
    a, b = ((x[region] * 16).astype(int) for x in (image, mixed))
    shared, own, its = mutual_info_score(a, b), mutual_info_score(a, a), mutual_info_score(b, b)
    expected = (own + its) / (own + its - shared)
    assert normalized_mutual_information(image, mixed, region) == pytest.approx(expected)
    steps = np.floor(image * 8) / 8 + 0.01
    assert normalized_mutual_information(steps, 1 - steps, region) == pytest.approx(2.0)
    assert 1 < normalized_mutual_information(image, other, region) < 1.05
    assert np.isnan(normalized_mutual_information(image, mixed, np.zeros_like(region)))
    assert np.isnan(normalized_mutual_information(np.zeros((64, 64)), np.ones((64, 64)), region))


def test_brain_region_is_one_part_without_holes():
    subject = simulate_subject(3, 64, NAMES)
    truth = ndimage.binary_fill_holes(sum(subject.tissues.values()) > 0.5)
    found = brain_region(subject.images)
    assert 2 * np.sum(truth & found) / (truth.sum() + found.sum()) > 0.97
    assert not brain_region(np.zeros((2, 16, 16))).any()
    image = np.zeros((64, 64))
    image[16:48, 16:48] = 0.5
    image[28:36, 28:36] = 0  # ventricles, dark in every modality
    image[2:5, 2:5] = 0.5  # a speck outside
    region = brain_region(np.stack([image, image]))
    assert region[32, 32] and ndimage.label(region)[1] == 1 and not region[3, 3]


def test_enhancement_and_vessels_of_known_intensities():
    image, brain, mask = np.zeros((8, 8)), np.zeros((8, 8), dtype=bool), np.zeros((8, 8), dtype=bool)
    brain[1:7, 1:7], mask[2:4, 2:4] = True, True
    image[brain], image[mask] = 0.2, 0.6
    assert enhancement_ratio(image, mask, brain) == pytest.approx(3.0)
    mask[0, 0:4] = True  # half of the mask now lies outside the brain, where it is dark
    assert enhancement_ratio(image, mask, brain) == pytest.approx(1.5)
    assert np.isnan(enhancement_ratio(image, np.zeros((8, 8), dtype=bool), brain))
    assert np.isnan(enhancement_ratio(image, mask, mask))
    # Vessels, bright in WB and black in BB.
    brain, mask = np.ones((100, 100), dtype=bool), np.zeros((100, 100), dtype=bool)
    white, black = np.full((100, 100), 0.4), np.full((100, 100), 0.4)
    white[50, :], black[50, :] = 0.8, 0.0  # a vessel of a hundredth of the pixels
    assert vessel_contrast(white, black, mask, brain) == pytest.approx((0.8 / white.mean(), 0))
    # Beneath a tumour the same pixels are no vessels.
    mask[48:53, :] = True
    assert vessel_contrast(white, black, mask, brain) == pytest.approx((1.0, 1.0))
    assert np.isnan(vessel_contrast(white, black, mask, ~brain)).all()


def test_simulated_subjects_are_aligned_and_shuffled_ones_are_not(real):
    for pair, value in real["edge_correlation"].items():
        assert value > 0.5 > 0.3 > real["edge_correlation_shuffled"][pair]
    assert real["misaligned"] == 0 and real["num_empty_masks"] == 0
    assert min(real["enhancement"].values()) > 1.5 > 1.3 > max(real["enhancement_shuffled"].values())
    assert real["vessels"]["WB"] > 1.5 > 0.4 > real["vessels"]["BB"]
    assert real["vessels_shuffled"]["BB"] > real["vessels"]["BB"] + 0.2
    for pair, value in real["mutual_information"].items():
        assert value - 1 > 3 * (real["mutual_information_shuffled"][pair] - 1) > 0
    assert list(real["mask_agreement"]) == ["FLAIR", "BB"]
    for name, value in real["mask_agreement"].items():
        assert value > 0.4 and value > 4 * real["mask_agreement_shuffled"][name]


def test_one_modality_of_another_subject_is_noticed(subjects, segmenters, real):
    images, masks = subjects[0].copy(), subjects[1]
    images[:, 3] = np.roll(images[:, 3], 1, axis=0)
    mixed = evaluate_alignment(images, masks, NAMES, reference=real, segmenters=segmenters)
    assert mixed["mutual_information"]["WB-BB"] - 1 < 0.4 * (real["mutual_information"]["WB-BB"] - 1)
    assert mixed["mask_agreement"]["BB"] < 0.2
    assert mixed["mask_agreement"]["FLAIR"] == pytest.approx(real["mask_agreement"]["FLAIR"])
    assert mixed["edge_correlation_change_worst"] < -0.5
    # The pairs without BB stay as they were, but for the brain region, which is found from all modalities.
    assert mixed["edge_correlation_change"]["T1-FLAIR"] == pytest.approx(0, abs=0.02)
    assert mixed["edge_correlation_change"]["WB-BB"] < -0.5
    assert mixed["misaligned"] == pytest.approx(0.5, abs=0.1)  # three of the six pairs
    assert mixed["enhancement_change"]["BB"] < -0.3 and mixed["enhancement_change"]["WB"] == pytest.approx(0, abs=0.02)

    # One wrong subject shows in `misaligned`, although the means hide it.
    images = subjects[0].copy()
    images[0, 3] = images[1, 3]
    mixed = evaluate_alignment(images, masks, NAMES, reference=real)
    assert mixed["edge_correlation_change_worst"] > -0.15 and mixed["misaligned"] > 0
    strict = real | {"edge_correlation_shuffled_p95": dict.fromkeys(real["edge_correlation"], 1.0)}
    assert evaluate_alignment(images, masks, NAMES, reference=strict)["misaligned"] == 1


def test_missing_modalities_masks_and_other_names(subjects, segmenters):
    images, masks = subjects[0].copy(), subjects[1].copy()
    present, has_mask = np.ones((12, 4), dtype=bool), np.ones(12, dtype=bool)
    present[:4, 3] = has_mask[4:8] = False
    images[:4, 3] = masks[4:9] = 0
    options = dict(segmenters={"BB": segmenters["BB"]})
    result = evaluate_alignment(images, masks, NAMES, None, present, has_mask, **options)
    assert list(result["mask_agreement"]) == ["BB"] and result["num_empty_masks"] == 1
    # Only what is known counts.
    rest = evaluate_alignment(images[8:], masks[8:], NAMES, **options)
    assert result["mask_agreement"]["BB"] == pytest.approx(rest["mask_agreement"]["BB"])
    rest = evaluate_alignment(images[4:], masks[4:], NAMES)
    for key in ("edge_correlation", "mutual_information"):
        assert result[key]["WB-BB"] == pytest.approx(rest[key]["WB-BB"])

    names = ["T1", "FLAIR", "T1CE", "T2"]
    other = evaluate_alignment(images, masks, names, None, present, has_mask)
    assert other["mask_agreement"] is other["vessels"] is other["vessels_shuffled"] is None
    assert list(other["enhancement"]) == ["T1CE"] and np.isfinite(other["enhancement"]["T1CE"])
    with pytest.raises(ValueError, match="segmenters names .'BB'.*T1, FLAIR, T1CE, T2"):
        evaluate_alignment(images, masks, names, **options)


def test_a_single_modality_has_no_pairs_and_a_single_subject_no_partner(subjects):
    images, masks = subjects
    alone = evaluate_alignment(images[:, :1], masks, ["T1"])
    again = evaluate_alignment(images[:, :1], masks, ["T1"], reference=alone)
    assert again["edge_correlation"] == {} and np.isnan(again["edge_correlation_change_worst"])
    one = evaluate_alignment(images[:2], masks[:2], NAMES, ["a", "a"])
    assert one["num_subjects"] == 1 and one["edge_correlation"]["WB-BB"] > 0.5
    assert np.isnan(one["edge_correlation_shuffled"]["WB-BB"]) and np.isnan(one["misaligned"])
