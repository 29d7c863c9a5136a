"""Norm and rotation of queries and keys: the fused kernel, under Triton's interpreter, and the plain version against complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cosmos_mp.kernels import qk_norm_rope as module
from cosmos_mp.kernels import using
from cosmos_mp.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_torch
from cosmos_mp.models.embeddings import rope_angles, rotation

SHAPES = [(1, 1, 1, 12), (3, 1, 7, 16), (37, 1, 2, 24), (13, 3, 4, 48), (4, 2, 1, 2), (17, 1, 2, 128)]
"""(S, B, H, D): one token, primes, several blocks of tokens, a full head."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""For bfloat16 one rounding: the interpreter cuts off where a GPU rounds to nearest."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(length: int, batch: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin (S, B, 1, D) of angles that differ from token to token and from sample to sample."""
    angles = 3 * draw(length, batch, 1, width // 2, seed=7)
    return tuple(torch.cat([values, values], dim=-1).float() for values in (angles.cos(), angles.sin()))


def reference(x: Tensor, weight: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """In float64: a head is D/2 complex numbers u1 + i u2, multiplied with cos + i sin."""
    u = x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
    if cos is None:
        return u
    half = x.shape[-1] // 2
    turned = torch.complex(u[..., :half], u[..., half:]) * torch.complex(cos.double(), sin.double())[..., :half]
    return torch.cat([turned.real, turned.imag], dim=-1)


def pulled(run, x: Tensor, weight: Tensor, given: tuple, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = run(x, weight, *given)
    return out.detach(), *torch.autograd.grad(out, (x, weight), dout)


def fused(*arguments: Tensor) -> Tensor:
    with using("triton"):
        return qk_norm_rope(*arguments)


def check(x: Tensor, weight: Tensor, given: tuple, dout: Tensor, run=fused) -> None:
    got = pulled(run, x, weight, given, dout)
    expected = pulled(reference, x.double(), weight.double(), given, dout.double())
    tolerance = TOLERANCES[x.dtype] * (1 if run is fused else 4)  # the plain one rounds between norm and rotation too
    for have, want in zip(got, expected, strict=True):
        assert have.dtype == x.dtype
        torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance / 16 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", [fused, qk_norm_rope_torch])
def test_both_versions_follow_the_formula_with_every_gradient(run, shape, rotated, dtype):
    length, batch, _, width = shape
    x, dout, weight = draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype), (1 + 0.3 * draw(width, seed=2)).to(dtype)
    check(x, weight, turn(length, batch, width) if rotated else (), dout, run)


@pytest.mark.parametrize("programs", [1, 2, 6, 8])
def test_heads_are_shared_by_as_many_programs_as_wanted(monkeypatch, programs):
    x, dout, weight = draw(19, 1, 6, 16), draw(19, 1, 6, 16, seed=1), draw(16, seed=2)
    given = turn(19, 1, 16)
    whole = pulled(fused, x, weight, given, dout)
    monkeypatch.setattr(module, "PROGRAMS", programs)
    assert module._grid(x, 2) == (2, max(1, min(3, programs // 2)))
    check(x, weight, given, dout)
    assert torch.equal(pulled(fused, x, weight, given, dout)[0], whole[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_and_zero_heads_stay_finite(dtype):
    x = draw(5, 1, 3, 16).to(dtype)
    x[0], x[1, 0, 1] = 1e-6, 0.0
    check(x, draw(16, seed=2).to(dtype), turn(5, 1, 16), draw(5, 1, 3, 16, seed=1).to(dtype))


LAYOUTS = {
    "part of a wider projection": lambda: draw(11, 2, 3, 4, 12)[:, :, 1],
    "heads before tokens": lambda: draw(2, 4, 11, 12).permute(2, 0, 1, 3),
    "every second token": lambda: draw(22, 2, 4, 12)[1::2],
    "every second head": lambda: draw(11, 2, 8, 12)[:, :, ::2],
    "head not dense": lambda: draw(11, 2, 4, 24)[..., ::2],
    "one sample for all": lambda: draw(11, 1, 4, 12).expand(-1, 2, -1, -1),
}


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_gradients_lie_as_they_come(layout, gradient):
    x, dout = LAYOUTS[layout](), LAYOUTS[gradient]()
    assert x.shape == dout.shape == (11, 2, 4, 12)
    check(x, draw(24, seed=2)[::2], turn(11, 2, 12), dout + 0 if gradient == layout else dout)


def test_what_is_read_in_place_is_not_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_by_heads", lambda x, original=module._by_heads: seen.append((x, original(x))) or original(x))
    x = draw(2, 4, 11, 12).permute(2, 0, 1, 3)
    pulled(fused, x, draw(12), (), x)
    assert len(seen) == 2 and all(before.data_ptr() == after.data_ptr() for before, after in seen)


def test_the_gradient_of_a_sum_is_an_expanded_number():
    x, weight = draw(5, 1, 3, 12).requires_grad_(), draw(12, seed=2).requires_grad_()
    got = torch.autograd.grad(fused(x, weight).sum(), (x, weight))
    for have, want in zip(got, torch.autograd.grad(reference(x, weight).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_the_kernel_reads_the_first_half_of_cos_and_sin():
    x, weight, (cos, sin) = draw(5, 2, 3, 12), draw(12, seed=2), turn(5, 2, 12)
    expected = pulled(fused, x, weight, (cos, sin), x)
    cos[..., 6:], sin[..., 6:] = torch.nan, torch.nan
    assert all(torch.equal(have, want) for have, want in zip(pulled(fused, x, weight, (cos, sin), x), expected, strict=True))


def test_one_rotation_for_all_samples():
    x, weight, (cos, sin) = draw(5, 3, 2, 12), draw(12, seed=2), turn(5, 1, 12)
    expected = fused(x, weight, *(values.expand(-1, 3, -1, -1).contiguous() for values in (cos, sin)))
    assert torch.equal(fused(x, weight, cos, sin), expected)


def test_parts_of_a_clip_make_the_whole():
    x, dout, weight, (cos, sin) = draw(24, 2, 3, 16), draw(24, 2, 3, 16, seed=1), draw(16, seed=2), turn(24, 2, 16)
    out, dx, dweight = pulled(fused, x, weight, (cos, sin), dout)
    for parts in (2, 3, 4, 8):
        slices = zip(*(values.chunk(parts) for values in (x, cos, sin, dout)), strict=True)
        got = [pulled(fused, part, weight, (c, s), d) for part, c, s, d in slices]
        assert torch.equal(torch.cat([out for out, _, _ in got]), out)
        assert torch.equal(torch.cat([dx for _, dx, _ in got]), dx)
        torch.testing.assert_close(sum(dweight for _, _, dweight in got), dweight, rtol=1e-12, atol=1e-12)


def test_two_runs_are_equal_in_every_bit():
    x, dout, weight, given = draw(37, 1, 4, 24).float(), draw(37, 1, 4, 24, seed=1).float(), draw(24, seed=2).float(), turn(37, 1, 24)
    first, second = (pulled(fused, x, weight, given, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Spy:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: (self.launches.append((arguments, options)), self.kernel[grid](*arguments, **options))


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_weight_has_no_sums(monkeypatch, trained):
    spy = Spy(module._backward)
    monkeypatch.setattr(module, "_backward", spy)
    x, weight, (cos, sin) = draw(5, 1, 3, 12).requires_grad_(), draw(12, seed=2).requires_grad_(trained), turn(5, 1, 12)
    fused(x, weight, cos.requires_grad_(), sin.requires_grad_()).sum().backward()
    assert x.grad is not None and (weight.grad is not None) == trained
    assert cos.grad is None and sin.grad is None
    ((arguments, options),) = spy.launches
    assert bool(options["SUMS"]) == trained == (arguments[6] is not None)


def test_only_inputs_are_kept_for_the_gradient():
    x, weight, (cos, sin) = draw(5, 1, 3, 12).requires_grad_(), draw(12, seed=2).requires_grad_(), turn(5, 1, 12)
    kept = fused(x, weight, cos, sin).grad_fn.saved_tensors
    assert [value.data_ptr() for value in kept] == [value.data_ptr() for value in (x, weight, cos, sin)]
    kept = qk_norm_rope_torch(x, weight).grad_fn.saved_tensors
    assert [value.data_ptr() for value in kept] == [value.data_ptr() for value in (x, weight)]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_plain_version_is_torchs_norm_and_the_published_rotation(dtype):
    fps = torch.full((2,), 24.0, dtype=torch.promote_types(dtype, torch.float32))
    angles = rope_angles(2, 3, 4, 24, fps_B=fps, ratio=(1.0, 1.0, 1.0), theta=10000.0, base_fps=24.0)
    cos, sin = rotation(angles)
    x, norm = draw(24, 2, 3, 24).to(dtype), nn.RMSNorm(24, eps=1e-6, dtype=dtype)
    norm.weight.data.copy_(draw(24, seed=2))
    normed = norm(x)
    assert torch.equal(qk_norm_rope_torch(x, norm.weight), normed)
    wide = normed.to(cos.dtype)
    turned = torch.addcmul(wide * cos, torch.cat([-wide[..., 12:], wide[..., :12]], dim=-1), sin).to(dtype)
    got = qk_norm_rope_torch(x, norm.weight, cos, sin)
    assert got.dtype == dtype and torch.equal(got, turned)
    tolerance = {**TOLERANCES, torch.bfloat16: 2**-6}[dtype]
    expected = reference(x.double(), norm.weight.double(), cos, sin)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    with using("torch"):
        assert torch.equal(qk_norm_rope(x, norm.weight, cos, sin), got)
    torch.testing.assert_close(fused(x, norm.weight, cos, sin).double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_angles_of_the_network_repeat_their_first_half():
    angles = rope_angles(2, 3, 4, 24, fps_B=torch.tensor([24.0, 30.0]), ratio=(1.0, 2.0, 2.0), theta=10000.0, base_fps=24.0)
    for values in rotation(angles):
        assert torch.equal(values[..., :12], values[..., 12:])


@pytest.mark.parametrize("rotated", [True, False])
def test_the_plain_version_may_be_differentiated_twice(rotated):
    given = [values.double() for values in turn(3, 2, 6)] if rotated else []
    inputs = draw(3, 2, 2, 6).requires_grad_(), draw(6, seed=2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, weight: qk_norm_rope_torch(x, weight, *given), inputs)
