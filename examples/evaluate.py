"""Measures a trained pipeline, or an autoencoder alone, on held-out subjects and writes `metrics.json` and `report.md`.

    python examples/evaluate.py                                             # bundled pipeline, fresh simulated subjects
    python examples/evaluate.py --pipeline P --dataset D                    # own pipeline, validation split of own data
    python examples/evaluate.py --autoencoder A --autoencoder_only --dataset D

What each figure means is written in `dldm_pipeline/metrics/`, one plain function each.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from dldm_pipeline import BUNDLED_CHECKPOINT
from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.metrics.alignment import evaluate_alignment
from dldm_pipeline.metrics.disentanglement import evaluate_disentanglement
from dldm_pipeline.metrics.reconstruction import (
    compare_spectra,
    encode_subjects,
    evaluate_reconstruction,
    radial_power_spectrum,
    rebuild,
)
from dldm_pipeline.pipeline_dldm import DLDMPipeline

# Simulated subjects for a run without --dataset: a seed of their own, so that no training run has seen them.
PHANTOM_SEED, NUM_PHANTOMS = 977_001, 200


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="pipeline folder; default: the bundled one")
    parser.add_argument("--autoencoder", type=Path, help="autoencoder folder to use with --autoencoder_only")
    parser.add_argument("--autoencoder_only", action="store_true", help="measure the autoencoder, generate nothing")
    parser.add_argument(
        "--dataset", help=f"folder of slices, or its name on the Hub; default: {NUM_PHANTOMS} simulated subjects"
    )
    parser.add_argument("--split", default="validation", help="split of the dataset (default: %(default)s)")
    parser.add_argument("--max_validation", type=int, default=400, help="slices to use at most (default: %(default)s)")
    parser.add_argument("--num_subjects", type=int, default=100, help="subjects to generate (default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--num_style_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--batch_size", type=int, default=4, help="subjects at a time (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of splits, exchanges and subjects (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder of the report (%(default)s)")
    return parser.parse_args(arguments)


def simulated_subjects(size: int, modalities: list[str], count: int) -> list[dict]:
    """Fresh simulated subjects with the items of a `SliceDataset`."""
    rows = phantom_rows(count, size=size, seed=PHANTOM_SEED, modalities=modalities, num_workers=os.cpu_count() or 1)
    return [
        {
            "images": torch.stack([torch.from_numpy(row[name]) for name in modalities]),
            "present": torch.ones(len(modalities), dtype=torch.bool),
            "mask": torch.from_numpy(row["mask"]).float(),
            "has_mask": torch.tensor(True),
            "subject": row["subject"],
        }
        for row in tqdm(rows, total=count, desc="simulate")
    ]


def generate(pipeline: DLDMPipeline, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, dict]:
    """Images (S, n, H, W), masks (S, H, W) and how they were made; subject i is drawn from seed `args.seed + i`."""
    defaults = inspect.signature(pipeline.__call__).parameters
    options = {
        name: defaults[name].default if getattr(args, name) is None else getattr(args, name)
        for name in ("num_inference_steps", "num_style_inference_steps", "guidance_scale")
    }
    pipeline.set_progress_bar_config(disable=True)
    images, masks, started = [], [], time.time()
    with tqdm(total=args.num_subjects, desc="generate") as bar:
        for start in range(0, args.num_subjects, 8):
            seeds = range(args.seed + start, args.seed + min(start + 8, args.num_subjects))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            output = pipeline(num_subjects=len(seeds), generator=generators, output_type="np", **options)
            images.append(output.images)
            masks.append(output.masks)
            bar.update(len(seeds))
    seconds = (time.time() - started) / args.num_subjects
    return (
        np.concatenate(images),
        np.concatenate(masks),
        {"num_subjects": args.num_subjects, "seconds_per_subject": seconds, **options},
    )


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table: numbers are right-aligned and rounded to three decimals at most, None is a dash."""

    def cell(value) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows])


def mean(values: dict[str, float]) -> float:
    known = [value for value in values.values() if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def reconstruction_report(result: dict) -> str:
    names, score, spectrum = result["modalities"], result["psnr"], result["spectrum"]

    def row(title: str, values: dict[str, float], summary: float | None = None) -> list:
        return [title, *(values[name] for name in names), mean(values) if summary is None else summary]

    rows = [
        row("structure from all", score["all"]),
        row("styles exchanged between subjects", score["exchanged"]),
        *(row(f"structure from {name} alone", score["single"][name]) for name in names),
        row("reference: another subject's real image", score["another_subject"]),
    ]
    lines = [
        "## Reconstruction",
        f"{result['num_slices']} held-out slices of {result['num_subjects']} subjects.\n",
        "PSNR in dB (columns: the modality rebuilt):\n",
        table(["", *names, "mean"], rows),
        "\nLoss against structure from all, in dB:\n",
        table(
            ["", *names, "mean"],
            [
                row("styles exchanged", result["exchange_cost"]),
                row("structure from this modality alone", result["single_cost"]),
            ],
        ),
        f"\n- mean PSNR {result['psnr_mean']:.2f} dB, worst modality {result['psnr_worst']:.2f} dB, "
        f"best - worst {result['psnr_spread']:.2f} dB",
        f"- structure from one modality: {result['single_cost_mean']:.2f} dB below structure from all; "
        f"{result['single_cost_mean_others']:.2f} dB for the modalities not given",
    ]
    if result["mask_dice"] is not None:
        single = result["mask_dice_single"]
        lines += [
            "\nTumour mask (decoded from the structure alone):\n",
            table(
                ["structure from", "all", *(f"{name} alone" for name in names)],
                [["Dice", result["mask_dice"], *(single[name] for name in names)]],
            ),
        ]
    lines += ["\n" + spectrum_report(spectrum, names, "rebuilt")]
    return "\n".join(lines)


def spectrum_report(spectrum: dict, names: list[str], what: str) -> str:
    """Power ratio at a few rings and the largest deviation over all of them."""
    rings = len(spectrum["ratio_mean"]) - 1
    shown = sorted({round(rings * part) for part in (0.05, 0.25, 0.5, 0.75, 1.0)})
    rows = [[name, *(spectrum["ratio"][name][r] for r in shown), spectrum["largest_deviation"][name]] for name in names]
    rows.append(
        [
            "mean of ratios",
            *(spectrum["ratio_mean"][r] for r in shown),
            spectrum["largest_deviation_mean_ratio"],
        ]
    )
    header = ["", *(f"ring {r}" for r in shown), "largest deviation from 1, all rings"]
    title = f"Power spectrum, {what} over real (ring {rings} is half the Nyquist frequency):\n\n"
    return title + table(header, rows)


def disentanglement_report(result: dict) -> str:
    titles = {
        "style": "z_style",
        "structure_mean": "z_struct of one modality, mean over the grid",
        "structure_full": "z_struct of one modality, whole",
        "structure_mean_deviation": "not linear, does not count: mean and deviation over the grid",
        "structure_full_shuffled": "reference: the same with shuffled labels",
        "images": "reference: images in 8×8 blocks",
    }
    rows = [
        [title, result[key]["features"], 100 * result[key]["accuracy"], 100 * result[key]["chance"]]
        for key, title in titles.items()
    ]
    lines = ["## Disentanglement", "A linear probe names the modality of unseen subjects, in % of codes:\n"]
    lines += [table(["code", "features", "accuracy", "chance"], rows)]
    lines += [
        f"\n- structure: {result['structure_over_chance']:.1f} points over chance (the higher of the first two probes)"
    ]
    return "\n".join(lines)


def alignment_report(sets: dict[str, dict]) -> str:
    """Tables over the named sets of subjects, the validation subjects first."""
    real = sets["validation"]
    pairs = list(real["edge_correlation"])

    def change(values: dict[str, float], names: list[str]) -> list[str | None]:
        return [f"{100 * values[name]:+.1f} %" if math.isfinite(values[name]) else None for name in names]

    rows = [["validation subjects", *real["edge_correlation"].values(), 100 * real["apart"]]]
    for title, result in list(sets.items())[1:]:
        rows.append([title, *result["edge_correlation"].values(), 100 * result["apart"]])
        rows.append([f"{title}, change", *change(result["edge_correlation_change"], pairs), None])
    rows.append(["reference: shuffled validation subjects", *real["edge_correlation_shuffled"].values(), None])
    lines = [
        "## Alignment",
        "Correlation of edges inside the brain between two modalities of one subject; *apart*: % of all pairs no higher",
        "than the 95th percentile of shuffled subjects:\n",
        table(["", *pairs, "apart"], rows),
    ]
    enhanced = list(real["enhancement"])
    if enhanced:
        rows = [["validation subjects", *real["enhancement"].values(), real["num_empty_masks"]]]
        for title, result in list(sets.items())[1:]:
            rows.append([title, *result["enhancement"].values(), result["num_empty_masks"]])
            rows.append([f"{title}, change", *change(result["enhancement_change"], enhanced), None])
        rows.append(["reference: another subject's mask", *real["enhancement_shuffled"].values(), None])
        lines += [
            "\nEnhancement: mean inside the tumour mask over mean in the rest of the brain:\n",
            table(["", *enhanced, "empty masks"], rows),
        ]
    if real["vessels"]:
        rows = [
            [title.replace("validation", "validation subjects"), *r["vessels"].values()] for title, r in sets.items()
        ]
        rows.append(["reference: BB of another subject", *real["vessels_shuffled"].values()])
        lines += [
            "\nVessels (the brain's top hundredth of WB - BB, away from the tumour): mean over the brain's mean:\n",
            table(["", "WB", "BB"], rows),
        ]
    return "\n".join(lines)


def generation_report(result: dict, names: list[str]) -> str:
    lines = [
        "## Sharpness of generated images",
        f"{result['num_subjects']} subjects in {result['num_inference_steps']} + {result['num_style_inference_steps']} steps, "
        f"guidance {result['guidance_scale']}, {result['seconds_per_subject']:.2f} s a subject.\n",
        spectrum_report(result["spectrum"], names, "generated"),
        "\nReference, what chance alone does between two halves of the validation subjects: largest deviation "
        f"{result['spectrum_validation_halves']['largest_deviation_worst']:.3f}.",
    ]
    return "\n".join(lines)


def finite(value):
    """Replaces NaN and infinity by None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames, so that no half-written file is ever left under `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def check_arguments(args: argparse.Namespace) -> None:
    """Raises one clear error on what cannot work, before any of the work."""
    if args.autoencoder and not args.autoencoder_only:
        raise ValueError("--autoencoder needs --autoencoder_only; a whole pipeline is given by --pipeline.")
    if args.autoencoder and args.pipeline:
        raise ValueError("--autoencoder and --pipeline are both given; give the one to measure.")
    for name in ("max_validation", "batch_size", "num_subjects"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give 1 or more.")
    folder, marker = (args.autoencoder, "config.json") if args.autoencoder else (args.pipeline, "model_index.json")
    folder = folder or BUNDLED_CHECKPOINT
    if not (folder / marker).is_file():
        raise FileNotFoundError(f"{folder} holds no {marker}; give a folder written by save_pretrained.")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output {args.output} cannot be made ({error.strerror}); choose another folder.") from error
    if not os.access(args.output, os.W_OK):
        raise PermissionError(f"--output {args.output} is not writable; choose another folder.")


def main(arguments: list[str] | None = None) -> dict:
    """Runs the evaluation and returns what it wrote to `metrics.json`."""
    args = parse_args(arguments)
    check_arguments(args)
    started = time.time()
    model = args.autoencoder or args.pipeline or BUNDLED_CHECKPOINT
    if args.autoencoder_only:
        folder = model if args.autoencoder else model / "autoencoder"
        pipeline, autoencoder = None, DisentangledAutoencoder.from_pretrained(folder).to(args.device).eval()
    else:
        pipeline = DLDMPipeline.from_pretrained(model).to(args.device)
        autoencoder = pipeline.autoencoder
    modalities = list(autoencoder.config.modalities)
    size = autoencoder.config.sample_size
    if args.dataset is None:
        dataset = simulated_subjects(size, modalities, min(args.max_validation, NUM_PHANTOMS))
    else:
        dataset = SliceDataset(args.dataset, split=args.split, modalities=modalities)
        if dataset.image_size != size:
            raise ValueError(f"--dataset {args.dataset} has {dataset.image_size} pixel images, the model needs {size}.")

    encoded = encode_subjects(autoencoder, dataset, args.max_validation, args.batch_size)
    rebuilt, rebuilt_masks = rebuild(autoencoder, encoded, args.batch_size)
    real = evaluate_alignment(
        encoded.images, encoded.masks, modalities, encoded.subjects, encoded.present, encoded.has_mask, seed=args.seed
    )
    alignment = {
        "validation": real,
        "rebuilt": evaluate_alignment(
            rebuilt, rebuilt_masks, modalities, encoded.subjects, encoded.present, reference=real, seed=args.seed
        ),
    }
    results = {
        "model": str(model),
        "dataset": str(args.dataset or f"{len(dataset)} simulated subjects, seed {PHANTOM_SEED}"),
        "seed": args.seed,
        "reconstruction": evaluate_reconstruction(autoencoder, encoded, args.batch_size, seed=args.seed),
        "disentanglement": evaluate_disentanglement(encoded, seed=args.seed),
    }
    parts = [reconstruction_report(results["reconstruction"]), disentanglement_report(results["disentanglement"])]
    if pipeline is not None:
        images, masks, generation = generate(pipeline, args)
        alignment["generated"] = evaluate_alignment(images, masks, modalities, reference=real, seed=args.seed)
        spectra = np.where(encoded.present[..., None], radial_power_spectrum(encoded.images), np.nan)
        first_half = np.isin(encoded.subjects, sorted(set(encoded.subjects))[::2])
        results["generation"] = {
            **generation,
            "spectrum": compare_spectra(spectra, radial_power_spectrum(images), modalities),
            "spectrum_validation_halves": compare_spectra(spectra[first_half], spectra[~first_half], modalities),
        }
        parts.append(generation_report(results["generation"], modalities))
    results["alignment"] = alignment
    parts.append(alignment_report(alignment))
    results["seconds"] = time.time() - started

    head = f"# Evaluation\n\nModel: `{results['model']}`, data: `{results['dataset']}`, {results['seconds']:.0f} s."
    report = "\n\n".join([head, *parts]) + "\n"
    write_text(args.output / "metrics.json", json.dumps(finite(results), indent=2) + "\n")
    write_text(args.output / "report.md", report)
    print(report)
    print(f"Written to {args.output / 'report.md'} and {args.output / 'metrics.json'}.")
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
