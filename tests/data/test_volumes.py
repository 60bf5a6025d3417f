"""Real volumes into slices, on small made-up brains."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.volumes import read_scan, read_scans

SHAPE = (40, 48, 24)
RAS = np.diag([1.0, 1.0, 1.0, 1.0])


def make_brain(contrast: float = 100.0) -> np.ndarray:
    """A brain (right, anterior, superior) whose front is brighter than its back and right brighter than its left."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    inside = (x / 0.7) ** 2 + (y / 0.9) ** 2 + (z / 0.9) ** 2 < 1
    return np.where(inside, contrast * (3 + 2 * y + x), 0).astype(np.float32)


def make_mask() -> np.ndarray:
    """A tumour in the right frontal lobe, in slices 8 to 13."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[25:31, 30:36, 8:14] = 4
    return mask


def save(path: Path, data: np.ndarray, affine: np.ndarray = RAS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def make_subject(folder: Path, names: tuple[str, ...] = ("t1", "flair"), mask: bool = True) -> Path:
    for number, name in enumerate(names):
        save(folder / f"{folder.name}_{name}.nii.gz", make_brain(100 + 50 * number))
    if mask:
        save(folder / f"{folder.name}_seg.nii.gz", make_mask())
    return folder


def read(folder: Path, names: tuple[str, ...] = ("T1", "FLAIR"), **options) -> tuple[list[dict], list[str]]:
    (scan,) = find_scans(folder)
    return read_scan(scan, names, 32, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def test_finds_one_folder_per_subject_and_a_single_subject(tmp_path: Path) -> None:
    make_subject(tmp_path / "HGG" / "case1")
    make_subject(tmp_path / "HGG" / "case2", ("t1", "t1ce", "t2", "flair"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "HGG" / "case2" / "readme.txt").write_text("")
    first, second, empty = find_scans(tmp_path)
    assert (first.subject, second.subject, second.source) == ("HGG/case1", "HGG/case2", "HGG/case2")
    assert list(second.files) == ["T1", "T1CE", "T2", "FLAIR", "mask"]
    assert empty.subject == "notes" and "no NIfTI file" in empty.problem
    (alone,) = find_scans(tmp_path / "HGG" / "case1")
    assert alone.subject == "case1" and list(alone.files) == ["T1", "FLAIR", "mask"]


def test_bids_sessions_are_one_subject(tmp_path: Path) -> None:
    for session in ("ses-01", "ses-02"):
        anat = tmp_path / "sub-01" / session / "anat"
        save(anat / f"sub-01_{session}_T1w.nii.gz", make_brain())
        save(anat / f"sub-01_{session}_ce-gadolinium_T1w.nii.gz", make_brain())
    save(tmp_path / "sub-02" / "anat" / "sub-02_FLAIR.nii", make_brain())
    lesion = save(
        tmp_path / "derivatives" / "manual" / "sub-01" / "ses-02" / "anat" / "sub-01_ses-02_label-lesion_mask.nii.gz",
        make_mask(),
    )
    one, two, three = find_scans(tmp_path)
    assert [scan.subject for scan in (one, two, three)] == ["sub-01", "sub-01", "sub-02"]
    assert one.source == "sub-01/ses-01/anat" and list(one.files) == ["T1", "T1CE"]
    assert list(two.files) == ["T1", "T1CE", "mask"] and two.files["mask"] == lesion
    assert list(three.files) == ["FLAIR"]


def test_a_folder_for_each_modality(tmp_path: Path) -> None:
    save(tmp_path / "p1" / "T1" / "image.nii.gz", make_brain())
    save(tmp_path / "p1" / "T2" / "T2.nii.gz", make_brain())
    (scan,) = find_scans(tmp_path)
    assert scan.subject == "p1" and list(scan.files) == ["T1", "T2"]


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        find_scans(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no scans"):
        find_scans(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        find_scans(tmp_path / "file")


def test_names_that_cannot_be_used(tmp_path: Path) -> None:
    make_subject(tmp_path / "a")
    save(tmp_path / "a" / "another_T1w.nii.gz", make_brain())
    save(tmp_path / "b" / "scan.nii.gz", make_brain())
    twice, unknown = find_scans(tmp_path)
    assert twice.problem.startswith("2 files for T1: a_t1.nii.gz, another_T1w.nii.gz")
    assert unknown.problem == "no file name tells a modality: scan.nii.gz"
    with pytest.raises(ValueError, match="2 files for T1"):
        read_scan(twice, ["T1"])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_rows_are_tumour_slices_in_radiological_display(tmp_path: Path) -> None:
    make_subject(tmp_path)
    rows, notes = read(tmp_path, ("T1", "T2", "FLAIR"))
    assert [row["slice_index"] for row in rows] == list(range(8, 14)) and notes == ["lacks T2"]
    row = rows[3]
    image, mask = row["T1"], row["mask"]
    assert image.shape == mask.shape == (32, 32) and image.dtype == np.float32 and row["T2"] is None
    assert image.min() == 0 and 0.9 < image.max() <= 1 and set(np.unique(mask)) == {0, 1}
    middle = slice(14, 18)
    assert image[8, middle].mean() > image[24, middle].mean() + 0.2, "anterior is up"
    assert image[middle, 10].mean() > image[middle, 22].mean() + 0.05, "the patient's right is on the left"
    ys, xs = np.nonzero(mask)
    assert ys.max() < 16 and xs.max() < 16, "right frontal tumour"
    # 0.9 of a half-axis of 24 mm, hence about 43 mm, and its margin
    assert row["pixel_spacing"][0] == row["pixel_spacing"][1] == pytest.approx(44 / 32, rel=0.06)
    np.testing.assert_allclose(row["T1"], row["FLAIR"], atol=1e-3)  # the window takes the scale away


@settings(max_examples=12, deadline=None)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_any_orientation_gives_the_same_slices(
    tmp_path_factory: pytest.TempPathFactory, axes: list[int], flips: tuple[bool, ...]
) -> None:
    plain = make_subject(tmp_path_factory.mktemp("plain"))
    turned = tmp_path_factory.mktemp("turned")
    signs = np.where(flips, -1.0, 1.0)
    for path in plain.iterdir():
        image = nib.load(path)
        orientation = np.column_stack([np.argsort(axes), signs])
        save(turned / path.name, *_reorient(image, orientation))
    for one, other in zip(read(plain)[0], read(turned)[0], strict=True):
        assert one["slice_index"] == other["slice_index"]
        np.testing.assert_allclose(one["T1"], other["T1"], atol=1e-5)
        np.testing.assert_array_equal(one["mask"], other["mask"])


def _reorient(image: nib.Nifti1Image, orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    turned = image.as_reoriented(orientation)
    return np.asarray(turned.dataobj), turned.affine


@settings(max_examples=8, deadline=None)
@given(st.floats(0.5, 3.0), st.floats(0.5, 3.0))
def test_pixels_come_out_square(tmp_path_factory: pytest.TempPathFactory, dx: float, dy: float) -> None:
    folder = tmp_path_factory.mktemp("subject")
    save(folder / "t1.nii.gz", make_brain(), np.diag([dx, dy, 1, 1]))
    rows, _ = read(folder, ("T1",))
    image = max((row["T1"] for row in rows), key=np.count_nonzero)
    height, width = (np.count_nonzero((image > 0.02).any(axis=axis)) for axis in (1, 0))
    tall, wide = 0.9 * 48 * dy, 0.7 * 40 * dx  # mm
    spacing = rows[0]["pixel_spacing"][0]
    assert max(height, width) >= 28
    # A voxel counts as a whole, and one more pixel on each side by interpolation.
    assert height == pytest.approx(tall / spacing, abs=2.5 + dy / spacing)
    assert width == pytest.approx(wide / spacing, abs=2.5 + dx / spacing)


def test_without_a_mask_the_brain_slices(tmp_path: Path) -> None:
    make_subject(tmp_path, mask=False)
    rows, notes = read(tmp_path)
    assert 12 <= len(rows) <= 22 and all(row["mask"] is None for row in rows)
    assert "no mask: all slices" in notes[0]


def test_one_window_per_volume(tmp_path: Path) -> None:
    brain = make_brain()
    brain[:, :, :10] *= 0.5
    save(tmp_path / "t1.nii.gz", brain)
    rows = {row["slice_index"]: row["T1"] for row in read(tmp_path, ("T1",))[0]}
    assert rows[8].max() < 0.6 < 0.85 < rows[12].max()


def test_negative_values_and_noise_in_air(tmp_path: Path) -> None:
    brain = make_brain()
    scored = np.where(brain > 0, (brain - 300) / 100, 0)  # z-scored: background brighter than dark brain
    save(tmp_path / "scored" / "t1.nii.gz", scored.astype(np.float32))
    noise = np.abs(np.random.default_rng(0).normal(0, 5, SHAPE))
    save(tmp_path / "noisy" / "t1.nii.gz", (brain + noise).astype(np.float32))
    for folder in ("scored", "noisy"):
        rows, _ = read(tmp_path / folder, ("T1",))
        assert rows[0]["T1"][0, 0] < 0.05 and rows[len(rows) // 2]["T1"][16, 16] > 0.2
        assert rows[0]["pixel_spacing"][0] == pytest.approx(44 / 32, rel=0.1)


def test_another_grid_is_resampled_or_refused(tmp_path: Path) -> None:
    make_subject(tmp_path, ("t1", "t2", "flair"))
    path = tmp_path / f"{tmp_path.name}_flair.nii.gz"
    save(path, make_brain(150)[::2], np.diag([2.0, 1, 1, 1]))
    rows, notes = read(tmp_path, ("T1", "T2", "FLAIR"))
    (note,) = (note for note in notes if note.endswith(": resampled"))
    assert "_flair.nii.gz has shape (20, 48, 24)" in note
    assert len(rows) == 6
    one, other = rows[2]["T1"], rows[2]["FLAIR"]  # the same brain in both, but for the rim
    assert np.corrcoef(one[8:24, 8:24].ravel(), other[8:24, 8:24].ravel())[0, 1] > 0.995
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.95
    with pytest.raises(ValueError, match=r"_flair.nii.gz has shape \(20, 48, 24\), .*_t1.nii.gz has \(40, 48, 24\)"):
        read(tmp_path, ("T1", "T2", "FLAIR"), strict=True)

    moved = RAS.copy()
    moved[0, 3] = 1.5
    save(path, make_brain(), moved)
    assert "_flair.nii.gz has another affine" in read(tmp_path)[1][0]
    with pytest.raises(ValueError, match="has another affine"):
        read(tmp_path, strict=True)
    moved[0, 3] = 500
    save(path, make_brain(), moved)
    with pytest.raises(ValueError, match="do not overlap"):
        read(tmp_path)


def _nan(path: Path) -> None:
    data = make_brain()
    data[20, 20, 10] = np.nan
    save(path, data)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def _cut_short_inside(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:5000]))


def _scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3000:3100] = bytes(100)
    path.write_bytes(data)


def _unknown_type(path: Path) -> None:
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[70:72] = (9999).to_bytes(2, "little")  # NIfTI's field `datatype`
    path.write_bytes(gzip.compress(data))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_nan, "_t1.nii.gz has 1 voxels that are NaN"),
        (_cut_short, "_t1.nii.gz cannot be read, it is damaged or cut short"),
        (_cut_short_inside, "_t1.nii.gz cannot be read, it is damaged or cut short"),
        (_scramble, "_t1.nii.gz cannot be read, it is damaged or cut short"),
        (_unknown_type, "_t1.nii.gz cannot be read, it is damaged or cut short"),
        (lambda path: path.write_bytes(b"not a scan"), "_t1.nii.gz cannot be read"),
        (lambda path: path.write_bytes(b""), "_t1.nii.gz cannot be read"),
        (lambda path: path.unlink(), "_t1.nii.gz is missing"),
        (lambda path: save(path, np.full(SHAPE, 7, np.int16)), "_t1.nii.gz is constant: every voxel is 7"),
        (lambda path: save(path, (make_brain() > 0).astype(np.int16)), "_t1.nii.gz is constant inside the brain"),
        (lambda path: save(path, np.stack([make_brain()] * 2, -1)), r"_t1.nii.gz has shape \(40, 48, 24, 2\)"),
    ],
)
def test_bad_volumes(tmp_path: Path, spoil, message: str) -> None:
    make_subject(tmp_path)
    (scan,) = find_scans(tmp_path)
    spoil(scan.files["T1"])
    with pytest.raises(ValueError, match=message):
        read_scan(scan, ["T1", "FLAIR"], 32)


def test_bad_masks(tmp_path: Path) -> None:
    make_subject(tmp_path)
    mask = tmp_path / f"{tmp_path.name}_seg.nii.gz"
    save(mask, np.zeros(SHAPE, np.uint8))
    with pytest.raises(ValueError, match="_seg.nii.gz holds no tumour"):
        read(tmp_path)
    speck = np.zeros(SHAPE, np.uint8)
    speck[20, 20, 10] = 1
    save(mask, speck)
    with pytest.raises(ValueError, match="no slice shows 4 pixels of tumour at 32x32"):
        read(tmp_path)


def test_none_of_the_wanted_modalities(tmp_path: Path) -> None:
    make_subject(tmp_path)
    with pytest.raises(ValueError, match="none of WB, BB among its files; it has T1, FLAIR, mask"):
        read(tmp_path, ("WB", "BB"))


def test_a_trailing_axis_of_one_is_dropped(tmp_path: Path) -> None:
    save(tmp_path / "t1.nii", make_brain()[..., None])
    assert len(read(tmp_path, ("T1",))[0]) > 10


@pytest.mark.parametrize("num_workers", [1, 2])
def test_read_scans_leaves_out_the_bad_and_keeps_the_order(tmp_path: Path, num_workers: int) -> None:
    for number in range(4):
        make_subject(tmp_path / f"p{number}")
    _nan(tmp_path / "p1" / "p1_t1.nii.gz")
    scans = find_scans(tmp_path)
    reports = [report for report, _ in read_scans(scans, ["T1", "FLAIR"], 32, num_workers=num_workers)]
    assert [report.subject for report in reports] == ["p0", "p1", "p2", "p3"]
    assert [report.slices for report in reports] == [6, 0, 6, 6]
    assert "p1_t1.nii.gz has 1 voxels that are NaN" in reports[1].left_out
    assert reports[0].modalities == ("T1", "FLAIR", "mask")
    with pytest.raises(ValueError, match="p1: p1_t1.nii.gz has 1 voxels"):
        list(read_scans(scans, ["T1", "FLAIR"], 32, strict=True, num_workers=num_workers))


# ---------------------------------------------------------------------------------------------------------------------
# DICOM


def write_series(folder: Path, volume: np.ndarray, description: str, suffix: str = ".dcm", study: str = "s") -> None:
    """Write a (right, anterior, superior) volume as axial DICOM files, in a shuffled order of names."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid()
    width, height, number = volume.shape
    for index in range(number):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        name = folder / f"IM{(index * 7) % number:03d}{suffix}"
        item = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0" * 128)
        item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        item.SeriesInstanceUID, item.SeriesDescription, item.Modality = series, description, "MR"
        item.StudyInstanceUID = generate_uid(entropy_srcs=[study])
        # Columns go to the patient's left and rows to the posterior, as scanners write axial slices.
        item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        item.ImagePositionPatient = [-(width - 1), -(height - 1), index * 2.0]
        item.PixelSpacing = [1.0, 1.0]
        item.Rows, item.Columns = height, width
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation = 15, 0
        item.RescaleSlope, item.RescaleIntercept = 2, 0
        item.PixelData = np.round(volume[::-1, ::-1, index].T / 2).astype(np.uint16).tobytes()
        pydicom.dcmwrite(name, item, enforce_file_format=True)


@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_dicom_series_of_a_study_are_one_subject(tmp_path: Path, suffix: str) -> None:
    for patient in ("p1", "p2"):
        write_series(tmp_path / patient / "a", make_brain(200), "AX T1 SE", suffix, study=patient)
        write_series(tmp_path / patient / "FLAIR", make_brain(300), "sequence 7", suffix, study=patient)
        write_series(tmp_path / patient / "b", make_brain(300), "localizer", suffix, study=patient)
    scans = find_scans(tmp_path)
    assert [scan.subject for scan in scans] == ["p1", "p2"]
    assert all(list(scan.files) == ["T1", "FLAIR"] and not scan.problem for scan in scans)
    assert len(read_scan(scans[1], ["T1", "FLAIR"], 32)[0]) > 10


def test_two_dicom_series_in_one_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "p1", np.round(make_brain(200)), "AX T1 SE")
    for file in (tmp_path / "p1").iterdir():
        file.rename(file.with_name("t1_" + file.name))
    write_series(tmp_path / "p1", np.round(make_brain(300)), "AX T2 FLAIR")
    save(tmp_path / "nifti" / "t1.nii.gz", np.round(make_brain(200)), np.diag([1.0, 1, 2, 1]))
    dicom, nifti = find_scans(tmp_path)[::-1]
    assert dicom.subject == "p1" and list(dicom.files) == ["T1", "FLAIR"]
    rows, expected = read_scan(dicom, ["T1", "FLAIR"], 32)[0], read_scan(nifti, ["T1"], 32)[0]
    assert len(rows) == len(expected)
    for one, other in zip(rows, expected, strict=True):
        assert one["pixel_spacing"] == other["pixel_spacing"]
        np.testing.assert_allclose(one["T1"], other["T1"], atol=0.01)
    (tmp_path / "p1" / "t1_IM010.dcm").unlink()
    with pytest.raises(ValueError, match="p1 cannot be read|p1 has 23 slices at uneven distances"):
        read_scan(dicom, ["T1"], 32)


def test_a_dicom_segmentation_is_the_mask(tmp_path: Path) -> None:
    highdicom, pydicom = pytest.importorskip("highdicom"), pytest.importorskip("pydicom")
    from pydicom.sr.codedict import codes

    brain, mask = np.round(make_brain(200)), make_mask()
    write_series(tmp_path / "dicom" / "a", brain, "AX T1 SE")
    save(tmp_path / "nifti" / "t1.nii.gz", brain, np.diag([1.0, 1, 2, 1]))
    save(tmp_path / "nifti" / "seg.nii.gz", mask, np.diag([1.0, 1, 2, 1]))
    images = [pydicom.dcmread(path) for path in (tmp_path / "dicom" / "a").iterdir()]
    for item in images:
        item.PatientID = item.PatientName = item.PatientBirthDate = item.PatientSex = item.AccessionNumber = ""
        item.StudyID = item.StudyDate = item.StudyTime = item.ReferringPhysicianName = ""
        item.FrameOfReferenceUID, item.InstanceNumber, item.SliceThickness = "1.2.3", 1, 2
    segmentation = highdicom.seg.Segmentation(
        images,
        np.stack([mask[::-1, ::-1, int(item.ImagePositionPatient[2] / 2)].T > 0 for item in images]),
        "BINARY",
        [highdicom.seg.SegmentDescription(1, "t", codes.SCT.Tissue, codes.SCT.Neoplasm, "MANUAL")],
        *(pydicom.uid.generate_uid(), 2, pydicom.uid.generate_uid(), 1),
        *("maker", "model", "1", "serial"),
        series_description="Segmentation",
    )
    assert segmentation.NumberOfFrames == 6  # only those with tumour, as is usual
    (tmp_path / "dicom" / "b").mkdir()
    segmentation.save_as(tmp_path / "dicom" / "b" / "1.dcm")
    (scan,) = find_scans(tmp_path / "dicom")
    assert list(scan.files) == ["T1", "mask"]
    rows, expected = read_scan(scan, ["T1"], 32)[0], read(tmp_path / "nifti", ("T1",))[0]
    assert [row["slice_index"] for row in rows] == [row["slice_index"] for row in expected] == list(range(8, 14))
    for one, other in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(one["mask"], other["mask"])

    segmentation.SOPInstanceUID = pydicom.uid.generate_uid()
    segmentation.save_as(tmp_path / "dicom" / "b" / "2.dcm")
    with pytest.raises(ValueError, match="b has 2 DICOM Segmentations in one series; keep one"):
        read_scan(scan, ["T1"], 32)
