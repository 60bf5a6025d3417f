"""Measures a trained pipeline, or an autoencoder alone, on held-out subjects and writes `metrics.json` and `report.md`.

    python examples/evaluate.py                                             # bundled pipeline, fresh simulated subjects
    python examples/evaluate.py --pipeline P --dataset D                    # own pipeline, validation split of own data
    python examples/evaluate.py --autoencoder A --autoencoder_only --dataset D

What each figure means is written in `dldm_pipeline/metrics/`, one plain function each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dldm_pipeline import BUNDLED_CHECKPOINT
from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.metrics.disentanglement import evaluate_disentanglement
from dldm_pipeline.metrics.reconstruction import encode_subjects, evaluate_reconstruction

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
    parser.add_argument("--batch_size", type=int, default=4, help="subjects at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of splits and exchanges (default: %(default)s)")
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
        "structure_pooled": "z_struct of one modality, mean and deviation",
        "structure_full": "z_struct of one modality, whole",
        "structure_full_shuffled": "reference: the same with shuffled labels",
        "images": "reference: images in 8×8 blocks",
    }
    rows = [
        [title, result[key]["features"], 100 * result[key]["accuracy"], 100 * result[key]["chance"]]
        for key, title in titles.items()
    ]
    lines = ["## Disentanglement", "A linear probe names the modality of unseen subjects, in % of codes:\n"]
    lines += [table(["code", "features", "accuracy", "chance"], rows)]
    lines += [f"\n- structure: {result['structure_over_chance']:.1f} points over chance (the higher of both probes)"]
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


def load_autoencoder(args: argparse.Namespace) -> DisentangledAutoencoder:
    folder, argument = (
        (args.autoencoder, "--autoencoder") if args.autoencoder else ((args.pipeline / "autoencoder"), "--pipeline")
    )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{argument}: {folder} holds no config.json; give a folder written by save_pretrained.")
    return DisentangledAutoencoder.from_pretrained(folder)


def main(arguments: list[str] | None = None) -> dict:
    """Runs the evaluation and returns what it wrote to `metrics.json`."""
    args = parse_args(arguments)
    if args.autoencoder and not args.autoencoder_only:
        raise ValueError("--autoencoder needs --autoencoder_only; a whole pipeline is given by --pipeline.")
    for name in ("max_validation", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give 1 or more.")
    args.pipeline = args.pipeline or BUNDLED_CHECKPOINT
    args.output.mkdir(parents=True, exist_ok=True)
    if not os.access(args.output, os.W_OK):
        raise PermissionError(f"--output {args.output}: the folder is not writable; choose another.")

    started = time.time()
    autoencoder = load_autoencoder(args).to(args.device).eval()
    modalities = list(autoencoder.config.modalities)
    size = autoencoder.config.sample_size
    if args.dataset is None:
        dataset = simulated_subjects(size, modalities, min(args.max_validation, NUM_PHANTOMS))
    else:
        dataset = SliceDataset(args.dataset, split=args.split, modalities=modalities)
        if dataset.image_size != size:
            raise ValueError(f"--dataset {args.dataset} has {dataset.image_size} pixel images, the model needs {size}.")

    encoded = encode_subjects(autoencoder, dataset, args.max_validation, args.batch_size)
    results = {
        "model": str(args.autoencoder or args.pipeline),
        "dataset": str(args.dataset or f"{len(dataset)} simulated subjects, seed {PHANTOM_SEED}"),
        "seed": args.seed,
        "reconstruction": evaluate_reconstruction(autoencoder, encoded, args.batch_size, seed=args.seed),
        "disentanglement": evaluate_disentanglement(encoded, seed=args.seed),
    }
    parts = [reconstruction_report(results["reconstruction"]), disentanglement_report(results["disentanglement"])]
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
