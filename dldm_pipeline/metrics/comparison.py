"""Several generators beside real subjects: every measure of this folder for each of them, computed once.

A [`System`] is anything that draws subjects from seeds. [`sample`] draws them block by block as 8-bit images; `compare_*`
measure all systems in the same way and return plain numbers by the system's name. Blocks of images, features and
figures are kept in a [`Cache`] under a hash of all they depend on, so a second run computes only what has changed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from dldm_pipeline.data.files import read_arrays, write_arrays

from .alignment import evaluate_alignment
from .disentanglement import evaluate_disentanglement
from .features import FeatureExtractor, hash_weights
from .fidelity import evaluate_fidelity, feature_scores
from .images import Slices, to_uint8
from .memorization import MemorizationFilter, evaluate_memorization
from .reconstruction import compare_spectra, encode_subjects, evaluate_reconstruction, radial_power_spectrum, rebuild
from .segmenter import make_segmenter, train_segmenter

BLOCK = 25  # subjects drawn and kept at a time
NEIGHBOURS = 3  # k of precision, recall, density and coverage


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


def digest(*parts) -> str:
    """Hash of arrays, by content, and of whatever JSON can hold."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype} {part.shape}".encode())
            sha.update(np.ascontiguousarray(part).tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:32]


def fingerprint(*models) -> str:
    """Hash of the weights, the configuration and the source file of models or schedulers."""
    return digest(
        *(
            [
                hash_weights(model) if isinstance(model, torch.nn.Module) else None,
                {key: value for key, value in model.config.items() if not key.startswith("_")},
                _source(inspect.getfile(type(model))),
            ]
            for model in models
        )
    )


def _source(path: str | os.PathLike) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames, so that no half-written file is ever left under `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


class Cache:
    """A folder of what was computed, each file named by a hash of all it depends on. It can be deleted at any time.

    Args:
        folder: made when something is first kept.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        # Figures change with the code that computes them.
        files = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "report.py")
        self.code = digest([_source(path) for path in files])

    def figures(self, name: str, inputs: Sequence, compute: Callable[[], dict]) -> dict:
        """What `compute` returns, a dict of plain numbers, or what it returned for these inputs before.

        Args:
            name: what the file's name begins with.
            inputs: all that the figures depend on: arrays, and what JSON can hold.
            compute: called if there is no such file.
        """
        path = self.folder / f"{name}-{digest(self.code, *inputs)}.json"
        if not path.is_file():
            write_text(path, json.dumps(compute()))
        return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Generated subjects
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class System:
    """A generator of subjects.

    Attributes:
        name: as in the tables.
        folder: where it was read from.
        parameters: how many it has.
        draw: list of S generators → images (S, n, H, W) in [0, 1]; masks (S, H, W) and structure (S, c_s, h, w), each of
            them None if there is none.
        key: hash of all that the images depend on but the seeds.
    """

    name: str
    folder: str
    parameters: int
    draw: Callable[[list[torch.Generator]], tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]
    key: str


def pipeline_system(pipeline, folder: str | os.PathLike, **options) -> System:
    """A `DLDMPipeline` as a system.

    Args:
        pipeline: on the device to use.
        folder: where it was read from.
        options: arguments of its call, such as `num_inference_steps`.
    """

    def draw(generators: list[torch.Generator]):
        output = pipeline(num_subjects=len(generators), generator=generators, output_type="np", **options)
        return output.images, output.masks, output.structure.cpu().numpy()

    parts = pipeline.unet, pipeline.autoencoder
    parameters = sum(value.numel() for part in parts for value in part.parameters())
    key = digest(fingerprint(*parts, pipeline.scheduler), _source(inspect.getfile(type(pipeline))), options)
    return System("DLDM", str(folder), parameters, draw, key)


def sample(system: System, count: int, seed: int, cache: Cache) -> dict[str, np.ndarray]:
    """Draws subjects from the seeds `seed`, `seed` + 1, ..., block by block; blocks that were drawn before are read.

    Returns:
        `images` uint8 (S, n, H, W); `seconds` (blocks,), what each block took; `masks` (S, H, W) bool and `structure`
        (S, c_s, h, w) where the system has them.

    Raises:
        ValueError: if the images hold NaN, or one modality is black throughout.
    """
    blocks = []
    with tqdm(total=count, desc=f"generate: {system.name}") as bar:
        for start in range(0, count, BLOCK):
            seeds = list(range(seed + start, seed + min(start + BLOCK, count)))
            path = cache.folder / f"subjects-{digest(system.key, seeds)}.safetensors"
            block = read_arrays(path)
            if block is None:
                started = time.perf_counter()
                images, masks, structure = system.draw([torch.Generator().manual_seed(one) for one in seeds])
                seconds = np.array([time.perf_counter() - started])
                if not np.isfinite(images).all():
                    raise ValueError(f"{system.name} in {system.folder} draws NaN: its weights are damaged.")
                block = {"images": to_uint8(images), "masks": masks, "structure": structure, "seconds": seconds}
                block = {name: array for name, array in block.items() if array is not None}
                write_arrays(path, block, {"synthetic": "true", "system": system.name})
            blocks.append(block)
            bar.update(len(seeds))
    drawn = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    black = [m for m in range(drawn["images"].shape[1]) if drawn["images"][:, m].max() <= 1]
    if black:
        raise ValueError(
            f"{system.name} in {system.folder} draws nothing but black as modality {black[0]} (of 0 to "
            f"{drawn['images'].shape[1] - 1}) in {count} subjects: there is nothing to measure. Train it longer."
        )
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def find_segmenters(
    items: Sequence[dict], modalities: Sequence[str], steps: int, seed: int, cache: Cache
) -> tuple[dict[str, torch.nn.Module], dict[str, float]]:
    """Trains a segmenter of each modality that has masks with tumour of two subjects at least.

    Args:
        items: of a `SliceDataset`; other subjects than those that the segmenters will judge.
        modalities: the n names.
        steps: of training; 0 trains none.
        seed: of the training.
        cache: keeps the weights.

    Returns:
        Modality → segmenter, and modality → its Dice on real subjects that it was not trained on.
    """
    segmenters, scores = {}, {}
    for m, name in enumerate(modalities):
        known = [item for item in items if item["present"][m] and item["has_mask"]]
        subjects = [item["subject"] for item in known]
        if not steps or len(set(subjects)) < 2 or not any(item["mask"].any() for item in known):
            continue
        images, masks = (np.stack(part) for part in zip(*((i["images"][m], i["mask"]) for i in known), strict=True))
        path = cache.folder / f"segmenter-{digest(cache.code, images, masks, subjects, steps, seed)}.safetensors"
        state = read_arrays(path)
        if state is None:
            trained, score = train_segmenter(images, masks, subjects, steps, seed=seed)
            state = {key: value.numpy() for key, value in trained.state_dict().items()} | {"dice": np.array([score])}
            write_arrays(path, state, {"modality": name})
        scores[name] = float(state.pop("dice")[0])
        segmenters[name] = make_segmenter().eval()
        segmenters[name].load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return segmenters, scores


def measure_autoencoder(
    autoencoder: torch.nn.Module, items: Sequence[dict], segmenters: dict, batch_size: int, seed: int, cache: Cache
) -> dict:
    """Reconstruction, disentanglement, and alignment of real and rebuilt subjects.

    Args:
        autoencoder: a `DisentangledAutoencoder` in evaluation mode, on the device to use.
        items: of a `SliceDataset`, held out.
        segmenters: from [`find_segmenters`].
        batch_size: slices at a time.
        seed: of splits and exchanges.
        cache: keeps the figures.

    Returns:
        dict with `reconstruction`, `disentanglement` (`left_out`: the reason, where subjects are too few) and `alignment`
        (`validation` and `rebuilt`), each as the function of that name returns it.
    """

    def compute() -> dict:
        encoded = encode_subjects(autoencoder, items, batch_size=batch_size)
        rebuilt, masks = rebuild(autoencoder, encoded, batch_size)
        names = encoded.modalities
        options = dict(subjects=encoded.subjects, present=encoded.present, seed=seed, segmenters=segmenters)
        real = evaluate_alignment(encoded.images, encoded.masks, names, has_mask=encoded.has_mask, **options)
        try:
            disentanglement = evaluate_disentanglement(encoded, seed=seed)
        except ValueError as error:  # too few subjects to split
            disentanglement = {"left_out": str(error)}
        return {
            "reconstruction": evaluate_reconstruction(autoencoder, encoded, batch_size, seed=seed),
            "disentanglement": disentanglement,
            "alignment": {
                "validation": real,
                "rebuilt": evaluate_alignment(rebuilt, masks, names, reference=real, **options),
            },
        }

    slices = [np.asarray(item[key]) for item in items for key in ("images", "present", "mask", "has_mask", "subject")]
    inputs = [fingerprint(autoencoder), _weights(segmenters), seed, *slices]
    return cache.figures("autoencoder", inputs, compute)


def compare_fidelity(
    samples: dict[str, dict[str, np.ndarray]],
    real: Slices,
    second: Slices | None,
    modalities: Sequence[str],
    extractor: FeatureExtractor,
    neighbour_extractor: FeatureExtractor | None,
    seed: int,
    cache: Cache,
) -> dict[str, dict]:
    """[`~dldm_pipeline.metrics.fidelity.evaluate_fidelity`] of every system, against one floor.

    Args:
        samples: system → what [`sample`] returned.
        real: held-out slices.
        second: slices of other subjects for the floor; None halves the held-out subjects.
        modalities: the n names.
        extractor, neighbour_extractor: see `evaluate_fidelity`.
        seed: of all random choices.
        cache: keeps features and figures.
    """
    results: dict[str, dict] = {}
    networks = [network and network.describe() for network in (extractor, neighbour_extractor)]
    parts = [array for slices in (real, second) if slices is not None for array in vars(slices).values()]
    for name, drawn in samples.items():
        compute = functools.partial(
            evaluate_fidelity,
            real,
            Slices(drawn["images"]),
            modalities,
            extractor,
            second,
            neighbour_extractor,
            floor=next(iter(results.values()))["floor"] if results else None,
            k=NEIGHBOURS,
            cache=cache.folder,
            seed=seed,
        )
        inputs = [drawn["images"], *parts, modalities, networks, seed]
        results[name] = cache.figures("fidelity", inputs, compute)
    return results


def compare_alignment(
    samples: dict[str, dict[str, np.ndarray]],
    modalities: Sequence[str],
    reference: dict,
    segmenters: dict,
    max_subjects: int,
    seed: int,
    cache: Cache,
) -> dict[str, dict]:
    """[`~dldm_pipeline.metrics.alignment.evaluate_alignment`] of every system.

    Args:
        samples: system → what [`sample`] returned.
        modalities: the n names.
        reference: what the function returned for real subjects.
        segmenters: from [`find_segmenters`].
        max_subjects: subjects to use at most: the maps of this measure are floats, and take more memory than the images.
        seed: of the shuffling.
        cache: keeps the figures.
    """

    def compute(images: np.ndarray, masks: np.ndarray | None) -> dict:
        known = np.full(len(images), masks is not None)
        masks = np.zeros((len(images), *images.shape[2:]), dtype=bool) if masks is None else masks
        options = dict(reference=reference, seed=seed, segmenters=segmenters)
        return evaluate_alignment(images / np.float32(255), masks, list(modalities), has_mask=known, **options)

    results = {}
    for name, drawn in samples.items():
        part = [None if drawn.get(key) is None else drawn[key][:max_subjects] for key in ("images", "masks")]
        inputs = [*part, modalities, reference, _weights(segmenters), seed]
        results[name] = cache.figures("alignment", inputs, functools.partial(compute, *part))
    return results


def compare_memorization(
    samples: dict[str, dict[str, np.ndarray]],
    train: Slices,
    held_out: Slices,
    modalities: Sequence[str],
    autoencoder: torch.nn.Module,
    seed: int,
    cache: Cache,
) -> dict[str, dict]:
    """[`~dldm_pipeline.metrics.memorization.evaluate_memorization`] of every system, with z_struct.

    Args:
        samples: system → what [`sample`] returned. The images of a system without `structure` are encoded.
        train, held_out: slices of different subjects.
        modalities: the n names.
        autoencoder: a `DisentangledAutoencoder`.
        seed: of the split of the held-out subjects.
        cache: keeps the figures.
    """

    @functools.cache  # built for the first system whose figures are not known
    def memorization_filter() -> MemorizationFilter:
        return MemorizationFilter(train, held_out, modalities, autoencoder, seed=seed)

    def compute(images: np.ndarray, structure: np.ndarray | None) -> dict:
        return evaluate_memorization(memorization_filter(), images, structure)

    results = {}
    for name, drawn in samples.items():
        part = [drawn["images"], drawn.get("structure")]
        inputs = [*part, *vars(train).values(), *vars(held_out).values(), modalities, fingerprint(autoencoder), seed]
        results[name] = cache.figures("memorization", inputs, functools.partial(compute, *part))
    return results


def compare_spectra_of(real: Slices, images: np.ndarray, modalities: Sequence[str]) -> dict:
    """Power spectrum of generated over real images, and of one half of the real subjects over the other.

    Args:
        real: held-out slices.
        images: uint8 (S, n, H, W).
        modalities: the n names.

    Returns:
        dict with `spectrum` and `spectrum_validation_halves`, see
        [`~dldm_pipeline.metrics.reconstruction.compare_spectra`].
    """

    def spectra(images: np.ndarray) -> np.ndarray:
        return np.concatenate([radial_power_spectrum(images[i : i + 32] / 255) for i in range(0, len(images), 32)])

    known = np.where(real.present[..., None], spectra(real.images), np.nan)
    first_half = np.isin(real.subjects, sorted(set(real.subjects))[::2])
    return {
        "spectrum": compare_spectra(known, spectra(images), list(modalities)),
        "spectrum_validation_halves": compare_spectra(known[first_half], known[~first_half], list(modalities)),
    }


def compare_steps(
    systems: dict[int, System],
    count: int,
    real: Slices,
    second: Slices | None,
    modalities: Sequence[str],
    extractor: FeatureExtractor,
    seed: int,
    cache: Cache,
) -> dict:
    """Fidelity and time of one pipeline at several numbers of structure steps.

    Args:
        systems: number of steps → the pipeline with that number.
        count: subjects to draw at each.
        real, second: held-out slices, and others for the floor, which is cut to `count` of them, or None.
        modalities: the n names.
        extractor: of features.
        seed: of the first subject.
        cache: keeps images and features.

    Returns:
        dict with `num_subjects`; `entries`, one a number of steps: `num_inference_steps`, `seconds_per_subject` and the
        mean over modalities of [`~dldm_pipeline.metrics.fidelity.feature_scores`]; `floor`: those scores, or None.
    """

    def features(images: np.ndarray, present: np.ndarray | None = None) -> list[np.ndarray]:
        present = np.ones(images.shape[:2], dtype=bool) if present is None else present
        return [
            extractor(images[present[:, m], m], cache=cache.folder, desc=f"{extractor.name}: {name}")
            for m, name in enumerate(modalities)
        ]

    known = features(real.images, real.present)

    def scores(others: list[np.ndarray]) -> dict[str, float]:
        each = [feature_scores(x, y, NEIGHBOURS) for x, y in zip(known, others, strict=True)]
        return {name: float(np.mean([one[name] for one in each])) for name in each[0]}

    entries = []
    for steps, system in systems.items():
        drawn = sample(system, count, seed, cache)
        entry = {"num_inference_steps": steps, "seconds_per_subject": float(drawn["seconds"].sum() / count)}
        entries.append(entry | scores(features(drawn["images"])))
    floor = None
    if second is not None:
        floor = scores([one[:count] for one in features(second.images, second.present)])
    return {"num_subjects": count, "entries": entries, "floor": floor}


def _weights(segmenters: dict[str, torch.nn.Module]) -> list[str]:
    return [hash_weights(segmenter) for segmenter in segmenters.values()]
