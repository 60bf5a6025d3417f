import errno

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from dldm_pipeline import training_state
from dldm_pipeline.training_state import TrainingClock, list_checkpoints, load_checkpoint, save_checkpoint

# Clock


def rates(clock, optimizer, steps):
    found = []
    for _ in range(steps):
        optimizer.step()
        clock.tick()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def make_clock(*arguments, name="cosine", warmup=4):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    clock = TrainingClock(*arguments)
    clock.add_schedule(optimizer, name, warmup)
    return clock, optimizer


def test_the_rate_warms_up_and_follows_the_steps():
    clock, optimizer = make_clock(20)
    assert optimizer.param_groups[0]["lr"] == 0
    found = rates(clock, optimizer, 20)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert np.all(np.diff(found[3:]) < 0) and found[-1] == pytest.approx(0) and clock.done and clock.step == 20
    clock, optimizer = make_clock(20, name="constant")
    assert rates(clock, optimizer, 20)[3:] == [1.0] * 17


def test_the_rate_follows_the_time_when_that_ends_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training_state.time, "monotonic", lambda: now[0])
    clock, optimizer = make_clock(1_000_000, 1.0)
    now[0] += 50
    clock.start()
    rates(clock, optimizer, 10)
    now[0] += 30
    assert rates(clock, optimizer, 1) == pytest.approx([0.5], abs=0.01) and not clock.done
    now[0] += 30
    assert rates(clock, optimizer, 1) == pytest.approx([0], abs=1e-6) and clock.done

    again, optimizer = make_clock(1_000_000, 2.0)
    again.load_state_dict(clock.state_dict())
    assert again.step == 12 and again.progress == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5, abs=0.01)


# Checkpoints


def make_run(seed=0):
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = EMAModel(model.parameters(), decay=0.9)
    clock = TrainingClock(10)
    clock.add_schedule(optimizer, "cosine", 2)
    model, optimizer = accelerator.prepare(model, optimizer)

    def train(steps):
        for _ in range(steps):
            accelerator.backward(model(torch.randn(2, 3)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            clock.tick()

    return accelerator, model, ema, clock, train


def test_old_checkpoints_go_and_nothing_half_written_stays(tmp_path, monkeypatch):
    accelerator, model, ema, clock, train = make_run()
    for _ in range(3):
        train(1)
        save_checkpoint(accelerator, tmp_path, clock, ema)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    train(1)
    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(OSError, match="could not write checkpoint-4.*No space left"):
        save_checkpoint(accelerator, tmp_path, clock, ema)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_resuming_from_what_does_not_fit_is_refused(tmp_path):
    accelerator, model, ema, clock, train = make_run()
    assert load_checkpoint(accelerator, tmp_path, "latest", clock, ema) is None
    with pytest.raises(FileNotFoundError, match="absent"):
        load_checkpoint(accelerator, tmp_path, str(tmp_path / "absent"), clock, ema)
    folder = save_checkpoint(accelerator, tmp_path, clock, ema)
    accelerator = Accelerator(cpu=True)
    other = accelerator.prepare(torch.nn.Linear(5, 5))
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(accelerator, tmp_path, str(folder), clock, EMAModel(other.parameters()))
    (folder / "optimizer.bin").write_bytes(b"")
    for message in ("is damaged or does not fit", "does not fit"):
        accelerator, _, ema, clock, _ = make_run()
        with pytest.raises(ValueError, match=message):
            load_checkpoint(accelerator, tmp_path, str(folder), clock, ema)
        (folder / "ema.safetensors").unlink(missing_ok=True)
