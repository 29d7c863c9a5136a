"""DMD2's score-difference loss from raw network outputs: preconditioning, guidance, normaliser, loss and gradient.

With F_T = F_cond + g (F_cond - F_uncond) of the teacher and F_S of the fake score, both at x_t = y + sigma eps, and EDM's factors at sigma:

    x0_T = c_skip x_t + c_out F_T                       x0_S = c_skip x_t + c_out F_S
    m    = mean|y - x0_T|, one number per sample        loss = 0.5 mean(((x0_S - x0_T) / m)^2)
    d loss / d y = (x0_S - x0_T) / (m n)                (DMD, arXiv 2311.18828, eq. 7-8; n elements in y)

The first launch reads y, x_t and the three F and writes d = c_out (F_S - F_T) and two sums per frame; of these the caller makes m, over the
holders of a clip where it is cut. The second, in the backward pass, reads d and writes the gradient: 8 accesses per element, 7 without
guidance. That is the least for two passes with m between them: m needs four of the inputs, and the gradient cannot be written before m is
known. With F in bfloat16 and the rest in float32 they are 26 bytes, as many as 6.5 accesses in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosmos_mp.kernels import fused
from cosmos_mp.kernels.language import TYPES, Shipped, accumulator, blocks, jit, power_of_two, tl

BLOCK = 2048


class Outputs(NamedTuple):
    """Raw outputs F (B, C, T, H, W): of the teacher with text and without (None where nothing is guided), and of the fake score."""

    conditional: Tensor
    unconditional: Tensor | None
    fake: Tensor


def dmd2_loss(
    y: Tensor,
    xt: Tensor,
    outputs: Outputs,
    c_skip_B: Tensor,
    c_out_B: Tensor,
    guidance: float,
    normalise: Callable[[Tensor], Tensor],
    given_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, with gradient into y alone, and the normaliser.

    Args:
        y: generated latent (B, C, T, H, W), float32 or wider; xt: the same with noise.
        c_skip_B, c_out_B: the preconditioning's factors at sigma.
        guidance: g.
        normalise: of mean|y - x0_T| per frame, (B, T), makes m per frame, (B, T) or (B, 1).
        given_BT: 1 on given frames, which both scores take as they are: they have no difference and count in no mean's sum.

    Returns:
        loss (scalar) and m as `normalise` gives it; both in the type of y.
    """
    run = _dmd2_loss_triton if fused(y) else dmd2_loss_torch
    return run(
        y, xt.detach(), Outputs(*(F if F is None else F.detach() for F in outputs)), c_skip_B, c_out_B, guidance, normalise, given_BT
    )


def dmd2_loss_torch(
    y: Tensor,
    xt: Tensor,
    outputs: Outputs,
    c_skip_B: Tensor,
    c_out_B: Tensor,
    guidance: float,
    normalise: Callable[[Tensor], Tensor],
    given_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dmd2_loss` by torch's own operators."""
    with torch.no_grad():
        conditional, unconditional, fake = (F if F is None else F.to(y.dtype) for F in outputs)
        c_skip, c_out = (factor.to(y.dtype)[:, None, None, None, None] for factor in (c_skip_B, c_out_B))
        teacher = conditional if unconditional is None else conditional + guidance * (conditional - unconditional)
        error, difference = y - c_skip * xt - c_out * teacher, c_out * (fake - teacher)
        if given_BT is not None:
            made = 1 - given_BT.to(y.dtype)[:, None, :, None, None]
            error, difference = made * error, made * difference
        scale = normalise(error.abs().mean(dim=(1, 3, 4)))
    return vsd_loss(y, difference / scale[:, None, :, None, None]), scale


def vsd_loss(y: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean(direction^2), whose gradient at y is direction / n: the distance to the constant target y - direction.

    Args:
        direction: (x0_S - x0_T) / m.
    """
    target = (y - direction).detach()
    return 0.5 * (y - target).pow(2).mean()


# --- Triton ---


def _dmd2_loss_triton(
    y: Tensor,
    xt: Tensor,
    outputs: Outputs,
    c_skip_B: Tensor,
    c_out_B: Tensor,
    guidance: float,
    normalise: Callable[[Tensor], Tensor],
    given_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, channels, frames, height, width = y.shape
    size, acc = height * width, accumulator(y)
    rows, columns = batch * channels * frames, blocks(size, BLOCK)
    made = torch.ones(batch, frames, dtype=acc, device=y.device) if given_BT is None else (1 - given_BT.to(acc)).contiguous()
    c_skip, c_out = (factor.to(acc)[:, None] * made for factor in (c_skip_B, c_out_B))
    conditional, unconditional, fake = (F if F is None else F.contiguous() for F in outputs)
    difference = torch.empty(y.shape, dtype=acc, device=y.device)
    sums = torch.empty(2, rows, columns, dtype=acc, device=y.device)
    inputs = (y.detach().contiguous(), xt.contiguous(), conditional, unconditional, fake, made, c_skip, c_out)
    constants = {"GUIDANCE": 0.0 if unconditional is None else guidance, "ACC": TYPES[acc], "BLOCK": min(BLOCK, power_of_two(size))}
    _scores[(rows, columns)](*inputs, difference, sums, size, frames, channels * frames, **constants, num_warps=4)
    means = sums.sum(dim=2).view(2, batch, channels, frames).sum(dim=2) / (channels * size)
    scale = normalise(means[0])
    factor = (1 / scale).expand(batch, frames).contiguous()
    loss = 0.5 * (means[1] * factor * factor).mean()
    return _WithGradient.apply(y, loss, difference, factor), scale


class _WithGradient(torch.autograd.Function):
    """The loss that has been computed, with its gradient difference * factor / n at y."""

    @staticmethod
    def forward(ctx, y: Tensor, loss: Tensor, difference: Tensor, factor_BT: Tensor) -> Tensor:
        ctx.save_for_backward(difference, factor_BT)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        difference, factor = ctx.saved_tensors
        batch, channels, frames, height, width = difference.shape
        size = height * width
        factor = factor * (dloss / difference.numel())
        dy = torch.empty_like(difference)
        grid = (batch * channels * frames, blocks(size, BLOCK))
        block = min(BLOCK, power_of_two(size))
        _gradient[grid](difference, factor, dy, size, frames, channels * frames, ACC=TYPES[difference.dtype], BLOCK=block, num_warps=4)
        return dy, None, None, None


@jit
def _scores(
    y_ptr, xt_ptr, conditional_ptr, unconditional_ptr, fake_ptr, made_ptr, c_skip_ptr, c_out_ptr, difference_ptr, sums_ptr,
    size, frames, per_sample,
    GUIDANCE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    frame = row // per_sample * frames + row % frames
    within = column * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    place = row * size + within
    teacher = tl.load(conditional_ptr + place, inside, other=0.0).to(ACC)
    if GUIDANCE != 0:
        teacher += GUIDANCE * (teacher - tl.load(unconditional_ptr + place, inside, other=0.0).to(ACC))
    # Both factors are 0 on given frames.
    c_skip, c_out, made = tl.load(c_skip_ptr + frame), tl.load(c_out_ptr + frame), tl.load(made_ptr + frame)
    y = tl.load(y_ptr + place, inside, other=0.0).to(ACC)
    error = made * y - c_skip * tl.load(xt_ptr + place, inside, other=0.0).to(ACC) - c_out * teacher
    difference = c_out * (tl.load(fake_ptr + place, inside, other=0.0).to(ACC) - teacher)
    tl.store(difference_ptr + place, difference, inside)
    partial = row * tl.num_programs(1) + column
    tl.store(sums_ptr + partial, tl.sum(tl.abs(error), axis=0))
    tl.store(sums_ptr + tl.num_programs(0) * tl.num_programs(1) + partial, tl.sum(difference * difference, axis=0))


@jit
def _gradient(difference_ptr, factor_ptr, dy_ptr, size, frames, per_sample, ACC: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    factor = tl.load(factor_ptr + row // per_sample * frames + row % frames)
    tl.store(dy_ptr + row * size + within, factor * tl.load(difference_ptr + row * size + within, inside, other=0.0), inside)


def shipped() -> list[Shipped]:
    """The launches of one rank of CP8: (1, 16, 2, 88, 160), outputs in bfloat16 and latents in float32."""
    rows, size = 16 * 2, 88 * 160
    programs, n = rows * blocks(size, BLOCK), rows * size
    launches = []
    for guided in (True, False):
        signature = dict.fromkeys(["y_ptr", "xt_ptr"], "*fp32") | dict.fromkeys(
            ["conditional_ptr", "unconditional_ptr", "fake_ptr"], "*bf16"
        )
        signature |= dict.fromkeys(["made_ptr", "c_skip_ptr", "c_out_ptr", "difference_ptr", "sums_ptr"], "*fp32")
        signature |= dict.fromkeys(["size", "frames", "per_sample"], "i32")
        constants = {"GUIDANCE": 5.0 if guided else 0.0, "ACC": tl.float32, "BLOCK": BLOCK}
        least = n * (4 * 3 + 2 * (3 if guided else 2)) + programs * 20
        name = "dmd2_loss guided" if guided else "dmd2_loss"
        launches.append(Shipped(f"{name} forward", _scores, signature, constants, 4, programs, least, 128, scalars=5, aligned=("size",)))
    signature = dict.fromkeys(["difference_ptr", "factor_ptr", "dy_ptr"], "*fp32") | dict.fromkeys(["size", "frames", "per_sample"], "i32")
    constants = {"ACC": tl.float32, "BLOCK": BLOCK}
    return [
        *launches,
        Shipped("dmd2_loss backward", _gradient, signature, constants, 4, programs, 8 * n + 4 * programs, 64, scalars=1, aligned=("size",)),
    ]
