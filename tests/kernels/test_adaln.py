"""The fused adaptive layer norm, under Triton's interpreter, against its plain-torch version in float64, and that against numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_mp.kernels import adaln as module
from cosmos_mp.kernels import using
from cosmos_mp.kernels.adaln import PROGRAMS, adaln, adaln_torch, modulate

SIZES = [(5, 2, 96), (1, 1, 1), (7, 1, 33), (3, 4, 8), (13, 3, 127), (2 * PROGRAMS + 9, 1, 1100)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(size: tuple[int, int, int], gated: bool, dtype: torch.dtype) -> list[Tensor]:
    """Residual stream, what is added, and (B, 3D) of which shift, scale and gate are parts."""
    length, batch, width = size
    added = draw(length, batch if gated else 1, width, seed=1)
    return [x.to(dtype).requires_grad_() for x in (draw(*size), added, draw(batch, 3 * width, seed=2))]


def run(function, h: Tensor, added: Tensor, parts: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    shift, scale, gate = parts.chunk(3, dim=-1)
    return function(h, added, shift, scale, gate if gated else None)


def largest_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


@pytest.mark.parametrize("batch", [1, 2])
def test_modulate_is_layer_norm_times_one_plus_scale_plus_shift(batch):
    h, shift, scale = draw(5, batch, 8), draw(batch, 8, seed=1), draw(batch, 8, seed=2)
    x = h.numpy()
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(modulate(h, shift, scale), normed * (1 + scale.numpy()) + shift.numpy(), atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_the_torch_version_adds_and_modulates(gated):
    h, added, parts = inputs((5, 2, 8), gated, torch.float64)
    shift, scale, gate = parts.chunk(3, dim=-1)
    r, x = run(adaln_torch, h, added, parts, gated)
    expected = h + gate * added if gated else h + added
    torch.testing.assert_close(r, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x, modulate(expected, shift, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_every_gradient(size, gated, dtype):
    own = inputs(size, gated, dtype)
    exact = [x.detach().double().requires_grad_() for x in own]
    expected = run(adaln_torch, *exact, gated)
    weights = [draw(*size, seed=seed) for seed in (3, 4)]
    gradients = torch.autograd.grad(expected, exact, weights)
    with using("triton"):
        got = run(adaln, *own, gated)
        assert [x.dtype for x in got] == [dtype, dtype]
        found = torch.autograd.grad(got, own, [weight.to(dtype) for weight in weights])
    for a, b in zip((*got, *found), (*expected, *gradients), strict=True):
        assert a.shape == b.shape and largest_error(a, b) < TOLERANCE[dtype]
    if gated is False:
        assert not found[2][:, 2 * size[2] :].any()  # there is no gate


def test_inputs_and_gradients_need_not_be_contiguous():
    h, added, parts = draw(2, 6, 10).transpose(0, 1).requires_grad_(), draw(10, 2, 6, seed=1).permute(2, 1, 0).requires_grad_(), draw(2, 30)
    wide = draw(30, 2, seed=2).T.requires_grad_()
    weights = [draw(2, 6, 10, seed=3).transpose(0, 1), draw(10, 2, 6, seed=4).permute(2, 1, 0)]
    for values in (parts.requires_grad_(), wide):
        expected = run(adaln_torch, h, added, values, True)
        gradients = torch.autograd.grad(expected, (h, added, values), weights)
        with using("triton"):
            got = run(adaln, h, added, values, True)
            found = torch.autograd.grad(got, (h, added, values), weights)
        for a, b in zip((*got, *found), (*expected, *gradients), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_frozen_network_gets_the_gradient_of_the_stream_alone():
    h, added, parts = inputs((9, 2, 12), True, torch.float64)
    expected = torch.autograd.grad(sum(x.sin().sum() for x in run(adaln_torch, h, added, parts.detach(), True)), (h, added))
    with using("triton"):
        outputs = run(adaln, h, added, parts.detach(), True)
        found = torch.autograd.grad(sum(x.sin().sum() for x in outputs), (h, added))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_what_is_written_is_what_is_normalised():
    """In half precision the stream is rounded before its mean is taken, as by torch's operators: the backward pass reads it so."""
    h, added, parts = inputs((1, 1, 1), True, torch.bfloat16)
    with using("triton"):
        _, x = run(adaln, h, added, parts, True)
        (gradient,) = torch.autograd.grad(x.sum(), parts)
    assert gradient[0, 1] == 0  # of the scale: one number is its own mean, and nothing is left to scale


def test_a_stream_that_nobody_reads_on_has_no_gradient_to_add():
    h, added, parts = inputs((4, 1, 6), True, torch.float64)
    expected = torch.autograd.grad(run(adaln_torch, h, added, parts, True)[1].sin().sum(), (h, added, parts))
    with using("triton"):
        found = torch.autograd.grad(run(adaln, h, added, parts, True)[1].sin().sum(), (h, added, parts))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_sums_over_the_tokens_are_of_float32(monkeypatch):
    """Two programs of one token at a time: the first's sum for shift is 257, which bfloat16 does not have, the other's is -256."""
    monkeypatch.setattr(module, "PROGRAMS", 2)
    h, added, parts = inputs((4, 1, 2048), True, torch.bfloat16)
    dx = torch.tensor([256.0, -256.0, 1.0, 0.0], dtype=torch.bfloat16)[:, None, None].expand(h.shape)
    with using("triton"):
        (gradient,) = torch.autograd.grad(run(adaln, h, added, parts, True)[1], parts, dx)
    assert (gradient[0, :2048] == 1).all()


@pytest.mark.parametrize("version", ["torch", "triton"])
@pytest.mark.parametrize(
    ("added", "shift", "scale", "gate"),
    [
        ((3, 2, 4), (1, 4), (2, 4), (2, 4)),
        ((3, 2, 4), (2, 4), (1, 4), (2, 4)),
        ((3, 2, 4), (2, 4), (2, 4), (1, 4)),
        ((3, 2, 4), (2, 1), (2, 4), (2, 4)),
        ((3, 1, 4), (2, 4), (2, 4), (2, 4)),
        ((3, 2, 4), (2, 4), (2, 4), None),
        ((1, 1, 4), (2, 4), (2, 4), None),
    ],
)
def test_shapes_that_would_be_broadcast_are_refused(version, added, shift, scale, gate):
    shapes = [shape for shape in (added, shift, scale, gate) if shape]
    with using(version), pytest.raises(ValueError, match=re.escape(f"not {shapes}")):
        adaln(draw(3, 2, 4), *(draw(*shape) for shape in shapes))
