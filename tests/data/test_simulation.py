"""The simulator: anatomy apart from acquisition, slices that are cuts of volumes, and images that a scanner could give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dldm_pipeline.data.acquisition import sample_acquisition
from dldm_pipeline.data.mr_signal import TISSUES
from dldm_pipeline.data.simulation import SEQUENCES, simulate_subject, simulate_volume


def test_an_acquisition_leaves_the_anatomy_alone():
    one, other = (simulate_subject(3, acquisition_seed=a, size=64) for a in (1, 2))
    assert one.height == other.height
    np.testing.assert_array_equal(one.labels, other.labels)
    for tissue in TISSUES:
        np.testing.assert_array_equal(one.tissues[tissue], other.tissues[tissue])
    assert np.all(np.abs(one.images - other.images).max((1, 2)) > 0.02)


def test_an_anatomy_leaves_the_acquisition_alone():
    # Means of pure white and grey matter, (acquisitions, anatomies, sequences): noise, texture and coil stay in.
    for height in (0.5, 0.8):
        subjects = [[simulate_subject(seed, a, height=height) for seed in range(3)] for a in (5, 6, 7, 8)]
        for row in subjects:
            for key in sample_acquisition(row[0].seeds[1]).factors:
                assert len({subject.factors[key] for subject in row}) == 1
        for tissue in ("white", "grey"):
            means = np.array(
                [[[image[s.tissues[tissue] > 0.95].mean() for image in s.images] for s in row] for row in subjects]
            )
            between_anatomies = means.std(1, ddof=1).mean(0)
            between_acquisitions = means.mean(1).std(0, ddof=1)
            # Standard errors of texture (0.04, about 30 patches a slice) and coil (0.03, about 4 features a slice).
            assert np.ptp(means, axis=1).max() < 0.05
            assert between_anatomies.max() < 0.015
            assert np.all(between_anatomies < between_acquisitions / 4)


def test_a_coil_does_not_move_the_mean_of_a_brain():
    subject = [simulate_subject(1, acquisition_seed=2, height=h, size=64, tumour=False) for h in (0.4, 0.6, 0.8)]
    pure = sample_acquisition(2).tissue_means("T1")["white"]
    measured = np.mean([one.images[0][one.tissues["white"] > 0.99].mean() for one in subject])
    assert measured == pytest.approx(pure, abs=0.05)


@pytest.mark.parametrize("tumour", [True, False])
def test_a_slice_is_a_cut_of_the_volume(tumour):
    volume = simulate_volume(8, acquisition_seed=9, spacing=12.0, size=64, tumour=tumour)
    assert volume.images.shape == (5, len(volume.heights), 64, 64)
    for index in (0, len(volume.heights) // 2, len(volume.heights) - 1):
        alone = simulate_subject(8, 9, size=64, height=volume.heights[index], tumour=tumour)
        np.testing.assert_array_equal(volume.images[:, index], alone.images)
        np.testing.assert_array_equal(volume.labels[index], alone.labels)
    assert volume.spacing[1] == alone.pixel_spacing[0]


def test_spacing_changes_which_slices_are_cut_not_where_the_brain_is():
    fine, coarse = (simulate_volume(4, spacing=spacing, size=32, modalities=("T1",)) for spacing in (5.0, 15.0))
    assert len(fine.heights) == pytest.approx(3 * len(coarse.heights), abs=3)
    assert np.all(np.diff(fine.heights) > 0) and 0 < fine.heights[0] < fine.heights[-1] < 1


def test_without_tumour_the_rest_stays():
    sick, healthy = (simulate_subject(11, height=0.6, tumour=tumour) for tumour in (True, False))
    assert not healthy.labels.any() and not healthy.mask.any()
    assert healthy.factors["lesions"] == 0
    assert not any(healthy.tissues[name].any() for name in ("oedema", "enhancing", "necrosis"))
    assert (sick.images[0] > 0).mean() == pytest.approx((healthy.images[0] > 0).mean(), abs=0.02)


def test_a_slice_drawn_without_height_shows_the_tumour():
    subjects = [simulate_subject(seed, size=64) for seed in range(25)]
    assert all(subject.mask.any() for subject in subjects)
    assert {int(v) for subject in subjects for v in np.unique(subject.labels)} == {0, 1, 2, 3}
    assert len({subject.factors["large_lesion"] for subject in subjects}) == 2


def test_lesions_hang_together_through_the_slices():
    for seed in range(4):
        volume = simulate_volume(seed, spacing=2.0, size=96, modalities=("T1",))
        # Oedema keeps to white matter, so some of it shows beyond a sulcus or ventricle.
        for region, part in ((volume.labels > 0, 0.85), (volume.labels % 2 == 1, 0.97)):
            bodies, _ = ndimage.label(region, np.ones((3, 3, 3)))
            sizes = np.sort(np.bincount(bodies.ravel())[1:])[::-1]
            assert sizes[: volume.factors["lesions"]].sum() > part * sizes.sum()


def test_an_image_does_not_depend_on_the_others():
    everything, one = simulate_subject(2, size=48), simulate_subject(2, size=48, modalities=("FLAIR",))
    np.testing.assert_array_equal(everything.images[2], one.images[0])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    acquisition_seed=st.integers(0, 2**32),
    size=st.integers(32, 256),
    height=st.floats(0, 1),
    tumour=st.booleans(),
)
def test_any_slice_is_an_image(seed, acquisition_seed, size, height, tumour):
    check(simulate_subject(seed, acquisition_seed, size, height, tumour))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(32, 64), spacing=st.floats(8, 20))
def test_any_volume_is_a_stack_of_images(seed, size, spacing):
    volume = simulate_volume(seed, spacing=spacing, size=size)
    assert np.isfinite(volume.images).all() and volume.images.min() >= 0 and volume.images.max() <= 1
    brain = (volume.images > 0).any(0)
    assert not volume.labels[~ndimage.binary_dilation(brain, np.ones((1, 3, 3)))].any()


def check(subject):
    size = subject.labels.shape[0]
    assert subject.images.shape == (len(SEQUENCES), size, size) and subject.images.dtype == np.float32
    assert np.isfinite(subject.images).all() and subject.images.min() >= 0 and subject.images.max() <= 1
    total = sum(subject.tissues.values())
    brain = total >= 0.5
    assert np.all(total[~brain] == 0) and total.max() < 1 + 1e-4
    assert np.all(subject.images[:, ~brain] == 0)
    assert not subject.labels[~brain].any() and subject.labels.max() <= 3
    assert all(f.min() >= -1e-5 and f.dtype == np.float32 for f in subject.tissues.values())
    assert all(np.isfinite(value) for value in subject.factors.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 20}, "size is 20"),
        ({"height": 1.2}, "height is 1.2"),
        ({"height": "0.5"}, "height is '0.5'"),
        ({"seed": -1}, "seed is -1; give a whole number"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"acquisition_seed": ()}, r"acquisition_seed is \(\)"),
        ({"modalities": "T1"}, "modalities"),
        ({"height": float("nan")}, "height is nan"),
        ({"modalities": ("T1CE",)}, "'T1CE' in modalities cannot be simulated"),
    ],
)
def test_what_cannot_be_simulated_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_subject(**{"seed": 0} | arguments)


def test_every_seed_is_another_subject():
    seeds = [0, 1, (0,), (0, 0), (0, 1), (1, 0), 2**32, (0, 2**32), 2**200]
    subjects = [simulate_subject(seed, size=32, height=0.5, modalities=("T1",)) for seed in seeds]
    for key in ("relative_width", "white_T1_ms"):
        assert len({subject.factors[key] for subject in subjects}) == len(seeds)
    same = [
        simulate_subject(seed, [3, 4], 32, 0.5, modalities=("T1",)) for seed in ((0, 1), [0, 1], np.arange(2).tolist())
    ]
    assert all(np.array_equal(one.images, same[0].images) and one.seeds == ((0, 1), (3, 4)) for one in same)


def test_a_spacing_that_is_no_slice_distance_is_refused():
    with pytest.raises(ValueError, match="spacing is 0"):
        simulate_volume(0, spacing=0)
