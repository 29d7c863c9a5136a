"""The end of a discriminator head, and its loss: GroupNorm, LeakyReLU, projection to one channel and mean in one; softplus and mean in one.

    u = (x - mean) / sqrt(var + eps)            y = weight u + bias
    logit = mean(sum_c out_weight leaky(y)) + out_bias

x is (B, C, T, H, W), the output of the head's first convolution; mean and var are of a group of C / 8 channels over all frames of a sample,
the mean over its positions, wherever they are. As leaky(y) = s y, with the slope s in {1, 0.01}, all that x tells of a logit and of the
gradients of the parameters is, per channel, sum s and sum s u over the positions. With n = B C T H W and e bytes per element the forward
pass moves 2 n e: x for the statistics, and x for these sums. The backward pass moves 2 n e: x in, its gradient out. What passes between the
launches is a table of a few numbers per channel. torch's own operators move 13 n e, and keep three tensors of n where this keeps x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosmos_mp.kernels import fused
from cosmos_mp.kernels.language import TYPES, Shipped, accumulator, blocks, jit, power_of_two, tl

GROUPS = 8
SLOPE = 0.01
EPS = 1e-5
BLOCK = 8192
"""Elements of a group that a program of the statistics takes at once."""
TILE = 1024
"""Elements, COLUMNS channels wide, that a program of the other launches takes at once. It is one warp: nothing waits for another."""
COLUMNS = 16
ROWS = 8
"""Of a table: so many that the 32 threads of a program read or write 16 bytes each."""
PROGRAMS = 264
"""Wanted: two for every multiprocessor of an H100."""

Across = Callable[[Tensor], Tensor] | None


def head_logits(
    x_BCTHW: Tensor, norm_weight_C: Tensor, norm_bias_C: Tensor, out_weight: Tensor, out_bias: Tensor, across: Across = None
) -> Tensor:
    """Logits of a head from the output of its first convolution.

    Args:
        x_BCTHW: this process's frames, with C a multiple of 8; channels last is the fast layout.
        out_weight: of the projection, C numbers in any shape; out_bias: (1,).
        across: adds a tensor up over the holders of a sample's frames, also in the backward pass; None where one process holds them all.
            Gradients are of the sum of the holders' objectives: that at x is whole, those at the parameters are this holder's share.

    Returns:
        (B,), in float32 or wider; the same on every holder.
    """
    if not fused(x_BCTHW):
        return head_logits_torch(x_BCTHW, norm_weight_C, norm_bias_C, out_weight, out_bias, across)
    return _HeadLogits.apply(x_BCTHW.flatten(2), norm_weight_C, norm_bias_C, out_weight.flatten(), out_bias, across)


def head_logits_torch(
    x_BCTHW: Tensor, norm_weight_C: Tensor, norm_bias_C: Tensor, out_weight: Tensor, out_bias: Tensor, across: Across = None
) -> Tensor:
    """`head_logits` by torch's own operators."""
    y = F.leaky_relu(clip_norm(x_BCTHW, norm_weight_C, norm_bias_C, across), SLOPE)
    return mean_of_clip(F.conv3d(y, out_weight.reshape(1, -1, 1, 1, 1), out_bias), across)


def clip_norm(x: Tensor, weight_C: Tensor, bias_C: Tensor, across: Across) -> Tensor:
    """GroupNorm of (B, C, ...) over all frames of a sample, wherever they are."""
    if across is None:
        return F.group_norm(x, GROUPS, weight_C, bias_C, EPS)
    groups = x.reshape(x.shape[0], GROUPS, -1).to(accumulator(x))
    count = groups.new_full((groups.shape[0], 1), groups.shape[2])
    totals = across(torch.cat([groups.sum(dim=2), count], dim=1))
    count = totals[:, -1:]
    centred = groups - (totals[:, :-1] / count)[..., None]
    variance = across(centred.pow(2).sum(dim=2)) / count  # of the centred values: nothing cancels
    y = (centred * (variance + EPS).rsqrt()[..., None]).view_as(x).to(x.dtype)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return torch.addcmul(bias_C.view(shape), y, weight_C.view(shape))


def mean_of_clip(x: Tensor, across: Across) -> Tensor:
    """(B, ...) -> (B,), the mean over everything else, in float32 or wider."""
    values = x.flatten(1).to(accumulator(x))
    if across is None:
        return values.mean(dim=1)
    totals = across(torch.stack([values.sum(dim=1), torch.full_like(values[:, 0], values.shape[1])]))
    return totals[0] / totals[1]


def gan_loss(logits: Tensor, fakes: int) -> Tensor:
    """Of logits that are to say fake, mean softplus(logit); of those that are to say real, mean softplus(-logit); the sum of both means.

    The discriminator's loss has its fake samples first and its real ones after them; the generator's has `fakes` = 0.

    Args:
        logits: (B, ...), in float32 or wider.
        fakes: how many samples, the first ones, are to say fake. It is a number of the host, so that nothing is copied to the device.

    Returns:
        scalar. A mean over nothing is left out.
    """
    run = _GanLoss.apply if fused(logits) else gan_loss_torch
    return run(logits, fakes)


def gan_loss_torch(logits: Tensor, fakes: int) -> Tensor:
    """`gan_loss` by torch's own operators."""
    means = [F.softplus(part).mean() for part in (logits[:fakes], -logits[fakes:]) if len(part)]
    return sum(means[1:], means[0])


# --- Triton ---


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, across: Across) -> Tensor:
        batch, channels, positions = x.shape
        acc, width = accumulator(x), channels // GROUPS
        statistics = torch.empty(3, batch, GROUPS, dtype=acc, device=x.device)
        last = x.stride(1) <= x.stride(2)
        constants = {"WIDTH": width, "GROUPS": GROUPS, "LAST": last, "BLOCK": BLOCK, "ACC": TYPES[acc]}
        _statistics[(batch * GROUPS,)](x, statistics, positions, *x.stride(), **constants, num_warps=16)
        mean, variance, held = statistics.unbind()
        if across is not None:  # Chan's formula: the holders' means, then squares around the mean of all
            own, count = mean, held
            total, held = across(torch.stack([own * count, count]))
            mean = total / held
            variance = across(count * (variance + (own - mean).square())) / held
        columns, tile, parts = _tile(batch, channels, positions)
        grid = (channels // columns, parts, batch)
        table = _table(mean, variance, weight, bias, out_weight)
        sums = torch.empty(batch, parts, ROWS, channels, dtype=acc, device=x.device)
        constants = {"C": channels, "COLUMNS": columns, "TILE": tile, "SLOPE": SLOPE, "EPS": EPS, "ROWS": ROWS, "ACC": TYPES[acc]}
        _sums[grid](x, table, sums, positions, *x.stride(), **constants, num_warps=1)
        groups = sums[:, :, 3:6].unflatten(3, (GROUPS, width)).sum(dim=(1, 4))
        groups = groups if across is None else across(groups)
        ctx.save_for_backward(x, weight, bias, out_weight, mean, variance, held, sums, groups)
        ctx.across, ctx.grid, ctx.constants = across, grid, constants
        return groups[:, 2].sum(dim=1) / held[:, 0] + out_bias

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits: Tensor):
        x, weight, bias, out_weight, mean, variance, held, sums, groups = ctx.saved_tensors
        dlogits = dlogits if ctx.across is None else ctx.across(dlogits)
        share = dlogits[:, None] / held  # (B, GROUPS): the gradient at every position of the projection
        dx, parameters = None, [None] * 4
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            means = groups / (held * (x.shape[1] // GROUPS))[:, None]
            table = _table(mean, variance, weight, bias, out_weight, means[:, 0], means[:, 1], share)
            _gradient[ctx.grid](x, table, dx, x.shape[2], *x.stride(), *dx.stride(), **ctx.constants, num_warps=1)
        if any(ctx.needs_input_grad[1:5]):
            parameters = [*(sums[:, :, :3] * share[:, :1, None, None]).sum(dim=(0, 1)), share[:, :1].sum(dim=0) * x.shape[2]]
        return dx, *parameters, None


def _tile(batch: int, channels: int, positions: int) -> tuple[int, int, int]:
    """Channels of a tile, which divide all; its positions; and how many programs share the positions of a channel."""
    columns = min(COLUMNS, channels & -channels)
    tile = TILE // columns
    return columns, tile, max(1, min(blocks(positions, tile), PROGRAMS * columns // (batch * channels)))


def _table(mean_BG: Tensor, variance_BG: Tensor, weight_C: Tensor, *rows: Tensor) -> Tensor:
    """What the launches read of every channel, (B, ROWS, C): the rows given, of groups (B, GROUPS) or channels (C,), in their order.

    It is filled up to ROWS by rows that nobody reads.
    """
    rows = (mean_BG, variance_BG, weight_C, *rows)
    shape = (len(mean_BG), GROUPS, len(weight_C) // GROUPS)
    spread = [(row[..., None] if row.dim() == 2 else row.view(shape[1:])).expand(shape) for row in rows]
    return torch.stack(spread + spread[:1] * (ROWS - len(rows)), dim=1).flatten(2)


@jit
def _statistics(
    x_ptr, statistics_ptr, positions, x_sample, x_channel, x_position,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and variance of one group, and its positions. Every slot of the block keeps a mean and squares around it (Welford); they are
    merged at the end (Chan): nothing cancels."""
    group, slots = tl.program_id(0), tl.arange(0, BLOCK)
    x_ptr += (group // GROUPS).to(tl.int64) * x_sample + group % GROUPS * WIDTH * x_channel
    size = positions * WIDTH
    mean, squares, count = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC), tl.full([], 0, ACC)
    for first in range(0, size, BLOCK):
        element = first + slots
        if LAST:
            position, channel = element // WIDTH, element % WIDTH
        else:
            position, channel = element % positions, element // positions
        inside = (position < positions) & (channel < WIDTH)
        x = tl.load(x_ptr + position * x_position + channel * x_channel, inside, other=0.0).to(ACC)
        count += 1
        difference = tl.where(inside, x - mean, 0.0)
        mean += difference * (1.0 / count)
        squares += difference * (x - mean)
    counts = ((size - slots + (BLOCK - 1)) // BLOCK).to(ACC)
    whole = tl.sum(counts * mean, axis=0) / size
    variance = tl.sum(squares + counts * (mean - whole) * (mean - whole), axis=0) / size
    tl.store(statistics_ptr + group, whole)
    tl.store(statistics_ptr + tl.num_programs(0) + group, variance)
    tl.store(statistics_ptr + 2 * tl.num_programs(0) + group, tl.full([], 0, ACC) + positions)


@jit
def _read(table_ptr, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """The part of a sample's table for the program's channels: row numbers (ROWS, 1), and values (ROWS, COLUMNS)."""
    row = tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    return row, tl.load(table_ptr + (tl.program_id(2) * ROWS + row) * C + columns[None, :]).to(ACC)


@jit
def _row(row, table, which: tl.constexpr):
    return tl.sum(tl.where(row == which, table, 0.0), axis=0)[None, :]


@jit
def _sums(
    x_ptr, table_ptr, sums_ptr, positions, x_sample, x_channel, x_position,
    C: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Per channel: the gradients of norm weight, norm bias and out weight for a unit gradient at every position; the two sums of which
    the norm's gradient takes the means over a group; and the channel's part of the logit."""
    part, b = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, table = _read(table_ptr, C, COLUMNS, ROWS, ACC)
    mean, rstd = _row(row, table, 0), 1.0 / tl.sqrt(_row(row, table, 1) + EPS)
    weight, bias, out = _row(row, table, 2), _row(row, table, 3), _row(row, table, 4)
    x_ptr += b.to(tl.int64) * x_sample + columns[None, :] * x_channel
    one, slope = tl.full([], 1.0, ACC), tl.full([], SLOPE, ACC)
    slopes, along = tl.zeros([TILE, COLUMNS], ACC), tl.zeros([TILE, COLUMNS], ACC)
    for first in range(part * TILE, positions, tl.num_programs(1) * TILE):
        position = first + tl.arange(0, TILE)[:, None]
        inside = position < positions
        normed = (tl.load(x_ptr + position * x_position, inside, other=0.0).to(ACC) - mean) * rstd
        s = tl.where(inside, tl.where(normed * weight + bias > 0, one, slope), 0.0)
        slopes += s
        along += s * normed
    slopes, along = tl.sum(slopes, axis=0)[None, :], tl.sum(along, axis=0)[None, :]
    active = weight * along + bias * slopes
    sums = tl.where(row == 0, out * along, tl.where(row == 1, out * slopes, active))
    sums = tl.where(row == 3, out * weight * slopes, tl.where(row == 4, out * weight * along, tl.where(row == 5, out * active, sums)))
    tl.store(sums_ptr + ((b * tl.num_programs(1) + part) * ROWS + row) * C + columns[None, :], sums)


@jit
def _gradient(
    x_ptr, table_ptr, dx_ptr, positions, x_sample, x_channel, x_position, dx_sample, dx_channel, dx_position,
    C: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    row, table = _read(table_ptr, C, COLUMNS, ROWS, ACC)
    mean, rstd = _row(row, table, 0), 1.0 / tl.sqrt(_row(row, table, 1) + EPS)
    weight, bias, out = _row(row, table, 2), _row(row, table, 3), _row(row, table, 4)
    mean_du, mean_du_u, share = _row(row, table, 5), _row(row, table, 6), _row(row, table, 7)
    x_ptr += b * x_sample + columns * x_channel
    dx_ptr += b * dx_sample + columns * dx_channel
    one, slope = tl.full([], 1.0, ACC), tl.full([], SLOPE, ACC)
    for first in range(part * TILE, positions, tl.num_programs(1) * TILE):
        position = first + tl.arange(0, TILE)[:, None]
        inside = position < positions
        normed = (tl.load(x_ptr + position * x_position, inside, other=0.0).to(ACC) - mean) * rstd
        s = tl.where(normed * weight + bias > 0, one, slope)
        dx = share * rstd * (out * weight * s - mean_du - normed * mean_du_u)
        tl.store(dx_ptr + position * dx_position, dx, inside)


class _GanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, fakes: int) -> Tensor:
        logits = logits.contiguous()
        ctx.save_for_backward(logits)
        ctx.fakes = fakes * logits[:1].numel()
        loss = torch.empty((), dtype=logits.dtype, device=logits.device)
        _loss[(1,)](logits, loss, ctx.fakes, logits.numel(), BLOCK=power_of_two(logits.numel()), ACC=TYPES[accumulator(logits)])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        (logits,) = ctx.saved_tensors
        gradient, size = torch.empty_like(logits), logits.numel()
        _loss_gradient[(1,)](logits, dloss, gradient, ctx.fakes, size, BLOCK=power_of_two(size), ACC=TYPES[accumulator(logits)])
        return gradient, None


@jit
def _signed(logits_ptr, fakes, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Places, what is inside, signs, shares in the loss, logits with their sign, and exp of these up to F.softplus's threshold."""
    place = tl.arange(0, BLOCK)
    inside = place < size
    fake = place < fakes
    sign = tl.where(fake, tl.full([], 1.0, ACC), tl.full([], -1.0, ACC))
    share = tl.where(inside, 1.0 / tl.where(fake, fakes, tl.maximum(size - fakes, 1)).to(ACC), 0.0)
    z = sign * tl.load(logits_ptr + place, inside, other=0.0).to(ACC)
    return place, inside, sign, share, z, tl.exp(tl.minimum(z, 20.0, propagate_nan=tl.PropagateNan.ALL))


@jit
def _loss(logits_ptr, loss_ptr, fakes, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    _, inside, _, share, z, e = _signed(logits_ptr, fakes, size, BLOCK, ACC)
    above = 1.0 + e
    # log(1 + e) of a small e: what 1 + e loses of it is put right
    softplus = tl.where(above == 1.0, e, tl.log(above) * (e / tl.where(above == 1.0, 1.0, above - 1.0)))
    tl.store(loss_ptr, tl.sum(share * tl.where(z > 20.0, z, softplus), axis=0))


@jit
def _loss_gradient(logits_ptr, dloss_ptr, gradient_ptr, fakes, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    place, inside, sign, share, z, e = _signed(logits_ptr, fakes, size, BLOCK, ACC)
    sigmoid = tl.where(z > 20.0, 1.0, e / (1.0 + e))
    tl.store(gradient_ptr + place, tl.load(dloss_ptr).to(ACC) * sign * share * sigmoid, inside)


def shipped() -> list[Shipped]:
    """The launches of one rank of CP8 in bfloat16: one output frame (320, 22, 40) of a fake and a real sample, channels last.

    Trips are means over the programs: what a mask leaves out of the last one is not moved. The two launches of `gan_loss`, which work on
    a handful of logits, are not listed.
    """
    batch, channels, positions = 2, 320, 22 * 40
    n = batch * channels * positions * 2
    columns, tile, parts = _tile(batch, channels, positions)
    programs, table = channels // columns * parts * batch, ROWS * columns * 4
    sizes = {"positions": "i32", "x_sample": "i32", "x_channel": "constexpr", "x_position": "i32"}
    shape = {"aligned": ("x_sample", "x_position", "dx_sample", "dx_position")}
    width = channels // GROUPS
    constants = {"x_channel": 1, "WIDTH": width, "GROUPS": GROUPS, "LAST": True, "BLOCK": BLOCK, "ACC": tl.float32}
    signature, groups = {"x_ptr": "*bf16", "statistics_ptr": "*fp32", **sizes}, batch * GROUPS
    own = {"least_bytes": n + groups * 12, "registers": 64, "scalars": 3, "trips": positions * width / BLOCK, **shape}
    launches = [Shipped("gan_head statistics", _statistics, signature, constants, 16, groups, **own)]
    constants = {"x_channel": 1, "C": channels, "COLUMNS": columns, "TILE": tile, "SLOPE": SLOPE, "EPS": EPS, "ROWS": ROWS}
    constants["ACC"] = tl.float32
    shape |= {"registers": 168, "trips": positions / tile / parts}
    signature = {"x_ptr": "*bf16", "table_ptr": "*fp32", "sums_ptr": "*fp32", **sizes}
    least = n + programs * 2 * table
    launches.append(Shipped("gan_head sums", _sums, signature, constants.copy(), 1, programs, least_bytes=least, **shape))
    signature = {"x_ptr": "*bf16", "table_ptr": "*fp32", "dx_ptr": "*bf16", **sizes}
    signature |= {"dx_sample": "i32", "dx_channel": "constexpr", "dx_position": "i32"}
    constants["dx_channel"] = 1
    least = 2 * n + programs * table
    launches.append(Shipped("gan_head gradient", _gradient, signature, constants.copy(), 1, programs, least_bytes=least, **shape))
    return launches
