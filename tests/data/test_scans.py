"""Finding subjects by the names of their files; NIfTI files are not opened for it."""

from pathlib import Path

import pytest

from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.volumes import read_scan


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder / names[-1]


def write_header(path: Path, series: str, description: str, study: str) -> None:
    """Write a DICOM file without an image."""
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    item.SOPClassUID, item.SOPInstanceUID = pydicom.uid.MRImageStorage, pydicom.uid.generate_uid()
    item.SeriesInstanceUID, item.SeriesDescription = pydicom.uid.generate_uid(entropy_srcs=[series]), description
    item.StudyInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[study])
    item.ensure_file_meta()
    item.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    item.save_as(path, enforce_file_format=True)


def test_finds_one_folder_per_subject_and_a_single_subject(tmp_path: Path) -> None:
    touch(tmp_path / "HGG" / "case1", "case1_t1.nii.gz", "case1_flair.nii.gz", "case1_seg.nii.gz", ".hidden_t2.nii")
    touch(tmp_path / "HGG" / "t2_case", *(f"t2_case_{name}.nii.gz" for name in ("t1", "t1ce", "flair", "seg")), "a.txt")
    (tmp_path / "notes").mkdir()
    first, second, empty = find_scans(tmp_path)
    assert (first.subject, second.subject, second.source) == ("HGG/case1", "HGG/t2_case", "HGG/t2_case")
    assert list(first.files) == ["T1", "FLAIR", "mask"]
    assert list(second.files) == ["T1", "T1CE", "FLAIR", "mask"]
    assert empty.subject == "notes" and "no NIfTI file" in empty.problem
    (alone,) = find_scans(tmp_path / "HGG" / "case1")
    assert alone.subject == "case1" and list(alone.files) == ["T1", "FLAIR", "mask"]


def test_bids_sessions_are_one_subject(tmp_path: Path) -> None:
    for session in ("ses-01", "ses-02"):
        name = f"sub-01/{session}/anat/sub-01_{session}"
        touch(tmp_path, f"{name}_T1w.nii.gz", f"{name}_ce-gadolinium_T1w.nii.gz")
    touch(tmp_path, "sub-02/anat/sub-02_FLAIR.nii", "a_person/ses-1/t1.nii.gz")
    lesion = "manual/sub-01/ses-02/anat/sub-01_ses-02_label-lesion_mask.nii.gz"
    lesion = touch(tmp_path / "derivatives", lesion)
    person, one, two, three = find_scans(tmp_path)
    assert [scan.subject for scan in (person, one, two, three)] == ["a_person", "sub-01", "sub-01", "sub-02"]
    assert one.source == "sub-01/ses-01/anat" and list(one.files) == ["T1", "T1CE"]
    assert list(two.files) == ["T1", "T1CE", "mask"] and two.files["mask"] == lesion
    assert list(three.files) == ["FLAIR"]


def test_a_folder_for_each_modality(tmp_path: Path) -> None:
    touch(tmp_path / "p1", "T1/image.nii.gz", "T2/T2.nii.gz")
    (scan,) = find_scans(tmp_path)
    assert scan.subject == "p1" and list(scan.files) == ["T1", "T2"]


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        find_scans(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no scans"):
        find_scans(tmp_path)
    with pytest.raises(ValueError, match="file is a file"):
        find_scans(touch(tmp_path, "file"))


def test_names_that_cannot_be_used(tmp_path: Path) -> None:
    touch(tmp_path, "a/a_t1.nii.gz", "a/another_T1w.nii.gz", "b/scan.nii.gz")
    twice, unknown = find_scans(tmp_path)
    assert twice.problem.startswith("2 files for T1: a_t1.nii.gz, another_T1w.nii.gz")
    assert unknown.problem == "no file name tells a modality: scan.nii.gz"
    with pytest.raises(ValueError, match="2 files for T1"):
        read_scan(twice, ["T1"])


@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_dicom_series_of_a_study_are_one_subject(tmp_path: Path, suffix: str) -> None:
    for patient in ("p1", "p2"):
        for folder, description in (("a", "AX T1 SE"), ("FLAIR", "sequence 7"), ("b", "localizer")):
            for number in range(2):
                path = tmp_path / patient / folder / f"IM{number}{suffix}"
                write_header(path, patient + folder, description, study=patient)
    touch(tmp_path, "p1/a/README")  # no DICOM file
    scans = find_scans(tmp_path)
    assert [scan.subject for scan in scans] == ["p1", "p2"]
    assert all(list(scan.files) == ["T1", "FLAIR"] and not scan.problem for scan in scans)
    assert len({uid for scan in scans for uid in scan.series.values()}) == 4
    assert scans[0].files["T1"] == tmp_path / "p1" / "a"


def test_dicom_series_of_one_folder(tmp_path: Path) -> None:
    for name, description in (("a", "AX T1 SE"), ("b", "AX T2 FLAIR"), ("c", "AX T1 again")):
        write_header(tmp_path / "p1" / f"{name}.dcm", name, description, "study")
        (scan,) = find_scans(tmp_path)
        assert scan.subject == "p1"
    assert list(scan.files) == ["T1", "FLAIR"] and scan.problem.startswith("2 files for T1: series 1.")
