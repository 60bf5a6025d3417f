"""What the training scripts share: arguments and presets, the clock, checkpoints, cards and the default data.

Plain functions and one small class. The scripts keep their own loops, so each can be read from top to bottom.
"""

import argparse
import difflib
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from dldm_pipeline import hub
from dldm_pipeline.modalities import DEFAULT_MODALITIES

TRACKERS = ("none", "tensorboard", "wandb", "trackio")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class TrainingParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and which knows where the presets of its script are.

    Args:
        presets: folder with the YAML presets, so that `--config ldm_tiny` is enough.
        default_config: preset used without `--config`; `None` for none.
    """

    def __init__(self, *args, presets: Path, default_config: str | None = None, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.presets = Path(presets)
        names = ", ".join(sorted(path.stem for path in self.presets.glob("*.yaml"))) or "none"
        self.add_argument(
            "--config",
            default=default_config,
            help=f"YAML file of arguments, or the name of a preset ({names}). The command line overrides it.",
        )

    def error(self, message: str):
        """Print one line, without the usage block, and exit with status 2."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments all of them have, under the names of diffusers' training examples.

    Scripts change defaults with `parser.set_defaults`, presets by YAML.
    """
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        help="folder written by training/prepare_dataset.py, or such a data set on the Hub; by default simulated subjects",
    )
    data.add_argument("--resolution", type=_positive(int), default=128, help="image height and width, pixels")
    data.add_argument(
        "--phantom_subjects", type=_positive(int), default=2000, help="simulated subjects, made once, without --dataset"
    )
    data.add_argument("--cache_dir", default="data", help="simulated subjects and encoded latents are kept here")
    data.add_argument("--dataloader_num_workers", type=_at_least_zero(int), default=0, help="0 loads in this process")

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default="outputs/model", help="the trained model and its checkpoints go here")
    run.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    run.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="without it, what `accelerate config` says; 'no' is fastest on most processors",
    )
    run.add_argument(
        "--num_threads",
        type=_positive(int),
        help="PyTorch threads per process; by default all cores where `accelerate launch` allows only one, as it does "
        "on machines without a graphics card, and otherwise as OMP_NUM_THREADS says",
    )
    run.add_argument("--report_to", choices=TRACKERS, default="none", help="tracker for losses and pictures")
    run.add_argument(
        "--validation_steps", type=_at_least_zero(int), default=1000, help="pictures and figures every N steps; 0: end"
    )
    run.add_argument(
        "--checkpointing_steps", type=_at_least_zero(int), default=1000, help="checkpoint every N steps; 0: none"
    )
    run.add_argument("--checkpoints_total_limit", type=_positive(int), default=2, help="older checkpoints are deleted")
    run.add_argument("--resume_from_checkpoint", help="'latest', or a checkpoint folder")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--train_batch_size", type=_positive(int), default=32, help="per process")
    optim.add_argument("--gradient_accumulation_steps", type=_positive(int), default=1, help="batches per step")
    optim.add_argument("--learning_rate", type=_positive(float), default=3e-4, help="after warm-up")
    optim.add_argument("--lr_scheduler", choices=["cosine", "constant"], default="cosine", help="after warm-up")
    optim.add_argument("--lr_warmup_steps", type=_at_least_zero(int), default=200, help="steps from 0 to the full rate")
    optim.add_argument("--max_train_steps", type=_positive(int), default=20000, help="stop after N steps")
    optim.add_argument(
        "--max_train_minutes",
        type=_positive(float),
        help="stop by the clock, if that comes first; the learning rate falls in time for it",
    )
    optim.add_argument("--max_grad_norm", type=_positive(float), default=1.0, help="gradients are clipped to this")
    optim.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction, default=True, help="average the weights over steps"
    )
    optim.add_argument("--ema_decay", type=_positive(float), default=0.9995, help="decay of that average, at most")

    hub = parser.add_argument_group("sharing")
    hub.add_argument(
        "--push_to_hub",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="upload the result to the Hub, with samples.png, which shows held-out slices of your data too; "
        "examples/push_to_hub.py leaves it out",
    )
    hub.add_argument("--hub_model_id", help="repository to upload to; by default the name of --output_dir")
    hub.add_argument("--hub_token", help="token with write access; by default the one you logged in with")


def parse_args(parser: TrainingParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line over the YAML preset named by `--config`.

    The preset's keys are the long argument names without dashes. It is turned into command-line words in front of the
    real ones, so that its values are checked the same way and the command line wins. Errors exit with status 2.

    Args:
        parser: with all arguments of the script.
        argv: words of the command line; by default `sys.argv[1:]`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=parser.get_default("config"))
    config = finder.parse_known_args(argv)[0].config
    preset = [] if config is None else _preset_words(parser, config)
    if "-h" in argv or "--help" in argv:
        # The help shows the values that hold, those of the preset.
        parser.set_defaults(**vars(parser.parse_args(preset)))
    args = parser.parse_args(preset + argv)
    if args.use_ema and not 0 < args.ema_decay < 1:
        parser.error(f"argument --ema_decay: {args.ema_decay} is not between 0 and 1")
    return args


def _preset_words(parser: TrainingParser, config: str) -> list[str]:
    """Read a preset and return it as command-line words."""
    path = Path(config)
    if not path.suffix and not path.exists():
        path = parser.presets / f"{config}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in parser.presets.glob("*.yaml")))
        parser.error(f"argument --config: no such file: {config}; presets are {names}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"argument --config: {path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"argument --config: {path} must hold `name: value` lines, not a {type(values).__name__}")

    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words = []
    for key, value in values.items():
        if key not in actions:
            close = difflib.get_close_matches(str(key), actions, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            parser.error(f"argument --config: unknown key '{key}' in {path}{hint}")
        if value is None:
            continue
        if isinstance(actions[key], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                parser.error(f"argument --config: '{key}' in {path} must be true or false, not {value!r}")
            words.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={value}")
    return words


def _positive(kind: type) -> Callable[[str], int | float]:
    """An argparse type: a finite number above zero."""

    def convert(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    convert.__name__ = kind.__name__
    return convert


def _at_least_zero(kind: type) -> Callable[[str], int | float]:
    """An argparse type: a finite number, zero allowed."""

    def convert(text: str) -> int | float:
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is below zero")
        return value

    convert.__name__ = kind.__name__
    return convert


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


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Build the `Accelerator` for the parsed arguments: precision, accumulation, tracker, project folders, seed.

    Raises:
        ValueError: the tracker's package is not installed.
    """
    if args.report_to != "none":
        try:
            importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(args.report_to, args.report_to))
        except ImportError as error:
            raise ValueError(f"--report_to {args.report_to}: not installed; pip install {args.report_to}") from error
    output_dir = make_output_dir(args.output_dir)
    _set_threads(args.num_threads)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    # Each process draws its own noise and timesteps.
    set_seed(args.seed, device_specific=accelerator.num_processes > 1)
    return accelerator


def _set_threads(num_threads: int | None) -> None:
    """Undo the single thread of `accelerate launch`, which sets OMP_NUM_THREADS=1 for whoever did not set it."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if num_threads is None and launched and not torch.cuda.is_available():
        num_threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1")))
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def start_trackers(accelerator: Accelerator, project: str, args: argparse.Namespace) -> None:
    """Start the tracker with the run's arguments; secrets and values it cannot show are left out."""
    config = {key: value for key, value in vars(args).items() if isinstance(value, (bool, int, float, str))}
    config.pop("hub_token", None)
    accelerator.init_trackers(project, config=config)


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


def phantom_dataset(
    num_subjects: int = 2000,
    size: int = 128,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    seed: int = 0,
    root: str | Path = "data",
    num_workers: int | None = None,
    show_progress: bool = True,
) -> Path:
    """Return the folder of simulated subjects, simulating them first if it is not there yet.

    The folder is `root/phantom-{size}-{num_subjects}`, with other modalities and seeds in its name when they are not
    the default. It is complete or absent: an interrupted simulation leaves nothing that is taken for a data set.

    Args:
        num_subjects: subjects, one slice each; one in five is held out for validation.
        size: image height and width, pixels.
        modalities: names, in order.
        seed: the same seed gives the same subjects.
        root: where such folders are kept.
        num_workers: processes; by default one per core.
    """
    from dldm_pipeline.data.phantom import phantom_rows
    from dldm_pipeline.data.slices import write_slices

    name = f"phantom-{size}-{num_subjects}"
    if tuple(modalities) != tuple(DEFAULT_MODALITIES):
        name += "-" + "-".join(modalities)
    if seed:
        name += f"-seed{seed}"
    folder = Path(root) / name
    if not folder.is_dir():
        workers = num_workers or os.cpu_count()
        rows = phantom_rows(num_subjects, size=size, seed=seed, modalities=tuple(modalities), num_workers=workers)
        rows = tqdm(rows, total=num_subjects, desc="simulating subjects", unit="subject", disable=not show_progress)
        write_slices(rows, folder, tuple(modalities), seed=seed)
    return folder


def find_dataset(
    accelerator: Accelerator, args: argparse.Namespace, modalities: Sequence[str] | None = None
) -> str | Path:
    """Return what `--dataset` names, or the folder of the simulated default, made on the main process first.

    Args:
        modalities: what to simulate without `--dataset`; the five defaults by default.
    """
    if args.dataset is not None:
        return args.dataset
    with accelerator.main_process_first():
        return phantom_dataset(
            args.phantom_subjects,
            args.resolution,
            modalities or DEFAULT_MODALITIES,
            root=args.cache_dir,
            show_progress=accelerator.is_main_process,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Clock and learning rate
# ---------------------------------------------------------------------------------------------------------------------


class TrainingClock:
    """Counts optimizer steps and minutes, says when to stop, and moves the learning rates.

    Training ends at `max_train_steps` or `max_train_minutes`, whichever comes first, and `progress` in [0, 1] follows
    the one that is nearer to its end. A learning-rate schedule from diffusers is moved to the place that `progress`
    says, so that it reaches its end also when time runs out first. Minutes of earlier, resumed runs count.

    Args:
        max_train_steps: optimizer steps.
        max_train_minutes: wall-clock minutes, or `None`.
        accelerator: with more than one process, the main process's clock is everybody's.
    """

    def __init__(self, max_train_steps: int, max_train_minutes: float | None = None, accelerator: Accelerator = None):
        self.step = 0
        self.max_train_steps = max_train_steps
        self.max_train_seconds = max_train_minutes * 60 if max_train_minutes else None
        self.accelerator = accelerator
        self.progress = 0.0
        self._schedules = []
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made, plus those of the runs this one goes on from."""
        return time.monotonic() - self._started

    @property
    def done(self) -> bool:
        """Whether to stop."""
        return self.progress >= 1

    def add_schedule(self, optimizer: torch.optim.Optimizer, name: str, num_warmup_steps: int) -> None:
        """Let the clock drive the learning rate of an optimizer.

        Args:
            optimizer: as it was before `accelerator.prepare`, or after.
            name: "cosine" or "constant"; both begin with the warm-up.
            num_warmup_steps: optimizer steps of linear warm-up.
        """
        name = "constant_with_warmup" if name == "constant" else name
        optimizer = getattr(optimizer, "optimizer", optimizer)
        schedule = get_scheduler(
            name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=self.max_train_steps
        )
        self._schedules.append((schedule, num_warmup_steps))

    def start(self) -> None:
        """Begin to count now, so that loading data is not counted."""
        self._started = time.monotonic()

    def tick(self) -> None:
        """Count one optimizer step that was just made."""
        self.step += 1
        self._update()

    def _update(self) -> None:
        self.progress = self.step / self.max_train_steps
        if self.max_train_seconds is not None:
            by_time = self.elapsed / self.max_train_seconds
            if self.accelerator is not None and self.accelerator.num_processes > 1:
                by_time = broadcast(torch.tensor(by_time, device=self.accelerator.device)).item()
            self.progress = max(self.progress, by_time)
        place = int(min(self.progress, 1) * self.max_train_steps)
        for schedule, num_warmup_steps in self._schedules:
            # A schedule is moved to a place by setting the place before it: `step` then computes the next one.
            schedule.last_epoch = (self.step if self.step < num_warmup_steps else max(place, self.step)) - 1
            # The loop already stepped the optimizer; under accumulation torch cannot see that and would warn.
            schedule._step_count = 2
            schedule.step()

    def state_dict(self) -> dict[str, float]:
        """Step and seconds so far."""
        return {"step": self.step, "seconds": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`."""
        self.step = int(state["step"])
        self._started = time.monotonic() - state["seconds"]
        self._update()


# ---------------------------------------------------------------------------------------------------------------------
# Averaged weights
# ---------------------------------------------------------------------------------------------------------------------


def transfer_rows(rows: torch.Tensor, known: Sequence[str | None], names: Sequence[str | None]) -> torch.Tensor:
    """Rows of an embedding for other names: that of the same name, or the mean of all rows for one not known.

    Args:
        rows: (len(known), d), one row a name.

    Returns:
        (len(names), d).
    """
    return torch.stack([rows[known.index(name)] if name in known else rows.mean(dim=0) for name in names])


def make_ema(model: torch.nn.Module, args: argparse.Namespace) -> EMAModel | None:
    """Averaged weights of a model as `--use_ema` and `--ema_decay` say; `None` without `--use_ema`.

    The average covers parameters, not buffers: it fits models whose buffers do not change in training.
    """
    if not args.use_ema:
        return None
    return EMAModel(model.parameters(), decay=args.ema_decay, foreach=True)


@contextmanager
def averaged_weights(model: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Give `model` the averaged weights inside the block, and its own afterwards. With `ema=None` nothing happens."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Terms of losses
# ---------------------------------------------------------------------------------------------------------------------


def radial_power(images: torch.Tensor, rings: int) -> torch.Tensor:
    """Power of images (..., H, W) in the first rings of one cycle a picture, (..., rings). The mean is left out.

    Args:
        rings: H / 4 are up to half the Nyquist frequency; beyond lies mostly noise. H / sqrt(2) are all.
    """
    size = images.shape[-1]
    y, x = torch.fft.fftfreq(size, 1 / size), torch.fft.rfftfreq(size, 1 / size)
    ring = torch.hypot(y[:, None], x).round().long().clamp(max=rings + 1).to(images.device).flatten()
    power = torch.fft.rfft2(images.float(), norm="ortho").abs().square().flatten(-2)
    return torch.zeros(*power.shape[:-1], rings + 2, device=power.device).index_add(-1, ring, power)[..., 1:-1]


def fine_detail(images: torch.Tensor) -> torch.Tensor:
    """What differs from the mean of the 3x3 pixels around: images (B, n, H, W) to the same shape."""
    return images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def patch_grid(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """How unlike the places of a decoder's patches are in fine detail, a scalar; without a grid it is near zero.

    The power of `fine_detail` (by the logarithm) and its mean (in units of its deviation) at each of the places, over all
    images of a modality, are compared with those of the others. No spectrum shows such a grid, for a sum over places has
    forgotten it.

    Args:
        images: (B, n, H, W), compared modality by modality.
        patch_size: side of the patches in pixels; H and W are multiples of it.
    """
    detail = fine_detail(images)
    power, mean = (
        F.pixel_unshuffle(x.mean(dim=0)[:, None], patch_size).mean(dim=(2, 3)) for x in (detail.square(), detail)
    )
    mean = mean / (power.detach().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    # The weight is that of a short trial: a mean of 2 % of the deviation gives every image away.
    return sum(
        weight * (x - x.mean(dim=1, keepdim=True)).square().mean()
        for weight, x in ((1, (power + 1e-8).log()), (10, mean))
    )


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbours of images (..., H, W): down (..., H - 1, W) and across (..., H, W - 1)."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def noise_deviation(images: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Deviation of the noise in images (..., H, W), shape (...): that of a filter that answers to little else.

    Immerkær, Computer Vision and Image Understanding 64 (1996) 300, eq. 3, with the median in place of the mean, and over the
    flattest tenth of the foreground alone, for fine anatomy looks like noise. How much too much it reads in simulated
    subjects, `benchmarks/noise.py` prints.

    Args:
        images: in [0, 1].
        foreground: bool, broadcasts with `images`; elsewhere there is no noise. NaN where it is empty.
    """
    pixels = images.reshape(-1, 1, *images.shape[-2:])
    taps = images.new_tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
    answer = F.conv2d(pixels, taps[None, None], padding=1).reshape(images.shape).abs()
    smooth = F.avg_pool2d(pixels, 3, 1, 1)
    variance = F.avg_pool2d(smooth.square(), 5, 1, 2) - F.avg_pool2d(smooth, 5, 1, 2).square()
    # The outline's own pixels are no place to look: beyond it there is no noise.
    background = (~foreground).to(images.dtype).expand(images.shape).reshape(pixels.shape)
    variance = (
        torch.where(F.max_pool2d(background, 3, 1, 1) == 0, variance, torch.nan).reshape(images.shape).flatten(-2)
    )
    flattest = variance <= variance.nanquantile(0.1, dim=-1, keepdim=True)
    return torch.where(flattest, answer.flatten(-2), torch.nan).nanmedian(dim=-1).values / 0.6745


def to_channels(images: torch.Tensor, present: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A subject as channels of one image.

    Args:
        images: (B, n, H, W) in [0, 1].
        present: (B, n) bool; what is missing becomes black.
        mask: (B, H, W) in [0, 1]. It is blurred: one of nothing but 0 and 1 would give every decoded one away.

    Returns:
        (B, n or n + 1, H, W) in [-1, 1].
    """
    images = images * present[:, :, None, None]
    if mask is not None:
        taps = mask.new_tensor([0.25, 0.5, 0.25])
        mask = F.conv2d(F.pad(mask[:, None], [1] * 4, mode="replicate"), (taps[:, None] * taps)[None, None])
        images = torch.cat([images, mask], dim=1)
    return images * 2 - 1


def patch_distance(
    images: torch.Tensor,
    others: torch.Tensor,
    regions: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """How far the patches of two sets of images lie apart as distributions: squared sliced Wasserstein distance, a scalar.

    Random filters see all channels of a patch at once, so that what fits together in one set must do so in the other. Each
    filter's answers are sorted and compared in units of their deviation in `others`. The filters do not answer to a channel
    that is flat; what is smooth counts on the coarser levels, each of half the size.

    Source: Elnekave & Weiss, "Generating natural images with direct patch distributions matching" (ECCV 2022); levels as in
    Karras et al., "Progressive Growing of GANs" (ICLR 2018), section 5.

    Args:
        images: (B, C, H, W).
        others: (N, C, H, W), towards which the gradient pulls.
        regions: pairs of bool (B, H, W) and (N, H, W), where the patches to compare have their centres; the distance is the
            mean over regions and levels, without those where one set has no patch.
    """
    num_filters, size, levels = 16, 7, 3
    distances = []
    for level in range(levels):
        if level:
            images, others = F.avg_pool2d(images, 2), F.avg_pool2d(others, 2)
            regions = [(a[:, ::2, ::2], b[:, ::2, ::2]) for a, b in regions]
        filters = torch.randn(num_filters, images.shape[1], size, size, device=images.device)
        filters = filters - filters.mean(dim=(2, 3), keepdim=True)
        filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
        # At full size every second patch is enough, from a random corner so that none is always left out.
        stride = 1 if level else 2
        top, left = torch.randint(stride, (2,)).tolist()
        answers = [F.conv2d(x[..., top:, left:], filters, stride=stride).transpose(0, 1) for x in (images, others)]
        rows, columns = (slice(corner + size // 2, None, stride) for corner in (top, left))
        height, width = answers[0].shape[2:]
        for region in regions:
            ours, theirs = (
                answer[:, where[:, rows, columns][:, :height, :width]].sort(dim=1).values
                for answer, where in zip(answers, region, strict=True)
            )
            if ours.shape[1] and theirs.shape[1] > 1:
                rank = (torch.arange(ours.shape[1], device=ours.device) + 0.5) / ours.shape[1] * theirs.shape[1]
                variance = theirs.var(dim=1, keepdim=True).clamp(min=1e-8)
                distances.append(((ours - theirs[:, rank.long()]).square() / variance).mean())
    return torch.stack(distances).mean() if distances else images.new_zeros(())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    clock: TrainingClock,
    ema: EMAModel | None = None,
    total_limit: int | None = None,
) -> Path:
    """Write `output_dir/checkpoint-{step}`, then delete the oldest ones beyond `total_limit`.

    Everything given to `accelerator.prepare` is saved by `accelerator.save_state` (weights as safetensors), the
    averaged weights as `ema.safetensors`, and the clock as `training_state.json`. The folder is written under another
    name and renamed, so that a checkpoint is complete or absent. Call it on every process.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or cannot be written; what was there before stays.
    """
    output_dir = Path(output_dir)
    final, temporary = output_dir / f"checkpoint-{clock.step}", output_dir / f".checkpoint-{clock.step}.tmp"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = clock.state_dict()
            if ema is not None:
                tensors = {f"{i:04d}": tensor.contiguous() for i, tensor in enumerate(ema.shadow_params)}
                save_file(tensors, temporary / "ema.safetensors")
                state["ema_step"] = ema.optimization_step
            (temporary / "training_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            temporary.replace(final)
            if total_limit is not None:
                for old in list_checkpoints(output_dir)[:-total_limit]:
                    shutil.rmtree(old)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError, safetensors as its own.
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"--output_dir {output_dir}: could not write {final.name}: {error}") from error
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, which: str, clock: TrainingClock, ema: EMAModel | None = None
) -> Path | None:
    """Go on from a checkpoint: models, optimizers, random state, averaged weights and clock.

    Args:
        which: "latest" in `output_dir`, or a checkpoint's folder.

    Returns:
        The checkpoint's folder, or `None` when "latest" finds none: the run then starts at its beginning.

    Raises:
        FileNotFoundError: the named folder is no checkpoint.
        ValueError: its weights do not fit this model.
    """
    if which == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            accelerator.print(f"no checkpoint in {output_dir} yet: starting from step 0")
            return None
        folder = found[-1]
    else:
        folder = Path(which)
        if not (folder / "training_state.json").is_file():
            raise FileNotFoundError(
                f"--resume_from_checkpoint {which}: no training_state.json there; give 'latest' "
                "or a checkpoint-N folder"
            )
    try:
        accelerator.load_state(str(folder))
        state = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
        if ema is not None:
            if not (folder / "ema.safetensors").is_file():
                raise ValueError("it was saved without averaged weights; add --no-use_ema")
            saved = [tensor for _, tensor in sorted(load_file(folder / "ema.safetensors").items())]
            if [t.shape for t in saved] != [t.shape for t in ema.shadow_params]:
                raise ValueError("its averaged weights have other shapes")
            # Copied in place, which keeps the memory format of the weights.
            for old, new in zip(ema.shadow_params, saved, strict=True):
                old.copy_(new)
            ema.optimization_step = int(state["ema_step"])
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--resume_from_checkpoint {folder}: does not fit this run ({reason}); use the same preset, or a new "
            "--output_dir"
        ) from error
    clock.load_state_dict(state)
    accelerator.print(f"resumed from {folder} at step {clock.step}")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def write_pretrained(save: Callable[[Path], None], folder: str | Path) -> None:
    """Write a `save_pretrained` folder under another name first, then move its entries into `folder`.

    Args:
        save: called with the temporary folder, e.g. `pipeline.save_pretrained`.
        folder: the final place; other files in it (checkpoints, logs) stay.

    Raises:
        OSError: the disk is full or cannot be written; what was in `folder` before stays.
    """
    folder = Path(folder)
    temporary = folder / f".saving-{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        save(temporary)
        for path in temporary.rglob("config.json"):
            # diffusers notes the folder a component came from; that is nobody's business once the model is shared.
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for entry in sorted(temporary.iterdir()):
            target = folder / entry.name
            if entry.is_dir() and target.is_dir():
                shutil.rmtree(target)
            entry.replace(target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"--output_dir {folder}: could not write the model: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def push_folder(folder: str | Path, args: argparse.Namespace) -> str:
    """Upload a finished model folder to the Hub as `--hub_model_id` says, without checkpoints and logs.

    Returns:
        The address of the commit.

    Raises:
        OSError: the upload failed; the local folder is complete and can be pushed later.
    """
    folder = Path(folder)
    repo_id = args.hub_model_id or folder.resolve().name
    try:
        return hub.push_folder(folder, repo_id, token=args.hub_token, commit_message="End of training")
    except (OSError, ValueError) as error:  # the training itself is not lost
        raise OSError(f"--push_to_hub: upload failed, the model is safe in {folder}: {error}") from error
