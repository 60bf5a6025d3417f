import errno
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from dldm_pipeline import training_utils
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.hub import write_model_card
from dldm_pipeline.training_utils import (
    TrainingClock,
    TrainingParser,
    add_training_arguments,
    averaged_weights,
    list_checkpoints,
    load_checkpoint,
    make_accelerator,
    make_ema,
    make_output_dir,
    noise_deviation,
    parse_args,
    patch_distance,
    patch_grid,
    phantom_dataset,
    push_folder,
    save_checkpoint,
    to_channels,
    write_pretrained,
)


@pytest.fixture
def parser(tmp_path):
    def build(text="learning_rate: 1e-3\nuse_ema: false\n"):
        (tmp_path / "small.yaml").write_text(text)
        parser = TrainingParser(presets=tmp_path, default_config="small")
        add_training_arguments(parser)
        parser.add_argument("--widths", type=int, nargs="*", default=[1])
        return parser

    return build


# Arguments


def test_the_command_line_overrides_the_preset_and_the_preset_the_defaults(parser, tmp_path):
    (tmp_path / "other.yaml").write_text("seed: 7\nwidths: [8, 16]\nlr_scheduler: constant\nmax_train_minutes: null\n")
    assert parse_args(parser(), []).learning_rate == 1e-3
    assert parse_args(parser(), []).use_ema is False
    args = parse_args(parser(), ["--learning_rate", "0.5", "--use_ema"])
    assert (args.learning_rate, args.use_ema) == (0.5, True)
    for name in ("other", str(tmp_path / "other.yaml")):
        args = parse_args(parser(), ["--config", name, "--seed", "8"])
        assert (args.seed, args.widths, args.lr_scheduler, args.max_train_minutes) == (8, [8, 16], "constant", None)
        assert args.learning_rate == 3e-4


@pytest.mark.parametrize(
    "text, words, expected",
    [
        ("learning_rat: 1", [], "unknown key 'learning_rat'"),
        ("learning_rat: 1", [], "did you mean 'learning_rate'"),
        ("config: x", [], "unknown key 'config'"),
        ("use_ema: maybe", [], "'use_ema'"),
        ("learning_rate: [", [], "not YAML"),
        ("- a", [], "not a list"),
        ("train_batch_size: 0", [], "--train_batch_size"),
        ("lr_scheduler: linear", [], "invalid choice: 'linear'"),
        ("", ["--learning_rate", "nan"], "--learning_rate"),
        ("", ["--learning_rate", "-1"], "-1 is not above zero"),
        ("", ["--max_train_minutes", "x"], "--max_train_minutes"),
        ("", ["--config", "absent"], "presets are small"),
        ("", ["--ema_decay", "1.5"], "--ema_decay"),
        ("", ["--learn", "1"], "--learn"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(parser, capsys, text, words, expected):
    with pytest.raises(SystemExit) as caught:
        parse_args(parser(text), words)
    output = capsys.readouterr().err
    assert caught.value.code == 2
    assert output.startswith("error: ") and output.count("\n") == 1 and expected in output


def test_help_shows_the_values_of_the_preset(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(parser("ema_decay: 0.123\n"), ["--help"])
    assert caught.value.code == 0
    assert "0.123" in capsys.readouterr().out


@given(st.floats(1e-9, 1e9), st.integers(1, 10**9), st.booleans(), st.lists(st.integers(0, 10**6), max_size=5))
def test_a_preset_gives_back_what_was_written(tmp_path_factory, rate, steps, ema, widths):
    folder = tmp_path_factory.mktemp("presets")
    preset = {"learning_rate": rate, "max_train_steps": steps, "use_ema": ema, "widths": widths}
    (folder / "p.yaml").write_text(json.dumps(preset))  # JSON is YAML
    parser = TrainingParser(presets=folder, default_config="p")
    add_training_arguments(parser)
    parser.add_argument("--widths", type=int, nargs="*")
    args = vars(parse_args(parser, []))
    assert {name: args[name] for name in preset} == preset


@pytest.mark.parametrize("error", [ValueError("a\nb"), FileNotFoundError("a b"), OSError(errno.ENOSPC, "a b")])
def test_bad_input_is_one_line(capsys, error):
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise error
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ") and "a b" in str(error).replace("\n", " ")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        raise ZeroDivisionError


# Set-up


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file.*choose another folder"):
            make_output_dir(path)
    assert make_output_dir(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_tracker_that_is_not_installed_is_refused(parser, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    args = parse_args(parser(), ["--output_dir", str(tmp_path / "out"), "--report_to", "wandb"])
    with pytest.raises(ValueError, match="pip install wandb"):
        make_accelerator(args)


def test_threads_are_left_alone_unless_asked_for(parser, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before = torch.get_num_threads()
    try:
        for words, expected in (([], before), (["--num_threads", "1"], 1)):
            make_accelerator(parse_args(parser(), ["--output_dir", str(tmp_path), *words]))
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_simulated_subjects_are_made_once(tmp_path):
    folder = phantom_dataset(4, 64, root=tmp_path, num_workers=1, show_progress=False)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert folder == tmp_path / "phantom-64-4" and times
    assert phantom_dataset(4, 64, root=tmp_path, num_workers=1, show_progress=False) == folder
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_an_interrupted_simulation_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        yield {"subject": "a", "slice_index": 0, "T1": np.zeros((64, 64), np.float32)}
        raise KeyboardInterrupt

    monkeypatch.setattr("dldm_pipeline.data.phantom.phantom_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        phantom_dataset(4, 64, root=tmp_path, show_progress=False)
    assert not list(tmp_path.rglob("*.parquet"))


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
    assert np.all(np.diff(found[3:]) < 0) and found[-1] == pytest.approx(0)
    assert clock.done and clock.step == 20
    clock, optimizer = make_clock(20, name="constant")
    assert rates(clock, optimizer, 20)[3:] == [1.0] * 17


def test_the_rate_follows_the_time_when_that_ends_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training_utils.time, "monotonic", lambda: now[0])
    clock, optimizer = make_clock(1_000_000, 1.0)
    now[0] += 50
    clock.start()
    rates(clock, optimizer, 10)
    now[0] += 30
    assert rates(clock, optimizer, 1) == pytest.approx([0.5], abs=0.01)
    assert not clock.done
    now[0] += 30
    assert rates(clock, optimizer, 1) == pytest.approx([0], abs=1e-6)
    assert clock.done

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
    ema = make_ema(model, Namespace(use_ema=True, ema_decay=0.9))
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


def test_a_resumed_run_ends_like_one_that_never_stopped(tmp_path):
    accelerator, model, ema, clock, train = make_run()
    train(3)
    torch.manual_seed(1)
    save_checkpoint(accelerator, tmp_path, clock, ema)
    train(4)

    accelerator, other, other_ema, other_clock, train = make_run(seed=5)
    assert load_checkpoint(accelerator, tmp_path, "latest", other_clock, other_ema) == tmp_path / "checkpoint-3"
    train(4)
    assert other_clock.step == 7
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(other_ema.shadow_params, ema.shadow_params, rtol=0, atol=0)


def test_old_checkpoints_go_and_nothing_half_written_stays(tmp_path, monkeypatch):
    accelerator, model, ema, clock, train = make_run()
    for _ in range(3):
        train(1)
        save_checkpoint(accelerator, tmp_path, clock, ema, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    train(1)
    monkeypatch.setattr(training_utils, "save_file", full)
    with pytest.raises(OSError, match="could not write checkpoint-4.*No space left"):
        save_checkpoint(accelerator, tmp_path, clock, ema, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_resuming_from_what_does_not_fit_is_refused(tmp_path):
    accelerator, model, ema, clock, train = make_run()
    assert load_checkpoint(accelerator, tmp_path, "latest", clock, ema) is None
    with pytest.raises(FileNotFoundError, match="absent"):
        load_checkpoint(accelerator, tmp_path, str(tmp_path / "absent"), clock, ema)
    folder = save_checkpoint(accelerator, tmp_path, clock)
    with pytest.raises(ValueError, match="no-use_ema"):
        load_checkpoint(accelerator, tmp_path, "latest", clock, ema)

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(5, 5))
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(accelerator, tmp_path, str(folder), clock)


def test_averaged_weights_are_in_place_inside_the_block_only():
    model = torch.nn.Linear(2, 2)
    ema = make_ema(model, Namespace(use_ema=True, ema_decay=0.9))
    average = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.clone()
    with averaged_weights(model, ema):
        assert torch.equal(model.weight, average[0])
    assert torch.equal(model.weight, own)
    with averaged_weights(model, None):
        assert torch.equal(model.weight, own)


# Terms of losses


@pytest.mark.parametrize("deviation", [0.01, 0.05])
def test_noise_is_told_from_edges_and_shading(deviation):
    torch.manual_seed(0)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    disc = torch.hypot(y, x) < 0.8
    clean = disc * (0.4 + 0.2 * x + 0.2 * (y > 0.2))
    noisy = clean + deviation * torch.randn(3, 2, 64, 64) * disc
    assert noise_deviation(noisy, disc).shape == (3, 2)
    assert abs(noise_deviation(noisy, disc).mean() / deviation - 1) < 0.15
    assert noise_deviation(clean, disc) < 1e-3
    assert noise_deviation(noisy, torch.zeros_like(disc)).isnan().all()


@pytest.mark.parametrize("patch_size", [2, 4])
def test_detail_at_some_places_of_every_patch_is_a_grid(patch_size):
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.rand(8, 3, 66, 66), 3, 1)
    detail = 0.05 * torch.randn(8, 3, 64, 64)
    on_grid = (torch.arange(64) % patch_size == 0) & (torch.arange(64)[:, None] % patch_size == 0)
    # As much power in both, evenly spread in one.
    without, with_grid = (patch_grid(images + x, patch_size) for x in (detail, patch_size * detail * on_grid))
    assert without < 0.01 and with_grid > 0.2
    ripple = images + 0.01 * (-1.0) ** torch.arange(64)
    assert patch_grid(ripple, patch_size) > 0.05  # as much power at every place, and not the same mean
    # One modality's grid is seen among others without, and its gradient takes it away.
    only = (patch_size * detail * on_grid)[:, :1].requires_grad_()
    one = patch_grid(torch.cat([images[:, :1] + only, images[:, 1:]], dim=1), patch_size)
    one.backward()
    assert one > with_grid / 5 and (only.grad * only).sum() > 0


def test_a_subject_becomes_channels_of_one_image():
    images, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16)
    mask[:, 4:8, 4:8] = 1
    present = torch.tensor([[True, True, True], [True, False, True]])
    output = to_channels(images, present, mask)
    assert output.shape == (2, 4, 16, 16) and (output[1, 1] == -1).all()
    torch.testing.assert_close(output[0, :3], images[0] * 2 - 1)
    # Blurred, but as much of it as before.
    assert len(output[0, 3].unique()) > 2
    torch.testing.assert_close((output[:, 3] + 1).sum(), 2 * mask.sum())
    assert to_channels(images, present).shape == (2, 3, 16, 16)


def test_patches_of_two_sets_lie_apart_by_what_they_show_and_not_by_how_many_there_are():
    torch.manual_seed(0)

    def draw(count, blur=1, joint=True):
        images = torch.nn.functional.avg_pool2d(torch.randn(count, 1, 64, 64), blur, 1, blur // 2)
        second = images if joint else images.flip(0)
        images = torch.cat([images, second], dim=1) / images.std()
        return images, torch.ones(count, 64, 64, dtype=torch.bool)

    def distance(a, b):
        return patch_distance(a[0], b[0], [(a[1], b[1])]).item()

    same = distance(draw(6, 3), draw(12, 3))
    assert distance(draw(6, 5), draw(12, 3)) > 5 * same  # blurred
    assert distance(draw(6, 3, joint=False), draw(12, 3)) > 5 * same  # channels that do not fit together
    # What is not inside does not count, and nothing inside is no distance.
    images, where = draw(6, 3)
    half = where & (torch.arange(64) < 32)
    changed = torch.where(half[:, None], images, 0)
    away = half & (torch.arange(64) < 16)
    torch.manual_seed(1)
    kept = patch_distance(images, images, [(away, away)])
    torch.manual_seed(1)
    torch.testing.assert_close(patch_distance(changed, images, [(away, away)]), kept)
    assert patch_distance(images, images, [(~where, where)]) == 0
    torch.manual_seed(1)
    assert patch_distance(images, images, [(away, away), (~where, where)]) == kept


def test_patches_become_alike_by_its_gradient():
    torch.manual_seed(0)
    others, where = torch.randn(8, 1, 32, 32), torch.ones(8, 32, 32, dtype=torch.bool)
    contrast = torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.Adam([contrast], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        patch_distance(contrast * torch.randn(8, 1, 32, 32), others, [(where, where)]).backward()
        optimizer.step()
    assert contrast.item() == pytest.approx(1, abs=0.1)


# Results


def test_a_model_replaces_the_old_one_only_when_complete(tmp_path):
    def save(folder: Path, value="new"):
        (folder / "unet").mkdir()
        # A config is JSON, and diffusers notes in it where the component came from.
        (folder / "unet" / "config.json").write_text(json.dumps({"state": value, "_name_or_path": "/home/somebody"}))
        (folder / "model_index.json").write_text(value)

    def fail(folder: Path):
        save(folder, "half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "checkpoint-1").mkdir()
    write_pretrained(save, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        write_pretrained(fail, tmp_path)
    write_pretrained(save, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "model_index.json", "unet"]
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == {"state": "new"}


def test_the_model_card_says_what_it_must(tmp_path):
    path = write_model_card(
        tmp_path, "Title", "Text.", {"v-loss": 0.123456}, {"seed": 0, "none": None}, {"Caption": "samples.png"}, ["x"]
    )
    text = path.read_text()
    assert text.startswith("---\n") and "license: apache-2.0" in text and "- x\n" in text
    assert "| v-loss | 0.1235 |" in text and "| seed | 0 |" in text and "none" not in text
    assert "![Caption](samples.png)" in text and "Not for diagnosis" in text


def test_a_push_uploads_the_folder_and_a_failing_one_is_a_clear_error(hub_server, tmp_path, monkeypatch):
    for path in ("brains/model.safetensors", "brains/checkpoint-10/model.safetensors", "hub/empty"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"x")
    with hub_server.HubServer(tmp_path / "hub") as hub:
        hub.use_in_this_process(monkeypatch, tmp_path / "home", token=None)
        args = Namespace(hub_token=hub_server.TOKEN, hub_model_id=None)
        assert push_folder(tmp_path / "brains", args).startswith(f"{hub.url}/tester/brains/commit/")
        repo = hub.repos["models", "tester/brains"]
        assert list(repo.commits[repo.branches["main"]]) == ["model.safetensors"]

        args = Namespace(hub_token="wrong", hub_model_id="tester/others")
        with pytest.raises(OSError, match="--push_to_hub.*safe in.*brains.*401"):
            push_folder(tmp_path / "brains", args)
        assert list(hub.repos) == [("models", "tester/brains")]
