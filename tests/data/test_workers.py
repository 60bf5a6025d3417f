"""Work in processes: order, bounded memory, and the ends of workers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dldm_pipeline.data.workers import map_in_order


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_order_and_jobs_are_taken_as_they_are_needed(num_workers: int) -> None:
    taken = []

    def jobs():
        for job in range(20):
            taken.append(job)
            yield job

    results = map_in_order(_square, jobs(), num_workers, ahead=1)
    assert next(results) == 0 and len(taken) <= num_workers + 1
    assert list(results) == [k**2 for k in range(1, 20)]


@pytest.mark.parametrize("preload", [None, "dldm_pipeline.data.workers"])
def test_a_killed_worker_is_an_error(preload: str | None) -> None:
    with pytest.raises(OSError, match="num_workers is 2 and a worker was killed, .*; run again with fewer workers"):
        list(map_in_order(os._exit if preload else _die, range(4), 2, preload=preload))


def test_workers_end_with_a_killed_process() -> None:
    source = """
import os, time
from dldm_pipeline.data.workers import map_in_order
if __name__ == "__main__":
    for pid in map_in_order(eval, ["__import__('os').getpid()", "__import__('time').sleep(600)"], 1, ahead=0):
        print(pid, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        if not _is_running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker went on without its parent")


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"  # a zombie has ended
    except FileNotFoundError:
        return False


def _square(job: int) -> int:
    return job**2


def _die(job: int) -> int:
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job
