"""Synthetic subjects as files, every one of them marked as synthetic.

    FOLDER/manifest.json                                     how it was made, and what each file is
    FOLDER/sheet.png                                         the first subjects at a glance, tumour outlined

and in format "nifti" or "dicom" a folder a subject,

    FOLDER/synthetic-0000/synthetic-0000_t1.nii.gz, .png     one pair each modality; or .dcm
    FOLDER/synthetic-0000/synthetic-0000_seg.nii.gz, .png    the tumour mask; or .dcm

or in format "dataset" what `SliceDataset` and the training scripts read:

    FOLDER/README.md                                         a data card
    FOLDER/data/train-00000-of-00001.parquet, ...            see `dldm_pipeline.data.slices`

Names are BraTS-like, so what reads BraTS reads this; `training/prepare_dataset.py` reads "nifti" and "dicom".
"""

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from dldm_pipeline.data.export_dicom import write_dicom
from dldm_pipeline.data.files import new_folder, write_text
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.slices import data_card, write_slices
from dldm_pipeline.modalities import LABELS, MASK
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

FORMATS = ("nifti", "dicom", "dataset")
NOTICE = "Synthetic image drawn by a generative model. It shows no patient. Not for diagnosis."
TRANSLATION_NOTICE = (
    "Synthetic image drawn by a generative model from other images of the subject. It was never acquired. "
    "Not for diagnosis."
)
FIELD_OF_VIEW = 195.0
"""Side of an image in mm where no pixel spacing is given: the mean of the simulated subjects, whose brains fill the image."""
SHEET_SUBJECTS = 16
_PACKAGES = ("dldm_pipeline", "torch", "diffusers", "numpy", "nibabel", "pillow")


def export_subjects(
    output: DLDMPipelineOutput,
    folder: str | os.PathLike,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike | None = None,
    pixel_spacing: tuple[float, float] | None = None,
    overwrite: bool = False,
    notice: str = NOTICE,
    format: str = "nifti",
) -> Path:
    """Write the subjects of a pipeline's output, a contact sheet and a manifest.

    Everything is written to a hidden folder beside `folder`, which takes its name at the end: it is there complete or not
    at all. Images hold 0 to 65535 for [0, 1]. NIfTI and DICOM images are one axial slice, centred at the origin, in the
    orientation that `dldm_pipeline.data.volumes` gives its slices (row 0 anterior, column 0 the patient's right).

    - `"nifti"`: NIfTI, marked in `descrip` and by the notice in a header extension, and 16-bit PNG with the notice as text.
      The tumour's NIfTI holds the labels of its regions where the pipeline knows them.
    - `"dicom"`: one study a subject, a series of one MR image a modality and a DICOM Segmentation, see
      [`~data.export_dicom.write_dicom`].
    - `"dataset"`: rows as `prepare_dataset.py` writes them, split by subject; `source` is the notice.

    Args:
        output (`DLDMPipelineOutput`): From a call with `output_type="np"` or `"pt"`.
        folder (`str` or `os.PathLike`): Folder to create; it must not exist, or be empty.
        seed (`int`, *optional*): Seed the subjects were drawn with, for the manifest.
        settings (`Mapping`, *optional*): Other arguments of the call, for the manifest; what JSON can hold.
        checkpoint (`str` or `os.PathLike`, *optional*): Folder of the pipeline; the manifest gets its files' SHA-256.
        pixel_spacing (`tuple[float, float]`, *optional*): Distance between rows, then columns, in mm. By default as if the
            image were 195 mm wide: a generated subject has no true size.
        overwrite (`bool`, *optional*, defaults to `False`): Replace the export that is in `folder`; other files are
            never replaced.
        notice (`str`, *optional*): What every file says of itself; `TRANSLATION_NOTICE` for what shows a real anatomy.
        format (`str`, *optional*, defaults to `"nifti"`): One of `"nifti"`, `"dicom"` (needs highdicom), `"dataset"`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If `output` has no float images, not-a-number values, or modality names that give one file name; or
            there is no such `format`.
        ImportError: If `format` is `"dicom"` and highdicom is not installed.
        FileExistsError: If there is something in `folder` that may not be replaced.
        OSError: If `folder` cannot be written, or the disk is full.
    """
    images, labels = output.images, output.masks if output.labels is None else output.labels
    if torch.is_tensor(images):
        images, labels = images.cpu().numpy(), labels.cpu().numpy()
    if not isinstance(images, np.ndarray):
        raise ValueError("`output` has no float images to export; call the pipeline with `output_type='np'`.")
    if not np.isfinite(images).all():
        raise ValueError("`output.images` has values that are not numbers: the pipeline's weights are broken.")
    if len({*map(_file_word, output.modalities), "seg"}) != len(output.modalities) + 1:
        raise ValueError(f"The modalities {output.modalities} do not give different file names; rename one.")
    images, labels = np.clip(images, 0, 1), labels.astype(np.uint8)
    regions = output.labels is not None
    height, width = labels.shape[1:]
    spacing = tuple(float(step) for step in pixel_spacing or (FIELD_OF_VIEW / height, FIELD_OF_VIEW / width))
    check_export_folder(folder, overwrite, format)
    manifest = {
        "synthetic": True,
        "notice": notice,
        "format": format,
        "num_subjects": len(images),
        "modalities": list(output.modalities),
        "image_size": [height, width],
        "pixel_spacing_mm": spacing,
        "intensities": "0 to 65535 stands for [0, 1]; in the mask, what is not 0 is tumour"
        + (": 1 necrotic core, 2 oedema, 3 enhancing tumour (NIfTI only)" if regions else ""),
        "seed": seed,
        "settings": dict(settings or {}),
        "checkpoint": checkpoint and {"name": Path(checkpoint).resolve().name, "sha256": checkpoint_hashes(checkpoint)},
        "versions": package_versions(),
        "subjects": [
            {"name": f"synthetic-{k:04d}", "files": {}, "tumour_pixels": int((label > 0).sum())}
            for k, label in enumerate(labels)
        ],
    }
    folder = Path(folder).absolute()
    with new_folder(folder, overwrite) as temporary:
        subjects = tqdm(list(zip(manifest["subjects"], images, labels, strict=True)), desc="export")
        if format == "dataset":
            _write_dataset(temporary, subjects, output.modalities, height, spacing, notice, regions)
        else:
            for entry, subject, label in subjects:
                grey = dict(zip(output.modalities, np.rint(subject * 65535).astype(np.uint16), strict=True))
                entry["files"] = _write_subject(temporary, entry["name"], grey, label, spacing, notice, format)
        names = [subject["name"] for subject in manifest["subjects"][:SHEET_SUBJECTS]]
        shown, coloured = labels[:SHEET_SUBJECTS], labels[:SHEET_SUBJECTS] if regions else None
        path = temporary / "sheet.png"
        contact_sheet(images[:SHEET_SUBJECTS], shown, output.modalities, names, path, labels=coloured)
        write_text(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return folder


def check_export_folder(folder: str | os.PathLike, overwrite: bool = False, format: str = "nifti") -> None:
    """Complain now rather than after generating if `export_subjects` cannot write `folder` in this format.

    Raises:
        ValueError: If there is no such format.
        ImportError: If a package that the format needs is not installed.
        FileExistsError: If it is a file, or holds files and is not an earlier export to be overwritten.
        OSError: If it cannot be created.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not known; take one of {', '.join(FORMATS)}.")
    if format == "dicom" and importlib.util.find_spec("highdicom") is None:
        raise ImportError("writing DICOM needs highdicom: run `pip install highdicom` and try again.")
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name another output folder.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} is not empty; name another output folder, or overwrite it (--overwrite).")
        if not is_export(folder):
            reason = "holds files and no manifest.json of synthetic subjects, so it is not overwritten"
            raise FileExistsError(f"{folder} {reason}; name another output folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent).cleanup()
    except OSError as error:
        reason = f"cannot write {folder} ({error.strerror}); name a folder you may write to"
        raise OSError(error.errno, reason) from error


def is_export(folder: str | os.PathLike) -> bool:
    """Whether a folder was written by `export_subjects`: its manifest.json says `"synthetic": true`."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("synthetic") is True


def checkpoint_hashes(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each safetensors file below a folder, by its path there; what `sha256sum` prints.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(folder)
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors file; a pipeline folder (save_pretrained) is needed.")
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def package_versions() -> dict[str, str]:
    """Versions of what the images depend on; "not installed" for a package that runs from its source folder."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _file_word(modality: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", modality.lower())


def _write_subject(
    root: Path,
    name: str,
    images: dict[str, np.ndarray],
    label: np.ndarray,
    spacing: tuple[float, float],
    notice: str,
    format: str,
) -> dict[str, dict[str, str]]:
    """Write one subject's folder. Returns the files of each modality and the mask, relative to `root`."""
    (root / name).mkdir()
    stems = {key: f"{name}/{name}_{_file_word(key)}" for key in images} | {MASK: f"{name}/{name}_seg"}
    if format == "dicom":
        files = [root / f"{stem}.dcm" for stem in stems.values()]
        write_dicom(
            files, images, (label > 0).astype(np.uint8), name, spacing, notice, package_versions()["dldm_pipeline"]
        )
        return {key: {"dicom": f"{stem}.dcm"} for key, stem in stems.items()}
    for stem, pixels in zip(stems.values(), (*images.values(), label), strict=True):
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


def _write_dataset(
    root: Path,
    subjects: Iterable[tuple[dict, np.ndarray, np.ndarray]],
    modalities: list[str],
    image_size: int,
    spacing: tuple[float, float],
    notice: str,
    regions: bool,
) -> None:
    rows = (
        {
            "subject": entry["name"],
            "slice_index": 0,
            **dict(zip(modalities, images, strict=True)),
            MASK: label > 0,
            LABELS: label if regions else None,
            "source": notice,
            "pixel_spacing": spacing,
        }
        for entry, images, label in subjects
    )
    summary = write_slices(rows, root, modalities)
    title = "Synthetic aligned multi-modal brain MRI slices"
    origin = f"{notice} `manifest.json` says how they were made."
    card = data_card(title, modalities, image_size, summary, origin, "sheet.png", ["synthetic"])
    write_text(root / "README.md", card)
