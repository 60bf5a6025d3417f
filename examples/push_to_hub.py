"""Share a trained pipeline, or a data set, on the Hub.

    python examples/push_to_hub.py outputs/mine --repo_id me/brains --metrics evaluation/metrics.json
    python examples/push_to_hub.py outputs/mine --repo_id me/brains --private --revision trial
    python examples/push_to_hub.py --dataset data/mine --repo_id me/slices --private

Log in once with `hf auth login`. A pipeline gets a model card: four generated subjects, the figures that examples/evaluate.py
measured, training data and settings, licence, limits, and how to load it with or without this package. A data set is uploaded
as prepare_dataset.py wrote it, with its own card. The upload is one commit: if it fails, no file there has changed.
What you push is public unless you add --private; check that you may share it.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import fmean

import torch

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.hub import PRIVATE_NAMES, push_folder, read_card_data, write_model_card, write_pretrained

NUM_PICTURES = 4

# Name in the card's table, and where metrics.json has the figure; of several values, their mean.
FIGURES = {
    "rebuilt images, PSNR (dB)": "reconstruction.psnr_mean",
    "rebuilt images, PSNR of the worst modality (dB)": "reconstruction.psnr_worst",
    "PSNR lost when structure comes from one modality (dB)": "reconstruction.single_cost_mean",
    "PSNR lost when the style comes from another anatomy (dB)": "exchange.truth.exchange_cost",
    "way from the mean style to the own one, gone by exchanged styles": "exchange.truth.gap_closed",
    "tumour mask, Dice": "reconstruction.mask_dice",
    "modality predicted from the structure (points above chance)": "disentanglement.structure_over_chance",
    "generated images, Fréchet distance of features": "fidelity.DLDM.scores.frechet_distance.mean.value",
    "Fréchet distance of a second real sample": "fidelity.DLDM.floor.scores.frechet_distance.mean.value",
    "generated images, precision": "fidelity.DLDM.scores.precision.mean.value",
    "precision of a second real sample": "fidelity.DLDM.floor.scores.precision.mean.value",
    "generated images, recall": "fidelity.DLDM.scores.recall.mean.value",
    "recall of a second real sample": "fidelity.DLDM.floor.scores.recall.mean.value",
    "generated modalities, correlation of edges": "alignment.DLDM.edge_correlation",
    "correlation of edges of real subjects": "alignment.validation.edge_correlation",
    "generated images, largest deviation of the power spectrum": "generation.spectrum.largest_deviation_mean_ratio",
    "generated subjects, fraction too close to a training subject": "memorization.DLDM.refused_share",
    "held-out subjects, fraction too close to a training subject": "memorization.DLDM.held_out.refused_share",
    "generated subjects, authenticity": "memorization.DLDM.samples.authenticity_mean",
    "held-out subjects, authenticity": "memorization.DLDM.held_out.authenticity_mean",
    "seconds per subject": "generation.seconds_per_subject",
}

LOADING = """\
With the package `dldm_pipeline` installed:

```python
from dldm_pipeline import DLDMPipeline

pipe = DLDMPipeline.from_pretrained("{repo_id}"{revision})
output = pipe(num_subjects=4)
output.by_modality["{modality}"][0]  # a PIL image; its tumour mask is output.masks[0]
```

Without it, diffusers runs the modules of this repository; read them first:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}"{revision}, trust_remote_code=True)
```

`DLDMTranslationPipeline` (without the package, `custom_pipeline="pipeline_dldm_translation"`) fills in missing modalities."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("pipeline", nargs="?", type=Path, metavar="FOLDER", help="pipeline that train_ldm.py wrote")
    what.add_argument("--dataset", type=Path, help="push this data set, written by prepare_dataset.py, instead")
    parser.add_argument("--repo_id", required=True, help="owner/name; created if it does not exist")
    parser.add_argument("--revision", help="branch, created if it does not exist (default: main)")
    parser.add_argument("--private", action="store_true", help="only you, or your organisation, can see it")
    parser.add_argument("--token", help="with write access (default: the one you logged in with)")
    card = parser.add_argument_group("model card of a pipeline")
    card.add_argument("--metrics", type=Path, help="metrics.json of examples/evaluate.py, for the figures")
    card.add_argument("--training_data", help="what it was trained on (default: what the training script noted)")
    card.add_argument("--license", default="apache-2.0", help="the Hub's name of a licence (default: %(default)s)")
    return parser.parse_args(argv)


def figure(metrics: dict, path: str) -> float | None:
    """The number at a dotted path, or the mean of the numbers there; None if there is none."""
    value = metrics
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    values = value.values() if isinstance(value, dict) else [value]
    numbers = [number for number in values if isinstance(number, (int, float))]
    return fmean(numbers) if numbers else None


def save_pictures(pipeline: DLDMPipeline, folder: Path) -> dict[str, str]:
    """Generate subjects and save each as a strip of all modalities and the mask. Returns caption to file name."""
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_PICTURES)]
    output = pipeline(num_subjects=NUM_PICTURES, generator=generators, output_type="np")
    pictures = {}
    for seed in range(NUM_PICTURES):
        images, masks, name = output.images[seed, None], output.masks[seed, None], f"subject-{seed}.png"
        contact_sheet(images, masks, output.modalities, ["synthetic"], folder / name)
        pictures[f"synthetic subject: {', '.join(output.modalities)}, tumour outlined (seed {seed})"] = name
    return pictures


def memorization_text(metrics: dict) -> str:
    """What `evaluate_memorization` found, or that it has not been run."""
    keys = ("refused", "num_samples", "num_train_subjects", "false_alarm_rate")
    refused, generated, trained, rate = (figure(metrics, f"memorization.DLDM.{key}") for key in keys)
    if None in (refused, generated, trained, rate):
        return (
            "Not measured. If the training data are patients' scans, look for copies of them before you share images."
        )
    return (
        f"Of {generated:.0f} generated subjects, {refused:.0f} came closer to one of {trained:.0f} training subjects, in "
        f"pixels or in anatomy, than {1 - rate:.0%} of held-out subjects do. Rates and authenticity are in the table above."
    )


def stage_pipeline(args: argparse.Namespace, folder: Path) -> None:
    """Write to `folder` what is pushed: the model itself, pictures, and a card with the training script's notes."""
    if not (args.pipeline / "model_index.json").is_file():
        raise FileNotFoundError(f"{args.pipeline} holds no model_index.json; give a folder that train_ldm.py wrote.")
    try:
        metrics = json.loads(args.metrics.read_text(encoding="utf-8")) if args.metrics else {}
    except ValueError as error:
        raise ValueError(f"--metrics {args.metrics} is not JSON ({error}); give that of evaluate.py.") from error
    pipeline, notes = DLDMPipeline.from_pretrained(args.pipeline), read_card_data(args.pipeline)
    # The files themselves: saved again, weights in half precision would become twice as large.
    ignore = shutil.ignore_patterns(*PRIVATE_NAMES, "samples.png")  # half of that one are real scans
    write_pretrained(lambda path: shutil.copytree(args.pipeline, path, ignore=ignore, dirs_exist_ok=True), folder)
    pipeline.save_config(folder)  # with the modules that load it without this package
    config = pipeline.autoencoder.config
    loading = LOADING.format(
        repo_id=args.repo_id,
        revision=f', revision="{args.revision}"' if args.revision else "",
        modality=config.modalities[0],
    )
    write_model_card(
        folder,
        args.repo_id.split("/")[-1],
        f"A `DLDMPipeline` that generates aligned {config.sample_size}x{config.sample_size} brain slices of one synthetic "
        f"subject in {', '.join(config.modalities)} with the tumour mask, after Na et al., "
        '"Generation of Multi-modal Brain Tumor MRIs with Disentangled Latent Diffusion Model" (MIDL 2023).',
        {name: figure(metrics, path) for name, path in FIGURES.items()},
        notes.get("training", {}),
        save_pictures(pipeline, folder),
        tags=["diffusers", "DLDMPipeline", "brain-tumor"],
        training_data=args.training_data or notes.get("training_data", "Not stated by the uploader."),
        sections={"Load it": loading, "Memorisation": memorization_text(metrics), "Licence": args.license},
        license=args.license,
    )


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.repo_id.count("/") != 1:
        raise ValueError(f"--repo_id {args.repo_id}: give owner/name.")
    options = {"revision": args.revision, "private": args.private, "token": args.token}
    if args.dataset is not None:
        if not list(args.dataset.glob("data/train-*.parquet")):
            raise FileNotFoundError(f"--dataset {args.dataset} holds no data/train-*.parquet; see prepare_dataset.py.")
        print(push_folder(args.dataset, args.repo_id, "dataset", **options))
    else:
        with tempfile.TemporaryDirectory() as folder:
            stage_pipeline(args, Path(folder))
            print(push_folder(folder, args.repo_id, **options))


if __name__ == "__main__":
    main()
