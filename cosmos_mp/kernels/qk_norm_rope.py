"""Root-mean-square norm of every head of queries or keys, and their rotary position, in one pass.

    u = x / sqrt(mean(x^2) + eps) * weight
    out = [u1 cos - u2 sin, u2 cos + u1 sin]        with u1, u2 the halves of a head; without cos and sin, out = u

x and out are (S, B, H, D), weight is (D,), cos and sin are (S, B, 1, D); the mean runs over D. With n = S B H D and e bytes per element the
forward pass moves at least 2 n e: x in, out out. The backward pass moves 3 n e: x and the gradient in, that of x out; the root is worked
out again, so that nothing but x is kept, and the sums over S, B and H for weight leave as partial sums of the programs. A program has all
heads of its tokens, so that either pass reads half of cos and half of sin once: S B D elements together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosmos_mp.kernels import fused
from cosmos_mp.kernels.language import TYPES, Shipped, accumulator, blocks, jit, power_of_two, tl

EPS = 1e-6
ROWS = 16
"""Tokens (s, b) of a program, which takes their heads one after the other."""
SUMS = 8
"""Partial sums of a program for each weight: so many that its 128 threads write 16 bytes each."""
PROGRAMS = 264
"""Wanted: two for every multiprocessor of an H100. Where the tokens make fewer, several programs share the heads of one block of tokens."""


def qk_norm_rope(x_SBHD: Tensor, weight_D: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Normalise every head of queries or keys and, where a rotation is given, turn it.

    Args:
        cos: of the rotary angles, (S, B, 1, D), with equal halves of D: the kernel reads the first alone.
        sin: likewise. Neither gets a gradient from the kernel: they come from the frame rate.

    Returns:
        (S, B, H, D), in the type of x.
    """
    run = _QKNormRope.apply if fused(x_SBHD) else qk_norm_rope_torch
    return run(x_SBHD, weight_D, cos, sin)


def qk_norm_rope_torch(x_SBHD: Tensor, weight_D: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """`qk_norm_rope` by torch's own operators."""
    x = F.rms_norm(x_SBHD, x_SBHD.shape[-1:], weight_D, EPS) if x_SBHD.is_cuda else _RMSNorm.apply(x_SBHD, weight_D)
    return x if cos is None else rotate(x, cos, sin)


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm that keeps x alone. Torch's own does so on a GPU; on a CPU it is a chain of operators that keeps the normalised x too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (_normalised(x)[0] * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, du: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        normalised, rstd = _normalised(x)
        du = du.to(normalised.dtype)
        along = du * normalised
        mean = (along * weight).mean(dim=-1, keepdim=True)
        dx = torch.addcmul(du * weight, normalised, mean, value=-1) * rstd
        dweight = along.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), dweight


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and one over that."""
    x = x.to(accumulator(x))
    rstd = (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return x * rstd, rstd


def rotate(x_SBHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding: x cos + [-x2, x1] sin, with x1 and x2 the halves of the head, in float32 or wider."""
    x = x_SBHD.to(torch.promote_types(x_SBHD.dtype, torch.float32))
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin).to(x_SBHD.dtype)


# --- Triton ---


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        length, batch, heads, width = x.shape
        x, weight = _by_heads(x), weight.contiguous()
        if cos is not None:
            cos, sin = (values.expand(length, batch, 1, width).contiguous() for values in (cos, sin))
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        together = math.gcd(heads, 2)
        arguments = (x, weight, cos, sin, out, length * batch, batch, *x.stride()[:3])
        _forward[_grid(x, together)](*arguments, **_constants(x, cos), TOGETHER=together, num_warps=4)
        ctx.save_for_backward(x, weight, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        x, weight, cos, sin = ctx.saved_tensors
        length, batch, _, width = x.shape
        dout, constants, grid = _by_heads(dout), _constants(x, cos), _grid(x)
        dx, sums = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
        if ctx.needs_input_grad[1]:
            sums = torch.empty(*grid, SUMS, width, dtype=_accumulator(x, cos), device=x.device)
        arguments = (x, weight, cos, sin, dout, dx, sums, length * batch, batch, *x.stride()[:3], *dout.stride()[:3])
        _backward[grid](*arguments, **constants, SUMS=0 if sums is None else SUMS, num_warps=4)
        return dx, None if sums is None else sums.sum(dim=(0, 1, 2)).to(weight.dtype), None, None


def _by_heads(x: Tensor) -> Tensor:
    """Parts and permutations of another tensor stay where they are: only the heads must be dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(x: Tensor, together: int = 1) -> tuple[int, int]:
    """Blocks of tokens, and programs that share the heads of each."""
    length, batch, heads, _ = x.shape
    count = blocks(length * batch, ROWS)
    return count, max(1, min(heads // together, PROGRAMS // count))


def _accumulator(x: Tensor, cos: Tensor | None) -> torch.dtype:
    return accumulator(x) if cos is None else accumulator(x, cos)


def _constants(x: Tensor, cos: Tensor | None) -> dict:
    heads, width = x.shape[2:]
    constants = {"H": heads, "D": width, "BLOCK": power_of_two(width // 2), "ROWS": ROWS}
    return {**constants, "ROTATED": cos is not None, "EPS": EPS, "ACC": TYPES[_accumulator(x, cos)]}


@jit
def _forward(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, tokens, batch, x_s, x_b, x_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ROTATED: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < D // 2)
    s, b, token = (token // batch).to(tl.int64), (token % batch).to(tl.int64), token.to(tl.int64)
    weight_ptr += tl.zeros_like(token) + column  # once for every token: one row alone would be read 2 bytes at a time
    weight1 = tl.load(weight_ptr, inside, other=0.0).to(ACC)[None]
    weight2 = tl.load(weight_ptr + D // 2, inside, other=0.0).to(ACC)[None]
    if ROTATED:
        cos = tl.load(cos_ptr + token * D + column, inside, other=0.0).to(ACC)[None]
        sin = tl.load(sin_ptr + token * D + column, inside, other=0.0).to(ACC)[None]
    x_ptr += (s * x_s + b * x_b + column)[None]
    out_ptr += (token * (H * D) + column)[None]
    inside = inside[None]
    for first in range(tl.program_id(1).to(tl.int64) * TOGETHER, H, tl.num_programs(1) * TOGETHER):
        head = first + tl.arange(0, TOGETHER)[:, None, None]
        x1 = tl.load(x_ptr + head * x_h, inside, other=0.0).to(ACC)
        x2 = tl.load(x_ptr + head * x_h + D // 2, inside, other=0.0).to(ACC)
        rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=2) / D + EPS)[:, :, None]
        out1, out2 = x1 * rstd * weight1, x2 * rstd * weight2
        if ROTATED:
            out1, out2 = out1 * cos - out2 * sin, out2 * cos + out1 * sin
        tl.store(out_ptr + head * D, out1, inside)
        tl.store(out_ptr + head * D + D // 2, out2, inside)


@jit
def _backward(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, dout_ptr, dx_ptr, sums_ptr, tokens, batch, x_s, x_b, x_h,
    dout_s, dout_b, dout_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ROTATED: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < D // 2)
    s, b, token = (token // batch).to(tl.int64), (token % batch).to(tl.int64), token.to(tl.int64)
    weight_ptr += tl.zeros_like(token) + column
    weight1 = tl.load(weight_ptr, inside, other=0.0).to(ACC)
    weight2 = tl.load(weight_ptr + D // 2, inside, other=0.0).to(ACC)
    if ROTATED:
        cos = tl.load(cos_ptr + token * D + column, inside, other=0.0).to(ACC)
        sin = tl.load(sin_ptr + token * D + column, inside, other=0.0).to(ACC)
    x_ptr += s * x_s + b * x_b + column
    dout_ptr += s * dout_s + b * dout_b + column
    dx_ptr += token * (H * D) + column
    if SUMS:
        dweight1, dweight2 = tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, BLOCK], ACC)
    for head in range(tl.program_id(1).to(tl.int64), H, tl.num_programs(1)):
        x1 = tl.load(x_ptr + head * x_h, inside, other=0.0).to(ACC)
        x2 = tl.load(x_ptr + head * x_h + D // 2, inside, other=0.0).to(ACC)
        du1 = tl.load(dout_ptr + head * dout_h, inside, other=0.0).to(ACC)
        du2 = tl.load(dout_ptr + head * dout_h + D // 2, inside, other=0.0).to(ACC)
        if ROTATED:
            du1, du2 = du1 * cos + du2 * sin, du2 * cos - du1 * sin
        rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + EPS)[:, None]
        x1, x2 = x1 * rstd, x2 * rstd
        if SUMS:
            dweight1 += du1 * x1
            dweight2 += du2 * x2
        du1, du2 = du1 * weight1, du2 * weight2
        along = (tl.sum(du1 * x1 + du2 * x2, axis=1) / D)[:, None]
        tl.store(dx_ptr + head * D, rstd * (du1 - x1 * along), inside)
        tl.store(dx_ptr + head * D + D // 2, rstd * (du2 - x2 * along), inside)
    if SUMS:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        sums_ptr += (program * SUMS + tl.arange(0, SUMS)[:, None]) * D + column
        tl.store(sums_ptr, tl.sum(tl.reshape(dweight1, [ROWS // SUMS, SUMS, BLOCK]), axis=0), column < D // 2)
        tl.store(sums_ptr + D // 2, tl.sum(tl.reshape(dweight2, [ROWS // SUMS, SUMS, BLOCK]), axis=0), column < D // 2)


def shipped() -> list[Shipped]:
    """The launches of one rank of CP8 in bfloat16: 7,040 tokens of 32 heads of 128; queries and keys of self-attention are rotated.

    The 512 keys of the text run the kernel of the other queries, with their heads shared by several programs.
    """
    tokens, heads, width = 7040, 32, 128
    n, programs = tokens * heads * width * 2, blocks(tokens, ROWS)
    launches = []
    for rotated in (True, False):
        name = "rotated" if rotated else "plain"
        constants = {"H": heads, "D": width, "BLOCK": width // 2, "ROWS": ROWS, "ROTATED": rotated, "EPS": EPS, "ACC": tl.float32}
        once = programs * width * 2 + (tokens * width * 4 if rotated else 0)
        pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        sizes, strides = dict.fromkeys(["tokens", "batch"], "i32"), ("x_s", "x_b", "x_h")
        signature, own = pointers | {"out_ptr": "*bf16"} | sizes | dict.fromkeys(strides, "i32"), {**constants, "TOGETHER": 2}
        shape = {"warps": 4, "programs": programs, "registers": 80, "aligned": strides, "trips": heads / 2}
        launches.append(Shipped(f"qk_norm_rope {name} forward", _forward, signature, own, least_bytes=2 * n + once, **shape))
        strides += ("dout_s", "dout_b", "dout_h")
        signature = pointers | {"dout_ptr": "*bf16", "dx_ptr": "*bf16", "sums_ptr": "*fp32"} | sizes | dict.fromkeys(strides, "i32")
        shape |= {"registers": 128, "aligned": strides, "trips": heads}
        for sums in (SUMS, 0):
            least = 3 * n + once + (programs * width * 4 if sums else 0)
            words = f"qk_norm_rope {name} backward" + ("" if sums else ", frozen")
            launches.append(Shipped(words, _backward, signature, {**constants, "SUMS": sums}, least_bytes=least, **shape))
    return launches
