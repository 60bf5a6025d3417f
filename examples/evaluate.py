"""Measure a trained pipeline against real subjects and other generators: `metrics.json`, `report.md`, `report.html`.

    python examples/evaluate.py                                             # bundled pipeline, new simulated subjects
    python examples/evaluate.py --pipeline P --dataset D                    # own pipeline, validation split of own data
    python examples/evaluate.py --pipeline P --dataset D --baselines outputs/stylegan2 outputs/plain_ldm --num_subjects 1000
    python examples/evaluate.py --autoencoder A --dataset D                 # an autoencoder alone

The report and `dldm_pipeline/metrics/` say what each figure means. Generated subjects, features and figures are kept in the
output's `cache` under a hash of all they depend on, so a second run computes only what has changed; the folder can be deleted.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.cli import add_pipeline_arguments, exit_on_user_error, find_pipeline
from dldm_pipeline.data.files import write_text
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.metrics import comparison, report
from dldm_pipeline.metrics.cache import Cache, fingerprint
from dldm_pipeline.metrics.exchange import exchange_sheet
from dldm_pipeline.metrics.features import EXTRACTORS, FeatureExtractor, load_extractor
from dldm_pipeline.metrics.fidelity import NEIGHBOURS
from dldm_pipeline.metrics.images import evenly_spaced, read_slices
from dldm_pipeline.metrics.memorization import closest_pairs_sheet

# Simulated subjects for a run without --dataset, of seeds that no training uses.
PHANTOM_SEED, SECOND_PHANTOM_SEED, NUM_PHANTOMS = 977_001, 977_002, 200
# Class of a compared system, as its config.json names it → its module in training/baselines, and its name in the report.
BASELINES = {"StyleGAN2": ("stylegan2", "StyleGAN2"), "PlainLDM": ("plain_ldm", "plain LDM")}
BASELINE_FOLDER = Path(__file__).resolve().parents[1] / "training" / "baselines"
SAMPLING = {"num_inference_steps": int, "num_style_inference_steps": int, "guidance_scale": float}
LEAST = {"max_validation": 1, "max_train": 1, "num_subjects": NEIGHBOURS + 1, "segmenter_steps": 0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_arguments(parser)

    def add(name: str, help: str, default: object = None, **options) -> None:
        help += "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", default=default, help=help, **options)

    add("autoencoder", "folder of an autoencoder, to measure it alone; nothing is generated", type=Path)
    add("baselines", "folders of compared systems, from training/baselines/", type=Path, nargs="+")
    add("dataset", f"folder of slices, or its name on the Hub (default: {NUM_PHANTOMS} simulated subjects)")
    add("split", "split of the dataset", "validation")
    add("max_validation", "slices at most for autoencoder and alignment", 400, type=int)
    add("max_train", "training slices at most to look for copies of", 10_000, type=int)
    add("num_subjects", "subjects of each system, and real ones", 100, type=int)
    for name, kind in SAMPLING.items():
        add(name, "(default: the pipeline's)", type=kind)
    add("step_counts", "numbers of structure steps to compare", [5, 10, 25, 50], type=int, nargs="+")
    add("step_subjects", "subjects of that comparison; 0: none", 50, type=int)
    add("extractor", "network that gives the features", "efficientnet-lite0", choices=list(EXTRACTORS))
    add("extractor_weights", "its weights (default: those installed, or downloaded)", type=Path)
    add("neighbour_extractor", "another one for precision, recall, density, coverage", choices=list(EXTRACTORS))
    add("segmenter_steps", "training steps of the segmenters that judge the masks; 0: none", 600, type=int)
    add("seed", "of splits, exchanges and subjects", 0, type=int)
    add("output", "folder of the report", Path("evaluation"), type=Path)
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises one clear error on what cannot work, before any of the work, and makes the output folder."""
    if args.autoencoder and (args.pipeline or args.baselines):
        raise ValueError("--autoencoder is measured alone: leave out --pipeline and --baselines, or give a pipeline.")
    if args.autoencoder and not (args.autoencoder / "config.json").is_file():
        raise FileNotFoundError(f"--autoencoder {args.autoencoder} holds no config.json; give a folder with a model.")
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give {least} or more.")
    if 0 != args.step_subjects <= NEIGHBOURS:
        raise ValueError(f"--step_subjects {args.step_subjects}: give {NEIGHBOURS + 1} or more, or 0 for none.")
    if min(args.step_counts) < 1:
        raise ValueError(f"--step_counts {min(args.step_counts)}: give 1 or more.")
    args.output.mkdir(parents=True, exist_ok=True)
    if not os.access(args.output, os.W_OK):
        raise PermissionError(f"--output {args.output} is not writable; choose another folder.")


@dataclass
class SimulatedSubjects(Dataset):
    """New simulated subjects with the items of a `SliceDataset`."""

    count: int
    size: int
    modalities: list[str]
    seed: int

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


def open_baseline(folder: Path, modalities: list[str], size: int, device: str) -> comparison.System:
    """A compared system, of whichever class its config.json names."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--baselines {folder} holds no config.json; give what training/baselines/ wrote.")
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
            f"--baselines {folder} generates {', '.join(own)} at {model.config.sample_size} pixels, the pipeline "
            f"{', '.join(modalities)} at {size}: compare systems that were trained on the same data."
        )
    columns = [own.index(modality) for modality in modalities]
    options = {"return_masks": True} if kind == "StyleGAN2" else {}

    def generate(generators: list[torch.Generator]):
        output = model.sample(len(generators), generators, **options)
        images, masks = output if options else (output, None)
        block = {"images": images[:, columns].numpy()}
        return block if masks is None else block | {"masks": masks.numpy() > 0.5}

    return comparison.System(name, str(folder), model.num_parameters(), generate, fingerprint(model))


def finite(value):
    """Replaces NaN and infinity by None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_systems(
    args: argparse.Namespace,
    systems: list[comparison.System],
    pipeline: DLDMPipeline,
    options: dict,
    data: tuple[Dataset, Dataset | None],
    extractor: FeatureExtractor,
    segmenters: dict,
    reference: dict,
    cache: Cache,
) -> tuple[dict, dict[str, Path]]:
    """All figures of generated subjects and their pictures. `reference` is the alignment of real subjects."""
    modalities, count, seed = list(pipeline.autoencoder.config.modalities), args.num_subjects, args.seed
    neighbours = load_extractor(args.neighbour_extractor, device=args.device) if args.neighbour_extractor else None
    real, second = (dataset and read_slices(dataset, count) for dataset in data)
    compared = comparison.Comparison(modalities, real, second, extractor, neighbours, seed, cache)
    samples = {system.name: comparison.sample(system, count, seed, cache) for system in systems}
    seconds = {name: float(subjects["seconds"].sum() / count) for name, subjects in samples.items()}
    images = {name: subjects["images"] for name, subjects in samples.items()}
    figures = args.output / "figures"
    pictures = {name: figures / f"{name}.png" for name in ("scores", "systems")}

    others = "other simulated subjects" if args.dataset is None else "training subjects of the data set"
    fidelity, spectra = compared.fidelity(samples), compared.spectra(images["DLDM"])
    results: dict = {
        "num_subjects": count,
        "second_real": "half of the held-out subjects" if second is None else others,
        "paper": report.PAPER,
        "systems": {
            one.name: {"folder": one.folder, "parameters": one.parameters, "seconds_per_subject": seconds[one.name]}
            for one in systems
        },
        "fidelity": fidelity,
        "claims": report.claims(report.mean_scores(fidelity)),
        "alignment": compared.alignment(samples, reference, segmenters, args.max_validation),
        "generation": {"num_subjects": count, "seconds_per_subject": seconds["DLDM"], **options, **spectra},
        "styles": compared.styles(samples["DLDM"]["styles"], pipeline.autoencoder),
    }
    report.plot_scores(fidelity, pictures["scores"])
    report.systems_sheet(real.images, real.present, images, modalities, pictures["systems"])
    if args.step_subjects:
        by_steps = {}
        for steps in sorted(set(args.step_counts)):
            others = options | {"num_inference_steps": steps}
            by_steps[steps] = comparison.pipeline_system(pipeline, systems[0].folder, **others)
        results["steps"] = compared.steps(by_steps, args.step_subjects)
        pictures["steps"] = figures / "steps.png"
        report.plot_steps(results["steps"], pictures["steps"])
    # Without --dataset it is unknown what the pipeline was trained on.
    if args.dataset is not None and second is not None and len(set(real.subjects)) > 1:
        train = read_slices(data[1], args.max_train)
        results["memorization"] = compared.memorization(samples, train, pipeline.autoencoder)
        pictures["closest_pairs"] = figures / "closest_pairs.png"
        closest = results["memorization"]["DLDM"]["closest"][:4]
        closest_pairs_sheet(closest, images["DLDM"], train.images, modalities, pictures["closest_pairs"])
    return results, pictures


@exit_on_user_error()
def main(argv: list[str] | None = None, extractor: FeatureExtractor | None = None) -> dict:
    """Runs the evaluation and returns what it wrote to `metrics.json`.

    Args:
        argv: the command line's arguments.
        extractor: features in place of those that `--extractor` names.
    """
    args = parse_args(argv)
    check_arguments(args)
    started = time.time()
    cache = Cache(args.output / "cache")
    # 1. The models.
    model, pipeline = args.autoencoder or find_pipeline(args.pipeline), None
    if args.autoencoder:
        autoencoder = DisentangledAutoencoder.from_pretrained(model).to(args.device).eval()
    else:
        pipeline = DLDMPipeline.from_pretrained(model).to(args.device)
        pipeline.set_progress_bar_config(disable=True)
        autoencoder = pipeline.autoencoder
    modalities, size = list(autoencoder.config.modalities), autoencoder.config.sample_size
    data = open_data(args, size, modalities)
    if pipeline is not None:
        defaults = inspect.signature(DLDMPipeline.__call__).parameters
        given = {name: getattr(args, name) for name in SAMPLING}
        options = {name: defaults[name].default if value is None else value for name, value in given.items()}
        systems = [comparison.pipeline_system(pipeline, model, **options)]
        systems += [open_baseline(folder, modalities, size, args.device) for folder in args.baselines or []]
        names = [system.name for system in systems]
        if len(set(names)) < len(names):
            raise ValueError(f"--baselines gives one system twice: {', '.join(names)}; give one folder of each.")
        extractor = extractor or load_extractor(args.extractor, args.extractor_weights, args.device)

    # 2. The autoencoder, on held-out subjects.
    count = args.max_validation if args.dataset else min(args.max_validation, NUM_PHANTOMS)
    items, others = list(tqdm(evenly_spaced(data[0], count), desc="read held-out")), []
    if data[1] is not None and args.segmenter_steps:
        others = list(tqdm(evenly_spaced(data[1], count), desc="read training"))
    segmenters, dice = comparison.find_segmenters(others, modalities, args.segmenter_steps, args.seed, cache)
    results = {
        "model": str(model),
        "dataset": str(args.dataset or f"{len(items)} simulated subjects, seed {PHANTOM_SEED}"),
        "seed": args.seed,
        "segmenter_dice": dice,
        **comparison.measure_autoencoder(
            autoencoder, items, segmenters, args.seed, cache, 0 if args.dataset else count
        ),
    }
    appearances = args.output / "figures" / "appearances.png"
    pictures = {"appearances": appearances} if exchange_sheet(autoencoder, items, appearances) else {}

    # 3. The pipeline and the other systems.
    if pipeline is not None:
        alignment = results["alignment"]
        measures = extractor, segmenters, alignment["validation"]
        compared, more = compare_systems(args, systems, pipeline, options, data, *measures, cache)
        pictures |= more
        results |= compared | {"alignment": alignment | compared["alignment"]}
    results["seconds"] = time.time() - started

    write_text(args.output / "metrics.json", json.dumps(finite(results), indent=2) + "\n")
    print(report.write_report(results, pictures, args.output))
    print(f"Written to {args.output / 'report.html'}, report.md and metrics.json.")
    return results


if __name__ == "__main__":
    main()
