"""Given frames: how many, which noise, and whose."""

from __future__ import annotations

import pytest
import torch

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.distill.conditioning import condition_of, condition_of_clips, first_frames, unit_noise
from cosmos_mp.parallel import noise


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


# --- Clips cut along their frames ---


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_first_frames_of_parts_are_those_of_the_whole(parts):
    counts = torch.tensor([0, 1, 2, 3, 5, 6])
    masks = [first_frames(counts, 6 // parts, part) for part in range(parts)]
    assert torch.equal(torch.cat(masks, dim=1), first_frames(counts, 6))


def test_first_frames_beyond_the_first_part():
    assert first_frames(torch.tensor([0, 2, 3, 9]), 2, 1).tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]


def test_noise_of_a_whole_batch_is_keyed_by_position_and_purpose(make_batch):
    batch = make_batch([5, 2])
    drawn = unit_noise(batch, 1, "eps", 7)
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, noise.normal((3, 4, 4, 6), 1, "eps", 7, [5, 2]).double())


@pytest.mark.parametrize("parts", [2, 4])
def test_noise_of_parts_put_together_is_that_of_the_whole(make_batch, parts):
    batch = make_batch([5, 2, 9])
    drawn = [unit_noise(batch.cut(part, parts), 1, "eps", 7) for part in range(parts)]
    assert torch.equal(torch.cat(drawn, dim=2), unit_noise(batch, 1, "eps", 7))
    assert all(not torch.allclose(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("parts", [2, 4])
def test_given_frames_of_parts_put_together_are_those_of_the_whole(make_batch, parts):
    batch, config = make_batch(range(12)), DiffusionConfig(condition_frames=3)
    whole = condition_of(batch, config, seed=1, iteration=5)
    cuts = [condition_of(batch.cut(part, parts), config, seed=1, iteration=5) for part in range(parts)]
    assert whole.given.mask_BT.sum(dim=1).max() == 3 > 4 // parts  # given frames reach into the second part
    assert torch.equal(torch.cat([cut.control_BCTHW for cut in cuts], dim=2), whole.control_BCTHW)
    assert torch.equal(torch.cat([cut.given.mask_BT for cut in cuts], dim=1), whole.given.mask_BT)
    for name in ("latent_BCTHW", "noise_BCTHW"):
        assert torch.equal(torch.cat([getattr(cut.given, name) for cut in cuts], dim=2), getattr(whole.given, name))
    for cut in cuts:
        assert cut.text_BLD is batch.text_BLD and cut.padding_mask_BHW is batch.padding_mask_BHW and cut.fps_B is batch.fps_B
        assert condition_of_clips(batch.cut(0, parts)).given is None
