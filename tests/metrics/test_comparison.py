"""What is kept and what is computed anew, and the measures on tiny systems; the whole is in tests/examples."""

import json

import numpy as np
import pytest
import torch

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.metrics import comparison
from dldm_pipeline.metrics.comparison import (
    Cache,
    Slices,
    System,
    compare_alignment,
    compare_fidelity,
    compare_memorization,
    digest,
    find_segmenters,
    fingerprint,
    measure_autoencoder,
    pipeline_system,
    sample,
    write_text,
)
from dldm_pipeline.metrics.features import FeatureExtractor

NAMES = ["T1", "T2", "WB"]


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


def items(count: int, first: int = 0) -> list[dict]:
    """Simulated subjects with the items of a `SliceDataset`."""
    subjects = [simulate_subject((5, first + i), 32, NAMES) for i in range(count)]
    return [
        {
            "images": torch.from_numpy(subject.images),
            "present": torch.ones(3, dtype=torch.bool),
            "mask": torch.from_numpy(subject.mask).float(),
            "has_mask": torch.tensor(True),
            "subject": f"subject-{first + i}",
        }
        for i, subject in enumerate(subjects)
    ]


def slices(count: int, first: int = 0) -> Slices:
    read = items(count, first)
    images = np.stack([np.rint(item["images"].numpy() * 255).astype(np.uint8) for item in read])
    return Slices(images, [item["subject"] for item in read], np.ones((count, 3), dtype=bool))


def noise_system(calls: list[int], scale: float = 1.0, key: str = "noise") -> System:
    """Draws the subject's own noise; notes how many were asked for."""

    def draw(generators: list[torch.Generator]):
        calls.append(len(generators))
        images = torch.stack([torch.rand(3, 32, 32, generator=one) for one in generators]).numpy() * scale
        return images, images[:, 0] > 0.9, None

    return System("noise", "nowhere", 0, draw, key)


def test_digest_is_of_content():
    array = np.arange(6, dtype=np.int16)
    assert digest(array, [1, "a"]) == digest(array.copy(), [1, "a"])
    others = (digest(array.reshape(2, 3), [1, "a"]), digest(array.astype(int), [1, "a"]), digest(array, [1, "b"]))
    assert digest(array, [1, "a"]) not in others


def test_fingerprint_changes_with_weights_and_configuration(tiny_pipeline):
    unet, scheduler = tiny_pipeline.unet, tiny_pipeline.scheduler
    before = fingerprint(unet), fingerprint(scheduler)
    assert before == (fingerprint(unet), fingerprint(scheduler))
    with torch.no_grad():
        next(unet.parameters()).view(-1)[0] += 1
    assert fingerprint(unet) != before[0]
    assert fingerprint(type(scheduler).from_config(scheduler.config, beta_end=0.5)) != before[1]


def test_figures_are_kept_by_their_inputs(cache, monkeypatch):
    calls = []

    def compute() -> dict:
        calls.append(1)
        return {"value": float("nan"), "list": [1, 2.5]}

    first = cache.figures("name", [np.zeros(3), {"a": 1}], compute)
    again = cache.figures("name", [np.zeros(3), {"a": 1}], compute)
    assert len(calls) == 1 and json.dumps(first) == json.dumps(again) and np.isnan(again["value"])
    cache.figures("name", [np.ones(3), {"a": 1}], compute)
    cache.figures("name", [np.zeros(3), {"a": 2}], compute)
    monkeypatch.setattr(cache, "code", "other")  # as after a change of the package
    cache.figures("name", [np.zeros(3), {"a": 1}], compute)
    assert len(calls) == 4 and len(list(cache.folder.iterdir())) == 4
    with pytest.raises(ZeroDivisionError):
        cache.figures("fails", [], lambda: 1 / 0)
    assert len(list(cache.folder.iterdir())) == 4


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("old")
    monkeypatch.setattr(comparison.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "report.md", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "old"


def test_subjects_are_drawn_in_blocks_and_kept(cache, monkeypatch):
    monkeypatch.setattr(comparison, "BLOCK", 4)
    calls: list[int] = []
    drawn = sample(noise_system(calls), 10, 7, cache)
    assert calls == [4, 4, 2] and drawn["images"].dtype == np.uint8 and drawn["images"].shape == (10, 3, 32, 32)
    assert drawn["masks"].dtype == bool and drawn["seconds"].shape == (3,) and "structure" not in drawn
    expected = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(12)).numpy()
    np.testing.assert_array_equal(drawn["images"][5], np.rint(expected * 255))  # subject 5 is seed 7 + 5
    more = sample(noise_system(calls), 12, 7, cache)
    assert calls == [4, 4, 2, 4]  # whole blocks serve any number
    np.testing.assert_array_equal(more["images"][:10], drawn["images"])
    sample(noise_system(calls, key="other weights"), 4, 7, cache)
    sample(noise_system(calls), 4, 8, cache)
    assert calls[4:] == [4, 4]
    path = next(cache.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-9])  # damaged: drawn anew
    np.testing.assert_array_equal(sample(noise_system(calls), 12, 7, cache)["images"], more["images"])


@pytest.mark.parametrize(
    ("scale", "message"), [(np.nan, "draws NaN"), (0.001, "draws nothing but black as modality 0")]
)
def test_images_that_show_nothing_are_refused(cache, scale, message):
    with pytest.raises(ValueError, match=f"noise in nowhere {message}"):
        sample(noise_system([], scale), 3, 0, cache)


def test_a_pipeline_as_a_system(tiny_pipeline, cache):
    options = dict(num_inference_steps=2, num_style_inference_steps=1)
    system = pipeline_system(tiny_pipeline, "folder", **options)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    images, masks, structure = system.draw(generators)
    expected = tiny_pipeline(
        2, generator=[torch.Generator().manual_seed(s) for s in (4, 5)], output_type="np", **options
    )
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(structure, expected.structure.numpy())
    assert masks.shape == (2, 32, 32) and system.parameters > 1000
    assert pipeline_system(tiny_pipeline, "moved", **options).key == system.key
    assert pipeline_system(tiny_pipeline, "folder", num_inference_steps=3).key != system.key


def test_segmenters_are_trained_once(cache):
    read = items(6)
    segmenters, dice = find_segmenters(read, NAMES, 3, 0, cache)
    files = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    again, same = find_segmenters(read, NAMES, 3, 0, cache)
    assert same == dice and set(dice) == set(NAMES) and len(files) == 3
    assert {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()} == files
    picture = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(segmenters["WB"](picture), again["WB"](picture))
    assert find_segmenters(read, NAMES, 0, 0, cache) == ({}, {})
    assert find_segmenters([item | {"has_mask": torch.tensor(False)} for item in read], NAMES, 3, 0, cache) == ({}, {})


def test_too_few_subjects_for_the_probes_leave_the_rest(cache, tiny_autoencoder):
    result = measure_autoencoder(tiny_autoencoder, items(4), {}, 4, 0, cache)
    assert result["reconstruction"]["num_subjects"] == 4 and set(result["alignment"]) == {"validation", "rebuilt"}
    assert "at least 8 subjects" in result["disentanglement"]["left_out"]


def test_measures_tell_real_subjects_from_noise(cache, tiny_autoencoder):
    """Further real subjects in the place of a system must beat noise in fidelity and alignment; copies must be refused."""
    real, train = slices(14), slices(14, 100)
    further = slices(8, 200).images
    samples = {
        "further": {"images": further, "masks": np.ones((8, 32, 32), dtype=bool)},
        "noise": sample(noise_system([]), 8, 0, cache),
        "copies": {"images": np.flip(train.images[:8], -1).copy()},
    }
    extractor = FeatureExtractor(
        "tiny", "blocks", 32, 16, lambda x: torch.nn.functional.avg_pool2d(x[:, :1] / 255, 8).flatten(1), "0" * 64
    )
    fidelity = compare_fidelity(samples, real, train, NAMES, extractor, None, 0, cache)
    distance = {name: one["scores"]["frechet_distance"]["mean"]["value"] for name, one in fidelity.items()}
    assert distance["further"] < 0.1 * distance["noise"]
    assert fidelity["noise"]["floor"] == fidelity["further"]["floor"]
    assert fidelity["noise"]["num_images"]["T1"] == {"real": 14, "generated": 8, "floor": 8}

    halves = compare_fidelity({"noise": samples["noise"]}, real, None, NAMES, extractor, None, 0, cache)["noise"]
    assert halves["num_images"]["T1"] == {"real": 7, "generated": 7, "floor": 7}

    reference = compare_alignment({"real": {"images": real.images}}, NAMES, None, {}, 14, 0, cache)["real"]
    alignment = compare_alignment(samples, NAMES, reference, {}, 6, 0, cache)
    assert alignment["noise"]["num_slices"] == 6
    for pair in reference["edge_correlation"]:
        own, chance = (alignment[name]["edge_correlation"][pair] for name in ("further", "noise"))
        assert own > 0.5 > chance
    assert alignment["further"]["num_empty_masks"] == 0

    found = compare_memorization(samples, train, real, NAMES, tiny_autoencoder, 0, cache)
    assert found["copies"]["refused"] == 8 and found["further"]["refused"] < 8
    assert [pair["train_slice"] for pair in found["copies"]["closest"]] != [] and found["copies"]["closest"][0]["flip"][
        1
    ]
