"""What is kept and what is computed again, and the measures on tiny systems; the whole is in tests/examples."""

import numpy as np
import pytest
import torch

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.metrics import comparison
from dldm_pipeline.metrics.cache import Cache
from dldm_pipeline.metrics.comparison import Comparison, System, find_segmenters, pipeline_system, sample
from dldm_pipeline.metrics.features import FeatureExtractor
from dldm_pipeline.metrics.images import Slices, read_slices

NAMES = ["T1", "T2", "WB"]  # of `tiny_autoencoder`


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="module")
def items() -> list[dict]:
    """Thirty simulated subjects with the items of a `SliceDataset`."""
    same, items = {"present": torch.ones(3, dtype=torch.bool), "has_mask": torch.tensor(True)}, []
    for i in range(30):
        subject = simulate_subject((5, i), 32, NAMES)
        images, mask = torch.from_numpy(subject.images), torch.from_numpy(subject.mask).float()
        items.append({"images": images, "mask": mask, "subject": f"subject-{i}"} | same)
    return items


def noise_system(calls: list[int], scale: float = 1.0, key: str = "noise") -> System:
    """Its images are the generators' noise; notes how many were asked for."""

    def generate(generators: list[torch.Generator]):
        calls.append(len(generators))
        images = torch.stack([torch.rand(3, 32, 32, generator=one) for one in generators]).numpy() * scale
        return {"images": images, "masks": images[:, 0] > 0.9}

    return System("noise", "nowhere", 0, generate, key)


def test_subjects_are_generated_in_blocks_and_kept_and_refused_where_they_show_nothing(cache, monkeypatch):
    monkeypatch.setattr(comparison, "BLOCK", 4)
    calls: list[int] = []
    subjects = sample(noise_system(calls), 10, 7, cache)
    assert calls == [4, 4, 2] and subjects["images"].dtype == np.uint8 and subjects["images"].shape == (10, 3, 32, 32)
    assert subjects["masks"].dtype == bool and subjects["seconds"].shape == (3,) and "structure" not in subjects
    expected = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(12)).numpy()
    np.testing.assert_array_equal(subjects["images"][5], np.rint(expected * 255))  # subject 5 is seed 7 + 5
    more = sample(noise_system(calls), 12, 7, cache)
    assert calls == [4, 4, 2, 4]  # whole blocks serve any number
    np.testing.assert_array_equal(more["images"][:10], subjects["images"])
    sample(noise_system(calls, key="other weights"), 4, 7, cache)
    sample(noise_system(calls), 4, 8, cache)
    assert calls[4:] == [4, 4]
    path = next(cache.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-9])  # damaged: generated again
    np.testing.assert_array_equal(sample(noise_system(calls), 12, 7, cache)["images"], more["images"])
    for scale, message in ((np.nan, "NaN"), (0.001, "only black images of modality 0")):
        with pytest.raises(ValueError, match=f"noise in nowhere generates {message}"):
            sample(noise_system([], scale, message), 3, 0, cache)


def test_a_pipeline_as_a_system(tiny_pipeline):
    options = dict(num_inference_steps=2, num_style_inference_steps=1)
    system = pipeline_system(tiny_pipeline, "folder", **options)
    block = system.generate([torch.Generator().manual_seed(seed) for seed in (4, 5)])
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    expected = tiny_pipeline(2, generator=generators, output_type="np", **options)
    np.testing.assert_array_equal(block["images"], expected.images)
    for name in ("structure", "styles"):
        np.testing.assert_array_equal(block[name], expected[name].numpy())
    assert block["masks"].shape == (2, 32, 32) and system.parameters > 1000
    assert pipeline_system(tiny_pipeline, "moved", **options).key == system.key
    assert pipeline_system(tiny_pipeline, "folder", num_inference_steps=3).key != system.key


def test_segmenters_are_trained_once(cache, items):
    segmenters, dice = find_segmenters(items[:6], NAMES, 2, 0, cache)
    files = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    again, same = find_segmenters(items[:6], NAMES, 2, 0, cache)
    assert same == dice and set(dice) == set(NAMES) and len(files) == 3
    assert {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()} == files
    picture = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(segmenters["WB"](picture), again["WB"](picture))
    assert find_segmenters(items[:6], NAMES, 0, 0, cache) == ({}, {})
    unlabelled = [item | {"has_mask": torch.tensor(False)} for item in items[:6]]
    assert find_segmenters(unlabelled, NAMES, 2, 0, cache) == ({}, {})


def test_too_few_subjects_for_the_probes_leave_the_rest(cache, tiny_autoencoder, items):
    result = comparison.measure_autoencoder(tiny_autoencoder, items[:4], {}, 0, cache)
    assert result["reconstruction"]["num_subjects"] == 4 and set(result["alignment"]) == {"validation", "rebuilt"}
    assert "at least 8 subjects" in result["disentanglement"]["left_out"]


def test_measures_separate_real_subjects_from_noise(cache, tiny_autoencoder, items):
    """Further real subjects as a system must beat noise in fidelity and alignment; copies must be refused."""
    real, train, further = (read_slices(items[i : i + 10]) for i in (0, 10, 20))
    samples = {
        "further": {"images": further.images[:6], "masks": np.stack([i["mask"] for i in items[20:26]]) > 0},
        "noise": sample(noise_system([]), 6, 0, cache),
        "copies": {"images": np.flip(train.images[:6], -1).copy()},
    }
    extractor = FeatureExtractor(
        "tiny", "blocks", 32, 16, lambda x: torch.nn.functional.avg_pool2d(x[:, :1] / 255, 8).flatten(1), "0" * 64
    )
    compared = Comparison(NAMES, real, train, extractor, None, 0, cache)
    two = {name: samples[name] for name in ("further", "noise")}
    fidelity = compared.fidelity(two)
    distance = {name: one["scores"]["frechet_distance"]["mean"]["value"] for name, one in fidelity.items()}
    assert distance["further"] < 0.1 * distance["noise"]
    assert fidelity["noise"]["floor"] == fidelity["further"]["floor"]
    assert fidelity["noise"]["num_images"]["T1"] == {"real": 10, "generated": 6, "floor": 6}

    reference = compared.alignment({"real": {"images": real.images}}, None, {}, 10)["real"]
    alignment = compared.alignment(two, reference, {}, 5)
    assert alignment["noise"]["num_slices"] == 5
    for pair in reference["edge_correlation"]:
        own, chance = (alignment[name]["edge_correlation"][pair] for name in ("further", "noise"))
        assert own > 0.4 > 0.1 > chance
    assert alignment["further"]["enhancement"]["WB"] > 1.3 and np.isnan(reference["enhancement"]["WB"])

    spectrum = {name: compared.spectra(subjects["images"]) for name, subjects in two.items()}
    assert spectrum["noise"]["spectrum"]["ratio_mean"][-1] > 2 * spectrum["further"]["spectrum"]["ratio_mean"][-1]

    found = compared.memorization(samples, train, tiny_autoencoder)
    assert found["copies"]["refused"] == 6 and found["further"]["refused"] < 6
    assert found["copies"]["closest"][0]["flip"][1]

    # Without a second real sample the held-out subjects are halved.
    one = [Slices(slices.images[:, :1], slices.subjects) for slices in (real, further)]
    halves = Comparison(NAMES[:1], one[0], None, extractor, None, 0, cache).fidelity({"further": vars(one[1])})
    assert halves["further"]["num_images"]["T1"] == {"real": 5, "generated": 5, "floor": 5}


def test_steps_are_compared_on_the_same_subjects(cache, items):
    real, second = read_slices(items[:8]), read_slices(items[8:16])
    extractor = FeatureExtractor("tiny", "means", 32, 3, lambda x: x.mean(dim=(2, 3)) / 255, "0" * 64)
    systems = {n: noise_system([], 0.4 * n, f"noise {n}") for n in (1, 2)}
    steps = Comparison(NAMES, real, second, extractor, None, 3, cache).steps(systems, 5)
    assert [entry["num_inference_steps"] for entry in steps["entries"]] == [1, 2] and steps["num_subjects"] == 5
    dark, bright = (entry["frechet_distance"] for entry in steps["entries"])
    assert 1e-6 < steps["floor"]["frechet_distance"] < dark < bright  # real images are dark
    alone = Comparison(NAMES, real, None, extractor, None, 3, cache).steps(systems, 5)
    assert alone == steps | {"floor": None}
