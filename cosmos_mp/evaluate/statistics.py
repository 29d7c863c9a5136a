"""Bootstrap confidence intervals over samples (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from cosmos_mp.evaluate.metrics import as_float64


class Interval(NamedTuple):
    """A statistic of the whole sample with the two ends of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float], *arrays: Tensor | ArrayLike, repeats: int = 200, seed: int = 0, level: float = 0.95
) -> Interval:
    """`statistic(*arrays)` and its confidence interval, by drawing samples with replacement.

    Axis 0 of every array counts the same N samples; one draw takes the same rows of all of them, so that what a sample adds to both sides
    of a difference or ratio cancels. The quantiles of the draws are shifted to have their mean at the value: a draw repeats samples, which
    inflates a Fréchet distance, and unshifted its interval would lie beside its own value. Equal seeds give equal draws, so intervals of
    several variants over the same samples are comparable. Raises ValueError for unequal or too short arrays, bad options, or a statistic
    that is not finite.
    """
    rows = [as_float64(array) for array in arrays]
    lengths = [len(row) for row in rows]
    if not rows or min(lengths) < 2 or len(set(lengths)) != 1:
        raise ValueError(f"bootstrap: needs arrays over the same N >= 2 samples, got lengths {lengths}")
    if repeats < 2 or not 0 < level < 1:
        raise ValueError(f"bootstrap: needs repeats >= 2 and 0 < level < 1, got repeats={repeats}, level={level}")
    rng = np.random.default_rng(seed)
    value = float(statistic(*rows))
    picks = rng.integers(lengths[0], size=(repeats, lengths[0]))
    draws = np.array([float(statistic(*(row[pick] for row in rows))) for pick in picks])
    if not (np.isfinite(value) and np.isfinite(draws).all()):
        raise ValueError(f"bootstrap: the statistic is not finite (value {value}, {(~np.isfinite(draws)).sum()} of {repeats} draws)")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) + (value - draws.mean())
    return Interval(value, float(low), float(high))


def ratio_of_means(x_N: np.ndarray, reference_N: np.ndarray) -> float:
    """Mean of x over mean of the reference, as sharpness and texture are reported. Raises ValueError if the reference's mean is 0."""
    reference = float(np.mean(reference_N))
    if reference == 0:
        raise ValueError("ratio_of_means: the reference's mean is 0, so there is nothing to compare with; leave this metric out")
    return float(np.mean(x_N)) / reference
