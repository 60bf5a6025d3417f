"""Make a data set of aligned slices from your scans, or from simulated subjects.

    python training/prepare_dataset.py SCANS --output DATA          # NIfTI files or DICOM series, one folder per subject
    python training/prepare_dataset.py --phantom 2000 --output DATA # simulated brain metastases, as the bundled model knows
    python training/prepare_dataset.py --simulation 2000 --output DATA # simulated brain tumours with their regions

DATA then holds parquet shards split by subject (`datasets.load_dataset("DATA")` reads them), a data card README.md that
lists the subjects and what was left out and why, and contact_sheet.png. It appears complete or not at all.
How scans are read is written in `dldm_pipeline/data/volumes.py`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.export import is_export
from dldm_pipeline.data.files import write_text
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.data.scans import Scan, find_scans
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.simulated_slices import simulated_rows
from dldm_pipeline.data.slices import data_card, write_slices
from dldm_pipeline.data.volumes import ScanReport, read_scans
from dldm_pipeline.modalities import CANONICAL_MODALITIES, DEFAULT_MODALITIES, LABELS, MASK, check_modalities

SHEET_SUBJECTS = 10
PRINTED_LINES = 40


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="?", help="folder with one folder per subject, or one subject's folder")
    parser.add_argument("--phantom", type=int, metavar="N", help="simulate N subjects instead of reading SCANS")
    parser.add_argument("--simulation", type=int, metavar="N", help="the same with the newer simulator, and regions")
    parser.add_argument("--output", required=True, help="folder to create; it must not exist yet, or be empty")
    parser.add_argument("--image_size", type=int, default=128, help="height and width in pixels, a multiple of 8 (128)")
    parser.add_argument(
        "--modalities",
        nargs="+",
        help=f"which, in order, of {' '.join(CANONICAL_MODALITIES)}; by default those that the scans have, "
        f"or {' '.join(DEFAULT_MODALITIES)} for simulated subjects",
    )
    parser.add_argument("--val_fraction", type=float, default=0.2, help="fraction of the subjects for validation (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of simulated subjects (0)")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first unusable subject, and never resample a volume"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="how many scans or subjects to work on at once (1)")
    simulation = parser.add_argument_group("with --simulation")
    simulation.add_argument("--slices_per_subject", type=int, default=1, help="slices of each subject (1)")
    simulation.add_argument("--acquisitions", type=int, default=1, help="scanners in which each slice is seen (1)")
    simulation.add_argument(
        "--tumour_free_fraction", type=float, default=0.0, help="fraction of the subjects without a tumour (0)"
    )
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if sum(source is not None for source in (args.scans, args.phantom, args.simulation)) != 1:
        raise ValueError("give one of a folder of scans, --phantom N and --simulation N.")
    simulation = (args.slices_per_subject, args.acquisitions, args.tumour_free_fraction)
    if args.simulation is None and simulation != (1, 1, 0):
        raise ValueError("--slices_per_subject, --acquisitions and --tumour_free_fraction need --simulation N.")
    if args.image_size < 32 or args.image_size % 8:
        raise ValueError(
            f"--image_size is {args.image_size}; the autoencoder needs a multiple of 8 of at least 32, such as 128."
        )
    if args.num_workers < 1:
        raise ValueError(f"--num_workers is {args.num_workers}; give at least 1.")
    modalities = check_modalities(args.modalities, known_only=True) if args.modalities else None

    reports: list[ScanReport] = []
    if args.phantom is not None:
        modalities = modalities or DEFAULT_MODALITIES
        rows = phantom_rows(args.phantom, args.image_size, args.seed, modalities, args.num_workers)
        rows = tqdm(rows, total=args.phantom, desc="simulating", unit="subject")
    elif args.simulation is not None:
        modalities = modalities or DEFAULT_MODALITIES
        rows = simulated_rows(args.simulation, args.image_size, args.seed, modalities, *simulation, args.num_workers)
        total = args.simulation * args.slices_per_subject * args.acquisitions
        rows = tqdm(rows, total=total, desc="simulating", unit="slice")
    else:
        if is_export(args.scans):
            file = Path(args.scans) / "manifest.json"
            if not file.is_file():
                raise ValueError(f"{args.scans} is an unfinished export; type the command that began it again first.")
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if manifest.get("settings", {}).get("appearances", 1) > 1:
                raise ValueError(
                    f"{args.scans} has each anatomy in several appearances: one would be in training and validation. "
                    "Generate without --appearances."
                )
        scans = find_scans(args.scans)
        found = {name for scan in scans if not scan.problem for name in scan.files}
        found = tuple(name for name in CANONICAL_MODALITIES if name in found)
        # With no usable scan at all, go on: the reasons come with the error at the end.
        modalities = modalities or found or DEFAULT_MODALITIES[:1]
        missing = [name for name in modalities if not any(name in scan.files for scan in scans)]
        if missing:
            has = ", ".join(found) or "none"
            raise ValueError(f"{args.scans}: no subject has {', '.join(missing)}; found are {has}.")
        rows = scan_rows(args, scans, modalities, reports)

    largest: dict[str, dict] = {}

    def finish(folder: Path, summary: dict[str, dict[str, int]]) -> None:
        if args.scans is not None:
            origin = (
                f"Slices of real scans, split with seed {args.seed}. Axial, anterior up, the patient's right on the left. "
                f"Before you share them, check that you may.\n\n{report_table(reports)}"
            )
        else:
            simulator, how = "phantom.py", ""
            if args.simulation is not None:
                simulator, how = (
                    "simulation.py",
                    ", {} slices each in {} acquisitions, {:g} without tumour".format(*simulation),
                )
            origin = (
                f"{args.phantom or args.simulation} simulated subjects (`dldm_pipeline/data/{simulator}`, seed {args.seed}"
                f"{how}). No patient's data are in here."
            )
        title = "Aligned multi-modal brain MRI slices"
        card = data_card(title, modalities, args.image_size, summary, origin, "contact_sheet.png")
        write_text(folder / "README.md", card)
        shown = largest.values()
        contact_sheet(
            [[row[name] for name in modalities] for row in shown],
            [row[MASK] for row in shown],
            modalities,
            [f"{row['subject'][-20:]} #{row['slice_index']}" for row in shown],
            folder / "contact_sheet.png",
            labels=[row.get(LABELS) for row in shown],
        )

    rows = keep_largest(rows, largest)
    summary = write_slices(rows, args.output, modalities, args.val_fraction, args.seed, finish)
    shown = reports if len(reports) <= PRINTED_LINES else [r for r in reports if r.left_out or r.notes]
    if shown:
        print(report_table(shown))
    with_mask = {report.subject for report in reports if report.slices and MASK in report.modalities}
    with_regions = {report.subject for report in reports if report.slices and LABELS in report.modalities}
    if with_regions:
        meaning = "1 necrotic core, 2 oedema, 3 enhancing tumour, and 4 read as 3"
        print(f"{len(with_regions)} subjects have regions, taken for BraTS's: {meaning}")
    if with_mask - with_regions:
        print(f"{len(with_mask - with_regions)} subjects have a mask without regions")
    for split, counts in summary.items():
        print(f"{split}: {counts['rows']} slices of {counts['subjects']} subjects")
    if not summary["validation"]["subjects"]:
        print("warning: no subject is left for validation")
    print(f"wrote {args.output} ({' '.join(modalities)}, {args.image_size}x{args.image_size}); see contact_sheet.png")


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


def keep_largest(rows: Iterator[dict], largest: dict[str, dict]) -> Iterator[dict]:
    """Pass rows through and keep, of each of the first subjects, the slice with the largest tumour, or brain."""

    def size(row: dict) -> tuple[int, int]:
        brain = sum(np.count_nonzero(image) for image in row.values() if isinstance(image, np.ndarray))
        return 0 if row[MASK] is None else np.count_nonzero(row[MASK]), brain

    for row in rows:
        subject = row["subject"]
        if subject not in largest and len(largest) < SHEET_SUBJECTS:
            largest[subject] = row
        elif subject in largest and size(row) > size(largest[subject]):
            largest[subject] = row
        yield row


def report_table(reports: list[ScanReport]) -> str:
    """The reports as an aligned Markdown table."""
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


if __name__ == "__main__":
    main()
