"""One rank of a benchmark, started by torchrun: python -m cosmos_mp.bench.worker NAME ARGUMENTS FOLDER

Its answer goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosmos_mp.bench.meters import ProcessMemory, TensorMemory, Traffic
from cosmos_mp.bench.reference import ReferenceDMD2, gather_features, nest_recompute
from cosmos_mp.bench.sizes import SIZES, RandomClips, Size
from cosmos_mp.config import DMD2Config, EMAConfig, OptimConfig, ParallelConfig, TrainConfig
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.distill.kd import KD
from cosmos_mp.models.block import Block
from cosmos_mp.parallel.context import frame_sums
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.recompute import recompute as recompute_blocks
from cosmos_mp.parallel.topology import Topology, join
from cosmos_mp.roles import new_discriminator, new_transfer_net
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import Event, State, fit


@dataclass
class Cycles(Callback):
    """Wraps whole cycles of iterations into meters, one after another, and keeps each cycle's seconds."""

    length: int
    meters: list[list[AbstractContextManager]]
    seconds: list[float] = field(default_factory=list)
    rest: int = 0
    """Bytes of this rank's parameters and optimizer state when the first cycle begins."""

    def on_start(self, state: State) -> None:
        self.stack = ExitStack()
        self._enter()
        self.rest = _bytes(state)

    def on_iteration(self, event: Event) -> None:
        if event.iteration % self.length == 0:
            self.seconds.append(0.0)
        self.seconds[-1] += event.seconds
        gc.collect()  # the counter of FLOPs keeps what it saw in circles of references
        if (event.iteration + 1) % self.length == 0:
            self.stack.close()
            self._enter()

    def _enter(self) -> None:
        for meter in self.meters[len(self.seconds)] if len(self.seconds) < len(self.meters) else ():
            self.stack.enter_context(meter)

    def close(self) -> None:
        self.stack.close()


def _bytes(state: State) -> int:
    tensors = state.tensors().values()
    return sum(tensor.nbytes for tensor in (x.to_local() if hasattr(x, "to_local") else x for x in tensors))


def _fit(method: Any, topology: Topology, size: Size, options: TrainConfig, watching: Callback, folder: Path) -> None:
    optim = {role: OptimConfig(lr=1e-5) for role in ("student", "fake_score", "discriminator") if role in method.networks}
    fit(method, RandomClips(size), options, optim, EMAConfig(0.0), folder, [watching], settings={}, topology=topology)


def cycle(size: str, procedure: str, recompute: str, cp: int, metered: bool) -> dict[str, Any]:
    """One DMD2 cycle, 1 student and 4 critic iterations, one clip at a time: this rank's seconds, after a cycle that warms up.

    Args:
        procedure: "ours" or "reference".
        metered: tell peak tensor memory and FLOPs too, each of a cycle of its own.
    """
    topology, sizes = join(ParallelConfig(cp=cp)), SIZES[size]
    networks: dict[str, nn.Module] = {}
    for seed, role in enumerate(("student", "teacher", "fake_score")):
        networks[role] = new_transfer_net(sizes.net, topology, seed)
        for module in networks[role].modules():
            if procedure == "reference" and isinstance(module, Block):
                nest_recompute(module)
        recompute_blocks(networks[role], Block, recompute)
    networks["discriminator"] = new_discriminator(sizes.net, sizes.head, topology, 3)
    if procedure == "reference":
        gather_features(networks["discriminator"], topology)
    kind, across = (ReferenceDMD2, None) if procedure == "reference" else (DMD2, frame_sums(topology))
    config = DMD2Config()
    unconditional = torch.zeros(sizes.text_tokens, sizes.net.text_dim)
    method = kind(networks, sizes.diffusion, config, sizes.head, unconditional, 0, across)
    memory, flops = TensorMemory(), FlopCounterMode(display=False)
    # Attention's CPU kernel counts as nothing; its plain formula is counted.
    meters = [[], []] + ([[memory], [sdpa_kernel(SDPBackend.MATH), flops]] if metered else [])
    cycles = Cycles(config.student_update_freq, meters)
    options = TrainConfig(cycles.length * len(meters), topology.dp_group.size(), 1, save_every=10**9, picture_every=0)
    with tempfile.TemporaryDirectory() as folder:
        _fit(method, topology, sizes, options, cycles, Path(topology.on_first(lambda: folder)))
    found = {"seconds": cycles.seconds[1]}
    if metered:
        rest = cycles.rest + sum(piece.parameter.nbytes for piece in Pieces(networks["teacher"], topology).values())
        found |= {"working_bytes": memory.peak, "rest_bytes": rest, "flops": flops.get_total_flops()}
    return found


def traffic(size: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Bytes sent by this rank in one KD iteration, by collective, and what the formula for them needs."""
    topology, sizes = join(ParallelConfig(**layout)), SIZES[size]
    student = new_transfer_net(sizes.net, topology, 0)
    counted = Traffic()
    options = TrainConfig(2, topology.dp_group.size(), 1, save_every=10**9, picture_every=0, recompute="none")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(topology.on_first(lambda: folder))
        _fit(KD(student, sizes.diffusion, 0), topology, sizes, options, Cycles(1, [[], [counted]]), place)
    # The control branch's final layer is never used and has no gradients.
    due = [piece for name, piece in Pieces(student, topology).items() if piece.summed and not name.startswith("control.final.")]
    summed = sum(piece.parameter.numel() for piece in due)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return {"sent": dict(counted.sent), "dp": topology.dp_group.size(), "parameters": parameters, "summed": summed}


def state(size: str, run: str, iterations: int) -> dict[str, Any]:
    """Peak of this process's memory while a KD run gets ready from its folder, or from nothing, and trains up to `iterations`."""
    topology, sizes = join(ParallelConfig()), SIZES[size]
    ready = Ready(ProcessMemory())
    student = new_transfer_net(sizes.net, topology, 0)
    options = TrainConfig(iterations, topology.world, 1, save_every=10**9, picture_every=0, recompute="none")
    _fit(KD(student, sizes.diffusion, 0), topology, sizes, options, ready, Path(run))
    held = sum(piece.parameter.nbytes for piece in Pieces(student, topology).values())
    return {"ready_bytes": ready.peak, "trained_bytes": ready.trained, "parameter_bytes": held}


@dataclass
class Ready(Callback):
    """Peak memory until a run is ready to train, optimizer state included, and until it has trained."""

    memory: ProcessMemory
    peak: int = 0
    trained: int = 0

    def on_start(self, state: State) -> None:
        self.peak = self.memory.read()

    def on_iteration(self, event: Event) -> None:
        self.trained = self.memory.read()


MEASUREMENTS = {"cycle": cycle, "traffic": traffic, "state": state}


if __name__ == "__main__":
    name, arguments, folder = sys.argv[1:]
    torch.set_num_threads(1)
    answer = MEASUREMENTS[name](**json.loads(arguments))
    rank = torch.distributed.get_rank()
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
