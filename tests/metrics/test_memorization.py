"""Copies are caught under flips, shifts and new contrasts, and strangers are not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dldm_pipeline.metrics import memorization
from dldm_pipeline.metrics.memorization import (
    CopySearch,
    MemorizationFilter,
    StructureRenderer,
    as_bytes,
    closest_pairs_sheet,
    evaluate_memorization,
    keep_subjects,
    orientation_field,
    read_slices,
)
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

NAMES = ["T1", "T2", "WB"]


def heads(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Random textures in one outline, in three contrasts: (count, 3, size, size) in [0, 1]."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=(count, size, size)), (0, size / 20, size / 20))
    texture = np.clip(0.5 + 0.2 * texture / texture.std(), 0.05, 1)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    texture *= np.hypot(y, 1.2 * x) < 0.4 * size
    inside = texture > 0
    images = np.stack([texture, inside * (1.05 - texture), inside * np.sqrt(texture)], axis=1)
    return np.clip(images, 0, 1).astype(np.float32)


def shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved, with black coming in."""
    height, width = images.shape[-2:]
    out = np.zeros_like(images)
    out[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = images[
        ..., max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return out


def planted(images: np.ndarray, rng: np.random.Generator, reach: int) -> np.ndarray:
    """A copy as a careless generator could make it: flipped, shifted by up to `reach` pixels and re-contrasted."""
    flips = tuple(axis for axis in (-2, -1) if rng.random() < 0.5)
    copy = shifted(np.flip(images, flips), *rng.integers(-reach, reach + 1, size=2))
    kind = rng.integers(3)
    if kind == 0:
        return copy ** np.exp(rng.uniform(-0.9, 0.9))
    if kind == 1:
        return 1 - copy
    steps = np.concatenate([[0], np.cumsum(rng.dirichlet(np.full(6, 2.0)) + 0.03)])
    return np.interp(copy, np.linspace(0, 1, 7), steps / steps[-1]).astype(np.float32)


@pytest.fixture(scope="module")
def image_filter() -> MemorizationFilter:
    """Sixty training and forty held-out subjects, images alone."""
    return MemorizationFilter(heads(60, 0), heads(40, 1), NAMES, progress=False)


def test_orientation_forgets_contrast_but_not_anatomy() -> None:
    image = torch.from_numpy(heads(2, 0, 64)[:, 0])
    field = orientation_field(image)

    def similarity(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first * second.conj()).sum().real / (first.norm() * second.norm()))

    for remapped in (0.2 + 0.5 * image, 1 - image, image**0.5, image**2):
        assert similarity(field, orientation_field(remapped)) > 0.93
    assert similarity(field[0], field[1]) < 0.6
    assert field.abs().max() <= 1
    assert not orientation_field(torch.full((1, 8, 8), 0.7)).abs().any()


def test_a_flipped_image_has_the_conjugate_field() -> None:
    image = torch.from_numpy(heads(1, 0)[:, 0])
    field = orientation_field(image)
    torch.testing.assert_close(orientation_field(image.flip(-1)), field.flip(-1).conj().resolve_conj())
    torch.testing.assert_close(orientation_field(image.flip(-2, -1)), field.flip(-2, -1))


@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_search_tells_which_flip_and_shift_lays_the_copy_over_its_original(
    flip: tuple[bool, bool], size: tuple[int, int]
) -> None:
    images = np.pad(heads(10, 0)[:, :1], ((0, 0), (0, 0), (0, size[0] - 32), (0, size[1] - 32)))
    axes = tuple(axis for axis, flipped in zip((-2, -1), flip, strict=True) if flipped)
    query = np.flip(np.roll(images[[7]], (-2, 1), axis=(-2, -1)), axes)
    found = CopySearch(images, max_shift=10).search(query, progress=False)
    assert found.index[0, 0] == 7 and found.similarity[0, 0] > 0.99
    assert found.flip[0, 0].tolist() == list(flip) and found.shift[0, 0].tolist() == [2, -1]


def test_search_agrees_with_a_plain_one() -> None:
    images, queries = heads(6, 0)[:, :1], heads(3, 1)[:, :1]
    search = CopySearch(images, max_shift=8, candidates=6)
    found = search.search(queries, batch_size=2, progress=False)
    fields = orientation_field(torch.from_numpy(search.images[:, 0]))
    for q, image in enumerate(as_bytes(queries, "queries")[:, 0]):
        best = -1.0
        for axes in memorization.FLIPS:
            field = orientation_field(torch.from_numpy(np.flip(image, axes).copy())[None])[0]
            for down in range(-2, 3):
                for right in range(-2, 3):
                    moved = field.roll((down, right), (0, 1))
                    scores = (fields * moved.conj()).sum((1, 2)).real / (fields.flatten(1).norm(dim=1) * field.norm())
                    best = max(best, float(scores.max()))
        # The flip is settled by the coarse search, so that the plain one may find a little more.
        assert best - 0.05 <= found.similarity[q, 0] <= best + 1e-4


def test_own_subject_and_missing_images_are_not_compared() -> None:
    images, names = heads(6, 0), ["a", "a", "b", "b", "c", "c"]
    present = np.ones((6, 3), dtype=bool)
    present[2:, 2] = False
    search = CopySearch(images, names, present)
    found = search.search(images, names, progress=False)
    assert all(names[found.index[q, 0]] != names[q] for q in range(6))
    assert (found.index[:2, 2] == -1).all() and np.isnan(found.similarity[:2, 2]).all()  # "a" alone has the third
    assert set(found.index[2:, 2]) <= {0, 1}
    itself = search.search(images, present=present, progress=False)
    assert (itself.index[:, 0] == np.arange(6)).all() and np.isnan(itself.similarity[2:, 2]).all()


def test_planted_copies_are_refused_and_held_out_subjects_are_kept(image_filter: MemorizationFilter) -> None:
    train, rng = heads(60, 0), np.random.default_rng(2)
    copies = np.stack([planted(image, rng, 2) for image in train[:20]])
    check = image_filter.check(copies)
    assert check.num_refused == 20 and (check.nearest == np.arange(20)[:, None]).all()
    assert image_filter.check(heads(40, 3)).num_refused <= 2
    assert image_filter.held_out_check.num_refused <= 1 and len(image_filter.held_out_check.keep) == 20


def test_a_single_copied_modality_is_enough(image_filter: MemorizationFilter) -> None:
    samples = heads(6, 4)
    samples[2, 1] = heads(60, 0)[33, 1]
    check = image_filter.check(samples)
    assert not check.keep[2] and check.channel_scores[2].argmax() == 1 and check.nearest[2, 1] == 33
    one = image_filter.check(samples[:, [1]], modalities=["T2"])
    assert not one.keep[2] and np.isnan(one.ratio[:, [0, 2]]).all()


def test_counts_add_up_and_batches_do_not_matter(image_filter: MemorizationFilter) -> None:
    samples = np.concatenate([heads(60, 0)[:2], heads(3, 5)])
    image_filter.num_checked = image_filter.num_refused = 0
    whole = image_filter.check(samples)
    single = [image_filter.check(sample[None]) for sample in samples]
    np.testing.assert_allclose(np.concatenate([one.score for one in single]), whole.score, rtol=1e-3)
    assert image_filter.num_checked == 10 and image_filter.num_refused == 2 * whole.num_refused == 4


def test_threshold_lets_the_promised_share_of_calibrating_subjects_pass() -> None:
    strict, loose = (
        MemorizationFilter(heads(20, 0), heads(40, 1), NAMES, false_alarm_rate=rate, progress=False)
        for rate in (0.02, 0.5)
    )
    assert strict.threshold > loose.threshold and strict.num_calibrating == 20
    assert 0 < loose.held_out_check.num_refused < 20


def test_authentic_compares_with_the_training_subjects_own_neighbour(image_filter: MemorizationFilter) -> None:
    check = image_filter.check(np.concatenate([heads(60, 0)[:3], heads(5, 6)]))
    authentic = image_filter.authentic(check, progress=False)
    assert (authentic[:3] == 0).all() and authentic[3:].mean() > 0.2
    known = dict(image_filter._own_distance)
    np.testing.assert_array_equal(image_filter.authentic(check, progress=False), authentic)
    assert image_filter._own_distance == known
    alone = MemorizationFilter(heads(1, 0), heads(4, 1), NAMES, progress=False)
    assert np.isnan(alone.authentic(alone.held_out_check, progress=False)).all()


def test_evaluation_reports_copies_beside_the_held_out_row(image_filter: MemorizationFilter, tmp_path: Path) -> None:
    samples = np.concatenate([heads(4, 7), shifted(heads(60, 0)[[11]], 1, -2)])
    result = evaluate_memorization(image_filter, samples, num_pairs=2, progress=False)
    assert result["refused"] == 1 and result["refused_share"] == 0.2
    assert result["refused_by"] == {"T1": 1, "T2": 1, "WB": 1}
    closest = result["closest"][0]
    assert (closest["sample"], closest["train_slice"], closest["shift"]) == (4, 11, [-1, 2])
    assert closest["flip"] == [False, False] and closest["ratio"] < 0.2
    assert result["samples"]["ratio_min"]["T1"] < 0.2 < result["held_out"]["ratio_min"]["T1"]
    assert result["false_alarm_rate_promised"] == pytest.approx(1 - 0.05 ** (1 / 20))
    closest_pairs_sheet(result["closest"], samples, image_filter.train.images, NAMES, tmp_path / "pairs.png")
    assert Image.open(tmp_path / "pairs.png").height > 4 * 128  # two pairs, two rows each


def test_structure_is_compared_under_one_appearance(tiny_autoencoder: torch.nn.Module) -> None:
    train, held_out = heads(30, 0), heads(20, 1)
    both = MemorizationFilter(train, held_out, NAMES, tiny_autoencoder, progress=False)
    assert both.channels == [*NAMES, "z_struct"]
    with torch.no_grad():
        structure = tiny_autoencoder.encode(torch.from_numpy(train[:4])).structure_dist.mode()
    check = both.check(heads(4, 2), structure)  # a copied anatomy under an appearance that hides it
    assert (check.nearest[:, 3] == np.arange(4)).all() and (check.similarity[:, 3] > 0.95).all()
    assert check.num_refused == 4
    alone = both.check(None, structure)
    np.testing.assert_allclose(alone.ratio[:, 3], check.ratio[:, 3], rtol=1e-3)
    assert np.isnan(alone.ratio[:, :3]).all()
    encoded = both.check(train[:4])
    np.testing.assert_allclose(encoded.similarity[:, 3], check.similarity[:, 3], atol=0.02)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_filter_takes_what_a_pipeline_returns(tiny_pipeline, output_type: str) -> None:
    guard = MemorizationFilter(heads(10, 0), heads(8, 1), NAMES, tiny_pipeline.autoencoder, progress=False)
    options = dict(num_subjects=3, num_inference_steps=2, num_style_inference_steps=1, modalities=["WB", "T1"])
    output = tiny_pipeline(output_type=output_type, generator=torch.Generator().manual_seed(0), **options)
    check = guard(output)
    assert check.keep.shape == (3,) and guard.num_checked == 3 and guard.num_refused == check.num_refused
    assert np.isnan(check.ratio[:, 1]).all() and not np.isnan(check.ratio[:, 3]).any()
    assert np.isnan(check.ratio[:, 0]).all() == (output_type == "latent")
    kept = keep_subjects(output, np.array([True, False, True]))
    assert isinstance(kept, DLDMPipelineOutput) and len(kept.structure) == len(kept.styles) == 2
    assert kept.images is None or len(kept.images) == len(kept.masks) == 2
    with pytest.raises(ValueError, match=r"keep has shape \(2,\); it must be \(3,\)"):
        keep_subjects(output, np.ones(2))


def test_filter_is_built_from_datasets() -> None:
    class Slices(list):
        modalities = NAMES

    def items(name: str, images: np.ndarray) -> Slices:
        here = torch.tensor([True, True, False])
        return Slices(
            {"images": torch.from_numpy(image), "present": here, "subject": f"{name}{i // 2}"}
            for i, image in enumerate(images)
        )

    train, held_out = items("t", heads(12, 0)), items("h", heads(8, 1))
    images, subjects, present = read_slices(train, max_items=3, progress=False)
    assert images.dtype == np.uint8 and subjects == ["t0", "t3", "t5"] and present[:, 2].sum() == 0
    guard = MemorizationFilter.from_datasets(train, held_out, progress=False, max_shift=4)
    assert guard.train.max_shift == 1 and np.isnan(guard.held_out_check.ratio[:, 2]).all()
    assert len(guard.held_out_check.keep) == 4  # split by subject, two slices each
    with pytest.raises(ValueError, match="dataset has no slices"):
        read_slices([], progress=False)
    with pytest.raises(ValueError, match="max_items=0"):
        read_slices(train, max_items=0, progress=False)


def test_bad_input_is_refused(image_filter: MemorizationFilter, tiny_autoencoder: torch.nn.Module, tmp_path) -> None:
    good = heads(4, 0)
    nan = good.copy()
    nan[0, 0, 0, 0] = np.nan
    for bad, message in (
        (good * 255, r"has values from 0.0 to .*; scale them to \[0, 1\]"),
        (nan, "has values from nan"),
        (good[0], r"has shape \(3, 32, 32\); it must be \(slices, channels, height, width\)"),
        ((good * 255).astype(np.int32), "has dtype int32"),
        (good[:, :2], r"has shape \(4, 2, 32, 32\); for T1, T2, WB"),
        (good[..., :16], r"has shape \(4, 3, 32, 16\)"),
    ):
        with pytest.raises(ValueError, match=f"images {message}"):
            image_filter.check(bad)
    with pytest.raises(ValueError, match="images is None"):
        image_filter.check(None)
    with pytest.raises(ValueError, match="modalities names 'PET'"):
        image_filter.check(good[:, :1], modalities=["PET"])
    with pytest.raises(ValueError, match="structure has 3 subjects and images 4"):
        image_filter.check(good, torch.zeros(3, 4, 4, 4))
    for options, message in (
        (dict(train_images=good[:0]), "images has no slices"),
        (dict(train_images=good[:, :2]), "train_images has 2 modalities, but 3 are named"),
        (dict(held_out_images=good[:1]), "held_out_images shows 1 subjects"),
        (dict(false_alarm_rate=2), "false_alarm_rate=2"),
        (dict(max_shift=-1), "max_shift=-1"),
        (dict(train_subjects=list("abc")), "subjects has 3 names for 4 slices"),
        (dict(train_subjects=list("abcd"), held_out_subjects=list("dxyz")), "1 subjects of train_subjects, 'd'"),
        (dict(train_present=np.ones((4, 2))), r"train_present has shape \(4, 2\)"),
        (dict(autoencoder=tiny_autoencoder, modalities=["a", "b", "c"]), "modalities are a, b, c, the autoencoder's"),
    ):
        arguments = dict(train_images=good, held_out_images=heads(4, 1), modalities=NAMES, progress=False) | options
        with pytest.raises(ValueError, match=message):
            MemorizationFilter(**arguments)
    with pytest.raises(ValueError, match="candidates=0"):
        CopySearch(good, candidates=0)
    with pytest.raises(ValueError, match=r"images has shape \(1, 1, 32, 32\)"):
        CopySearch(good).search(good[:1, :1])
    with pytest.raises(ValueError, match="modality='PET' is unknown"):
        StructureRenderer(tiny_autoencoder, good, modality="PET")
    with pytest.raises(ValueError, match="modality='T1': no slice has it"):
        StructureRenderer(tiny_autoencoder, good, np.array([[False, True, True]] * 4))
    with pytest.raises(ValueError, match="no pair to draw"):
        closest_pairs_sheet([], good[:1], good, NAMES, tmp_path / "none.png")


@pytest.mark.slow
def test_acceptance_on_simulated_subjects() -> None:
    """1,000 training subjects: all of 100 planted copies are caught, by pixels and by z_struct; at most 5 strangers."""
    from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline
    from dldm_pipeline.data.phantom import simulate_subject

    def simulated(seed: int, count: int) -> np.ndarray:
        return np.stack([as_bytes(simulate_subject((seed, i)).images[None], "images")[0] for i in range(count)])

    autoencoder = DLDMPipeline.from_pretrained(BUNDLED_CHECKPOINT).autoencoder
    train, held_out = simulated(0, 1000), simulated(1, 200)
    guard = MemorizationFilter(train, held_out, list(autoencoder.config.modalities), autoencoder, progress=False)
    assert len(guard.held_out_check.keep) == 100 and guard.held_out_check.num_refused <= 5

    rng = np.random.default_rng(0)
    chosen = rng.choice(1000, 100, replace=False)
    copies = np.stack([planted(train[i] / np.float32(255), rng, 8) for i in chosen])
    check = guard.check(copies)
    assert check.num_refused == 100 and (check.nearest[:, :5] == chosen[:, None]).all()

    # Flipped and shifted only, but compared on z_struct alone, as if every image had been given a new appearance.
    moved = np.stack([shifted(np.flip(train[i], rng.choice([-2, -1])), *rng.integers(-8, 9, 2)) for i in chosen])
    with torch.no_grad():
        pixels = torch.from_numpy(moved / np.float32(255))
        structure = torch.cat([autoencoder.encode(part).structure_dist.mode() for part in pixels.split(10)])
    check = guard.check(None, structure)
    assert check.num_refused == 100 and (check.nearest[:, 5] == chosen).all()
