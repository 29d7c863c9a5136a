"""Patches, masks, time and positions against short formulas of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cosmos_mp.kernels.qk_norm_rope import rotate
from cosmos_mp.models import embeddings
from cosmos_mp.models.weights import build


def test_patchify_puts_channels_slowest():
    x = torch.randn(2, 3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    tokens = embeddings.patchify(x)
    assert tokens.shape == (2 * 2 * 3, 2, 12)
    for t, h, w, c, p, q in np.ndindex(2, 2, 3, 3, 2, 2):
        assert torch.equal(tokens[(t * 2 + h) * 3 + w, :, (c * 2 + p) * 2 + q], x[:, c, t, 2 * h + p, 2 * w + q])


def test_unpatchify_puts_channels_fastest():
    tokens = torch.randn(2 * 2 * 3, 2, 12, generator=torch.Generator().manual_seed(0))
    x = embeddings.unpatchify(tokens, 2, 4, 6)
    assert x.shape == (2, 3, 2, 4, 6)
    for t, h, w, c, p, q in np.ndindex(2, 2, 3, 3, 2, 2):
        assert torch.equal(x[:, c, t, 2 * h + p, 2 * w + q], tokens[(t * 2 + h) * 3 + w, :, (p * 2 + q) * 3 + c])


def test_padding_mask_takes_every_eighth_pixel():
    mask = torch.rand(2, 32, 48, generator=torch.Generator().manual_seed(0))
    latent = embeddings.latent_padding_mask(mask, 3, 4, 6)
    assert latent.shape == (2, 1, 3, 4, 6)
    for frame in range(3):
        assert torch.equal(latent[:, 0, frame], mask[:, ::8, ::8])


def test_timestep_embedding_is_cosines_then_sines():
    t = np.array([-1.09, 0.0, 0.37, 1.0955])
    angles = t[:, None] * 10000.0 ** (-np.arange(5) / 5)
    got = embeddings.timestep_embedding(torch.tensor(t), 10)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), rtol=0, atol=1e-14)


def test_time_embedding_normalises_the_sinusoid_and_modulates_beside_it():
    time = build(lambda: embeddings.TimeEmbedding(8), "cpu", torch.float64)
    rng = np.random.default_rng(0)
    first, second, norm = rng.normal(size=(8, 8)), rng.normal(size=(24, 8)), rng.normal(size=8)
    with torch.no_grad():
        time.linear_1.weight.copy_(torch.tensor(first))
        time.linear_2.weight.copy_(torch.tensor(second))
        time.norm.weight.copy_(torch.tensor(norm))
        conditioning, shared = time(torch.tensor([0.3, -0.7]).double())
    angles = np.array([0.3, -0.7], dtype=np.float32).astype(float)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    s = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    hidden = s @ first.T
    np.testing.assert_allclose(conditioning, s / np.sqrt((s**2).mean(axis=1, keepdims=True) + 1e-6) * norm, atol=1e-12)
    np.testing.assert_allclose(shared, (hidden / (1 + np.exp(-hidden))) @ second.T, atol=1e-12)


@pytest.mark.parametrize(("head_dim", "sizes"), [(12, (4, 4, 4)), (24, (8, 8, 8)), (32, (12, 10, 10)), (128, (44, 42, 42))])
def test_rope_angles_follow_the_formula(head_dim, sizes):
    ratio, fps = (2.0, 1.5, 3.0), (24.0, 12.0)
    got = embeddings.rope_angles(2, 3, 2, head_dim, fps_B=torch.tensor(fps).double(), ratio=ratio, theta=10000.0, base_fps=24.0)
    assert got.shape == (12, 2, head_dim) and got.dtype == torch.float64
    for index, (t, h, w) in enumerate(np.ndindex(2, 3, 2)):
        for b, rate in enumerate(fps):
            parts = []
            for position, d, factor in zip((t * 24.0 / rate, h, w), sizes, ratio, strict=True):
                theta = 10000.0 * factor ** (d / (d - 2))
                parts += [position * theta ** (-2 * j / d) for j in range(d // 2)]
            np.testing.assert_allclose(got[index, b], parts + parts, rtol=1e-13)


def test_temporal_ratio_of_the_7b():
    def slowest(ratio: float) -> float:
        fps = torch.full((1,), 24.0, dtype=torch.float64)
        angles = embeddings.rope_angles(2, 1, 1, 128, fps_B=fps, ratio=(ratio, 1.0, 1.0), theta=10000.0, base_fps=24.0)
        return angles[1, 0, 21].item()

    # theta grows by 2.06712; the slowest of the 22 frequencies is theta^(-42/44), so it slows down by the ratio itself.
    assert (slowest(1.0) / slowest(2.0)) ** (44 / 42) == pytest.approx(2.06712, rel=1e-5)


def test_rotate_turns_pairs_of_half_a_head():
    draw = torch.Generator().manual_seed(0)
    x, angles = torch.randn(5, 2, 3, 8, generator=draw).double(), torch.randn(5, 2, 4, generator=draw).double()
    got = rotate(x, *embeddings.rotation(torch.cat([angles, angles], dim=-1)))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], dim=-1))


def test_rotate_computes_above_bfloat16_and_returns_it():
    x = torch.randn(4, 1, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = torch.arange(4.0)[:, None, None].expand(4, 1, 8)
    got = rotate(x, *embeddings.rotation(angles))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(x.float(), *embeddings.rotation(angles)).bfloat16())


def test_learned_position_is_a_sum_over_its_root_mean_square():
    position = build(lambda: embeddings.LearnedPosition(4, 3, 2, 5), "cpu", torch.float64)
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(size, 4)) for size in (3, 2, 5)]
    with torch.no_grad():
        for parameter, table in zip((position.t, position.h, position.w), tables, strict=True):
            parameter.copy_(torch.tensor(table))
        got = position(2, 2, 3)
    assert got.shape == (12, 1, 4)
    for index, (t, h, w) in enumerate(np.ndindex(2, 2, 3)):
        e = tables[0][t] + tables[1][h] + tables[2][w]
        np.testing.assert_allclose(got[index, 0], e / (1e-6 + math.sqrt((e**2).mean())), rtol=1e-13)


@pytest.mark.parametrize(("axis", "grid"), [("T", (4, 2, 5)), ("H", (3, 3, 5)), ("W", (3, 2, 6))])
def test_position_table_too_small_names_axis_and_option(axis, grid):
    position = build(lambda: embeddings.LearnedPosition(4, 3, 2, 5), "cpu")
    with pytest.raises(ValueError, match=rf"{axis}={max(grid) if axis == 'W' else grid['THW'.index(axis)]} .*net\.max_latent"):
        position(*grid)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_grid_may_start_within_its_clip(first):
    fps = torch.tensor([24.0, 10.0]).double()
    common = {"fps_B": fps, "ratio": (2.0, 1.0, 1.0), "theta": 10000.0, "base_fps": 24.0}
    whole = embeddings.rope_angles(5, 2, 3, 12, **common)
    assert torch.equal(embeddings.rope_angles(2, 2, 3, 12, first_frame=first, **common), whole[first * 6 : (first + 2) * 6])
    position = build(lambda: embeddings.LearnedPosition(4, 5, 2, 3), "cpu", torch.float64)
    with torch.no_grad():
        for table in position.parameters():
            table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(len(table)), dtype=torch.float64))
        assert torch.equal(position(2, 2, 3, first), position(5, 2, 3)[first * 6 : (first + 2) * 6])


def test_a_grid_that_starts_too_late_for_the_table_is_refused():
    position = build(lambda: embeddings.LearnedPosition(4, 5, 2, 3), "cpu")
    with pytest.raises(ValueError, match=r"T=6 exceeds the position table's 5: raise net\.max_latent"):
        position(2, 2, 3, 4)
