"""Copies are refused, and strangers are not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dldm_pipeline.metrics.images import Slices, to_uint8
from dldm_pipeline.metrics.memorization import (
    MemorizationFilter,
    closest_pairs_sheet,
    evaluate_memorization,
    keep_subjects,
)
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

NAMES = ["T1", "T2", "WB"]


def heads(count: int, seed: int) -> np.ndarray:
    """Random textures in one outline, in three contrasts: (count, 3, 32, 32) in [0, 1]."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=(count, 32, 32)), (0, 1.6, 1.6))
    texture = np.clip(0.5 + 0.2 * texture / texture.std(), 0.05, 1)
    y, x = np.mgrid[:32, :32] - 15.5
    texture *= np.hypot(y, 1.2 * x) < 12.8
    inside = texture > 0
    images = np.stack([texture, inside * (1.05 - texture), inside * np.sqrt(texture)], axis=1)
    return np.clip(images, 0, 1).astype(np.float32)


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved, with black coming in."""
    return ndimage.shift(images, (0,) * (images.ndim - 2) + (down, right), order=0)


def planted(images: np.ndarray, rng: np.random.Generator, reach: int) -> np.ndarray:
    """A copy as a careless generator could make it: flipped, shifted by up to `reach` pixels and re-contrasted."""
    flips = tuple(axis for axis in (-2, -1) if rng.random() < 0.5)
    copy = shifted(np.flip(images, flips), *rng.integers(-reach, reach + 1, size=2))
    steps = np.concatenate([[0], np.cumsum(rng.dirichlet(np.full(6, 2.0)) + 0.03)])
    curved = np.interp(copy, np.linspace(0, 1, 7), steps / steps[-1]).astype(np.float32)
    return [copy ** np.exp(rng.uniform(-0.9, 0.9)), 1 - copy, curved][rng.integers(3)]


def make_filter(train: int, held_out: int, autoencoder: torch.nn.Module | None = None, **options) -> MemorizationFilter:
    """A filter of unnamed subjects, one a slice."""
    slices = Slices(heads(train, 0)), Slices(heads(held_out, 1))
    return MemorizationFilter(*slices, NAMES, autoencoder, **options)


@pytest.fixture(scope="module")
def image_filter() -> MemorizationFilter:
    """Sixty training and forty held-out subjects, images alone."""
    return make_filter(60, 40)


def test_planted_copies_are_refused_and_held_out_subjects_are_kept(image_filter: MemorizationFilter) -> None:
    rng = np.random.default_rng(2)
    copies = np.stack([planted(image, rng, 2) for image in heads(60, 0)[:40]])  # two batches
    check = image_filter.check(copies)
    assert check.num_refused == 40 and (check.index == np.arange(40)[:, None]).all()
    assert check.subjects[4].tolist() == ["slice-4"] * 3
    np.testing.assert_allclose(image_filter.check(copies[[35]]).score, check.score[35], rtol=1e-3)
    assert image_filter.check(heads(40, 3)).num_refused <= 2
    assert image_filter.held_out_check.num_refused <= 1 and len(image_filter.held_out_check.keep) == 20
    # A single copied modality is enough.
    samples = heads(6, 4)
    samples[2, 1] = heads(60, 0)[33, 1]
    check = image_filter.check(samples)
    assert not check.keep[2] and check.channel_scores[2].argmax() == 1 and check.index[2, 1] == 33
    one = image_filter.check(samples[:, [1]], modalities=["T2"])
    assert not one.keep[2] and np.isnan(one.ratio[:, [0, 2]]).all() and one.subjects[2].tolist() == ["", "slice-33", ""]


def test_the_threshold_lets_the_promised_fraction_of_calibrating_subjects_pass() -> None:
    strict, loose = (make_filter(20, 40, false_alarm_rate=rate) for rate in (0.02, 0.5))
    assert strict.threshold > loose.threshold and strict.num_calibrating == 20
    assert 0 < loose.held_out_check.num_refused < 20


def test_held_out_subjects_are_split_whole_and_compared_with_others() -> None:
    present = np.array([[True, True, False]] * 8)
    subjects = np.repeat(list("abcd"), 2)
    held_out = Slices(np.repeat(heads(4, 1), 2, axis=0), subjects, present)  # two equal slices a subject
    guard = MemorizationFilter(Slices(heads(12, 0)), held_out, NAMES)
    check = guard.held_out_check
    assert len(check.keep) == 4 and check.score[0] == check.score[1] and check.score[2] == check.score[3]
    assert np.isnan(check.ratio[:, 2]).all()
    assert (check.ratio[:, :2] < 10).all()  # against its own subject the distance would be 0, and the ratio huge


def test_authentic_compares_with_the_training_subjects_own_neighbour(image_filter: MemorizationFilter) -> None:
    check = image_filter.check(np.concatenate([heads(60, 0)[:3], heads(5, 6)]))
    authentic = image_filter.authentic(check)
    matches = image_filter.train.search(Slices(heads(60, 0)), other_subjects=True)
    own = np.take_along_axis(1 - matches.similarity, check.index, axis=0)
    np.testing.assert_array_equal(authentic, 1 - check.similarity >= own)
    assert (authentic[:3] == 0).all() and authentic[3:].mean() > 0.2
    alone = make_filter(1, 4)
    assert np.isnan(alone.authentic(alone.held_out_check)).all()


def test_evaluation_reports_copies_beside_the_held_out_row(image_filter: MemorizationFilter, tmp_path: Path) -> None:
    samples = np.concatenate([heads(4, 7), shifted(heads(60, 0)[[11]], 1, -2)])
    result = evaluate_memorization(image_filter, samples)
    assert result["refused"] == 1 and result["refused_share"] == 0.2
    assert result["refused_by"] == {"T1": 1, "T2": 1, "WB": 1} and len(result["closest"]) == 5
    closest = result["closest"][0]
    assert (closest["sample"], closest["train_subject"], closest["train_slice"]) == (4, "slice-11", 11)
    assert (closest["flip"], closest["shift"]) == ([False, False], [-1, 2])
    assert closest["ratio"] < 0.2 and closest["score"] > result["closest"][1]["score"]
    check = image_filter.check(samples)
    assert result["samples"]["similarity"]["T2"] == pytest.approx(check.similarity[:, 1].mean())
    assert result["samples"]["ratio_min"]["T1"] < 0.2 < result["held_out"]["ratio_min"]["T1"]
    assert result["samples"]["authenticity"]["T1"] <= 0.8 and result["held_out"]["num"] == 20
    assert result["false_alarm_rate_promised"] == pytest.approx(1 - 0.05 ** (1 / 20))

    closest_pairs_sheet(result["closest"][:2], samples, image_filter.train.images, NAMES, tmp_path / "pairs.png")
    sheet = np.asarray(Image.open(tmp_path / "pairs.png")).astype(int)
    assert sheet.shape[0] > 4 * 128  # two pairs, two rows each
    # The copy lies over its original; the columns of images are the last 3 x 131 pixels.
    first, second = (sheet[-4 * 131 + 131 * row :][:128, -3 * 131 :] for row in (0, 1))
    assert np.abs(first - second).mean() < 5
    with pytest.raises(ValueError, match="no pair to show"):
        closest_pairs_sheet([], samples, image_filter.train.images, NAMES, tmp_path / "none.png")


def test_structure_is_compared_under_one_appearance(tiny_autoencoder: torch.nn.Module) -> None:
    both, train = make_filter(30, 20, tiny_autoencoder), heads(30, 0)
    assert both.channels == [*NAMES, "z_struct"]
    with torch.no_grad():
        structure = tiny_autoencoder.encode(torch.from_numpy(train[:4])).structure_dist.mode()
    check = both.check(heads(4, 2), structure)  # a copied anatomy under an appearance that hides it
    assert (check.index[:, 3] == np.arange(4)).all() and (check.similarity[:, 3] > 0.95).all()
    assert check.num_refused == 4
    alone = both.check(None, structure)
    np.testing.assert_allclose(alone.ratio[:, 3], check.ratio[:, 3], rtol=1e-3)
    assert np.isnan(alone.ratio[:, :3]).all()
    encoded = both.check(train[:4])
    np.testing.assert_allclose(encoded.similarity[:, 3], check.similarity[:, 3], atol=0.02)
    with pytest.raises(ValueError, match="structure has 3 subjects and images 4"):
        both.check(train[:4], structure[:3])


def test_the_filter_takes_what_a_pipeline_returns(tiny_pipeline) -> None:
    guard = make_filter(10, 8, tiny_pipeline.autoencoder)
    options = dict(num_subjects=3, num_inference_steps=2, num_style_inference_steps=1, modalities=["WB", "T1"])
    checks = {}
    for output_type in ("np", "pt", "pil", "latent"):
        output = tiny_pipeline(output_type=output_type, generator=torch.Generator().manual_seed(0), **options)
        check = checks[output_type] = guard(output)
        assert check.keep.shape == (3,)
        assert np.isnan(check.ratio[:, 1]).all() and not np.isnan(check.ratio[:, 3]).any()
        kept = keep_subjects(output, np.array([True, False, True]))
        assert isinstance(kept, DLDMPipelineOutput) and kept.modalities == output.modalities
        assert torch.equal(kept.structure, output.structure[[0, 2]]) and torch.equal(kept.styles, output.styles[[0, 2]])
        if output_type == "np":
            np.testing.assert_array_equal(kept.images, output.images[[0, 2]])
        assert kept.images is None or len(kept.images) == len(kept.masks) == 2
    with pytest.raises(ValueError, match=r"keep has shape \(2,\); it must be \(3,\)"):
        keep_subjects(output, np.ones(2))
    np.testing.assert_array_equal(checks["pt"].ratio, checks["np"].ratio)
    np.testing.assert_array_equal(checks["pil"].ratio, checks["np"].ratio)
    assert np.isnan(checks["latent"].ratio[:, 0]).all() and not np.isnan(checks["np"].ratio[:, 0]).any()


def test_bad_input_is_refused(image_filter: MemorizationFilter, tiny_autoencoder: torch.nn.Module) -> None:
    good = heads(4, 0)
    for arguments, message in (
        ((good * 255,), r"images span 0 to .*floats must be in \[0, 1\]"),
        ((good[0],), r"images has shape \(3, 32, 32\); for T1, T2, WB it must be \(subjects, 3, 32, 32\)"),
        ((good[..., :16],), r"images has shape \(4, 3, 32, 16\)"),
        ((None,), "images is None"),
        ((good[:, :1], None, ["PET"]), "modalities names PET"),
    ):
        with pytest.raises(ValueError, match=message):
            image_filter.check(*arguments)
    for options, message in (
        (dict(train=Slices(good[:, :2])), r"train has images of shape \(4, 2, 32, 32\).*T1, T2, WB"),
        (dict(held_out=Slices(good[:1])), "held_out shows 1 subject"),
        (dict(false_alarm_rate=2), "false_alarm_rate=2"),
        (dict(train=Slices(good, list("abcd")), held_out=Slices(good, list("dxyz"))), "has 1 subjects of train, d"),
        (dict(autoencoder=tiny_autoencoder, modalities=["a", "b", "c"]), "modalities are a, b, c, the autoencoder's"),
    ):
        arguments = dict(train=Slices(good), held_out=Slices(heads(4, 1)), modalities=NAMES) | options
        with pytest.raises(ValueError, match=message):
            MemorizationFilter(**arguments)


@pytest.mark.slow
def test_acceptance_on_simulated_subjects() -> None:
    """1,000 training subjects: all of 100 planted copies are caught, by pixels and by z_struct; at most 5 strangers."""
    from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline
    from dldm_pipeline.data.phantom import simulate_subject

    def simulated(seed: int, count: int) -> np.ndarray:
        return np.stack([to_uint8(simulate_subject((seed, i)).images) for i in range(count)])

    autoencoder = DLDMPipeline.from_pretrained(BUNDLED_CHECKPOINT).autoencoder
    train, modalities = simulated(0, 1000), list(autoencoder.config.modalities)
    guard = MemorizationFilter(Slices(train), Slices(simulated(1, 200)), modalities, autoencoder)
    assert len(guard.held_out_check.keep) == 100 and guard.held_out_check.num_refused <= 5

    rng = np.random.default_rng(0)
    chosen = rng.choice(1000, 100, replace=False)
    copies = np.stack([planted(train[i] / np.float32(255), rng, 8) for i in chosen])
    check = guard.check(copies)
    assert check.num_refused == 100 and (check.index[:, :5] == chosen[:, None]).all()

    # Flipped and shifted only, but compared on z_struct alone, as if every image had been given a new appearance.
    moved = np.stack([shifted(np.flip(train[i], rng.choice([-2, -1])), *rng.integers(-8, 9, 2)) for i in chosen])
    with torch.no_grad():
        pixels = torch.from_numpy(moved / np.float32(255))
        structure = torch.cat([autoencoder.encode(part).structure_dist.mode() for part in pixels.split(10)])
    check = guard.check(None, structure)
    assert check.num_refused == 100 and (check.index[:, 5] == chosen).all()
