"""Work in several processes, with results in order and bounded memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def map_in_order(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    num_workers: int,
    ahead: int = 8,
    preload: str | None = None,
) -> Iterator[Any]:
    """Yield `function(job)` of each job, in order, from worker processes, which end if this process is killed.

    Args:
        function (`Callable`): What to do with a job; a function of a module, as it is pickled.
        jobs (`Iterable`): Taken one by one, while workers work.
        num_workers (`int`): Processes; 0 works in this one.
        ahead (`int`, *optional*, defaults to 8): Jobs for each worker that may be taken before their results are: memory
            does not grow with the number of jobs.
        preload (`str`, *optional*): A module for a server to import, of which the workers are forks: safe where this process
            has threads, as PyTorch's. By default they are forks of this process and share what it has loaded.

    Raises:
        OSError: If a worker was killed.
    """
    if num_workers == 0:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("forkserver" if preload else "fork")
    if preload:
        context.set_forkserver_preload([preload])
    # Not `multiprocessing.Pool`, which waits for ever for a worker that was killed.
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
        try:
            waiting = deque()
            for job in jobs:
                waiting.append(pool.submit(function, job))
                del job  # large jobs are not kept while the next one is made
                if len(waiting) > ahead * num_workers:  # with all at once, a slow reader would let the memory grow
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            reason = "a worker was killed, perhaps for want of memory"
            raise OSError(f"num_workers is {num_workers} and {reason}; run again with fewer workers.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is for the main process, which ends the workers in order; where it is killed, they end by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
