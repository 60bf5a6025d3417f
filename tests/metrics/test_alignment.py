import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import mutual_info_score
from torch.utils.flop_counter import FlopCounterMode

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.slices import split_subjects
from dldm_pipeline.metrics.alignment import (
    brain_region,
    edge_correlation,
    edge_map,
    enhancement_ratio,
    evaluate_alignment,
    normalized_mutual_information,
    vessel_contrast,
)
from dldm_pipeline.metrics.segmenter import make_segmenter, predict_masks, train_segmenter

NAMES = ["T1", "FLAIR", "WB", "BB"]


@pytest.fixture(scope="module")
def subjects() -> tuple[np.ndarray, np.ndarray]:
    drawn = [simulate_subject((7, i), 64, NAMES) for i in range(12)]
    return np.stack([s.images for s in drawn]), np.stack([s.mask for s in drawn])


@pytest.fixture(scope="module")
def segmenters() -> dict[str, torch.nn.Module]:
    drawn = [simulate_subject((8, i), 64, NAMES) for i in range(80)]
    images, masks = np.stack([s.images for s in drawn]), np.stack([s.mask for s in drawn])
    return {name: train_segmenter(images[:, m], masks, steps=120, progress=False)[0] for m, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def real(subjects, segmenters) -> dict:
    return evaluate_alignment(*subjects, NAMES, progress=False, segmenters=segmenters)


def test_edges_do_not_mind_contrast_but_mind_position():
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((128, 128)), 2)
    everywhere = np.ones((128, 128), dtype=bool)
    assert edge_correlation(edge_map(image), edge_map(0.8 - 3 * image), everywhere) == pytest.approx(1.0)
    assert edge_correlation(edge_map(image), edge_map(np.roll(image, 12, axis=0)), everywhere) < 0.2
    assert np.isnan(edge_correlation(edge_map(image), edge_map(np.zeros((128, 128))), everywhere))
    assert np.isnan(edge_correlation(edge_map(image), edge_map(image), ~everywhere))


def test_mutual_information_agrees_with_scikit_learn_and_does_not_mind_contrast():
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


@pytest.mark.parametrize("size", [64, 128])
def test_segmenter_is_small_and_fits_the_image(size):
    with FlopCounterMode(display=False) as counter:
        assert make_segmenter()(torch.zeros(1, 1, size, size)).shape == (1, 1, size, size)
    assert counter.get_total_flops() < 0.2e9 * (size / 128) ** 2


def test_segmenter_is_seeded_and_never_sees_held_out_subjects(subjects):
    images, masks = subjects[0][:, 3].copy(), subjects[1]
    names = [f"s{i // 2}" for i in range(12)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, score = train_segmenter(images, masks, names, steps=3, batch_size=2, held_out=0.3, progress=False)
    assert torch.equal(torch.get_rng_state(), before) and 0 <= score <= 1 and not first.training
    images[np.isin(names, split_subjects(names, 0.3)[1])] = 0.5
    again, _ = train_segmenter(images, masks, names, steps=3, batch_size=2, held_out=0.3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other, _ = train_segmenter(images, masks, names, steps=3, batch_size=2, held_out=0.3, seed=1, progress=False)
    assert not torch.equal(first[1].weight, other[1].weight)
    np.testing.assert_array_equal(predict_masks(first, images, batch_size=5), predict_masks(first, images))


def test_segmenter_refuses_what_it_cannot_learn_from(subjects):
    images, masks = subjects[0][:, 3], subjects[1]
    with pytest.raises(ValueError, match=r"images has shape \(12, 4, 64, 64\): give one modality"):
        train_segmenter(subjects[0], masks)
    with pytest.raises(ValueError, match=r"masks has shape \(11, 64, 64\)"):
        train_segmenter(images, masks[1:])
    with pytest.raises(ValueError, match="subjects holds 1 subject"):
        train_segmenter(images, masks, ["one"] * 12)
    with pytest.raises(ValueError, match="masks shows no tumour"):
        train_segmenter(images, 0 * masks)
    with pytest.raises(ValueError, match="segmenters names .'T2'.*T1, FLAIR, WB, BB"):
        evaluate_alignment(*subjects, NAMES, segmenters={"T2": make_segmenter()})


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
    assert real["misaligned"] == 0
    assert min(real["enhancement"].values()) > 1.5
    assert max(real["enhancement_shuffled"].values()) < 1.3
    assert real["vessels"]["WB"] > 1.5 > 0.4 > real["vessels"]["BB"]
    assert real["vessels_shuffled"]["BB"] > real["vessels"]["BB"] + 0.2
    assert real["num_empty_masks"] == 0
    for pair, value in real["mutual_information"].items():
        assert value - 1 > 3 * (real["mutual_information_shuffled"][pair] - 1) > 0
    for name, value in real["mask_agreement"].items():
        assert value > 4 * real["mask_agreement_shuffled"][name]
    assert min(real["mask_agreement"][name] for name in ("FLAIR", "WB", "BB")) > 0.4


def test_one_modality_of_another_subject_is_noticed(subjects, segmenters, real):
    images, masks = subjects[0].copy(), subjects[1]
    images[:, 3] = np.roll(images[:, 3], 1, axis=0)
    mixed = evaluate_alignment(images, masks, NAMES, reference=real, progress=False, segmenters=segmenters)
    assert mixed["mutual_information"]["WB-BB"] - 1 < 0.4 * (real["mutual_information"]["WB-BB"] - 1)
    assert mixed["mask_agreement"]["BB"] < 0.2
    assert mixed["mask_agreement"]["WB"] == pytest.approx(real["mask_agreement"]["WB"])
    assert mixed["edge_correlation_change_worst"] < -0.5
    # The pairs without BB stay as they were, but for the brain region, which is found from all modalities.
    assert mixed["edge_correlation_change"]["T1-FLAIR"] == pytest.approx(0, abs=0.02)
    assert mixed["edge_correlation_change"]["WB-BB"] < -0.5
    assert mixed["misaligned"] == pytest.approx(0.5, abs=0.1)  # three of the six pairs
    assert mixed["enhancement_change"]["BB"] < -0.3 and mixed["enhancement_change"]["WB"] == pytest.approx(0, abs=0.02)


def test_one_wrong_subject_shows_in_apart_although_the_means_hide_it(subjects, real):
    images, masks = subjects[0].copy(), subjects[1]
    images[0, 3] = images[1, 3]
    mixed = evaluate_alignment(images, masks, NAMES, reference=real, progress=False)
    assert mixed["edge_correlation_change_worst"] > -0.15
    assert mixed["misaligned"] > 0


def test_missing_modalities_masks_and_other_names(subjects):
    images, masks = subjects[0].copy(), subjects[1].copy()
    present, has_mask = np.ones((12, 4), dtype=bool), np.ones(12, dtype=bool)
    present[0, 2], images[0, 2] = False, 0
    has_mask[1], masks[1], masks[2] = False, 0, 0
    names = ["T1", "FLAIR", "T1CE", "T2"]
    result = evaluate_alignment(images, masks, names, None, present, has_mask, progress=False)
    assert result["mask_agreement"] is None and all(np.isfinite(v) for v in result["mutual_information"].values())
    assert result["vessels"] is None
    assert list(result["enhancement"]) == ["T1CE"] and np.isfinite(result["enhancement"]["T1CE"])
    assert result["num_empty_masks"] == 1
    assert all(np.isfinite(value) for value in result["edge_correlation"].values())


def test_mask_agreement_counts_only_what_is_known(subjects, segmenters):
    images, masks = subjects[0].copy(), subjects[1].copy()
    present, has_mask = np.ones((12, 4), dtype=bool), np.ones(12, dtype=bool)
    present[:4, 3] = has_mask[4:8] = False
    images[:4, 3], masks[4:8] = 0, 0
    only = {"BB": segmenters["BB"]}
    result = evaluate_alignment(images, masks, NAMES, None, present, has_mask, progress=False, segmenters=only)
    rest = evaluate_alignment(images[8:], masks[8:], NAMES, progress=False, segmenters=only)
    assert list(result["mask_agreement"]) == ["BB"]
    assert result["mask_agreement"]["BB"] == pytest.approx(rest["mask_agreement"]["BB"])


def test_a_single_modality_has_no_pairs(subjects):
    images, masks = subjects
    alone = evaluate_alignment(images[:, :1], masks, ["T1"], progress=False)
    again = evaluate_alignment(images[:, :1], masks, ["T1"], reference=alone, progress=False)
    assert again["edge_correlation"] == {} and np.isnan(again["edge_correlation_change_worst"])
