"""FP8 linears as arithmetic alone, on any device: operands are rounded to float8 values and multiplied in float32.

What Transformer Engine's recipes do to the three products of a linear layer, so that their accuracy can be measured without a GPU:

    product                       operands                   current: one scale per tensor   block: one scale per 128 values
    output    x W^T               activation, weight         E4M3, E4M3                      E4M3 1 x 128, E4M3 128 x 128
    gradient of x    g W          gradient, weight           E5M2, E4M3                      E4M3 1 x 128, E4M3 128 x 128
    gradient of W    g^T x        gradient, activation       E5M2, E4M3                      E4M3 128 x 1, E4M3 128 x 1 (along tokens)

It is slower than plain products and saves no memory. Every rank scales what it holds: its shard of a tensor-parallel weight, its tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cosmos_mp.config import FP8Recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
Tile = tuple[int, int]
"""Rows and columns of a block whose values share a scale."""


class Recipe(NamedTuple):
    """The type of gradients, and the tiles of an operand along its rows, along its columns, and of a weight; None = the whole tensor."""

    gradient: torch.dtype
    rows: Tile | None
    columns: Tile | None
    weight: Tile | None


RECIPES: dict[FP8Recipe, Recipe] = {
    "current": Recipe(E5M2, None, None, None),
    "block": Recipe(E4M3, (1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)),
}
EXCEPT = (".cross_attn.k", ".cross_attn.v")
"""Split linears that stay as they are: they read the text, which is short. All that is not split stays so too: embedders, modulation,
final layer, the control's MLP and zero linears."""


def linears(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that compute in FP8, by name: the split linears of its blocks, but for `EXCEPT`."""
    split = {name: module for name, module in network.named_modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)}
    return {name: module for name, module in split.items() if not name.endswith(EXCEPT)}


def emulate(network: nn.Module, recipe: FP8Recipe) -> None:
    """Let a network's linears compute as in FP8, forward and backward; in place."""
    for module in linears(network).values():
        # megatron's own way in for another product; what it communicates lies around it.
        module._forward_impl = partial(_linear, RECIPES[recipe])


def quantise(x_MN: Tensor, kind: torch.dtype, tile: Tile | None) -> Tensor:
    """The values of a matrix that float8 leaves of it, in float32.

    A block is multiplied by largest value of the type / its largest value, rounded, and divided again. With tiles that factor is rounded
    down to a power of two, as Transformer Engine does it by default. At the edges of a matrix, blocks are what is left of them; hardware
    wants multiples of 16, or of 128 for blocks. A matrix without values stays as it is.

    Args:
        kind: E4M3 or E5M2. What lies beyond its range becomes its largest value; NaN stays.
        tile: None = one scale for all.
    """
    x = x_MN.float()
    if not x.numel():
        return x
    if tile is None:
        return _round(x, _scale(x.abs().amax(), kind), kind)
    (rows, columns), (a, b) = x.shape, tile
    blocks = F.pad(x, (0, -columns % b, 0, -rows % a)).unflatten(1, (-1, b)).unflatten(0, (-1, a))
    scale = _scale(blocks.abs().amax(dim=(1, 3), keepdim=True), kind)
    scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)  # sign and exponent alone
    return _round(blocks, scale, kind).flatten(2).flatten(0, 1)[:rows, :columns]


def _scale(amax: Tensor, kind: torch.dtype) -> Tensor:
    """largest value / amax, a finite float32; 1 where there is nothing to scale, or nothing finite."""
    # Of a number and a tensor, torch would multiply by the reciprocal, which rounds twice.
    scale = (torch.full_like(amax, torch.finfo(kind).max) / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)


def _round(x: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    largest = torch.finfo(kind).max
    # The conversion itself would make NaN (E4M3) or infinity (E5M2) of what is too large.
    return (x * scale).clamp(-largest, largest).to(kind).float() * (1 / scale)


class _Linear(torch.autograd.Function):
    """x (..., I), W (O, I) -> x W^T (..., O). Operands are kept as they came and rounded again: FSDP frees and refills weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        out = quantise(x.flatten(0, -2), E4M3, recipe.rows) @ quantise(weight, E4M3, recipe.weight).t()
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), recipe = ctx.saved_tensors, ctx.recipe
        g, of_x, of_weight = gradient.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            of_x = quantise(g, recipe.gradient, recipe.rows) @ quantise(weight, E4M3, recipe.weight)
            of_x = of_x.to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            of_weight = quantise(g, recipe.gradient, recipe.columns).t() @ quantise(x.flatten(0, -2), E4M3, recipe.columns)
            of_weight = of_weight.to(weight.dtype)
        return of_x, of_weight, None


def _linear(recipe: Recipe, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return _Linear.apply(input, weight, recipe)
