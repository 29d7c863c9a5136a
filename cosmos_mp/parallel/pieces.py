"""What a rank holds of a network: for every parameter a rectangle, as an ordinary tensor.

Optimizer, average, clipping and checkpoints work on these and know neither DTensor nor any layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from cosmos_mp.parallel.tensor import partial_gradients, split_dims
from cosmos_mp.parallel.topology import Topology


@dataclass(frozen=True)
class Piece:
    """One rank's rectangle of a parameter.

    Attributes:
        parameter: its values, sharing memory with the network; dimension 0 may be empty.
        shape: of the whole parameter.
        offset: where the rectangle begins.
        split: dimension that tp divides, or None.
        summed: whether the gradients of the tp ranks add up to the whole one.
    """

    parameter: nn.Parameter
    shape: torch.Size
    offset: tuple[int, ...]
    split: int | None
    summed: bool

    def of(self, whole: Tensor) -> Tensor:
        """The same rectangle of another tensor of the parameter's shape."""
        return whole[tuple(slice(o, o + size) for o, size in zip(self.offset, self.parameter.shape, strict=True))]


class Pieces(Mapping[str, Piece]):
    """The pieces of one network by parameter name. Make them after the network has been sharded and given memory."""

    def __init__(self, network: nn.Module, topology: Topology):
        self.network, self.topology = network, topology
        splits = split_dims(network)
        summed = partial_gradients(network, topology.options.sequence_parallel) if topology.tp_group.size() > 1 else set()
        self._pieces = {name: self._piece(parameter, splits.get(name), name in summed) for name, parameter in network.named_parameters()}

    def __getitem__(self, name: str) -> Piece:
        return self._pieces[name]

    def __iter__(self):
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def _piece(self, parameter: nn.Parameter, split: int | None, summed: bool) -> Piece:
        group = self.topology.tp_group
        shape, offset = list(parameter.shape), [0] * parameter.dim()
        if split is not None:
            offset[split] = group.rank() * shape[split]
            shape[split] *= group.size()
        if not isinstance(parameter, DTensor):
            return Piece(parameter, torch.Size(shape), tuple(offset), split, summed)
        shards = self.topology.mesh["shard"]
        rows = -(-parameter.shape[0] // shards.size())  # as torch.chunk divides: the last shards may be short or empty
        offset[0] += min(shards.get_local_rank() * rows, parameter.shape[0])
        local = nn.Parameter(parameter.to_local().detach())
        return Piece(local, torch.Size(shape), tuple(offset), split, summed)

    # --- Gradients ---

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Give every piece its part of the network's gradient, complete: sums over tp that are still due are made here.

        Call it on all ranks, after the backward pass of a step's last micro-batch.
        """
        for (_, piece), parameter in zip(self._pieces.items(), self.network.parameters(), strict=True):
            gradient = parameter.grad
            piece.parameter.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        due = [piece.parameter.grad for piece in self.values() if piece.summed and piece.parameter.grad is not None]
        if due:
            flat = torch.cat([gradient.flatten() for gradient in due])
            dist.all_reduce(flat, group=self.topology.tp_group)
            for gradient, total in zip(due, flat.split([gradient.numel() for gradient in due]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def drop_gradients(self) -> None:
        """Forget the gradients, the network's and the pieces'."""
        self.network.zero_grad(set_to_none=True)
        for piece in self.values():
            piece.parameter.grad = None

    def square_norm(self) -> Tensor:
        """This rank's share of the squared gradient norm, float64: the shares of all ranks of the run add up to the whole."""
        holders = 1 if self.topology.mesh is None else self.topology.mesh.shape[0]  # ranks with the same piece: one in each replica
        squares = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double().square()
            / (holders if piece.split is not None else holders * self.topology.tp_group.size())
            for piece in self.values()
            if (g := piece.parameter.grad) is not None
        ]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.topology.device)

    # --- Checkpoints ---

    def as_stored(self, name: str, local: Tensor) -> Tensor:
        """A tensor laid out like a piece (its values, optimizer state or average) as torch.distributed.checkpoint understands it."""
        piece, topology = self[name], self.topology
        if topology.mesh is None or topology.mesh.size() == 1 or local.dim() == 0:
            return local
        rows: Shard | _StridedShard = Shard(0)
        if piece.split == 0 and topology.tp_group.size() > 1:  # tp has divided the rows first, FSDP then each part
            rows = _StridedShard(0, split_factor=topology.tp_group.size())
        columns = Replicate() if piece.split is None else Shard(piece.split)
        stride = torch.empty(piece.shape, device="meta").stride()
        return DTensor.from_local(local, topology.mesh["shard", "tp"], [rows, columns], run_check=False, shape=piece.shape, stride=stride)


class Wholes(Mapping[str, Tensor]):
    """A network's parameters whole, one at a time and never two: to read one, all ranks of the run read it."""

    def __init__(self, pieces: Pieces):
        self.pieces = pieces

    def __getitem__(self, name: str) -> Tensor:
        stored = self.pieces.as_stored(name, self.pieces[name].parameter.detach())
        return stored.full_tensor() if isinstance(stored, DTensor) else stored

    def __iter__(self):
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def agree(values: Sequence[Tensor], topology: Topology) -> Tensor:
    """Scalars of every rank, float64 (world, n): what is decided on them is decided alike everywhere."""
    mine = torch.stack([value.detach().double().to(topology.device) for value in values])
    if topology.mesh is None or topology.world == 1:
        return mine[None]
    everyone = mine.new_empty(topology.world * len(mine))
    dist.all_gather_into_tensor(everyone, mine)
    return everyone.view(topology.world, -1)
