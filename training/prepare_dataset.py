"""Make a data set of aligned slices from your scans, or from simulated subjects.

    python training/prepare_dataset.py SCANS --output DATA          # NIfTI files or DICOM series, one folder per subject
    python training/prepare_dataset.py --phantom 2000 --output DATA # simulated brain metastases

DATA then holds parquet shards split by subject (`datasets.load_dataset("DATA")` reads them), a data card README.md that
lists the subjects and what was left out and why, and contact_sheet.png. It appears complete or not at all.
How scans are read is written in `dldm_pipeline/data/volumes.py`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.scans import Scan, find_scans
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.slices import write_slices
from dldm_pipeline.data.volumes import ScanReport, read_scans
from dldm_pipeline.modalities import CANONICAL_MODALITIES, DEFAULT_MODALITIES, MASK, check_modalities

SHEET_SUBJECTS = 10
PRINTED_LINES = 40


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="?", help="folder with one folder per subject, or one subject's folder")
    parser.add_argument("--phantom", type=int, metavar="N", help="simulate N subjects instead of reading SCANS")
    parser.add_argument("--output", required=True, help="folder to create; it must not exist yet, or be empty")
    parser.add_argument("--image_size", type=int, default=128, help="height and width in pixels, a multiple of 8 (128)")
    parser.add_argument(
        "--modalities",
        nargs="+",
        help=f"which, in order, of {' '.join(CANONICAL_MODALITIES)}; by default those that the scans have, "
        f"or {' '.join(DEFAULT_MODALITIES)} for simulated subjects",
    )
    parser.add_argument("--val_fraction", type=float, default=0.2, help="share of the subjects for validation (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of simulated subjects (0)")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first unusable subject, and never resample a volume"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="how many scans or subjects to work on at once (1)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script with these arguments, by default those of the command line."""
    args = parse_args(argv)
    with exit_on_user_error():
        try:
            prepare(args)
        except ImportError as error:  # pydicom is an extra
            raise ValueError(str(error)) from error


def prepare(args: argparse.Namespace) -> None:
    """Check the arguments, read or simulate, write the folder and print the table."""
    if (args.scans is None) == (args.phantom is None):
        raise ValueError("give either a folder of scans or --phantom N.")
    if args.image_size < 32 or args.image_size % 8:
        raise ValueError(
            f"--image_size is {args.image_size}; the autoencoder needs a multiple of 8 of at least 32, such as 128."
        )
    if args.num_workers < 1:
        raise ValueError(f"--num_workers is {args.num_workers}; give at least 1.")
    wanted = check_modalities(args.modalities, known_only=True) if args.modalities else None

    reports: list[ScanReport] = []
    picked: dict[str, dict] = {}  # of the first subjects, the slice with the largest tumour
    if args.phantom is not None:
        modalities = wanted or DEFAULT_MODALITIES
        rows = phantom_rows(args.phantom, args.image_size, args.seed, modalities, args.num_workers)
        rows = tqdm(rows, total=args.phantom, desc="simulating", unit="subject")
    else:
        scans = find_scans(args.scans)
        modalities = wanted or found_modalities(scans)
        missing = [name for name in modalities if not any(name in scan.files for scan in scans)]
        if missing:
            has = ", ".join(found_modalities(scans)) or "none"
            raise ValueError(f"{args.scans}: no subject has {', '.join(missing)}; found are {has}.")
        rows = scan_rows(args, scans, modalities, reports)

    def finish(folder: Path, summary: dict[str, dict[str, int]]) -> None:
        card = data_card(args, modalities, reports, summary)
        (folder / "README.md").write_text(card, encoding="utf-8")
        draw_sheet(picked, modalities, folder / "contact_sheet.png")

    summary = write_slices(
        pick_rows(rows, picked), args.output, modalities, val_fraction=args.val_fraction, seed=args.seed, finish=finish
    )
    shown = reports
    if len(reports) > PRINTED_LINES:
        shown = [report for report in reports if report.left_out or report.notes]
    if shown:
        print(report_table(shown))
    for split, counts in summary.items():
        print(f"{split}: {counts['rows']} slices of {counts['subjects']} subjects")
    if not summary["validation"]["subjects"]:
        print("warning: no subject is left for validation")
    print(f"wrote {args.output} ({' '.join(modalities)}, {args.image_size}x{args.image_size}); see contact_sheet.png")


def found_modalities(scans: list[Scan]) -> tuple[str, ...]:
    """Modalities that at least one usable scan has, in canonical order."""
    found = {name for scan in scans if not scan.problem for name in scan.files}
    # With no usable scan at all, go on: the reasons come with the error at the end.
    return tuple(name for name in CANONICAL_MODALITIES if name in found) or DEFAULT_MODALITIES[:1]


def scan_rows(
    args: argparse.Namespace, scans: list[Scan], modalities: tuple[str, ...], reports: list[ScanReport]
) -> Iterator[dict]:
    """Yield the rows of all usable scans and fill `reports`. Raises ValueError if there is none."""
    outcomes = read_scans(scans, modalities, args.image_size, args.strict, args.num_workers)
    with tqdm(outcomes, total=len(scans), desc="reading scans", unit="scan") as bar:
        for report, rows in bar:
            reports.append(report)
            for note in report.notes:
                bar.write(f"warning: {report.source}: {note}")
            if report.left_out:
                bar.write(f"warning: {report.source} left out: {report.left_out}")
            yield from rows
    if not any(report.slices for report in reports):
        reasons = "; ".join(f"{report.source}: {report.left_out}" for report in reports[:3])
        more = f"; and {len(reports) - 3} more" if len(reports) > 3 else ""
        raise ValueError(f"{args.scans}: no subject can be used. {reasons}{more}.")


def pick_rows(rows: Iterator[dict], picked: dict[str, dict]) -> Iterator[dict]:
    """Pass rows through and keep, of each of the first subjects, the slice with the largest tumour, or brain."""
    sizes: dict[str, tuple[int, int]] = {}
    for row in rows:
        subject = row["subject"]
        if subject in picked or len(picked) < SHEET_SUBJECTS:
            brain = sum(np.count_nonzero(image) for image in row.values() if isinstance(image, np.ndarray))
            size = (0 if row[MASK] is None else np.count_nonzero(row[MASK]), brain)
            if size > sizes.get(subject, (-1, -1)):
                picked[subject], sizes[subject] = row, size
        yield row


def draw_sheet(picked: dict[str, dict], modalities: tuple[str, ...], path: Path) -> None:
    """One row for each picked slice, one column for each modality."""
    shown = list(picked.values())
    some = next(row[name] for row in shown for name in modalities if row[name] is not None)
    images = [[np.full_like(some, np.nan) if row[name] is None else row[name] for name in modalities] for row in shown]
    masks = None
    if any(row[MASK] is not None for row in shown):
        masks = np.stack([np.zeros_like(some) if row[MASK] is None else row[MASK] for row in shown])
    names = [f"{row['subject'][-20:]} #{row['slice_index']}" for row in shown]
    contact_sheet(np.array(images), masks, modalities, names, path)


def report_table(reports: list[ScanReport]) -> str:
    """The reports as an aligned markdown table."""
    lines = [("scan", "modalities", "slices", "remarks")]
    for report in reports:
        remarks = [f"LEFT OUT: {report.left_out}"] if report.left_out else []
        remarks = "; ".join(remarks + report.notes).replace("|", "/")
        lines.append((report.source, " ".join(report.modalities), str(report.slices), remarks))
    widths = [max(len(line[column]) for line in lines) for column in range(3)] + [7]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        f"| {a:<{widths[0]}} | {b:<{widths[1]}} | {c:>{widths[2]}} | {d:<{widths[3]}} |" for a, b, c, d in lines
    )


def data_card(
    args: argparse.Namespace,
    modalities: tuple[str, ...],
    reports: list[ScanReport],
    summary: dict[str, dict[str, int]],
) -> str:
    """The folder's README.md: what the Hub and `datasets` need to know, and the table."""
    files = "".join(
        f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in summary if summary[split]["rows"]
    )
    splits = "\n".join(
        f"| {split} | {counts['subjects']} | {counts['rows']} |" for split, counts in summary.items() if counts["rows"]
    )
    if args.phantom is not None:
        origin = (
            f"{args.phantom} simulated subjects (`dldm_pipeline/data/phantom.py`, seed {args.seed}). "
            "No patient's data are in here."
        )
    else:
        origin = (
            "Slices of real scans. Axial, anterior up, the patient's right on the left. "
            "Before you share them, check that you may.\n\n" + report_table(reports)
        )
    return f"""---
pretty_name: Aligned multi-modal brain MRI slices
tags:
- mri
- brain-tumor
- dldm_pipeline
configs:
- config_name: default
  data_files:
{files}---

# Aligned multi-modal brain MRI slices

Modalities: {", ".join(modalities)}; {args.image_size}x{args.image_size} pixels, 16-bit, 0 to 65535 for [0, 1].
Split by subject (seed {args.seed}). Columns: see `dldm_pipeline/data/slices.py`.

| split | subjects | slices |
|---|---|---|
{splits}

![contact sheet](contact_sheet.png)

## Origin

{origin}
"""


if __name__ == "__main__":
    main()
