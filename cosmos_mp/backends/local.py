"""The backend that runs anywhere: megatron-core's tensor-parallel linears and torch's attention."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from cosmos_mp.backends import AttentionCore
from cosmos_mp.kernels.qk_norm_rope import EPS, qk_norm_rope


class _Column(ColumnParallelLinear):
    split_dim, communicates = 0, False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(RowParallelLinear):
    split_dim, communicates = 1, False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _HeadNorm(nn.RMSNorm):
    def forward(self, x_SBHD: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return qk_norm_rope(x_SBHD, self.weight, *(rotation or ()))


class LocalBackend:
    """Layers on the tensor-parallel group of `tp_group`, made for construction on the meta device."""

    def __init__(self, tp_group: dist.ProcessGroup):
        self.tp_group = tp_group
        # use_cpu_initialization keeps megatron off CUDA; perform_initialization must stay on, or weights lose their parallel attributes.
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=dist.get_world_size(tp_group), use_cpu_initialization=True, perform_initialization=True
        )

    def column_linear(self, inputs: int, outputs: int) -> nn.Module:
        return _Column(inputs, outputs, bias=False, gather_output=False, **self._common())

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        return _Row(inputs, outputs, bias=False, input_is_parallel=True, skip_bias_add=True, **self._common())

    def head_norm(self, size: int) -> nn.Module:
        return _HeadNorm(size, eps=EPS)

    def attention(self) -> AttentionCore:
        return attend

    def _common(self) -> dict:
        # Values come later, by name, from weights or from models.initialize.
        return {"config": self.config, "init_method": torch.nn.init.zeros_, "tp_group": self.tp_group}


def attend(query_SBHD: Tensor, key_SBHD: Tensor, value_SBHD: Tensor) -> Tensor:
    """torch's attention, in the kernel that it finds."""
    length, batch, heads, size = query_SBHD.shape
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBHD, value_SBHD))
    out = F.scaled_dot_product_attention(query, key, value)
    return out.permute(2, 0, 1, 3).reshape(length, batch, heads * size)
