"""Learning rates, zero state, AdamW's options, gradient norm and clipping."""

import math

import pytest
import torch
from torch import nn

from cosmos_mp.config import OptimConfig
from cosmos_mp.training.optim import build_optimizer, clip, learning_rate


def test_warmup_is_linear_and_then_constant():
    config = OptimConfig(lr=2.0, warmup=4)
    assert [learning_rate(config, step, 100) for step in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert learning_rate(OptimConfig(lr=2.0), 0, 10) == 2.0


def test_cosine_runs_from_decay_from_to_zero():
    config = OptimConfig(lr=2.0, decay="cosine", decay_from=0.5)
    assert [learning_rate(config, step, 8) for step in (0, 3, 4)] == [2.0, 2.0, 2.0]
    assert learning_rate(config, 6, 8) == pytest.approx(1.0)
    assert learning_rate(config, 5, 8) == pytest.approx(1 + math.cos(math.pi / 4))
    assert learning_rate(config, 8, 8) == pytest.approx(0.0) and learning_rate(config, 9, 8) == pytest.approx(0.0)
    assert learning_rate(OptimConfig(lr=2.0, decay="cosine", decay_from=1.0), 8, 8) == 2.0


def test_warmup_and_cosine_multiply():
    assert learning_rate(OptimConfig(lr=1.0, warmup=4, decay="cosine"), 1, 4) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_state_is_there_before_the_first_step_and_changes_nothing():
    def net():
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    config = OptimConfig(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    ours, plain = net(), net()
    optimizer = build_optimizer(ours.parameters(), config)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in ours.parameters())
    assert all(not value.any() for p in ours.parameters() for value in optimizer.state[p].values())
    for _ in range(3):
        for network, stepper in ((ours, optimizer), (plain, reference)):
            stepper.zero_grad()
            network(torch.arange(3.0)).pow(2).sum().backward()
            stepper.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # the bias too: decay on all parameters


@pytest.mark.parametrize(("option", "value"), [("lr", 0.0), ("clip_norm", -1.0), ("warmup", -1), ("decay_from", 1.5)])
def test_option_out_of_range_is_named(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        build_optimizer(nn.Linear(1, 1).parameters(), OptimConfig(**{option: value}))


def with_gradients(scale: float = 1.0) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2,), (0, 4))]
    for index, p in enumerate(parameters):
        if index != 2:  # that one has none
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64) * scale
    return build_optimizer(parameters, OptimConfig())


def gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("norm", [0.8, 21.0, 1e9])
def test_clipping_scales_by_the_norm_that_it_is_told(norm):
    # The norm is over all ranks: what this one holds is a part of it.
    optimizer = with_gradients()
    before = gradients(optimizer)
    clip(optimizer, norm, 0.7)
    for now, then in zip(gradients(optimizer), before, strict=True):
        if then is None:
            assert now is None
        else:
            torch.testing.assert_close(now, then * (0.7 / (norm + 1e-6)), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("norm", "clip_norm"), [(5.0, 0.0), (5.0, 5.0), (5.0, 1e3), (0.0, 1.0)])
def test_gradients_stay_where_nothing_is_to_clip(norm, clip_norm):
    optimizer = with_gradients()
    before = gradients(optimizer)
    clip(optimizer, norm, clip_norm)
    assert all(now is then is None or torch.equal(now, then) for now, then in zip(gradients(optimizer), before, strict=True))
