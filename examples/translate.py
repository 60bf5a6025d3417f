"""Fill in the missing sequences of a subject: synthetic images of its own anatomy, with the tumour mask.

    python examples/translate.py                                                # two simulated subjects, real beside filled in
    python examples/translate.py SUBJECT_FOLDER --pipeline P --output OUT       # what SUBJECT_FOLDER lacks of P's modalities
    python examples/translate.py SUBJECT_FOLDER --pipeline P --given T1 FLAIR   # only from these; real ones shown beside

SUBJECT_FOLDER holds one subject: for each sequence a NIfTI file or a folder of DICOM files, all aligned. Names as in BraTS,
BIDS and many others are understood. Slices with tumour are translated; without a mask, all slices that show the brain.
Use a pipeline that was trained on scans like these: the one in the package knows simulated contrasts only.

The output folder gets sheet.png with given | filled in (| real), a folder for each slice with 16-bit PNG and NIfTI files of
the filled-in images and of the mask, and manifest.json with sources and settings. Slices are cropped to the brain and resized
for the pipeline; the files are not in the space of the scan. All slices use the same seed, so that slices of one scan look
alike. All images are synthetic and not for diagnosis.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from dldm_pipeline import DLDMTranslationPipeline
from dldm_pipeline.cli import add_sampling_arguments, exit_on_user_error, find_pipeline
from dldm_pipeline.data.export import TRANSLATION_NOTICE, check_export_folder, export_subjects
from dldm_pipeline.data.export_blocks import SHEET_SUBJECTS
from dldm_pipeline.data.phantom import SEQUENCES, phantom_rows
from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.volumes import read_scan
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

NUM_PHANTOMS, PHANTOM_SEED = 2, 977_002  # no training run has seen subjects of this seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="SUBJECT_FOLDER", help="(default: simulated subjects)")
    given = "sequences to use (default: all in the folder; every second one of simulated subjects)"
    parser.add_argument("--given", nargs="+", metavar="NAME", help=given)
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="which to fill in (default: those not given)")
    add_sampling_arguments(parser, "outputs/translated")
    return parser.parse_args(argv)


def read_subject(folder: Path, modalities: list[str], image_size: int) -> list[dict]:
    """The rows of the one scan in a folder, see `read_scan`; prints its notes."""
    scans = find_scans(folder)
    scans = [scan for scan in scans if not scan.problem] or scans
    if len(scans) > 1:
        raise ValueError(f"{folder} holds {len(scans)} subjects, {scans[0].source} and others; give the folder of one.")
    try:
        rows, notes = read_scan(scans[0], modalities, image_size)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}.") from error
    print(*(f"note: {note}\n" for note in notes), sep="", end="")
    return rows


def save_sheet(rows: list[dict], given: list[str], output: DLDMPipelineOutput, path: Path) -> None:
    """A row for each slice: given images, filled-in images, each beside the real one if there is one, and the mask."""
    shown = np.unique(np.linspace(0, len(rows) - 1, SHEET_SUBJECTS).round().astype(int))
    columns = {f"{name} given": [row[name] for row in rows] for name in given}
    for name, images in output.by_modality.items():
        columns[f"{name} filled in"] = images
        if rows[0][name] is not None:
            columns[f"{name} real"] = [row[name] for row in rows]
    images = [[column[k] for column in columns.values()] for k in shown]
    contact_sheet(images, output.masks[shown], list(columns), [f"synthetic-{k:04d}" for k in shown], path)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    check_export_folder(args.output, args.overwrite)
    folder = find_pipeline(args.pipeline)
    pipeline = DLDMTranslationPipeline.from_pretrained(folder).to(args.device)
    known, size = list(pipeline.autoencoder.config.modalities), pipeline.autoencoder.config.sample_size
    if args.folder is not None:
        rows = read_subject(args.folder, known, size)
    elif set(known) <= set(SEQUENCES):
        rows = list(phantom_rows(NUM_PHANTOMS, size, PHANTOM_SEED, known))
    else:
        raise ValueError(f"subjects with {', '.join(known)} cannot be simulated; give SUBJECT_FOLDER.")
    present = [name for name in known if rows[0][name] is not None]
    given = args.given or present[:: 1 if args.folder else 2]
    absent = [name for name in given if name not in present]
    if absent:
        raise ValueError(f"--given {' '.join(absent)}: the pipeline knows and the subject has {' '.join(present)}.")
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    output = pipeline(
        {name: np.stack([row[name] for row in rows]) for name in given},
        modalities=args.modalities,
        generator=[torch.Generator().manual_seed(args.seed) for _ in rows],
        output_type="np",
        **settings,
    )
    settings |= {"given": given, "sources": [f"{row['subject']}, slice {row['slice_index']}" for row in rows]}
    spacings = {row["pixel_spacing"] for row in rows}
    spacing = spacings.pop() if len(spacings) == 1 else None
    settings |= {"device": args.device, "num_threads": torch.get_num_threads()}
    options = dict(pixel_spacing=spacing, overwrite=args.overwrite, notice=TRANSLATION_NOTICE)
    export_subjects(output, args.output, args.seed, settings, folder, **options)
    save_sheet(rows, given, output, args.output / "sheet.png")
    seconds = time.perf_counter() - started
    print(f"{len(rows)} slices: {', '.join(output.modalities)} and masks from {', '.join(given)} in {seconds:.0f} s")
    print(f"look at {args.output / 'sheet.png'}")


if __name__ == "__main__":
    main()
