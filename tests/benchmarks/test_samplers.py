import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "samplers.py"
spec = importlib.util.spec_from_file_location("samplers", SCRIPT)
samplers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(samplers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, under NumPy 2
def test_every_solver_draws_styles_for_the_structures_of_the_subjects(tiny_pipeline_folder, capsys):
    words = ["--styles_only", f"--pipeline={tiny_pipeline_folder}", "--num_subjects=12", "--style_steps", "2", "3"]
    samplers.main(words)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [row[0].strip() for row in rows]
    assert names[:3] == ["styles", "half of the held-out", "joint Gaussian"]
    assert names[3:] == [f"{solver}, {steps} steps" for solver in samplers.SOLVERS for steps in (2, 3)]
    spread = {name: float(row[2]) for name, row in zip(names[1:], rows[1:], strict=True)}
    assert 0.5 < spread["joint Gaussian"] < 1.5
    assert len(set(spread.values())) > 4  # no solver and no number of steps is another one's
