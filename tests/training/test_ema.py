"""The average: warm start, formula, precision, and lending it to the network."""

import pytest
import torch
from torch import nn

from cosmos_mp.training.ema import EMA


def test_starts_as_a_copy_and_follows_the_formula():
    network = nn.Linear(2, 1).double()
    ema = EMA(dict(network.named_parameters()), 0.3)
    expected = network.weight.detach().clone()
    assert torch.equal(ema.averages["weight"], expected) and set(ema.averages) == {"weight", "bias"}
    for update in range(6):
        with torch.no_grad():
            network.weight.add_(update + 1.0)
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * network.weight.detach()
        ema.update()
        torch.testing.assert_close(ema.averages["weight"], expected, rtol=1e-14, atol=1e-14)
    assert ema.updates == 6 and min(0.3, 6 / 15) == 0.3  # both arms of the minimum were used


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_average_is_float32_or_wider(dtype, expected):
    network = nn.Linear(2, 1).to(dtype)
    ema = EMA(dict(network.named_parameters()), 0.9)
    ema.update()
    assert ema.averages["weight"].dtype == expected


def test_network_carries_the_average_inside_the_block_only():
    network = nn.Linear(2, 1)
    ema = EMA(dict(network.named_parameters()), 0.9)
    average = ema.averages["weight"].clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    own = network.weight.detach().clone()
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(network.weight, average)
        raise KeyError
    assert torch.equal(network.weight, own) and torch.equal(ema.averages["weight"], average)


@pytest.mark.parametrize("decay", [-0.1, 0.0, 1.0])
def test_decay_out_of_range_is_named(decay):
    with pytest.raises(ValueError, match=f"ema.decay={decay}"):
        EMA({"weight": torch.ones(1)}, decay)
