"""Bytes that a rank sends in one forward and backward pass, from formulas. What is kept for itself is not sent.

`unit` is a rank's residual stream: its tokens x width x bytes per number.
"""

from __future__ import annotations


def ulysses(unit: float, cp: int) -> tuple[float, float]:
    """One block's self-attention, forward and backward: queries, keys, values and the result change places by all-to-all."""
    moved = 4 * unit * (cp - 1) / cp
    return moved, moved


def ring(unit: float, cp: int) -> tuple[float, float]:
    """The same by a ring: keys and values pass cp - 1 ranks; on the way back their gradients travel with them."""
    moved = 2 * unit * (cp - 1)
    return moved, 2 * moved


def tensor_parallel(unit: float, tp: int) -> tuple[float, float]:
    """One block over tp ranks that see the same tokens: an all-reduce, or with sequence parallelism a gather and a scattered sum, for each
    of self-attention, cross-attention and MLP."""
    moved = 3 * all_reduce(unit, tp)
    return moved, moved


def gather(whole: float, ranks: int) -> float:
    """A tensor of which every rank has its part comes to all of them; a sum of whole tensors scattered to parts sends as much."""
    return whole * (ranks - 1) / ranks


def all_reduce(whole: float, ranks: int) -> float:
    """A sum that every rank gets: scattered, then gathered."""
    return 2 * gather(whole, ranks)
