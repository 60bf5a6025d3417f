"""Scores against their reference implementations, intervals, and everything together."""

import json

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dldm_pipeline.metrics import fidelity
from dldm_pipeline.metrics.diversity import diversity
from dldm_pipeline.metrics.features import FeatureExtractor
from dldm_pipeline.metrics.fidelity import (
    evaluate_fidelity,
    feature_scores,
    frechet_distance,
    half_samples,
    kernel_distance,
    neighbour_scores,
)
from dldm_pipeline.metrics.images import Slices
from dldm_pipeline.metrics.two_sample import auc, two_sample_scores


def clouds(count: int = 150, other: int = 120, dim: int = 24, shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of correlated, skewed features that overlap in part, as a network's after its ReLU."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    first, second = (np.maximum(rng.normal(size=(n, dim)) @ mix, 0) for n in (count, other))
    return first, 1.1 * second + shift * rng.random(dim)


def test_frechet_distance_is_torch_fidelitys():
    few = clouds(40, 30, dim=100)  # fewer samples than features: both covariances are singular
    for real, generated in (clouds(), few):
        given = frechet_distance(real, generated)
        statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (real, generated)]
        expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        assert given == pytest.approx(expected, rel=1e-4)
        assert frechet_distance(generated, real) == pytest.approx(given, rel=1e-9)
        assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-9)


def test_kernel_distance_is_torch_fidelitys_and_of_unequal_sets_the_unbiased_estimate(monkeypatch):
    real, generated = clouds(120, 120)
    first, second = torch.from_numpy(generated), torch.from_numpy(real)
    # A subset as large as the set is the whole set.
    expected = kid_features_to_metric(first, second, kid_subsets=1, kid_subset_size=120, verbose=False)
    assert kernel_distance(real, generated) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    monkeypatch.setattr(fidelity, "ROWS", 37)  # several blocks
    real, generated = clouds()
    kernel = (np.concatenate([real, generated]) @ np.concatenate([real, generated]).T / 24 + 1) ** 3
    within = [k[~np.eye(len(k), dtype=bool)].mean() for k in (kernel[:150, :150], kernel[150:, 150:])]
    assert kernel_distance(real, generated) == pytest.approx(sum(within) - 2 * kernel[:150, 150:].mean())


@pytest.mark.parametrize("k", [3, 5])
def test_neighbour_scores_are_torch_fidelitys_and_prdcs(k, monkeypatch):
    monkeypatch.setattr(fidelity, "ROWS", 37)
    real, generated = (x.astype(np.float32) for x in clouds(shift=0.5))
    given = neighbour_scores(real, generated, k)
    first, second = (torch.from_numpy(x.astype(np.float64)) for x in (generated, real))
    expected = prc_features_to_metric(first, second, prc_neighborhood=k, verbose=False)
    assert (given["precision"], given["recall"]) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-4)
    assert given == pytest.approx(compute_prdc(real, generated, nearest_k=k), rel=1e-4)
    assert 0.05 < given["precision"] < 0.999 and 0.05 < given["coverage"] < 0.999  # no trivial case


def test_bad_features_are_refused():
    real, generated = clouds(12, 12)
    broken = generated.copy()
    broken[3, 5] = np.nan
    for pair, message in (
        ((real, broken), "generated: 1 of 12 feature rows hold NaN"),
        ((real, generated[:, :20]), r"real has shape \(12, 24\) and generated \(12, 20\)"),
        ((real, generated[:1]), "generated has 1 samples: give at least"),
        ((real[:, 0], generated), r"real has shape \(12,\)"),
    ):
        for function in (frechet_distance, kernel_distance, neighbour_scores):
            with pytest.raises(ValueError, match=message):
                function(*pair)


def test_half_samples_keep_subjects_whole():
    halves = half_samples(np.repeat(list("abcde"), 4), 40)
    assert {int(half.sum()) for half in halves} == {8, 12}  # two and three subjects by turns
    assert all(half.reshape(5, 4).all(axis=1).sum() * 4 == half.sum() for half in halves)
    assert np.mean(halves) == pytest.approx(0.5)
    # Their deviation is what the interval stands for: that of the score over repeated samples of both sets.
    rng = np.random.default_rng(0)
    repeated = [(rng.normal(size=(100, 5)), rng.normal(size=(100, 5)) + 0.5) for _ in range(60)]
    scores = {"frechet_distance": frechet_distance, "precision": lambda a, b: neighbour_scores(a, b)["precision"]}
    for name, score in scores.items():
        std = np.std([score(*pair) for pair in repeated])
        estimates = []
        for real, generated in repeated[:4]:
            halves = zip(*(half_samples(range(100), 30, seed=i) for i in (1, 2)), strict=True)
            estimates.append(np.std([score(real[a], generated[b]) for a, b in halves]))
        assert 0.7 < np.mean(estimates) / std < 1.5, name


NAMES = ["T1", "T2"]
OPTIONS = {"num_resamples": 6, "num_pairs": 12, "epochs": 1}


def tiny() -> FeatureExtractor:
    """Means of the 16 blocks of an image, normalised as the real networks do, through a curve."""
    blocks = torch.nn.AvgPool2d(8)
    return FeatureExtractor("tiny", "", 32, 16, lambda x: blocks((x[:, 0] - 127) / 128).flatten(1).exp(), "0" * 64)


def sets(count: int = 24, size: int = 40, seed: int = 0) -> np.ndarray:
    """Bright discs of random place, size and brightness, with some grain: uint8 (count, 2, size, size)."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size]
    y, x, radius, value = rng.uniform(size / 3, size * 2 / 3, (4, count, 2, 1, 1))
    out = (100 + 2 * value) * (np.hypot(row - y, column - x) < 0.4 * radius)
    return np.clip(out + 8 * rng.normal(size=out.shape), 0, 255).astype(np.uint8)


def real(seed: int = 0) -> Slices:
    return Slices(sets(seed=seed), [f"{seed}-{i}" for i in range(24)])


def test_evaluate_fidelity(tmp_path):
    generated = Slices(sets(seed=2) // 2)
    options = {**OPTIONS, "second": real(1), "cache": tmp_path}
    result = evaluate_fidelity(real(), generated, NAMES, tiny(), **options)
    assert json.loads(json.dumps(result)) == result  # plain numbers throughout
    assert set(result["scores"]) == set(fidelity.SCORES) == set(result["floor"]["scores"])
    for scores in (result["scores"], result["floor"]["scores"]):
        for score, entries in scores.items():
            assert list(entries) == ["T1", "T2", "mean"]
            assert entries["mean"]["value"] == pytest.approx((entries["T1"]["value"] + entries["T2"]["value"]) / 2)
            assert all(e["low"] is None or e["low"] <= e["value"] <= e["high"] for e in entries.values()), score
            assert score == "two_sample_auc" or entries["mean"]["low"] is not None
    distances = (one["scores"]["frechet_distance"]["mean"]["value"] for one in (result, result["floor"]))
    assert next(distances) > next(distances)
    assert result["num_images"]["T1"] == result["num_subjects"]["T1"] == {"real": 24, "generated": 24, "floor": 24}
    assert result["extractor"]["name"] == "tiny" and result["titles"]["frechet_distance"].startswith("Fréchet")
    assert result["floor"]["source"] == "a second real set" and result["ssim_window"] == 3

    # The values are those of the plain functions.
    first, other = real().images[:, 0], generated.images[:, 0]
    expected = feature_scores(*(tiny()(x) for x in (first, other)))
    names = generated.names("g")
    expected["diversity"] = diversity(other, names, 12)
    expected["two_sample_auc"] = auc(*two_sample_scores(first, other, real().subjects, names, epochs=1))
    assert {score: e["T1"]["value"] for score, e in result["scores"].items()} == pytest.approx(expected, rel=1e-6)
    assert result["diversity_real"]["T1"] == pytest.approx(diversity(first, real().subjects, 12))

    # The floor of one system serves the next; another number of images does not fit it.
    again = evaluate_fidelity(real(), generated, NAMES, tiny(), **options, floor=result["floor"])
    assert again == result
    with pytest.raises(ValueError, match="floor was measured with other settings"):
        evaluate_fidelity(real(), Slices(sets(20, seed=2)), NAMES, tiny(), **options, floor=result["floor"])


def test_without_a_second_set_the_real_subjects_are_halved():
    twice = Slices(np.repeat(sets(12), 2, axis=0), np.repeat([f"s{i}" for i in range(12)], 2))
    result = evaluate_fidelity(twice, Slices(sets(30, seed=2)), NAMES, tiny(), **OPTIONS)
    # Both halves have 6 whole subjects with 2 images each, and as many generated images are compared.
    assert result["num_images"]["T2"] == {"real": 12, "generated": 12, "floor": 12}
    assert result["num_subjects"]["T2"] == {"real": 6, "generated": 12, "floor": 6}
    assert set(result["floor"]["num_images"]["T1"]) == {"real", "floor"}
    assert result["floor"]["scores"]["frechet_distance"]["T1"]["value"] > 0.001  # and not one half with itself


def test_missing_modalities_and_another_network_for_the_neighbours():
    incomplete = real()
    incomplete.present[:6, 1] = False
    other = FeatureExtractor("other", "", 32, 4, lambda x: x[:, 0, 8:10, 8:10].flatten(1), "1" * 64)
    generated = Slices(sets(seed=2))
    options = dict(num_pairs=0, epochs=0, num_resamples=0)
    result = evaluate_fidelity(incomplete, generated, NAMES, tiny(), real(1), other, **options)
    assert result["num_images"]["T2"] == {"real": 18, "generated": 24, "floor": 24}
    assert result["scores"]["recall"]["T2"]["low"] is None and "diversity" not in result["scores"]
    expected = neighbour_scores(*(other(x[:, 1]) for x in (incomplete.images[6:], generated.images)))
    assert result["scores"]["coverage"]["T2"]["value"] == pytest.approx(expected["coverage"])


def test_bad_sets_are_refused():
    for subjects, generated, message in (
        (None, sets()[:, [0, 0, 0]], r"generated has images of shape \(24, 3, 40, 40\).*T1, T2"),
        (None, sets(size=36), "image sizes differ"),
        (None, sets(3), "generated has 3 images of T1: k=3 needs at least 4"),
        (["s"] * 24, sets(), "real has 1 subject: the floor needs at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_fidelity(Slices(sets(), subjects), Slices(generated), NAMES, tiny(), **OPTIONS)
