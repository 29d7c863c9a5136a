"""Self-attention over a context-parallel group, whose ranks hold the tokens in order, an equal part each.

Both ways give a function like `Backend.attention`: every rank calls it with its part (S / cp, B, H, D) of all its heads and gets the same
part of the result, (S / cp, B, H * D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosmos_mp.parallel.collectives import exchange

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
aten = torch.ops.aten


def ulysses(attention: Attention, group: dist.ProcessGroup) -> Attention:
    """Ranks trade tokens for heads and back, by one all-to-all each: `attention` sees all tokens of H / cp heads.

    The function raises ValueError where the heads do not divide among the ranks.
    """
    ranks = group.size()

    def attend(query_SBHD: Tensor, key_SBHD: Tensor, value_SBHD: Tensor) -> Tensor:
        heads = query_SBHD.shape[2]
        if heads % ranks:
            raise ValueError(
                f"{heads} attention heads do not divide among {ranks} context-parallel ranks; ring attention needs no division"
            )
        parts = [x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4) for x in (query_SBHD, key_SBHD, value_SBHD)]
        whole = exchange(torch.stack(parts, dim=2), group).flatten(0, 1)  # (S, 3, B, H / cp, D)
        out = exchange(attention(*whole.unbind(1)), group)
        return out.unflatten(0, (ranks, -1)).permute(1, 2, 0, 3).flatten(2)

    return attend


def ring(group: dist.ProcessGroup) -> Attention:
    """Keys and values travel round the ranks while each attends from its own queries; any number of heads.

    The function raises ValueError for dtypes that the kernel lacks. The GPU kernels were not run on a GPU.
    """

    def attend(query_SBHD: Tensor, key_SBHD: Tensor, value_SBHD: Tensor) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBHD, value_SBHD))
        # The kernel reads numbers of a head as neighbours and does not check that they are; the stack is contiguous anyway.
        return _Ring.apply(query.contiguous(), torch.stack((key, value)), group).permute(2, 0, 1, 3).flatten(2)

    return attend


class _Ring(torch.autograd.Function):
    """Query (B, H, S / cp, D), keys and values (2, B, H, S / cp, D). Sums are in the dtype of the logsumexp, at least float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, pair: Tensor, group: dist.ProcessGroup) -> Tensor:
        own, ranks = pair, group.size()
        for step in range(ranks):
            arriving = _pass_on(pair, group) if step + 1 < ranks else None
            block, block_lse = _attend(query, *pair)
            if step == 0:
                out, lse = block.to(block_lse.dtype), block_lse
            else:
                # A block weighs exp(block_lse) beside the exp(lse) of all blocks before it.
                # Not in place: selective recomputation keeps what the kernel returned.
                out = torch.lerp(out, block.to(out.dtype), torch.sigmoid(block_lse - lse)[..., None])
                lse = torch.logaddexp(lse, block_lse)
            pair = arriving() if arriving else pair
        out = out.to(query.dtype)
        ctx.group = group
        ctx.save_for_backward(query, own, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        query, pair, out, lse = ctx.saved_tensors
        ranks, query_gradient, returning = ctx.group.size(), 0, None
        for step in range(ranks):
            arriving = _pass_on(pair, ctx.group) if step + 1 < ranks else None
            # With the result and the logsumexp of all blocks, a block gives exactly its own share of the gradients.
            query_share, *share = _attend_backward(gradient, query, *pair, out, lse)
            query_gradient = query_gradient + query_share.to(lse.dtype)
            total = torch.stack(share).to(lse.dtype)
            if returning:
                total += returning()
            returning = _pass_on(total, ctx.group)  # one rank behind the keys and values: the last step brings it to their owner
            pair = arriving() if arriving else pair
        return query_gradient, returning(), None  # autograd rounds them to the dtype of the inputs


def _pass_on(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start sending to the next rank of the ring; what is returned waits for the tensor of the rank before."""
    ranks, here = dist.get_process_group_ranks(group), group.rank()
    if len(ranks) == 1:
        return lambda: x
    received = torch.empty_like(x)
    send = dist.P2POp(dist.isend, x, ranks[(here + 1) % len(ranks)], group)
    receive = dist.P2POp(dist.irecv, received, ranks[here - 1], group)
    transfers = dist.batch_isend_irecv([send, receive])

    def wait() -> Tensor:
        for transfer in transfers:
            transfer.wait()
        return received

    return wait


def _attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and the natural logarithm of its denominators (B, H, S)."""
    if not query.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"ring attention on a GPU takes bfloat16 or float16, not {query.dtype}; Ulysses attention takes any")
    return aten._scaled_dot_product_flash_attention(query, key, value)[:2]


def _attend_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    tensors = (gradient, query, key, value, out, lse)
    if not query.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, False)
    unused = query.new_zeros(2, dtype=torch.uint64)  # the random state of dropout, of which there is none
    lengths = (None, None, query.shape[2], key.shape[2])  # all of one length: no list of them
    return aten._scaled_dot_product_flash_attention_backward(*tensors, *lengths, 0.0, False, unused, unused)
