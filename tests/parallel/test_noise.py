"""Randomness as a pure function of its key."""

from __future__ import annotations

import itertools

import pytest
import torch

from cosmos_mp.parallel import noise


def test_draws_are_pure_and_ignore_the_global_generator():
    torch.manual_seed(1)
    first = noise.normal((3,), 0, "eps", 4, [5, 6])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(noise.normal((3,), 0, "eps", 4, [5, 6]), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "draw",
    [
        lambda *key: noise.normal((2, 3), *key),
        lambda *key: noise.uniform(*key),
        lambda *key: noise.integers(0, 10**9, *key),
    ],
)
def test_every_sample_has_its_own_row_wherever_it_stands(draw):
    whole = draw(0, "eps", 4, torch.arange(6))
    assert torch.equal(draw(0, "eps", 4, [4, 1]), whole[[4, 1]])
    assert len(whole.reshape(6, -1)[:, 0].unique()) == 6


def test_keys_that_differ_anywhere_give_distinct_streams():
    keys = list(itertools.product((0, 1, 11), ("eps", "eps_real", "epsilon"), (0, 1, 11), (0, 1, 11)))
    values = torch.stack([torch.randn(4, generator=noise.generator(*key)) for key in keys])
    assert len({tuple(row.tolist()) for row in values}) == len(keys)
    # No two are even correlated: 81 streams of 400 numbers.
    long = torch.stack([torch.randn(400, generator=noise.generator(*key)) for key in keys])
    assert (torch.corrcoef(long) - torch.eye(len(keys))).abs().max() < 0.3


def test_parts_of_a_key_do_not_run_into_one_another():
    keys = [(1, "eps", 12, 3), (1, "eps", 1, 23), (11, "eps", 2, 3), (1, "eps1", 2, 3)]
    assert len({noise.generator(*key).initial_seed() for key in keys}) == 4


def test_normal_has_the_moments_of_a_standard_normal():
    values = noise.normal((4, 25), 0, "eps", 0, range(1000)).double()
    assert values.shape == (1000, 4, 25)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1 and abs((values**3).mean()) < 0.05


def test_normal_takes_the_dtype_of_its_model_and_not_its_numbers():
    like = torch.zeros(1, dtype=torch.float64)
    plain, double = noise.normal((3,), 0, "eps", 0, [1]), noise.normal((3,), 0, "eps", 0, [1], like=like)
    assert plain.dtype == torch.float32 and double.dtype == torch.float64 and torch.equal(plain.double(), double)


def test_uniform_and_integers_cover_their_range():
    values = noise.uniform(0, "kind", 0, range(2000))
    assert values.dtype == torch.float64 and 0 <= values.min() < 0.01 and 0.99 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    counts = torch.bincount(noise.integers(2, 4, 0, "count", 0, range(3000)))
    assert counts[:2].sum() == 0 and len(counts) == 5 and (counts[2:] > 900).all()
