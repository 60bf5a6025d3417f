"""Made-up subjects, and a cache of their own for what `datasets` reads."""

from collections.abc import Iterator

import datasets
import numpy as np
import pytest
import torch

from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches out of the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def output() -> DLDMPipelineOutput:
    """Two heads of 64x64 in T1, FLAIR and WB, darker to the back and to one side, with a tumour at the front left."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    head = (x / 0.75) ** 2 + (y / 0.9) ** 2 < 1
    masks = np.repeat(((x + 0.35) ** 2 + (y + 0.4) ** 2 < 0.02)[None], 2, axis=0)
    tissue = 0.5 - 0.15 * y - 0.1 * x + 0.05 * rng.random((2, 3, 64, 64))
    return DLDMPipelineOutput(
        images=(np.where(masks[:, None], 0.9, tissue) * head).astype(np.float32),
        masks=masks,
        structure=torch.zeros(2, 4, 8, 8),
        styles=torch.zeros(2, 3, 3),
        modalities=["T1", "FLAIR", "WB"],
    )
