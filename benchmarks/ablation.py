"""Train the autoencoder with and without the strategies of the paper, for equal time, and compare.

    python benchmarks/ablation.py --max_train_minutes 30                   # simulated subjects, small preset
    python benchmarks/ablation.py --max_train_minutes 30 --dataset DATA    # your scans
    python benchmarks/ablation.py --off nothing mixing --seed 1

Arguments that are not in --help go to training/train_autoencoder.py, the same ones to every training.

| off       | strategy                                                         | without it                             |
|-----------|------------------------------------------------------------------|----------------------------------------|
| mixing    | 3 of Na et al.: styles exchanged within a modality               | every image has its own style          |
| selection | 4 of Na et al.: loss averaged over modalities drawn at random    | all of them in every, costlier step    |
| subsets   | ours: structure from any subset, agreeing with that of all       | structure always from all modalities   |

Strategies 1 (n + 1 latents) and 2 (pair decoding) are the architecture; the training script cannot switch them off.

Prints a Markdown table of held-out subjects and writes it to OUTPUT_DIR/ablation.md. In dB: PSNR with the structure of all
modalities, and what is lost by exchanging styles and by a structure from one modality alone. In %: how often a linear probe
names the modality from the style (best 100) and from the structure (over chance, best 0), and how often structure (best
100) and style (over chance, best 0) of one modality find their subject among the codes of another. Agreement: distance of
two modalities' structures of one subject over that of two subjects (best 0). Judge a difference by that between two seeds.
"""

import argparse
import sys
from pathlib import Path

from dldm_pipeline import DEFAULT_MODALITIES, DisentangledAutoencoder
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.files import write_text
from dldm_pipeline.data.phantom import phantom_dataset
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.metrics.disentanglement import evaluate_disentanglement
from dldm_pipeline.metrics.reconstruction import encode_subjects, evaluate_reconstruction
from dldm_pipeline.training_args import AutoencoderArgs, parse_args
from dldm_pipeline.training_utils import make_output_dir

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import train_autoencoder  # noqa: E402

STRATEGIES = {
    "nothing": [],
    "mixing": ["--mix_probability=0"],
    "selection": ["--target_modalities=99"],  # as many as there are
    "subsets": ["--subset_probability=0"],
}
COLUMNS = ("PSNR", "worst modality", "styles exchanged", "one modality alone", "modality from style", "from structure")
COLUMNS += ("subject from structure", "from style", "agreement")


def held_out_subjects(args: AutoencoderArgs) -> tuple[str, SliceDataset]:
    """The data set of the training arguments and its validation split; a ValueError where it has too few subjects."""
    modalities = args.modalities or DEFAULT_MODALITIES
    data = args.dataset or phantom_dataset(args.phantom_subjects, args.resolution, modalities, root=args.cache_dir)
    validation = SliceDataset(data, "validation", args.modalities)
    count = len({item["subject"] for item in validation})
    if count < 8:
        raise ValueError(f"{data} has {count} validation subjects, the probes need 8: give more subjects.")
    return str(data), validation


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = list(STRATEGIES)
    parser.add_argument("--off", nargs="+", choices=names, default=names, help="(default: all, in turn)")
    parser.add_argument("--max_train_minutes", type=float, default=30, help="of each training (default: %(default)s)")
    parser.add_argument("--max_validation", type=int, default=400, help="slices to measure at most (%(default)s)")
    parser.add_argument("--output_dir", default="outputs/ablation", help="a folder each goes here (%(default)s)")
    args, others = parser.parse_known_args(argv)

    words = [
        f"--max_train_minutes={args.max_train_minutes}",
        "--validation_steps=0",
        "--checkpointing_steps=0",
        *others,
    ]
    training_args = parse_args(AutoencoderArgs, __doc__, train_autoencoder.PRESETS, words)
    output_dir = make_output_dir(args.output_dir)
    data, validation = held_out_subjects(training_args)
    table = [f"| off | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for strategy in args.off:
        folder = output_dir / strategy
        train_autoencoder.main([*words, *STRATEGIES[strategy], f"--dataset={data}", f"--output_dir={folder}"])
        autoencoder = DisentangledAutoencoder.from_pretrained(folder).eval()
        encoded = encode_subjects(autoencoder, validation, args.max_validation)
        rebuilt, probes = evaluate_reconstruction(autoencoder, encoded), evaluate_disentanglement(encoded)
        cells = [rebuilt[key] for key in ("psnr_mean", "psnr_worst", "exchange_cost_mean", "single_cost_mean")]
        cells += [100 * probes["style_accuracy"], probes["structure_over_chance"]]
        cells += [100 * probes["subject_structure_accuracy"], probes["subject_style_over_chance"]]
        cells += [probes["structure_agreement"]["ratio"]]
        table.append(f"| {strategy} | {' | '.join(f'{cell:z.2f}' for cell in cells)} |")
        print("\n".join(table), flush=True)
    write_text(output_dir / "ablation.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
