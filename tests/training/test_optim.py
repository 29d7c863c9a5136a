"""Learning rates, zero state, AdamW's options, gradient norm and clipping."""

import math

import pytest
import torch
from torch import nn

from cosmos_mp.config import OptimConfig
from cosmos_mp.training.optim import build_optimizer, clip_by_norm, learning_rate


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


def gradients(dtype: torch.dtype, scale: float = 1.0) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 4), (5,), (2,))]
    for index, p in enumerate(parameters[:2]):  # the last one has none
        p.grad = (torch.randn(p.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64) * scale).to(dtype)
    return parameters


def test_norm_and_clipping_follow_the_formula_in_float64():
    parameters = gradients(torch.float64)
    before = [p.grad.clone() for p in parameters[:2]]
    expected = math.sqrt(sum(g.pow(2).sum().item() for g in before))
    norm = clip_by_norm(parameters, 0.7)
    assert norm.dtype == torch.float64 and norm.item() == pytest.approx(expected, rel=1e-14)
    for p, g in zip(parameters, before, strict=False):
        torch.testing.assert_close(p.grad, g * (0.7 / (expected + 1e-6)), rtol=1e-13, atol=0)
    assert parameters[2].grad is None


@pytest.mark.parametrize("clip_norm", [0.0, 1e3])
def test_gradients_stay_where_nothing_is_to_clip(clip_norm):
    parameters = gradients(torch.float64)
    before = [p.grad.clone() for p in parameters[:2]]
    clip_by_norm(parameters, clip_norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=False))


def test_norm_of_half_precision_gradients_is_float32():
    parameters = gradients(torch.float16, scale=300.0)  # squares overflow in float16
    exact = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in parameters[:2]))
    norm = clip_by_norm(parameters, 0.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-6)


def test_norm_without_any_gradient_is_zero():
    assert clip_by_norm([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0
