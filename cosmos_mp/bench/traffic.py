"""(c) Bytes that a rank sends for one KD sample in each layout: every collective intercepted, beside the formula."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_mp.bench import ranks
from cosmos_mp.bench.runs import Clips
from cosmos_mp.config import DMD2Run, ParallelConfig
from cosmos_mp.distill.kd import KD
from cosmos_mp.models.embeddings import PATCH
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology, join
from cosmos_mp.plan import traffic
from cosmos_mp.roles import new_transfer_net

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "TP2": (2, ParallelConfig(tp=2)),
    "TP2+SP": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "CP2 Ulysses": (2, ParallelConfig(cp=2)),
    "CP4 Ulysses": (4, ParallelConfig(cp=4)),
    "CP2 ring": (2, ParallelConfig(cp=2, cp_attention="ring")),
    "CP4 ring": (4, ParallelConfig(cp=4, cp_attention="ring")),
    "FSDP 2": (2, ParallelConfig()),
    "HSDP 2 x 2": (4, ParallelConfig(shard=2)),
    "TP2 x CP2": (4, ParallelConfig(tp=2, cp=2)),
}
"""Name: ranks and layout."""

BYTES = 4  # float32
PHASES = ("forward", "backward", "gradients")
SILENT = {"wait_tensor", "_wrap_tensor_autograd", "recv_"}
"""Operations of the collectives' namespaces that send nothing themselves."""


class Counter(TorchDispatchMode):
    """Counts what this rank sends, as `sent[phase, axis, collective] = [calls, bytes]`.

    A collective over n ranks counts by what it must send whatever way it takes: a gather its part to n - 1 others, a scattered sum n - 1
    parts, an all-reduce both. Counted are operations, so that the backend's own chatter is left out.

    Args:
        axes: name of each process group that may be used.
    """

    def __init__(self, axes: dict[dist.ProcessGroup, str]):
        super().__init__()
        self.axes = {group.group_name: (name, group.size()) for group, name in axes.items()}
        self.phase = "forward"
        self.sent: defaultdict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func.overloadpacket.__name__ not in SILENT:
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        group = next(_name(arg) for arg in reversed(args) if isinstance(arg, str | torch.ScriptObject) and _name(arg) in self.axes)
        axis, n = self.axes[group]
        first = args[0]
        match name:
            case "send":
                what, sent = "send", _size(first[0])
            case "allreduce_" | "all_reduce":
                what, sent = "all-reduce", 2 * _size(first) * (n - 1) // n
            case "_allgather_base_":  # output, input
                what, sent = "all-gather", _size(args[1]) * (n - 1)
            case "all_gather_into_tensor":
                what, sent = "all-gather", _size(first) * (n - 1)
            case "_reduce_scatter_base_":  # output, input
                what, sent = "reduce-scatter", _size(first) * (n - 1)
            case "reduce_scatter_tensor":
                what, sent = "reduce-scatter", _size(first) * (n - 1) // n
            case "all_to_all_single":
                what, sent = "all-to-all", _size(first) * (n - 1) // n
            case _:
                raise NotImplementedError(f"collective {name} is not counted yet")
        entry = self.sent[self.phase, axis, what]
        entry[0] += 1
        entry[1] += sent


def _name(group: str | torch.ScriptObject) -> str | None:
    if isinstance(group, str):
        return group
    try:
        return dist.ProcessGroup.unbox(group).group_name
    except RuntimeError:  # another object, such as a reduction
        return None


def _size(x: Tensor | list[Tensor]) -> int:
    return sum(map(_size, x)) if isinstance(x, list | tuple) else x.numel() * x.element_size()


def measure(run: DMD2Run, layouts: dict[str, tuple[int, ParallelConfig]] = LAYOUTS) -> list[dict[str, Any]]:
    """A row per layout, phase and axis: collectives with their calls and bytes on the rank that sends most, beside the formula."""
    rows = []
    for name, (world, layout) in layouts.items():
        results = ranks.run(world, count, run, layout)
        busiest, parameters = max(results, key=lambda result: sum(size for _, size in result[0].values()))
        expected = formula(run, layout, world, parameters)
        found: dict[tuple[str, str], dict[str, list[int]]] = {}
        for (phase, axis, what), entry in busiest.items():
            found.setdefault((phase, axis), {})[what] = entry
        for phase, axis in sorted(found.keys() | expected.keys(), key=lambda key: (PHASES.index(key[0]), key[1])):
            collectives = found.get((phase, axis), {})
            row = {"layout": name, "ranks": world, "phase": phase, "axis": axis, "collectives": collectives}
            rows.append(row | {"bytes": sum(size for _, size in collectives.values()), "formula": expected.get((phase, axis))})
    return rows


def count(run: DMD2Run, layout: ParallelConfig) -> tuple[dict[tuple[str, str, str], list[int]], int]:
    """On a rank: what is sent for one sample's forward and backward pass, and then to join the gradients of parameters that tp ranks hold
    in common; and the parameters of a tp rank."""
    topology = join(layout)
    student = new_transfer_net(run.net, topology, seed=0)
    method = KD(student, run.diffusion, seed=0)
    batch, cp = Clips(run).batch(topology.dp_group.rank(), 1), topology.cp_group
    if cp.size() > 1:
        batch = batch.cut(cp.rank(), cp.size())
    with Counter(_axes(topology)) as counter:
        loss = method.step(batch, 0).terms["kd"].value
        counter.phase = "backward"
        loss.backward()
        counter.phase = "gradients"
        pieces = Pieces(student, topology)
        pieces.take_gradients()
    parameters = sum(piece.shape.numel() // (1 if piece.split is None else layout.tp) for piece in pieces.values())
    return dict(counter.sent), parameters


def _axes(topology: Topology) -> dict[dist.ProcessGroup, str]:
    groups = {"tp": topology.tp_group, "cp": topology.cp_group}
    groups |= {name: topology.mesh.get_group(name) for name in ("shard", "replicate")}
    return {group: name for name, group in groups.items()}


def formula(run: DMD2Run, layout: ParallelConfig, world: int, parameters: int) -> dict[tuple[str, str], float]:
    """Bytes per rank, by phase and axis, as `plan.traffic` has them, for float32.

    Args:
        parameters: of a network before FSDP divides them.
    """
    net, tp, cp = run.net, layout.tp, layout.cp
    _, frames, height, width = run.diffusion.latent_shape
    blocks = net.blocks + net.control_blocks
    unit = frames * (height // PATCH) * (width // PATCH) / cp * net.hidden * BYTES
    shards = layout.shard or world // tp
    table = {}
    if cp > 1:
        attention = traffic.ring if layout.cp_attention == "ring" else traffic.ulysses
        table["cp"] = [blocks * moved for moved in attention(unit / tp, cp)]
    if tp > 1:
        table["tp"] = [blocks * moved for moved in traffic.tensor_parallel(unit, tp)]
    held = parameters * BYTES
    if shards > 1:
        table["shard"] = [traffic.gather(held, shards), 2 * traffic.gather(held, shards)]  # backward: gathered again, gradients scattered
    if world // tp > shards:
        table["replicate"] = [0.0, traffic.all_reduce(held / shards, world // tp // shards)]
    return {(phase, axis): value for axis, pair in table.items() for phase, value in zip(PHASES, pair, strict=False) if value}
