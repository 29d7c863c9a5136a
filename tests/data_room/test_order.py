"""The training order: every sample once per epoch, a pure function of place, size and seed."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_mp.data import order
from cosmos_mp.data.order import index_at


def epoch(size: int, seed: int, number: int) -> list[int]:
    return [index_at(number * size + i, size, seed) for i in range(size)]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_every_epoch_holds_every_index_once(size: int) -> None:
    for number in range(4):
        assert sorted(epoch(size, 3, number)) == list(range(size))


def test_epochs_and_seeds_are_in_different_orders() -> None:
    orders = [epoch(50, seed, number) for seed in (0, 1, 2**40) for number in range(5)]
    assert len({tuple(x) for x in orders}) == 15
    assert list(range(50)) not in orders


def test_it_is_a_pure_function_whatever_was_asked_before() -> None:
    places = np.random.default_rng(0).integers(0, 700, 200)
    first = [index_at(int(p), 7, 5) for p in places]
    order._permutation.cache_clear()
    assert [index_at(int(p), 7, 5) for p in reversed(places)] == first[::-1]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert [index_at(p, 6, 1) for p in range(12)] == [4, 5, 1, 2, 3, 0, 3, 4, 5, 1, 0, 2]


def test_every_index_is_as_likely_at_every_place() -> None:
    counts = np.bincount([index_at(5 * number, 5, 0) for number in range(2000)], minlength=5)
    assert abs(counts - 400).max() < 80


@pytest.mark.parametrize("arguments", [(-1, 5, 0), (0, 0, 0), (0, 5, -1)])
def test_bad_arguments_are_named(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"position=.* seed=.* size="):
        index_at(*arguments)
