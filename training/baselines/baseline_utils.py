"""What the compared systems share: data in memory, seeds, the choice of the best checkpoint, sheets and cards.

What they share with the DLDM's own training scripts is in `dldm_pipeline.training_utils`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import tqdm
from torch.utils.data import DataLoader

from dldm_pipeline.data.files import write_text
from dldm_pipeline.data.sheet import evenly_spaced_rows, subjects_sheet
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.hub import write_model_card, write_pretrained
from dldm_pipeline.metrics.features import load_extractor
from dldm_pipeline.metrics.fidelity import kernel_distance
from dldm_pipeline.metrics.images import to_uint8
from dldm_pipeline.training_args import BaselineArgs
from dldm_pipeline.training_state import TrainingClock

# uint8 (N, H, W) in 0-255 to (N, d): `dldm_pipeline.metrics.features.FeatureExtractor`, or any other function.
Extractor = Callable[[np.ndarray], np.ndarray]

SHEET_SUBJECTS = 8
SELECTION_SEED = 20240  # not a seed that a test of the finished model would take


@dataclass
class Slices:
    """N slices in memory.

    Attributes:
        images: (N, n, H, W) float16 in [0, 1]; zeros where a modality is missing.
        present: (N, n) bool, which are there.
        masks: (N, H, W) bool, or `None` where nobody asked for them.
    """

    images: torch.Tensor
    present: torch.Tensor
    masks: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


def read_slices(
    dataset: SliceDataset, joint: bool = False, num_workers: int = 0, device: str | torch.device = "cpu"
) -> Slices:
    """Read a whole split onto a device: 41 kB a slice of five modalities at 64x64.

    Args:
        dataset: the split.
        joint: read masks too, and leave out slices that lack a modality or the mask; a ValueError if none is left.
        num_workers: processes that decode.
        device: where to keep it.
    """
    images, present, masks = [], [], []
    for batch in tqdm(DataLoader(dataset, 64, num_workers=num_workers), desc="reading slices", unit="batch"):
        complete = batch["present"].all(dim=1) & batch["has_mask"]
        kept = complete if joint else torch.ones_like(complete)
        images.append(batch["images"][kept].half())
        present.append(batch["present"][kept])
        masks.append(batch["mask"][kept] > 0.5)
    parts = [images, present, masks] if joint else [images, present]
    slices = Slices(*(torch.cat(part).to(device) for part in parts))
    if not len(slices):
        names = ", ".join(dataset.modalities)
        raise ValueError(f"--dataset: no slice has all of {names} and a mask; give fewer --modalities")
    return slices


def random_images(slices: Slices, size: int) -> torch.Tensor:
    """Real images (B, 1, H, W) in [0, 1] of modalities that are there, half of them mirrored."""
    rows = torch.randint(len(slices), (size,), device=slices.images.device)
    labels = torch.multinomial(slices.present[rows].float(), 1)[:, 0]
    return mirror_half(slices.images[rows, labels][:, None].float())


def mirror_half(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), half of them mirrored at random."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images)


def subject_generators(
    num_subjects: int, generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int = 1
) -> list[torch.Generator]:
    """One generator a subject, so that a subject does not depend on its batch.

    `generator` is one, from which the subjects' seeds are drawn; or one a subject, used as they are; or `None` for seeds
    that nobody chose. A ValueError on a number below 1, or another number of generators.
    """
    for name, value in (("num_subjects", num_subjects), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    if isinstance(generator, Sequence):
        if len(generator) != num_subjects:
            count = len(generator)
            raise ValueError(f"generator has {count} entries for {num_subjects} subjects; give one each, or one")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (num_subjects,), generator=generator, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Selection:
    """Measures a model by validation KID and keeps the best one in the output folder.

    `selection.json` in the folder lists what was measured, and lets a resumed run go on.

    Args:
        args: of the run: output folder, number of subjects, and whether to go on with the folder's list.
        real: held-out slices; at most `selection_subjects` of them are used, evenly spaced.
        modalities: their names.
        extractor: from images to features; by default EfficientNet-Lite0, which needs no download.

    Raises:
        ValueError: too few held-out slices, or the default extractor's packages are not installed.
    """

    def __init__(self, args: BaselineArgs, real: Slices, modalities: Sequence[str], extractor: Extractor | None = None):
        self.path, self.modalities = Path(args.output_dir) / "selection.json", tuple(modalities)
        self.num_subjects = num_subjects = args.selection_subjects
        self.entries: list[dict] = []
        if args.resume_from_checkpoint and self.path.is_file():
            self.entries = json.loads(self.path.read_text(encoding="utf-8"))
        else:
            self.path.unlink(missing_ok=True)
        if not num_subjects:
            return
        try:
            self.extractor = extractor or load_extractor(device=str(real.images.device))
        except ImportError as error:
            raise ValueError(f"--selection_subjects: {error} Or give 0, which keeps the last model") from error
        self.real = []
        for m, name in enumerate(self.modalities):
            rows = real.present[:, m].nonzero()[:, 0]
            if len(rows) < 2:
                found = f"the validation split has {len(rows)} slices of {name}, and KID needs 2"
                raise ValueError(f"--selection_subjects {num_subjects}: {found}; hold out more subjects, or give 0")
            rows = rows[torch.linspace(0, len(rows) - 1, min(num_subjects, len(rows))).long()]
            self.real.append(self.extractor(to_uint8(real.images[rows, m].cpu().numpy())))

    @property
    def best(self) -> dict | None:
        """The entry of the kept model, `None` before the first."""
        return min(self.entries, key=lambda entry: entry["KID"], default=None)

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        """KID of generated images (S, n, H, W) in [0, 1], averaged over modalities and for each."""
        values = []
        for m, real in enumerate(self.real):
            pictures = to_uint8(images[:, m].numpy())
            # A generator can fail to nothing but black, which extractors take for a mistake in scaling.
            values.append(kernel_distance(real, self.extractor(pictures)) if pictures.max() > 1 else math.inf)
        return {"KID": float(np.mean(values)), **{f"KID {k}": v for k, v in zip(self.modalities, values, strict=True)}}

    def offer(self, model: torch.nn.Module, clock: TrainingClock) -> dict[str, float]:
        """Figures of a model, always on the same seeds, which is written if it is the best so far; empty if not measured."""
        if not self.num_subjects:
            return {}
        if self.entries and self.entries[-1]["step"] == clock.step:
            return {key: value for key, value in self.entries[-1].items() if key.startswith("KID")}
        minutes = round(clock.elapsed / 60, 2)
        model.eval()
        figures = self.measure(model.sample(self.num_subjects, torch.Generator().manual_seed(SELECTION_SEED)))
        model.train()
        if self.best is None or figures["KID"] < self.best["KID"]:
            write_pretrained(model.save_pretrained, self.path.parent)
        self.entries.append({"step": clock.step, "minutes": minutes, **figures})
        write_text(self.path, json.dumps(self.entries, indent=2) + "\n")
        return figures


def generated_sheet(model: torch.nn.Module, seed: int, path: Path, real: SliceDataset | None = None) -> None:
    """Save generated subjects as a contact sheet, above as many real ones."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(SHEET_SUBJECTS)]
    groups = {"generated": (model.eval().sample(SHEET_SUBJECTS, generators).numpy(), None)}
    if real is not None:
        groups["real"] = evenly_spaced_rows(real, SHEET_SUBJECTS)
    subjects_sheet(path, list(model.config.modalities), groups)


def validate(
    selection: Selection, model: torch.nn.Module, clock: TrainingClock, seed: int, path: Path
) -> dict[str, float]:
    """Offer a model to the selection and save some of its subjects at `path`."""
    figures = selection.offer(model, clock)
    generated_sheet(model, seed, path)
    model.train()
    return figures


def finish(
    model: torch.nn.Module,
    selection: Selection,
    clock: TrainingClock,
    args: BaselineArgs,
    real: SliceDataset,
    title: str,
    description: str,
    training: dict[str, float | int | str],
    num_slices: int,
) -> None:
    """Offer the last model, with averaged weights, then write card and sheet of the one that was kept.

    `real` is shown beneath the generated subjects; the card has title, description (Markdown) and figures of the training.
    """
    output_dir = Path(args.output_dir)
    selection.offer(model, clock)
    best = selection.best
    if best is None:
        write_pretrained(model.save_pretrained, output_dir)
    elif best["step"] != clock.step:
        model = type(model).from_pretrained(output_dir).to(model.device)
    generated_sheet(model, args.seed, output_dir / "samples.png", real)
    figures = {f"{key} (validation)": value for key, value in (best or {}).items()}
    write_model_card(
        output_dir,
        title,
        f"{description}\n\nTrained as a system to compare with, on the same data and split and for the same time.",
        figures,
        {
            "steps": clock.step,
            "images seen per process": clock.step * args.train_batch_size,
            "minutes": round(clock.elapsed / 60, 1),
            **training,
            **args.shown(),
        },
        {"generated subjects above, real ones below": "samples.png"},
        training_data=f"{num_slices} slices.",
    )
    kept = "the last model" if best is None else f"step {best['step']} of {clock.step}"
    print(f"{output_dir}: kept {kept}" + "".join(f", {name} {value:.4f}" for name, value in figures.items()))
