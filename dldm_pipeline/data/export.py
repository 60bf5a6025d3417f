"""Synthetic subjects as files, every one of them marked as synthetic.

    FOLDER/manifest.json                                     how it was made, and what each file is
    FOLDER/sheet.png                                         the first subjects at a glance, tumour outlined

and in format "nifti" or "dicom" a folder a subject,

    FOLDER/synthetic-0000/synthetic-0000_t1.nii.gz, .png     one pair each modality; or .dcm
    FOLDER/synthetic-0000/synthetic-0000_seg.nii.gz, .png    the tumour mask; or .dcm

or in format "dataset" what `SliceDataset` and the training scripts read:

    FOLDER/README.md                                         a data card
    FOLDER/data/train-00000-of-00001.parquet, ...            see `dldm_pipeline.data.slices`

Names are BraTS-like, so what reads BraTS reads this; `training/prepare_dataset.py` reads "nifti" and "dicom". The manifest is
written last: where it is, the export is complete.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dldm_pipeline.data.export_blocks import (
    Block,
    file_word,
    finish_export,
    start_export,
    unfinished_manifest,
    write_block,
)
from dldm_pipeline.data.files import new_folder
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

FORMATS = ("nifti", "dicom", "dataset")
NOTICE = "Synthetic image drawn by a generative model. It shows no patient. Not for diagnosis."
TRANSLATION_NOTICE = (
    "Synthetic image drawn by a generative model from other images of the subject. It was never acquired. "
    "Not for diagnosis."
)
FIELD_OF_VIEW = 195.0
"""Side of an image in mm where no pixel spacing is given: the mean of the simulated subjects, whose brains fill the image."""
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
    at all. For more subjects than fit into memory, see `dldm_pipeline.data.generation`. Images hold 0 to 65535 for [0, 1].
    NIfTI and DICOM images are one axial slice, centred at the origin, in the orientation that `dldm_pipeline.data.volumes`
    gives its slices (row 0 anterior, column 0 the patient's right).

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
    block = Block.from_output(output)
    manifest = new_manifest(
        len(block.images),
        output.modalities,
        block.labels.shape[1:],
        regions=output.labels is not None,
        seed=seed,
        settings=settings,
        checkpoint=checkpoint,
        pixel_spacing=pixel_spacing,
        notice=notice,
        format=format,
    )
    check_export_folder(folder, overwrite, format)
    folder = Path(folder).absolute()
    with new_folder(folder, overwrite) as temporary:
        start_export(temporary, manifest)
        write_block(temporary, block)
        finish_export(temporary)
    return folder


def new_manifest(
    num_subjects: int,
    modalities: Sequence[str],
    image_size: tuple[int, int],
    regions: bool = False,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike | None = None,
    pixel_spacing: tuple[float, float] | None = None,
    notice: str = NOTICE,
    format: str = "nifti",
    block_size: int | None = None,
) -> dict[str, Any]:
    """The manifest of an export before there are subjects, for [`~data.export_blocks.start_export`].

    Args:
        num_subjects (`int`): Number of subjects.
        modalities (`Sequence[str]`): n names.
        image_size (`tuple[int, int]`): Height and width in pixels.
        regions (`bool`, *optional*, defaults to `False`): Whether the regions of tumours are known.
        seed, settings, checkpoint, pixel_spacing, notice, format: As in [`export_subjects`].
        block_size (`int`, *optional*): Subjects that are written together; all by default.

    Raises:
        ValueError: If modality names give one file name.
        FileNotFoundError: If `checkpoint` holds no weights.
    """
    if len({*map(file_word, modalities), "seg"}) != len(modalities) + 1:
        raise ValueError(f"The modalities {modalities} do not give different file names; rename one.")
    height, width = image_size
    return {
        "synthetic": True,
        "notice": notice,
        "format": format,
        "num_subjects": num_subjects,
        "block_size": block_size or num_subjects,
        "modalities": list(modalities),
        "image_size": [height, width],
        "pixel_spacing_mm": [float(step) for step in pixel_spacing or (FIELD_OF_VIEW / height, FIELD_OF_VIEW / width)],
        "intensities": "0 to 65535 stands for [0, 1]; in the mask, what is not 0 is tumour"
        + (": 1 necrotic core, 2 oedema, 3 enhancing tumour (NIfTI only)" if regions else ""),
        "regions": regions,
        "seed": seed,
        "settings": dict(settings or {}),
        "checkpoint": checkpoint and {"name": Path(checkpoint).resolve().name, "sha256": checkpoint_hashes(checkpoint)},
        "versions": package_versions(),
    }


def continues_export(folder: str | os.PathLike, manifest: Mapping[str, Any], overwrite: bool = False) -> bool:
    """Whether `folder` holds an unfinished export of this manifest, with which to go on.

    The device, the number of threads, the size of blocks and the versions of packages may differ.

    Args:
        folder (`str` or `os.PathLike`): Folder of an export.
        manifest (`Mapping`): From [`new_manifest`].
        overwrite (`bool`, *optional*, defaults to `False`): Whether an unfinished export of another manifest may be
            replaced.

    Raises:
        FileExistsError: If there is one that may not be replaced. The message names what differs.
    """
    begun = unfinished_manifest(folder)
    if begun is None:
        return False
    before, now = _subjects_described(begun), _subjects_described(json.loads(json.dumps(manifest)))
    different = [name for name in now if before.get(name) != now[name]]
    if different and not overwrite:
        name = different[0]
        value = "files of another checkpoint" if name == "checkpoint" else f"{name} {before.get(name)}, not {now[name]}"
        raise FileExistsError(
            f"{folder} holds an unfinished export with {value}; go on with the command that began it, name another output "
            "folder, or replace it (--overwrite)."
        )
    return not different


def _subjects_described(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two manifests of the same subjects and files have in common."""
    settings = dict(manifest["settings"])
    names = ("format", "modalities", "seed", "image_size", "pixel_spacing_mm", "regions", "notice")
    return {
        "num_subjects": manifest["num_subjects"] // settings.get("appearances", 1),
        "checkpoint": (manifest["checkpoint"] or {}).get("sha256"),
        **{name: manifest[name] for name in names},
        **{name: value for name, value in settings.items() if name not in ("device", "num_threads")},
    }


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
    """Whether a folder holds an export, complete or not: its manifest.json says `"synthetic": true`."""
    if unfinished_manifest(folder) is not None:
        return True
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("synthetic") is True


def checkpoint_hashes(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each safetensors and JSON file below a folder, by its path there; what `sha256sum` prints.

    Raises:
        FileNotFoundError: If there is no safetensors file.
    """
    folder = Path(folder)
    files = sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")])
    if not any(path.suffix == ".safetensors" for path in files):
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
