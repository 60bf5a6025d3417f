"""Simulated subjects beside your real scans: tissues, correlations, neighbouring slices, Fréchet distances, speed.

    python benchmarks/simulation.py SCANS
    python benchmarks/simulation.py --sheet docs/simulated.png

SCANS as for prepare_dataset.py, with T1, T1CE, T2 and FLAIR; tumour regions as BraTS labels them (1 necrotic core, 2 oedema,
3 or 4 enhancing). WB is compared with T1CE. Prints Markdown. Intervals: 95 %, bootstrap over subjects.

Tissues: three clusters (k-means) of T1, T2 and FLAIR within the brain and outside the tumour, each image divided by its
smooth part first, so that shading does not count; the table holds medians of the original values. The same is done with
simulated slices. This takes about 10 minutes on one core. `--sheet` draws simulated volumes instead: an axial, a sagittal and
a coronal cut through the largest lesion.
"""

import argparse
import time
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.cluster import KMeans

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data import phantom, simulation, volumes
from dldm_pipeline.data.scans import Scan, find_scans
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.metrics.features import load_extractor
from dldm_pipeline.metrics.fidelity import frechet_distance
from dldm_pipeline.metrics.images import to_uint8
from dldm_pipeline.modalities import MASK

NAMES = ("T1", "T1CE", "T2", "FLAIR")
SIMULATED_NAMES = ("T1", "WB", "T2", "FLAIR")  # what stands for each in the simulator
TISSUES = ("white matter", "grey matter", "CSF", "oedema", "enhancing", "brain, median")
SLICES_PER_SUBJECT, SIZE = 12, 128
NUM_SIMULATED, SLICES_PER_SIMULATED, SEED = 200, 5, 977_003
NUM_VOLUMES = 80  # for the correlation of neighbouring slices
SHEET_SEEDS, SHEET_SIZE = (3, 6, 10), 160
STEPS = (1, 3, 5)  # mm between neighbouring slices
BOOTSTRAPS = 2000


@dataclass
class Subject:
    """Slices of one subject, real or simulated.

    Attributes:
        images: (4, S, H, W) float32 in [0, 1], in the order of `NAMES`.
        brain: (S, H, W) bool.
        labels: (S, H, W) uint8 or `None`: 1 necrotic core, 2 oedema, 3 enhancing.
        step: mm between two slices.
    """

    images: np.ndarray
    brain: np.ndarray
    labels: np.ndarray | None
    step: float


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", metavar="SCANS", nargs="?", help="folder with one folder per subject")
    parser.add_argument(
        "--phantom", action="store_true", help="measure phantom.py, the bundled model's simulator, instead"
    )
    parser.add_argument("--cache", metavar="FOLDER", help="keep the features of images there")
    parser.add_argument("--sheet", metavar="FILE", help="save cuts of simulated volumes as PNG, and measure nothing")
    args = parser.parse_args(argv)
    if args.sheet:
        save_cuts(args.sheet)
        return
    if not args.scans:
        raise ValueError("give a folder of SCANS to compare with, or --sheet FILE.")

    scans = [scan for scan in find_scans(args.scans) if not scan.problem and set(NAMES) <= set(scan.files)]
    if len(scans) < 4:
        raise ValueError(f"{args.scans} has {len(scans)} scans with {', '.join(NAMES)}; at least 4 are needed.")
    real, neighbours = [], []
    for scan in scans:
        subject = read_subject(scan)
        neighbours.append(neighbour_correlations(subject))
        real.append(evenly_spaced(subject, SLICES_PER_SUBJECT))
    simulated, simulated_neighbours, speed = simulate(args.phantom)
    print_tissues(real, simulated)
    if simulated_neighbours:
        print_neighbours(neighbours, simulated_neighbours)
    print_frechet(real, simulated, args.cache)
    print(f"\n{speed:.0f} slices a second.")


def read_subject(scan: Scan) -> Subject:
    """All slices with tumour, or without a mask those that show much brain, windowed and cut as `read_scan` does."""
    has = [name for name in (*NAMES, MASK) if name in scan.files]
    loaded = volumes._to_one_grid(scan, {name: volumes._load(scan, name) for name in has}, False, [])
    spacing = loaded[NAMES[0]].header.get_zooms()[:3]
    labels = np.rint(np.asanyarray(loaded[MASK].dataobj)).astype(np.uint8) if MASK in loaded else None
    windowed = [volumes._window(np.asanyarray(loaded[n].dataobj).astype(np.float32), n) for n in NAMES]
    brain = np.logical_or.reduce([found for _, found in windowed])
    box, _ = volumes._brain_box(brain, spacing)
    areas = brain.sum((0, 1))
    shown = areas >= volumes.MIN_BRAIN_AREA * areas.max() if labels is None else (labels > 0).any((0, 1)) & (areas > 0)

    def cut(volume: np.ndarray, method: Image.Resampling) -> np.ndarray:
        return np.stack([volumes._cut(volume[:, :, i], box, SIZE, method) for i in np.flatnonzero(shown)])

    images = np.stack([cut(volume, Image.Resampling.BICUBIC) for volume, _ in windowed]).clip(0, 1)
    regions = None
    if labels is not None and labels.max() > 1:  # one value is a binary mask, which has no regions
        regions = cut(labels, Image.Resampling.NEAREST).astype(np.uint8)
        regions[regions == 4] = 3
    return Subject(images, cut(brain, Image.Resampling.NEAREST).astype(bool), regions, float(spacing[2]))


def evenly_spaced(subject: Subject, number: int) -> Subject:
    kept = np.unique(np.linspace(0, len(subject.brain) - 1, number).round().astype(int))
    labels = None if subject.labels is None else subject.labels[kept]
    return replace(subject, images=subject.images[:, kept], brain=subject.brain[kept], labels=labels)


def simulate(old: bool) -> tuple[list[Subject], list[np.ndarray], float]:
    """Simulated subjects, their neighbouring slices' correlations, and slices a second of one core."""
    draw = phantom.simulate_subject if old else simulation.simulate_subject
    draw(0, size=SIZE)  # reads the atlas
    subjects, number = [], 1 if old else SLICES_PER_SIMULATED
    start = time.process_time()
    for index in range(NUM_SIMULATED * SLICES_PER_SIMULATED // number):
        first = draw((SEED, index), size=SIZE)
        slices = [first]
        if number > 1:  # evenly through the largest lesion, as the real slices are
            factors = first.factors
            millimetre = 1 / (factors["top_mm"] - factors["bottom_mm"])
            reach = (factors["lesion_1_radius_mm"] + 0.5 * factors["lesion_1_reach_mm"]) * millimetre
            heights = (factors["lesion_1_height"] + reach * np.linspace(-0.8, 0.8, number)).clip(0.02, 0.98)
            slices = [draw((SEED, index), size=SIZE, height=h) for h in heights]
        images = [[one.images[one.modalities.index(name)] for one in slices] for name in SIMULATED_NAMES]
        brain = np.stack([sum(one.tissues.values()) >= 0.5 for one in slices])
        subjects.append(Subject(np.array(images), brain, np.stack([regions(one.tissues) for one in slices]), 1.0))
    speed = NUM_SIMULATED * SLICES_PER_SIMULATED / (time.process_time() - start)
    neighbours = []
    for index in range(0 if old else NUM_VOLUMES):
        seed = (SEED, index)
        first = draw(seed, size=SIZE)
        millimetre = 1 / (first.factors["top_mm"] - first.factors["bottom_mm"])
        heights = [min(first.height, 1 - 6 * millimetre) + step * millimetre for step in (0, *STEPS)]
        slices = [draw(seed, size=SIZE, height=h, modalities=SIMULATED_NAMES) for h in heights]
        pairs = [(slices[0], other) for other in slices[1:]]
        neighbours.append(
            np.array([[correlation(a.images[n], b.images[n]) for a, b in pairs] for n in range(len(NAMES))])
        )
    return subjects, neighbours, speed


def save_cuts(path: str) -> None:
    """Cuts through the largest lesion of three simulated volumes, in three directions, the tumour outlined."""
    images, masks, names = [], [], []
    for number, seed in enumerate(SHEET_SEEDS, start=1):
        volume = simulation.simulate_volume(seed, spacing=1.0, size=SHEET_SIZE)
        areas = [volume.mask.sum(axes) for axes in ((1, 2), (0, 2), (0, 1))]
        for axis, (view, area) in enumerate(zip(("axial", "coronal", "sagittal"), areas, strict=True)):
            cuts = [np.take(stack, area.argmax(), axis) for stack in (*volume.images, volume.mask)]
            if axis:  # up is up, and as many mm a pixel as an axial slice has
                cuts = [upright(cut, volume.spacing[0] / volume.spacing[1]) for cut in cuts]
            images.append(cuts[:-1])
            masks.append(cuts[-1])
            names.append(f"{number} {view}")
    contact_sheet(images, masks, simulation.DEFAULT_MODALITIES, names, path)


def upright(cut: np.ndarray, step: float) -> np.ndarray:
    """A coronal or sagittal cut (D, W) with its top first, rows `step` pixels apart, on a square of W pixels."""
    rows = (cut.shape[1] - 1) / 2 - np.arange(cut.shape[1])
    rows, columns = np.meshgrid((len(cut) - 1) / 2 + rows / step, np.arange(cut.shape[1]), indexing="ij")
    return ndimage.map_coordinates(cut.astype(np.float32), [rows, columns], order=1)


def regions(tissues: dict[str, np.ndarray]) -> np.ndarray:
    """Labels by the rule of the simulator, for the phantom too."""
    dead, living = tissues["necrosis"], tissues["enhancing"]
    wet = np.where(tissues["oedema"] >= 0.4, 2, 0)
    return np.where(dead + living >= 0.5, np.where(living >= dead, 3, 1), wet).astype(np.uint8)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of two slices, over the pixels where both show brain."""
    both = (one > 0) & (other > 0)
    return float(np.corrcoef(one[both], other[both])[0, 1])


def neighbour_correlations(subject: Subject) -> np.ndarray:
    """(4, len(STEPS)): mean over the pairs of slices that far apart."""
    table = np.full((len(NAMES), len(STEPS)), np.nan)
    for column, step in enumerate(STEPS):
        apart = round(step / subject.step)
        for row, images in enumerate(subject.images):
            pairs = [correlation(a, b) for a, b in zip(images[:-apart:5], images[apart::5], strict=False)]
            table[row, column] = np.mean(pairs)
    return table


def tissue_values(subject: Subject) -> dict[str, np.ndarray]:
    """Tissue -> its value in the four sequences; tissues that hardly occur are absent."""
    images, brain, labels = subject.images, subject.brain, subject.labels
    found = {"brain, median": np.array([np.median(image[brain]) for image in images])}
    inner = ndimage.binary_erosion(brain, np.ones((1, 3, 3)), iterations=2)
    for name, region in (("oedema", 2), ("enhancing", 3)) if labels is not None else ():
        if (labels == region).sum() >= 30:
            found[name] = images[:, labels == region].mean(1)
    # An image that is black where others show brain is cut off there.
    healthy = inner & (images[[0, 2]] > 0.02).all(0)
    if labels is not None:
        healthy &= ~ndimage.binary_dilation(labels > 0, np.ones((1, 3, 3)), iterations=2)
    if healthy.sum() < 500:
        return found
    wide = (0, 14, 14)
    weight = np.maximum(ndimage.gaussian_filter(healthy.astype(np.float32), wide), 1e-3)
    flat = []
    for image in images[[0, 2, 3]]:
        capped = np.where(healthy, np.minimum(image, np.percentile(image[healthy], 90)), 0)
        smooth = np.maximum(ndimage.gaussian_filter(capped, wide) / weight, 0.02)
        value = np.clip(image[healthy] / smooth[healthy], 0, 3)
        flat.append(value / np.subtract(*np.percentile(value, (95, 5))))
    flat = np.stack(flat, 1)
    chosen = np.random.default_rng(0).permutation(len(flat))[:8000]
    clusters = KMeans(3, n_init=3, random_state=0).fit(flat[chosen])
    # From fluid over grey to white matter T1 rises and T2 falls.
    order = np.argsort(clusters.cluster_centers_[:, 0] - clusters.cluster_centers_[:, 1])
    member = clusters.predict(flat)
    for name, cluster in zip(("CSF", "grey matter", "white matter"), order, strict=True):
        found[name] = np.median(images[:, healthy][:, member == cluster], axis=1)
    return found


def interval(values: np.ndarray, statistic) -> tuple[float, float]:
    """95 % interval of a statistic of the rows, by bootstrap."""
    rng = np.random.default_rng(0)
    drawn = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(BOOTSTRAPS)]
    return tuple(np.nanpercentile(drawn, (2.5, 97.5)))


def print_tissues(real: list[Subject], simulated: list[Subject]) -> None:
    """Mean and standard deviation between subjects, then correlations between sequences."""
    of_real, of_simulated = ([tissue_values(s) for s in subjects] for subjects in (real, simulated))

    def spread(rows: np.ndarray) -> float:
        return rows.std(ddof=1)

    print("| tissue | images | real mean | simulated | real deviation | simulated | |\n|---|---|---|---|---|---|---|")
    held = total = 0
    table = {
        t: tuple(np.array([v[t] for v in values if t in v]) for values in (of_real, of_simulated)) for t in TISSUES
    }
    for tissue, (there, ours) in table.items():
        for column, name in enumerate(NAMES):
            cells, good = [], True
            for statistic in (np.mean, spread):
                a, b = statistic(there[:, column]), statistic(ours[:, column])
                low, high = interval(there[:, column], statistic)
                fine = abs(b - a) <= 0.2 * a or low <= b <= high
                good &= fine
                held, total = held + fine, total + 1
                cells += [f"{a:.2f} ({low:.2f} to {high:.2f})", f"{b:.2f}" if fine else f"**{b:.2f}**"]
            print(f"| {tissue} (n = {len(there)}) | {name} | {' | '.join(cells)} | {'' if good else 'off'} |")
    print(f"\n{held} of {total} within 20 % of the real value or inside its interval.\n")
    print("| correlation between subjects | real | simulated |\n|---|---|---|")
    for tissue in ("brain, median", "white matter"):
        there, ours = table[tissue]
        for i in range(len(NAMES)):
            for j in range(i + 1, len(NAMES)):
                a, b = (np.corrcoef(rows[:, [i, j]].T)[0, 1] for rows in (there, ours))
                low, high = interval(there[:, [i, j]], lambda rows: np.corrcoef(rows.T)[0, 1])
                b = f"{b:.2f}" if abs(a - b) <= 0.2 else f"**{b:.2f}**"
                print(f"| {tissue}: {NAMES[i]}, {NAMES[j]} | {a:.2f} ({low:.2f} to {high:.2f}) | {b} |")
    print(flush=True)


def print_neighbours(real: list[np.ndarray], simulated: list[np.ndarray]) -> None:
    print(f"| correlation of neighbouring slices | {' | '.join(f'{s} mm, real | simulated' for s in STEPS)} |")
    print(f"|---{'|---' * 2 * len(STEPS)}|")
    there, ours = np.nanmean(real, axis=0), np.nanmean(simulated, axis=0)
    for name, a, b in zip(NAMES, there, ours, strict=True):
        print(f"| {name} | {' | '.join(f'{x:.3f} | {y:.3f}' for x, y in zip(a, b, strict=True))} |")
    print(flush=True)


def print_frechet(real: list[Subject], simulated: list[Subject], cache: str | None) -> None:
    extractor = load_extractor()
    halves = np.arange(len(real)) % 2
    rows = np.concatenate([np.full(len(s.brain), half) for s, half in zip(real, halves, strict=True)])
    print(
        f"| {extractor.titles['frechet_distance']} | simulated to real | half of the real to the other |\n|---|---|---|"
    )
    distances = []
    for column, name in enumerate(NAMES):
        there, ours = (
            extractor(to_uint8(np.concatenate([s.images[column] for s in subjects])), cache=cache)
            for subjects in (real, simulated)
        )
        distances.append(frechet_distance(there, ours))
        floor = frechet_distance(there[rows == 0], there[rows == 1])
        title = "T1CE (WB)" if name == "T1CE" else name
        print(f"| {title} | {distances[-1]:.0f} | {floor:.0f} |", flush=True)
    print(f"| mean | {np.mean(distances):.0f} | |")


if __name__ == "__main__":
    main()
