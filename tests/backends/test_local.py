"""The layers that run anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.kernels.qk_norm_rope import EPS
from cosmos_mp.models.weights import build
from cosmos_mp.parallel.topology import single_process


@pytest.fixture
def backend() -> LocalBackend:
    return LocalBackend(single_process().tp_group)


@pytest.mark.parametrize("kind", ["column_linear", "row_linear"])
def test_linear_layers_multiply_by_one_weight_without_bias(backend, kind):
    layer = build(lambda: getattr(backend, kind)(5, 3), "cpu", torch.float64)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (3, 5)}
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 5, generator=draw, dtype=torch.float64), torch.randn(4, 2, 5, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    out = layer(x)
    assert out.dtype == torch.float64
    np.testing.assert_allclose(out.detach(), x.numpy() @ weight.numpy().T, atol=1e-13)
    out.sum().backward()
    np.testing.assert_allclose(layer.weight.grad, x.sum(dim=(0, 1)).expand(3, -1), atol=1e-13)


def test_attention_is_a_softmax_over_all_keys(backend):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(4, 2, 3, 5, generator=draw, dtype=torch.float64)
    key, value = (torch.randn(6, 2, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    out = backend.attention()(query, key, value)
    assert out.shape == (4, 2, 15)
    for b, h in np.ndindex(2, 3):
        weight = np.exp(query[:, b, h].numpy() @ key[:, b, h].numpy().T / math.sqrt(5))
        expected = weight / weight.sum(axis=1, keepdims=True) @ value[:, b, h].numpy()
        np.testing.assert_allclose(out[:, b, 5 * h : 5 * (h + 1)], expected, atol=1e-13)


def test_the_norm_of_heads_has_one_epsilon(backend):
    norm = build(lambda: backend.head_norm(6), "cpu", torch.float64)
    torch.nn.init.ones_(norm.weight)
    x = 1e-3 * torch.randn(4, 2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # its squares are as small
    expected = x.numpy() / np.sqrt((x.numpy() ** 2).mean(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x).detach(), expected, atol=1e-13)
    assert norm.eps == EPS == 1e-6
