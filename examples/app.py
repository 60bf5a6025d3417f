"""A web page to try a pipeline: generate, blend two anatomies, fill in missing sequences, download.

    pip install -e ".[demo]"
    python examples/app.py                                  # the bundled pipeline, on http://localhost:7860
    python examples/app.py --pipeline outputs/mine-sharp    # one that you trained, or one of the Hub

As a Space (SDK gradio): this file as app.py, the folder dldm_pipeline beside it, and a requirements.txt with the packages that
setup.py has under install_requires. All images are synthetic and not for diagnosis.
"""

import argparse
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import nibabel as nib
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from dldm_pipeline import DLDMPipeline, DLDMTranslationPipeline
from dldm_pipeline.cli import add_pipeline_arguments, exit_on_user_error, find_pipeline
from dldm_pipeline.data.export import FIELD_OF_VIEW, NOTICE, TRANSLATION_NOTICE, export_subjects
from dldm_pipeline.data.scans import Scan
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.volumes import read_scan
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

INTRODUCTION = """# Multi-modal brain-tumour MRI from a disentangled latent diffusion model
**Synthetic. Research only, not for diagnosis.** Every row is one subject; all its images share one anatomy."""
FILL_IN = """Give the sequences that you have, aligned: one slice each as PNG or JPEG (nose up), or one volume each as NIfTI.
Use a pipeline that was trained on images like these. Files are deleted from the server after about an hour."""

KEEP_NOTHING = "nothing"
KEEP_ANATOMY = "anatomy of the chosen subject"
KEEP_APPEARANCE = "appearance of the chosen subject"
MAX_SEED = 99_999
MAX_FILE_SIZE = "64mb"
MAX_VOXELS = 2**25  # two volumes of 256 x 256 x 256: a small compressed file can unpack to more than the memory
NIFTI, IMAGES = (".nii", ".nii.gz"), (".png", ".jpg", ".jpeg")


@dataclass
class Result:
    """The subjects that one visitor sees, and what their files will say about them."""

    output: DLDMPipelineOutput  # from a call with `output_type="np"`
    names: list[str]  # one per subject
    settings: list[dict[str, Any]]  # one per subject: the arguments of the call, with "seed"
    notice: str = NOTICE
    given: dict[str, np.ndarray] = field(default_factory=dict)  # uploaded images of the one subject, (H, W) in [0, 1]
    pixel_spacing: tuple[float, float] | None = None  # in mm, if it is known


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(
    pipeline: DLDMPipeline,
    num_subjects: int,
    seed: int,
    num_inference_steps: int,
    keep: str = KEEP_NOTHING,
    before: Result | None = None,
    chosen: int = 0,
) -> Result:
    """Subjects of the seeds `seed`, `seed + 1`, ...; with the anatomy or the appearance of subject `chosen` of `before`."""
    kept, name, notice = {}, "seed", NOTICE
    if keep == KEEP_ANATOMY:
        # An uploaded anatomy is a patient's in any appearance.
        kept, name, notice = {"structure": before.output.structure[chosen, None]}, "appearance", before.notice
    elif keep == KEEP_APPEARANCE:
        # After filling in, only the filled-in sequences have styles.
        kept, name = {"styles": before.output.styles[chosen, None], "modalities": before.output.modalities}, "anatomy"
    seeds, settings = range(seed, seed + num_subjects), {"num_inference_steps": num_inference_steps}
    generators = [seeded(each) for each in seeds]
    output = pipeline(num_subjects, generator=generators, output_type="np", **settings, **kept)
    settings["kept"] = keep
    if kept:
        settings["kept_from"] = before.names[chosen]
    return Result(output, [f"{name} {each}" for each in seeds], [{"seed": each, **settings} for each in seeds], notice)


def blend_structures(pipeline: DLDMPipeline, pair: torch.Tensor, count: int) -> torch.Tensor:
    """`count` structures from the first of a pair (2, c_s, h, w) to the second: (count, c_s, h, w), in the pair's scale.

    Spherical interpolation (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985) in the denoiser's scale,
    where each channel has mean 0 and variance 1 over the training subjects.
    """
    # There subjects lie near a sphere. Points on the straight line lie inside it and decode to flat, faded anatomy.
    first, second = pipeline.autoencoder.normalize_structure(pair)
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1)).clamp(min=1e-3)  # it is zero between a structure and itself
    fraction = torch.linspace(0, 1, count, device=pair.device)[:, None, None, None]
    blended = (torch.sin((1 - fraction) * angle) * first + torch.sin(fraction * angle) * second) / torch.sin(angle)
    return pipeline.autoencoder.denormalize_structure(blended)


def blend(pipeline: DLDMPipeline, seed: int, second_seed: int, num_subjects: int) -> Result:
    """From the anatomy of one seed to that of another, all in the appearance of the first."""
    ends = pipeline(num_subjects=2, generator=[seeded(seed), seeded(second_seed)], output_type="latent")
    output = pipeline(
        num_subjects=num_subjects,
        structure=blend_structures(pipeline, ends.structure, num_subjects),
        styles=ends.styles[:1],
        generator=[seeded(seed) for _ in range(num_subjects)],  # the same noise, so that only the anatomy changes
        output_type="np",
    )
    fractions = [k / (num_subjects - 1) for k in range(num_subjects)]
    settings = [{"seed": seed, "second_seed": second_seed, "fraction_of_second": fraction} for fraction in fractions]
    return Result(output, [f"blend {fraction:.2f}" for fraction in fractions], settings)


def fill_in(pipeline: DLDMTranslationPipeline, files: dict[str, str], seed: int, height: float) -> Result:
    """The sequences that are missing in `files`, paths by modality, of the slice at `height` per cent of the brain.

    Raises:
        gr.Error: on files that cannot be used; the page shows it.
    """
    config = pipeline.autoencoder.config
    if not 0 < len(files) < len(config.modalities):
        names = ", ".join(config.modalities)
        raise gr.Error(f"Give at least one of {names}, and leave out at least one, which will be filled in.")
    row = read_slice(files, config, height)
    given = {name: row[name] for name in files}
    output = pipeline(given, generator=seeded(seed), output_type="np")
    settings = {"seed": seed, "given": list(given), "slice_index": row["slice_index"]}
    return Result(output, [f"seed {seed}"], [settings], TRANSLATION_NOTICE, given, row["pixel_spacing"])


def read_slice(files: dict[str, str], config: Any, height: float) -> dict[str, Any]:
    """The row of `read_scan` at `height` per cent of those that show the brain; an image is a volume of one slice."""
    paths = {name: Path(file) for name, file in files.items()}
    if len({is_nifti(path) for path in paths.values()}) > 1:
        raise gr.Error("Give either images or NIfTI volumes: an image has no place in a volume.")
    with tempfile.TemporaryDirectory() as folder:
        volumes = {name: as_volume(path, Path(folder) / f"{name} {path.stem}.nii") for name, path in paths.items()}
        try:
            rows, notes = read_scan(Scan("upload", "upload", volumes), config.modalities, config.sample_size)
        except ValueError as error:
            raise gr.Error(f"{error}.") from error
    gr.Info(f"How the files were read: {'; '.join(notes)}.")
    return rows[round(height / 100 * (len(rows) - 1))]


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI)


def as_volume(path: Path, target: Path) -> Path:
    """The path of a NIfTI file: `path` itself if it is one; an image is written as a NIfTI file to `target`."""
    try:
        image = nib.load(path) if is_nifti(path) else PIL.Image.open(path, formats=["PNG", "JPEG"])  # the header only
        size = math.prod(image.shape if is_nifti(path) else image.size)
        if size <= MAX_VOXELS and not is_nifti(path):
            grey = np.asarray(image if image.mode.startswith("I") else image.convert("L"), dtype=np.float32)
    except Exception as error:  # on broken files the decoders raise anything: SyntaxError, zlib.error, HeaderDataError
        raise gr.Error(f"{path.name} cannot be read: it is damaged, or not what its name says.") from error
    if size > MAX_VOXELS:
        raise gr.Error(f"{path.name} has {size:,} pixels; the limit is {MAX_VOXELS:,}.")
    if is_nifti(path):
        return path
    # The layout of `export_subjects`. Images of different sizes are assumed to show the same field of view.
    volume, spacing = grey.T[::-1, ::-1, None], FIELD_OF_VIEW / max(grey.shape)
    affine = np.diag([spacing, spacing, 1, 1])
    affine[:2, 3] = [-(side - 1) / 2 * spacing for side in volume.shape[:2]]
    nib.save(nib.Nifti1Image(volume, affine), target)
    return target


def make_sheet(result: Result, outline: bool) -> PIL.Image.Image:
    """A row for each subject: given images, generated images, and the tumour's outline, in all images if `outline`."""
    images = [[*result.given.values(), *generated] for generated in result.output.images]
    columns = [f"{name} given" for name in result.given] + result.output.modalities
    rows = [f"synthetic {name}" for name in result.names]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        contact_sheet(images, result.output.masks, columns, rows, path, outline_all=outline)
        return PIL.Image.open(path).copy()


def pack(result: Result, chosen: int, checkpoint: Path) -> Iterator[str]:
    """Yield the path of a zip file of one subject, which exists until the iterator goes on."""
    arrays = {name: result.output[name][chosen, None] for name in ("images", "masks", "structure", "styles")}
    output = DLDMPipelineOutput(**arrays, modalities=result.output.modalities)
    settings = dict(result.settings[chosen])
    options = {"pixel_spacing": result.pixel_spacing, "notice": result.notice}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"synthetic {result.names[chosen]}".replace(" ", "-")
        export_subjects(output, folder, settings.pop("seed"), settings, checkpoint, **options)
        yield shutil.make_archive(str(folder), "zip", folder)  # Gradio copies the file before it goes on


def build_demo(pipeline: DLDMPipeline, checkpoint: Path) -> gr.Blocks:
    """The page, to be launched; `checkpoint` is the folder that `pipeline` was loaded from."""
    translation = DLDMTranslationPipeline.from_pipe(pipeline)
    known = list(pipeline.autoencoder.config.modalities)

    def whole_number(label: str, low: int, high: int, value: int) -> gr.Slider:
        return gr.Slider(low, high, value, step=1, precision=0, label=label)

    # Uploads may show patients: no analytics, no history, and the cache deletes files after an hour.
    with gr.Blocks(title="dldm_pipeline", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.Markdown(INTRODUCTION)
        result = gr.State()  # one for each visitor
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                with gr.Tab("Generate"):
                    num_subjects = whole_number("Subjects", 1, 8, 3)
                    seed = whole_number("Seed", 0, MAX_SEED, 0)
                    steps = whole_number("Steps", 1, 100, 10)
                    keep = gr.Radio([KEEP_NOTHING, KEEP_ANATOMY, KEEP_APPEARANCE], value=KEEP_NOTHING, label="Keep")
                    generate_button = gr.Button("Generate", variant="primary")
                with gr.Tab("Blend"):
                    first_seed = whole_number("Seed of the first anatomy", 0, MAX_SEED, 0)
                    second_seed = whole_number("Seed of the second anatomy", 0, MAX_SEED, 1)
                    num_blends = whole_number("Anatomies from one to the other", 3, 9, 5)
                    blend_button = gr.Button("Blend", variant="primary")
                with gr.Tab("Fill in"):
                    gr.Markdown(FILL_IN)
                    uploads = [gr.File(label=name, height=140, file_types=[*IMAGES, *NIFTI]) for name in known]
                    height = gr.Slider(0, 100, 50, label="Slice of a volume, per cent of the way up")
                    fill_in_seed = whole_number("Seed", 0, MAX_SEED, 0)
                    fill_in_button = gr.Button("Fill in", variant="primary")
            with gr.Column(scale=3):
                sheet = gr.Image(format="png", interactive=False, show_label=False, buttons=["fullscreen"])
                with gr.Row():
                    outline = gr.Checkbox(label="Outline the tumour in every image")
                    chosen = gr.Dropdown(
                        [], type="index", label="Chosen subject (to keep or to pack)", interactive=True
                    )
                    pack_button = gr.Button("Pack the chosen subject")
                package = gr.File(label="PNG and NIfTI files", height=100, interactive=False)

        def existing(result: Result | None) -> Result:
            if result is None:  # the first sheet is not there yet, or the server was restarted
                raise gr.Error("There is no subject yet: keep nothing, and generate one.")
            return result

        def update(result: Result, outline: bool) -> tuple[Result, PIL.Image.Image, gr.Dropdown, None]:
            return result, make_sheet(result, outline), gr.Dropdown(result.names, value=result.names[0]), None

        def on_generate(before, chosen, outline, num_subjects, seed, steps, keep):
            kept = () if keep == KEEP_NOTHING else (keep, existing(before), chosen)
            return update(generate(pipeline, num_subjects, seed, steps, *kept), outline)

        def on_blend(outline, *settings):
            return update(blend(pipeline, *settings), outline)

        def on_fill_in(outline, seed, height, *files):
            files = {name: file for name, file in zip(known, files, strict=True) if file is not None}
            return update(fill_in(translation, files, seed, height), outline)

        def on_pack(result, chosen):
            yield from pack(existing(result), chosen, checkpoint)

        def on_outline(result, outline):
            return make_sheet(existing(result), outline)

        # All visitors share one scheduler, which each call sets up: one call at a time, from whatever button.
        alone = {"concurrency_limit": 1, "concurrency_id": "pipeline", "outputs": [result, sheet, chosen, package]}
        settings = [result, chosen, outline, num_subjects, seed, steps, keep]
        generate_button.click(on_generate, settings, **alone)
        demo.load(on_generate, settings, **alone)
        blend_button.click(on_blend, [outline, first_seed, second_seed, num_blends], **alone)
        fill_in_button.click(on_fill_in, [outline, fill_in_seed, height, *uploads], **alone)
        outline.change(on_outline, [result, outline], sheet)
        pack_button.click(on_pack, [result, chosen], package)
    return demo.queue(api_open=False)  # calls outside the queue would not wait for each other


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_arguments(parser)
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = find_pipeline(args.pipeline)
    pipeline = DLDMPipeline.from_pretrained(folder).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    build_demo(pipeline, folder).launch(server_port=args.port, max_file_size=MAX_FILE_SIZE, run_history=False)


if __name__ == "__main__":
    main()
