"""Noise levels: ramps against the reference's numbers, draws against their distribution."""

from __future__ import annotations

import math

import pytest
import torch

from cosmos_mp.config import DiffusionConfig, TeacherLossConfig
from cosmos_mp.diffusion.schedules import draw_dmd2_sigma, draw_teacher_sigma, edm_ramp, log_ramp, training_ramp

REFERENCE = {
    0: 80.0,
    20: 71.65515,
    100: 45.28688,
    250: 17.49811,
    500: 2.503974,
    750: 0.1680835,
    900: 0.01644678,
    980: 0.003157399,
    999: 0.002,
}


def test_training_ramp_is_the_reference_ramp_times_the_video_factor():
    ramp = training_ramp(DiffusionConfig())
    assert ramp.dtype == torch.float64 and ramp.shape == (1000,)
    for index, level in REFERENCE.items():
        assert ramp[index].item() == pytest.approx(4 * level, rel=1e-6)
    plain = training_ramp(DiffusionConfig(video_noise_multiplier=1.0))
    torch.testing.assert_close(ramp, 4 * plain, rtol=1e-15, atol=0)


def test_sampler_ramp_of_35_steps():
    ramp = edm_ramp(80.0, 0.002, 35)
    assert ramp.shape == (36,)
    assert ramp[:4].tolist() == pytest.approx([80.0, 68.3251, 58.1421, 49.2886], rel=1e-6)
    assert [round(level, 4) for level in ramp[-3:].tolist()] == [0.0073, 0.0039, 0.0020]


def test_inference_ramp_is_log_spaced_down_to_its_own_minimum():
    ramp = training_ramp(DiffusionConfig(noise_schedule="inference", video_noise_multiplier=1.0))
    assert ramp.shape == (1000,) and ramp.dtype == torch.float64
    assert (ramp[0].item(), ramp[-1].item()) == pytest.approx((80.0, 2e-4), rel=1e-12)
    ratio = (2e-4 / 80.0) ** (1 / 999)
    torch.testing.assert_close(ramp[1:] / ramp[:-1], torch.full((999,), ratio, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(training_ramp(DiffusionConfig(noise_schedule="inference")), 4 * ramp)
    assert log_ramp(8.0, 2.0, 2).tolist() == pytest.approx([8.0, 4.0, 2.0])


@pytest.mark.parametrize("schedule", ["edm_sampling", "inference"])
def test_dmd2_draws_entries_20_to_980_both_included_and_evenly(schedule):
    config = DiffusionConfig(noise_schedule=schedule)
    sigma = draw_dmd2_sigma(config, 0, 7, range(12_000))
    assert sigma.dtype == torch.float64
    ramp = training_ramp(config)
    entry = (ramp[None] == sigma[:, None]).int().argmax(dim=1)
    assert torch.equal(ramp[entry], sigma)
    assert (entry.min().item(), entry.max().item()) == (20, 980)
    assert entry.double().mean().item() == pytest.approx(500, abs=8)
    assert entry.double().std().item() == pytest.approx(961 / math.sqrt(12), abs=5)


def test_draws_belong_to_seed_iteration_and_sample():
    config, teacher = DiffusionConfig(), TeacherLossConfig(uniform_fraction=0.5)
    for draw in (lambda *key: draw_dmd2_sigma(config, *key), lambda *key: draw_teacher_sigma(teacher, *key)):
        whole = draw(1, 2, torch.arange(8))
        assert torch.equal(torch.cat([draw(1, 2, [3]), draw(1, 2, [0, 7])]), whole[[3, 0, 7]])
        assert len(whole.unique()) > 4
        assert not torch.equal(draw(2, 2, torch.arange(8)), whole) and not torch.equal(draw(1, 3, torch.arange(8)), whole)


def test_teacher_draws_log_normal_levels():
    config = TeacherLossConfig(log_sigma_mean=-0.7, log_sigma_std=1.4)
    log_sigma = draw_teacher_sigma(config, 0, 0, range(4000)).log()
    assert log_sigma.dtype == torch.float64
    assert log_sigma.mean().item() == pytest.approx(-0.7, abs=0.07)
    assert log_sigma.std().item() == pytest.approx(1.4, abs=0.05)


def test_teacher_draws_log_uniform_levels_for_its_share():
    config = TeacherLossConfig(log_sigma_mean=-10.0, log_sigma_std=0.1, uniform_fraction=1.0, uniform_range=(2.0, 50.0))
    sigma = draw_teacher_sigma(config, 0, 0, range(3000))
    low, high = math.log(2), math.log(50)
    assert 2.0 <= sigma.min() < 2.1 and 47.0 < sigma.max() <= 50.0
    assert sigma.log().mean().item() == pytest.approx((low + high) / 2, abs=0.06)
    assert sigma.log().std().item() == pytest.approx((high - low) / math.sqrt(12), abs=0.04)
    config = TeacherLossConfig(log_sigma_mean=-10.0, log_sigma_std=0.1, uniform_fraction=0.3, uniform_range=(2.0, 50.0))
    share = (draw_teacher_sigma(config, 0, 0, range(3000)) >= 2).double().mean()
    assert share.item() == pytest.approx(0.3, abs=0.03)
