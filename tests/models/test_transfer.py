"""Base and control branch as one network."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import NetConfig
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.parallel.topology import single_process


def test_parameter_counts_of_the_7b():
    with torch.device("meta"):
        network = TransferNet(NetConfig(), LocalBackend(single_process().tp_group))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert count == {"base": 7_236_208_640, "control": 893_497_120}
    assert sum(p.numel() for p in network.parameters()) == 8_129_705_760


def test_residuals_and_options_are_passed_to_the_base(make_network, make_input):
    network, call = make_network(), make_input()
    by_hand = network.base(call, network.control(call, 0.7), feature_blocks=(1,))
    whole = network(call, control_weight=0.7, feature_blocks=(1,))
    assert torch.equal(whole.out, by_hand.out) and torch.equal(whole.features[0], by_hand.features[0])
    assert network(call, feature_blocks=(1,), tail="none").out is None


def test_without_control_the_branch_does_not_run(make_network, make_input):
    network, calls = make_network(), []
    network.control.register_forward_hook(lambda *_: calls.append(1))
    call = make_input(control_BCTHW=None)
    assert torch.equal(network(call).out, network.base(call).out) and not calls
    network(dataclasses.replace(call, control_BCTHW=call.x_BCTHW))
    assert calls == [1]


@pytest.mark.parametrize("control", [True, False])
def test_a_call_is_cast_to_the_type_of_the_weights_but_time_and_rate_stay(make_network, make_input, control):
    network = make_network(dtype=torch.float32)
    call = make_input() if control else make_input(control_BCTHW=None)
    cast = call.to(torch.float32)
    for f in dataclasses.fields(call):
        value, expected = getattr(cast, f.name), getattr(call, f.name)
        if f.name in ("timestep_B", "fps_B") or expected is None:
            assert value is expected
        else:
            assert value.dtype == torch.float32 and torch.equal(value, expected.float()), f.name
    out = network(call).out
    assert out.dtype == torch.float32 and torch.equal(out, network(cast).out)
