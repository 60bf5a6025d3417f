"""The slice table: writing, splitting, loading back."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dldm_pipeline.data import slices
from dldm_pipeline.data.simulation import simulate_subject
from dldm_pipeline.data.slices import SliceDataset, data_card, split_subjects, write_slices
from dldm_pipeline.modalities import SIMULATED

NAMES = ("T1", "T2", "X-ray")


def make_rows(subjects: int = 5, each: int = 2) -> list[dict]:
    """Slices of 16x16; the first one lacks T2 and its mask, and its subject and the last one lack regions."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "subject": f"s{number // each:03d}",
            "slice_index": 10 + number % each,
            **{name: rng.random((16, 16), dtype=np.float32) for name in NAMES},
            "mask": rng.integers(0, 2, (16, 16), dtype=np.uint8),
            "source": "test",
            "pixel_spacing": (1.5, 2.0),
        }
        for number in range(subjects * each)
    ]
    rows[0]["T2"] = rows[0]["mask"] = None
    for row in rows[each:-1]:
        row["labels"] = row["mask"] * rng.integers(1, 4, (16, 16))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_rows()` as a data set, with its card."""
    folder = tmp_path_factory.mktemp("slices") / "out"
    folder.mkdir()  # an empty folder is fine

    def finish(hidden: Path, summary: dict) -> None:
        assert list(folder.iterdir()) == []
        card = data_card("A title", NAMES, 16, summary, "From *here*.", "sheet.png", ["made-up"])
        (hidden / "README.md").write_text(card)

    summary = write_slices(make_rows(), folder, NAMES, finish=finish)
    assert summary == {"train": {"subjects": 4, "rows": 8}, "validation": {"subjects": 1, "rows": 2}}
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "data"]
    return folder


@given(st.sets(st.text(min_size=1), max_size=60), st.floats(0, 0.99), st.integers(0, 1000))
@settings(max_examples=50)
def test_no_subject_is_in_two_splits(names: set[str], fraction: float, seed: int) -> None:
    train, validation = split_subjects(names, fraction, seed)
    assert set(train) | set(validation) == names and not set(train) & set(validation)
    assert len(train) + len(validation) == len(names)
    if len(names) >= 2 and fraction > 0:
        assert train and validation
        assert abs(len(validation) - fraction * len(names)) <= 1
    assert (train, validation) == split_subjects(sorted(names, reverse=True), fraction, seed)


def test_split_follows_the_seed() -> None:
    names = [f"s{number}" for number in range(100)]
    assert len(split_subjects(names, 0.2, 0)[1]) == 20
    assert split_subjects(names, 0.2, 0) != split_subjects(names, 0.2, 1)
    with pytest.raises(ValueError, match="val_fraction is 1"):
        split_subjects(names, 1.0)


@settings(max_examples=12, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.floats(0, 1, width=32)),
    st.sampled_from([None, "mask", "labels"]),
    st.sampled_from([np.uint8, np.int64, np.float32]),
)
def test_round_trip_within_a_grey_level(image: np.ndarray, known: str | None, kind: type) -> None:
    labels = np.rint(3 * image).astype(kind)
    truth = {"mask": labels > 0, "labels": labels}.get(known)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data_set"
        write_slices([{"subject": "a", "slice_index": 0, "T1": image, known or "mask": truth}], path, ["T1"])
        item = SliceDataset(path)[0]
    assert np.abs(item["images"][0].numpy() - image).max() <= 1 / 65535
    assert bool(item["has_mask"]) == (known is not None) and bool(item["has_labels"]) == (known == "labels")
    np.testing.assert_array_equal(item["mask"], labels > 0 if known else 0)
    np.testing.assert_array_equal(item["labels"], labels if known == "labels" else 0)
    assert item["mask"].dtype == torch.float32 and item["labels"].dtype == torch.uint8


@pytest.mark.parametrize("streaming", [False, True])
def test_loads_by_datasets(folder: Path, streaming: bool) -> None:
    rows = make_rows()
    loaded = datasets.load_dataset(str(folder), streaming=streaming)
    assert set(loaded) == {"train", "validation"}
    back = {(row["subject"], row["slice_index"]): row for split in loaded.values() for row in split}
    assert len(back) == len(rows)
    for row in rows:
        got = back[row["subject"], row["slice_index"]]
        assert list(got) == [
            "subject",
            "slice_index",
            *NAMES,
            "present",
            "mask",
            "labels",
            "source",
            "pixel_spacing",
            *SIMULATED,
        ]
        assert got["present"] == [row[name] is not None for name in NAMES]
        assert got["pixel_spacing"] == [1.5, 2.0] and got["source"] == "test"
        assert got["T1"].mode == "I;16" and (got["mask"] is None or got["mask"].mode == "L")
        for name in NAMES:
            assert (got[name] is None) == (row[name] is None)
            assert row[name] is None or np.array_equal(np.asarray(got[name]), np.rint(row[name] * 65535))
        assert row["mask"] is None or np.array_equal(np.asarray(got["mask"]), row["mask"] * 255)
        assert (got["labels"] is None) == ("labels" not in row)
        assert "labels" not in row or np.array_equal(np.asarray(got["labels"]), row["labels"])
        assert [got[name] for name in SIMULATED] == [None] * 4


def test_a_simulated_row_can_be_simulated_again(tmp_path: Path) -> None:
    subject = simulate_subject((2**40, 7), (3, 1), size=32, modalities=["T1"])
    row = {
        "subject": "a",
        "slice_index": 0,
        "T1": subject.images[0],
        "labels": subject.labels,
        "factors": subject.factors,
    }
    row |= {"anatomy_seed": subject.seeds[0], "acquisition_seed": subject.seeds[1], "height": subject.height}
    write_slices([row], tmp_path / "data", ["T1"])
    (back,) = datasets.load_dataset(str(tmp_path / "data"), split="train")
    assert json.loads(back["factors"]) == subject.factors and back["height"] == subject.height
    assert np.array_equal(np.asarray(back["mask"]), 255 * subject.mask)  # made from the labels
    seeds = tuple(back["anatomy_seed"]), tuple(back["acquisition_seed"])
    again = simulate_subject(*seeds, size=32, height=back["height"], modalities=["T1"])
    assert np.array_equal(again.images, subject.images) and np.array_equal(again.labels, subject.labels)


def test_older_data_sets_are_read_and_newer_ones_refused(folder: Path, tmp_path: Path) -> None:
    kept = ["subject", "slice_index", *NAMES, "present", "mask", "source", "pixel_spacing"]  # all that version 1 had
    for split in slices.SPLITS:
        old = datasets.load_dataset(str(folder), split=split).select_columns(kept)
        (tmp_path / "old" / "data").mkdir(parents=True, exist_ok=True)
        old.to_parquet(tmp_path / "old" / "data" / f"{split}-00000-of-00001.parquet")
        for item, now in zip(SliceDataset(tmp_path / "old", split), SliceDataset(folder, split), strict=True):
            assert not item["has_labels"] and not item["labels"].any()
            assert all(np.array_equal(item[key], now[key]) for key in ("images", "mask", "has_mask"))

    for shard in (tmp_path / "old" / "data").iterdir():
        table = pq.read_table(shard)
        pq.write_table(table.replace_schema_metadata({"dldm_pipeline.schema_version": "3"}), shard)
    with pytest.raises(ValueError, match="old is of schema 3, newer than 2; upgrade dldm_pipeline"):
        SliceDataset(tmp_path / "old")


def test_items_are_tensors(folder: Path) -> None:
    rows = {(row["subject"], i % 2): row for i, row in enumerate(make_rows())}
    data = SliceDataset(folder)
    assert data.modalities == NAMES and data.image_size == 16 and len(data) == 8
    for i, item in enumerate(data):
        row = rows[item["subject"], i % 2]
        assert item["present"].tolist() == [row[name] is not None for name in NAMES]
        assert item["images"].dtype == torch.float32 and item["images"].shape == (3, 16, 16)
        for image, name in zip(item["images"], NAMES, strict=True):
            np.testing.assert_allclose(image, 0 if row[name] is None else row[name], atol=1 / 65535)
        assert bool(item["has_mask"]) == (row["mask"] is not None)
    assert data[-1]["subject"] == item["subject"]
    with pytest.raises(IndexError):
        data[8]
    batches = list(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, num_workers=1))
    assert [tuple(batch["images"].shape) for batch in batches] == [(4, 3, 16, 16)] * 2
    assert batches[0]["present"].shape == (4, 3) and batches[0]["has_mask"].shape == (4,)
    assert sorted(name for batch in batches for name in batch["subject"]) == sorted(item["subject"] for item in data)


def test_wanted_modalities(folder: Path) -> None:
    splits = [SliceDataset(folder, split, ["X-ray", "T2"]) for split in slices.SPLITS]
    rows = {(row["subject"], i % 2): row for i, row in enumerate(make_rows())}
    for i, item in enumerate(splits[0]):
        row = rows[item["subject"], i % 2]
        np.testing.assert_allclose(item["images"][0], row["X-ray"], atol=1 / 65535)
    assert sum(map(len, splits)) == 10
    assert sum(len(SliceDataset(folder, split, ["T2"])) for split in slices.SPLITS) == 9
    with pytest.raises(ValueError, match=r"do not match: FLAIR, BB wanted, but .* has T1, T2, X-ray"):
        SliceDataset(folder, modalities=["T1", "FLAIR", "BB"])


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a data set folder"):
        SliceDataset(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no data/train"):
        SliceDataset(tmp_path)
    write_slices(make_rows(1), tmp_path / "one", NAMES)
    with pytest.raises(ValueError, match="no split 'validation'; it has train"):
        SliceDataset(tmp_path / "one", split="validation")


def test_many_shards_keep_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SHARD_BYTES", 40_000)
    write_slices(make_rows(100), tmp_path / "out", NAMES, val_fraction=0.3)
    names = sorted(file.name for file in (tmp_path / "out" / "data").iterdir())
    assert names[0].startswith("train-00000-of-") and int(names[0][-13:-8]) > 2
    found = [data["subject"] for split in slices.SPLITS for data in SliceDataset(tmp_path / "out", split)]
    assert sorted(found) == sorted(row["subject"] for row in make_rows(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T1": np.zeros((8, 16))}, r"subject s001, slice 11: T1 has shape \(8, 16\), not \(16, 16\)"),
        ({"T1": np.full((16, 16), np.nan)}, "T1 has values from nan to nan"),
        ({"T1": np.full((16, 16), 300.0)}, r"T1 has values from 300.0 to 300.0; they must lie in \[0, 1\]"),
        ({"WB": np.zeros((16, 16))}, r"unknown modalities \['WB'\]"),
        ({"T1": None, "T2": None, "X-ray": None}, "none of T1, T2, X-ray is there"),
        ({"subject": ""}, "a row has no subject"),
        (
            {"labels": np.full((16, 16), 4)},
            r"subject s001, slice 11: labels has values \[4\]; they must be 0, 1, 2 or 3",
        ),
        ({"labels": np.full((16, 16), 1.5)}, r"labels has values \[1.5\]"),
        ({"labels": np.ones((16, 16), bool)}, "subject s001, slice 11: labels is boolean, as a mask"),
        ({"mask": np.full((16, 16), np.nan)}, "subject s001, slice 11: mask has values that are not numbers"),
        ({"anatomy_seed": [1.5]}, r"subject s001, slice 11: {'anatomy_seed': \[1.5\], .*must be whole numbers"),
        ({"factors": {"a": np.nan}}, "subject s001, slice 11: .*not JSON compliant"),
        ({"labels": np.zeros((16, 16))}, "subject s001, slice 11: mask and labels disagree"),
        (None, "no slices to write"),
    ],
)
def test_bad_rows_leave_nothing_behind(tmp_path: Path, change: dict | None, message: str) -> None:
    rows = make_rows(2)
    rows[-1].update(change or {})
    with pytest.raises(ValueError, match=message):
        write_slices(rows if change else [], tmp_path / "out", NAMES)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_data_set_is_not_overwritten(folder: Path) -> None:
    def rows() -> Iterator[dict]:
        raise AssertionError("the folder is looked at first")
        yield

    with pytest.raises(FileExistsError, match="delete it or name another output"):
        write_slices(rows(), folder, NAMES)
    assert len(SliceDataset(folder)) == 8


def test_card(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    for text in (
        "# A title",
        "pretty_name: A title",
        "- made-up",
        "T1, T2, X-ray; 16x16",
        "| train | 4 | 8 |",
        "*here*",
    ):
        assert text in card
    assert "![contact sheet](sheet.png)" in card
    other = tmp_path / folder.name  # `datasets` must not take one folder's rows for another's of that name
    write_slices([row | {"source": "other"} for row in make_rows()], other, NAMES)
    (other / "README.md").write_text(card)
    for path, source in ((folder, "test"), (other, "other")):
        assert set(datasets.load_dataset(str(path), split="train")["source"]) == {source}
