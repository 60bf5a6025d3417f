import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from dldm_pipeline import DisentangledAutoencoder
from dldm_pipeline.data.slices import write_slices

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"
spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)


def write_discs(folder: Path, subjects: int) -> Path:
    """Subjects with a disc each, in two modalities."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    rows = []
    for i in range(subjects):
        disc = np.hypot(y - 16, x - 16) < random.uniform(6, 12)
        images = {name: (disc * random.uniform(0.3, 0.9)).astype(np.float32) for name in ("T1", "T2")}
        rows.append({"subject": f"s{i}", "slice_index": i, "mask": disc & (y < 12), **images})
    write_slices(rows, folder, ("T1", "T2"))
    return folder


def test_every_training_gets_a_row(tmp_path, capsys):
    data, output = write_discs(tmp_path / "data", 40), tmp_path / "out"
    ablation.main(
        [f"--dataset={data}", f"--output_dir={output}", "--config=autoencoder_tiny", "--max_train_steps=3"]
        + ["--target_modalities=1", "--off", "nothing", "mixing", "selection", "subsets"]
    )
    lines = (output / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| nothing", "| mixing", "| selection", "| subsets"]
    rows = np.array([[float(cell) for cell in line.strip("| ").split(" | ")[1:]] for line in lines[2:]])
    assert np.isfinite(rows).all() and rows.shape[1] == len(ablation.COLUMNS)
    names = ("nothing", "mixing", "selection", "subsets")
    plain, *others = (DisentangledAutoencoder.from_pretrained(output / name).head_in.weight for name in names)
    assert not any(torch.equal(plain, other) for other in others)  # the switch reached the training
    assert not list(output.glob("*.tmp")) and (output / "ablation.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--of", "mixing"], "--of"),
        (["--max_train_minutes=0"], "--max_train_minutes 0.0"),
        ([], "2 validation subjects"),
    ],
)
def test_bad_arguments_end_before_any_training(tmp_path, capsys, words, message):
    data = write_discs(tmp_path / "data", 10)
    with pytest.raises(SystemExit):
        ablation.main([f"--dataset={data}", f"--output_dir={tmp_path / 'out'}", "--config=autoencoder_tiny", *words])
    assert message in capsys.readouterr().err and not list(tmp_path.glob("out/*"))
