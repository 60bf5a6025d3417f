"""Generate synthetic subjects: aligned images of every modality, with the tumour mask.

    python examples/generate.py                                            # 8 subjects from the bundled pipeline
    python examples/generate.py --num_subjects 100 --modalities T1 FLAIR --output outputs/hundred
    python examples/generate.py --pipeline outputs/ldm                     # a pipeline that you trained, or one of the Hub
    python examples/generate.py --num_subjects 4 --appearances 4           # four anatomies, each as four scanners show it
    python examples/generate.py --format dicom --output outputs/dicom      # or dataset: a data set to train on
    accelerate launch examples/generate.py --num_subjects 100000 --format dataset --output outputs/many    # on all GPUs

The output folder gets sheet.png for a first look, a folder for each subject with 16-bit PNG and NIfTI files (or the files of
--format), and manifest.json with all that is needed to generate the same subjects again. Subjects are written while others are
generated. A run that was stopped goes on when the same command is typed again; manifest.json is written last. --overwrite
deletes an earlier output, or an unfinished one of another command, at the start.

A seed gives the same subject k for any number of subjects and processes and any choice of modalities. With --appearances,
appearances.png shows an anatomy in each row and an appearance in each column of a modality. All images are synthetic and not
for diagnosis.
"""

import argparse
import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.cli import add_sampling_arguments, exit_on_user_error, find_pipeline, set_threads
from dldm_pipeline.data.export import FORMATS, check_export_folder, continues_export, new_manifest
from dldm_pipeline.data.export_blocks import blocks_left, finish_export, start_export, unfinished_manifest
from dldm_pipeline.data.generation import (
    SAMPLING_SETTINGS,
    choose_block_size,
    choose_num_workers,
    generate_blocks,
    write_blocks,
)
from dldm_pipeline.pipeline_utils import default_batch_size


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_subjects", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--appearances", type=int, default=1, help="scanners that show each anatomy (default: 1)")
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="which, in which order (default: all)")
    formats = "nifti: NIfTI and PNG; dicom: a study for each subject; dataset: for training scripts"
    parser.add_argument("--format", choices=FORMATS, default="nifti", help=f"{formats} (default: %(default)s)")
    steps = "denoising steps of each style; those of the structure are --num_inference_steps (default: %(default)s)"
    parser.add_argument("--num_style_inference_steps", type=int, default=5, help=steps)
    workers = "processes that write files, for each that generates (default: 0 for few subjects, else up to 4)"
    parser.add_argument("--num_workers", type=int, help=workers)
    add_sampling_arguments(parser, "outputs/generated")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace, state: PartialState) -> DLDMPipeline:
    """Check the arguments, load the pipeline, and start the export or find the unfinished one of the same command."""
    if args.appearances < 1:
        raise ValueError(f"--appearances {args.appearances}: must be at least 1")
    if args.num_workers is not None and args.num_workers < 0:
        raise ValueError(f"--num_workers {args.num_workers}: must be at least 0")
    if args.appearances > 1 and args.format == "dataset":
        raise ValueError("--appearances: one anatomy could be in training and validation; use another --format.")
    begun = unfinished_manifest(args.output) is not None
    check_export_folder(args.output, args.overwrite or begun, args.format)
    folder = find_pipeline(args.pipeline)
    device = state.device if state.num_processes > 1 else args.device
    pipeline = DLDMPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)

    config = pipeline.autoencoder.config
    modalities = args.modalities or list(config.modalities)
    sampling: dict[str, Any] = {name: getattr(args, name) for name in SAMPLING_SETTINGS}
    pipeline.check_inputs(
        num_subjects=args.num_subjects,
        modalities=modalities,
        eta=0,
        noise_scale=1,
        generator=None,
        structure=None,
        styles=None,
        batch_size=None,
        output_type="np",
        callback_inputs=(),
        **sampling,
    )
    threads = {"device": str(device), "num_threads": torch.get_num_threads()}
    count = args.num_subjects * args.appearances
    manifest = new_manifest(
        count,
        modalities,
        (config.sample_size, config.sample_size),
        regions=config.num_regions > 1,
        seed=args.seed,
        settings=sampling | {"appearances": args.appearances} | threads,
        checkpoint=folder,
        format=args.format,
        block_size=choose_block_size(count, args.appearances, default_batch_size(device), state.num_processes),
    )
    if not continues_export(args.output, manifest, args.overwrite) and state.is_main_process:
        start_export(args.output, manifest, args.overwrite)
    return pipeline


@contextmanager
def one_run(output: Path) -> Iterator[None]:
    """Refuse a second run on the same folder while this one writes there."""
    lock = FileLock(output.absolute().with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--output {output}: another run is writing there; wait for it, or name another folder"
        ) from None
    except OSError:  # nothing can be written there, as `check_export_folder` says better
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def run(args: argparse.Namespace, state: PartialState, started: float) -> None:
    """Generate, write and finish, with the other processes."""
    with state.main_process_first():
        pipeline = prepare(args, state)

    manifest, left = unfinished_manifest(args.output), blocks_left(args.output)
    state.wait_for_everyone()  # all have to see the same blocks
    count, num_processes = manifest["num_subjects"], state.num_processes
    num_workers = choose_num_workers(count, num_processes) if args.num_workers is None else args.num_workers
    with state.split_between_processes(left) as starts:
        subjects = sum(min(manifest["block_size"], count - start) for start in starts)
        name = "subjects" if num_processes == 1 else f"subjects, process 1 of {num_processes}"
        with tqdm(total=subjects, desc=name, unit="subject", disable=not state.is_main_process) as bar:
            write_blocks(args.output, generate_blocks(pipeline, manifest, starts, bar.update), num_workers)
    state.wait_for_everyone()
    if state.is_main_process:
        finish_export(args.output)
        seconds = time.perf_counter() - started
        print(f"{count} subjects x {len(manifest['modalities'])} modalities and masks in {seconds:.0f} s")
        print(f"look at {args.output / ('appearances.png' if args.appearances > 1 else 'sheet.png')}")


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    set_threads()
    # The first process to end waits for the slowest.
    state = PartialState(cpu=args.device == "cpu", timeout=datetime.timedelta(days=7))
    with one_run(args.output) if state.is_main_process else nullcontext():
        run(args, state, started)


if __name__ == "__main__":
    main()
