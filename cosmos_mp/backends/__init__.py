"""Layers that differ between machines, behind one small protocol. Model files ask for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

AttentionCore = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query (S, B, H, D), keys and values (L, B, H, D) -> softmax(q k^T / sqrt(D)) v without a mask, (S, B, H * D)."""


class Backend(Protocol):
    """Builds the layers that tensor parallelism splits, and what stands between the linears of attention.

    Both linears carry `split_dim`, the dimension of their weight that is divided over the ranks, and `communicates`: whether they bring
    the ranks' tensors together themselves, or leave that to `parallel.tensor`. An attention core with `split_tokens` does the same for
    context parallelism.
    """

    def column_linear(self, inputs: int, outputs: int) -> nn.Module:
        """Bias-free linear layer whose outputs are split over the tensor-parallel ranks; (..., inputs) -> (..., outputs / tp)."""
        ...

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        """Bias-free linear layer whose inputs are split; (..., inputs / tp) -> (..., outputs), summed over the ranks."""
        ...

    def head_norm(self, size: int) -> nn.Module:
        """Root-mean-square norm of every head of x (S, B, H, size), then the turn of a rotation where one is given: `norm(x, rotation)`.

        Under its root it adds EPS of `kernels.qk_norm_rope`.
        """
        ...

    def attention(self) -> AttentionCore:
        """The attention core of one layer."""
        ...


def weights_changed(network: nn.Module) -> None:
    """Let layers that keep a quantised copy of their weights make it anew; after every step and load, or they compute with old ones.

    Transformer Engine (2.16 to 2.20) keeps no copy for layers under FSDP2, so this matters where networks are not sharded by it.
    """
    for module in network.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True
