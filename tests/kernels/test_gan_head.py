"""The end of a discriminator head and its loss: the formulas, today's heads, and the fused version under Triton's interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mp.config import HeadConfig
from cosmos_mp.kernels import gan_head, using
from cosmos_mp.kernels.gan_head import gan_loss, gan_loss_torch, head_logits, head_logits_torch

SIZES = [(2, 16, 1, 3, 5), (1, 8, 1, 1, 1), (1, 40, 1, 1, 1), (3, 40, 2, 7, 3), (1, 320, 1, 1, 3), (1, 24, 1, 13, 17)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(size: tuple[int, ...], dtype: torch.dtype = torch.float64, channels_last: bool = True) -> list[Tensor]:
    """x, whose channels, frames and samples differ in mean and spread, norm weight and bias, out weight and bias."""
    batch, channels, frames, *_ = size
    x = draw(*size) * (1 + torch.arange(frames))[:, None, None] + 3 * draw(batch, channels, frames, 1, 1, seed=1)
    if channels_last:
        x = x.to(memory_format=torch.channels_last_3d)
    values = [x, draw(channels, seed=2), draw(channels, seed=3), draw(1, channels, 1, 1, 1, seed=4), draw(1, seed=5)]
    return [value.to(dtype).requires_grad_() for value in values]


def by_the_formula(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    logits = []
    for sample in x:
        groups = sample.reshape(8, -1)
        normed = (groups - groups.mean(dim=1, keepdim=True)) / (groups.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = normed.reshape(len(weight), -1) * weight[:, None] + bias[:, None]
        y = torch.where(y > 0, y, 0.01 * y)
        logits.append((out_weight.flatten() @ y).mean() + out_bias[0])
    return torch.stack(logits)


def largest_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


@pytest.fixture
def small_blocks(monkeypatch):
    """So that every loop runs several times, and several programs share the positions of a channel."""
    monkeypatch.setattr(gan_head, "BLOCK", 16)
    monkeypatch.setattr(gan_head, "TILE", 64)
    monkeypatch.setattr(gan_head, "PROGRAMS", 12)


# --- One holder ---


@pytest.mark.parametrize("version", ["torch", "triton"])
def test_a_logit_is_the_mean_projection_of_what_is_normed_and_active(version):
    values = inputs((2, 16, 2, 3, 5))
    with using(version):
        got = head_logits(*values)
    torch.testing.assert_close(got, by_the_formula(*values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "channels_last"), [*((dtype, True) for dtype in TOLERANCE), (torch.float64, False)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_every_gradient(size, dtype, channels_last):
    own = inputs(size, dtype, channels_last)
    exact = [x.detach().double().requires_grad_() for x in own]
    expected, weights = by_the_formula(*exact), draw(size[0], seed=6)
    gradients = torch.autograd.grad(expected, exact, weights)
    with using("triton"):
        got = head_logits(*own)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        found = torch.autograd.grad(got, own, weights.to(got))
    assert largest_error(got, expected) < TOLERANCE[got.dtype]
    for value, a, b in zip(own, found, gradients, strict=True):
        assert a.shape == b.shape and a.dtype == dtype and largest_error(a, b) < TOLERANCE[dtype]
        assert a.stride() == value.stride() or value.dim() < 5 or 1 in size[1:3]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(2, 16, 1, 3, 5), (1, 24, 3, 7, 11), (2, 40, 1, 13, 5)], ids=str)
def test_many_blocks_and_programs(small_blocks, size, channels_last):
    values, weights = inputs(size, channels_last=channels_last), draw(size[0], seed=6)
    expected = by_the_formula(*values)
    gradients = torch.autograd.grad(expected, values, weights)
    with using("triton"):
        got = head_logits(*values)
        found = torch.autograd.grad(got, values, weights)
    for a, b in zip((got, *found), (expected, *gradients), strict=True):
        assert largest_error(a, b) < 1e-12


@pytest.mark.parametrize(
    ("size", "view"),
    [
        ((2, 40, 3, 7, 5), lambda x: x[:, 16:32, 1:, ::2, 1:]),
        ((16, 2, 3, 7, 2), lambda x: x.permute(1, 0, 3, 4, 2)),
        ((1, 16, 1, 3, 5), lambda x: x.expand(2, 16, 3, 3, 5)),
        ((2, 2, 3, 5, 27), lambda x: x.permute(0, 4, 1, 2, 3)[:, 5:21]),
    ],
    ids=["sliced", "permuted", "expanded", "channels of a wider tensor"],
)
def test_x_need_not_be_contiguous(size, view):
    wide, (_, *parameters) = draw(*size).requires_grad_(), inputs((2, 16, 1, 1, 1))
    expected, weights = by_the_formula(view(wide), *parameters), draw(2, seed=6)
    gradients = torch.autograd.grad(expected, (wide, *parameters), weights)
    with using("triton"):
        got = head_logits(view(wide), *parameters)
        found = torch.autograd.grad(got, (wide, *parameters), weights)
    for a, b in zip((got, *found), (expected, *gradients), strict=True):
        assert largest_error(a, b) < 1e-12


def test_the_slope_at_zero_is_that_of_torch():
    _, weight, _, *out = inputs((2, 16, 1, 1, 1))
    x, bias = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in ((2, 16, 1, 1, 1), (16,)))  # y = 0
    expected = torch.autograd.grad(head_logits_torch(x, weight, bias, *out).sum(), (x, bias))
    with using("triton"):
        found = torch.autograd.grad(head_logits(x, weight, bias, *out).sum(), (x, bias))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_large_mean_does_not_cost_digits(small_blocks, channels_last):
    x, *parameters = inputs((1, 16, 2, 5, 7), torch.float32, channels_last)
    x = (1e4 + x).detach().requires_grad_()
    exact = [value.detach().double().requires_grad_() for value in (x, *parameters)]
    expected = by_the_formula(*exact)
    gradients = torch.autograd.grad(expected, exact)
    with using("triton"):
        got = head_logits(x, *parameters)
        found = torch.autograd.grad(got, (x, *parameters))
    # The mean in float32 is off by 1e-3 of the spread at most; E[x^2] - E[x]^2 would be off by whole units.
    assert max(largest_error(a, b) for a, b in zip((got, *found), (expected, *gradients), strict=True)) < 2e-3


def test_what_needs_no_gradient_gets_none(monkeypatch):
    values = inputs((2, 16, 1, 3, 5))
    expected = torch.autograd.grad(by_the_formula(*values).sum(), values)
    with using("triton"):
        frozen = [values[0], *(value.detach() for value in values[1:])]
        torch.testing.assert_close(torch.autograd.grad(head_logits(*frozen).sum(), values[:1]), expected[:1], rtol=1e-11, atol=1e-12)
        logits = head_logits(values[0].detach(), *values[1:])
        monkeypatch.setattr(gan_head, "_gradient", None)  # not launched
        torch.testing.assert_close(torch.autograd.grad(logits.sum(), values[1:]), expected[1:], rtol=1e-11, atol=1e-12)
        assert not head_logits(*(value.detach() for value in values)).requires_grad


# --- Several holders ---


class Holders:
    """Threads that each hold a part of the frames and add tensors up among them. They take turns: the interpreter is made for one."""

    def __init__(self, count: int):
        self.barrier, self.turn, self.parts = threading.Barrier(count, timeout=30), threading.Lock(), [None] * count
        self.seen: list[Tensor] = []

    def across(self, place: int) -> Callable[[Tensor], Tensor]:
        def add_up(x: Tensor) -> Tensor:
            self.parts[place] = x
            self.seen += [x] if place == 0 else []
            self.turn.release()
            try:
                self.barrier.wait()
                total = sum(self.parts[1:], self.parts[0])
                self.barrier.wait()
            finally:
                self.turn.acquire()
            return total

        return add_up

    def run(self, work: list[Callable]) -> list:
        def one(call: Callable):
            try:
                with self.turn:
                    return call()
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(len(work)) as pool:
            return [future.result() for future in [pool.submit(one, call) for call in work]]


def held_apart(values: list[Tensor], frames: tuple[int, ...]) -> list[list[Tensor]]:
    """Leaves of each holder: its frames, and parameters of its own."""
    return [[x.detach().clone().requires_grad_() for x in (part, *values[1:])] for part in values[0].split(frames, dim=2)]


def objective(place: int, logits: Tensor) -> Tensor:
    """Of a holder; each says something else."""
    return (logits * draw(*logits.shape, seed=7 + place)).sum() + (place + 1) * logits.pow(2).sum()


def share_of(leaves: list[Tensor], across: Callable, place: int) -> tuple[Tensor, ...]:
    logits = head_logits(*leaves, across)
    return logits.detach(), *torch.autograd.grad(objective(place, logits), leaves)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("frames", [(2, 2), (1, 3), (1, 2, 1)], ids=str)
def test_parts_give_the_logits_of_the_whole_and_todays_share_of_every_gradient(frames, channels_last):
    values, places = inputs((2, 24, sum(frames), 3, 5), channels_last=channels_last), range(len(frames))
    whole = by_the_formula(*values)
    expected = torch.autograd.grad(sum(objective(place, whole) for place in places), values)

    holders, apart = Holders(len(frames)), held_apart(values, frames)
    torch_logits = holders.run([lambda p=place: head_logits_torch(*apart[p], holders.across(p)) for place in places])
    leaves = [leaf for mine in apart for leaf in mine]
    shares = torch.autograd.grad(sum(objective(place, logits) for place, logits in enumerate(torch_logits)), leaves)

    holders, apart = Holders(len(frames)), held_apart(values, frames)
    with using("triton"):
        found = holders.run([lambda p=place: share_of(apart[p], holders.across(p), p) for place in places])
    for logits, *_ in found:
        torch.testing.assert_close(logits, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([x for _, *mine in found for x in mine], list(shares), rtol=1e-11, atol=1e-12)
    joined = [torch.cat([x for _, x, *_ in found], dim=2), *(sum(own) for own in list(zip(*found, strict=True))[2:])]
    torch.testing.assert_close(joined, list(expected), rtol=1e-11, atol=1e-12)
    assert len(holders.seen) == 4 and not any(x.requires_grad for x in holders.seen)  # three forward, one backward


def test_parts_may_have_a_large_mean_and_are_added_up_in_float32(small_blocks):
    x, *parameters = (value.bfloat16() for value in inputs((1, 16, 4, 3, 5)))
    values = [(100 + 40 * x).detach().requires_grad_(), *parameters]
    exact = [value.detach().double().requires_grad_() for value in values]
    expected = by_the_formula(*exact)
    gradients = torch.autograd.grad(objective(0, expected) + objective(1, expected), exact)
    holders, apart = Holders(2), held_apart(values, (1, 3))
    with using("triton"):
        found = holders.run([lambda p=place: share_of(apart[p], holders.across(p), p) for place in range(2)])
    assert {x.dtype for x in holders.seen} == {torch.float32}
    assert largest_error(found[0][0], expected) < 1e-5 and torch.equal(found[0][0], found[1][0])
    assert largest_error(torch.cat([found[0][1], found[1][1]], dim=2), gradients[0]) < 5e-3


# --- Today's heads and losses ---


@pytest.mark.parametrize("parts", [1, 2])
def test_the_torch_version_is_the_end_of_a_conv3d_head(make_discriminator, parts):
    head = make_discriminator(HeadConfig("conv3d", 16, (1,)), channels=12).heads[0]
    first, norm, _, last = head.net
    x = draw(2, 12, 8, 4, 6)
    expected = head(x)
    holders = Holders(parts)

    def end(place: int) -> Tensor:
        across = holders.across(place) if parts > 1 else None
        return head_logits_torch(first(x.chunk(parts, dim=2)[place]), norm.weight, norm.bias, last.weight, last.bias, across)

    for logits in holders.run([lambda place=place: end(place) for place in range(parts)]):
        torch.testing.assert_close(logits, expected, rtol=0, atol=0 if parts == 1 else 1e-13)


LOGITS = {
    "two heads": draw(5, 2),
    "one number each": draw(4, seed=1),
    "far from zero": torch.tensor([[0.0, 800.0, -800.0], [19.9, 20.1, -40.0], [1e-9, -17.0, 3e4]], dtype=torch.float64),
    "one": draw(1, 1),
    "transposed": draw(3, 4).T,
}


def two_means(logits: Tensor, fakes: int) -> Tensor:
    means = [F.softplus(part).mean() for part in (logits[:fakes], -logits[fakes:]) if len(part)]
    return means[0] + means[1] if len(means) == 2 else means[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_the_loss_is_todays_for_any_number_of_fakes(name, dtype):
    for fakes in range(len(LOGITS[name]) + 1):
        logits = LOGITS[name].to(dtype).requires_grad_()
        today = two_means(logits, fakes)
        assert torch.equal(gan_loss_torch(logits, fakes), today)
        exact = logits.detach().double().requires_grad_()
        expected = two_means(exact, fakes)
        (gradient,) = torch.autograd.grad(expected, exact, torch.tensor(-1.7, dtype=torch.float64))
        with using("triton"):
            got = gan_loss(logits, fakes)
            (found,) = torch.autograd.grad(got, logits, torch.tensor(-1.7, dtype=dtype))
        assert got.shape == () and got.dtype == found.dtype == dtype
        tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-6, "atol": 0}  # of every number: also of those near zero
        torch.testing.assert_close(got.double(), expected, **tolerance)
        torch.testing.assert_close(found.double(), gradient, **tolerance)


def test_a_small_loss_keeps_its_digits():
    logits = torch.tensor([17.0, 12.0])
    with using("triton"):
        got = gan_loss(logits, 0)
    torch.testing.assert_close(got.double(), F.softplus(-logits.double()).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_number_and_no_end_are_those_of_torch(dtype, place, value):
    """Of a fake and of a real logit, beside others."""
    logits = draw(3, 2).to(dtype)
    logits.view(-1)[place] = value
    logits.requires_grad_()
    expected = gan_loss_torch(logits, 2)
    (gradient,) = torch.autograd.grad(expected, logits)
    with using("triton"):
        got = gan_loss(logits, 2)
        (found,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close((got, found), (expected, gradient), equal_nan=True)
