"""Training of a teacher: loss, noise levels and dropout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cosmos_mp.config import DiffusionConfig, TeacherLossConfig
from cosmos_mp.diffusion.edm import Denoiser, bcast
from cosmos_mp.diffusion.schedules import draw_teacher_sigma
from cosmos_mp.distill.conditioning import condition_of
from cosmos_mp.distill.teacher import TeacherPretraining
from cosmos_mp.parallel import noise

DIFFUSION = DiffusionConfig(condition_frames=2)
KEPT = TeacherLossConfig(text_dropout=0.0, control_dropout=0.0)


def loss_of(method: TeacherPretraining, batch, iteration: int = 4) -> torch.Tensor:
    output = method.step(batch, iteration)
    assert output.terms.keys() == {"denoising"} and output.terms["denoising"].weight == 1.0
    return output.terms["denoising"].value


def test_loss_is_the_weighted_error_of_the_denoised_clip(make_network, make_batch):
    network, batch = make_network(), make_batch(range(3))
    method = TeacherPretraining(network, DIFFUSION, KEPT, seed=3)
    sigma = draw_teacher_sigma(KEPT, 3, 4, batch.position_B)
    latent = batch.latent_BCTHW
    eps = noise.normal(latent.shape[1:], 3, "eps", 4, batch.position_B).double()
    x0 = Denoiser(network, DIFFUSION)(latent + bcast(sigma) * eps, sigma, condition_of(batch, DIFFUSION, 3, 4)).x0
    weight = bcast((sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    loss = loss_of(method, batch)
    assert loss.item() == pytest.approx((weight * (x0 - latent) ** 2).mean().item())
    loss.backward()
    parts = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert parts == {"base", "control"}


@pytest.mark.parametrize(("option", "name"), [("text_dropout", "text_BLD"), ("control_dropout", "control_BCTHW")])
def test_dropout_shows_zeros_to_whole_samples_at_its_rate(make_network, make_batch, option, name):
    network, batch, seen = make_network(), make_batch(range(60)), []
    network.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    TeacherPretraining(network, DIFFUSION, dataclasses.replace(KEPT, **{option: 0.3}), seed=0).step(batch, 0)
    other = ({"text_BLD", "control_BCTHW"} - {name}).pop()
    assert torch.equal(getattr(seen[0], other), getattr(batch, other))
    got, clean = getattr(seen[0], name), getattr(batch, name)
    dropped = ~got.flatten(1).any(dim=1)
    assert torch.equal(got[~dropped], clean[~dropped])
    assert 0.15 < dropped.double().mean() < 0.45


def test_text_and_control_are_dropped_independently(make_network, make_batch):
    network, seen = make_network(), []
    network.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    both = dataclasses.replace(KEPT, text_dropout=0.5, control_dropout=0.5)
    TeacherPretraining(network, DIFFUSION, both, seed=0).step(make_batch(range(40)), 0)
    text, control = (x.flatten(1).any(dim=1) for x in (seen[0].text_BLD, seen[0].control_BCTHW))
    assert 0.2 < (text != control).double().mean() < 0.8


def test_what_is_dropped_takes_part_all_the_same(make_network, make_batch):
    """FSDP reduces a step's gradients together: a parameter must not be used by some of its micro-batches alone."""
    network = make_network()
    without = TeacherLossConfig(text_dropout=1.0, control_dropout=1.0)
    loss_of(TeacherPretraining(network, DIFFUSION, without, seed=0), make_batch(range(2))).backward()
    used = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    network.zero_grad(set_to_none=True)
    loss_of(TeacherPretraining(network, DIFFUSION, KEPT, seed=0), make_batch(range(2))).backward()
    assert used == {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert len(used) > 0.9 * len(list(network.parameters()))


def test_micro_batches_do_not_change_the_loss(make_network, make_batch):
    loss = TeacherLossConfig(uniform_fraction=0.5, text_dropout=0.5, control_dropout=0.5)
    method = TeacherPretraining(make_network(), DIFFUSION, loss, seed=3)
    whole = loss_of(method, make_batch([4, 1, 7, 2]))
    halves = [loss_of(method, make_batch(part)) for part in ([4, 1], [7, 2])]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-12, atol=0)
    assert not torch.isclose(loss_of(method, make_batch([4, 1, 7, 2]), 5), whole)


def test_only_the_teacher_is_held_and_trained(make_network):
    method = TeacherPretraining(make_network(), DIFFUSION, KEPT, seed=0)
    assert list(method.networks) == ["teacher"] and {method.trained(i) for i in range(7)} == {("teacher",)}
