"""The slice table: writing, splitting, loading back."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dldm_pipeline.data import slices
from dldm_pipeline.data.slices import SliceDataset, split_subjects, write_slices

NAMES = ("T1", "T2", "X-ray")


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches out of the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


def make_rows(subjects: int = 5, each: int = 2, size: int = 16, names: tuple[str, ...] = NAMES) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    for subject in range(subjects):
        for index in range(each):
            yield {
                "subject": f"s{subject:03d}",
                "slice_index": 10 + index,
                **{name: rng.random((size, size), dtype=np.float32) for name in names},
                "mask": rng.integers(0, 2, (size, size), dtype=np.uint8),
                "source": "test",
                "pixel_spacing": (1.5, 2.0),
            }


@given(st.sets(st.text(min_size=1), max_size=60), st.floats(0, 0.99), st.integers(0, 1000))
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


@settings(max_examples=8, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.floats(0, 1, width=32)),
    st.booleans(),
)
def test_round_trip_within_a_grey_level(image: np.ndarray, has_mask: bool) -> None:
    mask = (image > 0.5).astype(np.uint8) if has_mask else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data_set"
        write_slices([{"subject": "a", "slice_index": 0, "T1": image, "mask": mask}], path, ["T1"])
        item = SliceDataset(path)[0]
    assert np.abs(item["images"][0].numpy() - image).max() <= 1 / 65535
    assert bool(item["has_mask"]) == has_mask
    assert np.array_equal(item["mask"].numpy(), np.zeros_like(image) if mask is None else mask)


@pytest.mark.parametrize("streaming", [False, True])
def test_loads_by_datasets(tmp_path: Path, streaming: bool) -> None:
    rows = list(make_rows())
    rows[0]["T2"] = rows[0]["mask"] = None
    summary = write_slices(rows, tmp_path / "out", NAMES)
    assert summary == {"train": {"subjects": 4, "rows": 8}, "validation": {"subjects": 1, "rows": 2}}
    loaded = datasets.load_dataset(str(tmp_path / "out"), streaming=streaming)
    assert set(loaded) == {"train", "validation"}
    back = {(row["subject"], row["slice_index"]): row for split in loaded.values() for row in split}
    assert len(back) == len(rows)
    for row in rows:
        got = back[row["subject"], row["slice_index"]]
        assert list(got) == ["subject", "slice_index", *NAMES, "present", "mask", "source", "pixel_spacing"]
        assert got["present"] == [row[name] is not None for name in NAMES]
        assert got["pixel_spacing"] == [1.5, 2.0] and got["source"] == "test"
        assert got["T1"].mode == "I;16" and (got["mask"] is None or got["mask"].mode == "L")
        for name in NAMES:
            assert (got[name] is None) == (row[name] is None)
            if row[name] is not None:
                assert np.array_equal(np.asarray(got[name]), np.rint(row[name] * 65535))
        if row["mask"] is not None:
            assert np.array_equal(np.asarray(got["mask"]), row["mask"] * 255)


def test_slice_dataset_items(tmp_path: Path) -> None:
    rows = list(make_rows())
    for row in rows:
        row["T2"] = None
    rows[0]["mask"] = None
    write_slices(rows, tmp_path / "out", NAMES, val_fraction=0)
    data = SliceDataset(tmp_path / "out")
    assert data.modalities == NAMES and data.image_size == 16 and len(data) == 10
    for row, item in zip(rows, data, strict=True):
        assert item["subject"] == row["subject"]
        assert item["present"].tolist() == [True, False, True]
        assert item["images"].dtype == torch.float32 and item["images"].shape == (3, 16, 16)
        assert item["images"][1].abs().max() == 0
        np.testing.assert_allclose(item["images"][2], row["X-ray"], atol=1 / 65535)
        assert bool(item["has_mask"]) == (row["mask"] is not None)
    assert data[-1]["subject"] == rows[-1]["subject"]
    with pytest.raises(IndexError):
        data[10]


def test_slice_dataset_in_a_data_loader(tmp_path: Path) -> None:
    write_slices(make_rows(), tmp_path / "out", NAMES)
    loader = torch.utils.data.DataLoader(SliceDataset(tmp_path / "out"), batch_size=4, shuffle=True, num_workers=2)
    batches = list(loader)
    assert [tuple(batch["images"].shape) for batch in batches] == [(4, 3, 16, 16)] * 2
    assert batches[0]["present"].shape == (4, 3) and batches[0]["has_mask"].shape == (4,)
    assert len(batches[0]["subject"]) == 4


def test_wanted_modalities(tmp_path: Path) -> None:
    rows = list(make_rows())
    rows[0]["T2"] = None
    write_slices(rows, tmp_path / "out", NAMES, val_fraction=0)
    data = SliceDataset(tmp_path / "out", modalities=["X-ray", "T2"])
    np.testing.assert_allclose(data[1]["images"][1], rows[1]["T2"], atol=1 / 65535)
    assert len(data) == 10 and len(SliceDataset(tmp_path / "out", modalities=["T2"])) == 9
    with pytest.raises(ValueError, match=r"do not match: FLAIR, BB wanted, but .* has T1, T2, X-ray"):
        SliceDataset(tmp_path / "out", modalities=["T1", "FLAIR", "BB"])


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
    write_slices(make_rows(100, 2), tmp_path / "out", NAMES, val_fraction=0.3)
    names = sorted(file.name for file in (tmp_path / "out" / "data").iterdir())
    assert names[0].startswith("train-00000-of-") and int(names[0][-13:-8]) > 2
    found = [data["subject"] for split in slices.SPLITS for data in SliceDataset(tmp_path / "out", split)]
    assert sorted(found) == sorted(row["subject"] for row in make_rows(100, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T1": np.zeros((8, 16))}, r"subject s001, slice 11: T1 has shape \(8, 16\), not \(16, 16\)"),
        ({"T1": np.full((16, 16), np.nan)}, "T1 has values from nan to nan"),
        ({"T1": np.full((16, 16), 300.0)}, r"T1 has values from 300.0 to 300.0; they must lie in \[0, 1\]"),
        ({"WB": np.zeros((16, 16))}, r"unknown modalities \['WB'\]"),
        ({"T1": None, "T2": None, "X-ray": None}, "none of T1, T2, X-ray is there"),
        ({"subject": ""}, "a row has no subject"),
    ],
)
def test_bad_rows_leave_nothing_behind(tmp_path: Path, change: dict, message: str) -> None:
    rows = list(make_rows(2))
    rows[-1].update(change)
    with pytest.raises(ValueError, match=message):
        write_slices(rows, tmp_path / "out", NAMES)
    assert list(tmp_path.iterdir()) == []


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no slices to write"):
        write_slices([], tmp_path / "out", NAMES)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_data_set_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_slices(make_rows(), tmp_path / "out", NAMES)  # an empty folder is fine
    with pytest.raises(FileExistsError, match="delete it or name another output"):
        write_slices(make_rows(), tmp_path / "out", NAMES)
    assert len(SliceDataset(tmp_path / "out")) == 8


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file/out"):
        write_slices(make_rows(), tmp_path / "file" / "out", NAMES)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user who is bound by permissions")
def test_output_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match="cannot write .*closed/out .*Permission denied"):
        write_slices(make_rows(), tmp_path / "closed" / "out", NAMES)


def test_full_disk(tmp_path: Path) -> None:
    def rows() -> Iterator[dict]:
        yield from make_rows()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full: could not finish .*out; nothing was kept"):
        write_slices(rows(), tmp_path / "out", NAMES)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def rows() -> Iterator[dict]:
        yield from make_rows()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_slices(rows(), tmp_path / "out", NAMES)
    assert list(tmp_path.iterdir()) == []


def test_finish_adds_files_before_the_folder_appears(tmp_path: Path) -> None:
    def finish(folder: Path, summary: dict) -> None:
        assert not (tmp_path / "out").exists()
        (folder / "README.md").write_text(str(summary["train"]["rows"]))

    write_slices(make_rows(), tmp_path / "out", NAMES, finish=finish)
    assert (tmp_path / "out" / "README.md").read_text() == "8"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "data"]
