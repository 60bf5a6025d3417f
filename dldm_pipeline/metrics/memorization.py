"""Does a sample copy a training subject?

Three questions, asked in every *channel*: the image of each modality, and z_struct, since DLDM can put a copied anatomy
under a new appearance.

1. How close is the nearest training subject?  Correlation, searched over flips and shifts (`copy_search.py`).
2. Is that closer than two subjects come by chance?  The nearest-neighbour ratio: distance to the nearest training subject
   over distance to the nearest held-out subject. Copies lie far below 1.
3. Is the sample closer to its training subject than that one is to its own neighbour?  Authenticity (Alaa et al., "How
   Faithful is your Synthetic Data?", ICML 2022): the fraction of samples for which this is not so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy import stats

from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.pipeline_dldm import DLDMPipelineOutput

from .copy_search import CopySearch, Matches, StructureRenderer
from .images import Slices, to_uint8
from .reconstruction import mean_of_known

CLOSEST_PAIRS = 8  # listed in a report
Array = np.ndarray | torch.Tensor


@dataclass
class CopyCheck(Matches):
    """What [`MemorizationFilter`] says about S subjects in C channels: their nearest training slices, and how close.

    Attributes:
        subjects: (S, C) name of the nearest training slice's subject; empty where the channel is missing.
        ratio: (S, C) distance to it (1 - similarity) over the distance to the nearest held-out slice.
        channel_scores: (S, C) how far the ratio is below the median of held-out subjects, in their standard deviations.
        threshold: of `score`.
    """

    subjects: np.ndarray
    ratio: np.ndarray
    channel_scores: np.ndarray
    threshold: float

    @property
    def score(self) -> np.ndarray:
        """(S,) score of the closest channel; minus infinity where nothing could be compared."""
        return _highest(self.channel_scores)

    @property
    def keep(self) -> np.ndarray:
        """(S,) bool; False for a likely copy, whose score exceeds the threshold."""
        return self.score <= self.threshold

    @property
    def num_refused(self) -> int:
        """How many are not kept."""
        return int((~self.keep).sum())


class MemorizationFilter:
    """Refuses copies of training subjects; built once, then called on what a [`DLDMPipeline`] returns.

    The decision rests on the nearest-neighbour ratio of every channel. A random half of the held-out subjects sets the
    threshold, so that at most a fraction `false_alarm_rate` of such subjects is refused; the other half, `held_out_check`,
    reports whether that holds. The threshold is a tolerance limit (Wilks 1941): the lowest of the k calibrating scores that
    keeps the promise with a confidence of 95 %. With fewer than 149 slices for a rate of 0.02 none does; it is then the
    highest score, which refuses 1 / (k + 1) on average.

    Args:
        train, held_out: slices of different subjects, from [`~dldm_pipeline.metrics.images.read_slices`].
        modalities: the names of their n modalities.
        autoencoder: the model whose z_struct is compared; None compares images alone.
        false_alarm_rate: fraction of innocent subjects that may be refused.
        seed: of the split of the held-out subjects.

    Attributes:
        channels: names of what is compared: the modalities, then "z_struct" if there is an autoencoder.
        threshold: of the score, see [`CopyCheck`].
        held_out_check: the [`CopyCheck`] of the held-out slices that did not set the threshold.

    Examples:

    ```py
    >>> train, held_out = (read_slices(SliceDataset(path, split)) for split in ("train", "validation"))
    >>> is_new = MemorizationFilter(train, held_out, pipe.autoencoder.config.modalities, pipe.autoencoder)
    >>> output = pipe(num_subjects=8)
    >>> output = keep_subjects(output, is_new(output).keep)
    ```

    Raises:
        ValueError: on an argument that does not fit, named in the message.
    """

    def __init__(
        self,
        train: Slices,
        held_out: Slices,
        modalities: Sequence[str],
        autoencoder: torch.nn.Module | None = None,
        false_alarm_rate: float = 0.02,
        seed: int = 0,
    ) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate={false_alarm_rate}: give a fraction between 0 and 1, such as 0.02.")
        self.modalities, self.false_alarm_rate = list(modalities), false_alarm_rate
        train.check_modalities(self.modalities, "train")
        held_out.check_modalities(self.modalities, "held_out")
        if autoencoder is not None and list(autoencoder.config.modalities) != self.modalities:
            raise ValueError(
                f"modalities are {', '.join(self.modalities)}, the autoencoder's {', '.join(autoencoder.config.modalities)}: "
                "read the data with modalities=autoencoder.config.modalities."
            )
        subjects = held_out.names("held-out")
        names = np.unique(subjects)
        if len(names) < 2:
            raise ValueError("held_out shows 1 subject: give at least 2, and 100 or more to trust the threshold.")
        both = np.intersect1d(train.names("train"), names)
        if len(both):
            raise ValueError(f"held_out has {len(both)} subjects of train, {both[0]} for one: split by subject.")

        self.channels, self.renderer = self.modalities, None
        if autoencoder is not None:
            self.channels, self.renderer = [*self.modalities, "z_struct"], StructureRenderer(autoencoder, train)
            train, held_out = self.renderer.add_channel(train), self.renderer.add_channel(held_out)
        self.train, self.held_out = CopySearch(train), CopySearch(held_out)

        matches, ratio = self._compare(held_out, True)
        calibrating = np.isin(subjects, np.random.default_rng(seed).permutation(names)[: (len(names) + 1) // 2])
        columns = [column[~np.isnan(column)] for column in np.log(ratio[calibrating]).T]
        self._centre = np.array([np.median(known) if len(known) else 0.0 for known in columns])
        # Robust, as scores of different channels are compared; the floor is for a handful of subjects.
        spread = [1.4826 * np.median(np.abs(known - np.median(known))) if len(known) else 1.0 for known in columns]
        self._std = np.maximum(spread, 0.02)
        scores = np.sort(_highest(self._channel_scores(ratio[calibrating])))
        # If more than the tolerated fraction of all subjects scored above the threshold, so few of the k would be above
        # it with a probability of 5 % at most.
        above = max(0, int(stats.binom.ppf(0.05, len(scores), false_alarm_rate)) - 1)
        self.threshold = float(scores[len(scores) - 1 - above])
        self.num_calibrating = len(scores)
        self.held_out_check = self._check(matches, ratio, ~calibrating)

    def _compare(self, slices: Slices, other_subjects: bool = False) -> tuple[Matches, np.ndarray]:
        """Nearest training slices and nearest-neighbour ratios; held-out slices are kept from their own subjects."""
        matches = self.train.search(slices)
        return matches, _distance(matches) / _distance(self.held_out.search(slices, other_subjects))

    def _channel_scores(self, ratio: np.ndarray) -> np.ndarray:
        return (self._centre - np.log(ratio)) / self._std

    def _check(self, matches: Matches, ratio: np.ndarray, rows: np.ndarray | slice) -> CopyCheck:
        found = [getattr(matches, field.name)[rows] for field in fields(Matches)]
        index, ratio = matches.index[rows], ratio[rows]
        subjects = np.where(index >= 0, self.train.subjects[index], "")
        return CopyCheck(*found, subjects, ratio, self._channel_scores(ratio), self.threshold)

    def check(
        self, images: Array | None, structure: Array | None = None, modalities: Sequence[str] | None = None
    ) -> CopyCheck:
        """Compares subjects that no pipeline's output holds, such as those of another generator.

        Args:
            images: (S, M, H, W), uint8, or float in [0, 1]; None for structures alone.
            structure: (S, c_s, h, w) in the autoencoder's own scale; None encodes the images, if there is an autoencoder.
            modalities: the M names, any of the filter's; all of them if None.

        Raises:
            TypeError, ValueError: on an argument that does not fit, named in the message.
        """
        if images is None and (structure is None or self.renderer is None):
            raise ValueError("images is None: give images, or a structure to a filter with an autoencoder.")
        modalities = self.modalities if modalities is None else list(modalities)
        unknown = sorted(set(modalities) - set(self.modalities))
        if unknown:
            raise ValueError(f"modalities names {unknown[0]}; the filter was built with {', '.join(self.modalities)}.")
        count = len(structure) if images is None else len(images)
        size = self.train.images.shape[2:]
        full = np.zeros((count, len(self.modalities), *size), dtype=np.uint8)
        present = np.zeros(full.shape[:2], dtype=bool)
        if images is not None:
            images = to_uint8(images)
            if images.shape[1:] != (len(modalities), *size):
                wanted = f"for {', '.join(modalities)} it must be (subjects, {len(modalities)}, {size[0]}, {size[1]})"
                raise ValueError(f"images has shape {images.shape}; {wanted}, as the training images are.")
            columns = [self.modalities.index(name) for name in modalities]
            full[:, columns], present[:, columns] = images, True
        if structure is not None and len(structure) != count:
            raise ValueError(f"structure has {len(structure)} subjects and images {count}; give one for each.")
        slices = Slices(full, None, present)
        if self.renderer is not None:
            slices = self.renderer.add_channel(slices, structure)
        return self._check(*self._compare(slices), slice(None))

    def __call__(self, output: DLDMPipelineOutput) -> CopyCheck:
        """Compares the subjects of a pipeline's output, whatever its `output_type`; of "latent", the structures alone."""
        images = output.images
        if isinstance(images, list):
            images = np.stack([np.stack([np.asarray(image) for image in subject]) for subject in images])
        return self.check(images, output.structure, output.modalities)

    def authentic(self, check: CopyCheck) -> np.ndarray:
        """Is a sample at least as far from its nearest training slice as that one is from another training subject?

        (S, C) floats: 1 for yes, 0 for no, NaN where the channel is missing or there is one training subject.
        """
        known = check.index >= 0
        wanted = np.zeros(self.train.present.shape, dtype=bool)
        wanted[check.index[known], np.nonzero(known)[1]] = True
        rows, place = np.unique(check.index, return_inverse=True)
        slices = Slices(self.train.images[rows], self.train.subjects[rows], wanted[rows])
        distance = _distance(self.train.search(slices, other_subjects=True))
        own = np.where(known, distance[place.reshape(known.shape), np.arange(len(self.channels))], np.nan)
        return np.where(np.isfinite(own), (1 - check.similarity >= own).astype(float), np.nan)


def _highest(scores: np.ndarray) -> np.ndarray:
    """(S,) the highest finite score of each row; minus infinity where there is none."""
    return np.where(np.isfinite(scores), scores, -np.inf).max(axis=1)


def _distance(matches: Matches) -> np.ndarray:
    """1 - similarity, never quite 0, so that its logarithm exists."""
    return np.maximum(1 - matches.similarity, 1e-6)


def keep_subjects(output: DLDMPipelineOutput, keep: np.ndarray) -> DLDMPipelineOutput:
    """A pipeline's output with those of its S subjects that bool (S,) `keep` tells, see [`CopyCheck`]."""
    keep = np.asarray(keep, dtype=bool)
    if keep.shape != (len(output.structure),):
        raise ValueError(f"keep has shape {keep.shape}; it must be ({len(output.structure)},), one for each subject.")
    rows = np.flatnonzero(keep).tolist()

    def chosen(value):
        if isinstance(value, list):
            return [value[i] for i in rows]
        return None if value is None else value[rows]

    parts = {name: chosen(getattr(output, name)) for name in ("images", "masks", "structure", "styles")}
    return DLDMPipelineOutput(**parts, modalities=output.modalities)


def evaluate_memorization(
    memorization_filter: MemorizationFilter, images: np.ndarray, structure: Array | None = None
) -> dict:
    """Measures how far a set of samples copies the training set, beside held-out subjects as the reference row.

    Args:
        memorization_filter: built from the training and the held-out slices.
        images, structure: of S subjects in the filter's modalities, see [`MemorizationFilter.check`].

    Returns:
        dict of plain numbers; "channel" is a modality or "z_struct":

        - `num_samples`, `num_train_slices`, `num_train_subjects`, `num_calibrating`, `channels`, `threshold`
        - `false_alarm_rate` (tolerated), `false_alarm_rate_promised` (with 95 % confidence: higher where calibrating slices
          are few)
        - `refused`, `refused_share`: samples whose score exceeds the threshold; `refused_by` (channel → samples that this
          channel alone would refuse)
        - `samples`, `held_out` (the half that did not set the threshold), each: `num`, `refused_share`, `similarity`,
          `similarity_max`, `ratio` (channel → mean, largest, and median over subjects), `ratio_min`, `authenticity`
          (channel → fraction), `authenticity_mean`
        - `closest`: the samples of highest score: `sample`, `channel`, `train_subject`, `train_slice`, `similarity`,
          `ratio`, `score`, `flip` ([up-down, left-right]), `shift` ([down, right])
    """
    check = memorization_filter.check(images, structure)
    channels, rate = memorization_filter.channels, memorization_filter.false_alarm_rate
    train_subjects, calibrating = memorization_filter.train.subjects, memorization_filter.num_calibrating

    def by_channel(values: np.ndarray, reduce) -> dict[str, float]:
        known = (column[np.isfinite(column)] for column in values.T)
        return {name: float(reduce(v)) if len(v) else np.nan for name, v in zip(channels, known, strict=True)}

    def row(one: CopyCheck) -> dict:
        authentic = by_channel(memorization_filter.authentic(one), np.mean)
        return {
            "num": len(one.keep),
            "refused_share": float(np.mean(~one.keep)),
            "similarity": by_channel(one.similarity, np.mean),
            "similarity_max": by_channel(one.similarity, np.max),
            "ratio": by_channel(one.ratio, np.median),
            "ratio_min": by_channel(one.ratio, np.min),
            "authenticity": authentic,
            "authenticity_mean": float(mean_of_known(list(authentic.values()))),
        }

    order = [s for s in np.argsort(-check.score, kind="stable") if np.isfinite(check.score[s])][:CLOSEST_PAIRS]
    of_pair = {
        "train_subject": check.subjects, "train_slice": check.index, "similarity": check.similarity,
        "ratio": check.ratio, "score": check.channel_scores, "flip": check.flip, "shift": check.shift,
    }  # fmt: skip
    closest = []
    for s in order:
        c = int(np.flatnonzero(check.channel_scores[s] == check.score[s])[0])
        numbers = {key: values[s, c].tolist() for key, values in of_pair.items()}
        closest.append({"sample": int(s), "channel": channels[c], **numbers})
    return {
        "num_samples": len(check.keep),
        "num_train_slices": len(train_subjects),
        "num_train_subjects": len(set(train_subjects)),
        "num_calibrating": calibrating,
        "channels": list(channels),
        "threshold": check.threshold,
        "false_alarm_rate": rate,
        "false_alarm_rate_promised": max(rate, 1 - 0.05 ** (1 / calibrating)),
        "refused": check.num_refused,
        "refused_share": float(np.mean(~check.keep)),
        "refused_by": dict(zip(channels, (check.channel_scores > check.threshold).sum(axis=0).tolist(), strict=True)),
        "samples": row(check),
        "held_out": row(memorization_filter.held_out_check),
        "closest": closest,
    }


def closest_pairs_sheet(
    closest: Sequence[dict],
    images: np.ndarray,
    train_images: np.ndarray,
    modalities: Sequence[str],
    path: str | os.PathLike,
) -> None:
    """Saves the pairs of highest score as PNG: a row of the sample, laid over its training slice, and a row of that.

    Args:
        closest: `closest` of [`evaluate_memorization`]'s result; without any pair a ValueError is raised.
        images, train_images: the samples (S, M, H, W), uint8, or float in [0, 1], and the training slices (N, M, H, W).
        modalities, path: the M names, and the file to write.
    """
    if not closest:
        raise ValueError("closest is empty: no sample could be compared, and there is no pair to show.")
    images, rows, names = to_uint8(images), [], []
    for pair in closest:
        flips = tuple(axis for axis, flipped in zip((-2, -1), pair["flip"], strict=True) if flipped)
        sample = np.roll(np.flip(images[pair["sample"]], flips), pair["shift"], axis=(-2, -1))
        rows += [sample, train_images[pair["train_slice"]]]
        names.append(f"synthetic {pair['sample']}: {pair['channel']}, ratio {pair['ratio']:.2f}")
        names.append(f"training: {pair['train_subject']}")
    contact_sheet(rows, None, modalities, names, path)
