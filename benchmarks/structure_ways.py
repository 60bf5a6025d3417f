"""Compare the ways to keep one anatomy while the modalities' styles are drawn.

    python benchmarks/structure_ways.py                                     # bundled pipeline, simulated subjects beside
    python benchmarks/structure_ways.py --pipeline P --dataset D --num_subjects 100

The paper fixes z_struct while z_style varies and does not say how. Four ways, each from the same trained denoiser:

| way         | how                                                                                                    |
|-------------|--------------------------------------------------------------------------------------------------------|
| conditional | draw one pair, then each style given the clean structure, in few steps: what the pipeline does          |
| reuse       | draw a pair for every modality; the structure of the first, the styles of all                           |
| replacement | draw one pair; then each modality's pair with the structure set to its own noised self after every step |
| joint       | all modalities' pairs side by side from the same noise, their structures averaged after every step      |

Printed as a Markdown table: correlation of edges between modalities and enhancement inside the mask, both as a share of
the real subjects' (100 % is like them; each worst case over pairs or modalities), pairs that might be of two subjects,
empty masks, the largest deviation of the power spectrum from the real one, and seconds a subject, decoding included.
"""

import argparse
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.metrics.alignment import evaluate_alignment
from dldm_pipeline.metrics.reconstruction import compare_spectra, radial_power_spectrum

Latents = tuple[torch.Tensor, torch.Tensor]
PHANTOM_SEED = 977_001  # the simulated subjects of examples/evaluate.py, which no training run has seen


def draw_seeds(pipeline: DLDMPipeline, num_subjects: int, seed: int) -> torch.Tensor:
    """(S, n + 1) integers, of structure and styles: those the pipeline draws, so that all ways share their noise."""
    seeds = pipeline._draw_seeds(num_subjects, torch.Generator().manual_seed(seed))
    return torch.tensor(seeds)[:, : 1 + len(pipeline.autoencoder.config.modalities)]


def draw_pairs(
    pipeline: DLDMPipeline, seeds: torch.Tensor, steps: int, callback: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of each subject and modality under the joint labels, (S, n, ...) each, in the denoiser's scale."""
    n = len(pipeline.autoencoder.config.modalities)
    structure, style = pipeline._denoise(
        list(range(n)) * len(seeds), n, seeds.flatten().tolist(), steps, callback=callback, callback_inputs=["latents"]
    )
    return structure.unflatten(0, (-1, n)), style.unflatten(0, (-1, n))


def conditional(pipeline: DLDMPipeline, num_subjects: int, seed: int, steps: int) -> Latents:
    """The pipeline's own way."""
    generator = torch.Generator().manual_seed(seed)
    output = pipeline(num_subjects, num_inference_steps=steps, generator=generator, output_type="latent")
    return output.structure, output.styles


def reuse(pipeline: DLDMPipeline, num_subjects: int, seed: int, steps: int) -> Latents:
    """A pair for every modality, each from its own noise; the structure of the first is kept."""
    seeds = draw_seeds(pipeline, num_subjects, seed)
    structure, styles = draw_pairs(pipeline, seeds[:, :-1], steps)
    return denormalize(pipeline, structure[:, 0], styles)


def replacement(pipeline: DLDMPipeline, num_subjects: int, seed: int, steps: int) -> Latents:
    """One pair; then each modality's pair, its structure set to the first one's, noised to the time, after every step."""
    n, c_s = len(pipeline.autoencoder.config.modalities), pipeline.autoencoder.config.structure_channels
    seeds = draw_seeds(pipeline, num_subjects, seed)
    z_struct, _ = pipeline._denoise([0] * num_subjects, n, seeds[:, 0].tolist(), steps)
    clean = z_struct.repeat_interleave(n, dim=0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)

    def replace(pipe, step, t, tensors):
        timesteps, latents = pipe.scheduler.timesteps, tensors["latents"].clone()
        latents[:, :c_s] = clean
        if step + 1 < len(timesteps):
            latents[:, :c_s] = pipe.scheduler.add_noise(clean, noise, timesteps[step + 1].expand(len(clean)))
        return {"latents": latents}

    _, styles = draw_pairs(pipeline, seeds[:, 1:], steps, replace)
    return denormalize(pipeline, z_struct, styles)


def joint(pipeline: DLDMPipeline, num_subjects: int, seed: int, steps: int) -> Latents:
    """Every modality's pair from the same noise; after each step (which is linear) the structures are averaged."""
    n, c_s = len(pipeline.autoencoder.config.modalities), pipeline.autoencoder.config.structure_channels
    seeds = draw_seeds(pipeline, num_subjects, seed)

    def average(pipe, step, t, tensors):
        latents = tensors["latents"].unflatten(0, (-1, n)).clone()
        latents[:, :, :c_s] = latents[:, :, :c_s].mean(dim=1, keepdim=True)
        return {"latents": latents.flatten(0, 1)}

    structure, styles = draw_pairs(pipeline, seeds[:, :1].expand(-1, n), steps, average)
    return denormalize(pipeline, structure[:, 0], styles)


def denormalize(pipeline: DLDMPipeline, structure: torch.Tensor, styles: torch.Tensor) -> Latents:
    """To the autoencoder's own scale, which `DLDMPipeline.__call__` takes."""
    return pipeline.autoencoder.denormalize_structure(structure), pipeline.autoencoder.denormalize_style(styles)


WAYS = {"conditional": conditional, "reuse": reuse, "replacement": replacement, "joint": joint}


def real_subjects(pipeline: DLDMPipeline, dataset: str | None, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, n, H, W), masks (N, H, W) and subject names: complete slices of a data set, or simulated ones."""
    names, size = list(pipeline.autoencoder.config.modalities), pipeline.autoencoder.config.sample_size
    if dataset is None:
        rows = list(phantom_rows(count, size=size, seed=PHANTOM_SEED, modalities=names))
        images = [np.stack([row[name] for name in names]) for row in rows]
        return np.stack(images), np.stack([row["mask"] for row in rows]), [row["subject"] for row in rows]
    items = (item for item in SliceDataset(dataset, "validation", names) if item["present"].all() and item["has_mask"])
    items = list(islice(items, count))
    if not items:
        raise ValueError(f"--dataset {dataset}: its validation split has no slice with {', '.join(names)} and a mask.")
    images, masks = (torch.stack([item[key] for item in items]).numpy() for key in ("images", "mask"))
    return images, masks, [item["subject"] for item in items]


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=BUNDLED_CHECKPOINT, help="folder (default: the bundled one)")
    parser.add_argument("--dataset", help="folder of slices to compare with; default: simulated subjects")
    parser.add_argument("--num_subjects", type=int, default=32, help="subjects each way (default: %(default)s)")
    parser.add_argument("--num_real", type=int, default=200, help="real slices to compare with (default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    args = parser.parse_args(argv)

    pipeline = DLDMPipeline.from_pretrained(args.pipeline)
    names = list(pipeline.autoencoder.config.modalities)
    images, masks, subjects = real_subjects(pipeline, args.dataset, args.num_real)
    real = evaluate_alignment(images, masks, names, subjects)
    spectrum = radial_power_spectrum(images)
    print("| way | edge correlation | enhancement | apart | empty masks | spectrum off by | s a subject |")
    print("|---|---|---|---|---|---|---|")
    for way in args.ways:
        started = time.perf_counter()
        structure, styles = WAYS[way](pipeline, args.num_subjects, args.seed, args.num_inference_steps)
        generator = torch.Generator().manual_seed(args.seed)
        output = pipeline(args.num_subjects, structure=structure, styles=styles, generator=generator, output_type="np")
        seconds = (time.perf_counter() - started) / args.num_subjects
        result = evaluate_alignment(output.images, output.masks, names, reference=real)
        off = compare_spectra(spectrum, radial_power_spectrum(output.images), names)["largest_deviation_worst"]
        edge, enhancement = (
            f"{100 * (1 + min(change)):.0f} %" if (change := list(result[f"{key}_change"].values())) else "-"
            for key in ("edge_correlation", "enhancement")
        )
        cells = [way, edge, enhancement, f"{100 * result['apart']:.0f} %", result["num_empty_masks"]]
        print(f"| {' | '.join(map(str, cells))} | {100 * off:.0f} % | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
