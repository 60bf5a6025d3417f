"""What the training scripts share: the accelerator, the data, and the one training loop, [`fit`].

A script prepares data and models, and gives `fit` a function that makes one step and one that validates.
"""

import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from dldm_pipeline.appearance import AcquisitionSampler
from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.cli import set_threads
from dldm_pipeline.data.phantom import phantom_dataset
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.encoding import validate_autoencoder
from dldm_pipeline.modalities import DEFAULT_MODALITIES
from dldm_pipeline.optimization import MuonAdamW
from dldm_pipeline.training_args import TrainingArgs
from dldm_pipeline.training_state import TrainingClock, list_checkpoints, load_checkpoint, save_checkpoint

LOG_STEPS = 10
VALIDATION_SLICES = 64


# ---------------------------------------------------------------------------------------------------------------------
# Set-up
# ---------------------------------------------------------------------------------------------------------------------


def make_output_dir(path: str | Path) -> Path:
    """Create a folder and make sure that it can be written to.

    Raises:
        OSError: it is a file, or cannot be created or written; the message names it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"--output_dir {path}: cannot write here ({error.strerror}); choose another folder") from error
    return path


def make_accelerator(args: TrainingArgs, project: str) -> Accelerator:
    """Build the `Accelerator`: accumulation, tracker, folders, threads and seed; its precision is that of `accelerate launch`.

    Args:
        args: options of the training.
        project: name of the tracker's project.

    Raises:
        ValueError: the tracker's package is not installed.
        OSError: `--output_dir` cannot be written.
    """
    if args.report_to != "none":
        try:
            importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(args.report_to, args.report_to))
        except ImportError as error:
            raise ValueError(f"--report_to {args.report_to}: not installed; pip install {args.report_to}") from error
    output_dir = make_output_dir(args.output_dir)
    set_threads(args.num_threads)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    shown = {key: value for key, value in args.shown().items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers(project, config=shown)
    # Each process needs its own noise and timesteps.
    set_seed(args.seed, device_specific=accelerator.num_processes > 1)
    return accelerator


def log_image(accelerator: Accelerator, name: str, image: Any, step: int) -> None:
    """Send one picture to the tracker, whichever it is.

    Args:
        image: a PIL image, or a uint8 array (H, W, 3).
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(
                name, np.asarray(image.convert("RGB") if hasattr(image, "convert") else image), step, dataformats="HWC"
            )
        elif tracker.name in ("wandb", "trackio"):
            module = importlib.import_module(tracker.name)
            tracker.log({name: module.Image(image)}, step=step)


def find_dataset(
    accelerator: Accelerator, args: TrainingArgs, size: int, modalities: Sequence[str] | None
) -> str | Path:
    """The data set of `--dataset`, or the folder of simulated subjects, made by the main process first.

    Args:
        size: height and width of simulated slices, pixels.
        modalities: what to simulate; the five defaults for `None`.
    """
    if args.dataset is not None:
        return args.dataset
    with accelerator.main_process_first():
        return phantom_dataset(
            args.phantom_subjects,
            size,
            modalities or DEFAULT_MODALITIES,
            root=args.cache_dir,
            show_progress=accelerator.is_main_process,
        )


def open_split(data: str | Path, split: str, size: int, modalities: Sequence[str] | None = None) -> SliceDataset:
    """A split of the data, for a model of a size and modalities.

    Raises:
        ValueError: the data have not all the modalities, or another size.
    """
    dataset = SliceDataset(data, split, modalities)
    if dataset.image_size != size:
        raise ValueError(
            f"--dataset {data}: its slices are {dataset.image_size} pixels and the model takes {size}; prepare the data "
            f"again with --image_size {size}, or train a model of their size"
        )
    return dataset


def evenly_spaced_subset(data: SliceDataset, count: int) -> Subset:
    """`count` slices evenly spaced over a data set, or all if there are no more."""
    return Subset(data, torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist())


def transfer_rows(rows: torch.Tensor, known: Sequence[str | None], names: Sequence[str | None]) -> torch.Tensor:
    """Rows of an embedding for other names: that of the same name, or the mean of all rows for a name not known.

    Args:
        rows: (len(known), d), one row a name.

    Returns:
        (len(names), d).
    """
    return torch.stack([rows[known.index(name)] if name in known else rows.mean(dim=0) for name in names])


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def update(
    accelerator: Accelerator,
    loss: torch.Tensor,
    parameters: Iterable[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float = 1.0,
) -> None:
    """Backward pass and optimizer step of a loss, gradients clipped to a norm."""
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def averaged_weights(model: torch.nn.Module, ema: EMAModel) -> Iterator[None]:
    """Give `model` the averaged weights inside the block, and its own afterwards."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def fit(
    accelerator: Accelerator,
    args: TrainingArgs,
    model: torch.nn.Module,
    objective: torch.nn.Module | Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    step: Callable[[int], dict[str, torch.Tensor]],
    validate: Callable[[Path, TrainingClock], dict[str, float]] | None = None,
    lr_scheduler: str = "cosine",
    name: str = "training",
) -> TrainingClock:
    """The training loop of every script: steps, averaged weights, progress, validation, checkpoints, time.

    It resumes from `--resume_from_checkpoint`. In the end `model` has the averaged weights.

    Args:
        accelerator: from [`make_accelerator`].
        args: options of the training.
        model: the module that is trained and whose weights are averaged. The average covers parameters, not buffers.
        objective: what `accelerator.prepare` returned and gradients accumulate in; often a loss around `model`.
        optimizers: prepared.
        step: from the number of steps made so far; makes a forward and a backward pass, calls [`update`] and returns
            scalars to log, of which those with "loss" in their name are shown.
        validate: called on the main process, with averaged weights in `model`, as `validate(path, clock)`; saves a picture
            at `path` and returns figures. Its time is no training time.
        lr_scheduler: "cosine" or "constant", both with warm-up.
        name: of the progress bar.

    Returns:
        The clock: steps made and seconds of training.
    """
    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    if not args.resume_from_checkpoint and list_checkpoints(output_dir):
        raise ValueError(
            f"--output_dir {output_dir}: it holds checkpoints of an earlier run; add --resume_from_checkpoint latest to go "
            "on, or name another folder"
        )
    ema = EMAModel(model.parameters(), decay=args.ema_decay, foreach=True)
    ema.to(accelerator.device)
    clock = TrainingClock(args.max_train_steps, args.max_train_minutes, accelerator)
    for optimizer in optimizers:
        clock.add_schedule(optimizer, lr_scheduler, args.lr_warmup_steps)
    # Again, because preparing data uses random numbers and finding it prepared does not.
    set_seed(args.seed, device_specific=accelerator.num_processes > 1)
    clock.start()
    if args.resume_from_checkpoint:
        load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, clock, ema)

    bar = tqdm(
        total=100, bar_format=name + " {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}", disable=not is_main
    )
    bar.update(100 * clock.progress)
    averages: dict[str, float] = {}
    while not clock.done:
        with accelerator.accumulate(*(objective if isinstance(objective, Sequence) else [objective])):
            terms = step(clock.step)
        if not accelerator.sync_gradients:
            continue
        ema.step(model.parameters())
        clock.tick()
        bar.update(min(100 * clock.progress, 100) - bar.n)
        if clock.step % LOG_STEPS == 0:
            values = {key: value.item() for key, value in terms.items()}
            averages = {key: 0.9 * averages.get(key, value) + 0.1 * value for key, value in values.items()}
            shown = [f"{key} {value:.4f}" for key, value in averages.items() if "loss" in key]
            rate = optimizers[0].param_groups[0]["lr"]
            bar.set_postfix_str(", ".join([f"step {clock.step}", *shown, f"learning rate {rate:.1e}"]))
            logged = {f"train/{key}": value for key, value in values.items()}
            accelerator.log({**logged, "train/learning_rate": rate}, step=clock.step)
        if validate is not None and args.validation_steps and clock.step % args.validation_steps == 0 and is_main:
            began, path = clock.elapsed, output_dir / "validation" / f"step-{clock.step:06d}.png"
            with averaged_weights(model, ema):
                figures = validate(path, clock)
            bar.write(f"step {clock.step}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
            accelerator.log({f"validation/{key}": value for key, value in figures.items()}, step=clock.step)
            with Image.open(path) as picture:
                log_image(accelerator, "validation", picture, clock.step)
            clock.leave_out(clock.elapsed - began)
        if args.checkpointing_steps and (clock.done or clock.step % args.checkpointing_steps == 0):
            save_checkpoint(accelerator, output_dir, clock, ema)
    bar.close()
    accelerator.wait_for_everyone()
    ema.copy_to(model.parameters())
    return clock


def fit_on_slices(
    accelerator: Accelerator,
    args: TrainingArgs,
    autoencoder: DisentangledAutoencoder,
    objective: torch.nn.Module,
    weights: dict[str, float],
    train_set: SliceDataset,
    validation_set: SliceDataset,
) -> DataLoader:
    """[`fit`] of an autoencoder on batches of slices, every second one mirrored.

    Of simulated subjects a batch holds several under one acquisition and one under several ([`AcquisitionSampler`]).

    Args:
        accelerator: from [`make_accelerator`].
        args: options of the training.
        autoencoder: its parameters with `requires_grad` are trained.
        objective: from a batch of slices to unweighted terms of the loss.
        weights: of each term.
        train_set, validation_set: slices.

    Returns:
        The loader of the slices that validation sees.
    """
    workers = {"num_workers": args.dataloader_num_workers, "persistent_workers": args.dataloader_num_workers > 0}
    if train_set.acquisitions is None:
        loader = DataLoader(train_set, args.train_batch_size, True, drop_last=True, **workers)
    else:
        sampler = AcquisitionSampler(train_set.anatomies, train_set.acquisitions, args.train_batch_size)
        loader = DataLoader(train_set, batch_sampler=sampler, **workers)
    validation_loader = DataLoader(evenly_spaced_subset(validation_set, VALIDATION_SLICES), 16)
    optimizer = MuonAdamW(autoencoder, args.learning_rate)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    if not len(loader):
        raise ValueError(
            f"--train_batch_size {args.train_batch_size}: too many for the {len(train_set)} training slices on "
            f"{accelerator.num_processes} process(es); give fewer"
        )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step(number: int) -> dict[str, torch.Tensor]:
        batch = next(batches)
        if torch.rand(()) < 0.5:
            batch |= {key: batch[key].flip(-1) for key in ("images", "mask", "labels")}
        terms = objective(batch)
        loss = sum(weights[name] * term for name, term in terms.items())
        update(accelerator, loss, autoencoder.parameters(), optimizer)
        return {"loss": loss, **terms}

    def validate(path: Path, clock: TrainingClock) -> dict[str, float]:
        return validate_autoencoder(autoencoder, validation_loader, path)

    fit(accelerator, args, autoencoder, objective, [optimizer], step, validate)
    return validation_loader
