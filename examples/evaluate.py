"""Measures a trained pipeline beside real subjects and other generators; writes `metrics.json`, `report.md`, `report.html`.

    python examples/evaluate.py                                             # bundled pipeline, fresh simulated subjects
    python examples/evaluate.py --pipeline P --dataset D                    # own pipeline, validation split of own data
    python examples/evaluate.py --pipeline P --dataset D --baselines outputs/stylegan2 outputs/plain_ldm --num_subjects 1000
    python examples/evaluate.py --autoencoder A --autoencoder_only --dataset D

What each figure means is written in the report and in `dldm_pipeline/metrics/`. Generated subjects, features and figures are
kept in the output's `cache` under a hash of all they depend on, so a second run computes only what has changed; the folder
can be deleted.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dldm_pipeline import BUNDLED_CHECKPOINT
from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.metrics.comparison import (
    NEIGHBOURS,
    Cache,
    System,
    compare_alignment,
    compare_fidelity,
    compare_memorization,
    compare_spectra_of,
    compare_steps,
    find_segmenters,
    fingerprint,
    measure_autoencoder,
    pipeline_system,
    sample,
    write_text,
)
from dldm_pipeline.metrics.features import EXTRACTORS, FeatureExtractor, load_extractor
from dldm_pipeline.metrics.images import read_slices
from dldm_pipeline.metrics.memorization import closest_pairs_sheet
from dldm_pipeline.metrics.report import (
    PAPER,
    build_report,
    claims,
    mean_scores,
    plot_scores,
    plot_steps,
    systems_sheet,
    to_html,
    to_markdown,
)
from dldm_pipeline.pipeline_dldm import DLDMPipeline

# Simulated subjects for a run without --dataset: seeds of their own, so that no training run has seen them.
PHANTOM_SEED, SECOND_PHANTOM_SEED, NUM_PHANTOMS = 977_001, 977_002, 200
# Class of a compared system, as its config.json names it -> its module in a folder of scripts, and its name in the report.
BASELINES = {"StyleGAN2": ("stylegan2", "StyleGAN2"), "PlainLDM": ("plain_ldm", "plain LDM")}
BASELINE_FOLDER = Path(__file__).resolve().parents[1] / "training" / "baselines"
SAMPLING = ("num_inference_steps", "num_style_inference_steps", "guidance_scale")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="pipeline folder; default: the bundled one")
    parser.add_argument("--autoencoder", type=Path, help="autoencoder folder to use with --autoencoder_only")
    parser.add_argument("--autoencoder_only", action="store_true", help="measure the autoencoder, generate nothing")
    parser.add_argument(
        "--baselines", type=Path, nargs="+", default=[], help="folders of compared systems, from training/baselines/"
    )
    parser.add_argument(
        "--dataset", help=f"folder of slices, or its name on the Hub; default: {NUM_PHANTOMS} simulated subjects"
    )
    parser.add_argument("--split", default="validation", help="split of the dataset (default: %(default)s)")
    parser.add_argument(
        "--max_validation",
        type=int,
        default=400,
        help="slices at most for autoencoder and alignment (default: %(default)s)",
    )
    parser.add_argument(
        "--max_train", type=int, default=10_000, help="training slices to look for copies of (default: %(default)s)"
    )
    parser.add_argument(
        "--num_subjects", type=int, default=100, help="subjects of each system, and real ones (default: %(default)s)"
    )
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--num_style_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument(
        "--step_counts", type=int, nargs="+", default=[5, 10, 25, 50], help="structure steps to compare (%(default)s)"
    )
    parser.add_argument(
        "--step_subjects", type=int, default=50, help="subjects of that comparison, 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--extractor", choices=list(EXTRACTORS), default="efficientnet-lite0", help="features (default: %(default)s)"
    )
    parser.add_argument("--extractor_weights", type=Path, help="local weights; default: installed, or downloaded")
    parser.add_argument(
        "--neighbour_extractor",
        choices=list(EXTRACTORS),
        help="another one for precision, recall, density and coverage, such as vgg16",
    )
    parser.add_argument(
        "--segmenter_steps",
        type=int,
        default=600,
        help="training steps of the segmenters that judge the masks, 0: none (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=int, default=4, help="subjects at a time (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of splits, exchanges and subjects (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder of the report (%(default)s)")
    return parser.parse_args(arguments)


def sampling_options(args: argparse.Namespace) -> dict:
    """What the pipeline is called with, defaults included."""
    defaults = inspect.signature(DLDMPipeline.__call__).parameters
    return {name: defaults[name].default if getattr(args, name) is None else getattr(args, name) for name in SAMPLING}


def check_arguments(args: argparse.Namespace) -> None:
    """Raises one clear error on what cannot work, before any of the work."""
    if args.autoencoder and not args.autoencoder_only:
        raise ValueError("--autoencoder needs --autoencoder_only; a whole pipeline is given by --pipeline.")
    if args.autoencoder and args.pipeline:
        raise ValueError("--autoencoder and --pipeline are both given; give the one to measure.")
    if args.baselines and args.autoencoder_only:
        raise ValueError("--baselines are compared with a pipeline; leave out --autoencoder_only.")
    for name in ("max_validation", "max_train", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give 1 or more.")
    if args.num_subjects <= NEIGHBOURS:
        raise ValueError(
            f"--num_subjects {args.num_subjects}: scores of {NEIGHBOURS} nearest neighbours need {NEIGHBOURS + 1} or more."
        )
    if args.step_subjects and not NEIGHBOURS < args.step_subjects:
        raise ValueError(
            f"--step_subjects {args.step_subjects}: give {NEIGHBOURS + 1} or more, or 0 for no comparison."
        )
    if min(args.step_counts) < 1:
        raise ValueError(f"--step_counts {min(args.step_counts)}: give numbers of 1 or more.")
    if args.segmenter_steps < 0:
        raise ValueError(f"--segmenter_steps {args.segmenter_steps}: give 1 or more, or 0 for no segmenters.")
    model, marker = (args.autoencoder, "config.json") if args.autoencoder else (args.pipeline, "model_index.json")
    for folder, file in [
        (model or BUNDLED_CHECKPOINT, marker),
        *((folder, "config.json") for folder in args.baselines),
    ]:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; give a folder written by save_pretrained.")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output {args.output} cannot be made ({error.strerror}); choose another folder.") from error
    if not os.access(args.output, os.W_OK):
        raise PermissionError(f"--output {args.output} is not writable; choose another folder.")


class SimulatedSubjects(Dataset):
    """Fresh simulated subjects with the items of a `SliceDataset`."""

    def __init__(self, count: int, size: int, modalities: Sequence[str], seed: int) -> None:
        self.count, self.size, self.modalities, self.seed = count, size, tuple(modalities), seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        subject = simulate_subject((self.seed, index), self.size, self.modalities)
        return {
            "images": torch.from_numpy(subject.images),
            "present": torch.ones(len(self.modalities), dtype=torch.bool),
            "mask": torch.from_numpy(subject.mask).float(),
            "has_mask": torch.tensor(True),
            "subject": f"phantom-{index:06d}",
        }


def open_data(args: argparse.Namespace, size: int, modalities: list[str]) -> tuple[Dataset, Dataset | None]:
    """Held-out subjects, and other real ones: training subjects, where there are any."""
    if args.dataset is None:
        count = max(NUM_PHANTOMS, args.num_subjects)
        return tuple(SimulatedSubjects(count, size, modalities, seed) for seed in (PHANTOM_SEED, SECOND_PHANTOM_SEED))
    held_out = SliceDataset(args.dataset, split=args.split, modalities=modalities)
    if held_out.image_size != size:
        raise ValueError(f"--dataset {args.dataset} has {held_out.image_size} pixel images, the model needs {size}.")
    if args.split == "train":
        return held_out, None
    try:
        return held_out, SliceDataset(args.dataset, split="train", modalities=modalities)
    except ValueError:  # there is no such split
        return held_out, None


def read_items(dataset: Dataset, count: int, desc: str) -> list[dict]:
    """At most `count` items, taken at even distances."""
    rows = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
    return [dataset[i] for i in tqdm(rows, desc=desc)]


def open_baseline(folder: Path, modalities: list[str], size: int, device: str) -> System:
    """A compared system, of whichever class its config.json names."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except ValueError as error:
        raise ValueError(f"--baselines {folder}: its config.json is damaged ({error}); copy it again.") from error
    if kind not in BASELINES:
        raise ValueError(f"--baselines {folder} holds a {kind}; known are {', '.join(BASELINES)}.")
    module, name = BASELINES[kind]
    if str(BASELINE_FOLDER) not in sys.path:  # the scripts there import each other by name
        sys.path.insert(0, str(BASELINE_FOLDER))
    model = getattr(importlib.import_module(module), kind).from_pretrained(folder).to(device).eval()
    own = list(model.config.modalities)
    if sorted(own) != sorted(modalities) or model.config.sample_size != size:
        raise ValueError(
            f"--baselines {folder} draws {', '.join(own)} at {model.config.sample_size} pixels, the pipeline "
            f"{', '.join(modalities)} at {size}: compare systems that were trained on the same data."
        )
    columns = [own.index(modality) for modality in modalities]
    has_masks = bool(model.config.get("mask"))

    def draw(generators: list[torch.Generator]):
        drawn = model.sample(len(generators), generators, **({"return_masks": True} if has_masks else {}))
        images, masks = drawn if has_masks else (drawn, None)
        return images[:, columns].numpy(), None if masks is None else masks.numpy() > 0.5, None

    name += ", class-conditional" if model.config.get("conditional") else ""
    return System(name, str(folder), sum(value.numel() for value in model.parameters()), draw, fingerprint(model))


def finite(value):
    """Replaces NaN and infinity by None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_systems(
    systems: list[System],
    pipeline: DLDMPipeline,
    data: tuple[Dataset, Dataset | None],
    extractor: FeatureExtractor,
    segmenters: dict,
    reference: dict,
    args: argparse.Namespace,
    cache: Cache,
) -> tuple[dict, dict[str, Path]]:
    """All figures of generated subjects and their pictures. `reference` is the alignment of real subjects."""
    modalities, seed = list(pipeline.autoencoder.config.modalities), args.seed
    folder, options = systems[0].folder, sampling_options(args)
    neighbours = load_extractor(args.neighbour_extractor, device=args.device) if args.neighbour_extractor else None
    real, second = (data_set and read_slices(data_set, args.num_subjects) for data_set in data)
    samples = {system.name: sample(system, args.num_subjects, seed, cache) for system in systems}
    seconds = {name: float(drawn["seconds"].sum() / args.num_subjects) for name, drawn in samples.items()}
    images = {name: drawn["images"] for name, drawn in samples.items()}
    pictures = {name: args.output / "figures" / f"{name}.png" for name in ("scores", "systems")}

    others = "other simulated subjects" if args.dataset is None else "training subjects of the data set"
    results: dict = {
        "num_subjects": args.num_subjects,
        "second_real": "half of the held-out subjects" if second is None else others,
        "paper": PAPER,
    }
    results["systems"] = {
        one.name: {"folder": one.folder, "parameters": one.parameters, "seconds_per_subject": seconds[one.name]}
        for one in systems
    }
    results["fidelity"] = compare_fidelity(samples, real, second, modalities, extractor, neighbours, seed, cache)
    results["claims"] = claims(mean_scores(results["fidelity"]))
    plot_scores(results["fidelity"], pictures["scores"])
    systems_sheet(real.images, real.present, images, modalities, pictures["systems"])
    results["alignment"] = compare_alignment(
        samples, modalities, reference, segmenters, args.max_validation, seed, cache
    )
    results["generation"] = {
        "num_subjects": args.num_subjects,
        "seconds_per_subject": seconds["DLDM"],
        **options,
        **compare_spectra_of(real, images["DLDM"], modalities),
    }
    if args.step_subjects:
        by_steps = {
            steps: pipeline_system(pipeline, folder, **options | {"num_inference_steps": steps})
            for steps in sorted(set(args.step_counts))
        }
        results["steps"] = compare_steps(by_steps, args.step_subjects, real, second, modalities, extractor, seed, cache)
        pictures["steps"] = args.output / "figures" / "steps.png"
        plot_steps(results["steps"], pictures["steps"])
    # Without --dataset nobody knows what the pipeline was trained on.
    if args.dataset is not None and second is not None and len(set(real.subjects)) > 1:
        train = read_slices(data[1], args.max_train)
        found = compare_memorization(samples, train, real, modalities, pipeline.autoencoder, seed, cache)
        results["memorization"], pictures["closest_pairs"] = found, args.output / "figures" / "closest_pairs.png"
        closest = found["DLDM"]["closest"][:4]
        closest_pairs_sheet(closest, images["DLDM"], train.images, modalities, pictures["closest_pairs"])
    return results, pictures


def main(arguments: list[str] | None = None, extractor: FeatureExtractor | None = None) -> dict:
    """Runs the evaluation and returns what it wrote to `metrics.json`.

    Args:
        arguments: of the command line.
        extractor: features in place of those that `--extractor` names.
    """
    args = parse_args(arguments)
    check_arguments(args)
    started = time.time()
    cache = Cache(args.output / "cache")
    model = args.autoencoder or args.pipeline or BUNDLED_CHECKPOINT
    pipeline, systems = None, []
    if args.autoencoder_only:
        folder = model if args.autoencoder else model / "autoencoder"
        autoencoder = DisentangledAutoencoder.from_pretrained(folder).to(args.device).eval()
    else:
        pipeline = DLDMPipeline.from_pretrained(model).to(args.device)
        pipeline.set_progress_bar_config(disable=True)
        autoencoder = pipeline.autoencoder
    modalities, size = list(autoencoder.config.modalities), autoencoder.config.sample_size
    data = open_data(args, size, modalities)
    if pipeline is not None:
        systems = [pipeline_system(pipeline, model, **sampling_options(args))]
        systems += [open_baseline(folder, modalities, size, args.device) for folder in args.baselines]
        names = [system.name for system in systems]
        if len(set(names)) < len(names):
            raise ValueError(f"--baselines gives one system twice: {', '.join(names)}; give one folder of each.")
        extractor = extractor or load_extractor(args.extractor, args.extractor_weights, args.device)

    count = args.max_validation if args.dataset else min(args.max_validation, NUM_PHANTOMS)
    items = read_items(data[0], count, "read held-out")
    others = read_items(data[1], count, "read training") if data[1] is not None and args.segmenter_steps else []
    segmenters, segmenter_dice = find_segmenters(others, modalities, args.segmenter_steps, args.seed, cache)
    results = {
        "model": str(model),
        "dataset": str(args.dataset or f"{len(items)} simulated subjects, seed {PHANTOM_SEED}"),
        "seed": args.seed,
        "segmenter_dice": segmenter_dice,
        **measure_autoencoder(autoencoder, items, segmenters, args.batch_size, args.seed, cache),
    }
    pictures: dict[str, Path] = {}
    if pipeline is not None:
        alignment = results["alignment"]
        compared, pictures = compare_systems(
            systems, pipeline, data, extractor, segmenters, alignment["validation"], args, cache
        )
        results |= compared | {"alignment": alignment | compared["alignment"]}
    results["seconds"] = time.time() - started

    sections = build_report(results, pictures)
    report = to_markdown("Evaluation", sections, args.output)
    write_text(args.output / "metrics.json", json.dumps(finite(results), indent=2) + "\n")
    write_text(args.output / "report.md", report)
    write_text(args.output / "report.html", to_html("Evaluation", sections))
    print(report)
    print(f"Written to {args.output / 'report.html'}, report.md and metrics.json.")
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        if os.environ.get("DLDM_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
