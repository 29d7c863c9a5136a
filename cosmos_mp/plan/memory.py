"""Bytes that a rank will hold of each role, from the layout alone: *predicted*, with nothing allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cosmos_mp.config import ParallelConfig
from cosmos_mp.models.block import Block
from cosmos_mp.parallel.tensor import split_dims

MASTER = 4
"""Bytes of a float32 number: masters, gradients, both moments of AdamW, averages."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes on the rank that holds most.

    Attributes:
        parameters: of the whole role, a count.
        masters, gradients, adam, average: this rank's part; gradients and moments of trained roles alone.
        accumulated: whole gradients between the micro-batches of a step, where they are reduced once and not kept sharded.
        gathered: weights that are whole for a moment: the outermost unit and the largest block, in the type of the computation.
    """

    parameters: int
    masters: int
    gradients: int
    adam: int
    average: int
    accumulated: int
    gathered: int

    @property
    def lasting(self) -> int:
        """What stays from iteration to iteration."""
        return self.masters + self.adam + self.average


def role_memory(
    network: nn.Module, options: ParallelConfig, dp: int, *, trained: bool, averaged: bool = False, micro_batches: int = 1
) -> RoleMemory:
    """Memory of one network, built whole on the meta device, in a layout with `dp` data-parallel groups."""
    ranks = dp * options.cp
    shards = options.shard or ranks
    mine = sum(_first_rank(shape, shards) for _, shape in _over_tp(network, options.tp))
    whole = sum(shape.numel() for _, shape in _over_tp(network, options.tp))
    blocks = [sum(shape.numel() for _, shape in _over_tp(block, options.tp)) for block in network.modules() if isinstance(block, Block)]
    size = 4 if options.compute == "float32" else 2
    flat = shards == ranks and options.reduce == "step" and micro_batches > 1
    return RoleMemory(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        masters=MASTER * mine,
        gradients=MASTER * mine if trained else 0,
        adam=2 * MASTER * mine if trained else 0,
        average=MASTER * mine if averaged else 0,
        accumulated=MASTER * whole if trained and flat else 0,
        gathered=size * (whole - sum(blocks) + max(blocks, default=0)),
    )


def _over_tp(network: nn.Module, tp: int) -> Iterator[tuple[str, torch.Size]]:
    """Shapes of the parameters on one rank of tp."""
    splits = split_dims(network)
    for name, parameter in network.named_parameters():
        shape = list(parameter.shape)
        if name in splits:
            shape[splits[name]] //= tp
        yield name, torch.Size(shape)


def _first_rank(shape: torch.Size, shards: int) -> int:
    """Elements of the first shard along dimension 0, which is never smaller than another."""
    return -(-shape[0] // shards) * shape[1:].numel()
