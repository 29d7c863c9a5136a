"""(d) Host memory of a DMD2 run's networks and optimizers: on each of several FSDP ranks, and in one process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cosmos_mp.bench import process, ranks
from cosmos_mp.bench.runs import Enough, make_method, make_networks, watch
from cosmos_mp.config import DMD2Run, ParallelConfig
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import join, rank_and_world, single_process
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import Event, State


def measure(run: DMD2Run, world: int) -> list[dict[str, Any]]:
    """A row for one process and one for `world` ranks: of the rank that takes most, memory taken between iterations and at most, and the
    exact bytes of its parameters and optimizer state."""
    rows = []
    for name, count in (("one process", 1), (f"FSDP {world}", world)):
        results = ranks.run(count, hold, run)
        rows.append({"layout": name, "ranks": count} | {key: max(result[key] for result in results) for key in results[0]})
    return rows


class _Held(Callback):
    def __init__(self, base: int, frozen: int):
        self.base, self.frozen = base, frozen
        self.found: dict[str, int] = {}

    def on_start(self, state: State) -> None:
        tensors = [piece.parameter for pieces in state.networks.values() for piece in pieces.values()]
        tensors += [value for optimizer in state.optimizers.values() for entry in optimizer.state.values() for value in entry.values()]
        self.found["exact"] = self.frozen + sum(map(_bytes, tensors))

    def on_iteration(self, event: Event) -> None:
        # By now student and critics have stepped once: state that nobody had written to took no memory before.
        if event.iteration == 1:
            self.found |= {"held": process.resident() - self.base, "peak": process.peak() - self.base}
            raise Enough


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def hold(run: DMD2Run) -> dict[str, int]:
    """On a rank: bytes from before the networks are built to after the first step of every trained role."""
    process.return_freed_memory()
    topology = join(ParallelConfig()) if rank_and_world()[1] > 1 else single_process()
    base = process.resident()
    process.forget_peak()
    networks = make_networks(run, topology, "full")
    frozen = sum(_bytes(piece.parameter) for piece in Pieces(networks["teacher"], topology).values())
    watcher = _Held(base, frozen)
    watch(run, topology, make_method(run, topology, "full", networks), watcher)
    return watcher.found
