"""Blocks of generated subjects: subject k is always the same, and memory holds a few blocks whatever their number."""

import gc
import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import pytest
import torch

from dldm_pipeline.data.export import new_manifest
from dldm_pipeline.data.export_blocks import Block, blocks_left, finish_export, start_export
from dldm_pipeline.data.generation import (
    MAX_BLOCK,
    choose_block_size,
    choose_num_workers,
    generate_blocks,
    subject_seed,
    write_blocks,
)

MODALITIES = ["T1", "T2", "WB"]
STEPS = {"num_inference_steps": 2, "num_style_inference_steps": 1, "guidance_scale": 1.0}


def manifest_of(num_subjects: int, block_size: int, appearances: int = 1, modalities: list[str] = MODALITIES) -> dict:
    settings = STEPS | {"appearances": appearances}
    return new_manifest(num_subjects, modalities, (32, 32), seed=5, settings=settings, block_size=block_size)


def images_of(pipeline, manifest: dict, starts: list[int] | None = None) -> tuple[np.ndarray, list[dict]]:
    starts = range(0, manifest["num_subjects"], manifest["block_size"]) if starts is None else starts
    blocks = list(generate_blocks(pipeline, manifest, starts))
    return np.concatenate([block.images for block in blocks]), [entry for block in blocks for entry in block.entries]


def assert_same(images: np.ndarray, expected: np.ndarray) -> None:
    """Equal to 1e-4 but for pixels at a rim, which can change sides."""
    difference = np.abs(images.astype(int) - expected.astype(int))
    assert images.shape == expected.shape and (difference > 8).mean() < 1e-3


def test_a_subject_has_its_own_seed() -> None:
    expected = int(sha256(b"7:12").hexdigest()[:16], 16) // 2
    assert subject_seed(7, 12) == expected < 2**63
    assert len({subject_seed(seed, k) for seed in range(10) for k in range(100)}) == 1000


def test_subject_k_is_the_same_whatever_the_numbers(tiny_pipeline) -> None:
    images, entries = images_of(tiny_pipeline, manifest_of(11, 11))
    assert [entry["seed"] for entry in entries] == [subject_seed(5, k) for k in range(11)]
    assert len({image.tobytes() for image in images}) == 11
    for changed in (manifest_of(5, 5), manifest_of(11, 4), manifest_of(11, 1)):
        again, _ = images_of(tiny_pipeline, changed)
        assert_same(again, images[: len(again)])
    assert_same(images_of(tiny_pipeline, manifest_of(11, 4), [8])[0], images[8:])
    assert_same(images_of(tiny_pipeline, manifest_of(11, 11, modalities=["WB"]))[0], images[:, 2:])


def test_an_appearance_is_that_of_a_subject(tiny_pipeline) -> None:
    manifest = manifest_of(12, 12, appearances=3)
    images, entries = images_of(tiny_pipeline, manifest)
    for i, entry in enumerate(entries):
        k, j = divmod(i, 3)
        seeds = subject_seed(5, k), subject_seed(5, j), subject_seed(5, k, j)
        assert tuple(entry.values()) == seeds and list(entry) == ["seed", "appearance_seed", "noise_seed"]
    generators = [torch.Generator().manual_seed(subject_seed(5, k)) for k in range(4)]
    drawn = tiny_pipeline(4, MODALITIES, generator=generators, output_type="latent", **STEPS)
    for k, j in ((1, 2), (3, 0)):
        latents = {"structure": drawn.structure[k : k + 1], "styles": drawn.styles[j : j + 1]}
        noise = torch.Generator().manual_seed(subject_seed(5, k, j))
        alone = tiny_pipeline(1, MODALITIES, generator=noise, output_type="np", **latents).images
        assert_same(np.rint(alone * 65535), images[3 * k + j : 3 * k + j + 1])
    assert_same(images_of(tiny_pipeline, manifest | {"block_size": 3})[0], images)
    assert_same(images_of(tiny_pipeline, manifest_of(6, 6, appearances=3))[0], images[:6])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_few_blocks_are_in_memory(tiny_pipeline, tmp_path, num_workers) -> None:
    manifest, alive, most = manifest_of(20, 2), [], 0
    start_export(tmp_path / "out", manifest)

    def watched() -> Iterator[Block]:
        nonlocal most
        for block in generate_blocks(tiny_pipeline, manifest, blocks_left(tmp_path / "out")):
            alive.append(weakref.ref(block.images))
            yield block
            del block
            gc.collect()
            most = max(most, sum(one() is not None for one in alive))

    write_blocks(tmp_path / "out", watched(), num_workers)
    assert len(alive) == 10 and most <= num_workers + 1
    finish_export(tmp_path / "out")
    subjects = json.loads((tmp_path / "out" / "manifest.json").read_text())["subjects"]
    assert [subject["name"] for subject in subjects] == [f"synthetic-{k:04d}" for k in range(20)]


def test_a_killed_worker_is_one_error_and_the_rest_can_be_written(tiny_pipeline, tmp_path) -> None:
    manifest = manifest_of(8, 1)
    start_export(tmp_path / "out", manifest)

    def blocks() -> Iterator[Block]:
        for block in generate_blocks(tiny_pipeline, manifest, blocks_left(tmp_path / "out")):
            yield block
            if block.start == 3:
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(
        OSError, match="num_workers is 1 and a worker was killed, perhaps for want of memory; run again"
    ):
        write_blocks(tmp_path / "out", blocks(), num_workers=1)
    left = blocks_left(tmp_path / "out")
    assert 7 in left and 0 not in left
    write_blocks(tmp_path / "out", generate_blocks(tiny_pipeline, manifest, left))
    finish_export(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("synthetic-*"))) == 8


def test_sizes_of_blocks_and_numbers_of_workers(monkeypatch) -> None:
    assert choose_block_size(8, 1, batch=8, num_processes=1) == 8
    assert choose_block_size(8, 1, batch=8, num_processes=4) == 2
    assert choose_block_size(100_000, 1, batch=64, num_processes=8) == MAX_BLOCK
    assert choose_block_size(20_000, 40, batch=64, num_processes=1) % 40 == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert choose_num_workers(8, 1) == choose_num_workers(500, 8) == 0
    assert choose_num_workers(100_000, 1) == 4 and choose_num_workers(100_000, 8) == 1
