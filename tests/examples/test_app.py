"""examples/app.py, its functions and its page: a real server, clicked in headless Chromium.

`DLDM_SCREENSHOTS=docs pytest tests/examples/test_app.py` also draws the pictures of the documentation, with the pipeline in
the package.
"""

import gzip
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gradio as gr
import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from dldm_pipeline import DLDMPipeline, DLDMTranslationPipeline
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.scans import Scan
from dldm_pipeline.data.volumes import read_scan

SCRIPT = Path(__file__).parents[2] / "examples" / "app.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (on Debian: apt-get install chromium)")
SCREENSHOTS = os.environ.get("DLDM_SCREENSHOTS")


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app():
    return load(SCRIPT)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory) -> Path:
    conftest = load(Path(__file__).parents[1] / "conftest.py")  # its fixtures live for one test only
    folder = tmp_path_factory.mktemp("app") / "pipeline"
    conftest.make_pipeline(conftest.make_autoencoder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(pipeline_folder) -> DLDMPipeline:
    pipeline = DLDMPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Path:
    """A brain, brighter at the front, as 16-bit PNG, JPEG and NIfTI, beside files that nobody should send."""
    folder = tmp_path_factory.mktemp("uploads")
    y, x = np.mgrid[-1:1:96j, -1:1:80j]
    for name, slope in (("T1", 0.3), ("T2", -0.2)):
        image = np.where((x / 0.7) ** 2 + (y / 0.9) ** 2 < 1, 0.5 - slope * y + 0.1 * x, 0)
        grey = np.rint(image * 65535).astype(np.uint16)
        PIL.Image.fromarray(grey).save(folder / f"{name}.png")
        PIL.Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB").save(folder / f"{name}.jpg", quality=95)
        volume = np.stack([grey.T[::-1, ::-1] // part for part in (1, 2, 3)], axis=2)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / f"{name.lower()}.nii.gz")
    PIL.Image.new("L", (64, 64), 7).save(folder / "constant.png")
    PIL.Image.new("1", (8192, 8192)).save(folder / "vast.png")  # 8 kB
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    whole = (folder / "T1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    whole = (folder / "t1.nii.gz").read_bytes()
    third = len(whole) // 3
    (folder / "cut.nii.gz").write_bytes(whole[:third])
    (folder / "scrambled.nii.gz").write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
    (folder / "text.nii").write_text("no image" * 100)
    vast = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    vast.header.set_data_shape((4096, 4096, 4096))
    (folder / "vast.nii.gz").write_bytes(gzip.compress(vast.header.binaryblock + bytes(4)))
    with (folder / "huge.png").open("wb") as file:
        file.truncate(65 * 2**20)  # over MAX_FILE_SIZE
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What the buttons do
# ---------------------------------------------------------------------------------------------------------------------


def test_a_subject_depends_on_its_seed_only(app, pipeline):
    result = app.generate(pipeline, 2, 5, 3)
    for k, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        expected = pipeline(num_inference_steps=3, generator=generator, output_type="np")
        assert np.array_equal(result.output.images[k], expected.images[0])
    assert result.names == ["seed 5", "seed 6"] and [each["seed"] for each in result.settings] == [5, 6]


def test_keeps_anatomy_or_appearance(app, pipeline):
    before = app.generate(pipeline, 3, 0, 3)
    same_anatomy = app.generate(pipeline, 3, 0, 3, app.KEEP_ANATOMY, before, 1)
    assert (same_anatomy.output.masks == before.output.masks[1]).all()
    assert np.array_equal(same_anatomy.output.images[1], before.output.images[1])  # its own anatomy and appearance
    assert np.abs(same_anatomy.output.images[0] - before.output.images[1]).mean() > 1e-3
    assert same_anatomy.names == ["appearance 0", "appearance 1", "appearance 2"]
    assert same_anatomy.settings[0]["kept_from"] == "seed 1"

    same_appearance = app.generate(pipeline, 2, 7, 3, app.KEEP_APPEARANCE, before, 2)
    assert (same_appearance.output.styles == before.output.styles[2]).all()
    assert torch.equal(same_appearance.output.structure, app.generate(pipeline, 2, 7, 3).output.structure)


def test_blends_on_the_sphere(app, pipeline):
    result = app.blend(pipeline, 3, 8, 5)
    ends = [app.generate(pipeline, 1, seed, 10).output for seed in (3, 8)]
    np.testing.assert_allclose(result.output.images[0], ends[0].images[0], atol=1e-4)
    torch.testing.assert_close(result.output.structure[4], ends[1].structure[0])
    assert torch.equal(result.output.styles[4], ends[0].styles[0])
    assert result.names == ["blend 0.00", "blend 0.25", "blend 0.50", "blend 0.75", "blend 1.00"]

    lengths = pipeline.autoencoder.normalize_structure(result.output.structure).flatten(1).norm(dim=1)
    middle = pipeline.autoencoder.normalize_structure(result.output.structure[[0, 4]]).mean(dim=0).norm()
    assert middle < lengths.min() and lengths[2] > 0.95 * lengths[[0, 4]].min()
    alike = app.blend(pipeline, 3, 3, 3).output.structure
    torch.testing.assert_close(alike, ends[0].structure.expand(3, -1, -1, -1))


def test_fills_in_from_images_and_volumes(app, pipeline, uploads):
    translation = DLDMTranslationPipeline.from_pipe(pipeline)
    files = {"T1": str(uploads / "t1.nii.gz"), "T2": str(uploads / "t2.nii.gz")}
    result = app.fill_in(translation, files, 4, 100)
    rows, _ = read_scan(Scan("", "", {name: Path(path) for name, path in files.items()}), ["T1", "T2", "WB"], 32)
    top = {name: rows[-1][name] for name in files}
    expected = translation(top, generator=torch.Generator().manual_seed(4), output_type="np")
    assert np.array_equal(result.output.images, expected.images) and result.output.modalities == ["WB"]
    assert result.settings[0]["slice_index"] == 2 and "from other images" in result.notice

    bottom = app.fill_in(translation, files, 4, 0).given[
        "T1"
    ]  # its brightest slice, so in almost the window of one image
    for name in ("T1.png", "T1.jpg"):
        given = app.fill_in(translation, {"T1": str(uploads / name)}, 4, 50).given["T1"]
        inside = (slice(9, 23),) * 2  # at the edge, resizing mixes in the background, which has no window
        assert np.corrcoef(given[inside].ravel(), bottom[inside].ravel())[0, 1] > 0.99

    # An uploaded anatomy is still a patient's when it is seen in other appearances, and has those of T2 and WB only.
    result = app.fill_in(translation, {"T1": str(uploads / "T1.png")}, 4, 50)
    assert app.generate(pipeline, 2, 0, 2, app.KEEP_ANATOMY, result).notice == result.notice
    assert app.generate(pipeline, 2, 0, 2, app.KEEP_APPEARANCE, result).output.modalities == ["T2", "WB"]
    width, height = app.draw_sheet(result, True).size
    assert 4 * 128 < width < 6 * 128 and 128 < height < 2 * 128  # T1 given, T2, WB, tumour


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "Give at least one of T1, T2, WB, and leave out at least one"),
        (["T1.png"] * 3, "Give at least one of T1, T2, WB, and leave out at least one"),
        (["T1.png", "t2.nii.gz"], "either images or NIfTI volumes"),
        (["notes.txt"], "notes.txt: give a PNG, JPEG or NIfTI file"),
        (["text.png"], "text.png cannot be read, it is damaged or not what its name says"),
        (["T1.png", "cut.png"], "cut.png cannot be read"),
        (["vast.png"], "vast.png has 67,108,864 pixels; at most 33,554,432"),
        (["constant.png"], "T1 constant.nii is constant: every voxel is 7"),
        (["text.nii"], "text.nii cannot be read"),
        (["t1.nii.gz", "cut.nii.gz"], "cut.nii.gz cannot be read"),
        (["scrambled.nii.gz"], "scrambled.nii.gz cannot be read"),
        (["vast.nii.gz"], "vast.nii.gz has 68,719,476,736 pixels"),
    ],
)
def test_a_bad_upload_is_one_message(app, pipeline, uploads, files, message):
    translation = DLDMTranslationPipeline.from_pipe(pipeline)
    given = {name: str(uploads / file) for name, file in zip(("T1", "T2", "WB"), files, strict=False)}
    with pytest.raises(gr.Error) as stop:
        app.fill_in(translation, given, 0, 50)
    assert message in stop.value.message and str(uploads) not in stop.value.message


def test_packs_one_marked_subject(app, pipeline, pipeline_folder):
    result = app.generate(pipeline, 3, 4, 2)
    packages = app.pack(result, 1, pipeline_folder)
    path = Path(next(packages))
    with zipfile.ZipFile(path) as file:
        manifest = json.loads(file.read("manifest.json"))
        [subject] = manifest["subjects"]
        pixels = np.asarray(PIL.Image.open(io.BytesIO(file.read(subject["files"]["T2"]["png"]))))
        assert subject["files"]["mask"]["nifti"] in file.namelist()
    assert path.name == "synthetic-seed-5.zip" and manifest["synthetic"] is True and manifest["seed"] == 5
    assert np.array_equal(pixels, np.rint(result.output.images[1, 1] * 65535).astype(np.uint16))
    assert next(packages, None) is None and not path.parent.exists()


def test_bad_arguments_are_one_line(app, pipeline_folder, capsys):
    with pytest.raises(SystemExit):
        app.main(["--pipeline", "./nowhere"])
    assert "--pipeline nowhere: no such folder" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit):
            app.main(["--pipeline", str(pipeline_folder), "--device", "cpu", "--port", str(taken.getsockname()[1])])
    assert "error: Cannot find empty port" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        app.main(["--help"])
    assert "http://localhost:7860" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


class Server:
    """`python examples/app.py` in a process of its own."""

    def __init__(self, *words: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(SCRIPT), "--port", str(port), "--device", "cpu", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Running on local URL" in line:
                return
        raise RuntimeError("".join(lines))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def server(pipeline_folder):
    with Server("--pipeline", str(pipeline_folder)) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, as CI is, may not use Chromium's sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """One window of the page, with what one does there."""

    def __init__(self, browser, url: str):
        self.page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        self.page.set_default_timeout(180_000)  # continuous integration may be slow
        self.seen = ""
        started = time.perf_counter()
        self.page.goto(url)
        self.picture()
        print(f"\nfrom opening the page to the first picture: {time.perf_counter() - started:.1f} s")

    def picture(self) -> np.ndarray:
        """The next picture, which is not the one seen last: (H, W, 3)."""
        image = self.page.locator("img[src*='/file=']")
        self.page.wait_for_function(
            "seen => { const i = document.querySelector(\"img[src*='/file=']\"); return i && i.src !== seen && i.complete }",
            arg=self.seen,
        )
        self.seen = image.get_attribute("src")
        body = self.page.request.get(self.seen).body()
        return np.asarray(PIL.Image.open(io.BytesIO(body)).convert("RGB"), dtype=np.float32)

    def set(self, label: str, value: int) -> None:
        field = self.page.get_by_label(f"number input for {label}", exact=True).locator("visible=true")
        # A tab just opened is still drawing itself, and puts its first numbers back over one that came within milliseconds.
        for _ in range(20):
            field.fill(str(value))
            field.press("Enter")
            self.page.wait_for_timeout(300)
            if field.input_value() == str(value):
                return
        raise AssertionError(f"{label} shows {field.input_value()} after {value} was typed")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def choose(self, name: str) -> None:
        self.page.get_by_role("combobox", name="Chosen subject").click()
        self.page.get_by_role("option", name=name).click()

    def slot(self, name: str):
        label = self.page.get_by_test_id("block-label").filter(has_text=name)
        return self.page.locator(".block").filter(has=label).last

    def upload(self, name: str, path: Path) -> None:
        self.slot(name).get_by_test_id("file-upload").set_input_files(path)
        self.slot(name).locator(".stem").wait_for()

    def photograph(self, path: Path) -> None:
        """The whole page, when it no longer shows that it waits."""
        self.page.wait_for_timeout(1500)
        self.page.screenshot(path=path, full_page=True)

    def message(self) -> str:
        """What the page complains of; it is then put away."""
        toast = self.page.locator(".toast-body.error").first
        text = toast.inner_text()
        toast.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")
        return text


@pytest.fixture
def visitor(browser, server):
    visitor = Visitor(browser, server.url)
    yield visitor
    visitor.page.context.close()


def assert_shows(picture: np.ndarray, app, result, outline: bool = False) -> None:
    expected = np.asarray(app.draw_sheet(result, outline), dtype=np.float32)
    assert picture.shape == expected.shape
    assert np.abs(picture - expected).mean() < 0.1  # two processes need not round alike


@needs_chromium
def test_generate_keep_outline_and_download(app, pipeline, visitor, tmp_path):
    assert "Synthetic. Research only, not for diagnosis." in visitor.page.inner_text("body")
    visitor.set("Subjects", 2)
    visitor.set("Seed", 11)
    visitor.set("Steps", 4)
    visitor.press("Generate")
    result = app.generate(pipeline, 2, 11, 4)
    assert_shows(visitor.picture(), app, result)

    visitor.page.get_by_label("Outline the tumour in every image").check()
    assert_shows(visitor.picture(), app, result, outline=True)

    visitor.choose("seed 12")
    visitor.press("Pack the chosen subject")
    with visitor.page.expect_download() as download:
        visitor.page.locator("a[download]").first.click()
    assert download.value.suggested_filename == "synthetic-seed-12.zip"
    download.value.save_as(tmp_path / "subject.zip")
    with zipfile.ZipFile(tmp_path / "subject.zip") as file:
        assert json.loads(file.read("manifest.json"))["seed"] == 12

    visitor.page.get_by_label(app.KEEP_ANATOMY).check()
    visitor.set("Seed", 20)
    visitor.press("Generate")
    same_anatomy = app.generate(pipeline, 2, 20, 4, app.KEEP_ANATOMY, result, 1)
    assert_shows(visitor.picture(), app, same_anatomy, outline=True)

    visitor.page.get_by_label(app.KEEP_APPEARANCE).check()
    visitor.press("Generate")
    same_appearance = app.generate(pipeline, 2, 20, 4, app.KEEP_APPEARANCE, same_anatomy, 0)
    assert_shows(visitor.picture(), app, same_appearance, outline=True)


@needs_chromium
def test_blend(app, pipeline, visitor):
    visitor.tab("Blend")
    visitor.set("Seed of the second anatomy", 6)
    visitor.set("Anatomies from one to the other", 3)
    visitor.press("Blend")
    assert_shows(visitor.picture(), app, app.blend(pipeline, 0, 6, 3))


@needs_chromium
def test_bad_uploads_get_a_message_and_the_server_lives_on(app, pipeline, server, visitor, uploads):
    visitor.tab("Fill in")
    visitor.press("Fill in")
    assert "Give at least one of T1, T2, WB" in visitor.message()
    visitor.upload("T1", uploads / "cut.png")
    visitor.press("Fill in")
    assert "cut.png cannot be read" in visitor.message()
    visitor.slot("T2").get_by_test_id("file-upload").set_input_files(uploads / "huge.png")
    assert "exceed the maximum allowed size of 64" in visitor.message()

    visitor.page.reload()
    visitor.seen = ""
    visitor.picture()
    visitor.tab("Fill in")
    visitor.upload("T1", uploads / "T1.png")
    visitor.press("Fill in")
    translation = DLDMTranslationPipeline.from_pipe(pipeline)
    assert_shows(visitor.picture(), app, app.fill_in(translation, {"T1": str(uploads / "T1.png")}, 0, 50))
    assert server.process.poll() is None


@needs_chromium
def test_two_visitors_at_once_get_their_own(app, pipeline, browser, server, visitor):
    other = Visitor(browser, server.url)
    # So many steps that the second call starts during the first.
    settings = {visitor: (4, 100, 60), other: (3, 200, 90)}
    for each, (subjects, seed, steps) in settings.items():
        each.set("Subjects", subjects)
        each.set("Seed", seed)
        each.set("Steps", steps)
    for each in settings:
        each.press("Generate")
    for each, numbers in settings.items():
        assert_shows(each.picture(), app, app.generate(pipeline, *numbers))
    # And what each has chosen is from their own.
    visitor.page.get_by_label(app.KEEP_ANATOMY).check()
    visitor.press("Generate")
    before = app.generate(pipeline, *settings[visitor])
    assert_shows(visitor.picture(), app, app.generate(pipeline, *settings[visitor], app.KEEP_ANATOMY, before, 0))
    other.page.context.close()

    # A call that does not stand in the queue would run beside another.
    answer = visitor.page.request.post(f"{server.url}/gradio_api/run/on_generate", data={"data": []})
    assert not answer.ok and "join the queue" in answer.text()


@needs_chromium
@pytest.mark.skipif(SCREENSHOTS is None, reason="set DLDM_SCREENSHOTS=docs to draw the pictures of the documentation")
def test_screenshots(browser, tmp_path):
    folder = Path(SCREENSHOTS)
    simulated = simulate_subject(977_002, modalities=["T1", "FLAIR"]).images
    for name, image in zip(("T1", "FLAIR"), simulated, strict=True):
        PIL.Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    with Server() as server:
        visitor = Visitor(browser, server.url)
        visitor.page.get_by_label("Outline the tumour in every image").check()
        visitor.picture()
        visitor.photograph(folder / "app-generate.png")
        visitor.tab("Blend")
        visitor.press("Blend")
        visitor.picture()
        visitor.photograph(folder / "app-blend.png")
        visitor.tab("Fill in")
        for name in ("T1", "FLAIR"):
            visitor.upload(name, tmp_path / f"{name}.png")
        visitor.press("Fill in")
        visitor.picture()
        visitor.photograph(folder / "app-fill-in.png")
