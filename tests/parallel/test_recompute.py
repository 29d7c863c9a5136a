"""Activation recomputation: the same numbers, each block run twice, less kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cosmos_mp.models.block import Block
from cosmos_mp.parallel.recompute import recompute


@pytest.fixture
def step(make_network, make_input):
    """Loss and gradients of one call; with the forward calls of each block's MLP, and the bytes kept for the backward pass."""

    def run(again: bool, **options):
        network, calls, kept = make_network(), Counter(), 0
        if again:
            recompute(network, Block)
        for name, module in network.named_modules():
            if isinstance(module, Block):
                module.mlp.register_forward_hook(lambda *_, name=name: calls.update([name]))

        def pack(value):
            nonlocal kept
            kept += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            output = network(make_input(), **options)
            loss = sum(f.pow(2).mean() for f in output.features) + (0 if output.out is None else output.out.pow(2).mean())
        forward = Counter(calls)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in network.named_parameters()}, forward, calls, kept

    return run


@pytest.mark.parametrize("options", [{}, {"feature_blocks": (0, 1)}, {"feature_blocks": (1,), "tail": "none"}])
def test_loss_and_gradients_are_the_same_bits(step, options):
    plain, again = step(False, **options), step(True, **options)
    assert torch.equal(plain[0], again[0])
    compared = 0
    for name, gradient in plain[1].items():
        assert (gradient is None) == (again[1][name] is None), name
        if gradient is not None:
            assert torch.equal(gradient, again[1][name]), name
            compared += gradient.abs().max() > 0
    assert compared > 20


def test_every_block_runs_again_in_the_backward_pass(step):
    _, _, forward, calls, kept_plain = step(False)
    assert len(forward) == 5 and set(forward.values()) == {1} and calls == forward
    _, _, forward, calls, kept = step(True)
    assert len(forward) == 5 and set(forward.values()) == {1}
    assert set(calls.values()) == {2}
    assert kept < 0.5 * kept_plain


def test_nothing_runs_twice_without_gradients(make_network, make_input):
    network, calls = make_network(), Counter()
    recompute(network, Block)
    for module in network.modules():
        if isinstance(module, Block):
            module.mlp.register_forward_hook(lambda *_: calls.update(["block"]))
    with torch.no_grad():
        network(make_input())
    assert calls["block"] == 5


def test_names_of_the_weights_stay(make_network):
    network = make_network()
    before = list(network.state_dict())
    recompute(network, Block)
    assert list(network.state_dict()) == before
