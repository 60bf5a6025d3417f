"""What the scripts share: errors in one line, where a pipeline comes from, and where its subjects go."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline
from dldm_pipeline.data.export import export_subjects
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print bad input or a failing disk as one `error:` line to stderr and exit with status 2, without a traceback.

    Set `DLDM_DEBUG=1` to see the traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        if os.environ.get("DLDM_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--pipeline` and `--device`."""
    parser.add_argument(
        "--pipeline",
        help="pipeline folder, or its name on the Hub (default: the one in the package, for simulated contrasts)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add what generating and translating share: the pipeline, the sampler's options, and `--output` (default: `output`)."""
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images (default: %(default)s)")
    parser.add_argument(
        "--num_inference_steps", type=int, default=10, help="denoising steps; more are slower (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="above 1: guidance, in twice the time (default: %(default)s)"
    )
    add_pipeline_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder to create (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this script")


def find_pipeline(name: str | None) -> Path:
    """The folder of the bundled pipeline (`None`), of one on this machine, or of one that is downloaded from the Hub.

    Raises:
        FileNotFoundError: If `name` is neither a folder nor owner/name.
    """
    folder = BUNDLED_CHECKPOINT if name is None else Path(name)
    if folder.is_dir():
        return folder
    if name is None or name.startswith((".", "/")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"--pipeline {folder}: no such folder; give one that train_ldm.py wrote, or owner/name."
        )
    return Path(DLDMPipeline.download(name))


def save_subjects(
    output: DLDMPipelineOutput, args: argparse.Namespace, checkpoint: Path, settings: dict[str, Any], **options: Any
) -> None:
    """Export to `--output` what a pipeline returned.

    Args:
        output (`DLDMPipelineOutput`): From a call with `output_type="np"`.
        args (`argparse.Namespace`): With the options of [`add_sampling_arguments`].
        checkpoint (`Path`): Folder of the pipeline.
        settings (`dict`): Other arguments of the call, for the manifest.
        options: Further arguments of `export_subjects`.
    """
    settings = {**settings, "device": args.device, "num_threads": torch.get_num_threads()}
    export_subjects(
        output,
        args.output,
        seed=args.seed,
        settings=settings,
        checkpoint=checkpoint,
        overwrite=args.overwrite,
        **options,
    )
