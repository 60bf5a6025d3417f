"""What the scripts share: errors in one line, and where a pipeline comes from."""

import runpy
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dldm_pipeline import BUNDLED_CHECKPOINT
from dldm_pipeline.cli import exit_on_user_error, find_pipeline
from dldm_pipeline.hub import push_folder

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, OSError, ImportError, SafetensorError])
def test_bad_input_is_one_line(kind, capsys, monkeypatch):
    monkeypatch.delenv("DLDM_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise kind("the value 3\n  is too large")
    assert stop.value.code == 2 and capsys.readouterr().err == "error: the value 3 is too large\n"
    monkeypatch.setenv("DLDM_DEBUG", "1")
    with pytest.raises(kind), exit_on_user_error():
        raise kind("the value 3")


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        raise ZeroDivisionError


def test_pipelines_are_bundled_or_folders_or_come_from_the_hub(hub, tiny_pipeline, tmp_path):
    assert find_pipeline(None) == BUNDLED_CHECKPOINT
    tiny_pipeline.save_pretrained(tmp_path / "mine")
    assert find_pipeline(str(tmp_path / "mine")) == tmp_path / "mine"
    push_folder(tmp_path / "mine", "tester/brains")
    index = (find_pipeline("tester/brains") / "model_index.json").read_bytes()
    assert index == (tmp_path / "mine" / "model_index.json").read_bytes()
    for name in ("nowhere", "./no/where", "/nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="nowhere|no/where|a/b/c.*: no such folder; give one that"):
            find_pipeline(name)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_help_says_how_it_is_called(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example.name, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(example), run_name="__main__")
    assert f"python examples/{example.name}" in capsys.readouterr().out
