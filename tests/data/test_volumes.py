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
ONE_VALUE = "seg.nii.gz has the one value 4, which may be a region or the whole tumour: used as a mask without regions"
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


def make_segmentation(*values: float) -> np.ndarray:
    """The tumour of `make_mask()` in planes of these values by turns."""
    segmentation = np.zeros(SHAPE, np.float32)
    segmentation[25:31, 30:36, 8:14] = np.resize(values, 6)[:, None, None]
    return segmentation


def save(path: Path, data: np.ndarray, affine: np.ndarray = RAS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def make_subject(folder: Path, names: tuple[str, ...] = ("t1", "flair"), mask: bool = True) -> Path:
    for number, name in enumerate(names):
        save(folder / f"{name}.nii.gz", make_brain(100 + 50 * number))
    if mask:
        save(folder / "seg.nii.gz", make_mask())
    return folder


def read(folder: Path, names: tuple[str, ...] = ("T1", "FLAIR"), **options) -> tuple[list[dict], list[str]]:
    (scan,) = find_scans(folder)
    return read_scan(scan, names, 32, **options)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T1, FLAIR and mask, to be read only."""
    return make_subject(tmp_path_factory.mktemp("subject"))


def test_rows_are_tumour_slices_in_radiological_display(subject: Path) -> None:
    rows, notes = read(subject, ("T1", "T2", "FLAIR"))
    assert [row["slice_index"] for row in rows] == list(range(8, 14)) and notes == ["lacks T2", ONE_VALUE]
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
    with pytest.raises(ValueError, match="none of WB, BB among its files; it has T1, FLAIR, mask"):
        read(subject, ("WB", "BB"))


@settings(max_examples=12, deadline=None)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_any_orientation_gives_the_same_slices(
    subject: Path, tmp_path_factory: pytest.TempPathFactory, axes: list[int], flips: tuple[bool, ...]
) -> None:
    turned = tmp_path_factory.mktemp("turned")
    orientation = np.column_stack([np.argsort(axes), np.where(flips, -1.0, 1.0)])
    for path in subject.iterdir():
        nib.save(nib.load(path).as_reoriented(orientation), turned / path.name)
    for one, other in zip(read(subject)[0], read(turned)[0], strict=True):
        assert one["slice_index"] == other["slice_index"]
        np.testing.assert_allclose(one["T1"], other["T1"], atol=1e-5)
        np.testing.assert_array_equal(one["mask"], other["mask"])


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
    save(tmp_path / "t1.nii", make_brain()[..., None])  # a trailing axis of one is dropped
    rows, notes = read(tmp_path)
    assert 12 <= len(rows) <= 22 and all(row["mask"] is None for row in rows)
    assert notes[0] == "lacks FLAIR" and "no mask: all slices" in " ".join(notes)


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
        assert rows[0]["T1"][1:3, 6:10].max() < 0.05 and rows[len(rows) // 2]["T1"][16, 16] > 0.2
        assert rows[0]["pixel_spacing"][0] == pytest.approx(44 / 32, rel=0.1)


def test_another_grid_is_resampled_or_refused(tmp_path: Path) -> None:
    names = ("T1", "T2", "FLAIR")
    make_subject(tmp_path, ("t1", "t2", "flair"))
    path = save(tmp_path / "flair.nii.gz", make_brain(150)[::2], np.diag([2.0, 1, 1, 1]))
    rows, notes = read(tmp_path, names)
    (note,) = (note for note in notes if note.endswith(": resampled"))
    assert note.startswith("flair.nii.gz has shape (20, 48, 24)") and len(rows) == 6
    one, other = rows[2]["T1"], rows[2]["FLAIR"]  # the same brain in both, but for the rim
    assert np.corrcoef(one[8:24, 8:24].ravel(), other[8:24, 8:24].ravel())[0, 1] > 0.995
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.95
    with pytest.raises(ValueError, match=r"flair.nii.gz has shape \(20, 48, 24\), t1.nii.gz has \(40, 48, 24\)"):
        read(tmp_path, names, strict=True)

    save(tmp_path / "seg.nii.gz", make_mask()[:, :, ::2], np.diag([1.0, 1, 2, 1]))
    rows, notes = read(tmp_path, names)
    assert "seg.nii.gz has shape (40, 48, 12)" in " ".join(notes)
    assert len(rows) == 6, "the mask is not widened by interpolation"

    moved = RAS.copy()
    moved[0, 3] = 1.5
    save(path, make_brain(), moved)
    assert "flair.nii.gz has another affine" in " ".join(read(tmp_path)[1])
    with pytest.raises(ValueError, match="has another affine"):
        read(tmp_path, strict=True)
    moved[0, 3] = 500
    save(path, make_brain(), moved)
    with pytest.raises(ValueError, match="do not overlap"):
        read(tmp_path)

    half = make_brain()
    half[:20] = 0
    save(path, half)
    assert any("flair.nii.gz covers" in note for note in read(tmp_path)[1])


def save_nan(path: Path) -> None:
    data = make_brain()
    data[20, 20, 10] = np.nan
    save(path, data)


def change_bytes(start: int, new: bytes):
    """Overwrite bytes of the file as it is."""
    return lambda data: data[:start] + new + data[start + len(new) :]


def unpacked(change):
    """Change the file that gzip packed."""
    return lambda data: gzip.compress(change(gzip.decompress(data)))


DAMAGED = "t1.nii.gz cannot be read, it is damaged or cut short"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:2000], DAMAGED),
        (unpacked(lambda data: data[:5000]), DAMAGED),
        (change_bytes(3000, bytes(100)), DAMAGED),
        (unpacked(change_bytes(70, (9999).to_bytes(2, "little"))), DAMAGED),  # NIfTI's field `datatype`
        (lambda data: b"not a scan", DAMAGED),
        (lambda data: b"", DAMAGED),
        (Path.unlink, "t1.nii.gz is missing"),
        (save_nan, "t1.nii.gz has 1 voxels that are NaN"),
        (lambda path: save(path, np.full(SHAPE, 7, np.int16)), "t1.nii.gz is constant: every voxel is 7"),
        (lambda path: save(path, (make_brain() > 0).astype(np.int16)), "t1.nii.gz is constant inside the brain"),
        (lambda path: save(path, np.stack([make_brain()] * 2, -1)), r"t1.nii.gz has shape \(40, 48, 24, 2\)"),
        (
            lambda path: save(path, make_brain() * (np.arange(24) == 9) * (np.arange(48) == 9)[:, None]),
            "shows no brain",
        ),
    ],
)
def test_bad_volumes(subject: Path, tmp_path: Path, spoil, message: str) -> None:
    for path in subject.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (scan,) = find_scans(tmp_path)
    path = scan.files["T1"]
    if message == DAMAGED:
        path.write_bytes(spoil(path.read_bytes()))
    else:
        spoil(path)
    with pytest.raises(ValueError, match=message):
        read_scan(scan, ["T1", "FLAIR"], 32)


def test_bad_masks(tmp_path: Path) -> None:
    make_subject(tmp_path)
    save(tmp_path / "seg.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(ValueError, match="seg.nii.gz holds no tumour"):
        read(tmp_path)
    speck = np.zeros(SHAPE, np.uint8)
    speck[20, 20, 10] = 1
    save(tmp_path / "seg.nii.gz", speck)
    with pytest.raises(ValueError, match="no slice shows 4 pixels of tumour at 32x32"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("values", "regions", "note"),
    [
        ((1, 2, 3), {1, 2, 3}, None),
        ((1, 2, 4), {1, 2, 3}, None),  # BraTS until 2021
        ((2, 4), {2, 3}, None),
        ((1,), None, None),
        ((255,), None, None),
        (
            (1, 2, 7),
            None,
            "the values 1, 2, 7; regions are 1, 2 and 3, or 4 in place of 3: used as a mask without regions",
        ),
        ((1, 3, 4), None, "the values 1, 3, 4; "),  # BraTS 2024, where 4 is a resection cavity
        ((-1, 1, 2), None, "the values -1, 1, 2; "),
        ((0.25, 0.75, 1), None, "the values 0.25, 0.75, 1; "),
        ((0.75, 1.75), None, "the values 0.75, 1.75; "),
    ],
)
@pytest.mark.parametrize("kind", [np.float32, np.int16])  # as int16, nibabel adds a scale factor, which rounds
def test_regions_are_those_of_brats(tmp_path: Path, values: tuple, regions: set | None, note: str, kind: type) -> None:
    make_subject(tmp_path)
    tumour = [value > 0.5 for value in values]
    save(tmp_path / "seg.nii.gz", make_segmentation(*tumour))
    expected = np.stack([row["mask"] for row in read(tmp_path)[0]])
    nib.save(nib.Nifti1Image(make_segmentation(*values), RAS, dtype=kind), tmp_path / "seg.nii.gz")
    rows, notes = read(tmp_path)
    if kind == np.float32:
        assert len(notes) == (note is not None) and all(text.startswith(f"seg.nii.gz has {note}") for text in notes)
    mask = np.stack([row["mask"] for row in rows])
    assert np.array_equal(mask, expected)
    if regions is None:
        assert all(row["labels"] is None for row in rows)
    else:
        labels = np.stack([row["labels"] for row in rows])
        assert set(np.unique(labels)) == regions | {0} and np.array_equal(labels > 0, mask)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([(1, 3), (1, 4), (2, 4), (1, 2, 3)]), st.floats(0.6, 1.6), st.floats(0, 1), st.integers(32, 96))
def test_no_value_comes_up_between_labels(
    subject: Path, tmp_path_factory: pytest.TempPathFactory, values: tuple, step: float, shift: float, size: int
) -> None:
    folder = tmp_path_factory.mktemp("resampled")
    (folder / "t1.nii.gz").symlink_to(subject / "t1.nii.gz")
    grid = np.diag([step, step, step, 1.0])
    grid[:3, 3] = 14 + shift, 18 + shift, 8 + shift
    save(folder / "seg.nii.gz", np.random.default_rng(0).choice(values, (10, 10, 6)).astype(np.uint8), grid)
    (scan,) = find_scans(folder)
    rows, _ = read_scan(scan, ["T1"], size)
    assert {int(v) for row in rows for v in np.unique(row["labels"])} - {0} == {min(value, 3) for value in values}
    assert all(np.array_equal(row["labels"] > 0, row["mask"]) for row in rows)


def test_odd_segmentations_cost_only_their_subject_or_are_noted(tmp_path: Path) -> None:
    for name in ("p0", "p1", "p2"):
        make_subject(tmp_path / name)
    colours = np.zeros(SHAPE, np.dtype([(c, "u1") for c in "RGB"]))
    save(tmp_path / "p1" / "seg.nii.gz", colours)
    save(tmp_path / "p2" / "seg.nii.gz", np.roll(make_mask(), -22, axis=0))  # partly beside the brain
    (_, good), (left_out, rows), (moved, _) = read_scans(find_scans(tmp_path), ["T1"], 32)
    assert len(good) == 6 and not rows and "a file is damaged or holds no plain numbers" in left_out.left_out
    assert any("of seg.nii.gz lies outside the brain" in note for note in moved.notes)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_read_scans_leaves_out_the_bad_and_keeps_the_order(tmp_path: Path, num_workers: int) -> None:
    for number in range(4):
        make_subject(tmp_path / f"p{number}")
    save_nan(tmp_path / "p1" / "t1.nii.gz")
    scans = find_scans(tmp_path)
    reports = [report for report, _ in read_scans(scans, ["T1", "FLAIR"], 32, num_workers=num_workers)]
    assert [report.subject for report in reports] == ["p0", "p1", "p2", "p3"]
    assert [report.slices for report in reports] == [6, 0, 6, 6]
    assert "t1.nii.gz has 1 voxels that are NaN" in reports[1].left_out
    assert reports[0].modalities == ("T1", "FLAIR", "mask")
    save(tmp_path / "p0" / "seg.nii.gz", make_segmentation(1, 2))
    assert next(read_scans(scans, ["T1"], 32))[0].modalities == ("T1", "mask", "labels")
    with pytest.raises(ValueError, match="p1: t1.nii.gz has 1 voxels"):
        list(read_scans(scans, ["T1", "FLAIR"], 32, strict=True, num_workers=num_workers))


def write_series(folder: Path, volume: np.ndarray, description: str) -> None:
    """Write a (right, anterior, superior) volume as axial DICOM files, in a shuffled order of names."""
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(parents=True, exist_ok=True)
    series = pydicom.uid.generate_uid()
    width, height, number = volume.shape
    for index in range(number):
        item = pydicom.Dataset()
        item.SOPClassUID, item.SOPInstanceUID = pydicom.uid.MRImageStorage, pydicom.uid.generate_uid()
        item.SeriesInstanceUID, item.SeriesDescription, item.Modality = series, description, "MR"
        item.StudyInstanceUID, item.FrameOfReferenceUID = "1.2.4", "1.2.3"
        item.PatientID = item.PatientName = item.PatientBirthDate = item.PatientSex = item.AccessionNumber = ""
        item.StudyID = item.StudyDate = item.StudyTime = item.ReferringPhysicianName = ""
        # Columns go to the patient's left and rows to the posterior, as scanners write axial slices.
        item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        item.ImagePositionPatient = [-(width - 1) * 0.8, -(height - 1) * 1.25, index * 2.0]
        item.PixelSpacing, item.SliceThickness, item.InstanceNumber = [1.25, 0.8], 2, 1
        item.RescaleSlope, item.RescaleIntercept = 2, 0
        item.set_pixel_data(np.round(volume[::-1, ::-1, index].T / 2).astype(np.uint16), "MONOCHROME2", 16)
        item.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        item.save_as(folder / f"{description}{(index * 7) % number:03d}.dcm", enforce_file_format=True)


def test_dicom_and_its_segmentation_read_like_nifti(tmp_path: Path) -> None:
    highdicom, pydicom = pytest.importorskip("highdicom"), pytest.importorskip("pydicom")
    from pydicom.sr.codedict import codes

    brain, mask, affine = np.round(make_brain(200)), make_mask(), np.diag([0.8, 1.25, 2, 1])
    write_series(tmp_path / "dicom" / "a", brain, "T1")
    write_series(tmp_path / "dicom" / "a", make_brain(300), "T2 FLAIR")  # two series in one folder
    for name, volume in (("t1", brain), ("flair", make_brain(300)), ("seg", mask)):
        save(tmp_path / "nifti" / f"{name}.nii.gz", volume, affine)
    images = [pydicom.dcmread(path) for path in (tmp_path / "dicom" / "a").glob("T1*")]
    segments = (mask > 0) * np.repeat([1, 2], [11, 13]).astype(np.uint8)  # two, one above the other
    segmentation = highdicom.seg.Segmentation(
        images,
        np.stack([segments[::-1, ::-1, int(item.ImagePositionPatient[2] / 2)].T for item in images]),
        "BINARY",
        [highdicom.seg.SegmentDescription(n, "t", codes.SCT.Tissue, codes.SCT.Neoplasm, "MANUAL") for n in (1, 2)],
        *(pydicom.uid.generate_uid(), 2, pydicom.uid.generate_uid(), 1),
        *("maker", "model", "1", "serial"),
        series_description="Segmentation",
    )
    assert segmentation.NumberOfFrames == 6  # only those with tumour, as is usual
    segmentation.save_as(tmp_path / "dicom" / "a" / "seg.dcm")
    dicom, nifti = find_scans(tmp_path)
    assert list(dicom.files) == list(nifti.files) == ["T1", "FLAIR", "mask"] and not dicom.problem
    (rows, notes), (expected, _) = (read_scan(scan, ["T1", "FLAIR"], 32) for scan in (dicom, nifti))
    assert notes[0].startswith("a has several segments (1, 2), whose numbers do not say which region each is")
    assert [row["slice_index"] for row in rows] == [row["slice_index"] for row in expected] == list(range(8, 14))
    for one, other in zip(rows, expected, strict=True):
        assert one["pixel_spacing"] == pytest.approx(other["pixel_spacing"])
        np.testing.assert_array_equal(one["mask"], other["mask"])
        assert one["labels"] is None
        np.testing.assert_allclose(one["T1"], other["T1"], atol=0.01)
        np.testing.assert_allclose(one["FLAIR"], other["FLAIR"], atol=0.01)

    segmentation.SOPInstanceUID = pydicom.uid.generate_uid()
    segmentation.save_as(tmp_path / "dicom" / "a" / "seg2.dcm")
    with pytest.raises(ValueError, match="a has 2 DICOM Segmentations in one series; keep one"):
        read_scan(dicom, ["T1"], 32)
    for name in ("seg.dcm", "seg2.dcm", "T1010.dcm"):
        (tmp_path / "dicom" / "a" / name).unlink()
    with pytest.raises(ValueError, match="a has 23 slices at uneven distances"):
        read_scan(find_scans(tmp_path / "dicom")[0], ["T1"], 32)
