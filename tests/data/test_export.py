"""Exported subjects: what is in the files, that they read back as scans, and that nothing is lost or half-written."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys

import datasets
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

import dldm_pipeline.data.export as module
from dldm_pipeline.data.export import NOTICE, check_export_folder, checkpoint_hashes, export_subjects
from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.data.volumes import read_scan
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

NAMES = ["T1", "FLAIR", "WB"]


def make_output(count=2, size=64) -> DLDMPipelineOutput:
    """Ellipses for heads, darker to the back and to one side, with a tumour at the front left of the image."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    head = (x / 0.75) ** 2 + (y / 0.9) ** 2 < 1
    masks = np.repeat(((x + 0.35) ** 2 + (y + 0.4) ** 2 < 0.02)[None], count, axis=0)
    tissue = 0.5 - 0.15 * y - 0.1 * x + 0.05 * rng.random((count, len(NAMES), size, size))
    return DLDMPipelineOutput(
        images=(np.where(masks[:, None], 0.9, tissue) * head).astype(np.float32),
        masks=masks,
        structure=torch.zeros(count, 4, 8, 8),
        styles=torch.zeros(count, len(NAMES), 3),
        modalities=NAMES,
    )


@pytest.fixture(scope="module")
def output() -> DLDMPipelineOutput:
    return make_output()


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_and_manifest(output, tmp_path):
    weights = tmp_path / "pipeline" / "unet" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    folder = export_subjects(
        output, tmp_path / "out", seed=7, settings={"num_inference_steps": 3}, checkpoint=tmp_path / "pipeline"
    )
    names = [f"synthetic-{k:04d}" for k in range(2)]
    kinds = ["t1", "flair", "wb", "seg"]
    expected = [f"{n}/{n}_{kind}{end}" for n in names for kind in kinds for end in (".png", ".nii.gz")]
    assert files_of(folder) == sorted(["manifest.json", "sheet.png", *expected])

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["synthetic"] is True and "Not for diagnosis" in manifest["notice"]
    assert manifest["seed"] == 7 and manifest["settings"] == {"num_inference_steps": 3}
    assert manifest["modalities"] == NAMES and manifest["num_subjects"] == 2
    assert manifest["checkpoint"]["sha256"] == {"unet/model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in manifest["versions"]
    for subject, mask in zip(manifest["subjects"], output.masks, strict=True):
        assert subject["tumour_pixels"] == mask.sum()
        for pair in subject["files"].values():
            assert (folder / pair["nifti"]).is_file() and (folder / pair["png"]).is_file()


def test_png_and_nifti_hold_the_images_to_16_bits_and_the_mark(output, tmp_path):
    folder = export_subjects(output, tmp_path / "out", pixel_spacing=(1.5, 2.0))
    for kind, image in zip(["t1", "flair", "wb"], output.images[1], strict=True):
        stem = folder / "synthetic-0001" / f"synthetic-0001_{kind}"
        with Image.open(f"{stem}.png") as png:
            assert png.mode == "I;16" and png.text["Synthetic"] == "true"
            pixels = np.asarray(png)
        np.testing.assert_allclose(pixels / 65535, image, atol=1 / 65535)
        nifti = nib.load(f"{stem}.nii.gz")
        assert nifti.shape == (64, 64, 1) and nifti.get_data_dtype() == np.uint16
        assert nifti.header.get_zooms() == (2.0, 1.5, 1.0)
        assert nib.aff2axcodes(nifti.affine) == ("R", "A", "S")
        assert b"SYNTHETIC" in nifti.header["descrip"].item()
        assert b"Not for diagnosis" in nifti.header.extensions[0].get_content()
        # x to the right, y to anterior; the image has the patient's right on the left and anterior on top
        assert np.array_equal(np.asarray(nifti.dataobj)[:, :, 0], pixels[::-1, ::-1].T)
    with Image.open(folder / "synthetic-0001" / "synthetic-0001_seg.png") as png:
        assert np.array_equal(np.asarray(png) > 0, output.masks[1]) and png.text["Synthetic"] == "true"


def test_dicom_is_a_study_a_subject_and_a_series_a_modality(output, tmp_path):
    folder = export_subjects(output, tmp_path / "out", format="dicom")
    names = [f"synthetic-{k:04d}/synthetic-{k:04d}" for k in range(2)]
    expected = [f"{name}_{kind}.dcm" for name in names for kind in ("t1", "flair", "wb", "seg")]
    assert files_of(folder) == sorted(["manifest.json", "sheet.png", *expected])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [file["dicom"] for subject in manifest["subjects"] for file in subject["files"].values()] == expected

    for key, number in (
        ("PatientID", 2),
        ("StudyInstanceUID", 2),
        ("FrameOfReferenceUID", 2),
        ("SeriesInstanceUID", 8),
        ("SOPInstanceUID", 8),
    ):
        values = [str(pydicom.dcmread(folder / path)[key].value) for path in expected]
        assert len(set(values)) == number, key
        assert number == 8 or (values[0] == values[3] != values[4]), key
    again = export_subjects(output, tmp_path / "again", format="dicom")
    one, other = (pydicom.dcmread(root / expected[0]) for root in (folder, again))
    assert one.PatientID == other.PatientID and one.StudyInstanceUID != other.StudyInstanceUID


def test_dicom_says_that_it_is_synthetic(output, tmp_path):
    folder = export_subjects(output, tmp_path / "out", format="dicom")
    for path in folder.rglob("*.dcm"):
        item = pydicom.dcmread(path)
        assert item.SyntheticData == "YES" and item.ContentQualification == "RESEARCH"
        assert item.ImageType[0] == "DERIVED" and item.PatientComments == NOTICE
        assert str(item.PatientName).startswith("SYNTHETIC^") and item.PatientID.startswith("synthetic-")
        assert "SYNTHETIC" in item.StudyDescription and "SYNTHETIC" in item.SeriesDescription
        assert item.Manufacturer == "dldm_pipeline" and "no scanner" in item.ManufacturerModelName
        assert "Acquisition Equipment" not in str(item)
        if item.Modality == "MR":
            assert list(item.ImageType) == ["DERIVED", "SECONDARY", "OTHER"]
            assert item.ScanningSequence == "RM" and item.EchoTime is None
            assert item.BurnedInAnnotation == "NO" and item.DerivationDescription == NOTICE


def test_dicom_holds_the_same_pixels_at_the_same_place_as_nifti(output, tmp_path):
    spacing = (1.3, 2 / 0.9)
    dicom = export_subjects(output, tmp_path / "dicom", pixel_spacing=spacing, format="dicom")
    nifti = export_subjects(output, tmp_path / "nifti", pixel_spacing=spacing)
    stem = "synthetic-0001/synthetic-0001"
    for kind in ("t1", "flair", "wb", "seg"):
        item = pydicom.dcmread(dicom / f"{stem}_{kind}.dcm")
        volume = nib.load(nifti / f"{stem}_{kind}.nii.gz")
        if kind == "seg":
            shared, frame = item.SharedFunctionalGroupsSequence[0], item.PerFrameFunctionalGroupsSequence[0]
            position = frame.PlanePositionSequence[0].ImagePositionPatient
            orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
            steps = shared.PixelMeasuresSequence[0].PixelSpacing
        else:
            assert item.pixel_array.dtype == np.uint16 and item.BitsStored == 16
            position, orientation, steps = item.ImagePositionPatient, item.ImageOrientationPatient, item.PixelSpacing
        # PS3.3 C.7.6.2.1.1, then from left and posterior to right and anterior
        rows, columns = np.mgrid[:64, :64]
        along_row, along_column = np.reshape(np.array(orientation, float), (2, 3))
        points = np.array(position, float) + steps[1] * columns[..., None] * along_row
        points = (points + steps[0] * rows[..., None] * along_column) * [-1, -1, 1]
        voxels = nib.affines.apply_affine(np.linalg.inv(volume.affine), points)
        np.testing.assert_allclose(voxels, np.rint(voxels), atol=1e-6)
        i, j, k = np.moveaxis(np.rint(voxels).astype(int), -1, 0)
        np.testing.assert_array_equal(np.asarray(volume.dataobj)[i, j, k], item.pixel_array)


def test_dicom_is_imported_like_nifti(output, tmp_path):
    rows = {}
    for format in ("nifti", "dicom"):
        scans = find_scans(export_subjects(output, tmp_path / format, format=format))
        assert [scan.subject for scan in scans] == ["synthetic-0000", "synthetic-0001"]
        (rows[format],), notes = read_scan(scans[1], NAMES, image_size=64, strict=True)
        assert notes == []
    for name in (*NAMES, "mask"):
        np.testing.assert_array_equal(rows["dicom"][name], rows["nifti"][name])
    assert rows["dicom"]["mask"].any()
    assert rows["dicom"]["pixel_spacing"] == pytest.approx(rows["nifti"]["pixel_spacing"])


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of Debian's dicom3tools")
def test_dicom_is_valid(output, tmp_path):
    output = DLDMPipelineOutput(**{**output, "masks": output.masks * [[[True]], [[False]]]})  # one without a tumour
    for path in export_subjects(output, tmp_path / "out", format="dicom").rglob("*.dcm"):
        report = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        lines = (report.stdout + report.stderr).splitlines()
        assert "MRImage" in lines or "Segmentation" in lines
        # Synthetic Data came into the standard after Debian's version of 2022.
        assert [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line] == []


def test_dicom_needs_highdicom(output, tmp_path, monkeypatch):
    folder = export_subjects(output, tmp_path / "out", format="dicom")
    for name in [name for name in sys.modules if name.partition(".")[0] == "highdicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match="pip install highdicom"):
        export_subjects(output, tmp_path / "other", format="dicom")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="synthetic-0000 has a DICOM Segmentation.*pip install highdicom"):
        read_scan(find_scans(folder)[0], NAMES)


def test_data_set_to_train_on(output, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = export_subjects(output, tmp_path / "out", format="dataset")
    shards = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation")]
    assert files_of(folder) == sorted(["README.md", "manifest.json", "sheet.png", *shards])
    items = {item["subject"]: item for split in ("train", "validation") for item in SliceDataset(folder, split)}
    assert sorted(items) == ["synthetic-0000", "synthetic-0001"]
    for k, item in enumerate(items[name] for name in sorted(items)):
        np.testing.assert_allclose(item["images"], output.images[k], atol=1 / 65535)
        assert np.array_equal(item["mask"], output.masks[k]) and item["has_mask"] and item["present"].all()
    loaded = datasets.load_dataset(str(folder))  # with the card, the sheet and the manifest beside the shards
    assert loaded["train"]["source"] == loaded["validation"]["source"] == [NOTICE]
    assert loaded["train"][0]["pixel_spacing"] == pytest.approx([195 / 64, 195 / 64])
    card = (folder / "README.md").read_text()
    assert "- synthetic" in card and NOTICE in card
    export_subjects(output, folder, format="dicom", overwrite=True)
    assert not (folder / "data").exists()


def test_an_export_reads_back_as_scans_without_renaming(output, tmp_path):
    folder = export_subjects(output, tmp_path / "out")
    scans = find_scans(folder)
    assert [scan.subject for scan in scans] == ["synthetic-0000", "synthetic-0001"]
    rows, _ = read_scan(scans[0], NAMES, image_size=64, strict=True)
    assert len(rows) == 1
    # The reader windows intensities and cuts to the brain again; what lies where must survive.
    for name, image in zip(NAMES, output.images[0], strict=True):
        as_written, mirrored, upside_down = (
            np.corrcoef(rows[0][name].ravel(), other.ravel())[0, 1] for other in (image, image[:, ::-1], image[::-1])
        )
        assert as_written > max(mirrored, upside_down) + 0.05
    centre, expected = (np.argwhere(mask).mean(axis=0) for mask in (rows[0]["mask"], output.masks[0]))
    assert np.abs(centre - expected).max() < 5


def test_tensors_export_like_arrays(output, tmp_path):
    tensors = DLDMPipelineOutput(
        images=torch.from_numpy(output.images),
        masks=torch.from_numpy(output.masks),
        structure=output.structure,
        styles=output.styles,
        modalities=NAMES,
    )
    one, other = export_subjects(output, tmp_path / "np"), export_subjects(tensors, tmp_path / "pt")
    assert files_of(one) == files_of(other)
    name = "synthetic-0000/synthetic-0000_t1.png"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_full_folder_is_kept(output, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="out is not empty"):
        export_subjects(output, folder)
    with pytest.raises(FileExistsError, match="not overwritten"):
        export_subjects(output, folder, overwrite=True)
    assert files_of(tmp_path) == ["out/thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        check_export_folder(folder / "thesis.txt")


def test_overwrite_replaces_an_export_whole(output, tmp_path):
    folder = export_subjects(output, tmp_path / "out")
    export_subjects(make_output(1), folder, seed=5, overwrite=True)
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 5
    assert not (folder / "synthetic-0001").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["dicom", "dataset"])
def test_broken_off_leaves_nothing(output, tmp_path, monkeypatch, format):
    def contact_sheet(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "contact_sheet", contact_sheet)
    with pytest.raises(KeyboardInterrupt):
        export_subjects(output, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_half_written(output, tmp_path, monkeypatch, overwrite):
    if overwrite:
        export_subjects(output, tmp_path / "out", seed=1)
    before = files_of(tmp_path)
    written = []

    def save(nifti, path):
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.nib, "save", save)
    with pytest.raises(OSError, match="disk is full"):
        export_subjects(output, tmp_path / "out", overwrite=overwrite)
    assert files_of(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == overwrite


def test_a_folder_that_cannot_be_made_is_named(output, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file/out"):
        check_export_folder(tmp_path / "file" / "out")
    with pytest.raises(OSError, match="cannot write .*file/out"):
        export_subjects(output, tmp_path / "file" / "out")


def test_outputs_without_float_images_are_refused(output, tmp_path):
    for images in (None, [[Image.new("L", (4, 4))] * 3] * 2):
        bare = DLDMPipelineOutput(images, None, output.structure, output.styles, NAMES)
        with pytest.raises(ValueError, match="output_type='np'"):
            export_subjects(bare, tmp_path / "out")
    broken = DLDMPipelineOutput(output.images * np.nan, output.masks, output.structure, output.styles, NAMES)
    with pytest.raises(ValueError, match="not numbers"):
        export_subjects(broken, tmp_path / "out")
    same = DLDMPipelineOutput(output.images, output.masks, output.structure, output.styles, ["T1", "t1", "WB"])
    with pytest.raises(ValueError, match="file names"):
        export_subjects(same, tmp_path / "out")
    with pytest.raises(ValueError, match="format 'jpeg' is not known; take one of nifti, dicom, dataset"):
        export_subjects(output, tmp_path / "out", format="jpeg")
    assert not list(tmp_path.iterdir())


def test_hashes_need_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        checkpoint_hashes(tmp_path)
