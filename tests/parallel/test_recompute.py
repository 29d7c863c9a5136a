"""Activation recomputation: the same numbers, each block run twice or in part, less kept."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_mp.models.block import Block
from cosmos_mp.parallel import recompute as module
from cosmos_mp.parallel.recompute import recompute

PRODUCTS, ATTENTION, NORM = "aten.mm", "aten._scaled_dot_product_flash_attention_for_cpu", "aten.native_layer_norm"
BLOCKS = 5
"""Of the base and of the control branch."""


class Operations(TorchDispatchMode):
    """Counts what really runs; what selective recomputation takes from its store does not come by here."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func).rpartition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Step(NamedTuple):
    """One call and its backward pass: forward calls of each block's MLP, operations, and the bytes kept between the two."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    calls_forward: Counter[str]
    calls: Counter[str]
    forward: Counter[str]
    backward: Counter[str]
    kept: int


@pytest.fixture
def step(make_network, make_input):
    def run(mode: str | None, **options) -> Step:
        network, calls, kept = make_network(), Counter(), 0
        if mode is not None:
            recompute(network, Block, mode)
        for name, block in network.named_modules():
            if isinstance(block, Block):
                block.mlp.register_forward_hook(lambda *_, name=name: calls.update([name]))

        def pack(value):
            nonlocal kept
            kept += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), Operations() as forward:
            output = network(make_input(), **options)
            loss = sum(f.pow(2).mean() for f in output.features) + (0 if output.out is None else output.out.pow(2).mean())
        calls_forward = Counter(calls)
        with Operations() as backward:
            loss.backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        return Step(loss.detach(), gradients, calls_forward, calls, forward.counts, backward.counts, kept)

    return run


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [{}, {"feature_blocks": (0, 1)}, {"feature_blocks": (1,), "tail": "none"}])
def test_loss_and_gradients_are_the_same_bits(step, options, mode):
    plain, again = step(None, **options), step(mode, **options)
    assert torch.equal(plain.loss, again.loss)
    compared = 0
    for name, gradient in plain.gradients.items():
        assert (gradient is None) == (again.gradients[name] is None), name
        if gradient is not None:
            assert torch.equal(gradient, again.gradients[name]), name
            compared += gradient.abs().max() > 0
    assert compared > 20


def test_every_block_runs_again_in_the_backward_pass(step):
    plain, again = step(None), step("full")
    for calls in (plain.calls_forward, plain.calls, again.calls_forward):
        assert len(calls) == BLOCKS and set(calls.values()) == {1}
    assert set(again.calls.values()) == {2}
    assert again.kept < 0.5 * plain.kept
    assert again.backward[NORM] == 3 * BLOCKS and again.backward[ATTENTION] == 2 * BLOCKS


def test_selective_takes_products_and_attention_from_its_store_and_runs_norms_again(step):
    plain, again = step(None), step("selective")
    assert again.forward[PRODUCTS] == plain.forward[PRODUCTS] > 16 * BLOCKS and again.forward[ATTENTION] == 2 * BLOCKS
    # In the backward pass a product more would be one that ran again: its gradients are products themselves.
    assert again.backward[PRODUCTS] == plain.backward[PRODUCTS] < step("full").backward[PRODUCTS]
    assert again.backward[ATTENTION] == plain.backward[ATTENTION] == 0
    assert plain.backward[NORM] == 0 and again.backward[NORM] == 3 * BLOCKS
    assert plain.backward["aten.gelu"] == 0 and again.backward["aten.gelu"] == BLOCKS
    assert set(again.calls.values()) == {2}  # each block's Python code runs again, once


def test_communication_is_kept_too():
    group = torch.ops._c10d_functional
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "wait_tensor")
    assert {getattr(group, name).default for name in names} <= module.KEPT


def test_none_changes_nothing(make_network):
    network = make_network()
    before = {name: dict(vars(block)) for name, block in network.named_modules()}
    recompute(network, Block, "none")
    assert {name: vars(block) for name, block in network.named_modules()} == before


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_units_are_run_again_one_at_a_time_and_never_nested(monkeypatch, make_network, make_input, mode):
    running, inside, checkpoint = [], Counter(), module.checkpoint

    def watched(function, *args, **options):
        assert options.pop("use_reentrant") is False
        block = getattr(function, "__self__", None)
        assert isinstance(block, Block)
        assert not running, "a unit inside a unit"
        running.append(block)
        inside[id(block)] += 1
        try:
            return checkpoint(function, *args, use_reentrant=False, **options)
        finally:
            running.pop()

    monkeypatch.setattr(module, "checkpoint", watched)
    network = make_network()
    recompute(network, Block, mode)
    network(make_input()).out.sum().backward()
    assert len(inside) == BLOCKS and set(inside.values()) == {1}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_nothing_runs_twice_without_gradients(make_network, make_input, mode):
    network, calls = make_network(), Counter()
    recompute(network, Block, mode)
    for block in network.modules():
        if isinstance(block, Block):
            block.mlp.register_forward_hook(lambda *_: calls.update(["block"]))
    with torch.no_grad():
        network(make_input())
    assert calls["block"] == BLOCKS


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_names_of_the_weights_stay(make_network, mode):
    network = make_network()
    before = list(network.state_dict())
    recompute(network, Block, mode)
    assert list(network.state_dict()) == before
