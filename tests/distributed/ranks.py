"""A few processes on this machine as the ranks of a run.

They are forked from this process, which has imported everything, so a start takes tenths of a second and any closure will do.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

_KEPT: list[dist.ProcessGroup] = []


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(rank, *args)` on ranks that have met over gloo; their results, in the order of the ranks.

    Raises:
        RuntimeError: a rank failed, died, or was not done after `timeout` seconds. The message names it and says where it was; the other
            ranks are killed.
    """
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                # Longer than the parent waits: who is waited for is to be named, not who waits.
                place = (rank, world, Path(folder), timedelta(seconds=timeout + 10))
                processes.append(context.Process(target=_rank, args=(ours, theirs, place, function, args), daemon=True))
                processes[-1].start()
                theirs.close()  # held by the rank alone, so that its death is seen
                pipes.append(ours)
            return _results(processes, pipes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def initialize(rank: int, world: int, folder: Path, timeout: timedelta) -> None:
    """Make this process one of `world` ranks that meet in `folder`, as torchrun would have; groups of its parent are forgotten."""
    torch.set_num_threads(1)
    if dist.is_initialized():
        # The threads of these groups stayed in the parent: destructors, which join them, would abort the process and must never run.
        _KEPT.extend(dist.distributed_c10d._world.pg_map)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)


def _rank(ours: Connection, theirs: Connection, place: tuple[int, int, Path, timedelta], function: Callable[..., Any], args: tuple) -> None:
    ours.close()
    try:
        with _stack(place[2], place[0]).open("w") as stack:
            faulthandler.register(signal.SIGUSR1, stack)
            initialize(*place)
            result = io.BytesIO()
            torch.save(function(place[0], *args), result)
            faulthandler.unregister(signal.SIGUSR1)
        answer = (True, result.getvalue())
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        theirs.send(answer)
        theirs.recv()  # a rank that left would close connections that others still read from: it stays until the parent is through
    except (EOFError, OSError):
        pass


def _results(processes: list[BaseProcess], pipes: list[Connection], folder: Path, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while missing := [rank for rank in range(len(pipes)) if rank not in results]:
        ready = wait([pipes[rank] for rank in missing], deadline - time.monotonic())
        if not ready:
            stacks = "\n".join(f"rank {rank}: {_ask_for_stack(processes[rank], folder, rank)}" for rank in missing)
            raise RuntimeError(f"not done after {timeout:g} s: rank {', '.join(map(str, missing))}\n{stacks}")
        for rank in missing:
            if pipes[rank] in ready:
                try:
                    succeeded, answer = pipes[rank].recv()
                except EOFError:
                    succeeded, answer = False, "its pipe closed"
                if not succeeded:
                    raise RuntimeError(_dead(processes) or f"rank {rank} failed:\n{answer}")
                results[rank] = torch.load(io.BytesIO(answer), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _dead(processes: list[BaseProcess]) -> str:
    """Says which rank died, if one did: it takes connections with it, and others may report that before its end is seen."""
    dead = wait([process.sentinel for process in processes], 0.5)
    for rank, process in enumerate(processes):
        if process.sentinel in dead:
            process.join()
            return f"rank {rank} died with exit code {process.exitcode}"
    return ""


def _stack(folder: Path, rank: int) -> Path:
    return folder / f"stack.{rank}"


def _ask_for_stack(process: BaseProcess, folder: Path, rank: int) -> str:
    """Where a rank is at this moment."""
    path = _stack(folder, rank)
    if path.exists():  # else it has no handler yet and the signal would end it
        os.kill(process.pid, signal.SIGUSR1)
        for _ in range(50):
            if text := path.read_text():
                time.sleep(0.02)  # for the rest of it
                return path.read_text() or text
            time.sleep(0.02)
    return "has not said where it is"
