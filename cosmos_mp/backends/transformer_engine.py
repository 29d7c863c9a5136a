"""Layers by Transformer Engine through megatron-core, on a GPU in bfloat16 or FP8. Never run on a GPU so far.

Its linears communicate over the tensor-parallel ranks themselves, and its attention over the context-parallel ones: `parallel` leaves both
alone. Weights have the names and shapes of the local backend's.

megatron-core's extension looks for Transformer Engine once, when it is imported, and makes mocks of its classes where there is none. So
this module is imported by `choice` alone, which has looked before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TEDotProductAttention, TERowParallelLinear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

from cosmos_mp.backends.fp8 import EXCEPT
from cosmos_mp.config import ConfigError, FP8Recipe, NetConfig
from cosmos_mp.kernels import fused
from cosmos_mp.kernels.qk_norm_rope import EPS, qk_norm_rope, rotate

RECIPES = {
    "current": (recipes.Float8CurrentScaling, te.is_fp8_available),
    "delayed": (recipes.DelayedScaling, te.is_fp8_available),
    "block": (recipes.Float8BlockScaling, te.is_fp8_block_scaling_available),
    "mxfp8": (recipes.MXFP8BlockScaling, te.is_mxfp8_available),
}
"""A recipe, and whether the GPU has it. Their attention stays in bfloat16 (fp8_dpa is off by default)."""


class _Linear:
    """What both linears add to megatron's: FP8 around their own product, and the product alone as result."""

    communicates = True
    region: Callable[[], AbstractContextManager] | None = None
    """Opens that FP8. (`fp8` is Transformer Engine's own name, set anew in every forward.)"""

    def forward(self, x: Tensor) -> Tensor:
        with self.region() if self.region else nullcontext():
            return super().forward(x)[0]


class _Column(_Linear, TEColumnParallelLinear):
    split_dim = 0


class _Row(_Linear, TERowParallelLinear):
    split_dim = 1


class _HeadNorm(te.RMSNorm):
    """Root-mean-square norm of heads (S, B, H, D), then their rotation. Where our fused kernel runs, it does both in one pass."""

    def forward(self, x_SBHD: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if fused(x_SBHD):
            return qk_norm_rope(x_SBHD, self.weight, *(rotation or ()))
        x = super().forward(x_SBHD)
        return x if rotation is None else rotate(x, *rotation)


class _Attention(TEDotProductAttention):
    """Attention without a mask, over all tokens that the ranks of cp hold together once it has been told of them."""

    parts = 1

    def forward(self, query_SBHD: Tensor, key_SBHD: Tensor, value_SBHD: Tensor) -> Tensor:
        if self.parts > 1 and len(query_SBHD) % 2:
            raise ConfigError(
                f"Transformer Engine's context parallelism halves a rank's tokens, here {len(query_SBHD)} = T/cp x H/2 x W/2 of "
                "diffusion.latent_shape: change parallel.cp, or set backend.kind to local"
            )
        out = super().forward(query_SBHD, key_SBHD, value_SBHD, None, AttnMaskType.no_mask)
        _tell_attention()
        return out

    def split_tokens(self, groups: Sequence[dist.ProcessGroup], whole: dist.ProcessGroup, communication: str) -> None:
        """From now on every rank of `whole` calls it with its part of the tokens, in order.

        Args:
            groups: that of the ranks, or for "a2a+p2p" those that trade heads and those that form a ring.
            communication: p2p, a2a or a2a+p2p. Without a mask the order of tokens that Transformer Engine would have does not matter.
        """
        self.parts = whole.size()
        if _Attention.cp_stream is None:
            _Attention.cp_stream = torch.cuda.Stream()
        group = groups[0] if len(groups) == 1 else list(groups)
        self.set_context_parallel_group(group, dist.get_process_group_ranks(whole), _Attention.cp_stream, communication)


class TransformerEngineBackend:
    """Layers on the tensor-parallel group of `tp_group`, without memory until they are given some."""

    def __init__(self, net: NetConfig, tp_group: dist.ProcessGroup, *, sequence_parallel: bool = False):
        self.tp_group = tp_group
        # params_dtype is the masters'; FSDP gathers them in bfloat16. Context parallelism is turned on later, for self-attention alone.
        self.config = TransformerConfig(
            num_layers=net.blocks,
            hidden_size=net.hidden,
            num_attention_heads=net.heads,
            tensor_model_parallel_size=tp_group.size(),
            sequence_parallel=sequence_parallel,
            params_dtype=torch.float32,
            init_model_with_meta_device=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            cuda_graph_scope=None,  # its default is deprecated by megatron itself
        )

    def column_linear(self, inputs: int, outputs: int) -> nn.Module:
        return _Column(inputs, outputs, gather_output=False, **self._common())

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        return _Row(inputs, outputs, input_is_parallel=True, **self._common())

    def head_norm(self, size: int) -> nn.Module:
        return _HeadNorm(size, eps=EPS, params_dtype=torch.float32, device="meta")

    def attention(self) -> nn.Module:
        groups = ProcessGroupCollection(tp=self.tp_group, cp=None)
        return _Attention(self.config, 1, AttnMaskType.no_mask, "self", pg_collection=groups)

    def _common(self) -> dict[str, Any]:
        # Values come later, by name, from weights or from models.initialize.
        return {
            "config": self.config,
            "init_method": nn.init.zeros_,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }


def use_fp8(network: nn.Module, recipe: FP8Recipe) -> None:
    """Let the linears of a network's blocks, but for `EXCEPT`, compute in FP8; in place.

    Raises:
        ConfigError: the GPU lacks the recipe.
    """
    kind, available = RECIPES[recipe]
    has, reason = available(return_reason=True)
    if not has:
        raise ConfigError(f"backend.recipe={recipe} does not run on this GPU: {reason}; give another recipe, or set backend.fp8 to off")
    made, linears = kind(), {name: module for name, module in network.named_modules() if isinstance(module, _Linear)}
    excepted = {name for name in linears if name.endswith(EXCEPT)}
    if recipe == "delayed":
        # It moves its scales at the end of a region, which must therefore be one whole call.
        network.forward = partial(_within, network.forward, partial(te.autocast, enabled=True, recipe=made))
        for name in excepted:
            linears[name].region = partial(te.autocast, enabled=False)
    else:
        # Opened inside of what is recomputed, so that the second forward sees it too; attention and norms lie outside.
        for name in linears.keys() - excepted:
            linears[name].region = partial(te.autocast, enabled=True, recipe=made)


def _within(forward: Callable, context: Callable[[], AbstractContextManager], *args: Any, **kwargs: Any) -> Any:
    with context():
        return forward(*args, **kwargs)


_told: set[str] = set()


def _tell_attention() -> None:
    """Print, on the first rank and once each, the kernels that Transformer Engine found for attention: unfused ones need S x S memory."""
    found = dot_product_attention._attention_backends
    kinds = [kind for kind in ("flash", "fused", "unfused") if found.get(f"use_{kind}_attention")]
    words = " ".join(kinds) or "not told"
    if words not in _told:
        _told.add(words)
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
            print(f"attention: Transformer Engine's {words} kernels")
