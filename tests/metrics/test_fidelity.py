import json

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as clean_frechet
from cleanfid.fid import kernel_distance as clean_kernel
from prdc import compute_prdc
from scipy import linalg
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dldm_pipeline.metrics import fidelity
from dldm_pipeline.metrics.features import FeatureExtractor
from dldm_pipeline.metrics.fidelity import (
    auc,
    diversity,
    evaluate_fidelity,
    feature_scores,
    frechet_distance,
    half_samples,
    kernel_distance,
    neighbour_scores,
    pair_similarity,
    plot_range_sweep,
    range_sweep,
    ssim_window,
    subject_pairs,
    two_sample_auc,
    two_sample_scores,
)


def clouds(count: int = 150, other: int = 120, dim: int = 24, shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of correlated, skewed features that overlap in part, as a network's after its ReLU."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    first, second = (np.maximum(rng.normal(size=(n, dim)) @ mix, 0) for n in (count, other))
    return first, 1.1 * second + shift * rng.random(dim)


def pictures(count: int, size: int = 48, seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """Bright discs of random place, size and brightness, with the given grain: uint8 (count, size, size)."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size]
    out = np.empty((count, size, size))
    for i in range(count):
        y, x, radius, value = rng.uniform(size / 3, size * 2 / 3, 4) * (1, 1, 0.4, 1)
        out[i] = (100 + 2 * value) * (np.hypot(row - y, column - x) < radius)
    return np.clip(out + noise * rng.normal(size=out.shape), 0, 255).astype(np.uint8)


def tiny() -> FeatureExtractor:
    """Means of the 16 blocks of an image, normalised as the real networks do, through a curve."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d((pixels[:, :1] - 127) / 128, 8).flatten(1).exp()

    return FeatureExtractor("tiny", "blocks", 32, 16, forward, "0" * 64)


# --- scores on features, against the reference implementations --------------------------------------------------------


def clean_fid(real: np.ndarray, generated: np.ndarray, monkeypatch) -> float:
    """clean-fid's figure; SciPy 1.18 dropped the argument `disp` that it gives."""
    original = linalg.sqrtm

    def sqrtm(a, disp=True):
        return original(a) if disp else (original(a), 0.0)

    monkeypatch.setattr(linalg, "sqrtm", sqrtm)
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, generated)]
    return float(clean_frechet(*moments[0], *moments[1]))


@pytest.mark.parametrize("other", [120, 150])
def test_frechet_distance_is_clean_fids_and_torch_fidelitys(monkeypatch, other):
    real, generated = clouds(other=other)
    given = frechet_distance(real, generated)
    assert given == pytest.approx(clean_fid(real, generated, monkeypatch), rel=1e-4)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (real, generated)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert given == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(generated, real) == pytest.approx(given, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_features():
    real, generated = clouds(40, 30, dim=100)  # both covariances are singular
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (real, generated)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_known_gaussians():
    # Points at ± one deviation on each axis have exactly these moments.
    def points(deviations, mean):
        spread = np.sqrt(2 * len(deviations) - 1) * np.diag(deviations) / np.sqrt(2)
        return np.concatenate([spread, -spread]) + mean

    real, generated = points([1.0, 2.0], [0.0, 0.0]), points([3.0, 2.0], [1.0, 2.0])
    assert frechet_distance(real, generated) == pytest.approx(5.0 + (3 - 1) ** 2)


def test_kernel_distance_is_clean_fids_and_torch_fidelitys():
    real, generated = clouds(120, 120)
    given = kernel_distance(real, generated)
    # A subset as large as the set is the whole set.
    assert given == pytest.approx(clean_kernel(real, generated, num_subsets=1, max_subset_size=120), rel=1e-4)
    expected = kid_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), kid_subsets=1, kid_subset_size=120, verbose=False
    )
    assert given == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


def test_kernel_distance_is_what_subsets_estimate():
    real, generated = clouds(150, 120)
    rng_state = np.random.get_state()
    np.random.seed(0)
    subsets = [clean_kernel(real, generated, num_subsets=1, max_subset_size=60) for _ in range(200)]
    np.random.set_state(rng_state)
    error = np.std(subsets) / np.sqrt(len(subsets))
    assert abs(kernel_distance(real, generated) - np.mean(subsets)) < 4 * error


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_neighbour_scores_are_torch_fidelitys_and_prdcs(k, dtype):
    real, generated = (x.astype(dtype) for x in clouds(shift=0.5))
    given = neighbour_scores(real, generated, k)
    first, second = (torch.from_numpy(x.astype(np.float64)) for x in (generated, real))
    expected = prc_features_to_metric(first, second, prc_neighborhood=k, verbose=False)
    assert given["precision"] == pytest.approx(expected["precision"], rel=1e-4)
    assert given["recall"] == pytest.approx(expected["recall"], rel=1e-4)
    expected = compute_prdc(real, generated, nearest_k=k)
    for name in ("precision", "recall", "density", "coverage"):
        assert given[name] == pytest.approx(expected[name], rel=1e-4)
    assert 0.05 < given["precision"] < 0.999 and 0.05 < given["coverage"] < 0.999  # no trivial case


def test_blocks_of_rows_change_nothing(monkeypatch):
    real, generated = clouds()
    whole = feature_scores(real, generated)
    monkeypatch.setattr(fidelity, "ROWS", 37)
    assert feature_scores(real, generated) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, neighbour_scores])
def test_bad_features_are_refused(function):
    real, generated = clouds(12, 12)
    broken = generated.copy()
    broken[3, 5] = np.nan
    with pytest.raises(ValueError, match="generated: 1 of 12 feature rows hold NaN"):
        function(real, broken)
    with pytest.raises(ValueError, match="real has 24 features and generated 20"):
        function(real, generated[:, :20])
    with pytest.raises(ValueError, match="generated has 1 samples"):
        function(real, generated[:1])
    with pytest.raises(ValueError, match=r"real has shape \(12,\)"):
        function(real[:, 0], generated)


def test_fewer_samples_than_neighbours_are_refused():
    real, generated = clouds(12, 3)
    with pytest.raises(ValueError, match="generated has 3 samples: this score needs at least 4"):
        neighbour_scores(real, generated, k=3)
    with pytest.raises(ValueError, match="k=0"):
        neighbour_scores(real, real, k=0)


# --- pairs and diversity ----------------------------------------------------------------------------------------------


def test_pairs_are_of_different_subjects_each_equally_often():
    subjects = ["a"] * 7 + ["b"] * 2 + ["c", "d"]
    pairs = subject_pairs(subjects, 100)
    owner = np.array(subjects)[pairs]
    assert pairs.shape == (100, 2) and (owner[:, 0] != owner[:, 1]).all()
    assert all((owner == name).sum() == 50 for name in "abcd")
    assert np.array_equal(pairs, subject_pairs(subjects, 100)) and len(subject_pairs(["a", "b"], 3)) == 3
    with pytest.raises(ValueError, match="at least 2"):
        subject_pairs(["a", "a"], 3)


def test_ssim_window_fits_five_scales():
    assert [ssim_window(side) for side in (33, 64, 96, 128, 160, 161, 256)] == [3, 3, 5, 7, 9, 11, 11]
    with pytest.raises(ValueError, match="32 pixels wide"):
        ssim_window(32)


def test_diversity_rises_as_images_become_alike():
    varied = pictures(12, noise=10)
    assert pair_similarity(varied, np.array([[3, 3]]))[0] == pytest.approx(1.0)
    alike = np.clip(varied[:1].astype(int) + np.arange(12)[:, None, None], 0, 255).astype(np.uint8)
    names = [f"s{i}" for i in range(12)]
    assert diversity(varied, names, 40) + 0.2 < diversity(alike, names, 40)
    assert diversity(varied, names, 40, seed=1) == diversity(varied, names, 40, seed=1)


# --- two-sample test --------------------------------------------------------------------------------------------------


def test_auc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    real, generated = rng.integers(0, 9, 40), rng.integers(2, 11, 30)
    expected = roc_auc_score(np.r_[np.zeros(40), np.ones(30)], np.r_[real, generated])
    assert auc(real, generated) == pytest.approx(expected)
    assert np.isnan(auc(real, generated[:0]))


def test_the_two_sample_test_finds_grain_and_nothing_where_nothing_is():
    names = [f"s{i}" for i in range(60)]
    real, second, grainy = pictures(60, 32, 0, 8), pictures(60, 32, 1, 8), pictures(60, 32, 2, 20)
    state = torch.get_rng_state()
    assert two_sample_auc(real, grainy, names, [f"g{i}" for i in range(60)], epochs=6) > 0.9
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(two_sample_auc(real, second, names, [f"g{i}" for i in range(60)], epochs=6) - 0.5) < 0.25


def test_held_out_subjects_are_on_one_side():
    subjects = np.repeat([f"s{i}" for i in range(10)], 3)
    first, second = two_sample_scores(pictures(30, 16), pictures(30, 16, 1), subjects, subjects, epochs=1)
    held = {name for name, value in zip(subjects, first, strict=True) if not np.isnan(value)}
    assert len(held) == 3 and np.isnan(first).sum() == 21
    assert {name for name, value in zip(subjects, second, strict=True) if not np.isnan(value)} == held
    with pytest.raises(ValueError, match="generated holds 1 subject"):
        two_sample_scores(pictures(30, 16), pictures(3, 16), subjects, ["x"] * 3)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_half_samples_keep_subjects_whole():
    subjects = np.repeat(["a", "b", "c", "d", "e"], 4)
    halves = half_samples(subjects, 40)
    assert {int(half.sum()) for half in halves} == {8, 12}  # two and three subjects by turns
    assert all(half.reshape(5, 4).all(axis=1).sum() * 4 == half.sum() for half in halves)
    assert np.mean(halves) == pytest.approx(0.5)


def test_deviations_of_half_samples_are_those_of_the_full_sample():
    # What the interval stands for: the spread of the score over repeated draws of both sets.
    rng = np.random.default_rng(0)
    draw = [(rng.normal(size=(100, 5)), rng.normal(size=(100, 5)) + 0.5) for _ in range(80)]
    scores = {"frechet_distance": frechet_distance, "precision": lambda a, b: neighbour_scores(a, b)["precision"]}
    for name, score in scores.items():
        spread = np.std([score(*pair) for pair in draw])
        estimates = []
        for real, generated in draw[:6]:
            names = range(100)
            halves = zip(half_samples(names, 30, seed=1), half_samples(names, 30, seed=2), strict=True)
            estimates.append(np.std([score(real[a], generated[b]) for a, b in halves]))
        assert 0.7 < np.mean(estimates) / spread < 1.5, name


# --- everything together ----------------------------------------------------------------------------------------------

NAMES = ["T1", "T2"]


def sets(count: int = 24, size: int = 40, seed: int = 0, noise: float = 8.0) -> np.ndarray:
    return np.stack([pictures(count, size, 10 * seed + m, noise) for m in range(2)], axis=1)


OPTIONS = {"num_resamples": 6, "num_pairs": 12, "epochs": 1, "progress": False}


def test_evaluate_fidelity(tmp_path):
    subjects = [f"s{i}" for i in range(24)]
    second = {"second_real": sets(seed=1), "second_subjects": [f"t{i}" for i in range(24)]}
    options = {**OPTIONS, **second, "cache": tmp_path}
    result = evaluate_fidelity(sets(), sets(seed=2, noise=30), NAMES, tiny(), subjects, **options)
    assert json.loads(json.dumps(result)) == result  # plain numbers throughout
    assert set(result["scores"]) == set(fidelity.SCORES) == set(result["floor"]["scores"])
    for scores in (result["scores"], result["floor"]["scores"]):
        for score, entries in scores.items():
            assert list(entries) == ["T1", "T2", "mean"]
            assert entries["mean"]["value"] == pytest.approx((entries["T1"]["value"] + entries["T2"]["value"]) / 2)
            assert all(e["low"] is None or e["low"] <= e["high"] for e in entries.values()), score
    assert (
        result["scores"]["frechet_distance"]["mean"]["value"]
        > result["floor"]["scores"]["frechet_distance"]["mean"]["value"]
    )
    assert result["num_images"]["T1"] == result["num_subjects"]["T1"] == {"real": 24, "generated": 24, "floor": 24}
    assert result["extractor"]["name"] == "tiny" and result["titles"]["frechet_distance"].startswith("Fréchet")
    assert result["floor"]["source"] == "a second real set" and result["ssim_window"] == 3

    # The values are those of the plain functions.
    features = [tiny()(x[:, 0], progress=False) for x in (sets(), sets(seed=2, noise=30))]
    for score, value in feature_scores(*features).items():
        assert result["scores"][score]["T1"]["value"] == pytest.approx(value, rel=1e-6, abs=1e-9)

    # The floor of one system serves the next; another number of images does not fit it.
    again = evaluate_fidelity(sets(), sets(seed=2, noise=30), NAMES, tiny(), subjects, **options, floor=result["floor"])
    assert again == result
    with pytest.raises(ValueError, match="floor was measured with other settings"):
        evaluate_fidelity(sets(), sets(20, seed=2), NAMES, tiny(), subjects, **options, floor=result["floor"])


def test_without_a_second_set_the_real_subjects_are_halved():
    real, subjects = np.repeat(sets(12), 2, axis=0), np.repeat([f"s{i}" for i in range(12)], 2)
    result = evaluate_fidelity(real, sets(30, seed=2), NAMES, tiny(), subjects, **OPTIONS)
    # Both halves have 6 whole subjects with 2 images each, and as many generated images are compared.
    assert result["num_images"]["T2"] == {"real": 12, "generated": 12, "floor": 12}
    assert result["num_subjects"]["T2"] == {"real": 6, "generated": 12, "floor": 6}
    assert set(result["floor"]["num_images"]["T1"]) == {"real", "floor"}


def test_missing_modalities_and_another_network_for_the_neighbours():
    subjects = [f"s{i}" for i in range(24)]
    present = np.ones((24, 2), dtype=bool)
    present[:6, 1] = False
    other = FeatureExtractor("other", "", 32, 4, lambda x: x[:, 0, 8:10, 8:10].flatten(1), "1" * 64)
    options = {**OPTIONS, "num_pairs": 0, "epochs": 0, "num_resamples": 0, "neighbour_extractor": other}
    real, generated = sets(), sets(seed=2)
    options.update(second_real=sets(seed=1), second_subjects=[f"t{i}" for i in range(24)], real_present=present)
    result = evaluate_fidelity(real, generated, NAMES, tiny(), subjects, **options)
    assert result["num_images"]["T2"] == {"real": 18, "generated": 24, "floor": 24}
    assert result["scores"]["recall"]["T2"]["low"] is None and "diversity" not in result["scores"]
    expected = neighbour_scores(*(other(x, progress=False) for x in (real[6:, 1], generated[:, 1])))
    assert result["scores"]["coverage"]["T2"]["value"] == pytest.approx(expected["coverage"])


def test_bad_sets_are_refused():
    subjects = [f"s{i}" for i in range(24)]

    def run(real=None, generated=None, names=subjects, **options):
        real = sets() if real is None else real
        generated = sets(seed=2) if generated is None else generated
        return evaluate_fidelity(real, generated, NAMES, tiny(), names, **{**OPTIONS, **options})

    with pytest.raises(TypeError, match=r"generated are float64.*to_uint8"):
        run(generated=sets(seed=2) / 255)
    with pytest.raises(ValueError, match=r"generated has shape \(24, 3, 40, 40\).*T1, T2"):
        run(generated=np.repeat(sets(seed=2)[:, :1], 3, axis=1))
    with pytest.raises(ValueError, match="image sizes differ"):
        run(generated=sets(size=36))
    with pytest.raises(ValueError, match="generated has 3 images of T1: k=3 neighbours need at least 4"):
        run(generated=sets(3))
    with pytest.raises(ValueError, match="real has 24 images, 23 subject names"):
        run(names=subjects[1:])
    with pytest.raises(ValueError, match="1 subject: the floor needs at least 2"):
        run(names=["s"] * 24)


# --- the paper's scale ------------------------------------------------------------------------------------------------


def test_unit_range_images_shrink_the_distance(tmp_path):
    real, generated = pictures(40, noise=5), pictures(40, seed=1, noise=40)
    result = range_sweep(tiny(), real, generated, white=(255, 16, 1), progress=False)
    right = frechet_distance(tiny()(real, progress=False), tiny()(generated, progress=False))
    assert result["frechet_distance"][0] == pytest.approx(right)
    # [0, 1] images, as clean-fid would take them.
    wrong = frechet_distance(*(tiny()._compute(x.astype(np.float32) / 255, 32) for x in (real, generated)))
    assert result["frechet_distance"][2] == pytest.approx(wrong, rel=1e-3)
    assert 1e4 < result["shrink_factor"] < 1e7
    path = plot_range_sweep(result, tmp_path / "sweep.png")
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="must hold 255 and 1"):
        range_sweep(tiny(), real, generated, white=(255, 2))
