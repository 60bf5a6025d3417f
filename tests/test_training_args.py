import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.training_args import TrainingArgs, option, parse_args


@dataclass
class SmallArgs(TrainingArgs):
    config: str | None = option("small", "preset")
    widths: list[int] = option([1], "widths")
    shared: bool = option(False, "whether")


@pytest.fixture
def parse(tmp_path):
    def run(words, text="learning_rate: 1e-3\nshared: true\n"):
        (tmp_path / "small.yaml").write_text(text)
        with exit_on_user_error():
            return parse_args(SmallArgs, "A test.", tmp_path, words)

    return run


def test_the_command_line_overrides_the_preset_and_the_preset_the_defaults(parse, tmp_path):
    (tmp_path / "other.yaml").write_text("seed: 7\nwidths: [8, 16]\nreport_to: wandb\nmax_train_minutes: null\n")
    assert parse([]).learning_rate == 1e-3 and parse([]).shared is True
    args = parse(["--learning_rate", "0.5", "--shared", "false"])
    assert (args.learning_rate, args.shared) == (0.5, False)
    for name in ("other", str(tmp_path / "other.yaml")):
        args = parse(["--config", name, "--seed", "8"])
        assert (args.seed, args.widths, args.report_to, args.max_train_minutes) == (8, [8, 16], "wandb", None)
        assert args.learning_rate == 3e-4


def test_bad_arguments_give_one_line_and_status_2(parse, capsys):
    for text, words, expected in (
        ("learning_rat: 1", [], "unknown key 'learning_rat'"),
        ("learning_rat: 1", [], "did you mean 'learning_rate'"),
        ("config: x", [], "unknown key 'config'"),
        ("shared: maybe", [], "--shared"),
        ("learning_rate: [", [], "not YAML"),
        ("- a", [], "not a list"),
        ("train_batch_size: 0", [], "--train_batch_size 0: must be at least 1"),
        ("report_to: printer", [], "invalid choice: 'printer'"),
        ("", ["--learning_rate", "nan"], "--learning_rate nan"),
        ("", ["--learning_rate", "-1"], "--learning_rate -1.0"),
        ("", ["--max_train_minutes", "x"], "invalid float value: 'x'"),
        ("", ["--max_train_minutes", "0"], "--max_train_minutes 0.0"),
        ("", ["--config", "absent"], "presets are small"),
        ("", ["--ema_decay", "1.5"], "--ema_decay 1.5: must be between 0 and 1"),
        ("", ["--learn", "1"], "--learn"),
    ):
        with pytest.raises(SystemExit) as caught:
            parse(words, text)
        output = capsys.readouterr().err
        assert caught.value.code == 2
        assert output.startswith("error: ") and output.count("\n") == 1 and expected in output


def test_help_shows_the_values_of_the_preset(parse, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], "ema_decay: 0.123\n")
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert "0.123" in output and "A test." in output and "checkpoint every N steps" in output


@given(st.floats(1e-9, 1e9), st.integers(1, 10**9), st.booleans(), st.lists(st.integers(0, 10**6), min_size=1))
def test_a_preset_gives_back_what_was_written(tmp_path_factory, rate, steps, shared, widths):
    folder = tmp_path_factory.mktemp("presets")
    preset = {"learning_rate": rate, "max_train_steps": steps, "shared": shared, "widths": widths}
    (folder / "small.yaml").write_text(json.dumps(preset))  # JSON is YAML
    args = vars(parse_args(SmallArgs, "", folder, []))
    assert {name: args[name] for name in preset} == preset


def test_what_a_card_shows_has_no_paths():
    shown = SmallArgs(dataset="/home/somebody", output_dir="/home/somebody", seed=3).shown()
    assert shown["seed"] == 3 and "/home/somebody" not in shown.values()
