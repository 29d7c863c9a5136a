"""Given frames: how many, which noise, and whose."""

from __future__ import annotations

import torch

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.distill.conditioning import condition_of, first_frames


def test_first_frames():
    assert first_frames(torch.tensor([0, 1, 2, 3]), 3).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_batch_becomes_a_condition(make_batch):
    batch = make_batch(range(3))
    condition = condition_of(batch, DiffusionConfig(condition_frames=2), seed=0, iteration=0)
    assert condition.text_BLD is batch.text_BLD and condition.control_BCTHW is batch.control_BCTHW
    assert condition.fps_B is batch.fps_B and condition.padding_mask_BHW is batch.padding_mask_BHW
    given = condition.given
    assert given.latent_BCTHW is batch.latent_BCTHW
    assert given.mask_BT.dtype == given.noise_BCTHW.dtype == batch.latent_BCTHW.dtype


def test_no_given_frames_where_none_are_wanted(make_batch):
    assert condition_of(make_batch(), DiffusionConfig(condition_frames=0), seed=0, iteration=0).given is None


def test_each_sample_is_given_its_first_0_to_2_frames(make_batch):
    given = condition_of(make_batch(range(300)), DiffusionConfig(condition_frames=2), seed=0, iteration=0).given
    counts = given.mask_BT.sum(dim=1)
    assert torch.equal(given.mask_BT, first_frames(counts, 4).double())
    shares = torch.bincount(counts.long(), minlength=4) / 300
    assert shares[3] == 0 and (shares[:3] > 0.25).all()


def test_draws_belong_to_seed_iteration_and_position(make_batch):
    config, positions = DiffusionConfig(condition_frames=2), list(range(12))
    whole = condition_of(make_batch(positions), config, seed=1, iteration=5).given
    for part in ([7, 3], [11]):
        given = condition_of(make_batch(part), config, seed=1, iteration=5).given
        assert torch.equal(given.mask_BT, whole.mask_BT[part]) and torch.equal(given.noise_BCTHW, whole.noise_BCTHW[part])
    for seed, iteration in ((2, 5), (1, 6)):
        other = condition_of(make_batch(positions), config, seed=seed, iteration=iteration).given
        assert not torch.equal(other.mask_BT, whole.mask_BT) and not torch.allclose(other.noise_BCTHW, whole.noise_BCTHW)
