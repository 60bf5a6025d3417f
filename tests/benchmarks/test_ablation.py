import importlib.util
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from dldm_pipeline import DisentangledAutoencoder
from dldm_pipeline.data.simulated_slices import simulated_dataset

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"
spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)
FEW = ["--config=autoencoder_tiny", "--max_train_steps=3", "--target_modalities=2"]


def test_every_row_changes_the_training(tmp_path):
    data = simulated_dataset(20, 32, acquisitions=2, root=tmp_path, num_workers=1, show_progress=False)
    weights = {}
    for row in ablation.ROWS:
        if row == "perceptual":  # another network, and a minute
            continue
        more, replacements = ablation.changes(row, str(data), ["T1", "T2", "FLAIR", "WB", "BB"])
        with ExitStack() as stack:
            for change in replacements:
                stack.enter_context(ablation.replaced(*change))
            words = [*FEW, *more, f"--dataset={data}", f"--output_dir={tmp_path / row}"]
            ablation.training.main(words)
        model = DisentangledAutoencoder.from_pretrained(tmp_path / row)
        assert bool(model.encoder_linear.weight.any()) == (row != "no linear maps")
        weights[row] = model.head_in.weight
    plain = weights.pop("as it is")
    assert not [row for row, weight in weights.items() if torch.equal(weight, plain)]


@pytest.mark.slow
def test_a_finished_row_is_not_trained_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*FEW, "--rows", "as it is", "no mse", "--subjects", "40", "--probes", "30", "15"]
    ablation.main(words)
    table = (tmp_path / "outputs" / "ablation" / "ablation.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| as it is", "| no mse"]
    figures = json.loads((tmp_path / "outputs/ablation/as_it_is/figures.json").read_text())
    assert set(figures) == set(ablation.COLUMNS.values())
    monkeypatch.setattr(ablation.training, "main", None)
    ablation.main(words)
    assert (tmp_path / "outputs" / "ablation" / "ablation.md").read_text() == table


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        ablation.main(["--rows", "mixing"])
    assert "invalid choice: 'mixing'" in capsys.readouterr().err
