"""The baselines' scripts import their neighbours by name, as a script's folder allows; tests must name the folder."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dldm_pipeline.data.slices import write_slices

sys.path.insert(0, str(Path(__file__).parents[3] / "training" / "baselines"))

MODALITIES = ("T1", "T2", "FLAIR")


@pytest.fixture(scope="session")
def baseline_data(tmp_path_factory):
    """A data set of 15 subjects at 32x32, the fourth without T1, the fifth without a mask."""
    root = tmp_path_factory.mktemp("baselines")
    random = np.random.default_rng(0)

    def row(i):
        images = {name: random.random((32, 32)).astype(np.float32) for name in MODALITIES}
        mask = np.zeros((32, 32), np.uint8)
        mask[8:12, 8:12] = 1
        if i == 3:
            images["T1"] = None
        return {"subject": f"s{i}", "slice_index": i, "mask": None if i == 4 else mask} | images

    write_slices((row(i) for i in range(15)), root / "data", MODALITIES)
    return root / "data"


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
    from dldm_pipeline.cli import exit_on_user_error

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
