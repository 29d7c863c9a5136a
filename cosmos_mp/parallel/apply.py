"""All that is done to a network for a layout, in order. A network is built on the meta device and has no memory until the end."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from cosmos_mp.models.block import Block
from cosmos_mp.parallel.context import context_parallel
from cosmos_mp.parallel.fsdp import settle, shard
from cosmos_mp.parallel.recompute import recompute
from cosmos_mp.parallel.tensor import tensor_parallel
from cosmos_mp.parallel.topology import Topology


def parallelize(
    network: nn.Module,
    topology: Topology,
    *,
    recompute_mode: Literal["none", "selective", "full"] = "none",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Lay a network that lies on the meta device out over the run's ranks, and give each rank memory for its own part alone.

    Returns:
        The same network, its values undefined, every parameter trainable.
    """
    tensor_parallel(network, topology)
    context_parallel(network, topology)
    recompute(network, Block, recompute_mode)
    network.to(dtype)
    if topology.mesh is not None:
        shard(network, topology)
    network.to_empty(device=topology.device)
    settle(network)
    return network
