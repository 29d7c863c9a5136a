"""The infinite training order: a new permutation of all samples every epoch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).permutation(size)


def index_at(position: int, size: int, seed: int) -> int:
    """Sample that stands at a place of the training order; a pure function of its arguments.

    Args:
        position: place in the order, from 0 without end; epoch e covers e * size .. (e + 1) * size - 1, each sample once.
        size: number of samples.
        seed: key of the permutations, not negative.

    Raises:
        ValueError: a negative position or seed, or no samples.
    """
    if position < 0 or seed < 0 or size < 1:
        raise ValueError(f"position={position} and seed={seed} must not be negative, size={size} must be at least 1")
    epoch, offset = divmod(position, size)
    return int(_permutation(size, seed, epoch)[offset])
