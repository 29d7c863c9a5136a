"""Context parallelism: every rank of cp holds an equal part of each clip along its latent frames.

Embeddings, cross-attention, MLPs and norms act on tokens alone and stay local; self-attention is the one place where frames meet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cosmos_mp.models.block import Block
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.dit import Trunk
from cosmos_mp.parallel import collectives
from cosmos_mp.parallel.attention import ring, ulysses
from cosmos_mp.parallel.topology import Topology


def frame_sums(topology: Topology) -> Callable[[Tensor], Tensor] | None:
    """Adds a tensor up over the holders of a clip's frames; None where one process holds them all."""
    return partial(collectives.sum_over, group=topology.cp_group) if topology.cp_group.size() > 1 else None


@torch.no_grad()
def whole_clips(part_BCTHW: Tensor, topology: Topology) -> Tensor:
    """All frames of latents of which every rank of cp holds its part."""
    return collectives.join(part_BCTHW.movedim(2, 0).contiguous(), topology.cp_group).movedim(0, 2)


COMMUNICATION = {"ulysses": "a2a", "ring": "p2p", "ulysses_ring": "a2a+p2p"}
"""`parallel.cp_attention` in Transformer Engine's words."""


def context_parallel(network: nn.Module, topology: Topology) -> None:
    """Let a network, or a discriminator, work on this rank's part of the frames, in place."""
    group = topology.cp_group
    if group.size() == 1:
        return
    for module in network.modules():
        if isinstance(module, Block):
            core, way = module.self_attn.attend, topology.options.cp_attention
            if hasattr(core, "split_tokens"):
                core.split_tokens(topology.cp_levels or [group], group, COMMUNICATION[way])
            else:
                module.self_attn.attend = ring(group) if way == "ring" else ulysses(core, group)
        if isinstance(module, Trunk | Discriminator):
            module.part = group.rank()
        if hasattr(module, "across"):
            module.across = frame_sums(topology)
