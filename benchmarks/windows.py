"""Where healthy and diseased brain lies in the [0, 1] window: your scans beside the simulated subjects.

    python benchmarks/windows.py SCANS

SCANS as for prepare_dataset.py. Printed as a Markdown table: percentiles of the brain's pixels over the slices of each scan,
the median over scans, and the same over simulated slices. `headroom` in `data/phantom.py` is set by it.
"""

import argparse

import numpy as np

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.scans import find_scans
from dldm_pipeline.data.volumes import read_scans
from dldm_pipeline.modalities import CANONICAL_MODALITIES

PERCENTILES = (5, 50, 95, 98, 99.8)
NUM_PHANTOMS, PHANTOM_SEED = 60, 977_003


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", metavar="SCANS", help="folder with one folder per subject")
    args = parser.parse_args(argv)

    scans = [scan for scan in find_scans(args.scans) if not scan.problem]
    names = [name for name in CANONICAL_MODALITIES if any(name in scan.files for scan in scans)]
    found = {name: [] for name in names}
    for _, rows in read_scans(scans, tuple(names), image_size=128):
        for name in names:
            pixels = [row[name][row[name] > 0] for row in rows if row[name] is not None]
            if pixels:
                found[name].append(np.percentile(np.concatenate(pixels), PERCENTILES))
    print(f"| images | {' | '.join(f'{p} %' for p in PERCENTILES)} |\n|---{'|---' * len(PERCENTILES)}|")
    for name, values in found.items():
        print_row(f"{name}, {len(values)} scans", np.median(values, axis=0))
    subjects = [simulate_subject((PHANTOM_SEED, i)) for i in range(NUM_PHANTOMS)]
    for m, name in enumerate(subjects[0].modalities):
        pixels = np.concatenate([s.images[m][sum(s.tissues.values()) >= 0.5] for s in subjects])
        print_row(f"{name}, simulated", np.percentile(pixels, PERCENTILES))


def print_row(title: str, values: np.ndarray) -> None:
    print(f"| {title} | {' | '.join(f'{value:.2f}' for value in values)} |", flush=True)


if __name__ == "__main__":
    main()
