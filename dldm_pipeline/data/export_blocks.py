"""An export of synthetic subjects, written block by block, so that it can be stopped and continued.

An export that is not finished has all that it has in one hidden folder, which readers of scans and of data sets skip:

    FOLDER/.unfinished/manifest.json              what is being made: the manifest without its subjects
    FOLDER/.unfinished/block-000000256/           subjects 256, 257, ...: their files, complete
    FOLDER/.unfinished/block-000000256/subjects.json    and their entries of the manifest

`start_export` makes it, `write_block` fills it, in any order and from any process, and `finish_export` moves the files to
where `dldm_pipeline.data.export` describes them. FOLDER/manifest.json is written last: where it is, the export is complete.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dldm_pipeline.data.export_dicom import write_dicom
from dldm_pipeline.data.files import atomic_write, new_folder, read_arrays, write_arrays, write_text
from dldm_pipeline.data.sheet import appearances_sheet, contact_sheet
from dldm_pipeline.data.slice_rows import write_rows
from dldm_pipeline.data.slices import SPLITS, data_card, split_subjects
from dldm_pipeline.modalities import LABELS, MASK
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

SHEET_SUBJECTS = 16
_UNFINISHED = ".unfinished"


@dataclass
class Block:
    """Subjects with consecutive numbers.

    Args:
        start (`int`): Number of the first one.
        images (`np.ndarray`): uint16 (S, n, H, W), 0 to 65535 for [0, 1].
        labels (`np.ndarray`): uint8 (S, H, W): the tumour's regions where they are known, or its mask.
        entries (`list[dict]`): What the manifest says of each subject, such as its seed, besides what is written of it.
    """

    start: int
    images: np.ndarray
    labels: np.ndarray
    entries: list[dict[str, Any]]

    @classmethod
    def from_output(
        cls, output: DLDMPipelineOutput, start: int = 0, entries: list[dict[str, Any]] | None = None
    ) -> "Block":
        """The block of a pipeline's output ("np" or "pt").

        Raises:
            ValueError: If `output` has no float images, or not-a-number values.
        """
        images, labels = output.images, output.masks if output.labels is None else output.labels
        if torch.is_tensor(images):
            images, labels = images.cpu().numpy(), labels.cpu().numpy()
        if not isinstance(images, np.ndarray):
            raise ValueError("`output` has no float images to export; call the pipeline with `output_type='np'`.")
        if not np.isfinite(images).all():
            raise ValueError("`output.images` has values that are not numbers: the pipeline's weights are broken.")
        pixels = np.rint(np.clip(images, 0, 1) * 65535).astype(np.uint16)
        return cls(start, pixels, labels.astype(np.uint8), entries or [{} for _ in pixels])


def start_export(folder: str | os.PathLike, manifest: dict[str, Any], overwrite: bool = False) -> None:
    """Create a folder for the blocks of an export.

    Args:
        folder (`str` or `os.PathLike`): Folder to create; it must not exist, or be empty.
        manifest (`dict`): From [`~data.export.new_manifest`].
        overwrite (`bool`, *optional*, defaults to `False`): Replace what is in `folder`, whatever it is.

    Raises:
        FileExistsError: If there is something in `folder` that may not be replaced.
        OSError: If `folder` cannot be written.
    """
    with new_folder(folder, overwrite) as temporary:
        write_text(temporary / _UNFINISHED / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def unfinished_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What [`start_export`] was given; `None` if `folder` has no unfinished export."""
    folder = Path(folder)
    try:
        if (folder / "manifest.json").exists():
            return None
        manifest = json.loads((folder / _UNFINISHED / "manifest.json").read_text(encoding="utf-8"))
        return manifest if isinstance(manifest, dict) else None
    except (OSError, ValueError):
        return None


def blocks_left(folder: str | os.PathLike) -> list[int]:
    """Numbers of the first subjects of the blocks that an unfinished export lacks."""
    manifest = _read_manifest(folder)
    starts = range(0, manifest["num_subjects"], manifest["block_size"])
    return [start for start in starts if not _block_folder(folder, start).exists()]


def write_block(folder: str | os.PathLike, block: Block) -> None:
    """Write the subjects of a block: all of them, or none.

    Args:
        folder (`str` or `os.PathLike`): Folder of [`start_export`].
        block (`Block`): It starts at a number of [`blocks_left`].

    Raises:
        OSError: If `folder` cannot be written, or the disk is full.
    """
    manifest = _read_manifest(folder)
    names = [_subject_name(block.start + k) for k in range(len(block.images))]
    with new_folder(_block_folder(folder, block.start), overwrite=True) as temporary:
        if manifest["format"] == "dataset":
            written = _write_rows(temporary, names, block, manifest)
        else:
            subjects = zip(names, block.images, block.labels, strict=True)
            written = [{"files": _write_subject(temporary, *subject, manifest)} for subject in subjects]
        pixels = [{"tumour_pixels": int((label > 0).sum())} for label in block.labels]
        entries = [
            {"name": name, **given, **size, **files}
            for name, given, size, files in zip(names, block.entries, pixels, written, strict=True)
        ]
        if block.start < _sheet_subjects(manifest):
            preview = {"images": np.rint(block.images / 257).astype(np.uint8), "labels": block.labels}
            write_arrays(temporary / "preview.safetensors", preview, {})
        write_text(temporary / "subjects.json", json.dumps(entries))


def finish_export(folder: str | os.PathLike) -> None:
    """Move the files of all blocks to their places, and add the contact sheet, the card of a data set, and the manifest.

    An export that is stopped here is finished by another call.

    Args:
        folder (`str` or `os.PathLike`): Folder of [`start_export`].

    Raises:
        ValueError: If blocks are left to write.
        OSError: If `folder` cannot be written, or the disk is full.
    """
    folder, manifest, left = Path(folder), _read_manifest(folder), blocks_left(folder)
    if left:
        raise ValueError(f"{folder} lacks the blocks that start at subjects {left[:9]}; write them first.")
    blocks = [_block_folder(folder, k) for k in range(0, manifest["num_subjects"], manifest["block_size"])]
    if manifest["format"] == "dataset":
        _move_shards(folder, blocks, manifest)
    else:
        for block in blocks:
            for entry in _entries([block]):
                if not (folder / entry["name"]).exists():  # or it was moved before a stop
                    _move(block / entry["name"], folder / entry["name"])
    _write_sheets(folder, blocks, manifest)
    with atomic_write(folder / "manifest.json") as temporary, temporary.open("w", encoding="utf-8") as file:
        # A line for each subject, so that memory does not grow with their number.
        file.write(json.dumps(manifest, indent=2).removesuffix("\n}") + ',\n  "subjects": [')
        for number, entry in enumerate(_entries(blocks)):
            file.write(f"{',' if number else ''}\n    {json.dumps(entry)}")
        file.write("\n  ]\n}\n")
    shutil.rmtree(folder / _UNFINISHED)


def file_word(modality: str) -> str:
    """What file names call a modality."""
    return re.sub(r"[^a-z0-9]+", "-", modality.lower())


def _read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    manifest = unfinished_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no unfinished export: it is complete, or was removed.")
    return manifest


def _block_folder(folder: str | os.PathLike, start: int) -> Path:
    return Path(folder) / _UNFINISHED / f"block-{start:09d}"


def _subject_name(number: int) -> str:
    return f"synthetic-{number:04d}"


def _move(source: Path, target: Path) -> None:
    if not source.exists():
        reason = f"is gone. Delete {source.parent} and type the same command again"
        raise FileNotFoundError(f"{source} was written and {reason}.")
    source.rename(target)


def _entries(blocks: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The manifest's entries of the subjects of blocks."""
    for block in blocks:
        yield from json.loads((block / "subjects.json").read_text(encoding="utf-8"))


def _sheet_subjects(manifest: dict[str, Any]) -> int:
    """How many subjects the sheets show at most: the same number of anatomies in all their appearances."""
    return SHEET_SUBJECTS * manifest["settings"].get("appearances", 1)


def _write_sheets(folder: Path, blocks: list[Path], manifest: dict[str, Any]) -> None:
    count = _sheet_subjects(manifest)
    previews = [read_arrays(block / "preview.safetensors") for block in blocks[: -(-count // manifest["block_size"])]]
    damaged = [block for block, preview in zip(blocks, previews, strict=False) if preview is None]
    if damaged:
        raise ValueError(f"{damaged[0]} is damaged. Delete it and type the same command again.")
    images, labels = (np.concatenate([preview[key] for preview in previews])[:count] for key in ("images", "labels"))
    shown = labels[:SHEET_SUBJECTS]
    contact_sheet(
        images[:SHEET_SUBJECTS],
        shown,
        manifest["modalities"],
        [_subject_name(k) for k in range(len(shown))],
        folder / "sheet.png",
        labels=shown if manifest["regions"] else None,
    )
    appearances = count // SHEET_SUBJECTS
    if appearances > 1:
        grid = images.reshape(-1, appearances, *images.shape[1:])
        appearances_sheet(grid, manifest["modalities"], folder / "appearances.png")


@functools.lru_cache(maxsize=1)
def _validation_names(num_subjects: int) -> frozenset[str]:
    return frozenset(split_subjects(map(_subject_name, range(num_subjects)))[1])


def _write_rows(root: Path, names: list[str], block: Block, manifest: dict[str, Any]) -> list[dict[str, str]]:
    """Write a parquet file for each split. Returns the split of each subject."""
    validation = _validation_names(manifest["num_subjects"])
    splits = ["validation" if name in validation else "train" for name in names]
    for split in set(splits):
        rows = (
            {
                "subject": names[k],
                "slice_index": 0,
                **dict(zip(manifest["modalities"], block.images[k], strict=True)),
                MASK: block.labels[k] > 0,
                LABELS: block.labels[k] if manifest["regions"] else None,
                "source": manifest["notice"],
                "pixel_spacing": manifest["pixel_spacing_mm"],
            }
            for k in range(len(names))
            if splits[k] == split
        )
        write_rows(rows, root / f"{split}.parquet", manifest["modalities"])
    return [{"split": split} for split in splits]


def _move_shards(folder: Path, blocks: list[Path], manifest: dict[str, Any]) -> None:
    """Number the parquet files of the blocks, and let them appear at once; write the card."""
    splits = [[entry["split"] for entry in _entries([block])] for block in blocks]
    staged = folder / _UNFINISHED / "data"
    if not (folder / "data").exists():
        staged.mkdir(exist_ok=True)
        for split in SPLITS:
            files = [block / f"{split}.parquet" for block, found in zip(blocks, splits, strict=True) if split in found]
            for number, file in enumerate(files):
                shard = staged / f"{split}-{number:05d}-of-{len(files):05d}.parquet"
                if not shard.exists():  # or it was moved before a stop
                    _move(file, shard)
        staged.rename(folder / "data")
    counts = {split: sum(found.count(split) for found in splits) for split in SPLITS}
    summary = {split: {"subjects": count, "rows": count} for split, count in counts.items()}
    title = "Synthetic aligned multi-modal brain MRI slices"
    origin = f"{manifest['notice']} `manifest.json` says how they were made."
    size = manifest["image_size"][0]
    card = data_card(title, manifest["modalities"], size, summary, origin, "sheet.png", ["synthetic"])
    write_text(folder / "README.md", card)


def _write_subject(
    root: Path, name: str, images: np.ndarray, label: np.ndarray, manifest: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """Write one subject's folder. Returns the files of each modality and the mask, relative to `root`."""
    (root / name).mkdir()
    spacing, notice = tuple(manifest["pixel_spacing_mm"]), manifest["notice"]
    grey = dict(zip(manifest["modalities"], images, strict=True))
    stems = {key: f"{name}/{name}_{file_word(key)}" for key in grey} | {MASK: f"{name}/{name}_seg"}
    if manifest["format"] == "dicom":
        files, mask = [root / f"{stem}.dcm" for stem in stems.values()], (label > 0).astype(np.uint8)
        write_dicom(files, grey, mask, name, spacing, notice, manifest["versions"]["dldm_pipeline"])
        return {key: {"dicom": f"{stem}.dcm"} for key, stem in stems.items()}
    for stem, pixels in zip(stems.values(), (*images, label), strict=True):
        _write_nifti(root / f"{stem}.nii.gz", pixels, spacing, notice)
        text = PngInfo()
        text.add_text("Synthetic", "true")
        text.add_text("Description", notice)
        shown = np.where(pixels > 0, 255, 0).astype(np.uint8) if pixels is label else pixels
        Image.fromarray(shown).save(root / f"{stem}.png", pnginfo=text)
    return {key: {"nifti": f"{stem}.nii.gz", "png": f"{stem}.png"} for key, stem in stems.items()}


def _write_nifti(path: Path, pixels: np.ndarray, spacing: tuple[float, float], notice: str) -> None:
    # NIfTI's axes point right, anterior and superior; the image's rows run to posterior and its columns to the left.
    volume = pixels.T[::-1, ::-1, None]
    affine = np.diag([spacing[1], spacing[0], 1.0, 1.0])
    affine[:2, 3] = [-(volume.shape[0] - 1) / 2 * spacing[1], -(volume.shape[1] - 1) / 2 * spacing[0]]
    nifti = nib.Nifti1Image(volume, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.header["descrip"] = b"SYNTHETIC image (dldm_pipeline). Not for diagnosis."
    comment = json.dumps({"synthetic": True, "notice": notice})
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", comment.encode()))
    nib.save(nifti, path)
