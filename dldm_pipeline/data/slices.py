"""The slice table: one schema for every source of images, written as parquet and read by `datasets` or `SliceDataset`.

A data set is a folder:

    DATA/data/train-00000-of-00003.parquet, ...        80 % of the subjects
    DATA/data/validation-00000-of-00001.parquet, ...   the other 20 %; no subject is in both

with one row per slice and these columns, in this order:

| column             | type                   | meaning                                                            |
|--------------------|------------------------|--------------------------------------------------------------------|
| `subject`          | string                 | who; the split is by this                                          |
| `slice_index`      | int32                  | which axial slice of the subject's volume                          |
| one each modality  | image, null if missing | 16-bit PNG (H, W), mode "I;16"; 0..65535 stands for [0, 1]         |
| `present`          | list of bool           | whether each modality, in column order, is there                   |
| `mask`             | image, null if unknown | 8-bit PNG (H, W), 255 in the whole tumour, 0 outside               |
| `labels`           | image, null if unknown | 8-bit PNG (H, W): 1 necrotic core, 2 oedema, 3 enhancing, 0 else   |
| `source`           | string                 | where the slice came from                                          |
| `pixel_spacing`    | list of two float32    | distance between rows, then between columns, in mm                 |
| `anatomy_seed`     | list of int64          | `seed` in `simulate_subject`; null of a real slice, as those below |
| `acquisition_seed` | list of int64          | `acquisition_seed` in `simulate_subject`                           |
| `height`           | float64                | `height` in `simulate_subject`                                     |
| `factors`          | string                 | what was drawn, as JSON: its names differ from subject to subject  |

Where `labels` are known, `mask` is where they are not 0. `datasets.load_dataset("DATA")` reads the folder, `streaming=True`
too, and so it does from the Hub. The shards' schema holds `dldm_pipeline.schema_version`; without it they are of version 1,
which had neither `labels` nor the last four columns and is still read.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import DatasetCardData
from PIL import Image

from dldm_pipeline.data.files import new_folder
from dldm_pipeline.data.slice_rows import ROWS_PER_GROUP, SCHEMA_VERSION, VERSION_KEY, write_rows
from dldm_pipeline.modalities import LABELS, MASK, RESERVED_NAMES, check_modalities

SHARD_BYTES = 256 * 2**20
SPLITS = ("train", "validation")


def split_subjects(subjects: Iterable[str], val_fraction: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """Divide subjects into training and validation; the choice depends on the set of names and the seed only.

    Args:
        subjects (`Iterable[str]`): Subject names; repetitions are ignored.
        val_fraction (`float`, *optional*, defaults to 0.2): Fraction of the subjects for validation, in [0, 1). From
            two subjects on, each side gets at least one, unless the fraction is 0.
        seed (`int`, *optional*, defaults to 0): Another seed, another choice.

    Returns:
        `tuple[list[str], list[str]]`: Training and validation subjects, each sorted.

    Raises:
        ValueError: If `val_fraction` is outside [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1, for example 0.2.")
    names = sorted(set(subjects), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = round(val_fraction * len(names))
    if val_fraction > 0 and len(names) > 1:
        count = min(max(count, 1), len(names) - 1)
    else:
        count = 0
    return sorted(names[count:]), sorted(names[:count])


def write_slices(
    rows: Iterable[dict[str, Any]],
    output: str | os.PathLike,
    modalities: Sequence[str],
    val_fraction: float = 0.2,
    seed: int = 0,
    finish: Callable[[Path, dict[str, dict[str, int]]], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Write rows as a data set folder, split by subject.

    Rows are encoded as they come, so memory does not grow with their number: they go to one temporary file, and are
    copied, still encoded, to their shards when the last subject, and with it the split, is known. The folder appears
    complete or not at all.

    Args:
        rows (`Iterable[dict]`): One dictionary per slice: `subject` (str), `slice_index` (int), for each modality a
            float array (H, W) in [0, 1], or uint16 as it is stored, or `None` if missing, `mask` an array (H, W) whose
            non-zero pixels are tumour, or `None` if unknown, `labels` an array (H, W) of 0 to 3 or `None`, which makes a
            mask that is not given, and optionally `source` (str), `pixel_spacing` (two numbers, mm) and, of simulated
            slices, `anatomy_seed` and `acquisition_seed` (sequences of int), `height` (float) and `factors` (dict). All
            images of one size.
        output (`str` or `os.PathLike`): Folder to create; it must not exist, or be empty.
        modalities (`Sequence[str]`): Names of the modalities, in the order of the columns.
        val_fraction (`float`, *optional*, defaults to 0.2): Fraction of the subjects that goes to validation.
        seed (`int`, *optional*, defaults to 0): Seed of the split.
        finish (`Callable[[Path, dict], None]`, *optional*): Called with the still hidden folder and the summary when
            all rows are written, to add files to it ([`data_card`], a contact sheet).

    Returns:
        `dict`: For `"train"` and `"validation"`, the numbers of `"subjects"` and `"rows"`.

    Raises:
        ValueError: If there are no rows, or a row does not fit the schema. The message names subject and slice.
        FileExistsError: If `output` already holds files.
        OSError: If `output` cannot be written, or the disk is full.
    """
    split_subjects([], val_fraction)  # complain about the fraction now, not after hours
    with new_folder(output) as folder:
        rows_file = folder / "rows.parquet"
        subjects = write_rows(rows, rows_file, modalities)
        if not subjects:
            raise ValueError(f"no slices to write to {output}: the source gave none.")
        train, validation = split_subjects(subjects, val_fraction, seed)
        (folder / "data").mkdir()
        summary = {}
        for split, members in (("train", train), ("validation", validation)):
            number = sum(subjects[name] for name in members)
            summary[split] = {"subjects": len(members), "rows": number}
            if members:
                _copy_rows(rows_file, folder / "data", split, set(members))
        rows_file.unlink()
        if finish is not None:
            finish(folder, summary)
    return summary


def data_card(
    title: str,
    modalities: Sequence[str],
    image_size: int,
    summary: dict[str, dict[str, int]],
    origin: str,
    sheet: str,
    tags: Sequence[str] = (),
) -> str:
    """The README.md of a data set: what the Hub and `datasets` need to know, and a reader.

    Args:
        title (`str`): Title.
        modalities (`Sequence[str]`): Names of the modalities.
        image_size (`int`): Height and width in pixels.
        summary (`dict`): What [`write_slices`] returned.
        origin (`str`): Markdown on where the slices come from.
        sheet (`str`): Name of a contact sheet beside the card.
        tags (`Sequence[str]`, *optional*): Further tags for the Hub.
    """
    # No `configs`: `datasets` finds the shards without, and with them its cache confuses two folders of one name.
    header = DatasetCardData(pretty_name=title, tags=[*tags, "mri", "brain-tumor", "dldm_pipeline"])
    table = "\n".join(f"| {split} | {count['subjects']} | {count['rows']} |" for split, count in summary.items())
    return f"""---
{header.to_yaml()}
---

# {title}

Modalities: {", ".join(modalities)}; {image_size}x{image_size} pixels, 16-bit, 0 to 65535 for [0, 1].
Split by subject. `mask` is 255 in the whole tumour, null where it is unknown. `labels` is 1 in the necrotic core, 2 in oedema,
3 in enhancing tumour and 0 elsewhere, null where the regions are unknown. All columns: `dldm_pipeline/data/slices.py`, schema
version {SCHEMA_VERSION}.

| split | subjects | slices |
|---|---|---|
{table}

![contact sheet]({sheet})

## Origin

{origin}
"""


def _copy_rows(rows_file: Path, folder: Path, split: str, members: set[str]) -> None:
    """Copy the rows of some subjects to numbered shards, a group of rows at a time."""
    shards: list[Path] = []
    writer, filled, schema = None, 0, pq.read_schema(rows_file)
    try:
        with pq.ParquetFile(rows_file, memory_map=False) as source:
            for batch in source.iter_batches(ROWS_PER_GROUP):
                kept = [name in members for name in batch.column("subject").to_pylist()]
                batch = batch.filter(pa.array(kept))
                if not batch.num_rows:
                    continue
                if writer is None or filled > SHARD_BYTES:
                    if writer is not None:
                        writer.close()
                    shards.append(folder / f"{len(shards)}.tmp")
                    writer, filled = pq.ParquetWriter(shards[-1], schema, compression="none"), 0
                writer.write_batch(batch.cast(schema), row_group_size=ROWS_PER_GROUP)
                filled += batch.nbytes
    finally:
        if writer is not None:
            writer.close()
    for number, shard in enumerate(shards):
        shard.rename(folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")


class SliceDataset(torch.utils.data.Dataset):
    """Slices as tensors, for training.

    Reads a folder written by `write_slices`, or such a data set on the Hub, through `datasets.load_dataset`: the rows
    stay in a memory-mapped file and are decoded when asked for, so memory does not grow with their number.

    Each item is a dictionary:
        - `images`: float32 (n, H, W) in [0, 1]; zeros where a modality is missing.
        - `present`: bool (n,), which modalities are there.
        - `mask`: float32 (H, W), 1 in the tumour, 0 outside; zeros if there is no mask.
        - `has_mask`: bool (), whether the mask is known.
        - `labels`: uint8 (H, W): 1 necrotic core, 2 oedema, 3 enhancing tumour, 0 else; zeros if they are unknown.
        - `has_labels`: bool (), whether the labels are known; then `mask` is where they are not 0.
        - `subject`: str.
        - `anatomy`, `acquisition`: int, equal for slices that show the same; only of simulated data sets.

    Args:
        path (`str` or `os.PathLike`): The data set's folder, or its name on the Hub.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"validation"`.
        modalities (`Sequence[str]`, *optional*): Modalities wanted, in this order, for example those of a model. By
            default all the data have. Slices that show none of them are passed over.

    Attributes:
        modalities (`tuple[str, ...]`): Modality names in the order of `images`.
        image_size (`int`): Height of the images, which is their width if they are square.
        anatomies, acquisitions (`np.ndarray`, *optional*): (N,), the `anatomy` and `acquisition` of every item.

    Raises:
        FileNotFoundError: If `path` is no folder with a data set.
        ValueError: If the split does not exist, the data lack modalities wanted, or the folder's schema is newer.
    """

    def __init__(self, path: str | os.PathLike, split: str = "train", modalities: Sequence[str] | None = None) -> None:
        path = os.fspath(path)
        if os.path.isdir(path):
            files = {name: [str(file) for file in sorted(Path(path).glob(f"data/{name}-*.parquet"))] for name in SPLITS}
            files = {name: found for name, found in files.items() if found}
            if not files:
                raise FileNotFoundError(f"{path} holds no data/train-*.parquet; see training/prepare_dataset.py.")
            if split not in files:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(files)}.")
            version = int((pq.read_schema(files[split][0]).metadata or {}).get(VERSION_KEY, 1))
            if version > SCHEMA_VERSION:
                raise ValueError(f"{path} is of schema {version}, newer than {SCHEMA_VERSION}; upgrade dldm_pipeline.")
            table = datasets.load_dataset("parquet", data_files=files, split=split)
        elif os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise FileNotFoundError(f"{path} is not a data set folder; make one by training/prepare_dataset.py.")
        else:
            table = datasets.load_dataset(path, split=split)

        in_data = tuple(name for name, kind in table.features.items() if isinstance(kind, datasets.Image))
        in_data = tuple(name for name in in_data if name not in RESERVED_NAMES)
        self.modalities = in_data if modalities is None else check_modalities(modalities)
        lacking = [name for name in self.modalities if name not in in_data]
        if lacking:
            raise ValueError(
                f"modalities do not match: {', '.join(lacking)} wanted, but {path} has {', '.join(in_data) or 'none'}."
            )

        present = np.array(table["present"][:]).reshape(len(table), len(in_data))
        shown = present[:, [in_data.index(name) for name in self.modalities]].any(axis=1)
        if not shown.all():
            table = table.select(np.flatnonzero(shown))
        self.anatomies, self.acquisitions = (_numbered(table, name) for name in ("anatomy_seed", "acquisition_seed"))
        self._images = [*self.modalities, MASK, *([LABELS] if LABELS in table.column_names else [])]
        table = table.select_columns(["subject", *self._images])
        for name in self._images:
            table = table.cast_column(name, datasets.Image(decode=False))
        self._table = table.with_format("arrow")
        first = next((array for array in self._decode_row(0)[1] if array is not None), None) if len(self) else None
        if first is None:
            raise ValueError(f"split {split!r} of {path} has no slice of {', '.join(self.modalities)}.")
        self.image_size = first.shape[0]
        self._shape = first.shape

    def _decode_row(self, index: int) -> tuple[str, list[np.ndarray | None], np.ndarray | None, np.ndarray | None]:
        """Subject, the modalities' arrays (uint16), mask and labels (uint8) of one item; `None` for what is missing."""
        row = self._table[int(index)]
        found = {LABELS: None}
        for name in self._images:
            data = row.column(name)[0].as_py()
            found[name] = None if data is None else np.asarray(Image.open(io.BytesIO(data["bytes"]), formats=["PNG"]))
        return row.column("subject")[0].as_py(), [found[name] for name in self.modalities], found[MASK], found[LABELS]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One slice as a dictionary, see the class."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        subject, arrays, mask, labels = self._decode_row(index)
        images = np.zeros((len(self.modalities), *self._shape), dtype=np.float32)
        for image, array in zip(images, arrays, strict=True):
            if array is not None:
                np.multiply(array, np.float32(1 / 65535), out=image)
        if labels is not None:
            mask = np.where(labels > 0, 255, 0)
        nothing = np.zeros(self._shape, np.uint8)
        item = {
            "images": torch.from_numpy(images),
            "present": torch.tensor([array is not None for array in arrays]),
            "mask": torch.from_numpy(((nothing if mask is None else mask) > 127).astype(np.float32)),
            "has_mask": torch.tensor(mask is not None),
            "labels": torch.from_numpy(np.array(nothing if labels is None else labels)),
            "has_labels": torch.tensor(labels is not None),
            "subject": subject,
        }
        if self.acquisitions is not None:
            item |= {"anatomy": int(self.anatomies[index]), "acquisition": int(self.acquisitions[index])}
        return item


def _numbered(table: datasets.Dataset, column: str) -> np.ndarray | None:
    """(N,) int, equal where the values of a column are; `None` without the column, or if a row has no value."""
    values = table[column][:] if column in table.column_names else [None]
    if None in values:
        return None
    return np.unique([str(value) for value in values], return_inverse=True)[1]
