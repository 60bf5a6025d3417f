"""Train the autoencoder with one part changed at a time, for as many steps each, and compare.

    python benchmarks/ablation.py --num_threads 1                       # every row, 800 steps, 6.5 minutes of one core each
    python benchmarks/ablation.py --rows "as it is" "paper's mixing"    # some rows
    python benchmarks/ablation.py --max_train_steps 2400 --seed 1       # longer, another seed

A row that is finished is not trained again, so the same command goes on where it was stopped. Arguments that are not in --help
go to training/train_autoencoder.py, the same ones to every row.

| row               | what is different                                                                               |
|-------------------|-------------------------------------------------------------------------------------------------|
| paper's mixing    | strategy 3 of Na et al. as written: a style of any subject, the target stays the structure's own, |
|                   | and no ranks                                                                                    |
| no exchange       | without strategy 3: every image from its own structure and its own style                        |
| all modalities    | without strategy 4: all modalities decoded in every, costlier step                              |
| no subsets        | the structure always from all modalities, hence no agreement either                             |
| no mse, ...       | without this term of the loss                                                                   |
| no linear maps    | without the linear maps beside encoder and decoder                                              |
| no ranks          | the structure from the images as they are, not from ranks of their intensities                  |
| AdamW             | instead of Muon                                                                                 |
| perceptual        | with the perceptual term of the decoder's training from the start, all modalities decoded       |

Strategies 1 (n + 1 latents) and 2 (pair decoding) are the architecture; no row is without them.

Prints a Markdown table of simulated subjects that no training has seen and writes it to OUTPUT_DIR/ablation.md. In dB: PSNR
with the own style; with another anatomy's style under the same acquisition, and the structure from another image of the
anatomy; with the mean style; lost by a structure from one modality alone. Gap: how much of the way from mean to own style
the exchanged one goes (best 1). R² of the means of white and grey matter: worst modality from the styles (best 1), best
modality from the structure (best 0). White matter: Dice of its outline under exchanged styles over that under own (best 1).
Sharpness: mean step between neighbouring pixels over that of real images. Seconds: processor time of one step, whatever else
the machine does.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dldm_pipeline import DEFAULT_MODALITIES, DisentangledAutoencoder, training_utils
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.files import write_text
from dldm_pipeline.data.simulated_slices import simulated_dataset
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.losses import PerceptualDistance, finite_differences
from dldm_pipeline.metrics.exchange import appearance_probes, exchange_against_truth
from dldm_pipeline.metrics.reconstruction import encode_subjects, evaluate_reconstruction, rebuild
from dldm_pipeline.training_args import AutoencoderArgs, parse_args
from dldm_pipeline.training_utils import evenly_spaced_subset, make_output_dir

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import train_autoencoder as training  # noqa: E402

COLUMNS = {
    "own style (dB)": "own",
    "exchanged": "exchanged",
    "mean style": "mean_style",
    "gap closed": "gap_closed",
    "one modality alone": "single_cost",
    "R² styles": "style_r2",
    "R² structure": "structure_r2",
    "white matter": "white_dice_kept",
    "mask Dice": "mask_dice",
    "sharpness": "sharpness",
    "seconds a step": "seconds",
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows: words for the training's command line, and what is replaced in it
# ---------------------------------------------------------------------------------------------------------------------


def regrouped(one_acquisition: bool) -> Callable:
    """`encode_exchanged` with each row an anatomy of its own, and all of one acquisition or each of its own."""
    encode = training.encode_exchanged

    def encode_regrouped(autoencoder, batch: dict[str, torch.Tensor], subset_probability: float) -> tuple:
        own = torch.arange(len(batch["images"]), device=batch["images"].device)
        groups = {"anatomy": own, "acquisition": own * 0 if one_acquisition else own}
        return encode(autoencoder, batch | groups, subset_probability)

    return encode_regrouped


def without_linear_maps(args: AutoencoderArgs, modalities: list[str]) -> DisentangledAutoencoder:
    """The autoencoder with its linear maps left at zero, where they start."""
    model = BUILD(args, modalities)
    for part in (model.encoder_linear, model.decoder_linear):
        part.requires_grad_(False)
    return model


def without_ranks(args: AutoencoderArgs, modalities: list[str]) -> DisentangledAutoencoder:
    """The autoencoder whose structure sees the images as they are."""
    return DisentangledAutoencoder.from_config(BUILD(args, modalities).config, num_quantiles=0)


def with_perceptual_term(data: str, modalities: list[str]) -> Callable:
    """`reconstruction_terms` with the perceptual distance of rebuilt images as one more."""
    terms = training.reconstruction_terms
    real = evenly_spaced_subset(SliceDataset(data, "train", modalities), 512)
    perceptual = PerceptualDistance(DataLoader(real, 8))

    def more_terms(sample: torch.Tensor, targets: torch.Tensor, present: torch.Tensor, *others) -> dict[str, Any]:
        distance = perceptual(sample.clamp(0, 1), present, targets)
        return terms(sample, targets, present, *others) | {"perceptual": distance}

    return more_terms


BUILD = training.build_autoencoder


def changes(row: str, data: str, modalities: list[str]) -> tuple[list[str], list[tuple[Any, str, Any]]]:
    """Words for the command line, and (object, name, value) to replace while it runs."""
    if row.startswith("no ") and row[3:] in training.WEIGHTS:
        return [], [(training, "WEIGHTS", training.WEIGHTS | {row[3:]: 0.0})]
    return {
        "as it is": lambda: ([], []),
        "paper's mixing": lambda: (
            [],
            [(training, "encode_exchanged", regrouped(True)), (training, "build_autoencoder", without_ranks)],
        ),
        "no exchange": lambda: ([], [(training, "encode_exchanged", regrouped(False))]),
        "all modalities": lambda: (["--target_modalities=99"], []),
        "no subsets": lambda: (["--subset_probability=0"], []),
        "no spectrum": lambda: (["--spectrum_weight=0"], []),
        "no linear maps": lambda: ([], [(training, "build_autoencoder", without_linear_maps)]),
        "no ranks": lambda: ([], [(training, "build_autoencoder", without_ranks)]),
        "AdamW": lambda: (["--learning_rate=2e-3"], [(training_utils, "MuonAdamW", adamw)]),
        "perceptual": lambda: (
            ["--target_modalities=99"],
            [
                (training, "WEIGHTS", training.WEIGHTS | {"perceptual": 1.0}),
                (training, "reconstruction_terms", with_perceptual_term(data, modalities)),
            ],
        ),
    }[row]()


ROWS = ("as it is", "paper's mixing", "no exchange", "all modalities", "no subsets", "no mse", "no edge", "no spectrum")
ROWS += ("no agreement", "no linear maps", "no ranks", "AdamW", "perceptual")


def adamw(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr, betas=(0.9, 0.99), weight_decay=0)


def timed(seconds: list[float]) -> Callable:
    """`fit_on_slices` that appends its processor time to `seconds`."""
    fit = training.fit_on_slices

    def fit_timed(*args, **options):
        started = time.process_time()
        result = fit(*args, **options)
        seconds.append(time.process_time() - started)
        return result

    return fit_timed


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """`holder.name` is `value` inside the block."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def measure(
    autoencoder: DisentangledAutoencoder, validation: SliceDataset, probes: tuple[int, int]
) -> dict[str, float]:
    """The figures of `COLUMNS`."""
    encoded = encode_subjects(autoencoder, validation, 200)
    rebuilt, found = evaluate_reconstruction(autoencoder, encoded), appearance_probes(autoencoder, *probes)
    exchange = exchange_against_truth(autoencoder)
    real, ours = (
        sum(step.abs().mean() for step in finite_differences(torch.from_numpy(images)))
        for images in (encoded.images, rebuild(autoencoder, encoded)[0])
    )
    return {
        **{key: exchange[f"{key}_mean"] for key in ("own", "exchanged", "mean_style")},
        **{key: exchange[key] for key in ("gap_closed", "white_dice_kept")},
        "single_cost": rebuilt["single_cost_mean"],
        "mask_dice": rebuilt["mask_dice"],
        "style_r2": found["style_white_grey_min"],
        "structure_r2": found["structure_white_grey_max"],
        "sharpness": float(ours / real),
    }


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="(default: all, in turn)")
    parser.add_argument("--max_train_steps", type=int, default=800, help="of each training (default: %(default)s)")
    parser.add_argument("--subjects", type=int, default=4000, help="simulated, each under two scanners (%(default)s)")
    parser.add_argument(
        "--probes", type=int, nargs=2, default=(1000, 500), help="subjects to fit and to test (1000 500)"
    )
    parser.add_argument("--output_dir", default="outputs/ablation", help="a folder each goes here (%(default)s)")
    args, others = parser.parse_known_args(argv)

    words = ["--config=autoencoder_64", f"--max_train_steps={args.max_train_steps}", "--max_train_minutes=1e6"]
    words += ["--validation_steps=0", "--checkpointing_steps=0", *others]
    training_args = parse_args(AutoencoderArgs, __doc__, training.PRESETS, words)
    output_dir = make_output_dir(args.output_dir)
    modalities = list(training_args.modalities or DEFAULT_MODALITIES)
    root = training_args.cache_dir
    data = simulated_dataset(args.subjects, training_args.resolution, modalities, acquisitions=2, root=root)
    table = [f"| row | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in args.rows:
        folder = output_dir / row.replace(" ", "_").replace("'", "")
        file = folder / "figures.json"
        if not file.is_file():
            more, replacements = changes(row, str(data), modalities)
            seconds: list[float] = []
            with ExitStack() as stack:
                for holder, name, value in (*replacements, (training, "fit_on_slices", timed(seconds))):
                    stack.enter_context(replaced(holder, name, value))
                training.main([*words, *more, f"--dataset={data}", f"--output_dir={folder}"])
            autoencoder = DisentangledAutoencoder.from_pretrained(folder).eval()
            figures = measure(autoencoder, SliceDataset(data, "validation", modalities), args.probes)
            figures["seconds"] = seconds[0] / args.max_train_steps
            write_text(file, json.dumps(figures, indent=2) + "\n")
        figures = json.loads(file.read_text(encoding="utf-8"))
        table.append(f"| {row} | {' | '.join(f'{figures[key]:.2f}' for key in COLUMNS.values())} |")
        print("\n".join(table), flush=True)
    write_text(output_dir / "ablation.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
