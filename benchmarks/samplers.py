"""Solvers and numbers of steps for structures and for styles: how real and how varied is what they draw?

    python benchmarks/samplers.py                                            # the bundled pipeline
    python benchmarks/samplers.py --pipeline outputs/ldm --dataset data/mine --num_subjects 300
    python benchmarks/samplers.py --styles_only                              # the second table, in a minute

Prints two Markdown tables. Structures: features of whole generated subjects (EfficientNet-Lite0) against held-out ones, mean
over modalities, with MS-SSIM between subjects, which should not be above that of held-out subjects. Styles: drawn for the
structures of held-out subjects and compared with the styles of these, mean over modalities: difference of means (best 0),
spread (best 1), difference of covariances (best 0) and relation between modalities (best 1), see `metrics/exchange.py`. Beside
them stand a joint Gaussian of all styles, which costs nothing, and one half of the held-out subjects against the other.
"""

import argparse
import time
from pathlib import Path

import diffusers
import numpy as np
import torch

from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.metrics.diversity import diversity
from dldm_pipeline.metrics.exchange import compare_styles
from dldm_pipeline.metrics.features import load_extractor
from dldm_pipeline.metrics.fidelity import feature_scores
from dldm_pipeline.metrics.images import Slices, read_slices, to_uint8

SOLVERS = {
    "DDIM": "DDIMScheduler",
    "DPM-Solver++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
SEED = 977_001  # of simulated subjects that no training has seen
SCORES = ("frechet_distance", "kernel_distance", "precision", "recall")


def print_table(header: list[str], rows: list[list], first: bool) -> None:
    """Prints the last row, after the header if it is the first."""
    if first:
        print(f"\n| {' | '.join(header)} |\n|---{'|---:' * (len(header) - 1)}|")
    cells = [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in rows[-1]]
    print(f"| {' | '.join(cells)} |", flush=True)


@exit_on_user_error()
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=BUNDLED_CHECKPOINT, help="folder (default: the bundled one)")
    parser.add_argument("--dataset", help="folder of slices whose validation split is compared (default: simulated)")
    parser.add_argument("--num_subjects", type=int, default=300, help="in each row (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=(6, 10, 20, 50), help="of the structures (6 10 20 50)")
    parser.add_argument("--style_steps", type=int, nargs="+", default=(1, 3, 5, 10), help="of the styles (1 3 5 10)")
    parser.add_argument(
        "--styles_only", action="store_true", help="leave out the first table, which takes most of the time"
    )
    args = parser.parse_args(argv)

    pipeline = DLDMPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    config, count = pipeline.autoencoder.config, args.num_subjects
    names, size = list(config.modalities), config.sample_size
    if args.dataset:
        real = read_slices(SliceDataset(args.dataset, "validation", names), count)
    else:
        real = Slices(to_uint8(np.stack([simulate_subject((SEED, i), size, names).images for i in range(count)])))
    count = len(real.images)
    solvers = {
        name: getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        for name, scheduler in SOLVERS.items()
    }
    seeds = [torch.Generator().manual_seed(k) for k in range(count)]

    def fresh() -> list[torch.Generator]:
        return [generator.manual_seed(k) for k, generator in enumerate(seeds)]

    if not args.styles_only:
        extractor, rows = load_extractor(), []
        known = [extractor(real.images[:, m]) for m in range(len(names))]
        header = ["structures", "Fréchet", "kernel", "precision", "recall", "MS-SSIM", "seconds a subject"]
        similar = np.mean([diversity(real.images[:, m], real.names("real")) for m in range(len(names))])
        rows.append(["held-out", *["-"] * 4, similar, "-"])
        print_table(header, rows, first=True)
        for name, solver in solvers.items():
            for steps in args.steps:
                pipeline.scheduler, started = solver, time.perf_counter()
                images = pipeline(count, generator=fresh(), num_inference_steps=steps, output_type="np").images
                seconds, images = (time.perf_counter() - started) / count, to_uint8(images)
                found = [feature_scores(known[m], extractor(images[:, m])) for m in range(len(names))]
                similar = np.mean([diversity(images[:, m], range(count)) for m in range(len(names))])
                scores = [np.mean([one[score] for one in found]) for score in SCORES]
                rows.append([f"{name}, {steps} steps", *scores, similar, seconds])
                print_table(header, rows, first=False)

    parts = torch.from_numpy(real.images / np.float32(255)).split(16)
    posteriors = [pipeline.autoencoder.encode(part) for part in parts]
    structure = torch.cat([posterior.structure_dist.mode() for posterior in posteriors])
    encoded = torch.cat([posterior.style_dist.mode() for posterior in posteriors]).numpy()
    flat = encoded.reshape(count, -1)
    joint = np.random.default_rng(0).multivariate_normal(flat.mean(axis=0), np.cov(flat.T), count)
    drawn = {"half of the held-out": (encoded[::2], "-"), "joint Gaussian": (joint.reshape(encoded.shape), "-")}
    header, rows = ["styles", "means", "spread", "covariances", "relation", "seconds a subject"], []
    for name, solver in solvers.items():
        for steps in args.style_steps:
            pipeline.scheduler, started = solver, time.perf_counter()
            options = dict(structure=structure, num_style_inference_steps=steps, output_type="latent")
            styles = pipeline(count, generator=fresh(), **options).styles.numpy()
            drawn[f"{name}, {steps} steps"] = styles, (time.perf_counter() - started) / count
    for name, (styles, seconds) in drawn.items():
        compared = compare_styles(styles, encoded[1::2] if "half" in name else encoded, names)
        rows.append([name, *(np.mean(list(values.values())) for values in compared.values()), seconds])
        print_table(header, rows, first=len(rows) == 1)


if __name__ == "__main__":
    main()
