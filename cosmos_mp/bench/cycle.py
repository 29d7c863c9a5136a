"""(b) Wall time and memory of one DMD2 cycle on context-parallel ranks: ours and the reference's procedure, by the real training loop."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from cosmos_mp.bench import process, ranks
from cosmos_mp.bench.runs import OURS, Enough, Procedure, make_method, make_networks, watch
from cosmos_mp.config import DMD2Run, ParallelConfig
from cosmos_mp.parallel.topology import join
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import Event


def measure(run: DMD2Run, cp: int, repeats: int, memory_batch: int, procedures: tuple[Procedure, ...] = ("reference", *OURS)) -> list[dict]:
    """A row per procedure: the times of a cycle, the slowest rank's, and the most memory that a rank takes for an iteration.

    Every number comes from fresh processes; the order of the procedures is turned round from repeat to repeat.

    Args:
        memory_batch: samples of a micro-batch while memory is measured. More of them raise what is measured above what is always there.
    """
    rows: dict[str, dict[str, Any]] = {name: {"procedure": name, "seconds": []} for name in procedures}
    for repeat in range(repeats):
        for name in procedures if repeat % 2 == 0 else procedures[::-1]:
            rows[name]["seconds"].append(max(ranks.run(cp, cycle_seconds, run, cp, name)))
    for name, row in rows.items():
        row["median_seconds"] = statistics.median(row["seconds"])
        row["bytes"] = max(ranks.run(cp, iteration_bytes, run, cp, name, memory_batch))
    return list(rows.values())


class _Seconds(Callback):
    """Iteration 0 is left out: what is made at first use is made in it. The cycle after it ends with the student's next iteration."""

    def __init__(self, cycle: int):
        self.cycle, self.seconds = cycle, 0.0

    def on_iteration(self, event: Event) -> None:
        self.seconds += event.seconds if event.iteration else 0.0
        if event.iteration == self.cycle:
            raise Enough


def cycle_seconds(run: DMD2Run, cp: int, procedure: Procedure) -> float:
    """On a rank: wall time of one cycle, optimizer steps included."""
    topology = join(ParallelConfig(cp=cp))
    method = make_method(run, topology, procedure, make_networks(run, topology, procedure))
    watcher = _Seconds(run.dmd2.student_update_freq)
    watch(run, topology, method, watcher)
    return watcher.seconds


class _Bytes(Callback):
    """The peak of one iteration of each kind above what is there between iterations, once each kind has been run."""

    def __init__(self) -> None:
        self.base = self.most = 0

    def on_iteration(self, event: Event) -> None:
        if event.iteration >= 2:
            self.most = max(self.most, process.peak() - self.base)
        if event.iteration == 3:
            raise Enough
        self.base = process.resident()
        process.forget_peak()


def iteration_bytes(run: DMD2Run, cp: int, procedure: Procedure, batch: int) -> int:
    """On a rank: the most memory that an iteration takes: activations, gradients, and weights gathered for the moment."""
    process.return_freed_memory()
    topology = join(ParallelConfig(cp=cp))
    run = replace(run, dmd2=replace(run.dmd2, student_update_freq=2))  # the phases in turn
    method = make_method(run, topology, procedure, make_networks(run, topology, procedure))
    watcher = _Bytes()
    watch(run, topology, method, watcher, batch)
    return watcher.most
