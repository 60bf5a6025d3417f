"""Any number of subjects from a pipeline, block by block: the same subject k, however many there are.

    manifest = new_manifest(num_subjects, modalities, image_size, seed=0, settings=settings, block_size=64)
    start_export(folder, manifest)
    write_blocks(folder, generate_blocks(pipeline, manifest, blocks_left(folder)), num_workers=2)
    finish_export(folder)

`examples/generate.py` is the command. Memory holds the block that is being generated and those that workers are writing.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from dldm_pipeline.data.export_blocks import Block, write_block
from dldm_pipeline.data.workers import map_in_order
from dldm_pipeline.pipeline_dldm import DLDMPipeline, DLDMPipelineOutput
from dldm_pipeline.pipeline_utils import default_batch_size

SAMPLING_SETTINGS = ("num_inference_steps", "num_style_inference_steps", "guidance_scale")
"""Arguments of the pipeline's call that `settings` of the manifest hold."""

MAX_BLOCK = 256  # subjects; a stop loses no more of each process's work
FEW_SUBJECTS = 256  # written in less time than a worker takes to start and to import what it needs


def subject_seed(seed: int, *numbers: int) -> int:
    """The seed of one subject: the first 63 bits of SHA-256 of "seed:number".

    Args:
        seed (`int`): Seed of all subjects.
        numbers (`int`): The subject's number; several are joined by colons.
    """
    text = ":".join(str(number) for number in (seed, *numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def choose_block_size(num_subjects: int, appearances: int, batch: int, num_processes: int) -> int:
    """Subjects of a block: five percent of all in whole batches, at most `MAX_BLOCK`, and some for each process.

    Args:
        num_subjects (`int`): Number of all subjects, those of all appearances.
        appearances (`int`): Appearances of each anatomy, which are not divided.
        batch (`int`): Subjects generated at a time.
        num_processes (`int`): Processes that share the blocks.
    """
    batches = min(max(1, num_subjects // (20 * batch)), MAX_BLOCK // batch)
    size = min(batch * batches, -(-num_subjects // num_processes))
    return -(-size // appearances) * appearances


def choose_num_workers(num_subjects: int, num_processes: int) -> int:
    """Workers of each process: none for few subjects, else its cores but one, at least one and at most four."""
    cores = (os.cpu_count() or 1) // num_processes
    return 0 if num_subjects < FEW_SUBJECTS * num_processes else min(max(1, cores - 1), 4)


def generate_blocks(
    pipeline: DLDMPipeline,
    manifest: Mapping[str, Any],
    starts: Iterable[int],
    on_subjects: Callable[[int], Any] | None = None,
) -> Iterator[Block]:
    """Generate blocks when they are asked for, one at a time.

    Subject k is drawn from `subject_seed(seed, k)`. With A > 1 `appearances` in the settings, subject k A + j is the anatomy
    of subject k in the appearance of subject j, and its noise is drawn from `subject_seed(seed, k, j)`. A subject does not
    depend, to 1e-4, on the number of subjects or the size of blocks.

    Args:
        pipeline ([`DLDMPipeline`]): A pipeline on its device.
        manifest (`Mapping`): From [`~data.export.new_manifest`], with `SAMPLING_SETTINGS` among its settings.
        starts (`Iterable[int]`): Numbers of the first subjects of the blocks, see [`~data.export_blocks.blocks_left`].
        on_subjects (`Callable[[int], Any]`, *optional*): Called with the number of subjects that were just generated.

    Raises:
        ValueError: If the pipeline refuses an argument, or gives values that are not numbers.
    """
    appearances, styles = manifest["settings"].get("appearances", 1), None
    if appearances > 1:
        seeds = [subject_seed(manifest["seed"], j) for j in range(appearances)]
        styles = _draw(pipeline, manifest, seeds, "latent").styles
    size = max(1, default_batch_size(pipeline.device) // appearances)
    for start in starts:
        stop = min(start + manifest["block_size"], manifest["num_subjects"])
        anatomies = range(start // appearances, stop // appearances)
        batches = []
        for first in range(0, len(anatomies), size):
            batches.append(_generate(pipeline, manifest, anatomies[first : first + size], styles))
            if on_subjects is not None:
                on_subjects(len(batches[-1].images))
        yield _join(start, batches)


def write_blocks(folder: str | os.PathLike, blocks: Iterable[Block], num_workers: int = 0) -> None:
    """Write blocks to an unfinished export while the next ones are generated.

    Args:
        folder (`str` or `os.PathLike`): Folder of [`~data.export_blocks.start_export`].
        blocks (`Iterable[Block]`): Taken as workers become free, so that at most `num_workers + 2` are in memory.
        num_workers (`int`, *optional*, defaults to 0): Processes that encode and write; 0 does it in this one.

    Raises:
        OSError: If a worker was killed, or `folder` cannot be written.
    """
    function = functools.partial(write_block, folder)
    for _ in map_in_order(function, blocks, num_workers, ahead=1, preload=write_block.__module__):
        pass


def _generate(
    pipeline: DLDMPipeline, manifest: Mapping[str, Any], anatomies: range, styles: torch.Tensor | None
) -> Block:
    """The subjects of some anatomies: of each one, or one for each of the `styles` (A, M, c_t)."""
    seed = manifest["seed"]
    seeds = [subject_seed(seed, k) for k in anatomies]
    if styles is None:
        return Block.from_output(_draw(pipeline, manifest, seeds), entries=[{"seed": one} for one in seeds])
    appearances = range(len(styles))
    # The structure is sampled first, so the steps of the styles do not matter to it.
    structure = _draw(pipeline, manifest, seeds, "latent", num_style_inference_steps=1).structure
    entries = [
        {
            "seed": subject_seed(seed, k),
            "appearance_seed": subject_seed(seed, j),
            "noise_seed": subject_seed(seed, k, j),
        }
        for k, j in itertools.product(anatomies, appearances)
    ]
    latents = {
        "structure": structure.repeat_interleave(len(styles), dim=0),
        "styles": styles.repeat(len(anatomies), 1, 1),
    }
    output = _draw(pipeline, manifest, [entry["noise_seed"] for entry in entries], **latents)
    return Block.from_output(output, entries=entries)


def _draw(
    pipeline: DLDMPipeline, manifest: Mapping[str, Any], seeds: list[int], output_type: str = "np", **options: Any
) -> DLDMPipelineOutput:
    settings = {name: manifest["settings"][name] for name in SAMPLING_SETTINGS} | options
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(len(seeds), manifest["modalities"], generator=generators, output_type=output_type, **settings)


def _join(start: int, batches: list[Block]) -> Block:
    """One block, which takes the batches out of the list."""
    images, labels = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    entries = [entry for batch in batches for entry in batch.entries]
    batches.clear()
    return Block(start, images, labels, entries)
