"""Fresh processes of this machine as the ranks of a measurement.

They are forked, so that a start takes a moment; the parent must not have computed anything, or its threads would be missing in them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 900.0


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Call `function(*args)` on CPU ranks of one thread each that have met over gloo; their results, in the order of the ranks.

    Raises:
        RuntimeError: a rank failed or died, or some were not done after `timeout` seconds; the message names them. No rank outlives this.
    """
    context = multiprocessing.get_context("fork")
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                place = (rank, world, Path(folder) / "store", timeout)
                processes.append(context.Process(target=_rank, args=(ours, theirs, place, function, args), daemon=True))
                processes[-1].start()
                theirs.close()  # held by the rank alone, so that its death is seen
                pipes.append(ours)
            return _results(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _results(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while missing := [rank for rank in range(len(pipes)) if rank not in results]:
        ready = wait([pipes[rank] for rank in missing], deadline - time.monotonic())
        if not ready:
            raise RuntimeError(f"not done after {timeout:g} s: rank {', '.join(map(str, missing))}")
        for rank in missing:
            if pipes[rank] in ready:
                try:
                    done, answer = pipes[rank].recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died") from None
                if not done:
                    raise RuntimeError(f"rank {rank} failed:\n{answer}")
                results[rank] = answer
    return [results[rank] for rank in range(len(pipes))]


def _rank(ours: Connection, theirs: Connection, place: tuple[int, int, Path, float], function: Callable[..., Any], args: tuple) -> None:
    ours.close()
    rank, world, store, timeout = place
    try:
        torch.set_num_threads(1)
        # The measurements are the CPU's, also where there is a GPU.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), CUDA_VISIBLE_DEVICES="")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout + 10))
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        theirs.send(answer)
        theirs.recv()  # a rank that left would close connections that others still read from: it stays until the parent ends it
    except (EOFError, OSError):
        pass
