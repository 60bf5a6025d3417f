"""Finds the scans of each subject: NIfTI files and DICOM series, one folder per subject, no file renamed.

    scans = find_scans("SCANS")

Files are told apart by their names, see `dldm_pipeline.modalities.find_modality`; `dldm_pipeline.data.volumes` reads them.
"""

import collections
import dataclasses
import os
from pathlib import Path
from typing import Any

from dldm_pipeline.modalities import CANONICAL_MODALITIES, MASK, find_modality

NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".ima")
_GENERIC_FOLDERS = ("anat", "nifti", "nii", "dicom")


@dataclasses.dataclass
class Scan:
    """The files of one subject at one time.

    Attributes:
        subject (`str`): Who it is; what the split goes by. Two sessions of one person have the same subject.
        source (`str`): The folder, relative to the root that was searched.
        files (`dict[str, Path]`): For each modality found, and `"mask"`, its NIfTI file or the folder of its DICOM
            series.
        series (`dict[str, str]`): For each modality that is a DICOM series, its SeriesInstanceUID.
        problem (`str`, *optional*): Why this scan cannot be used, if it is known from the names alone.
    """

    subject: str
    source: str
    files: dict[str, Path] = dataclasses.field(default_factory=dict)
    series: dict[str, str] = dataclasses.field(default_factory=dict)
    problem: str | None = None


@dataclasses.dataclass
class _Image:
    """One image that was found: a NIfTI file, or a DICOM series and the study it belongs to."""

    modality: str | None
    path: Path
    series: str | None = None
    study: str | None = None


def find_scans(root: str | os.PathLike) -> list[Scan]:
    """Find every subject's files below a folder.

    A folder that holds images with known names is one scan. It may be `root` itself, lie below it at any depth, or be a
    BIDS folder (`sub-01/ses-01/anat`, with lesion masks under `derivatives` too). A sub-folder with one image that is
    named like a modality counts to its parent (`patient/T1/image.nii`), and so do DICOM series of one study
    (`patient/series1/*.dcm`, `patient/series2/*.dcm`), which are told apart by their SeriesDescription.

    Sessions of one person must not fall into both splits: name them as BIDS does. Otherwise each folder is a subject.

    Args:
        root (`str` or `os.PathLike`): Folder to search.

    Returns:
        `list[Scan]`: The scans in order of their folders. Those that cannot be used have `problem` set.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is a file, or holds no image at all.
        ImportError: If there are DICOM files and pydicom is not installed.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; give the folder that holds one folder per subject.")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds one folder per subject.")

    by_folder: dict[Path, list[_Image]] = {}
    derived: list[Path] = []
    for here, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        folder = Path(here)
        images = _images_in(folder, sorted(names))
        if "derivatives" in folder.relative_to(root).parts:
            derived += [image.path for image in images if image.modality == MASK]
        elif images:
            by_folder[folder] = images
    if not by_folder:
        raise ValueError(
            f"{root} holds no scans: no .nii, .nii.gz or DICOM file was found in it or below; "
            "give the folder that holds one folder per subject."
        )

    single = [(folder, images[0]) for folder, images in by_folder.items() if len(images) == 1 and folder != root]
    studies = collections.Counter((folder.parent, image.study) for folder, image in single)
    parts = set()  # folders of one modality, which belong to their parent
    for folder, image in single:
        named = find_modality(folder.name)
        if named is not None and image.modality in (named, None):
            image.modality = named
            parts.add(folder)
        elif image.study is not None and studies[folder.parent, image.study] > 1:
            parts.add(folder)
    found: dict[Path, list[_Image]] = {}
    for folder, images in by_folder.items():
        found.setdefault(folder.parent if folder in parts else folder, []).extend(images)

    scans = [_make_scan(root, folder, images, derived) for folder, images in sorted(found.items())]
    if root not in found:
        covered = {folder.relative_to(root).parts[0] for folder in found} | {"derivatives"}
        for child in sorted(root.iterdir()):
            if child.is_dir() and child.name not in covered and not child.name.startswith("."):
                scans.append(Scan(child.name, child.name, problem="the folder holds no NIfTI file and no DICOM series"))
    return scans


def import_pydicom() -> Any:
    """The module pydicom. Raises ImportError with what to install if it is not there."""
    try:
        import pydicom
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: run `pip install pydicom` and try again.") from error
    return pydicom


def _images_in(folder: Path, names: list[str]) -> list[_Image]:
    """Every image that lies directly in a folder."""
    images = []
    series: dict[str, _Image] = {}
    for name in names:
        if name.startswith("."):
            continue
        if name.lower().endswith(NIFTI_SUFFIXES):
            # The subject's own name may hold a word that looks like a modality: lesion_t1_study/lesion_t1_study_t2.nii
            modality = find_modality(name.removeprefix(folder.name)) or find_modality(name)
            images.append(_Image(modality, folder / name))
        elif name.lower().endswith(DICOM_SUFFIXES) or ("." not in name and _is_dicom(folder / name)):
            header = import_pydicom().dcmread(folder / name, stop_before_pixels=True, force=True)
            uid = str(header.get("SeriesInstanceUID", ""))
            if uid and uid not in series:
                words = f"{header.get('SeriesDescription', '')} {header.get('ProtocolName', '')}"
                study = str(header.get("StudyInstanceUID", "")) or None
                series[uid] = _Image(find_modality(words.replace("/", " ")), folder, uid, study)
    return images + list(series.values())


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _make_scan(root: Path, folder: Path, images: list[_Image], derived: list[Path]) -> Scan:
    """Name the subject and sort its images by modality."""
    parts = list(folder.relative_to(root).parts)
    source = "/".join(parts) or root.resolve().name
    bids = next((at for at, part in enumerate(parts) if part.startswith("sub-")), None)
    if bids is not None:
        if not any(image.modality == MASK for image in images):
            wanted = {part for part in parts if part.startswith(("sub-", "ses-"))}
            images = images + [_Image(MASK, path) for path in derived if wanted <= set(path.parts)]
        parts = parts[: bids + 1]
    while parts and (parts[-1].lower() in _GENERIC_FOLDERS or parts[-1].startswith("ses-")):
        parts.pop()

    scan = Scan("/".join(parts) or root.resolve().name, source)
    for modality in (*CANONICAL_MODALITIES, MASK):
        these = [image for image in images if image.modality == modality]
        if len(these) > 1 and not scan.problem:
            names = ", ".join(image.path.name if image.series is None else f"series {image.series}" for image in these)
            scan.problem = f"{len(these)} files for {modality}: {names}; keep one, and one folder per subject"
        if these:
            scan.files[modality] = these[0].path
            if these[0].series is not None:
                scan.series[modality] = these[0].series
    if not set(scan.files) - {MASK}:
        names = ", ".join(image.path.name for image in images[:4])
        scan.problem = f"no file name tells a modality: {names}"
    return scan
