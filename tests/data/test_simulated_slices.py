"""Data sets of simulated slices, at 32 pixels."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from dldm_pipeline.data import simulation
from dldm_pipeline.data.simulated_slices import simulated_dataset, simulated_rows
from dldm_pipeline.data.simulation import simulate_subject

OPTIONS = {"size": 32, "modalities": ["BB", "T1"]}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(simulated_rows(3, seed=5, slices_per_subject=3, acquisitions=2, tumour_free_fraction=0.4, **OPTIONS))


def test_every_slice_can_be_simulated_again(rows: list[dict]) -> None:
    for row in rows:
        seeds, tumour = (row["anatomy_seed"], row["acquisition_seed"]), row["factors"]["lesions"] > 0
        subject = simulate_subject(*seeds, height=row["height"], tumour=tumour, **OPTIONS)
        assert np.array_equal(subject.images, [row["BB"], row["T1"]]) and np.array_equal(subject.labels, row["labels"])
        assert np.array_equal(row["mask"], row["labels"] > 0) and row["pixel_spacing"] == subject.pixel_spacing


def test_slices_and_acquisitions_of_a_subject(rows: list[dict]) -> None:
    assert [row["slice_index"] for row in rows] == [0, 0, 1, 1, 2, 2] * 3
    assert [row["anatomy_seed"] for row in rows] == [(5, index // 6) for index in range(18)]
    assert [row["mask"].any() for row in rows] == [True] * 12 + [False] * 6
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert np.array_equal(one["labels"], other["labels"]) and one["height"] == other["height"]
        assert np.abs(one["T1"] - other["T1"]).max() > 0.02
    for subject in range(3):
        assert len({row["height"] for row in rows[6 * subject : 6 * subject + 6]}) == 3
    assert simulate_subject((5, 0), **OPTIONS).height in {row["height"] for row in rows[:6]}


def test_a_subject_does_not_depend_on_the_others_or_on_workers(rows: list[dict]) -> None:
    options = dict(slices_per_subject=3, acquisitions=2, seed=5, **OPTIONS)
    assert all(map(same, rows, simulated_rows(2, num_workers=2, **options)))


@pytest.mark.parametrize(("fraction", "free"), [(0, 0), (0.29, 2), (0.5, 5), (1, 10)])
def test_the_fraction_without_tumour_is_kept(fraction: float, free: int) -> None:
    found = [row["mask"].any() for row in simulated_rows(10, 32, modalities=["T1"], tumour_free_fraction=fraction)]
    assert found.count(False) == free


def test_the_folder_is_that_of_the_simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(num_subjects=2, root=tmp_path, num_workers=1, show_progress=False)
    folder = simulated_dataset(size=32, **options)
    assert folder.name == f"simulated-v{simulation.SIMULATOR_VERSION}-32-2"
    (row,) = datasets.load_dataset(str(folder), split="validation")
    assert json.loads(row["factors"])["lesions"] >= 1 and row["height"] > 0
    (folder / "a mark").touch()
    assert (simulated_dataset(size=32, **options) / "a mark").exists(), "it is made once"
    monkeypatch.setattr(simulation, "SIMULATOR_VERSION", 77)
    other = simulated_dataset(**OPTIONS, seed=3, tumour_free_fraction=0.5, **options)
    assert other.name == "simulated-v77-32-2-free0.5-BB-T1-seed3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_subjects": 0}, "num_subjects is 0"),
        ({"slices_per_subject": 0}, "slices_per_subject is 0"),
        ({"acquisitions": 0}, "acquisitions is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"tumour_free_fraction": 20}, "tumour_free_fraction is 20; it must be between 0 and 1"),
        ({"size": 20}, "size is 20"),
        ({"modalities": ["T1CE"]}, "'T1CE' in modalities cannot be simulated"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(simulated_rows(**{"num_subjects": 1, **arguments}))


def test_fractions_that_look_alike_have_folders_of_their_own(tmp_path) -> None:
    options = dict(size=32, modalities=("T1",), root=tmp_path, num_workers=1, show_progress=False)
    folders = {simulated_dataset(3, tumour_free_fraction=fraction, **options) for fraction in (0.333333, 1 / 3)}
    assert len(folders) == 2
    broken = tmp_path / "simulated-v2-32-4-T1"
    broken.mkdir()  # empty: nothing to read
    assert simulated_dataset(4, **options).name == broken.name and list(broken.glob("data/*.parquet"))
