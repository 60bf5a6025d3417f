import json

import numpy as np
import pytest
import torch

from dldm_pipeline.metrics.cache import Cache, digest, fingerprint


def test_digest_is_of_content():
    array = np.arange(6, dtype=np.int16)
    assert digest(array, [1, "a"]) == digest(array.copy(), [1, "a"])
    others = (digest(array.reshape(2, 3), [1, "a"]), digest(array.astype(int), [1, "a"]), digest(array, [1, "b"]))
    assert digest(array, [1, "a"]) not in others


def test_fingerprint_changes_with_weights_and_configuration(tiny_pipeline):
    unet, scheduler = tiny_pipeline.unet, tiny_pipeline.scheduler
    before = fingerprint(unet), fingerprint(scheduler)
    assert before == (fingerprint(unet), fingerprint(scheduler))
    with torch.no_grad():
        next(unet.parameters()).data[0] += 1
    assert fingerprint(unet) != before[0]
    assert fingerprint(type(scheduler).from_config(scheduler.config, beta_end=0.5)) != before[1]


def test_figures_are_kept_by_their_inputs(tmp_path):
    cache, calls = Cache(tmp_path / "cache"), []

    def compute() -> dict:
        calls.append(1)
        return {"value": float("nan"), "list": [1, 2.5]}

    first = cache.figures("name", [np.zeros(3), {"a": 1}], compute)
    again = cache.figures("name", [np.zeros(3), {"a": 1}], compute)
    assert len(calls) == 1 and json.dumps(first) == json.dumps(again) and np.isnan(again["value"])
    cache.figures("name", [np.ones(3), {"a": 1}], compute)
    cache.figures("name", [np.zeros(3), {"a": 2}], compute)
    cache.code = "other"  # as after a change of the package
    cache.figures("name", [np.zeros(3), {"a": 1}], compute)
    assert len(calls) == 4 and len(list(cache.folder.iterdir())) == 4
    with pytest.raises(ZeroDivisionError):
        cache.figures("fails", [], lambda: 1 / 0)
    assert len(list(cache.folder.iterdir())) == 4
