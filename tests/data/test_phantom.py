"""The simulated subjects: what a reader of MRI expects of each contrast, and what the rest of the package relies on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dldm_pipeline.data.phantom import SEQUENCES, TISSUES, phantom_dataset, phantom_rows, simulate_subject
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.modalities import DEFAULT_MODALITIES


@pytest.fixture(scope="module")
def subjects():
    return [simulate_subject(seed) for seed in range(8)]


@pytest.fixture(scope="module")
def tables(subjects):
    """For each subject: modality -> tissue -> mean over the pixels that are nearly pure, or half pure where none is."""
    tables = []
    for subject in subjects:
        pure = {}
        for tissue, fraction in subject.tissues.items():
            pixels = fraction > (0.9 if (fraction > 0.9).sum() >= 8 else 0.6)
            if pixels.sum() >= 8:
                pure[tissue] = pixels
        images = zip(subject.modalities, subject.images, strict=True)
        tables.append({name: {tissue: image[pure[tissue]].mean() for tissue in pure} for name, image in images})
    return tables


def test_shapes_ranges_and_background(subjects):
    for subject in subjects:
        assert subject.modalities == DEFAULT_MODALITIES
        assert subject.images.shape == (5, 128, 128) and subject.images.dtype == np.float32
        assert subject.images.min() == 0 and subject.images.max() <= 1
        assert subject.mask.shape == (128, 128) and subject.mask.dtype == np.uint8
        assert set(np.unique(subject.mask)) == {0, 1}
        assert set(subject.tissues) == set(TISSUES)
        total = sum(subject.tissues.values())
        assert all(fraction.dtype == np.float32 and fraction.min() >= -1e-5 for fraction in subject.tissues.values())
        assert total.max() < 1 + 1e-4
        assert np.all(subject.images[:, total == 0] == 0)
        assert np.all(total[(subject.images > 0).any(0)] >= 0.5)
        assert 0.5 < subject.pixel_spacing[0] < 2.5 and subject.pixel_spacing[0] == subject.pixel_spacing[1]
        assert all(np.isfinite(value) for value in subject.factors.values())


def test_the_brain_fills_the_picture_and_stays_whole(subjects):
    for subject in subjects:
        brain = sum(subject.tissues.values()) > 0.5
        rows, columns = np.flatnonzero(brain.any(1)), np.flatnonzero(brain.any(0))
        assert 0.82 <= max(np.ptp(rows), np.ptp(columns)) / 128 <= 0.93
        assert min(rows[0], columns[0], 127 - rows[-1], 127 - columns[-1]) >= 3
        assert 0.25 < brain.mean() < 0.65


@pytest.mark.parametrize(
    ("modality", "brighter", "darker", "margin"),
    [
        ("T1", "white", "grey", 0.10),
        ("T1", "grey", "csf", 0.20),
        ("T1", "white", "oedema", 0.04),
        ("T2", "csf", "grey", 0.30),
        ("T2", "grey", "white", 0.08),
        ("T2", "oedema", "white", 0.20),
        ("FLAIR", "grey", "csf", 0.20),
        ("FLAIR", "white", "csf", 0.20),
        ("FLAIR", "oedema", "grey", 0.12),
        ("WB", "vessel", "white", 0.25),
        ("WB", "enhancing", "white", 0.25),
        ("WB", "enhancing", "necrosis", 0.15),
        ("WB", "white", "csf", 0.15),
        ("BB", "enhancing", "white", 0.25),
        ("BB", "enhancing", "necrosis", 0.15),
        ("BB", "white", "vessel", 0.20),
        ("BB", "white", "csf", 0.15),
    ],
)
def test_contrast_reads_as_mri(tables, modality, brighter, darker, margin):
    means = [table[modality] for table in tables]
    gaps = [mean[brighter] - mean[darker] for mean in means if brighter in mean and darker in mean]
    assert len(gaps) >= 3 and min(gaps) > margin


def test_tumour_enhances_in_wb_and_bb_only(subjects):
    for subject in subjects:
        brain = sum(subject.tissues.values()) > 0.5
        tumour = subject.mask == 1
        images = dict(zip(subject.modalities, subject.images, strict=True))
        enhanced = (images["WB"] + images["BB"]) / 2
        assert enhanced[tumour].mean() > 1.4 * enhanced[brain & ~tumour].mean()
        rim = subject.tissues["enhancing"] > 0.8
        if rim.any():
            assert images["T1"][rim].mean() < np.percentile(images["T1"][brain], 75)
            assert images["BB"][rim].mean() > np.percentile(images["BB"][brain], 95)


def test_lesions_are_as_promised(subjects):
    for subject in subjects:
        core = subject.tissues["enhancing"] + subject.tissues["necrosis"]  # without oedema
        assert np.array_equal(subject.mask == 1, (core >= 0.5 * sum(subject.tissues.values())) & (core > 0))
        count = subject.factors["lesions"]
        radii = [subject.factors[f"lesion_{i + 1}_radius_mm"] for i in range(count)]
        assert 1 <= count <= 5
        assert max(radii) >= 6 and max(radii) <= 14


def test_same_seed_same_subject(subjects):
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    again = simulate_subject(5)
    assert np.random.random() == expected, "the global generator is not touched"
    assert np.array_equal(again.images, subjects[5].images) and np.array_equal(again.mask, subjects[5].mask)
    assert again.factors == subjects[5].factors
    assert not np.array_equal(again.images, subjects[6].images)


@settings(max_examples=4, deadline=None)
@given(names=st.lists(st.sampled_from(DEFAULT_MODALITIES), min_size=1, max_size=5, unique=True))
def test_an_image_does_not_depend_on_the_others(subjects, names):
    every, some = subjects[3], simulate_subject(3, modalities=names)
    assert some.modalities == tuple(names)
    for name, image in zip(names, some.images, strict=True):
        assert np.array_equal(image, every.images[every.modalities.index(name)])
    assert np.array_equal(some.mask, every.mask)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_seed_has_a_tumour_inside_the_brain(seed):
    subject = simulate_subject(seed, 64, ["T1"])
    assert subject.mask.any()
    assert np.isfinite(subject.images).all()
    assert (sum(subject.tissues.values())[subject.mask == 1] >= 0.5).all()


@pytest.mark.parametrize("size", [64, 256])
def test_same_anatomy_at_every_size(subjects, size):
    reference, other = subjects[4], simulate_subject(4, size)
    assert other.images.shape == (5, size, size)
    small, large = sorted((reference, other), key=lambda subject: subject.images.shape[-1])
    n = small.images.shape[-1]
    block = large.images.shape[-1] // n
    for tissue in ("white", "csf", "enhancing"):
        mean = large.tissues[tissue].reshape(n, block, n, block).mean((1, 3))
        assert np.abs(mean - small.tissues[tissue]).mean() < 0.01
    assert reference.pixel_spacing[0] * 128 == pytest.approx(other.pixel_spacing[0] * size)


def test_subjects_differ_in_anatomy(subjects):
    """No two brains alike: white matter of any two overlaps clearly less than that of one with itself."""
    for a, b in itertools.combinations(subjects, 2):
        white_a, white_b = a.tissues["white"] > 0.5, b.tissues["white"] > 0.5
        assert 2 * (white_a & white_b).sum() / (white_a.sum() + white_b.sum()) < 0.9


@pytest.mark.parametrize("size", [0, -128, 16, 4096, 128.0, "128", True, None])
def test_bad_size(size):
    with pytest.raises(ValueError, match="size is"):
        simulate_subject(0, size)


@pytest.mark.parametrize(
    ("names", "message"), [(("T1", "PET"), "'PET'.*choose from"), ((), "empty"), (("T1", "T1"), "twice")]
)
def test_bad_modalities(names, message):
    with pytest.raises(ValueError, match=message):
        simulate_subject(0, 64, names)
    with pytest.raises(ValueError, match=message):
        next(phantom_rows(1, 64, modalities=names))
    assert set(DEFAULT_MODALITIES) == set(SEQUENCES), "every default can be simulated"


def test_rows():
    rows = list(phantom_rows(2, size=64, seed=7, modalities=("T2", "BB")))
    assert [row["subject"] for row in rows] == ["phantom-000000", "phantom-000001"]
    subject = simulate_subject((7, 1), 64, ("T2", "BB"))
    assert np.array_equal(rows[1]["BB"], subject.images[1]) and np.array_equal(rows[1]["mask"], subject.mask)
    assert set(rows[0]) == {"subject", "slice_index", "T2", "BB", "mask", "source", "pixel_spacing"}
    assert rows[0]["slice_index"] == 0 and rows[0]["source"] == "phantom" and len(rows[0]["pixel_spacing"]) == 2
    with pytest.raises(ValueError, match="num_subjects is 0"):
        next(phantom_rows(0))


def test_workers_give_the_same_rows_in_order_and_can_be_left_early():
    rows = phantom_rows(1000, 32, seed=7, modalities=["T1"], num_workers=2)
    first = list(itertools.islice(rows, 18))  # more than the workers are given at once
    rows.close()
    assert [row["subject"] for row in first] == [f"phantom-{i:06d}" for i in range(18)]
    for i in (0, 17):
        assert np.array_equal(first[i]["T1"], simulate_subject((7, i), 32, ["T1"]).images[0])


def test_data_set_is_simulated_once(tmp_path):
    options = {"root": tmp_path / "new", "num_workers": 1, "show_progress": False}
    folder = phantom_dataset(2, 32, **options)
    assert folder == tmp_path / "new" / "phantom-32-2" and SliceDataset(folder).modalities == DEFAULT_MODALITIES
    (folder / "a mark").touch()
    assert phantom_dataset(2, 32, **options) == folder and (folder / "a mark").exists()
    other = phantom_dataset(2, 32, ["T2", "T1"], seed=3, **options)
    assert other == tmp_path / "new" / "phantom-32-2-T2-T1-seed3" and SliceDataset(other).modalities == ("T2", "T1")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [folder.name, other.name]
