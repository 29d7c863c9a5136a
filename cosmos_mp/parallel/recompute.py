"""Activation recomputation, applied from outside."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from cosmos_mp.models.block import Block


def recompute_blocks(network: nn.Module) -> None:
    """Keep only the inputs of each transformer block in the forward pass and run it again in the backward pass."""
    for block in network.modules():
        if isinstance(block, Block):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
