"""Fill in the missing sequences of a subject: synthetic images of its own anatomy, with the tumour mask.

    python examples/translate.py                                                # two simulated subjects, real beside filled in
    python examples/translate.py SUBJECT_FOLDER --pipeline P --output OUT       # what SUBJECT_FOLDER lacks of P's modalities
    python examples/translate.py SUBJECT_FOLDER --pipeline P --given T1 FLAIR   # only from these; real ones shown beside

SUBJECT_FOLDER holds one subject, a NIfTI file or a folder of DICOM files for each sequence, aligned; names as in BraTS, BIDS
and many others are understood. Its slices with tumour are translated, or, where there is no mask, all that show the brain.
Take a pipeline that was trained on scans like these: the one in the package knows simulated contrasts only.

The output folder then holds sheet.png to look at, given | filled in (| real), a folder each slice with 16-bit PNG and
NIfTI files of what was filled in and of the mask, and manifest.json, which says from what and how. Slices are cut to the
brain and resized to what the pipeline knows, and so are these files: they do not lie in the space of the scan. Every slice
is drawn from the same seed, so that slices of one scan look alike. All of it is synthetic and not for diagnosis.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from dldm_pipeline import DLDMTranslationPipeline
from dldm_pipeline.cli import add_example_arguments, exit_on_user_error, find_pipeline
from dldm_pipeline.data.export import SHEET_SUBJECTS, TRANSLATION_NOTICE, check_export_folder, export_subjects
from dldm_pipeline.data.phantom import SEQUENCES, phantom_rows
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.volumes import find_scans, read_scans
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

# A seed of their own, so that no training run has seen them.
NUM_PHANTOMS, PHANTOM_SEED = 2, 977_002


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "subject_folder", nargs="?", type=Path, metavar="SUBJECT_FOLDER", help="(default: simulated subjects)"
    )
    parser.add_argument(
        "--given",
        nargs="+",
        metavar="NAME",
        help="sequences to use (default: all there are; of simulated subjects every second one)",
    )
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="which to draw (default: those not given)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other appearances (default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="denoising steps (default: %(default)s)")
    add_example_arguments(parser, "outputs/translated")
    return parser.parse_args(argv)


def read_subject(folder: Path, modalities: list[str], image_size: int) -> list[dict]:
    """The rows of the one scan in a folder, see `read_scan`; what was done to it is printed."""
    try:
        scans = find_scans(folder)
    except ImportError as error:  # pydicom is an extra
        raise ValueError(str(error)) from error
    scans = [scan for scan in scans if not scan.problem] or scans
    if len(scans) > 1:
        raise ValueError(f"{folder} holds {len(scans)} subjects, {scans[0].source} and others; give the folder of one.")
    [(report, rows)] = read_scans(scans, modalities, image_size)
    if report.left_out:
        raise ValueError(f"{folder}: {report.left_out}.")
    for note in report.notes:
        print(f"note: {note}")
    return rows


def draw_sheet(rows: list[dict], given: list[str], output: DLDMPipelineOutput, path: Path) -> None:
    """What was given, what was filled in, and the real image of that where there is one; the mask drawn on the first."""
    shown = np.unique(np.linspace(0, len(rows) - 1, SHEET_SUBJECTS).round().astype(int))
    columns = {f"{name} given": [rows[k][name] for k in shown] for name in given}
    for name, images in output.by_modality.items():
        columns[f"{name} filled in"] = images[shown]
        if rows[0][name] is not None:
            columns[f"{name} real"] = [rows[k][name] for k in shown]
    contact_sheet(
        np.stack([np.stack(column) for column in columns.values()], axis=1),
        output.masks[shown],
        list(columns),
        [f"synthetic-{k:04d}" for k in shown],
        path,
    )


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    check_export_folder(args.output, args.overwrite)
    folder = find_pipeline(args.pipeline)
    pipeline = DLDMTranslationPipeline.from_pretrained(folder).to(args.device)
    known, size = list(pipeline.autoencoder.config.modalities), pipeline.autoencoder.config.sample_size
    if args.subject_folder is None:
        if not set(known) <= set(SEQUENCES):
            raise ValueError(f"subjects with {', '.join(known)} cannot be simulated; give SUBJECT_FOLDER.")
        rows = list(phantom_rows(NUM_PHANTOMS, size, PHANTOM_SEED, known))
    else:
        rows = read_subject(args.subject_folder, known, size)
    has = [name for name in known if rows[0][name] is not None]
    given = args.given or (has[::2] if args.subject_folder is None else has)
    absent = [name for name in given if name not in has]
    if absent:
        raise ValueError(
            f"--given {' '.join(absent)}: not there; the pipeline knows and the subject has {' '.join(has)}."
        )
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    output = pipeline(
        {name: np.stack([row[name] for row in rows]) for name in given},
        modalities=args.modalities,
        generator=[torch.Generator().manual_seed(args.seed) for _ in rows],
        output_type="np",
        **settings,
    )
    spacings = {row["pixel_spacing"] for row in rows}
    export_subjects(
        output,
        args.output,
        seed=args.seed,
        settings={
            **settings,
            "given": given,
            "sources": [f"{row['subject']}, slice {row['slice_index']}" for row in rows],
            "device": args.device,
            "num_threads": torch.get_num_threads(),
        },
        checkpoint=folder,
        pixel_spacing=spacings.pop() if len(spacings) == 1 else None,
        overwrite=args.overwrite,
        notice=TRANSLATION_NOTICE,
    )
    draw_sheet(rows, given, output, args.output / "sheet.png")
    seconds = time.perf_counter() - started
    print(f"{len(rows)} slices: {', '.join(output.modalities)} and masks from {', '.join(given)} in {seconds:.0f} s")
    print(f"look at {args.output / 'sheet.png'}")


if __name__ == "__main__":
    main()
