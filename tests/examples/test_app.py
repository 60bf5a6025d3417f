"""examples/app.py: its functions, and its page, served by the script itself and clicked in headless Chromium."""

import contextlib
import gzip
import io
import json
import shutil
import socket
import threading
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
from dldm_pipeline.data.scans import Scan
from dldm_pipeline.data.volumes import read_scan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder) -> DLDMPipeline:
    pipeline = DLDMPipeline.from_pretrained(tiny_pipeline_folder)
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
    for whole in ("T1.png", "t1.nii.gz"):
        (folder / f"cut-{whole}").write_bytes((folder / whole).read_bytes()[:500])
    (folder / "text.nii").write_text("no image" * 100)
    vast = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    vast.header.set_data_shape((4096, 4096, 4096))
    (folder / "vast.nii.gz").write_bytes(gzip.compress(vast.header.binaryblock + bytes(4)))
    with (folder / "huge.png").open("wb") as file:
        file.truncate(65 * 2**20)  # over MAX_FILE_SIZE
    return folder


# -- what the buttons do


def test_a_subject_depends_on_its_seed_only(script, pipeline):
    result = script.generate(pipeline, 2, 5, 3)
    for k, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        expected = pipeline(num_inference_steps=3, generator=generator, output_type="np")
        np.testing.assert_allclose(result.output.images[k], expected.images[0], atol=1e-4)
    assert result.names == ["seed 5", "seed 6"] and [each["seed"] for each in result.settings] == [5, 6]


def test_keeps_anatomy_or_appearance(script, pipeline):
    before = script.generate(pipeline, 3, 0, 3)
    same_anatomy = script.generate(pipeline, 3, 0, 3, script.KEEP_ANATOMY, before, 1)
    assert (same_anatomy.output.masks == before.output.masks[1]).all()
    own = before.output.images[1]  # its own anatomy and appearance
    np.testing.assert_allclose(same_anatomy.output.images[1], own, atol=1e-4)
    assert np.abs(same_anatomy.output.images[0] - own).mean() > 1e-3
    assert same_anatomy.names == ["appearance 0", "appearance 1", "appearance 2"]
    assert same_anatomy.settings[0]["kept_from"] == "seed 1"

    same_appearance = script.generate(pipeline, 2, 7, 3, script.KEEP_APPEARANCE, before, 2)
    assert (same_appearance.output.styles == before.output.styles[2]).all()
    assert torch.equal(same_appearance.output.structure, script.generate(pipeline, 2, 7, 3).output.structure)


def test_blends_on_the_sphere(script, pipeline):
    result = script.blend(pipeline, 3, 8, 3)
    ends = [script.generate(pipeline, 1, seed, 10).output for seed in (3, 8)]
    np.testing.assert_allclose(result.output.images[0], ends[0].images[0], atol=1e-4)
    torch.testing.assert_close(result.output.structure[2], ends[1].structure[0])
    torch.testing.assert_close(result.output.styles[2], ends[0].styles[0])
    assert result.names == ["blend 0.00", "blend 0.50", "blend 1.00"]
    assert result.settings[1] == {"seed": 3, "second_seed": 8, "fraction_of_second": 0.5}

    structures = pipeline.autoencoder.normalize_structure(result.output.structure)
    lengths = structures.flatten(1).norm(dim=1)
    assert structures[[0, 2]].mean(dim=0).norm() < lengths.min() and lengths[1] > 0.95 * lengths[[0, 2]].min()
    alike = script.blend_structures(pipeline, ends[0].structure.expand(2, -1, -1, -1), 3)
    torch.testing.assert_close(alike, ends[0].structure.expand(3, -1, -1, -1))


def test_fills_in_from_images_and_volumes(script, pipeline, uploads):
    translation, config = DLDMTranslationPipeline.from_pipe(pipeline), pipeline.autoencoder.config
    files = {"T1": uploads / "t1.nii.gz", "T2": uploads / "t2.nii.gz"}
    result = script.fill_in(translation, {name: str(path) for name, path in files.items()}, 4, 100)
    rows, _ = read_scan(Scan("", "", files), ["T1", "T2", "WB"], 32)
    top = {name: rows[-1][name] for name in files}
    expected = translation(top, generator=torch.Generator().manual_seed(4), output_type="np")
    assert np.array_equal(result.output.images, expected.images) and result.output.modalities == ["WB"]
    assert result.settings[0]["slice_index"] == 2 and "from other images" in result.notice

    # The lowest slice is the brightest: the window of the volume is almost the window of that slice as an image.
    bottom = script.read_slice(files, config, 0)["T1"]
    for name in ("T1.png", "T1.jpg"):
        image = script.read_slice({"T1": uploads / name}, config, 50)["T1"]
        inside = (slice(9, 23),) * 2  # at the edge, resizing mixes in the background, which has no window
        assert np.corrcoef(image[inside].ravel(), bottom[inside].ravel())[0, 1] > 0.99

    # An uploaded anatomy is still a patient's in another appearance, and only WB has styles.
    assert script.generate(pipeline, 2, 0, 2, script.KEEP_ANATOMY, result).notice == result.notice
    assert script.generate(pipeline, 2, 0, 2, script.KEEP_APPEARANCE, result).output.modalities == ["WB"]
    width, height = script.make_sheet(result, True).size
    assert 4 * 128 < width < 6 * 128 and 128 < height < 2 * 128  # T1 and T2 given, WB, tumour


def test_a_bad_upload_is_one_message(script, pipeline, uploads):
    translation = DLDMTranslationPipeline.from_pipe(pipeline)
    for files, message in (
        ([], "Give at least one of T1, T2, WB, and leave out at least one"),
        (["T1.png"] * 3, "Give at least one of T1, T2, WB, and leave out at least one"),
        (["T1.png", "t2.nii.gz"], "either images or NIfTI volumes"),
        (["text.png"], "text.png cannot be read: it is damaged, or not what its name says"),
        (["T1.png", "cut-T1.png"], "cut-T1.png cannot be read"),
        (["vast.png"], "vast.png has 67,108,864 pixels; the limit is 33,554,432"),
        (["constant.png"], "T1 constant.nii is constant: every voxel is 7"),
        (["text.nii"], "text.nii cannot be read"),
        (["t1.nii.gz", "cut-t1.nii.gz"], "cut-t1.nii.gz cannot be read"),
        (["vast.nii.gz"], "vast.nii.gz has 68,719,476,736 pixels"),
    ):
        given = {name: str(uploads / file) for name, file in zip(("T1", "T2", "WB"), files, strict=False)}
        with pytest.raises(gr.Error) as stop:
            script.fill_in(translation, given, 0, 50)
        assert message in stop.value.message and str(uploads) not in stop.value.message


def test_packs_one_marked_subject(script, pipeline, tiny_pipeline_folder, refused):
    result = script.generate(pipeline, 3, 4, 2)
    packages = script.pack(result, 1, tiny_pipeline_folder)
    path = Path(next(packages))
    with zipfile.ZipFile(path) as file:
        manifest = json.loads(file.read("manifest.json"))
        [subject] = manifest["subjects"]
        pixels = np.asarray(PIL.Image.open(io.BytesIO(file.read(subject["files"]["T2"]["png"]))))
        assert subject["files"]["mask"]["nifti"] in file.namelist()
    assert path.name == "synthetic-seed-5.zip" and manifest["synthetic"] is True and manifest["seed"] == 5
    assert np.array_equal(pixels, np.rint(result.output.images[1, 1] * 65535).astype(np.uint16))
    assert next(packages, None) is None and not path.parent.exists()
    assert "--pipeline nowhere: no such folder" in refused("--pipeline", "./nowhere")


# -- the page


@pytest.fixture
def url(script, tiny_pipeline_folder):
    """The address of the page, which the script serves in a thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--pipeline", str(tiny_pipeline_folder), "--port", str(port), "--device", "cpu"]
    thread = threading.Thread(target=script.main, args=(words,), daemon=True)
    thread.start()
    for _ in range(1200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        assert thread.is_alive()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    gr.close_all(verbose=False)
    thread.join()


@pytest.fixture
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
        self.page.goto(url)
        self.picture()

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

    def set(self, **values: int) -> None:
        for label, value in values.items():
            label = label.replace("_", " ")
            field = self.page.get_by_label(f"number input for {label}", exact=True).locator("visible=true")
            # A tab just opened is still drawing itself, and puts its first numbers back over one that came at once.
            for _ in range(20):
                field.fill(str(value))
                field.press("Enter")
                self.page.wait_for_timeout(300)
                if field.input_value() == str(value):
                    break
            assert field.input_value() == str(value), label

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def check(self, label: str) -> None:
        self.page.get_by_label(label).check()

    def upload(self, name: str, path: Path) -> None:
        label = self.page.get_by_test_id("block-label").filter(has_text=name)
        slot = self.page.locator(".block").filter(has=label).last
        slot.get_by_test_id("file-upload").set_input_files(path)
        if path.stat().st_size < 2**20:  # larger ones are refused
            slot.locator(".stem").wait_for()

    def message(self) -> str:
        """What the page complains of; it is then put away."""
        toast = self.page.locator(".toast-body.error").first
        text = toast.inner_text()
        toast.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")
        return text


def assert_shows(picture: np.ndarray, script, result, outline: bool = False) -> None:
    expected = np.asarray(script.make_sheet(result, outline), dtype=np.float32)
    assert picture.shape == expected.shape
    assert np.abs(picture - expected).mean() < 0.1  # two threads need not round alike


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (on Debian: apt-get install chromium)")
def test_visitors_try_every_button(script, pipeline, browser, url, uploads, tmp_path):
    visitor = Visitor(browser, url)
    assert "Synthetic. Research only, not for diagnosis." in visitor.page.inner_text("body")
    visitor.set(Subjects=2, Seed=11, Steps=4)
    visitor.press("Generate")
    result = script.generate(pipeline, 2, 11, 4)
    assert_shows(visitor.picture(), script, result)
    visitor.check("Outline the tumour in every image")
    assert_shows(visitor.picture(), script, result, outline=True)

    visitor.page.get_by_role("combobox", name="Chosen subject").click()
    visitor.page.get_by_role("option", name="seed 12").click()
    visitor.press("Pack the chosen subject")
    with visitor.page.expect_download() as download:
        visitor.page.locator("a[download]").first.click()
    assert download.value.suggested_filename == "synthetic-seed-12.zip"
    download.value.save_as(tmp_path / "subject.zip")
    with zipfile.ZipFile(tmp_path / "subject.zip") as file:
        assert json.loads(file.read("manifest.json"))["seed"] == 12

    visitor.check(script.KEEP_ANATOMY)
    visitor.set(Seed=20)
    visitor.press("Generate")
    same_anatomy = script.generate(pipeline, 2, 20, 4, script.KEEP_ANATOMY, result, 1)
    assert_shows(visitor.picture(), script, same_anatomy, outline=True)
    visitor.check(script.KEEP_APPEARANCE)
    visitor.press("Generate")
    same_appearance = script.generate(pipeline, 2, 20, 4, script.KEEP_APPEARANCE, same_anatomy, 0)
    assert_shows(visitor.picture(), script, same_appearance, outline=True)

    visitor.tab("Blend")
    visitor.set(Seed_of_the_second_anatomy=6, Anatomies_from_one_to_the_other=3)
    visitor.press("Blend")
    assert_shows(visitor.picture(), script, script.blend(pipeline, 0, 6, 3), outline=True)

    visitor.tab("Fill in")
    visitor.press("Fill in")
    assert "Give at least one of T1, T2, WB" in visitor.message()
    visitor.upload("T1", uploads / "T1.png")
    visitor.press("Fill in")
    translation = DLDMTranslationPipeline.from_pipe(pipeline)
    filled = script.fill_in(translation, {"T1": str(uploads / "T1.png")}, 0, 50)
    assert_shows(visitor.picture(), script, filled, outline=True)
    visitor.upload("T2", uploads / "cut-T1.png")
    visitor.press("Fill in")
    assert "cut-T1.png cannot be read" in visitor.message()
    visitor.upload("WB", uploads / "huge.png")
    assert "exceed the maximum allowed size of 64" in visitor.message()

    # A call outside the queue would run beside another.
    answer = visitor.page.request.post(f"{url}/gradio_api/run/on_generate", data={"data": []})
    assert not answer.ok and "join the queue" in answer.text()

    # Two at once: each gets their own, and what each has chosen is from their own.
    one, other = Visitor(browser, url), Visitor(browser, url)
    one.set(Subjects=4, Seed=100, Steps=90)  # so many steps that the second call comes during the first
    other.tab("Blend")
    other.set(Seed_of_the_second_anatomy=6)
    one.press("Generate")
    other.press("Blend")
    before = script.generate(pipeline, 4, 100, 90)
    assert_shows(one.picture(), script, before)
    assert_shows(other.picture(), script, script.blend(pipeline, 0, 6, 5))
    one.check(script.KEEP_ANATOMY)
    one.set(Steps=4)
    one.press("Generate")
    assert_shows(one.picture(), script, script.generate(pipeline, 4, 100, 4, script.KEEP_ANATOMY, before, 0))
