"""What the trainings do with an autoencoder and a data set: random subsets and styles, measuring, encoding, rebuilding."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dldm_pipeline.appearance import random_partners
from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder, DisentangledEncoderOutput
from dldm_pipeline.data.files import atomic_write
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.losses import foreground_of, noise_std
from dldm_pipeline.metrics.reconstruction import psnr

TWIN_PROBABILITY = 0.5  # of a structure from another image of the same anatomy
DONOR_PROBABILITY = 0.7  # of a style from another anatomy under the same acquisition

# ---------------------------------------------------------------------------------------------------------------------
# One batch
# ---------------------------------------------------------------------------------------------------------------------


def random_subset(present: torch.Tensor) -> torch.Tensor:
    """A random non-empty subset of the modalities present. (B, n) bool in and out.

    Half of the subsets are one modality alone, the hardest case; in the other half every size is equally likely.
    """
    largest = torch.where(torch.rand(len(present), device=present.device) < 0.5, 1, present.sum(dim=1))
    size = 1 + (torch.rand(len(present), device=present.device) * largest).long()
    order = torch.rand(present.shape, device=present.device).masked_fill(~present, 2.0).argsort(dim=1)
    return (order.argsort(dim=1) < size[:, None]) & present


def encode_exchanged(
    autoencoder: DisentangledAutoencoder, batch: dict[str, torch.Tensor], subset_probability: float
) -> tuple[torch.Tensor, torch.Tensor, DisentangledEncoderOutput, DisentangledEncoderOutput, torch.Tensor]:
    """Structures and styles to rebuild the images of a batch with, from other images of the same anatomy and acquisition.

    Strategy 3 of Na et al. (MIDL 2023) with a target that follows the style, see [`dldm_pipeline.appearance`].

    Args:
        batch: `images` (B, n, H, W) in [0, 1], or `inputs` in their place; `present` (B, n) bool; `anatomy` and
            `acquisition` (B,) int, each row its own without.
        subset_probability: fraction of structures from a [`random_subset`] of the modalities.

    Returns:
        Structures (B, c_s, h, w) and styles (B, n, c_t), sampled; the posteriors given all modalities, and given the subsets;
        and for each row another one of its anatomy (B,), itself if there is none.
    """
    present = batch["present"]
    own = torch.arange(len(present), device=present.device)
    twin = random_partners(batch.get("anatomy", own), 1.0)
    donor = random_partners(batch.get("acquisition", own), DONOR_PROBABILITY)[:, None].expand(present.shape)
    donor = torch.where(present.gather(0, donor), donor, own[:, None])  # a donor that lacks the modality is not used
    full, some = autoencoder.encode_subsets(batch.get("inputs", batch["images"]), [present, random_subset(present)])
    styles = full.style_dist.sample()[donor, torch.arange(present.shape[1], device=present.device)]
    from_subset = torch.rand(len(present), 1, 1, 1, device=present.device) < subset_probability
    structure = torch.where(from_subset, some.structure_dist.sample(), full.structure_dist.sample())
    source = torch.where(torch.rand(len(present), device=present.device) < TWIN_PROBABILITY, twin, own)
    return structure[source], styles, full, some, twin


# ---------------------------------------------------------------------------------------------------------------------
# A whole data set
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_noise(model: DisentangledAutoencoder, loader: Iterable[dict[str, torch.Tensor]]) -> None:
    """Measure the standard deviation of each modality's noise over training slices, for the model's `noise_level`.

    Rebuilt images have no noise. What `noise_std` reads too much, because fine anatomy looks like noise, it reads in rebuilt
    images with added noise as well, and that is taken off.
    """
    total, counts = torch.zeros(model.num_modalities), torch.zeros(model.num_modalities)
    for batch in tqdm(loader, desc="measuring noise", unit="batch"):
        images, present = batch["images"].to(model.device), batch["present"].to(model.device)
        foreground = foreground_of(images, present)[:, None]
        read = noise_std(images, foreground).nan_to_num()
        rebuilt = model(images, present).sample
        rebuilt = rebuilt + read[..., None, None] * foreground * torch.randn_like(rebuilt)
        again = noise_std(rebuilt.clamp(0, 1), foreground).nan_to_num()
        # Variances add up: what is read too much now was read too much before.
        total += torch.where(present, 2 * read**2 - again**2, 0).sum(dim=0).cpu()
        counts += present.sum(dim=0).cpu()
    model.register_to_config(noise_level=(total / counts.clamp(min=1)).clamp(min=0).sqrt().tolist())


@torch.no_grad()
def measure_latents(model: DisentangledAutoencoder, loader: Iterable[dict[str, torch.Tensor]]) -> None:
    """Measure latents over the whole training set and keep the result in the model.

    Mean and standard deviation of every channel, and how a subject's styles are related, go to the config. The mean
    difference between the structure of one modality alone and that of all goes to `structure_offset`, which `encode` takes
    off; otherwise the structure tells which modality it came from.
    """
    total, squares, number = 0.0, 0.0, 0
    styles, known = [], []
    offset = torch.zeros_like(model.structure_offset, dtype=torch.float64)
    counts = torch.zeros(model.num_modalities, device=model.device)
    model.structure_offset.zero_()
    for batch in tqdm(loader, desc="measuring latents", unit="batch"):
        images, present = batch["images"].to(model.device), batch["present"].to(model.device)
        alone = torch.eye(model.num_modalities, dtype=torch.bool, device=model.device)
        alone = alone[:, None].expand(-1, len(present), -1)
        full, *single = model.encode_subsets(images, [present, *alone])
        structure = full.structure_dist.mode()
        for m, output in enumerate(single):
            offset[m] += (output.structure_dist.mode() - structure)[present[:, m]].double().sum(dim=0)
            counts[m] += present[:, m].sum()
        structure = structure.double().transpose(0, 1).flatten(1)
        total += structure.sum(dim=1)
        squares += (structure**2).sum(dim=1)
        number += structure.shape[1]
        styles.append(full.style_dist.mode().double().cpu())
        known.append(present.cpu())
    model.structure_offset.copy_(offset / counts.clamp(min=1)[:, None, None, None])
    mean = total / number
    std = (squares / number - mean**2).clamp(min=1e-12).sqrt()
    styles, known = torch.cat(styles), torch.cat(known)
    style_mean, style_std = styles[known].mean(dim=0), styles[known].std(dim=0, correction=0).clamp(min=1e-6)
    model.register_to_config(
        structure_shift=mean.tolist(),
        structure_scale=std.tolist(),
        style_shift=style_mean.tolist(),
        style_scale=style_std.tolist(),
        style_relation=style_relation((styles[known.all(dim=1)] - style_mean) / style_std),
    )


def style_relation(styles: torch.Tensor) -> list[list[float]] | None:
    """Correlation of the noise from which related styles are drawn: styles without the covariance within each modality.

    A sampler turns noise N(0, 1) into styles of covariance C as C^(1/2) does. So noise that is correlated like C^(-1/2) style
    gives styles that are correlated between modalities, too, and each modality's noise stays N(0, 1).

    Args:
        styles: (N, n, c_t), of subjects with all modalities, on the scale on which they are sampled.

    Returns:
        (n * c_t, n * c_t), or `None` if the subjects are fewer than twice as many, or a modality's styles are all one.
    """
    count, n, channels = styles.shape
    if count < 2 * n * channels or (styles.std(dim=0) == 0).all(dim=1).any():
        return None
    centred = styles - styles.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.einsum("sni,snj->nij", centred, centred) / count)
    roots = vectors * values.clamp(min=1e-6 * values.max()).rsqrt()[:, None] @ vectors.mT
    white = torch.einsum("sni,nij->snj", centred, roots).flatten(1)
    identity = torch.eye(n * channels, dtype=styles.dtype)
    within = torch.block_diag(*[torch.ones(channels, channels)] * n).bool()
    relation = torch.where(within, identity, white.mT @ white / count)
    return (0.99 * relation + 0.01 * identity).mul(1e4).round().div(1e4).tolist()


@torch.no_grad()
def validate_autoencoder(
    model: DisentangledAutoencoder, loader: Iterable[dict[str, torch.Tensor]], path: Path
) -> dict[str, float]:
    """PSNR in dB of rebuilt held-out images, and a sheet of the first three subjects: real, rebuilt, with exchanged styles."""
    errors, sheet = [], None
    for batch in loader:
        images, present = batch["images"].to(model.device), batch["present"].to(model.device)
        posterior = model.encode(images, present)
        structure, styles = posterior.structure_dist.mode(), posterior.style_dist.mode()
        output = model.decode(structure, styles)
        errors.append(torch.where(present, psnr(images, output.sample.clamp(0, 1)), torch.nan))
        if sheet is None:
            swapped = model.decode(structure, styles.roll(1, dims=0)).sample
            mask, rebuilt_mask = batch["mask"].to(images), (output.mask > 0).to(images)
            rows = torch.stack([images[:3], output.sample[:3], swapped[:3]], dim=1).flatten(0, 1)
            masks = torch.stack([mask[:3], rebuilt_mask[:3], rebuilt_mask[:3]], dim=1).flatten(0, 1)
            sheet = rows.clamp(0, 1).float().cpu().numpy(), masks.float().cpu().numpy()
    names = list(model.config.modalities)
    contact_sheet(*sheet, names, ["real", "rebuilt", "other style"] * (len(sheet[0]) // 3), path)
    values = torch.cat(errors).nanmean(dim=0)
    figures = {f"PSNR {name} (dB)": float(value) for name, value in zip(names, values, strict=True)}
    return {"PSNR (dB)": float(values.mean()), **figures}


@dataclass
class Latents:
    """Latents of N slices in the denoiser's normalised space, in V = 2 views (as it is, mirrored) or 1.

    Attributes:
        structure: (N, V, c_s, h, w), from all modalities present.
        style: (N, V, n, c_t); meaningless for a missing modality.
        present: (N, n) bool.
    """

    structure: torch.Tensor
    style: torch.Tensor
    present: torch.Tensor

    def to(self, device: torch.device) -> "Latents":
        """The same on a device, float32."""
        return Latents(self.structure.to(device).float(), self.style.to(device).float(), self.present.to(device))


def encode_dataset(
    dataset: SliceDataset,
    autoencoder: DisentangledAutoencoder,
    mirror: bool,
    cache_dir: str | Path,
    sources: Sequence[str | Path],
    num_workers: int = 0,
    show_progress: bool = True,
) -> Latents:
    """Posterior modes of every slice, and of its left-right mirror image if wanted, as float16.

    They are kept in `cache_dir` under a hash of `sources` and of some slices, and read from there the next time.

    Args:
        sources: files and folders of which the latents are made: data set and autoencoder.
    """
    path = Path(cache_dir) / f"latents-{_latents_key(dataset, mirror, sources)}.safetensors"
    if path.is_file():
        return Latents(**load_file(path))
    structure, style, present = [], [], []
    loader = DataLoader(dataset, batch_size=16, num_workers=num_workers)
    with torch.no_grad():
        for batch in tqdm(loader, desc="encoding slices", unit="batch", disable=not show_progress):
            there = batch["present"].to(autoencoder.device)
            views = [batch["images"], batch["images"].flip(-1)] if mirror else [batch["images"]]
            posteriors = [autoencoder.encode(view.to(autoencoder.device), there) for view in views]
            z_struct = [autoencoder.normalize_structure(p.structure_dist.mode()) for p in posteriors]
            z_style = [autoencoder.normalize_style(p.style_dist.mode()) for p in posteriors]
            structure.append(torch.stack(z_struct, dim=1).half().cpu())
            style.append(torch.stack(z_style, dim=1).half().cpu())
            present.append(there.cpu())
    latents = Latents(torch.cat(structure), torch.cat(style), torch.cat(present))
    with atomic_write(path) as temporary:
        save_file(vars(latents), temporary)
    return latents


def _latents_key(dataset: SliceDataset, mirror: bool, sources: Sequence[str | Path]) -> str:
    """A hash that changes when the data or the autoencoder do."""
    digest = hashlib.sha256(f"2 {mirror} {len(dataset)} {dataset.modalities}".encode())
    for source in sources:
        for path in sorted(Path(source).rglob("*")):
            if path.suffix == ".parquet":  # large: its name, size and date will do
                digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
            elif path.suffix in (".json", ".safetensors"):
                digest.update(path.read_bytes())
    for index in np.linspace(0, len(dataset) - 1, 8).astype(int):
        digest.update(dataset[index]["images"].numpy().tobytes())
    return digest.hexdigest()[:16]
