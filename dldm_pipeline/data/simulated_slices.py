"""Data sets of simulated slices: rows for `write_slices`, and folders that are made once and kept.

    folder = simulated_dataset(400, size=128, tumour_free_fraction=0.1)  # data/simulated-v2-128-400-free0.1

Subjects are those of `simulation.py`. Their rows keep what drew them, so a slice can be had again, or from another scanner:

    simulate_subject(tuple(row["anatomy_seed"]), other_seed, size, row["height"], tumour=factors["lesions"] > 0)
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dldm_pipeline.data import simulation
from dldm_pipeline.data.simulation import SimulatedSubject, simulate_subject
from dldm_pipeline.data.slices import write_slices
from dldm_pipeline.data.workers import map_in_order
from dldm_pipeline.modalities import DEFAULT_MODALITIES, LABELS, MASK

FAMILY = 4  # subjects that share their acquisitions; one in five is held out, and two of them should be left


def simulated_rows(
    num_subjects: int,
    size: int = 128,
    seed: int = 0,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    slices_per_subject: int = 1,
    acquisitions: int = 1,
    tumour_free_fraction: float = 0.0,
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield rows for `dldm_pipeline.data.slices.write_slices`, one subject after the other.

    Subject i is drawn from (seed, i), whatever the number of subjects or workers; its first slice is that of
    `simulate_subject((seed, i), size=size)`. With several acquisitions, `FAMILY` subjects share the same ones, so that
    pictures of one anatomy in two scanners, and of two anatomies in one scanner, are there to train on. Slices are counted
    from the lowest; those of several acquisitions share subject and `slice_index`.

    Args:
        num_subjects (`int`): Number of anatomies, at least 1.
        size (`int`, *optional*, defaults to 128): Height and width in pixels, 32 to 1024.
        seed (`int`, *optional*, defaults to 0): Seed of all subjects, 0 to 2**63 - 1.
        modalities (`Sequence[str]`, *optional*): What to simulate, in order.
        slices_per_subject (`int`, *optional*, defaults to 1): Slices of each subject; all show its tumour, if it has one.
        acquisitions (`int`, *optional*, defaults to 1): Scanners in which each slice is seen; 1 is each subject's own.
        tumour_free_fraction (`float`, *optional*, defaults to 0.0): Fraction of the subjects, evenly spread, without a
            tumour, and so of the slices. Away from its tumour, a subject is simulated as if it had none.
        num_workers (`int`, *optional*, defaults to 0): Processes; 0 or 1 works in this one.

    Raises:
        ValueError: If an argument is out of range, or a size or modality cannot be simulated.
    """
    numbers = {"num_subjects": num_subjects, "slices_per_subject": slices_per_subject, "acquisitions": acquisitions}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63.")
    if not 0 <= tumour_free_fraction <= 1:
        raise ValueError(f"tumour_free_fraction is {tumour_free_fraction}; it must be between 0 and 1, such as 0.2.")
    shape = (size, tuple(modalities), slices_per_subject, acquisitions)
    free = [
        int((index + 1) * tumour_free_fraction + 1e-9) > int(index * tumour_free_fraction + 1e-9)
        for index in range(num_subjects)
    ]
    jobs = [((seed, index), not free[index], *shape) for index in range(num_subjects)]
    # Also checks size and modalities, and loads what forked workers then share.
    simulate_subject(0, size=size, height=0.5, modalities=modalities)
    for rows in map_in_order(_subject_rows, jobs, num_workers if num_workers > 1 else 0):
        yield from rows


def simulated_dataset(
    num_subjects: int = 2000,
    size: int = 128,
    modalities: Sequence[str] = DEFAULT_MODALITIES,
    seed: int = 0,
    slices_per_subject: int = 1,
    acquisitions: int = 1,
    tumour_free_fraction: float = 0.0,
    root: str | Path = "data",
    num_workers: int | None = None,
    show_progress: bool = True,
) -> Path:
    """The folder of a simulated data set, `root/simulated-v{version}-{size}-{num_subjects}`; it is made if it is not there.

    The version is `SIMULATOR_VERSION`, so that a changed simulator never gives the old images. What else is not the
    default stands in the folder's name, too. One subject in five is held out for validation.

    Args:
        num_subjects, size, modalities, seed, slices_per_subject, acquisitions, tumour_free_fraction: As in
            [`simulated_rows`].
        root (`str` or `Path`, *optional*, defaults to `"data"`): Folder in which such folders are kept.
        num_workers (`int`, *optional*): Processes; by default one per core.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
    """
    modalities = tuple(modalities)
    parts = {
        f"slices{slices_per_subject}": slices_per_subject != 1,
        f"acquisitions{acquisitions}": acquisitions != 1,
        f"free{tumour_free_fraction!r}": tumour_free_fraction != 0,
        "-".join(modalities): modalities != DEFAULT_MODALITIES,
        f"seed{seed}": seed != 0,
    }
    name = f"simulated-v{simulation.SIMULATOR_VERSION}-{size}-{num_subjects}"
    folder = Path(root) / "-".join([name, *(part for part, named in parts.items() if named)])
    if not any(folder.glob("data/train-*.parquet")):
        options = (slices_per_subject, acquisitions, tumour_free_fraction, num_workers or os.cpu_count())
        rows = simulated_rows(num_subjects, size, seed, modalities, *options)
        total = num_subjects * slices_per_subject * acquisitions
        rows = tqdm(rows, total=total, desc="simulating", unit="slice", disable=not show_progress)
        write_slices(rows, folder, modalities, seed=seed)
    return folder


def _subject_rows(job: tuple) -> list[dict[str, Any]]:
    seed, tumour, size, modalities, slices_per_subject, acquisitions = job
    slices = [simulate_subject(seed, size=size, tumour=tumour, modalities=modalities)]
    rng = np.random.default_rng([*seed, 1])
    while len(slices) < slices_per_subject:
        slices.append(_further_slice(rng, slices[0]))
    rows = []
    for index, one in enumerate(sorted(slices, key=lambda one: one.height)):
        scanners = [(seed[0], 1, seed[1] // FAMILY, number) for number in range(acquisitions)]
        seen = [simulate_subject(seed, s, size, one.height, tumour, modalities) for s in scanners]
        for shown in seen if acquisitions > 1 else [one]:
            rows.append(
                {
                    "subject": f"simulated-{seed[1]:06d}",
                    "slice_index": index,
                    **dict(zip(modalities, shown.images, strict=True)),
                    MASK: shown.mask,
                    LABELS: shown.labels,
                    "source": f"simulation v{simulation.SIMULATOR_VERSION}",
                    "pixel_spacing": shown.pixel_spacing,
                    "anatomy_seed": shown.seeds[0],
                    "acquisition_seed": shown.seeds[1],
                    "height": shown.height,
                    "factors": shown.factors,
                }
            )
    return rows


def _further_slice(rng: np.random.Generator, first: SimulatedSubject) -> SimulatedSubject:
    """A slice of the same subject in the same acquisition at another height: with tumour if the first has one."""
    tumour, reach = bool(first.mask.any()), 0.15
    while True:
        height = np.clip(first.height + reach * rng.uniform(-1, 1), 0, 1) if tumour else rng.uniform(0.2, 0.9)
        one = simulate_subject(*first.seeds, len(first.labels), float(height), tumour, first.modalities)
        if bool(one.mask.any()) == tumour:
            return one
        reach *= 0.8  # towards the first slice, which shows the tumour
