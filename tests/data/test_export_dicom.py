"""Synthetic subjects as DICOM: valid, marked, in place, and read back like NIfTI."""

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from dldm_pipeline.data.export import NOTICE, export_subjects
from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.volumes import read_scan
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

KINDS = ("t1", "flair", "wb", "seg")


@pytest.fixture(scope="module")
def folders(output, tmp_path_factory):
    """The same subjects as "dicom" and as "nifti"; the second one has no tumour."""
    root = tmp_path_factory.mktemp("dicom")
    output = DLDMPipelineOutput(**{**output, "masks": output.masks * [[[True]], [[False]]]})
    return {
        format: export_subjects(output, root / format, pixel_spacing=(1.3, 2 / 0.9), format=format)
        for format in ("dicom", "nifti")
    }


def test_a_study_a_subject_and_a_series_a_modality(output, folders, tmp_path):
    names = [f"synthetic-{k:04d}/synthetic-{k:04d}" for k in range(2)]
    expected = [f"{name}_{kind}.dcm" for name in names for kind in KINDS]
    folder = folders["dicom"]
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert found == sorted(["manifest.json", "sheet.png", *expected])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [file["dicom"] for subject in manifest["subjects"] for file in subject["files"].values()] == expected

    items = [pydicom.dcmread(folder / path) for path in expected]
    for key in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        values = [item[key].value for item in items]
        assert len(set(values)) == 2 and len(set(values[:4])) == 1, key
    for key in ("SeriesInstanceUID", "SOPInstanceUID"):
        assert len({item[key].value for item in items}) == 8, key
    one = DLDMPipelineOutput(**{**output, "images": output.images[:1], "masks": output.masks[:1]})
    again = pydicom.dcmread(export_subjects(one, tmp_path / "again", format="dicom") / expected[0])
    assert items[0].PatientID == again.PatientID and items[0].StudyInstanceUID != again.StudyInstanceUID


def test_every_file_says_that_it_is_synthetic(folders):
    for path in folders["dicom"].rglob("*.dcm"):
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
            assert item.BurnedInAnnotation == "NO" and item.DerivationDescription == item.ImageComments == NOTICE


def test_the_same_pixels_at_the_same_place_as_nifti(folders):
    for kind in KINDS:
        item = pydicom.dcmread(folders["dicom"] / f"synthetic-0000/synthetic-0000_{kind}.dcm")
        volume = nib.load(folders["nifti"] / f"synthetic-0000/synthetic-0000_{kind}.nii.gz")
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


def test_scans_are_read_like_nifti(output, folders, monkeypatch):
    rows = {}
    for format, folder in folders.items():
        scans = find_scans(folder)
        assert [scan.subject for scan in scans] == ["synthetic-0000", "synthetic-0001"]
        (rows[format],), notes = read_scan(scans[0], output.modalities, image_size=64, strict=True)
        assert notes == [] and rows[format]["mask"].any()
    for name in (*output.modalities, "mask"):
        np.testing.assert_array_equal(rows["dicom"][name], rows["nifti"][name])
    assert rows["dicom"]["pixel_spacing"] == pytest.approx(rows["nifti"]["pixel_spacing"])


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of Debian's dicom3tools")
def test_dicom_is_valid(folders):
    for path in folders["dicom"].rglob("*.dcm"):
        report = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        lines = (report.stdout + report.stderr).splitlines()
        assert "MRImage" in lines or "Segmentation" in lines
        # Synthetic Data came into the standard after Debian's version of 2022.
        assert [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line] == []


def test_without_highdicom_or_pydicom(output, folders, tmp_path, monkeypatch):
    scan = find_scans(folders["dicom"])[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == "highdicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match="pip install highdicom"):
        export_subjects(output, tmp_path / "other", format="dicom")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="synthetic-0000 has a DICOM Segmentation.*pip install highdicom"):
        read_scan(scan, output.modalities)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match="pip install pydicom"):
        find_scans(folders["dicom"])
