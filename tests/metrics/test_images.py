"""8-bit images: conversions, refusals, and slices in memory."""

import numpy as np
import pytest
import torch

from dldm_pipeline.metrics.images import Slices, check_images, read_slices, to_uint8


def test_to_uint8_is_what_a_png_holds():
    assert to_uint8(np.array([0.0, 0.5, 1.0], dtype=np.float32)).tolist() == [0, 128, 255]
    converted = to_uint8(torch.tensor([0.1], dtype=torch.float64))
    assert converted.dtype == np.uint8 and to_uint8(converted) is converted
    for bad in ([0.0, 255.0], [-0.1, 0.5], [0.5, np.nan]):
        with pytest.raises(ValueError, match=r"samples span .*floats must be in \[0, 1\]"):
            to_uint8(np.array(bad), "samples")
    with pytest.raises(TypeError, match="images are int32: give floats"):
        to_uint8(np.array([1], dtype=np.int32))


def test_images_that_do_not_use_0_to_255_are_refused():
    images = np.full((4, 8, 8), 255, dtype=np.uint8)
    check_images(images)
    for bad, error, message in (
        (images / np.float32(255), TypeError, "real are float32: .*thousands of times too small.*to_uint8"),
        (images // 255, ValueError, "real hold nothing above 1.*cast to uint8 without scaling"),
        (images[None], ValueError, "one modality at a time"),
        (images[:0], ValueError, r"real have shape \(0, 8, 8\): give at least one"),
    ):
        with pytest.raises(error, match=message):
            check_images(bad, "real")


def test_slices():
    slices = Slices(np.full((2, 3, 8, 8), 0.2), ["a", "b"])
    assert len(slices) == 2 and (slices.images == 51).all() and slices.present.all()
    assert slices.names("x").tolist() == ["a", "b"] and Slices(slices.images).names("x").tolist() == ["x-0", "x-1"]
    slices.check_modalities(["T1", "T2", "WB"], "real")
    with pytest.raises(ValueError, match=r"real has images of shape \(2, 3, 8, 8\): needed are \(N, 2, H, W\).*T1, T2"):
        slices.check_modalities(["T1", "T2"], "real")
    for arguments, message in (
        ((slices.images[0],), r"\(3, 8, 8\); it must be \(slices, modalities, height, width\)"),
        ((slices.images[:0],), r"\(0, 3, 8, 8\); it must be"),
        ((slices.images, ["a"]), "subjects has 1 names for 2 slices"),
        ((slices.images, None, np.ones(2)), r"present has shape \(2,\); with these images it must be \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Slices(*arguments)


def test_slices_are_read_from_a_data_set():
    here = torch.tensor([True, True, False])
    dataset = [{"images": torch.full((3, 8, 8), i / 255), "present": here, "subject": f"s{i // 2}"} for i in range(12)]
    slices = read_slices(dataset, max_items=3)
    assert slices.images[:, 0, 0, 0].tolist() == [0, 6, 11] and slices.subjects.tolist() == ["s0", "s3", "s5"]
    assert slices.images.dtype == np.uint8 and slices.present.tolist() == [[True, True, False]] * 3
    assert len(read_slices(dataset)) == len(read_slices(dataset, 20)) == 12
    for bad, count, message in (([], None, "dataset has 0 slices"), (dataset, 0, "max_items=0")):
        with pytest.raises(ValueError, match=message):
            read_slices(bad, count)
