"""The step between two layers of a DiT block: residual, LayerNorm without affine, scale and shift, in one pass.

    r = h + gate * y        or, where a block begins,  r = h + position
    x = (r - mean(r)) / sqrt(var(r) + eps) * (1 + scale) + shift

h, y, r, x are (S, B, D), gate, scale, shift are (B, D), position is (S, 1, D); mean and variance run over D. With n = S B D and e bytes per
element the forward pass moves at least 4 n e: h and y in, r and x out. The backward pass moves 6 n e: r, y and both gradients in, those of
h and y out; the sums over S for gate, scale and shift leave as partial sums of a few programs. With `position` it is 4 n e.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosmos_mp.kernels import fused
from cosmos_mp.kernels.language import TYPES, Shipped, accumulator, blocks, jit, power_of_two, tl

EPS = 1e-6
PROGRAMS = 132
"""In the backward pass, each with its own partial sums: one for every multiprocessor of an H100."""


def adaln(h_SBD: Tensor, added: Tensor, shift_BD: Tensor, scale_BD: Tensor, gate_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and read it through an adaptive layer norm.

    Args:
        added: y (S, B, D), multiplied with the gate; or without a gate the position (S, 1, D).

    Returns:
        r and x, (S, B, D).

    Raises:
        ValueError: a shape is another one; nothing is broadcast but the position.
    """
    rows = (shift_BD, scale_BD) if gate_BD is None else (shift_BD, scale_BD, gate_BD)
    length, batch, width = h_SBD.shape
    expected = [(length, 1 if gate_BD is None else batch, width)] + [(batch, width)] * len(rows)
    shapes = [tuple(values.shape) for values in (added, *rows)]
    if shapes != expected:
        raise ValueError(f"beside h {tuple(h_SBD.shape)}, what is added, shift, scale and any gate must be {expected}, not {shapes}")
    run = _AdaLN.apply if fused(h_SBD) else adaln_torch
    return run(h_SBD, added, shift_BD, scale_BD, gate_BD)


def adaln_torch(h_SBD: Tensor, added: Tensor, shift_BD: Tensor, scale_BD: Tensor, gate_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`adaln` by torch's own operators."""
    r = h_SBD + added if gate_BD is None else torch.addcmul(h_SBD, gate_BD, added)
    return r, modulate(r, shift_BD, scale_BD)


def modulate(h_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without affine, then * (1 + scale) + shift."""
    if h_SBD.shape[1] == 1:  # one sample's are the norm's own weight and bias: a pass less each way, and what the norm gave is not kept
        return F.layer_norm(h_SBD, h_SBD.shape[-1:], 1 + scale_BD[0], shift_BD[0], EPS)
    return torch.addcmul(shift_BD, F.layer_norm(h_SBD, h_SBD.shape[-1:], eps=EPS), 1 + scale_BD)


# --- Triton ---


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, added: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        length, batch, width = h.shape
        h, added, (shift, scale, gate) = h.contiguous(), added.contiguous(), (_by_rows(values) for values in (shift, scale, gate))
        acc = accumulator(h)
        r, x = torch.empty_like(h), torch.empty_like(h)
        mean, rstd = (torch.empty(length * batch, dtype=acc, device=h.device) for _ in range(2))
        strides = [0 if values is None else values.stride(0) for values in (shift, scale, gate)]
        rows, constants = length * batch, _tile(width) | {"GATED": gate is not None, "EPS": EPS, "ACC": TYPES[acc]}
        arguments = (h, added, gate, shift, scale, r, x, mean, rstd, rows, batch, *strides)
        _forward[(blocks(rows, constants["ROWS"]),)](*arguments, **constants, num_warps=8)
        ctx.save_for_backward(r, added if gate is not None else None, scale, gate, mean, rstd)
        return r, x

    @staticmethod
    @once_differentiable
    def backward(ctx, dr: Tensor, dx: Tensor):
        r, added, scale, gate, mean, rstd = ctx.saved_tensors
        length, batch, width = r.shape
        dr, dx = dr.contiguous(), dx.contiguous()
        gated, columns = gate is not None, any(ctx.needs_input_grad[2:])
        dh = torch.empty_like(r)
        dy = torch.empty_like(r) if gated else None
        constants = _tile(width) | {"GATED": gated, "COLUMNS": columns, "ACC": TYPES[mean.dtype]}
        programs = min(blocks(length, constants["ROWS"]), max(1, PROGRAMS // batch))
        sums = torch.empty(3, programs, batch, width, dtype=mean.dtype, device=r.device) if columns else None
        strides = [scale.stride(0), gate.stride(0) if gated else 0]
        arguments = (r, added, gate, scale, mean, rstd, dr, dx, dh, dy, sums, length, batch, programs, *strides)
        _backward[(programs, batch)](*arguments, **constants, num_warps=16)
        dgate, dscale, dshift = sums.sum(dim=1).to(scale.dtype) if columns else (None, None, None)
        dadded = dy if gated else dh if batch == 1 else dh.sum(dim=1, keepdim=True)
        return dh, dadded, dshift, dscale, dgate if gated else None


def _tile(width: int) -> dict[str, int]:
    """Rows of a program: one of the 7B's, or as many short ones as keep its threads busy."""
    block = power_of_two(width)
    return {"D": width, "ROWS": max(1, 2048 // block), "BLOCK": block}


def _by_rows(values: Tensor | None) -> Tensor | None:
    """Parts of a wider matrix stay where they are: only their rows must be dense."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()


@jit
def _forward(
    h_ptr, added_ptr, gate_ptr, shift_ptr, scale_ptr, r_ptr, x_ptr, mean_ptr, rstd_ptr, rows, batch, shift_row, scale_row, gate_row,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    there = row < rows
    inside = there & (columns < D)
    b = row % batch
    r = tl.load(h_ptr + row * D + columns, inside, other=0.0).to(ACC)
    if GATED:
        gate = tl.load(gate_ptr + b * gate_row + columns, inside, other=0.0).to(ACC)
        r += gate * tl.load(added_ptr + row * D + columns, inside, other=0.0).to(ACC)
    else:
        r += tl.load(added_ptr + row // batch * D + columns, inside, other=0.0).to(ACC)
    r = r.to(r_ptr.dtype.element_ty)  # as it will be read in the backward pass
    tl.store(r_ptr + row * D + columns, r, inside)
    r = r.to(ACC)
    mean = tl.sum(r, axis=1, keep_dims=True) / D
    centred = tl.where(inside, r - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + EPS)
    scale = tl.load(scale_ptr + b * scale_row + columns, inside, other=0.0).to(ACC)
    shift = tl.load(shift_ptr + b * shift_row + columns, inside, other=0.0).to(ACC)
    tl.store(x_ptr + row * D + columns, centred * rstd * (1.0 + scale) + shift, inside)
    tl.store(mean_ptr + row, mean, there)
    tl.store(rstd_ptr + row, rstd, there)


@jit
def _backward(
    r_ptr, y_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dr_ptr, dx_ptr, dh_ptr, dy_ptr, sums_ptr, length, batch, programs,
    scale_row, gate_row,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    first, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    scale = 1.0 + tl.load(scale_ptr + b * scale_row + columns, columns < D, other=0.0).to(ACC)
    if GATED:
        gate = tl.load(gate_ptr + b * gate_row + columns, columns < D, other=0.0).to(ACC)
    if COLUMNS:
        dgate, dscale, dshift = (tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, BLOCK], ACC))
    for start in range(first * ROWS, length, programs * ROWS):
        s = start + tl.arange(0, ROWS)[:, None]
        row = s * batch + b
        there = s < length
        inside = there & (columns < D)
        r = tl.load(r_ptr + row * D + columns, inside, other=0.0).to(ACC)
        dx = tl.load(dx_ptr + row * D + columns, inside, other=0.0).to(ACC)
        rstd = tl.load(rstd_ptr + row, there, other=0.0)
        normed = tl.where(inside, (r - tl.load(mean_ptr + row, there, other=0.0)) * rstd, 0.0)
        scaled = dx * scale
        mean = tl.sum(scaled, axis=1, keep_dims=True) / D
        along = tl.sum(scaled * normed, axis=1, keep_dims=True) / D
        dh = tl.load(dr_ptr + row * D + columns, inside, other=0.0).to(ACC) + rstd * (scaled - mean - normed * along)
        tl.store(dh_ptr + row * D + columns, dh, inside)
        if GATED:
            tl.store(dy_ptr + row * D + columns, gate * dh, inside)
        if COLUMNS:
            if GATED:
                dgate += dh * tl.load(y_ptr + row * D + columns, inside, other=0.0).to(ACC)
            dscale += dx * normed
            dshift += dx
    if COLUMNS:
        column = tl.arange(0, BLOCK)
        place = (first * tl.num_programs(1) + b) * D + column
        if GATED:
            tl.store(sums_ptr + place, tl.sum(dgate, axis=0), column < D)
        tl.store(sums_ptr + programs * batch * D + place, tl.sum(dscale, axis=0), column < D)
        tl.store(sums_ptr + 2 * programs * batch * D + place, tl.sum(dshift, axis=0), column < D)


def shipped() -> list[Shipped]:
    """The launches of one rank of CP8 in bfloat16: 7,040 tokens of width 4096."""
    length, width = 7040, 4096
    n, row = length * width * 2, width * 2
    constants = _tile(width) | {"ACC": tl.float32}
    rows = ("shift_row", "scale_row", "gate_row")
    launches = []
    for gated in (True, False):
        name = "gated" if gated else "position"
        signature = dict.fromkeys(["h_ptr", "added_ptr", "gate_ptr", "shift_ptr", "scale_ptr", "r_ptr", "x_ptr"], "*bf16")
        signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"} | dict.fromkeys(["rows", "batch", *rows], "i32")
        least = 4 * n + length * (8 + (3 if gated else 2) * row)
        own = {**constants, "GATED": gated, "EPS": EPS}
        launches.append(Shipped(f"adaln {name} forward", _forward, signature, own, 8, length, least, 64, scalars=2, aligned=rows))
        signature = dict.fromkeys(["r_ptr", "y_ptr", "gate_ptr", "scale_ptr"], "*bf16") | dict.fromkeys(["mean_ptr", "rstd_ptr"], "*fp32")
        signature |= dict.fromkeys(["dr_ptr", "dx_ptr", "dh_ptr", "dy_ptr"], "*bf16") | {"sums_ptr": "*fp32"}
        signature |= dict.fromkeys(["length", "batch", "programs", "scale_row", "gate_row"], "i32")
        for columns in (True, False):
            moved = (4 + (1 if gated else 0) + (1 if gated and columns else 0)) * n + length * 8
            kept = PROGRAMS * ((2 if gated else 1) * row + (4 * width * (3 if gated else 2) if columns else 0))
            own = {**constants, "GATED": gated, "COLUMNS": columns}
            shape = {"warps": 16, "programs": PROGRAMS, "registers": 128, "scalars": 2, "aligned": rows[1:], "trips": length / PROGRAMS}
            words = f"adaln {name} backward" + ("" if columns else ", frozen")
            launches.append(Shipped(words, _backward, signature, own, least_bytes=moved + kept, **shape))
    return launches
