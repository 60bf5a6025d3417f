"""Training scripts import their neighbours by name, as a script's folder allows; here the folders are named.

Each script runs once on a tiny data set, and the tests of its results share that run.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.slices import write_slices

TRAINING = Path(__file__).parents[2] / "training"
sys.path[:0] = [str(TRAINING), str(TRAINING / "baselines")]

MODALITIES = ("T1", "T2", "FLAIR")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Fifteen subjects of 32x32 with a disc each, the fourth without T1, the fifth without a mask."""
    folder = tmp_path_factory.mktemp("training") / "data"
    random = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]

    def row(i):
        disc = np.hypot(y - 16, x - 16) < random.uniform(6, 12)
        images = {name: (disc * random.uniform(0.3, 0.9, (32, 32))).astype(np.float32) for name in MODALITIES}
        if i == 3:
            images["T1"] = None
        mask = None if i == 4 else ((np.hypot(y - 12, x - 16) < 4) & disc).astype(np.uint8)
        return {"subject": f"s{i}", "slice_index": i, "mask": mask} | images

    write_slices((row(i) for i in range(15)), folder, MODALITIES)
    return folder


@pytest.fixture(scope="session")
def words(data, tmp_path_factory):
    """Words of a command line: a tiny preset, the data set, an output folder, and more."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda preset, output, *more: [
        f"--config={preset}_tiny", f"--dataset={data}", f"--cache_dir={cache}", f"--output_dir={output}", *map(str, more)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def autoencoder_run(words, tmp_path_factory) -> Path:
    """Output of a run of train_autoencoder.py."""
    import train_autoencoder

    output = tmp_path_factory.mktemp("autoencoder")
    train_autoencoder.main(words("autoencoder", output))
    return output


@pytest.fixture(scope="session")
def ldm_run(words, autoencoder_run, tmp_path_factory) -> Path:
    """Output of a run of train_ldm.py on that autoencoder."""
    import train_ldm

    output = tmp_path_factory.mktemp("ldm")
    more = ("--validation_steps=2", "--checkpointing_steps=2")
    train_ldm.main(words("ldm", output, f"--autoencoder={autoencoder_run}", *more))
    return output


@pytest.fixture(scope="session")
def extractor():
    """Features for KID in no time: a small picture."""

    def features(images):
        assert images.dtype == np.uint8
        return F.adaptive_avg_pool2d(torch.from_numpy(images)[:, None] / 255, 4).flatten(1).numpy()

    return features


@pytest.fixture
def refused(capsys):
    """Run a script's `main` and return the one line that it refuses its arguments with."""

    def run(main, arguments, *more):
        with pytest.raises(SystemExit) as caught, exit_on_user_error():
            main(arguments, *more)
        output = capsys.readouterr().err
        assert caught.value.code == 2
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in output
        return lines[0]

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
