"""Rows of the slice table (see `dldm_pipeline.data.slices`) as parquet: the schema, the checks and the encoding of a row."""

import io
import json
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dldm_pipeline.modalities import LABELS, MASK, RESERVED_NAMES, SIMULATED, check_modalities

SCHEMA_VERSION = 2
"""Raised when a reader of older data sets could misread newer ones."""

VERSION_KEY = b"dldm_pipeline.schema_version"
ROWS_PER_GROUP = 64  # rows held in memory while writing, and read at once by a streaming reader
_COMPRESS_LEVEL = 1  # zlib: level 1 writes 16-bit slices several times faster than the default and 5 % larger


def slice_features(modalities: Sequence[str]) -> datasets.Features:
    """The schema of a slice table with these modalities: the columns of the module's docstring, in that order."""
    modalities = check_modalities(modalities)
    return datasets.Features(
        {
            "subject": datasets.Value("string"),
            "slice_index": datasets.Value("int32"),
            **{name: datasets.Image() for name in modalities},
            "present": datasets.Sequence(datasets.Value("bool")),
            MASK: datasets.Image(),
            LABELS: datasets.Image(),
            "source": datasets.Value("string"),
            "pixel_spacing": datasets.Sequence(datasets.Value("float32")),
            "anatomy_seed": datasets.Sequence(datasets.Value("int64")),
            "acquisition_seed": datasets.Sequence(datasets.Value("int64")),
            "height": datasets.Value("float64"),
            "factors": datasets.Value("string"),
        }
    )


def write_rows(rows: Iterable[dict[str, Any]], path: str | os.PathLike, modalities: Sequence[str]) -> dict[str, int]:
    """Encode rows as they come into one parquet file of the schema.

    Args:
        rows (`Iterable[dict]`): As `write_slices` takes them.
        path (`str` or `os.PathLike`): File to write; not atomic.
        modalities (`Sequence[str]`): Names of the modalities, in the order of the columns.

    Returns:
        `dict[str, int]`: The number of rows of each subject.

    Raises:
        ValueError: If a row does not fit the schema. The message names subject and slice.
    """
    modalities = check_modalities(modalities)
    schema = slice_features(modalities).arrow_schema
    schema = schema.with_metadata({**schema.metadata, VERSION_KEY: str(SCHEMA_VERSION)})
    subjects: dict[str, int] = {}
    size = None
    pending: list[dict[str, Any]] = []
    # PNG is compressed already.
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for row in rows:
            pending.append(_encode_row(row, modalities, size))
            if size is None:
                size = next(np.shape(row[name]) for name in modalities if row.get(name) is not None)
            subjects[row["subject"]] = subjects.get(row["subject"], 0) + 1
            if len(pending) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending.clear()
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema=schema))
    return subjects


def _encode(array: np.ndarray) -> dict[str, Any]:
    """PNG bytes of a uint16 or uint8 array, in the form in which `datasets` stores an image."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=_COMPRESS_LEVEL)
    return {"bytes": buffer.getvalue(), "path": None}


def _encode_row(row: dict[str, Any], modalities: tuple[str, ...], size: tuple[int, int] | None) -> dict[str, Any]:
    """Check a row and turn its arrays into PNG. `size` is what earlier rows had."""
    if not row.get("subject"):
        raise ValueError(f"a row has no subject: its keys are {sorted(row)}.")
    where = f"subject {row['subject']}, slice {row.get('slice_index')}"
    encoded: dict[str, Any] = {"subject": row["subject"], "slice_index": int(row["slice_index"])}
    unknown = set(row) - {*modalities, *RESERVED_NAMES}
    if unknown:
        raise ValueError(f"{where}: unknown modalities {sorted(unknown)}; this data set has {list(modalities)}.")
    if row.get(LABELS) is not None:
        row = {**row, MASK: _mask_of_labels(row, where)}
    for name in (*modalities, MASK, LABELS):
        image = row.get(name)
        if image is None:
            encoded[name] = None
            continue
        image = np.asarray(image)
        size = image.shape if size is None else size
        if image.ndim != 2 or image.shape != size:
            raise ValueError(f"{where}: {name} has shape {image.shape}, not {size}; all slices must have one 2-D size.")
        if name == MASK and image.dtype.kind == "f" and np.isnan(image).any():
            raise ValueError(f"{where}: mask has values that are not numbers; give 0 and 1, or None if it is unknown.")
        if name == MASK:
            encoded[name] = _encode(np.where(image != 0, 255, 0).astype(np.uint8))
        elif name == LABELS:
            encoded[name] = _encode(image.astype(np.uint8))
        else:
            encoded[name] = _encode(_pixels(image, f"{where}: {name}"))
    encoded["present"] = [encoded[name] is not None for name in modalities]
    if not any(encoded["present"]):
        raise ValueError(f"{where}: none of {', '.join(modalities)} is there; leave such slices out.")
    encoded["source"] = row.get("source") or ""
    encoded["pixel_spacing"] = [float(step) for step in row.get("pixel_spacing") or (1.0, 1.0)]
    try:
        for name in ("anatomy_seed", "acquisition_seed"):
            seed = row.get(name)
            seed = [seed] if isinstance(seed, (int, np.integer)) else seed
            encoded[name] = None if seed is None else [operator.index(number) for number in seed]
        encoded["height"] = None if row.get("height") is None else float(row["height"])
        factors = row.get("factors")
        encoded["factors"] = None if factors is None else json.dumps(dict(factors), allow_nan=False, default=float)
    except (TypeError, ValueError) as error:
        shown = {name: row.get(name) for name in SIMULATED if name != "factors"}
        raise ValueError(
            f"{where}: {shown} and factors must be whole numbers, a height and a dict: {error}."
        ) from error
    return encoded


def _pixels(image: np.ndarray, where: str) -> np.ndarray:
    """A float image in [0, 1] as uint16; uint16 is as it should be."""
    if image.dtype == np.uint16:
        return image
    low, high = image.min(), image.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails this, too
        raise ValueError(f"{where} has values from {low} to {high}; they must lie in [0, 1].")
    return np.rint(np.clip(image, 0, 1) * 65535).astype(np.uint16)


def _mask_of_labels(row: dict[str, Any], where: str) -> np.ndarray:
    """The whole tumour of a row with labels, which must be 0 to 3 and agree with its mask if it has one."""
    labels, mask = np.asarray(row[LABELS]), row.get(MASK)
    if labels.dtype == bool:
        raise ValueError(f"{where}: labels is boolean, as a mask; give it as mask, or 1, 2 and 3 for the regions.")
    if not np.isin(labels, range(4)).all():
        raise ValueError(f"{where}: labels has values {np.unique(labels)[:9].tolist()}; they must be 0, 1, 2 or 3.")
    if mask is not None and not np.array_equal(np.asarray(mask) != 0, labels > 0):
        raise ValueError(f"{where}: mask and labels disagree; the mask is where the labels are not 0, or leave it out.")
    return labels > 0
