"""Reads volumes into aligned slices.

    for scan in find_scans("SCANS"):
        rows, notes = read_scan(scan, ["T1", "T1CE", "T2", "FLAIR"], image_size=128)

What happens to a scan, in this order:

1. The axes are turned to the closest canonical orientation (right, anterior, superior).
2. All volumes come to one voxel grid. A volume whose shape or affine differs from the others' is resampled, with a note
   that names the file, or refused if `strict`.
3. The brain is what differs from the background. Volumes are expected to be skull-stripped, where the background is one
   constant value; otherwise the head is taken for the brain.
4. Each volume is mapped to [0, 1] by one window: percentiles 0.5 and 99.8 of its own brain voxels, never per slice.
5. A segmentation with two or more of the values 1, 2 and 3 gives regions (`labels`): necrotic core, oedema and enhancing
   tumour. A 4 without a 3 is BraTS's older name of 3. One value alone is a binary mask. Other values give a
   mask without regions, with a note; so do 3 and 4 together, of which BraTS has had several meanings, and the segments of
   a DICOM Segmentation, whose numbers mean nothing. The mask is where the value is above 0, of fractions above a half.
6. Slices with tumour are kept; without a mask, those with at least 30 % of the largest slice's brain area.
7. One square box per subject is cut around the brain and resized: images with anti-aliasing, mask and labels with nearest
   neighbour, here and in step 2, so that no value between two labels comes up.

**Display convention.** Slices are axial and lie as radiologists look at them, from the feet: row 0 is anterior (the
nose is up), column 0 is the patient's right. `slice_index` counts from inferior to superior.
"""

import collections
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.processing import resample_from_to
from nibabel.spatialimages import HeaderDataError
from PIL import Image
from scipy import ndimage

from dldm_pipeline.data.scans import DICOM_SUFFIXES, Scan, import_pydicom
from dldm_pipeline.modalities import LABELS, MASK, check_modalities

WINDOW = (0.5, 99.8)  # percentiles of the brain voxels that become 0 and 1
MIN_BRAIN_AREA = 0.3  # of the largest slice's: below are the vertex and the brain stem
MIN_TUMOUR_PIXELS = 4  # after resizing; less is no label to learn from
BOX_MARGIN = 1.04  # side of the box over the brain's longest extent
_GRID_TOLERANCE = 1e-2  # mm and mm per voxel: publishers round affines
# What nibabel, gzip, pydicom and highdicom raise on a file that is damaged.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, ImageFileError, HeaderDataError)


@dataclasses.dataclass
class ScanReport:
    """What became of one scan: a line of the table that `training/prepare_dataset.py` prints.

    Attributes:
        subject (`str`): See `Scan`.
        source (`str`): See `Scan`.
        modalities (`tuple[str, ...]`): Wanted modalities that it has, then `"mask"` if it has one, and `"labels"` if that
            tells regions.
        slices (`int`): Number of slices taken.
        notes (`list[str]`): What was done to it that the user should know.
        left_out (`str`, *optional*): Why it was left out, if it was.
    """

    subject: str
    source: str
    modalities: tuple[str, ...] = ()
    slices: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    left_out: str | None = None


def read_scan(
    scan: Scan, modalities: Sequence[str], image_size: int = 128, strict: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Turn one scan into rows for `dldm_pipeline.data.slices.write_slices`.

    Args:
        scan (`Scan`): What to read, from `find_scans`.
        modalities (`Sequence[str]`): Modalities wanted. Those that the scan lacks are `None` in its rows.
        image_size (`int`, *optional*, defaults to 128): Height and width of the slices.
        strict (`bool`, *optional*, defaults to `False`): Refuse volumes of different grids instead of resampling them.

    Returns:
        `tuple[list[dict], list[str]]`: The rows (images float32 (image_size, image_size) in [0, 1], mask uint8 {0, 1}
        or `None`, labels uint8 {0, 1, 2, 3} or `None`), and notes on what was done.

    Raises:
        ValueError: If the scan cannot be used. The message names the file and says why.
    """
    if scan.problem:
        raise ValueError(scan.problem)
    wanted = [name for name in modalities if name in scan.files]
    if not wanted:
        raise ValueError(f"none of {', '.join(modalities)} among its files; it has {', '.join(scan.files)}")
    names = wanted + ([MASK] if MASK in scan.files else [])
    lacking = [name for name in modalities if name not in scan.files]
    notes = [f"lacks {', '.join(lacking)}"] if lacking else []

    volumes = {name: _load(scan, name) for name in names}
    has_regions = False
    if MASK in volumes:
        tumour, has_regions, note = _regions(np.asanyarray(volumes[MASK].dataobj), MASK in scan.series)
        if not tumour.any():
            raise ValueError(f"{scan.files[MASK].name} holds no tumour: no voxel is above 0.5")
        if note:
            notes.append(f"{scan.files[MASK].name} {note}: used as a mask without regions")
        volumes[MASK] = nib.Nifti1Image(tumour, volumes[MASK].affine)
    volumes = _to_one_grid(scan, volumes, strict, notes)
    spacing = next(iter(volumes.values())).header.get_zooms()[:3]
    tumour = np.asanyarray(volumes.pop(MASK).dataobj) if MASK in volumes else None

    # Float32 arrays from here on.
    arrays, brains = {}, {}
    for name in wanted:
        array = np.asanyarray(volumes.pop(name).dataobj).astype(np.float32)
        arrays[name], brains[name] = _window(array, scan.files[name].name)
    brain = np.logical_or.reduce(list(brains.values()))
    for name in wanted:
        fraction = np.count_nonzero(brains[name]) / np.count_nonzero(brain)
        if fraction < 0.95:
            notes.append(f"{scan.files[name].name} covers {fraction:.0%} of the brain only")

    areas = brain.sum(axis=(0, 1))
    if tumour is not None:
        outside = np.count_nonzero((tumour > 0) & ~brain) / max(np.count_nonzero(tumour), 1)
        if outside > 0.3:
            notes.append(f"{outside:.0%} of {scan.files[MASK].name} lies outside the brain: is it aligned?")
        chosen = np.flatnonzero(tumour.any(axis=(0, 1)) & (areas > 0))
    else:
        notes.append(f"no mask: all slices with at least {MIN_BRAIN_AREA:.0%} of the largest slice's brain area")
        chosen = np.flatnonzero(areas >= MIN_BRAIN_AREA * areas.max())
    box, side = _brain_box(brain, spacing)
    rows = []
    for index in chosen:
        labels = None
        if tumour is not None:
            labels = _cut(tumour[:, :, index], box, image_size, Image.Resampling.NEAREST).astype(np.uint8)
            if np.count_nonzero(labels) < MIN_TUMOUR_PIXELS:
                continue
        images: dict[str, np.ndarray | None] = dict.fromkeys(modalities)
        for name in wanted:
            image = _cut(arrays[name][:, :, index], box, image_size, Image.Resampling.BICUBIC)
            images[name] = np.clip(image, 0, 1)
        rows.append(
            {
                "subject": scan.subject,
                "slice_index": int(index),
                **images,
                MASK: None if labels is None else (labels > 0).astype(np.uint8),
                LABELS: labels if has_regions else None,
                "source": scan.source,
                "pixel_spacing": (side / image_size, side / image_size),
            }
        )
    if not rows:
        raise ValueError(f"no slice shows {MIN_TUMOUR_PIXELS} pixels of tumour at {image_size}x{image_size}")
    return rows, notes


def _load(scan: Scan, name: str) -> nib.Nifti1Image:
    """Read one volume, check its values, and turn it to canonical orientation. Integers stay integers, for memory."""
    path = scan.files[name]
    try:
        image = _load_dicom(path, scan.series[name]) if name in scan.series else nib.load(path)
        if len(image.shape) > 3 and set(image.shape[3:]) == {1}:
            image = image.slicer[:, :, :, 0]
        if len(image.shape) != 3:
            raise ValueError(f"{path.name} has shape {image.shape}; a volume of three dimensions is needed")
        slope, intercept = getattr(image.dataobj, "slope", 1), getattr(image.dataobj, "inter", 0)
        plain = slope == 1 and intercept == 0 and image.get_data_dtype().kind in "iu"
        data = np.asanyarray(image.dataobj) if plain else image.get_fdata(dtype=np.float32)
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing: {path}") from error
    except _UNREADABLE as error:
        if isinstance(error, ValueError) and str(error).startswith(path.name):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path.name} cannot be read, it is damaged or cut short ({reason})") from error

    if data.dtype.kind == "f" and not np.isfinite(data).all():
        number = data.size - int(np.isfinite(data).sum())
        raise ValueError(f"{path.name} has {number} voxels that are NaN or infinite")
    if data.min() == data.max() and name != MASK:
        raise ValueError(f"{path.name} is constant: every voxel is {data.flat[0]:g}")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path.name} has no usable affine, so its orientation is unknown")
    return nib.as_closest_canonical(nib.Nifti1Image(data, image.affine, dtype=data.dtype))


def _load_dicom(folder: Path, uid: str) -> nib.Nifti1Image:
    """Stack the files of one DICOM series along the normal of their slices, or read its one Segmentation."""
    pydicom = import_pydicom()
    slices = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.suffix.lower() in DICOM_SUFFIXES or not path.suffix):
            dataset = pydicom.dcmread(path, force=True)
            if str(dataset.get("SeriesInstanceUID", "")) == uid:
                slices.append(dataset)
    first = slices[0]
    if first.get("Modality") == "SEG":
        if len(slices) > 1:
            raise ValueError(f"{folder.name} has {len(slices)} DICOM Segmentations in one series; keep one")
        return _load_segmentation(folder, first)
    if not all("ImagePositionPatient" in item and "ImageOrientationPatient" in item for item in slices):
        raise ValueError(f"{folder.name} is no stack of slices: a file has no ImagePositionPatient")
    along_row, along_column = np.reshape(np.asarray(first.ImageOrientationPatient, dtype=float), (2, 3))
    normal = np.cross(along_row, along_column)
    slices.sort(key=lambda item: float(np.dot(normal, np.asarray(item.ImagePositionPatient, dtype=float))))
    positions = np.array([item.ImagePositionPatient for item in slices], dtype=float)
    steps = np.diff(positions @ normal)
    if len(slices) == 1:
        step = normal * float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1)
    elif steps.min() > 0 and steps.max() - steps.min() <= 0.1 * np.median(steps):
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
    else:
        raise ValueError(f"{folder.name} has {len(slices)} slices at uneven distances: one is missing or there twice")
    # DICOM: row spacing first; its axes point left and posterior, NIfTI's right and anterior.
    between_rows, between_columns = (float(value) for value in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    planes = [
        item.pixel_array.T * float(item.get("RescaleSlope", 1)) + float(item.get("RescaleIntercept", 0))
        for item in slices
    ]
    return nib.Nifti1Image(np.stack(planes, axis=-1).astype(np.float32), affine)


def _load_segmentation(folder: Path, dataset: Any) -> nib.Nifti1Image:
    """A DICOM Segmentation as a volume of its segments' numbers, 0 outside."""
    try:
        from highdicom.seg import Segmentation
    except ImportError as error:
        raise ValueError(
            f"{folder.name} has a DICOM Segmentation, which needs highdicom to be read: run `pip install highdicom`"
        ) from error
    volume = Segmentation.from_dataset(dataset, copy=False).get_volume(combine_segments=True, skip_overlap_checks=True)
    return nib.Nifti1Image(volume.array, volume.get_affine("RAS"), dtype=volume.array.dtype)


def _same_grid(one: nib.Nifti1Image, other: nib.Nifti1Image) -> bool:
    return one.shape == other.shape and np.allclose(one.affine, other.affine, atol=_GRID_TOLERANCE)


def _to_one_grid(
    scan: Scan, volumes: dict[str, nib.Nifti1Image], strict: bool, notes: list[str]
) -> dict[str, nib.Nifti1Image]:
    """Bring all volumes to the grid that most of them share, the first in order if there is a tie."""
    images = [name for name in volumes if name != MASK]
    reference = max(images, key=lambda name: sum(_same_grid(volumes[name], volumes[other]) for other in images))
    grid = volumes[reference]
    for name, volume in volumes.items():
        if _same_grid(volume, grid):
            continue
        reference_name = scan.files[reference].name
        if volume.shape != grid.shape:
            what = f"has shape {volume.shape}, {reference_name} has {grid.shape}"
        else:
            what = f"has another affine than {reference_name}"
        if strict:
            raise ValueError(f"{scan.files[name].name} {what}; register it, or run without --strict to resample it")
        volumes[name] = resample_from_to(volume, grid, order=0 if name == MASK else 1)
        data = np.asanyarray(volumes[name].dataobj)
        if data.min() == data.max():
            raise ValueError(f"{scan.files[name].name} {what}, and the two do not overlap")
        notes.append(f"{scan.files[name].name} {what}: resampled")
    return volumes


def _regions(values: np.ndarray, is_dicom: bool) -> tuple[np.ndarray, bool, str]:
    """A segmentation as uint8 labels, or as 0 and 1 without regions. Returns it, whether it has regions, and why not.

    A scale factor in the file leaves whole numbers a little off. Of fractions, what is above a half is tumour.
    """
    found = np.unique(values[np.abs(values) > 1e-3])
    whole = np.rint(found)
    labels = np.rint(values)
    fits = set(whole) <= {1, 2, 3, 4} and not {3, 4} <= set(whole) and np.abs(found - whole).max(initial=0) < 1e-3
    if fits and not is_dicom and len(set(whole)) > 1:
        return np.where(labels == 4, 3, labels).astype(np.uint8), True, ""
    mask = (labels > 0).astype(np.uint8)
    if len(found) == 1 and fits and whole[0] > 1 and not is_dicom:
        return mask, False, f"has the one value {whole[0]:g}, which may be a region or the whole tumour"
    if len(found) < 2:
        return mask, False, ""
    shown = ", ".join(f"{value:g}" for value in found[:6]) + (", ..." if len(found) > 6 else "")
    if is_dicom:
        return mask, False, f"has several segments ({shown}), whose numbers do not say which region each is"
    return mask, False, f"has the values {shown}; regions are 1, 2 and 3, or 4 in place of 3"


def _window(array: np.ndarray, filename: str) -> tuple[np.ndarray, np.ndarray]:
    """Map a volume to [0, 1] by percentiles of its brain. Returns it and the brain (bool)."""
    # Skull-stripping leaves one constant value around the brain; the corners all have it.
    corner = array[0, 0, 0]
    background = array == corner
    stripped = np.count_nonzero(background) > 0.2 * array.size
    brain = ~background if stripped else array > _otsu(array)
    if np.count_nonzero(brain) < 100:
        raise ValueError(f"{filename} shows no brain: only {np.count_nonzero(brain)} voxels differ from the background")
    low, high = np.percentile(array[brain], WINDOW)
    if not high > low:
        raise ValueError(f"{filename} is constant inside the brain: its voxels are {low:g}")
    array -= low
    array /= high - low
    np.clip(array, 0, 1, out=array)
    if stripped:
        array[background] = 0  # a z-scored volume has darker brain than background
    return array, brain


def _otsu(array: np.ndarray) -> float:
    """Otsu's threshold: the grey value that parts air from tissue with the greatest variance between the two."""
    counts, edges = np.histogram(array, bins=256, range=(float(array.min()), float(np.percentile(array, 99.8))))
    values = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    above = counts.sum() - below
    mean_below = np.cumsum(counts * values)[:-1] / np.maximum(below, 1)
    mean_above = (np.sum(counts * values) - np.cumsum(counts * values)[:-1]) / np.maximum(above, 1)
    return float(edges[1 + np.argmax(below * above * (mean_below - mean_above) ** 2)])


def _brain_box(brain: np.ndarray, spacing: Sequence[float]) -> tuple[tuple[float, float, float, float], float]:
    """The square around the brain, in display axes, the same for all slices.

    Returns (left, top, right, bottom) in pixels of the displayed slice, and the side in mm.
    """
    # A coarse copy is enough to drop specks that do not belong to the brain, and far quicker to label.
    step = 2 if min(brain.shape) >= 64 else 1
    labels, number = ndimage.label(brain[::step, ::step, ::step])
    sizes = np.bincount(labels.ravel())[1:]
    x, y, _ = ndimage.find_objects(labels)[int(np.argmax(sizes))] if number else (slice(0), slice(0), None)
    width, height = brain.shape[0], brain.shape[1]
    # Display turns both axes round, see `_cut`.
    left, right = width - min(x.stop * step, width), width - x.start * step
    top, bottom = height - min(y.stop * step, height), height - y.start * step
    side = BOX_MARGIN * max((right - left) * spacing[0], (bottom - top) * spacing[1])
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    half_x, half_y = side / spacing[0] / 2, side / spacing[1] / 2
    return (middle_x - half_x, middle_y - half_y, middle_x + half_x, middle_y + half_y), float(side)


def _cut(plane: np.ndarray, box: tuple[float, float, float, float], size: int, method: Image.Resampling) -> np.ndarray:
    """Cut the box out of an axial plane (right, anterior), in display orientation, and resize it; outside is 0."""
    image = plane[::-1, ::-1].T
    pad = int(np.ceil(max(0, -box[0], -box[1], box[2] - image.shape[1], box[3] - image.shape[0]))) + 1
    image = np.pad(image, pad).astype(np.float32)
    shifted = tuple(edge + pad for edge in box)
    # Pillow widens its filters when it shrinks an image, which is the anti-aliasing.
    return np.asarray(Image.fromarray(image).resize((size, size), method, box=shifted))


def read_scans(
    scans: Iterable[Scan],
    modalities: Sequence[str],
    image_size: int = 128,
    strict: bool = False,
    num_workers: int = 1,
) -> Iterator[tuple[ScanReport, list[dict[str, Any]]]]:
    """Read scans one after the other, in order, at most `num_workers + 1` of them in memory.

    Args:
        scans (`Iterable[Scan]`): What to read, from `find_scans`.
        modalities (`Sequence[str]`): Modalities wanted.
        image_size (`int`, *optional*, defaults to 128): Height and width of the slices.
        strict (`bool`, *optional*, defaults to `False`): Stop at the first scan that cannot be used, and refuse to
            resample.
        num_workers (`int`, *optional*, defaults to 1): Threads that read; most of the work is in zlib, NumPy and
            Pillow, which let other threads run.

    Yields:
        `tuple[ScanReport, list[dict]]`: What became of a scan, and its rows; no rows if it was left out.

    Raises:
        ValueError: With `strict`, if a scan cannot be used. The message names folder and file.
    """
    modalities = check_modalities(modalities)

    def read(scan: Scan) -> tuple[ScanReport, list[dict[str, Any]]]:
        has = tuple(name for name in (*modalities, MASK) if name in scan.files)
        try:
            rows, notes = read_scan(scan, modalities, image_size, strict)
            has += (LABELS,) if rows[0][LABELS] is not None else ()
        except (
            ValueError,
            TypeError,
            OverflowError,
            MemoryError,
        ) as error:  # of damaged headers and odd types of voxels
            if strict:
                raise ValueError(f"{scan.source}: {error}.") from error
            odd = "" if isinstance(error, ValueError) else "a file is damaged or holds no plain numbers: "
            return ScanReport(scan.subject, scan.source, has, left_out=f"{odd}{error}"), []
        return ScanReport(scan.subject, scan.source, has, len(rows), notes), rows

    with ThreadPoolExecutor(num_workers) as pool:
        waiting: collections.deque[Future] = collections.deque()
        try:
            for scan in scans:
                waiting.append(pool.submit(read, scan))
                if len(waiting) > num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
