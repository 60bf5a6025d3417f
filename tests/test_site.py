"""The documents as a site, by README's command and without a warning; it executes the tutorial."""

import os
import re
import subprocess
import sys
from pathlib import Path

import dldm_pipeline

ROOT = Path(__file__).parents[1]


def test_site(tmp_path: Path) -> None:
    command = re.search(r"sphinx-build [^`\n]+", (ROOT / "README.md").read_text(encoding="utf-8"))[0]
    words = command.replace("outputs/docs", str(tmp_path / "site")).split()
    words[0] = str(Path(sys.executable).with_name(words[0]))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in dldm_pipeline.__all__:
        module = getattr(getattr(dldm_pipeline, name), "__module__", None)
        if module and module.startswith("dldm_pipeline"):
            assert f'id="{module}.{name}"' in api
    tutorial = (tmp_path / "site" / "tutorial.html").read_text(encoding="utf-8")
    assert tutorial.count('<img alt="_images') >= 4  # generated, other appearance, filled in, untaught
    assert {path.name for path in (tmp_path / "site" / "_images").iterdir()} >= {"generated.png", "translated.png"}
