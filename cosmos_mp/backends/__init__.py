"""Layers that differ between machines, behind one small protocol. Model files ask for nothing else."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Backend(Protocol):
    """Builds the layers that tensor parallelism splits, and the attention core."""

    def column_linear(self, inputs: int, outputs: int) -> nn.Module:
        """Bias-free linear layer whose outputs are split over the tensor-parallel ranks; (..., inputs) -> (..., outputs / tp)."""
        ...

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        """Bias-free linear layer whose inputs are split; (..., inputs / tp) -> (..., outputs), summed over the ranks."""
        ...

    def attention(self, query_SBHD: Tensor, key_SBHD: Tensor, value_SBHD: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v without a mask; returns (S, B, H * D)."""
        ...
