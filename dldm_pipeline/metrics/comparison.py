"""Several generators compared with the same real subjects, by every measure of this folder.

A [`System`] is anything that generates subjects from seeds. [`sample`] asks it for them; a [`Comparison`] measures all systems
in the same way and returns plain numbers by the system's name. Images, features and figures are kept in a
[`~dldm_pipeline.metrics.cache.Cache`].
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from dldm_pipeline.data.files import read_arrays, write_arrays

from .alignment import evaluate_alignment
from .cache import Cache, digest, fingerprint, hash_source
from .disentanglement import evaluate_disentanglement
from .exchange import appearance_probes, compare_styles, encode_styles, exchange_against_truth, exchange_of_curves
from .features import FeatureExtractor, hash_weights
from .fidelity import evaluate_fidelity, feature_scores
from .images import Slices, to_uint8
from .memorization import MemorizationFilter, evaluate_memorization
from .reconstruction import compare_spectra, encode_subjects, evaluate_reconstruction, radial_power_spectrum, rebuild
from .segmenter import make_segmenter, train_segmenter

BLOCK = 25  # subjects generated and kept at a time
Samples = dict[str, dict[str, np.ndarray]]  # system → what `sample` returns
BATCH_SIZE = 4  # slices that the autoencoder takes at a time


@dataclass
class System:
    """A generator of subjects.

    Attributes:
        name, folder, parameters: as in the tables, where it was read from, and how many it has.
        generate: list of S generators → `images` (S, n, H, W) in [0, 1] and, where there are such, `masks` (S, H, W),
            `structure` (S, c_s, h, w) and `styles` (S, n, c_t).
        key: hash of all that the images depend on but the seeds.
    """

    name: str
    folder: str
    parameters: int
    generate: Callable[[list[torch.Generator]], dict[str, np.ndarray]]
    key: str


def pipeline_system(pipeline, folder: str | os.PathLike, **options) -> System:
    """A `DLDMPipeline`, read from `folder`, as a system; `options` are arguments of its call."""

    def generate(generators: list[torch.Generator]):
        output = pipeline(num_subjects=len(generators), generator=generators, output_type="np", **options)
        latents = {name: output[name].cpu().numpy() for name in ("structure", "styles")}
        return {"images": output.images, "masks": output.masks, **latents}

    parts = pipeline.unet, pipeline.autoencoder
    parameters = sum(part.num_parameters() for part in parts)
    sources = sorted(Path(inspect.getfile(type(pipeline))).parent.glob("pipeline_*.py"))
    key = digest(fingerprint(*parts, pipeline.scheduler), [hash_source(path) for path in sources], options)
    return System("DLDM", str(folder), parameters, generate, key)


def sample(system: System, count: int, seed: int, cache: Cache) -> dict[str, np.ndarray]:
    """Subjects from the seeds `seed`, `seed` + 1, ..., generated block by block; blocks in the cache are read.

    Returns:
        What the system generates, its `images` as uint8, and the `seconds` of each block.

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
                block = system.generate([torch.Generator().manual_seed(one) for one in seeds])
                seconds = np.array([time.perf_counter() - started])
                if not np.isfinite(block["images"]).all():
                    raise ValueError(f"{system.name} in {system.folder} generates NaN: its weights are damaged.")
                block |= {"images": to_uint8(block["images"]), "seconds": seconds}
                write_arrays(path, block, {"synthetic": "true", "system": system.name})
            blocks.append(block)
            bar.update(len(seeds))
    subjects = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    black = np.flatnonzero(subjects["images"].max(axis=(0, 2, 3)) <= 1)
    if len(black):
        shown = f"only black images of modality {black[0]} (of 0 to {subjects['images'].shape[1] - 1})"
        raise ValueError(f"{system.name} in {system.folder} generates {shown} in {count} subjects. Train it longer.")
    return subjects


def find_segmenters(
    items: Sequence[dict], modalities: Sequence[str], steps: int, seed: int, cache: Cache
) -> tuple[dict[str, torch.nn.Module], dict[str, float]]:
    """Trains a segmenter of each modality that has masks with tumour of two subjects at least, or reads it from the cache.

    Args:
        items: of a `SliceDataset` of `modalities`; other subjects than those that the segmenters will judge.
        steps, seed: of the training; 0 steps train none.

    Returns:
        Modality → segmenter, and modality → its Dice on real subjects that it was not trained on.
    """
    segmenters, scores = {}, {}
    for m, name in enumerate(modalities):
        known = [item for item in items if item["present"][m] and item["has_mask"]]
        subjects = [item["subject"] for item in known]
        if not steps or len(set(subjects)) < 2 or not any(item["mask"].any() for item in known):
            continue
        images, masks = np.stack([item["images"][m] for item in known]), np.stack([item["mask"] for item in known])
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
    autoencoder: torch.nn.Module, items: Sequence[dict], segmenters: dict, seed: int, cache: Cache, simulated: int = 0
) -> dict:
    """Exchange of styles, reconstruction, disentanglement, and alignment of real and rebuilt subjects.

    Args:
        autoencoder: a `DisentangledAutoencoder` in evaluation mode, on the device to use.
        items: of a `SliceDataset`, held out.
        segmenters: from [`find_segmenters`].
        seed: of splits and exchanges.
        simulated: images to simulate for [`exchange_against_truth`], and 7.5 times as many for [`appearance_probes`];
            0 does [`exchange_of_curves`] on the items instead.

    Returns:
        dict with `exchange` (`truth` and `probes`, or `curves`), `reconstruction`, `disentanglement` and `alignment`
        (`validation` and `rebuilt`); `left_out`: the reason, where subjects are too few.
    """

    def compute() -> dict:
        encoded = encode_subjects(autoencoder, items, batch_size=BATCH_SIZE)
        rebuilt, masks = rebuild(autoencoder, encoded, BATCH_SIZE)
        names, subjects, present = encoded.modalities, encoded.subjects, encoded.present
        options = dict(seed=seed, segmenters=segmenters)
        real = evaluate_alignment(encoded.images, encoded.masks, names, subjects, present, encoded.has_mask, **options)
        again = evaluate_alignment(rebuilt, masks, names, subjects, present, reference=real, **options)
        return {
            "exchange": attempt(exchange),
            "reconstruction": evaluate_reconstruction(autoencoder, encoded, BATCH_SIZE),
            "disentanglement": attempt(lambda: evaluate_disentanglement(encoded, seed=seed)),
            "alignment": {"validation": real, "rebuilt": again},
        }

    def exchange() -> dict:
        if not simulated:
            return {"curves": exchange_of_curves(autoencoder, items, seed=seed)}
        truth = exchange_against_truth(autoencoder, max(1, simulated // 4))
        return {"truth": truth, "probes": appearance_probes(autoencoder, 5 * simulated, 5 * simulated // 2)}

    def attempt(measure: Callable[[], dict]) -> dict:
        try:
            return measure()
        except ValueError as error:  # too few subjects to split
            return {"left_out": str(error)}

    slices = [np.asarray(item[key]) for item in items for key in ("images", "present", "mask", "has_mask", "subject")]
    inputs = [fingerprint(autoencoder), _hashes(segmenters), seed, simulated, *slices]
    return cache.figures("autoencoder", inputs, compute)


@dataclass
class Comparison:
    """Measures of several systems against the same real subjects. Its methods take `samples`: system → from [`sample`].

    Attributes:
        modalities: the n names.
        real, second, extractor, neighbour_extractor, seed: see [`~dldm_pipeline.metrics.fidelity.evaluate_fidelity`].
        cache: keeps features and figures.
    """

    modalities: list[str]
    real: Slices
    second: Slices | None
    extractor: FeatureExtractor
    neighbour_extractor: FeatureExtractor | None
    seed: int
    cache: Cache

    def _compare(self, name: str, samples: dict[str, dict], inputs: Sequence, compute: Callable) -> dict[str, dict]:
        """System → `compute(its subjects, results so far)`, or what that returned before for these inputs."""
        results: dict[str, dict] = {}
        for system, subjects in samples.items():
            arrays = [subjects.get(key) for key in ("images", "masks", "structure")]
            inputs_of_all = [*arrays, *inputs, self.modalities, self.seed]
            results[system] = self.cache.figures(name, inputs_of_all, functools.partial(compute, subjects, results))
        return results

    def fidelity(self, samples: Samples) -> dict[str, dict]:
        """[`~dldm_pipeline.metrics.fidelity.evaluate_fidelity`] of every system, against one floor."""
        options = dict(second=self.second, neighbour_extractor=self.neighbour_extractor, seed=self.seed)

        def compute(subjects: dict[str, np.ndarray], results: dict[str, dict]) -> dict:
            floor = next(iter(results.values()))["floor"] if results else None
            generated = self.real, Slices(subjects["images"]), self.modalities, self.extractor
            return evaluate_fidelity(*generated, floor=floor, cache=self.cache.folder, **options)

        networks = [network and network.describe() for network in (self.extractor, self.neighbour_extractor)]
        real = [array for one in (self.real, self.second) if one is not None for array in vars(one).values()]
        return self._compare("fidelity", samples, [*real, networks], compute)

    def alignment(self, samples: Samples, reference: dict, segmenters: dict, max_subjects: int) -> dict[str, dict]:
        """[`~dldm_pipeline.metrics.alignment.evaluate_alignment`] of every system, of `max_subjects` at most.

        `reference` is what the function returned for real subjects; `segmenters` are from [`find_segmenters`].
        """

        def compute(subjects: dict[str, np.ndarray], results: dict[str, dict]) -> dict:
            images, masks = subjects["images"][:max_subjects], subjects.get("masks")
            options = dict(reference=reference, seed=self.seed, segmenters=segmenters)
            options["has_mask"] = np.full(len(images), masks is not None)
            masks = np.zeros_like(images[:, 0], dtype=bool) if masks is None else masks[:max_subjects]
            return evaluate_alignment(images / np.float32(255), masks, self.modalities, **options)

        return self._compare("alignment", samples, [reference, _hashes(segmenters), max_subjects], compute)

    def memorization(self, samples: Samples, train: Slices, autoencoder: torch.nn.Module) -> dict[str, dict]:
        """[`~dldm_pipeline.metrics.memorization.evaluate_memorization`] of every system, with z_struct.

        `train` shows other subjects than the held-out ones. The images of a system without `structure` are encoded.
        """

        @functools.cache  # built for the first system whose figures are not known
        def memorization_filter() -> MemorizationFilter:
            return MemorizationFilter(train, self.real, self.modalities, autoencoder, seed=self.seed)

        def compute(subjects: dict[str, np.ndarray], results: dict[str, dict]) -> dict:
            return evaluate_memorization(memorization_filter(), subjects["images"], subjects.get("structure"))

        inputs = [*vars(train).values(), *vars(self.real).values(), fingerprint(autoencoder)]
        return self._compare("memorization", samples, inputs, compute)

    def styles(self, drawn: np.ndarray, autoencoder: torch.nn.Module) -> dict:
        """[`~dldm_pipeline.metrics.exchange.compare_styles`] of drawn styles, and of one half of the real subjects'
        (`validation_halves`), with those of real subjects that have all modalities."""
        encoded = encode_styles(autoencoder, self.real.images[self.real.present.all(axis=1)] / np.float32(255))
        if len(encoded) < 4:
            return {"left_out": f"only {len(encoded)} held-out slices have all modalities"}
        names = self.modalities
        halves = compare_styles(encoded[::2], encoded[1::2], names)
        return compare_styles(drawn, encoded, names) | {"validation_halves": halves}

    def spectra(self, images: np.ndarray) -> dict:
        """[`~dldm_pipeline.metrics.reconstruction.compare_spectra`] of generated images, uint8 (S, n, H, W), with real ones
        (`spectrum`), and of one half of the real subjects with the other (`spectrum_validation_halves`).
        """

        def powers(images: np.ndarray) -> np.ndarray:
            return np.stack([radial_power_spectrum(one / 255) for one in images])

        known = np.where(self.real.present[..., None], powers(self.real.images), np.nan)
        first_half = np.isin(self.real.subjects, sorted(set(self.real.subjects))[::2])
        return {
            "spectrum": compare_spectra(known, powers(images), self.modalities),
            "spectrum_validation_halves": compare_spectra(known[first_half], known[~first_half], self.modalities),
        }

    def steps(self, systems: dict[int, System], count: int) -> dict:
        """Fidelity and time of one pipeline at several numbers of structure steps.

        Args:
            systems: number of steps → the pipeline with that number.
            count: subjects at each, and of the second real sample.

        Returns:
            dict with `num_subjects`; `entries`, one a number of steps: `num_inference_steps`, `seconds_per_subject` and
            the mean over modalities of [`~dldm_pipeline.metrics.fidelity.feature_scores`]; `floor`: the latter of `second`.
        """

        def features(slices: Slices) -> list[np.ndarray]:
            columns = [slices.images[slices.present[:, m], m] for m in range(len(self.modalities))]
            return [self.extractor(images, self.cache.folder, self.extractor.name) for images in columns]

        def scores(others: list[np.ndarray]) -> dict[str, float]:
            each = list(map(feature_scores, known, others))
            return {name: float(np.mean([one[name] for one in each])) for name in each[0]}

        known, entries, floor = features(self.real), [], None
        for steps, system in systems.items():
            subjects = sample(system, count, self.seed, self.cache)
            entry = {"num_inference_steps": steps, "seconds_per_subject": float(subjects["seconds"].sum() / count)}
            entries.append(entry | scores(features(Slices(subjects["images"]))))
        if self.second is not None:
            floor = scores([one[:count] for one in features(self.second)])
        return {"num_subjects": count, "entries": entries, "floor": floor}


def _hashes(segmenters: dict[str, torch.nn.Module]) -> list[str]:
    return [hash_weights(segmenter) for segmenter in segmenters.values()]
