"""An export in blocks: the files are those of one block, and a stop at any moment loses and repeats nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from dldm_pipeline.data.export import check_export_folder, continues_export, export_subjects, is_export, new_manifest
from dldm_pipeline.data.export_blocks import (
    Block,
    blocks_left,
    finish_export,
    start_export,
    unfinished_manifest,
    write_block,
)
from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.slices import SliceDataset, split_subjects
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

SUBJECTS = 8


@pytest.fixture(scope="module")
def blocks() -> list[Block]:
    """Eight subjects with noise for images, in blocks of two."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2**16, (SUBJECTS, 2, 16, 16), dtype=np.uint16)
    labels = (rng.random((SUBJECTS, 16, 16)) > 0.8).astype(np.uint8)
    return [
        Block(k, images[k : k + 2], labels[k : k + 2], [{"seed": k}, {"seed": k + 1}]) for k in range(0, SUBJECTS, 2)
    ]


def manifest_of(format: str, **changes) -> dict:
    return new_manifest(SUBJECTS, ["T1", "WB"], (16, 16), format=format, block_size=2, seed=3, **changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def export(folder: Path, blocks: list[Block], format: str) -> Path:
    start_export(folder, manifest_of(format))
    for block in blocks:
        write_block(folder, block)
    finish_export(folder)
    return folder


@pytest.mark.parametrize("format", ["nifti", "dataset"])
def test_blocks_in_any_order_give_what_one_block_gives(blocks, tmp_path, format) -> None:
    assert files_of(export(tmp_path / "a", blocks, format)) == files_of(export(tmp_path / "b", blocks[::-1], format))
    images = np.concatenate([block.images for block in blocks]).astype(np.float32) / 65535
    labels = np.concatenate([block.labels for block in blocks])
    output = DLDMPipelineOutput(images, labels > 0, None, None, ["T1", "WB"])
    export_subjects(output, tmp_path / "one", seed=3, format=format)
    files, expected = files_of(tmp_path / "a"), files_of(tmp_path / "one")
    manifests = [json.loads(one.pop("manifest.json")) for one in (files, expected)]
    assert [entry.pop("seed") for entry in manifests[0]["subjects"]] == list(range(SUBJECTS))
    assert manifests[0].pop("block_size") == 2 and manifests[1].pop("block_size") == SUBJECTS
    assert manifests[0] == manifests[1]
    if format == "nifti":
        assert files == expected
        return
    assert files["README.md"] == expected["README.md"] and files["sheet.png"] == expected["sheet.png"]
    splits = dict(
        zip(("train", "validation"), split_subjects(f"synthetic-{k:04d}" for k in range(SUBJECTS)), strict=True)
    )
    for split, names in splits.items():
        items, alike = (list(SliceDataset(tmp_path / folder, split)) for folder in ("a", "one"))
        assert [item["subject"] for item in items] == names == [item["subject"] for item in alike]
        assert [entry["name"] for entry in manifests[0]["subjects"] if entry["split"] == split] == names
        for item, other in zip(items, alike, strict=True):
            assert item["images"].equal(other["images"]) and item["mask"].equal(other["mask"])
    loaded = datasets.load_dataset(str(tmp_path / "a"))
    assert {split: loaded[split]["subject"][:] for split in splits} == splits


def test_what_is_not_finished_is_not_read(blocks, tmp_path) -> None:
    for format in ("nifti", "dataset"):
        folder = tmp_path / format
        start_export(folder, manifest_of(format))
        write_block(folder, blocks[1])
        assert blocks_left(folder) == [0, 4, 6] and not [path for path in folder.iterdir() if path.name[0] != "."]
        with pytest.raises(ValueError, match=r"lacks the blocks that start at subjects \[0, 4, 6\]"):
            finish_export(folder)
        assert is_export(folder) and not (folder / "manifest.json").exists()
        with pytest.raises(FileExistsError, match="is not empty"):
            check_export_folder(folder)
        check_export_folder(folder, overwrite=True)
    with pytest.raises(ValueError, match="holds no scans"):
        find_scans(tmp_path / "nifti")
    with pytest.raises(FileNotFoundError, match="holds no data/train"):
        SliceDataset(tmp_path / "dataset")
    with pytest.raises(Exception, match="(?i)data.* files|any data"):
        datasets.load_dataset(str(tmp_path / "dataset"))


@pytest.mark.parametrize("format", ["nifti", "dataset"])
def test_a_stop_at_any_moment_of_the_end(blocks, tmp_path, monkeypatch, format) -> None:
    """The end is a sequence of changes of names: before each of them in turn, a run is stopped, and another goes on."""
    expected = files_of(export(tmp_path / "whole", blocks, format))
    moments = len(list((tmp_path / "whole").iterdir())) + len(list((tmp_path / "whole" / "data").glob("*")))
    for moment in range(moments):
        folder = tmp_path / f"stopped-{moment}"
        start_export(folder, manifest_of(format))
        for block in blocks:
            write_block(folder, block)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            _stop_at(moment, patch)
            finish_export(folder)
        assert unfinished_manifest(folder) is not None and not (folder / "manifest.json").exists()
        finish_export(folder)
        assert files_of(folder) == expected, f"stopped before change {moment}"


def _stop_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    changes = iter(range(moment + 1))

    def stopped(change: Callable) -> Callable:
        def change_or_stop(*names) -> None:
            if next(changes) == moment:
                raise KeyboardInterrupt
            change(*names)

        return change_or_stop

    for name in ("rename", "replace"):
        patch.setattr(os, name, stopped(getattr(os, name)))


def test_a_block_is_written_whole_or_not_at_all(blocks, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    start_export(folder, manifest_of("nifti"))
    broken = Block(2, blocks[1].images, blocks[1].labels[:1], blocks[1].entries)
    with pytest.raises(ValueError, match="zip"):
        write_block(folder, broken)
    assert blocks_left(folder) == [0, 2, 4, 6]
    for block in (*blocks, blocks[1]):  # twice, as by a worker that a killed run left behind
        write_block(folder, block)
    finish_export(folder)
    assert files_of(folder) == files_of(export(tmp_path / "whole", blocks, "nifti"))
    with pytest.raises(FileNotFoundError, match="it is complete, or was removed"):
        write_block(folder, blocks[0])


def test_an_unfinished_export_goes_on_with_the_same_settings_only(tmp_path) -> None:
    for name, data in (("a", b"a"), ("b", b"b")):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "model.safetensors").write_bytes(data)
    settings = {"num_inference_steps": 5, "device": "cpu", "num_threads": 1}
    begun = manifest_of("nifti", settings=settings, checkpoint=tmp_path / "a")
    folder = tmp_path / "out"
    assert not continues_export(folder, begun)
    start_export(folder, begun)
    elsewhere = settings | {"device": "cuda", "num_threads": 8}
    other_blocks = manifest_of("nifti", settings=elsewhere, checkpoint=tmp_path / "a") | {"block_size": 3}
    assert continues_export(folder, begun) and continues_export(folder, other_blocks)
    for changed, message in (
        ({"seed": 4}, "seed 3, not 4"),
        ({"num_subjects": 9}, "num_subjects 8, not 9"),
        ({"format": "dicom"}, "format nifti, not dicom"),
        ({"modalities": ["WB", "T1"]}, r"modalities \['T1', 'WB'\], not \['WB', 'T1'\]"),
        ({"settings": settings | {"num_inference_steps": 9}}, "num_inference_steps 5, not 9"),
        (
            {"checkpoint": manifest_of("nifti", checkpoint=tmp_path / "b")["checkpoint"]},
            "files of another checkpoint",
        ),
    ):
        with pytest.raises(
            FileExistsError, match=f"out holds an unfinished export with {message}; go on with .*--over"
        ):
            continues_export(folder, begun | changed)
        assert not continues_export(folder, begun | changed, overwrite=True)
