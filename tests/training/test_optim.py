"""Learning rates, zero state, AdamW's options, gradient norm and clipping."""

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from cosmos_mp.config import OptimConfig
from cosmos_mp.training import optim
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


# --- apex ---


class FakeApex(torch.optim.Optimizer):
    """What apex's FusedAdam does, by the text of its source: one count of steps for a group; for here it cannot run."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        assert adam_w_mode and bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), n = group["betas"], group["step"]
            assert group["params"][-1].numel(), "apex launches nothing where the last tensor is empty"
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["exp_avg"].lerp_(p.grad, 1 - b1)
                    state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                    update = state["exp_avg"] / (1 - b1**n) / ((state["exp_avg_sq"] / (1 - b2**n)).sqrt() + group["eps"])
                    p.sub_(group["lr"] * (update + group["weight_decay"] * p))


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for index, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(7 * step + index)).to(p.device)
        clip(optimizer, 5.0, 2.0)
        optimizer.step()


def parameters_of(device: str = "cpu") -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in ((3, 4), (5,), (0, 4))]


ADAMW = OptimConfig(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)


def check_same(ours: torch.optim.Optimizer, own: list[nn.Parameter], reference: torch.optim.Optimizer, other: list[nn.Parameter]) -> None:
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert ours.state[a].keys() == reference.state[b].keys()
        for key, value in ours.state[a].items():
            torch.testing.assert_close(value.cpu(), reference.state[b][key].cpu(), rtol=1e-5, atol=1e-6)


def test_apex_takes_the_step_of_torch_and_goes_on_from_either_state(monkeypatch):
    plain, reference = (made := parameters_of()), build_optimizer(made, ADAMW)
    stepped(reference, plain, range(3))
    monkeypatch.setattr(optim, "apex_fused_adam", lambda: FakeApex)
    monkeypatch.setattr(optim, "_apex_takes", lambda p: True)
    first = parameters_of()
    apex = build_optimizer(first, ADAMW)
    assert isinstance(apex, FakeApex) and all(not value.any() for p in first for value in apex.state[p].values())
    stepped(apex, first, range(3))
    check_same(apex, first, reference, plain)
    # What a checkpoint does: values are copied into the state that is there.
    again = parameters_of()
    resumed = build_optimizer(again, ADAMW)
    with torch.no_grad():
        for p, q in zip(again, plain, strict=True):
            p.copy_(q)
            for key, value in reference.state[q].items():
                resumed.state[p][key].copy_(value)
    stepped(resumed, again, range(3, 5))
    stepped(reference, plain, range(3, 5))
    check_same(resumed, again, reference, plain)


def test_apex_is_not_taken_for_what_it_cannot_step(monkeypatch):
    monkeypatch.setattr(optim, "apex_fused_adam", lambda: FakeApex)
    assert isinstance(build_optimizer(parameters_of(), ADAMW), torch.optim.AdamW)  # not on a GPU
    assert optim.optimizer_words(torch.device("cpu")) == "torch AdamW"
    assert optim.optimizer_words(torch.device("cuda")) == "apex FusedAdam"


def test_a_rank_that_holds_nothing_of_a_role_steps_with_torch(monkeypatch):
    monkeypatch.setattr(optim, "apex_fused_adam", lambda: FakeApex)
    monkeypatch.setattr(optim, "_apex_takes", lambda p: True)
    own = [nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))]
    optimizer = build_optimizer(own, ADAMW)
    stepped(optimizer, own, range(2))
    assert [int(optimizer.state[p]["step"]) for p in own] == [2, 2]


def test_parameters_that_have_taken_different_steps_are_refused_by_apex(monkeypatch):
    monkeypatch.setattr(optim, "apex_fused_adam", lambda: FakeApex)
    monkeypatch.setattr(optim, "_apex_takes", lambda p: True)
    own = parameters_of()[:2]
    optimizer = build_optimizer(own, ADAMW)
    stepped(optimizer, own[:1], range(1))
    with pytest.raises(RuntimeError, match=r"have taken \[0, 1\]"):
        stepped(optimizer, own, range(1))


def test_the_package_of_that_name_on_pypi_is_not_taken_for_apex(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    assert optim.apex_fused_adam() is None


@pytest.mark.gpu
def test_on_a_gpu_apex_takes_the_step_of_torch(monkeypatch):
    """Not run on a GPU so far."""
    if optim.apex_fused_adam() is None:
        pytest.skip("apex is not installed")
    first, second = parameters_of("cuda"), parameters_of("cuda")
    apex = build_optimizer(first, ADAMW)
    monkeypatch.setattr(optim, "apex_fused_adam", lambda: None)
    reference = build_optimizer(second, ADAMW)
    assert not isinstance(apex, torch.optim.AdamW) and isinstance(reference, torch.optim.AdamW)
    for optimizer, own in ((apex, first), (reference, second)):
        stepped(optimizer, own, range(5))
    check_same(apex, first, reference, second)
