import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed.py"
spec = importlib.util.spec_from_file_location("speed", SCRIPT)
speed = importlib.util.module_from_spec(spec)
sys.modules["speed"] = speed  # dataclasses look their module up
spec.loader.exec_module(speed)
ROWS = [
    ("ours", "10 + 5"),
    ("ours, full grid, DDIM", "10 + 10"),
    ("diffusers f8, DDIM", "10"),
    ("diffusers f8, DDIM", "50"),
]


@pytest.fixture
def tiny_sizes(monkeypatch):
    monkeypatch.setattr(speed, "PEAK_SHAPES", ((1, 8, 8),))
    monkeypatch.setattr(speed, "STYLE_GRID", 2)  # half of the tiny pipeline's latent size


def test_systems_take_turns_and_the_first_round_is_not_counted():
    calls = []
    systems = {name: lambda count, name=name: calls.append((name, count)) for name in ("a", "b", "c")}
    speeds = speed.measure(systems, [1, 4], rounds=2)
    assert calls == [(name, count) for count in (1, 4) for _ in range(3) for name in ("a", "b", "c")]
    assert list(speeds) == ["a", "b", "c"]
    assert all(len(values) == 2 and min(values) > 0 for own in speeds.values() for values in own.values())


@pytest.mark.parametrize("batch_sizes, rounds", [([], 1), ([0], 1), ([1], 0)])
def test_measuring_nothing_is_refused(batch_sizes, rounds):
    with pytest.raises(ValueError, match="give numbers of 1 or more"):
        speed.measure({"a": print}, batch_sizes, rounds)


def test_operations_of_a_convolution_and_of_attention():
    layer, images = torch.nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 16, 16)
    assert speed.gigaflop(lambda: layer(images)) == pytest.approx(2 * 2 * 3 * 8 * 9 * 16**2 / 1e9)
    tokens = torch.zeros(1, 2, 4, 8)
    products = 2 * (2 * 2 * 4 * 4 * 8)  # two heads; queries by keys, then weights by values
    assert speed.gigaflop(lambda: F.scaled_dot_product_attention(tokens, tokens, tokens)) == pytest.approx(
        products / 1e9
    )


def test_the_table_compares_within_a_round():
    systems = [speed.System(name, "10", 5_500_000, 2_500_000, print) for name in ("ours", "other")]
    speeds = {"ours, 10 steps": {1: [4.0, 8.0, 6.0]}, "other, 10 steps": {1: [1.0, 4.0, 2.0]}}
    work = dict.fromkeys(speeds, 10.0)
    row = speed.speed_table(systems, work, speeds, peak=100.0).splitlines()[-1]
    assert row == "| other | 10 | 5.5 + 2.5 | 10 | 2 (1 to 4) | 3.00 | 20 |"
    alone = speed.speed_table(systems[1:], work, {"other, 10 steps": speeds["other, 10 steps"]}, peak=100.0)
    assert alone.splitlines()[-1] == "| other | 10 | 5.5 + 2.5 | 10 | 2 (1 to 4) | – | 20 |"


def test_every_system_has_its_row(tmp_path, tiny_pipeline_folder, tiny_sizes, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.inferers", None)
    words = ["--batch_sizes", "1", "2", "--rounds", "1", f"--output={tmp_path}"]
    speed.main(words, checkpoint=tiny_pipeline_folder)
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert f"{torch.get_num_threads()} threads" in text
    assert "monai_f8 is left out" in text and "monai_f4 is left out" in text
    systems, operators = (block.splitlines() for block in text.split("\n\n") if block.startswith("|"))
    assert [tuple(line[2:].split(" | ")[:2]) for line in systems[2:]] == ROWS
    assert {line.count(" | ") for line in systems[2:]} == {systems[0].count(" | ")}
    assert len(operators) == 2 + 8 and "batch 2" in operators[0]
    figures = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [(row["name"], row["steps"]) for row in figures["systems"]] == ROWS
    for row in figures["systems"]:
        assert set(row["subjects_per_second"]) == {"1", "2"} and row["gigaflop_per_subject"] > 0
    ours, full_grid, few, many = (row["gigaflop_per_subject"] for row in figures["systems"])
    assert ours < full_grid and few < many


@pytest.mark.parametrize("name", ["ours", "ours_full_grid", "diffusers_f8", "monai_f8", "monai_f4"])
def test_a_system_draws_every_sequence(name, tiny_pipeline_folder):
    if name.startswith("monai"):
        pytest.importorskip("monai")
        pytest.importorskip("einops")
    for system in speed.BUILDERS[name](tiny_pipeline_folder):
        images = system.sample(2)
        assert images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1


def test_without_any_system_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "monai.inferers", None)
    with pytest.raises(SystemExit):
        speed.main(["--systems", "monai_f4", f"--output={tmp_path}"])
    assert 'pip install -e ".[bench]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
