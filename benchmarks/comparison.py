"""DLDM, StyleGAN2 and plain latent diffusion, trained for equal time on the same subjects, then measured side by side.

    python benchmarks/comparison.py                                   # simulated subjects, 64x64: three hours and a half
    python benchmarks/comparison.py --systems DLDM                    # one of them; run it again for the others
    python benchmarks/comparison.py --minutes 120 --num_threads 1     # as much computing, on half of a machine of two cores

The paper (Na et al., MIDL 2023) compares DLDM with StyleGAN2 by 1,000 generated samples each. Here all see the same training
subjects for the same wall-clock minutes; DLDM's are shared by its three trainings (autoencoder, denoiser, decoder). Nothing
else should run on a training's cores; minutes of processor time, which show it if something did, go to
OUTPUT_DIR/minutes.json. A training that was interrupted goes on where it was, and one that is done is left alone: copied
to OUTPUT_DIR, benchmarks/compared/ spares them all. The report is OUTPUT_DIR/evaluation/report.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.files import write_text
from dldm_pipeline.data.phantom import phantom_dataset
from dldm_pipeline.training_utils import make_output_dir

ROOT = Path(__file__).resolve().parents[1]


def trainings(folder: Path, minutes: float) -> dict[str, dict[str, list[str]]]:
    """Of each system, the output folders and the commands that fill them, in order."""

    def command(script: str, share: float = 1.0, *words: str) -> list[str]:
        return [str(ROOT / "training" / script), *words, f"--max_train_minutes={share * minutes:g}"]

    latents = [f"--autoencoder={folder / 'autoencoder'}", f"--cache_dir={folder / 'cache'}"]
    return {
        "DLDM": {  # other shares were not compared
            "autoencoder": command("train_autoencoder.py", 0.35, "--config=autoencoder_64"),
            "ldm": command("train_ldm.py", 0.45, "--config=ldm_64", *latents),
            "dldm": command("train_decoder.py", 0.2, "--config=decoder_64", f"--pipeline={folder / 'ldm'}"),
        },
        "StyleGAN2": {"stylegan2": command("baselines/train_stylegan2.py")},
        "plain LDM": {"plain_ldm": command("baselines/train_plain_ldm.py")},
    }


def is_done(output: Path) -> bool:
    """Whether a training came to its end: it writes its card last."""
    return (output / "README.md").is_file()


def train(command: list[str], num_threads: int | None, data: Path, output: Path, log: Path) -> None:
    """Run one training to its end, if it is not there, and note its minutes by the clock and by the processor."""
    if is_done(output):
        print(f"{output}: done before")
        return
    words = [*command, f"--dataset={data}", f"--output_dir={output}", "--resume_from_checkpoint=latest"]
    words += [f"--num_threads={num_threads}"] if num_threads else []
    print(f"{output}: {' '.join(words)}", flush=True)
    started, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *words]).returncode:
        raise RuntimeError(f"{words[0]} failed; run this command again to go on from its last checkpoint")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime
    minutes = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else {}
    seconds = {"clock": time.monotonic() - started, "processor": processor}
    minutes[output.name] = {name: round(value / 60, 1) for name, value in seconds.items()}
    write_text(log, json.dumps(minutes, indent=2) + "\n")


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = list(trainings(Path(), 1))
    parser.add_argument("--systems", nargs="+", choices=names, default=names, help="(default: all, in turn)")
    parser.add_argument("--minutes", type=float, default=60, help="of training, each system (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, help="of each training (default: one a core)")
    parser.add_argument("--phantom_subjects", type=int, default=8000, help="simulated, a fifth held out (%(default)s)")
    parser.add_argument("--num_subjects", type=int, default=1000, help="to generate and compare (default: %(default)s)")
    parser.add_argument("--output_dir", default="outputs/comparison", help="a folder each goes here (%(default)s)")
    args = parser.parse_args(argv)

    folder = make_output_dir(args.output_dir)
    data = phantom_dataset(args.phantom_subjects, 64, root=folder)
    for name in args.systems:
        commands = trainings(folder, args.minutes)[name]
        # benchmarks/compared/ holds what is compared, the last training's output, and not what led to it.
        if is_done(folder / list(commands)[-1]):
            print(f"{name}: done before")
            continue
        for output, command in commands.items():
            train(command, args.num_threads, data, folder / output, folder / "minutes.json")
    baselines = [folder / output for output in ("stylegan2", "plain_ldm") if is_done(folder / output)]
    if is_done(folder / "dldm"):
        words = [f"--pipeline={folder / 'dldm'}", f"--dataset={data}", f"--num_subjects={args.num_subjects}"]
        words += [f"--output={folder / 'evaluation'}", *(["--baselines", *map(str, baselines)] if baselines else [])]
        subprocess.run([sys.executable, str(ROOT / "examples" / "evaluate.py"), *words], check=True)


if __name__ == "__main__":
    main()
