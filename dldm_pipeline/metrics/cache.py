"""Results on disk under a hash of all they depend on, so that a second run computes only what has changed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dldm_pipeline.data.files import write_text

from .features import hash_weights


def digest(*parts) -> str:
    """Hash of arrays, by content, and of whatever JSON can hold."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype} {part.shape}".encode())
            sha.update(np.ascontiguousarray(part).tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:32]


def hash_source(path: str | os.PathLike) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fingerprint(*models) -> str:
    """Hash of the weights, the configuration and the source file of models or schedulers."""
    parts = []
    for model in models:
        parts.append(hash_weights(model) if isinstance(model, torch.nn.Module) else None)
        parts.append({key: value for key, value in model.config.items() if not key.startswith("_")})
        parts.append(hash_source(inspect.getfile(type(model))))
    return digest(*parts)


class Cache:
    """A folder of results, made when the first one is kept. It can be deleted at any time."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        # Figures depend on the code that computes them.
        files = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "report.py")
        self.code = digest([hash_source(path) for path in files])

    def figures(self, name: str, inputs: Sequence, compute: Callable[[], dict]) -> dict:
        """What `compute` returns, a dict of plain numbers, or what it returned for these inputs before.

        Args:
            name: what the file's name begins with.
            inputs: all that the figures depend on, see [`digest`].
            compute: called if there is no such file.
        """
        path = self.folder / f"{name}-{digest(self.code, *inputs)}.json"
        if not path.is_file():
            write_text(path, json.dumps(compute()))
        return json.loads(path.read_text(encoding="utf-8"))
