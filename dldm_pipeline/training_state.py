"""What a training resumes from: its clock, which also moves the learning rates, and its checkpoints."""

import json
import pickle
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

KEPT_CHECKPOINTS = 2


class TrainingClock:
    """Counts optimizer steps and minutes, says when to stop, and moves the learning rates.

    Training ends at `max_train_steps` or `max_train_minutes`, whichever comes first; `progress` in [0, 1] follows the one
    nearer to its end, and so do the learning rates. Minutes of earlier, resumed runs count.

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

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds that were no training."""
        self._started += seconds

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


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    clock: TrainingClock,
    ema: EMAModel,
) -> Path:
    """Write `output_dir/checkpoint-{step}`, then delete all but the last `KEPT_CHECKPOINTS`.

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
            tensors = {f"{i:04d}": tensor.contiguous() for i, tensor in enumerate(ema.shadow_params)}
            save_file(tensors, temporary / "ema.safetensors")
            state = {**clock.state_dict(), "ema_step": ema.optimization_step}
            (temporary / "training_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            temporary.replace(final)
            for old in list_checkpoints(output_dir)[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError, safetensors as its own.
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"--output_dir {output_dir}: could not write {final.name}: {error}") from error
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, which: str, clock: TrainingClock, ema: EMAModel
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
        saved = [tensor for _, tensor in sorted(load_file(folder / "ema.safetensors").items())]
        if [t.shape for t in saved] != [t.shape for t in ema.shadow_params]:
            raise ValueError("its averaged weights have other shapes")
        # Copied in place, which keeps the memory format of the weights.
        for old, new in zip(ema.shadow_params, saved, strict=True):
            old.copy_(new)
        ema.optimization_step = int(state["ema_step"])
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--resume_from_checkpoint {folder}: is damaged or does not fit this run ({reason}); use the same preset, "
            "another checkpoint, or a new --output_dir"
        ) from error
    clock.load_state_dict(state)
    accelerator.print(f"resumed from {folder} at step {clock.step}")
    return folder
