"""The compiled kernels on a GPU against their plain-torch versions in float64, at the 7B's size on one rank of CP8, and edges against cv2.

Not run on a GPU yet.

TRITON_INTERPRET=0 python -m pytest tests/gpu

With COSMOS_MP_REHEARSE=1 the kernels' tests run on a CPU, interpreted and at small sizes: what they say is tried before there is a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_mp.kernels import using
from cosmos_mp.kernels.adaln import adaln
from cosmos_mp.kernels.canny import canny, canny_torch, library
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss
from cosmos_mp.kernels.gan_head import gan_loss, head_logits
from cosmos_mp.kernels.language import triton
from cosmos_mp.kernels.qk_norm_rope import qk_norm_rope

REHEARSED = os.environ.get("COSMOS_MP_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSED else "cuda"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [
    pytest.mark.gpu,
    *([] if REHEARSED else [on_gpu]),
    pytest.mark.skipif(
        triton is None or triton.knobs.runtime.interpret != REHEARSED,
        reason=f"kernels are {'compiled' if REHEARSED else 'interpreted'}: set TRITON_INTERPRET={int(REHEARSED)}",
    ),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def draw(*shape: int, seed: int) -> Tensor:
    # The shape as one tuple: that of a loss is empty.
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=torch.float64)


def adaln_gated(h: Tensor, y: Tensor, parts: Tensor) -> tuple[Tensor, ...]:
    shift, scale, gate = parts.chunk(3, dim=-1)
    return adaln(h, y, shift, scale, gate)


def adaln_position(h: Tensor, position: Tensor, parts: Tensor) -> tuple[Tensor, ...]:
    shift, scale, _ = parts.chunk(3, dim=-1)
    return adaln(h, position, shift, scale)


def turned(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    half = draw(x.shape[0], x.shape[1], 1, x.shape[3] // 2, seed=7)
    angles = torch.cat([half, half], dim=-1).to(torch.promote_types(x.dtype, torch.float32))
    return (qk_norm_rope(x, weight, angles.cos(), angles.sin()),)


def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (qk_norm_rope(x, weight),)


def head(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> tuple[Tensor, ...]:
    logits = head_logits(x.to(memory_format=torch.channels_last_3d), weight, bias, out_weight, out_bias)
    return logits, gan_loss(logits[:, None], 1)


TOKENS, PLACES, ODD, WIDTH, HEADS, TEXT = (37, 37, 7, 96, 3, 5) if REHEARSED else (7040, 1001, 77, 4096, 32, 512)
FEATURES, LATENT = ((2, 40, 1, 7, 3), (1, 16, 2, 7, 5)) if REHEARSED else ((2, 320, 1, 22, 40), (1, 16, 2, 88, 160))
CHANNELS = FEATURES[1:2]
CASES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[tuple[int, ...]]]] = {
    "adaln, gated": (adaln_gated, [(TOKENS, 1, WIDTH), (TOKENS, 1, WIDTH), (1, 3 * WIDTH)]),
    "adaln, position, two samples": (adaln_position, [(PLACES, 2, WIDTH), (PLACES, 1, WIDTH), (2, 3 * WIDTH)]),
    "adaln, odd": (adaln_gated, [(ODD, 3, 1000), (ODD, 3, 1000), (3, 3000)]),
    "qk_norm_rope, turned": (turned, [(TOKENS, 1, HEADS, 128), (128,)]),
    "qk_norm_rope, text keys": (plain, [(TEXT, 1, HEADS, 128), (128,)]),
    "gan_head": (head, [FEATURES, CHANNELS, CHANNELS, CHANNELS, (1,)]),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient(case, dtype):
    function, shapes = CASES[case]
    own = [draw(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    exact = [x.detach().double().requires_grad_() for x in own]
    with using("torch"):
        expected = function(*exact)
        weights = [draw(*x.shape, seed=20 + i) for i, x in enumerate(expected)]
        gradients = torch.autograd.grad(expected, exact, weights)
    with using("triton"):
        got = function(*own)
        found = torch.autograd.grad(got, own, [weight.to(x.dtype) for weight, x in zip(weights, got, strict=True)])
    for a, b in zip((*got, *found), (*expected, *gradients), strict=True):
        assert (a.double() - b).abs().max() < TOLERANCE[dtype] * b.abs().max(), case


@pytest.mark.parametrize("outputs_in", TOLERANCE, ids=str)
def test_dmd2_loss(outputs_in):
    y, xt, *outputs = (draw(*LATENT, seed=seed) for seed in range(5))
    factors = (torch.tensor([0.02], device=DEVICE), torch.tensor([0.49], device=DEVICE))

    def mean(error_BT: Tensor) -> Tensor:
        return error_BT.mean(dim=1, keepdim=True)

    outputs = [F.to(outputs_in) for F in outputs]
    exact = y.float().double().requires_grad_()
    with using("torch"):
        expected, _ = dmd2_loss(exact, xt.float().double(), Outputs(*outputs), *(f.double() for f in factors), 5.0, mean)
    own = y.float().requires_grad_()
    with using("triton"):
        loss, _ = dmd2_loss(own, xt.float(), Outputs(*outputs), *factors, 5.0, mean)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    a, b = torch.autograd.grad(loss, own)[0].double(), torch.autograd.grad(expected, exact)[0]
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@on_gpu
def test_compiled_canny_finds_cv2s_edges_in_1000_pictures(pictures):
    """Random, with few levels, flat, ramps, checkers, smooth, thin lines; each frame has thresholds of its own."""
    if library("cuda") is None:
        pytest.skip("libcanny_cuda.so is not built: python setup.py build_ext --inplace, with nvcc")
    count, rng = 0, np.random.default_rng(0)
    for frames, low, high in pictures.cases(21, repeats=20):
        lows, highs = (np.clip(value + rng.integers(-60, 60, len(frames)), -1, 2040) for value in (low, high))
        edges = canny(torch.from_numpy(frames).cuda(), torch.from_numpy(lows), torch.from_numpy(highs)).cpu().numpy()
        for number in range(len(frames)):
            pictures.assert_equal(edges[number : number + 1], frames[number : number + 1], int(lows[number]), int(highs[number]))
        count += len(frames)
    assert count >= 1000


@on_gpu
@pytest.mark.parametrize("version", [canny, canny_torch])
def test_canny_of_more_frames_than_go_together_on_a_stream_of_their_own(pictures, version):
    if version is canny and library("cuda") is None:
        pytest.skip("libcanny_cuda.so is not built: python setup.py build_ext --inplace, with nvcc")
    rng, stream = np.random.default_rng(0), torch.cuda.Stream()
    frames = np.concatenate([pictures.draw(kind, rng, 4, 704, 1280, 3) for kind in pictures.KINDS])
    with torch.cuda.stream(stream):
        edges = version(torch.from_numpy(frames).cuda(), 60, 150)
    stream.synchronize()
    pictures.assert_equal(edges.cpu().numpy(), frames, 60, 150)
