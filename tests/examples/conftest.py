"""What the tests of the examples share: the script itself, its errors, and a saved pipeline."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def script(request) -> ModuleType:
    """The example that the test file is about, as a module."""
    name = request.path.stem.removeprefix("test_")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refused(script, capsys) -> Callable[..., str]:
    """Run the script with words that it refuses, and return the one line that it says."""

    def run(*words: str | Path) -> str:
        with pytest.raises(SystemExit) as stop:
            script.main([str(word) for word in words])
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert stop.value.code == 2
        return line

    return run


@pytest.fixture
def pipeline_folder(tiny_pipeline_folder, tmp_path) -> Path:
    """A copy, which a test may change."""
    return shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline")
