"""What `import dldm_pipeline` needs: few libraries, and of the package what is uploaded as remote code."""

import ast
import sys
from pathlib import Path

import dldm_pipeline
from dldm_pipeline.pipeline_utils import AUTOENCODER_MODULE, PIPELINE_MODULES

LIBRARIES = {"torch", "diffusers", "huggingface_hub", "numpy", "PIL", *sys.stdlib_module_names}
REMOTE_MODULES = {AUTOENCODER_MODULE, "pipeline_utils", *PIPELINE_MODULES.values()}


def imports(name: str) -> set[str]:
    """What a module of the package imports, anywhere in its file: libraries, and ".name" for modules of the package."""
    found, source = set(), Path(dldm_pipeline.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = node.level or node.module.startswith("dldm_pipeline")
            found.add(f".{node.module.removeprefix('dldm_pipeline.')}" if own else node.module.split(".")[0])
            # Where the package is not installed, a file finds its siblings by relative imports alone.
            assert name == "__init__" or not own or node.level == 1, f"{name} imports {node.module}"
    return found


def test_the_package_loads_few_libraries_and_no_other_modules_of_its_own():
    loaded, to_read = set(), {"__init__"}
    while to_read:
        name = to_read.pop()
        loaded.add(name)
        found = imports(name)
        libraries = {module for module in found if not module.startswith(".")}
        assert libraries <= LIBRARIES, f"{name} imports {libraries - LIBRARIES}"
        to_read |= {module[1:] for module in found - libraries} - loaded
    assert loaded == {"__init__", "modalities", *REMOTE_MODULES}
