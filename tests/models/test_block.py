"""A block and its parts against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_mp.models.block import Attention, Block, Modulation
from cosmos_mp.models.embeddings import rotation
from cosmos_mp.models.weights import build


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def layer_norm(h: np.ndarray) -> np.ndarray:
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)


def attention(layer: Attention, x: np.ndarray, context: np.ndarray, angles: np.ndarray | None) -> np.ndarray:
    """Heads one at a time: (S, B, D), (L, B, C) -> (S, B, D)."""
    size = layer.head_dim
    q, k, v = (y @ array(w.weight).T for y, w in ((x, layer.q), (context, layer.k), (context, layer.v)))
    out = np.zeros_like(q)
    for b in range(x.shape[1]):
        for start in range(0, q.shape[-1], size):
            part = slice(start, start + size)
            query, key = (
                y[:, b, part] / np.sqrt((y[:, b, part] ** 2).mean(-1, keepdims=True) + 1e-6) * array(norm.weight)
                for y, norm in ((q, layer.q_norm), (k, layer.k_norm))
            )
            if angles is not None:
                half = size // 2
                query, key = (
                    y * np.cos(angles[:, b]) + np.concatenate([-y[:, half:], y[:, :half]], -1) * np.sin(angles[:, b]) for y in (query, key)
                )
            scores = np.exp(query @ key.T / math.sqrt(size))
            out[:, b, part] = scores / scores.sum(-1, keepdims=True) @ v[:, b, part]
    return out @ array(layer.out.weight).T


def modulation(layer: Modulation, conditioning: np.ndarray, shared: np.ndarray) -> list[np.ndarray]:
    values = (conditioning / (1 + np.exp(-conditioning))) @ array(layer.down.weight).T @ array(layer.up.weight).T
    return np.split(values + shared[:, : values.shape[-1]], layer.parts, axis=-1)


@pytest.mark.parametrize("parts", [2, 3])
def test_modulation_adds_the_first_parts_of_the_shared_vector(parts):
    layer = build(lambda: Modulation(6, 4, parts), "cpu", torch.float64)
    with torch.no_grad():
        layer.down.weight.copy_(draw(4, 6))
        layer.up.weight.copy_(draw(parts * 6, 4, seed=1))
    conditioning, shared = draw(2, 6, seed=2), draw(2, 18, seed=3)
    expected = modulation(layer, array(conditioning), array(shared))
    for got, wanted in zip(layer(conditioning, shared)[:parts], expected, strict=True):
        np.testing.assert_allclose(array(got), wanted, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_with_and_without_rotation(make_network, heads):
    block: Block = make_network(heads=heads, hidden=12 * heads).base.blocks[0]
    x, text, angles = draw(6, 2, 12 * heads), draw(5, 2, 7, seed=1), draw(6, 2, 6, seed=2)
    angles = torch.cat([angles, angles], dim=-1)
    got = block.self_attn(x, x, rotation(angles))
    np.testing.assert_allclose(array(got), attention(block.self_attn, array(x), array(x), array(angles)), atol=1e-12)
    got = block.cross_attn(x, text)
    np.testing.assert_allclose(array(got), attention(block.cross_attn, array(x), array(text), None), atol=1e-12)


def test_block_is_three_gated_steps_after_the_position(make_network):
    block: Block = make_network().base.blocks[1]
    h, position, text = draw(6, 2, 24), draw(6, 1, 24, seed=1), draw(5, 2, 7, seed=2)
    conditioning, shared, angles = draw(2, 24, seed=3), draw(2, 72, seed=4), draw(6, 2, 6, seed=5)
    angles = torch.cat([angles, angles], dim=-1)
    got = block(h, position, rotation(angles), text, conditioning, shared)

    x = array(h) + array(position)
    up, down = array(block.mlp.up.weight), array(block.mlp.down.weight)

    def mlp(y: np.ndarray) -> np.ndarray:
        z = y @ up.T
        return (0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))) @ down.T

    steps = (
        (block.self_mod, lambda y: attention(block.self_attn, y, y, array(angles))),
        (block.cross_mod, lambda y: attention(block.cross_attn, y, array(text), None)),
        (block.mlp_mod, mlp),
    )
    for layer, function in steps:
        shift, scale, gate = modulation(layer, array(conditioning), array(shared))
        x = x + gate * function(layer_norm(x) * (1 + scale) + shift)
    np.testing.assert_allclose(array(got), x, atol=1e-11)
