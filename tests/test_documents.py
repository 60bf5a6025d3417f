"""Every command and every Python block of README.md and docs/ runs, in the order in which a reader meets them.

They run as they are written, in a folder with the repository's folders and small real scans: `SCANS`, simulated subjects as
NIfTI files, and `SUBJECT_FOLDER`, one of them without its T2. `SMALLER` appends arguments, so that they end in seconds.
Scripts run in this process, which spares their imports; for `accelerate launch` itself see the tutorial. `.ci/run` does the
installing.
"""

import re
import runpy
import shlex
import shutil
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import datasets
import numpy as np
import pytest
from packaging.requirements import Requirement

from dldm_pipeline.data.export import export_subjects
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.metrics import diversity, fidelity
from dldm_pipeline.metrics.diversity import subject_pairs
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW_PAGES = ["evaluation.md"]  # three systems, which tests/training and tests/examples have as tiny ones, too
# A fenced block, or a command within a sentence.
CODE = re.compile(
    r"^```(bash|python)\n(.*?)^```|`((?:python|accelerate launch|pip|pytest|sphinx-build) [^`]+)`", re.M | re.S
)

FEW_STEPS = "--max_train_steps 2 --train_batch_size 2 --validation_steps 0"
TWO_STEPS = "--num_inference_steps 2"
SMALLER = {
    "training/prepare_dataset.py": "",
    "training/train_autoencoder.py": FEW_STEPS,
    "training/train_decoder.py": f"{FEW_STEPS} --generated_subjects 2",
    "training/train_ldm.py": FEW_STEPS,
    "training/baselines/train_stylegan2.py": f"{FEW_STEPS} --selection_subjects 0",
    "training/baselines/train_plain_ldm.py": f"{FEW_STEPS} --autoencoder_steps 2 --selection_subjects 0",
    "examples/generate.py": f"--num_subjects 1 {TWO_STEPS} --num_style_inference_steps 1",
    "examples/translate.py": TWO_STEPS,
    "examples/evaluate.py": f"--num_subjects 5 {TWO_STEPS} --num_style_inference_steps 1 --step_subjects 0 "
    "--segmenter_steps 0 --max_validation 4 --max_train 4",
    "benchmarks/noise.py": "--num_subjects 5",
    # Their arguments are parsed, and no more than that:
    "examples/app.py": "--help",  # serves until it is stopped: tests/examples/test_app.py starts it
    "benchmarks/paper_preset.py": "--help",  # a minute and 2 GiB
    "benchmarks/comparison.py": "--help",  # hours
    "benchmarks/simulation.py": "--help",  # minutes
    "benchmarks/ablation.py": "--help",  # hours
    "--pipeline outputs/comparison/dldm": "--help",  # of a pipeline that takes hours
    "--config autoencoder_paper": "--help",  # as the benchmark of the paper's preset
    "--config ldm_paper": "--help",
    "--output_dir outputs/autoencoder-few": "--help",  # README's first model, too, starts from the bundled one
    "--output_dir outputs/few": "--help",
    "evaluate.py --pipeline outputs/mine-sharp": "--help",  # README evaluates its first model
}
ELSEWHERE = {
    "pytest": "this is it, and .ci/run starts it",
    "pytest -m slow": "minutes; by hand, see CONTRIBUTING.md",
    "sphinx-build -W docs outputs/docs": "tests/test_site.py",
}


def commands(page: Path) -> list[tuple[str, str]]:
    """("bash" or "python", code) of a page in order; of bash one command each, comments left out."""
    found = []
    for language, block, inline in CODE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            found.append((language, block))
            continue
        # A line's end within a sentence's command is a space.
        for line in (block.replace("\\\n", " ") or inline.replace("\n", " ")).splitlines():
            words = shlex.split(line, comments=True)
            found += [("bash", command) for command in shlex.join(words).split(" '&&' ") if command]
    return found


def check_install(command: str) -> None:
    """What `pip install -e .` or `pip install -e ".[extra]"` would bring is there."""
    extra = re.fullmatch(r"pip install -e (?:\.|'\.\[(\w+)\]')", command)[1]
    ours = distribution("dldm_pipeline")
    assert extra is None or extra in ours.metadata.get_all("Provides-Extra")
    for requirement in map(Requirement, ours.requires):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""}):
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), str(requirement)


def run_script(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python SCRIPT ...` or `accelerate launch SCRIPT ...`, made small, in this process."""
    script, *arguments = shlex.split(re.sub(r"^(python|accelerate launch) ", "", command))
    assert script in SMALLER, f"{command}: say in SMALLER how it ends in seconds"
    smaller = next(SMALLER[key] for key in reversed(SMALLER) if key in command)  # the narrower ones stand last
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments, *shlex.split(smaller)])
        patch.syspath_prepend(str(Path(script).parent))
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, command
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option in ("--output", "--output_dir") and smaller != "--help":
            assert any(Path(value).iterdir()), command


@pytest.fixture(scope="module")
def small_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SCANS, twenty subjects of one slice, and SUBJECT_FOLDER, one of them without its T2."""
    folder = tmp_path_factory.mktemp("scans")
    subjects = [simulate_subject((1, i)) for i in range(20)]
    images, masks = (np.stack([getattr(subject, name) for subject in subjects]) for name in ("images", "mask"))
    output = DLDMPipelineOutput(images, masks > 0, None, None, list(subjects[0].modalities))
    export_subjects(output, folder / "SCANS")
    shutil.copytree(folder / "SCANS" / "synthetic-0000", folder / "SUBJECT_FOLDER")
    (folder / "SUBJECT_FOLDER" / "synthetic-0000_t2.nii.gz").unlink()
    return folder


@pytest.fixture
def reader(small_scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of someone who has this repository and scans."""
    for source in ("benchmarks", "dldm_pipeline", "docs", "examples", "training"):
        (tmp_path / source).symlink_to(ROOT / source)
    for source in ("SCANS", "SUBJECT_FOLDER"):
        (tmp_path / source).symlink_to(small_scans / source)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for module in (diversity, fidelity):  # a thousand pairs of five subjects would take most of the time
        monkeypatch.setattr(module, "subject_pairs", lambda subjects, num, seed=0: subject_pairs(subjects, 20, seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def param(page: Path):
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW_PAGES else [])


@pytest.mark.parametrize("page", [param(page) for page in PAGES if commands(page)])
def test_page(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict = {}
    for language, code in commands(page):
        print(f"+ {code}")
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif code.startswith("pip "):
            check_install(code)
        elif code not in ELSEWHERE:
            run_script(code, monkeypatch)


def test_the_tree_names_every_module() -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.M | re.S)
    tree = next(text for language, text in blocks if not language and text.startswith("dldm_pipeline/"))
    words = set(re.findall(r"[a-z_0-9]+", tree))
    folders = ("dldm_pipeline", "dldm_pipeline/data", "dldm_pipeline/metrics", "training", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    assert len(files) > 30 and not {path.stem for path in files} - words
    assert not {word for word in re.findall(r"\b(\w+)\.py", tree)} - {path.stem for path in files}
