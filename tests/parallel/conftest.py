"""A laid-out network, and stand-ins for groups of several ranks where one process is enough to see what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from cosmos_mp.config import ParallelConfig
from cosmos_mp.models.weights import load_weights, named_weights
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import join
from cosmos_mp.roles import transfer_net


@dataclass(frozen=True)
class Ranks:
    """What a group says of itself: this rank's place among `count`."""

    place: int
    count: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.count

    def get_local_rank(self) -> int:
        return self.place


@pytest.fixture
def ranks() -> type[Ranks]:
    return Ranks


@pytest.fixture
def lay_out(tiny_net, make_network) -> Callable[..., tuple[nn.Module, Pieces]]:
    """A tiny network as a run of one process has it, under FSDP, with the values of `make_network(seed)`; and its pieces."""

    def make(options: ParallelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32, recompute: str = "none"):
        topology = join(options or ParallelConfig())
        network = transfer_net(tiny_net(), topology, recompute, dtype)
        pieces = Pieces(network, topology)
        load_weights(pieces, named_weights(make_network(seed, dtype)), "random weights")
        return network, pieces

    return make
