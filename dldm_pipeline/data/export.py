"""Synthetic subjects as files: a folder a subject with 16-bit PNG and NIfTI, every file marked as synthetic.

    FOLDER/manifest.json                                     how it was made, and what each file is
    FOLDER/sheet.png                                         the first subjects at a glance, tumour outlined
    FOLDER/synthetic-0000/synthetic-0000_t1.nii.gz, .png     one pair each modality
    FOLDER/synthetic-0000/synthetic-0000_seg.nii.gz, .png    the tumour mask

Names are BraTS-like, so what reads BraTS reads this, `training/prepare_dataset.py` included.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.slices import new_folder
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

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
) -> Path:
    """Write the subjects of a pipeline's output, a contact sheet and a manifest.

    Everything is written to a hidden folder beside `folder`, which takes its name at the end: it is there complete or not
    at all. Images hold 0 to 65535 for [0, 1]. NIfTI volumes have one axial slice, centred at the origin, in the
    orientation that `dldm_pipeline.data.volumes` gives its slices (row 0 anterior, column 0 the patient's right), and
    carry the notice in `descrip` and in a header extension; PNG files carry it as text.

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

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If `output` has no float images, not-a-number values, or modality names that give one file name.
        FileExistsError: If there is something in `folder` that may not be replaced.
        OSError: If `folder` cannot be written, or the disk is full.
    """
    images, masks = output.images, output.masks
    if torch.is_tensor(images):
        images, masks = images.cpu().numpy(), masks.cpu().numpy()
    if not isinstance(images, np.ndarray):
        raise ValueError("`output` has no float images to export; call the pipeline with `output_type='np'`.")
    if not np.isfinite(images).all():
        raise ValueError("`output.images` has values that are not numbers: the pipeline's weights are broken.")
    stems = [re.sub(r"[^a-z0-9]+", "-", name.lower()) for name in output.modalities]
    if len({*stems, "seg"}) != len(stems) + 1:
        raise ValueError(f"The modalities {output.modalities} do not give different file names; rename one.")
    height, width = masks.shape[1:]
    spacing = tuple(float(step) for step in pixel_spacing or (FIELD_OF_VIEW / height, FIELD_OF_VIEW / width))
    check_export_folder(folder, overwrite)
    manifest = {
        "synthetic": True,
        "notice": notice,
        "num_subjects": len(images),
        "modalities": list(output.modalities),
        "image_size": [height, width],
        "pixel_spacing_mm": spacing,
        "intensities": "0 to 65535 stands for [0, 1]; in the mask, what is not 0 is tumour",
        "seed": seed,
        "settings": dict(settings or {}),
        "checkpoint": None
        if checkpoint is None
        else {"name": Path(checkpoint).resolve().name, "sha256": checkpoint_hashes(checkpoint)},
        "versions": package_versions(),
        "subjects": [],
    }
    folder = Path(folder).absolute()
    # An export that is to be replaced stays until the new one is complete.
    target = folder.with_name(f".{folder.name}-new-{os.getpid()}") if overwrite and folder.exists() else folder
    with new_folder(target) as temporary:
        for k, (subject, mask) in enumerate(zip(tqdm(images, desc="export"), masks, strict=True)):
            name = f"synthetic-{k:04d}"
            (temporary / name).mkdir()
            files = {}
            grey = np.rint(np.clip(subject, 0, 1) * 65535).astype(np.uint16)
            for modality, stem, image in zip(output.modalities, stems, grey, strict=True):
                files[modality] = _write_image(temporary, f"{name}/{name}_{stem}", image, image, spacing, notice)
            label = (mask > 0).astype(np.uint8)
            files["mask"] = _write_image(temporary, f"{name}/{name}_seg", label, label * 255, spacing, notice)
            manifest["subjects"].append({"name": name, "files": files, "tumour_pixels": int(label.sum())})
        names = [subject["name"] for subject in manifest["subjects"][:SHEET_SUBJECTS]]
        shown = slice(0, SHEET_SUBJECTS)
        contact_sheet(images[shown], masks[shown], output.modalities, names, temporary / "sheet.png", outline_all=False)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if target != folder:
        old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
        folder.rename(old)
        target.rename(folder)
        shutil.rmtree(old)
    return folder


def check_export_folder(folder: str | os.PathLike, overwrite: bool = False) -> None:
    """Complain now rather than after generating if `export_subjects` cannot write `folder`.

    Raises:
        FileExistsError: If it is a file, or holds files and is not an earlier export to be overwritten.
        OSError: If it cannot be created.
    """
    folder = Path(folder).absolute()
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} is not empty; name another output folder, or overwrite it (--overwrite).")
        if not is_export(folder):
            raise FileExistsError(
                f"{folder} holds files and no manifest.json of synthetic subjects, so it is not overwritten; "
                "name another output folder."
            )
    elif folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name another output folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent).cleanup()
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {folder} ({error.strerror}); name a folder you may write to"
        ) from error


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


def _write_image(
    root: Path, stem: str, voxels: np.ndarray, pixels: np.ndarray, spacing: tuple[float, float], notice: str
) -> dict[str, str]:
    text = PngInfo()
    text.add_text("Synthetic", "true")
    text.add_text("Description", notice)
    Image.fromarray(pixels).save(root / f"{stem}.png", pnginfo=text)

    # NIfTI's axes point right, anterior and superior; the image's rows run to posterior and its columns to the left.
    volume = voxels.T[::-1, ::-1, None]
    affine = np.diag([spacing[1], spacing[0], 1.0, 1.0])
    affine[:2, 3] = [-(volume.shape[0] - 1) / 2 * spacing[1], -(volume.shape[1] - 1) / 2 * spacing[0]]
    nifti = nib.Nifti1Image(volume, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.header["descrip"] = b"SYNTHETIC image (dldm_pipeline). Not for diagnosis."
    comment = json.dumps({"synthetic": True, "notice": notice})
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", comment.encode()))
    nib.save(nifti, root / f"{stem}.nii.gz")
    return {"nifti": f"{stem}.nii.gz", "png": f"{stem}.png"}
