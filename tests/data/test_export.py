"""Exported subjects: what is in the files, that they read back as scans, and that nothing is lost or half-written."""

import hashlib
import json

import datasets
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from dldm_pipeline.data.export import NOTICE, check_export_folder, checkpoint_hashes, export_subjects
from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.data.volumes import read_scan
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

SPACING = (1.5, 2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "unet").mkdir()
    (folder / "unet" / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def folder(output, checkpoint, tmp_path_factory):
    """The subjects as NIfTI and PNG files."""
    folder = tmp_path_factory.mktemp("export") / "out"
    options = {"settings": {"num_inference_steps": 3}, "checkpoint": checkpoint, "pixel_spacing": SPACING}
    assert export_subjects(output, folder, seed=7, **options) == folder
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_and_manifest(output, folder, checkpoint):
    names = [f"synthetic-{k:04d}" for k in range(2)]
    kinds = ["t1", "flair", "wb", "seg"]
    expected = [f"{n}/{n}_{kind}{end}" for n in names for kind in kinds for end in (".png", ".nii.gz")]
    assert files_of(folder) == sorted(["manifest.json", "sheet.png", *expected])

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["synthetic"] is True and "Not for diagnosis" in manifest["notice"]
    assert manifest["seed"] == 7 and manifest["settings"] == {"num_inference_steps": 3}
    assert manifest["modalities"] == output.modalities and manifest["num_subjects"] == 2
    assert manifest["pixel_spacing_mm"] == list(SPACING) and "torch" in manifest["versions"]
    assert manifest["checkpoint"] == {
        "name": checkpoint.name,
        "sha256": {"unet/model.safetensors": hashlib.sha256(b"weights").hexdigest()},
    }
    files = [file for subject in manifest["subjects"] for pair in subject["files"].values() for file in pair.values()]
    assert sorted(files) == sorted(expected)
    assert [subject["tumour_pixels"] for subject in manifest["subjects"]] == [mask.sum() for mask in output.masks]


def test_regions_are_labels_in_nifti_and_in_a_data_set(output, tmp_path):
    labels = output.masks * np.random.default_rng(0).integers(1, 4, output.masks.shape).astype(np.uint8)
    known = DLDMPipelineOutput(output.images, output.masks, None, None, output.modalities, labels)
    export_subjects(known, tmp_path / "nifti")
    stem = tmp_path / "nifti" / "synthetic-0001" / "synthetic-0001_seg"
    assert np.array_equal(np.asarray(nib.load(f"{stem}.nii.gz").dataobj)[:, :, 0], labels[1][::-1, ::-1].T)
    with Image.open(f"{stem}.png") as png:
        assert np.array_equal(np.asarray(png) == 255, output.masks[1])
    manifest = json.loads((tmp_path / "nifti" / "manifest.json").read_text())
    assert [entry["tumour_pixels"] for entry in manifest["subjects"]] == [mask.sum() for mask in output.masks]
    export_subjects(known, tmp_path / "set", format="dataset")
    items = [item for split in ("train", "validation") for item in SliceDataset(tmp_path / "set", split)]
    items = {item["subject"]: item for item in items}
    assert all(np.array_equal(items[f"synthetic-{k:04d}"]["labels"], labels[k]) for k in range(2))


def test_png_and_nifti_hold_the_images_to_16_bits_and_the_mark(output, folder):
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
        assert np.array_equal(np.asarray(png) == 255, output.masks[1]) and png.text["Synthetic"] == "true"


def test_an_export_reads_back_as_scans_without_renaming(output, folder):
    scans = find_scans(folder)
    assert [scan.subject for scan in scans] == ["synthetic-0000", "synthetic-0001"]
    (row,), _ = read_scan(scans[0], output.modalities, image_size=64, strict=True)
    # The reader windows intensities and cuts to the brain again; what lies where must survive.
    for name, image in zip(output.modalities, output.images[0], strict=True):
        as_written, mirrored, upside_down = (
            np.corrcoef(row[name].ravel(), other.ravel())[0, 1] for other in (image, image[:, ::-1], image[::-1])
        )
        assert as_written > max(mirrored, upside_down) + 0.05
    centre, expected = (np.argwhere(mask).mean(axis=0) for mask in (row["mask"], output.masks[0]))
    assert np.abs(centre - expected).max() < 5


def test_tensors_export_like_arrays(output, folder, tmp_path):
    tensors = {"images": torch.from_numpy(output.images), "masks": torch.from_numpy(output.masks)}
    other = export_subjects(DLDMPipelineOutput(**{**output, **tensors}), tmp_path / "pt")
    assert files_of(folder) == files_of(other)
    for name in files_of(folder):
        assert not name.endswith(".png") or (folder / name).read_bytes() == (other / name).read_bytes()


def test_data_set_to_train_on(output, tmp_path):
    folder = export_subjects(output, tmp_path / "out", format="dataset")
    shards = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation")]
    assert files_of(folder) == sorted(["README.md", "manifest.json", "sheet.png", *shards])
    items = {item["subject"]: item for split in ("train", "validation") for item in SliceDataset(folder, split)}
    for k, item in enumerate(items[name] for name in ("synthetic-0000", "synthetic-0001")):
        np.testing.assert_allclose(item["images"], output.images[k], atol=1 / 65535)
        assert np.array_equal(item["mask"], output.masks[k]) and item["has_mask"] and item["present"].all()
    loaded = datasets.load_dataset(str(folder))  # with the card, the sheet and the manifest beside the shards
    assert loaded["train"]["source"] == loaded["validation"]["source"] == [NOTICE]
    assert loaded["train"][0]["pixel_spacing"] == pytest.approx([195 / 64, 195 / 64])
    card = (folder / "README.md").read_text()
    assert "- synthetic" in card and NOTICE in card


def test_what_is_there_is_kept_or_replaced_whole(output, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite, message in (
        (False, "mine is not empty"),
        (True, "mine holds files and no manifest.json .* not overwritten"),
    ):
        with pytest.raises(FileExistsError, match=message):
            export_subjects(output, tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(FileExistsError, match="is a file"):
        check_export_folder(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(OSError, match="cannot write .*thesis.txt/out"):
        check_export_folder(tmp_path / "mine" / "thesis.txt" / "out")
    assert files_of(tmp_path) == ["mine/thesis.txt"]

    one = DLDMPipelineOutput(**{**output, "images": output.images[:1], "masks": output.masks[:1]})
    for seed, subjects in ((1, output), (2, one)):
        export_subjects(subjects, tmp_path / "out", seed=seed, overwrite=True)
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert json.loads(manifest)["seed"] == 2 and not (tmp_path / "out" / "synthetic-0001").exists()
    # An export that fails when its subjects are written already leaves the older one.
    with pytest.raises(TypeError, match="not JSON serializable"):
        export_subjects(output, tmp_path / "out", settings={"pipeline": output}, overwrite=True)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_outputs_that_cannot_be_exported_are_refused(output, tmp_path):
    for changes, message in (
        ({"images": None}, "output_type='np'"),
        ({"images": [[Image.new("L", (4, 4))] * 3] * 2}, "output_type='np'"),
        ({"images": output.images * np.nan}, "not numbers"),
        ({"modalities": ["T1", "t1", "WB"]}, "file names"),
    ):
        with pytest.raises(ValueError, match=message):
            export_subjects(DLDMPipelineOutput(**{**output, **changes}), tmp_path / "out")
    with pytest.raises(ValueError, match="format 'jpeg' is not known; take one of nifti, dicom, dataset"):
        export_subjects(output, tmp_path / "out", format="jpeg")
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        export_subjects(output, tmp_path / "out", checkpoint=tmp_path)
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        checkpoint_hashes(tmp_path)
    assert not list(tmp_path.iterdir())
