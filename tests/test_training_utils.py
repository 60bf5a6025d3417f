import json

import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file

from dldm_pipeline import training_state
from dldm_pipeline.training_args import TrainingArgs
from dldm_pipeline.training_utils import averaged_weights, fit, make_accelerator, make_output_dir, transfer_rows, update


def test_an_output_folder_that_cannot_be_written_and_a_missing_tracker_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file.*choose another folder"):
            make_output_dir(path)
    assert make_output_dir(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        make_accelerator(TrainingArgs(output_dir=str(tmp_path / "out"), report_to="wandb"), "test")


def test_threads_are_left_alone_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before = torch.get_num_threads()
    try:
        for number, expected in ((None, before), (3, 3)):
            make_accelerator(TrainingArgs(output_dir=str(tmp_path), num_threads=number), "test")
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_rows_of_other_names_and_averaged_weights():
    rows = torch.tensor([[1.0], [2.0], [6.0]])
    assert transfer_rows(rows, ["a", "b", None], ["b", "c", None]).tolist() == [[2.0], [3.0], [6.0]]
    # Averaged weights are in place inside the block only.
    model = torch.nn.Linear(2, 2)
    ema = EMAModel(model.parameters(), decay=0.9)
    average = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.clone()
    with averaged_weights(model, ema):
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, own)


class Run:
    """A training of one weight towards 1, one gradient step a call."""

    def __init__(self, folder, **options):
        options = dict(max_train_steps=6, validation_steps=3, checkpointing_steps=2, lr_warmup_steps=0) | options
        self.args = TrainingArgs(output_dir=str(folder), learning_rate=0.1, report_to="tensorboard", **options)
        accelerator = make_accelerator(self.args, "test")
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        model, optimizer = accelerator.prepare(self.model, torch.optim.SGD(self.model.parameters(), lr=0.1))
        self.weights, self.validated = [], []

        def step(number):
            loss = (model(torch.ones(1, 1)) - 1).square().mean() + 0.01 * torch.randn(())
            update(accelerator, loss, model.parameters(), optimizer)
            self.weights.append((number, self.model.weight.item()))
            return {"loss": loss.detach(), "other": loss.detach()}

        def validate(path, clock):
            self.validated.append((clock.step, self.model.weight.item()))
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
            return {"figure": 1.0}

        self.clock = fit(accelerator, self.args, self.model, model, [optimizer], step, validate)
        accelerator.end_training()


def test_the_loop_steps_averages_validates_and_writes_checkpoints(tmp_path, capsys):
    run = Run(tmp_path, ema_decay=0.5)
    assert run.clock.step == 6 and [number for number, _ in run.weights] == list(range(6))
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    # In the end the model has the averaged weights, and validation had those of its step.
    average = load_file(tmp_path / "checkpoint-6" / "ema.safetensors")["0000"].item()
    assert run.model.weight.item() == average and average < run.weights[-1][1]
    assert [step for step, _ in run.validated] == [3, 6] and run.validated[1][1] == average
    assert 0 < run.validated[0][1] < run.weights[2][1] < run.weights[3][1]  # its own weights came back
    assert "step 3: figure 1" in capsys.readouterr().err + capsys.readouterr().out or list(tmp_path.rglob("events*"))
    assert (tmp_path / "validation" / "step-000003.png").is_file()


def test_without_averaging_and_checkpoints_and_with_accumulation(tmp_path):
    run = Run(tmp_path, ema_decay=0.0, checkpointing_steps=0, validation_steps=0)
    assert run.model.weight.item() == pytest.approx(run.weights[-1][1])
    assert not list(tmp_path.glob("checkpoint-*")) and not run.validated
    # Accumulated batches are one step.
    run = Run(tmp_path / "accumulated", gradient_accumulation_steps=2, max_train_steps=3)
    assert run.clock.step == 3 and [number for number, _ in run.weights] == [0, 0, 1, 1, 2, 2]
    values = [weight for _, weight in run.weights]
    assert values[0] == 0 < values[1] == values[2] < values[3]


def test_a_run_goes_on_where_it_was(tmp_path):
    whole = Run(tmp_path / "whole")
    resumed = Run(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert [number for number, _ in resumed.weights] == [4, 5]
    assert resumed.weights == whole.weights[4:] and resumed.model.weight.item() == whole.model.weight.item()
    state = json.loads((tmp_path / "resumed" / "checkpoint-6" / "training_state.json").read_text())
    assert state["step"] == 6 and state["seconds"] >= 0
    # Checkpoints of an earlier run are neither taken nor deleted.
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; add --resume_from_checkpoint latest"):
        Run(tmp_path / "whole", seed=1)
    assert (tmp_path / "whole" / "checkpoint-6").is_dir()


def test_validation_is_no_training_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_state.time, "monotonic", lambda: now[0])
    inner = Image.Image.save

    def slow(*args, **kwargs):
        now[0] += 100
        return inner(*args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", slow)
    run = Run(tmp_path, max_train_minutes=1.0)
    assert run.clock.step == 6 and run.clock.elapsed == 0 and now[0] >= 200
