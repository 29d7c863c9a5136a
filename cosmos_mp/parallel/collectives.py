"""Collectives with gradients. Each backward is the transpose of its forward: what the ranks' objectives say about an input is summed.

The first dimension is the one that is split and gathered. Over a group of one rank all of them return their input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

Group = dist.ProcessGroup


def _sum(x: Tensor, group: Group) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def _gather(x: Tensor, group: Group) -> Tensor:
    return functional.wait_tensor(functional.all_gather_tensor(x.contiguous(), 0, group))


def _scatter_sum(x: Tensor, group: Group) -> Tensor:
    return functional.wait_tensor(functional.reduce_scatter_tensor(x.contiguous(), "sum", 0, group))


def _exchange(x: Tensor, group: Group) -> Tensor:
    return functional.wait_tensor(functional.all_to_all_single(x.contiguous(), None, None, group))


def _own(x: Tensor, group: Group) -> Tensor:
    return x.chunk(group.size())[group.rank()].contiguous()


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: Any, back: Any) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.group), None, None, None


def _apply(x: Tensor, group: Group, there: Any, back: Any) -> Tensor:
    return x if group.size() == 1 else _Collective.apply(x, group, there, back)


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks, for ranks whose objectives are added up: the gradients are summed likewise."""
    return _apply(x, group, _sum, _sum)


def exchange(x: Tensor, group: Group) -> Tensor:
    """All-to-all: part r of the first dimension goes to rank r."""
    return _apply(x, group, _exchange, _exchange)


def gather(x: Tensor, group: Group) -> Tensor:
    """Parts of all ranks one after another, each rank going on with work of its own: gradients are summed and scattered."""
    return _apply(x, group, _gather, _scatter_sum)


def scatter_sum(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks, of which each keeps its part; the transpose of `gather`."""
    return _apply(x, group, _scatter_sum, _gather)


def enter(x: Tensor, group: Group) -> Tensor:
    """The same tensor on every rank, each going on with work of its own: gradients are summed."""
    return _apply(x, group, _same, _sum)


def split(x: Tensor, group: Group) -> Tensor:
    """This rank's part of a tensor that every rank holds whole; its gradient is put together again."""
    return _apply(x, group, _own, _gather)


def join(x: Tensor, group: Group) -> Tensor:
    """Parts of all ranks one after another, every rank going on with the same work: each keeps its part of the gradient."""
    return _apply(x, group, _gather, _own)


def leave(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks, every rank going on with the same work: the gradient is already the same everywhere."""
    return _apply(x, group, _sum, _same)
