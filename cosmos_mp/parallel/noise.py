"""Randomness as a function of (seed, purpose, iteration, sample), never of rank or history.

Each sample draws at its full shape from a generator of its own, so any layout sees the same numbers and a resumed run needs no generator
state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, iteration: int, sample: int) -> torch.Generator:
    """A CPU generator for one draw; keys that differ in any part give unrelated streams."""
    key = f"{seed}/{purpose}/{iteration}/{sample}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)


def _draw(draw: Callable[[torch.Generator], Tensor], seed: int, purpose: str, iteration: int, samples: Tensor | Sequence[int]) -> Tensor:
    return torch.stack([draw(generator(seed, purpose, iteration, int(sample))) for sample in samples])


def normal(
    shape: Sequence[int], seed: int, purpose: str, iteration: int, samples: Tensor | Sequence[int], like: Tensor | None = None
) -> Tensor:
    """Standard normal numbers (B, *shape), one row per sample; float32, or the device and dtype of `like`."""
    values = _draw(lambda g: torch.randn(tuple(shape), generator=g), seed, purpose, iteration, samples)
    return values if like is None else values.to(like)


def uniform(seed: int, purpose: str, iteration: int, samples: Tensor | Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), float64 (B,)."""
    return _draw(lambda g: torch.rand((), generator=g, dtype=torch.float64), seed, purpose, iteration, samples)


def integers(low: int, high: int, seed: int, purpose: str, iteration: int, samples: Tensor | Sequence[int]) -> Tensor:
    """Integers in low..high, both ends included, int64 (B,)."""
    return _draw(lambda g: torch.randint(low, high + 1, (), generator=g), seed, purpose, iteration, samples)
