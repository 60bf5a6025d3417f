"""What the scripts share: errors in one line, where a pipeline comes from, and how many threads work."""

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
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--pipeline` and `--device`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--pipeline", help="folder, or name on the Hub (default: the package's, for simulated contrasts)"
    )
    parser.add_argument("--device", default=device, help="(default: %(default)s)")


def add_sampling_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add what generating and translating share: the pipeline, the sampler's options, and `--output` (default: `output`)."""

    def add(name: str, default: Any, help: str) -> None:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{help} (default: %(default)s)")

    add("seed", 0, "another seed gives other images")
    add("num_inference_steps", 10, "denoising steps; more are slower")
    add("guidance_scale", 1.0, "above 1: guidance, in twice the time")
    add("output", Path(output), "folder to create")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this script")
    add_pipeline_arguments(parser)


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


def set_threads(num_threads: int | None = None) -> None:
    """Undo the single thread of `accelerate launch`, which sets OMP_NUM_THREADS=1 for whoever did not set it.

    Args:
        num_threads (`int`, *optional*): Threads of PyTorch on the CPU, whoever launched this process.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if num_threads is None and launched and not torch.cuda.is_available():
        num_threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1")))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
