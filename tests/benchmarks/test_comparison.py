import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "comparison.py"
spec = importlib.util.spec_from_file_location("comparison", SCRIPT)
comparison = importlib.util.module_from_spec(spec)
spec.loader.exec_module(comparison)


def test_every_system_gets_the_same_minutes():
    for name, commands in comparison.trainings(Path("out"), 50).items():
        minutes = [float(w.split("=")[1]) for words in commands.values() for w in words if "max_train_minutes" in w]
        assert len(minutes) == len(commands) and sum(minutes) == pytest.approx(50), name


@pytest.mark.slow
def test_a_training_is_run_noted_and_not_run_again(tmp_path, capfd):
    words = ["--systems=StyleGAN2", "--minutes=0.02", "--num_threads=1", "--phantom_subjects=30"]
    words += [f"--output_dir={tmp_path}"]
    comparison.main(words)
    assert (tmp_path / "stylegan2" / "diffusion_pytorch_model.safetensors").is_file()
    minutes = json.loads((tmp_path / "minutes.json").read_text())
    assert minutes["stylegan2"]["processor"] > 0
    assert not (tmp_path / "evaluation").exists()  # there is no DLDM to compare with

    capfd.readouterr()
    comparison.main(words)
    assert "done before" in capfd.readouterr().out and json.loads((tmp_path / "minutes.json").read_text()) == minutes
