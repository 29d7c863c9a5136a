"""Distillation on pairs."""

from __future__ import annotations

import pytest
import torch

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.distill.conditioning import condition_of
from cosmos_mp.distill.kd import KD

DIFFUSION = DiffusionConfig(condition_frames=2)


def test_loss_is_half_the_error_of_the_single_call_from_the_stored_noise(make_network, make_batch):
    student, batch = make_network(), make_batch(range(3), noise=True)
    output = KD(student, DIFFUSION, seed=3).step(batch, iteration=4)
    assert output.terms.keys() == {"kd"} and output.terms["kd"].weight == 1.0
    x0 = one_step(Denoiser(student, DIFFUSION), batch.noise_BCTHW, condition_of(batch, DIFFUSION, 3, 4)).x0
    assert output.terms["kd"].value.item() == pytest.approx(0.5 * (x0 - batch.latent_BCTHW).pow(2).mean().item())
    output.terms["kd"].value.backward()
    parts = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert parts == {"base", "control"}


def test_only_the_student_is_held_and_trained(make_network):
    method = KD(make_network(), DIFFUSION, seed=0)
    assert list(method.networks) == ["student"] and {method.trained(i) for i in range(7)} == {("student",)}


def test_clips_without_noise_are_a_named_error(make_network, make_batch):
    with pytest.raises(ValueError, match="generate_pairs"):
        KD(make_network(), DIFFUSION, seed=0).step(make_batch(), 0)


def test_micro_batches_do_not_change_the_loss(make_network, make_batch):
    method = KD(make_network(), DIFFUSION, seed=3)
    whole = method.step(make_batch([4, 1, 7, 2], noise=True), 5).terms["kd"].value
    halves = [method.step(make_batch(part, noise=True), 5).terms["kd"].value for part in ([4, 1], [7, 2])]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-12, atol=0)
    assert not torch.isclose(method.step(make_batch([4, 1, 7, 2], noise=True), 6).terms["kd"].value, whole)
