"""Discriminator heads: shapes, formulas, and logits that belong to one sample each."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mp.config import HeadConfig
from cosmos_mp.kernels.gan_head import clip_norm

KINDS = ["conv3d", "conv2d", "attention", "spatial_temporal"]


def features(count: int = 2, batch: int = 2, frames: int = 4) -> list[Tensor]:
    """(B, T, H/2, W/2, D), with offsets that a normalisation over the batch would mix."""
    draw = torch.Generator().manual_seed(0)
    offset = torch.arange(batch, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    return [torch.randn(batch, frames, 4, 6, 12, generator=draw, dtype=torch.float64) + offset for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_logit_per_sample_and_feature_with_gradient(make_discriminator, kind):
    discriminator = make_discriminator(HeadConfig(kind, 16, (1, 3)), channels=12)
    inputs = [x.requires_grad_() for x in features()]
    logits = discriminator(inputs)
    assert logits.shape == (2, 2) and logits.dtype == torch.float64
    gradients = torch.autograd.grad(logits[:, 1].sum(), inputs, retain_graph=True)
    assert not gradients[0].any() and gradients[1].any()  # head k reads feature k alone
    logits.sum().backward()
    missing = [name for name, p in discriminator.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_does_not_depend_on_the_other_samples(make_discriminator, kind):
    discriminator = make_discriminator(HeadConfig(kind, 16, (1,)), channels=12).train()
    (x,) = features(1, batch=3)
    together = discriminator([x])
    for b in range(3):
        torch.testing.assert_close(discriminator([x[b : b + 1]]), together[b : b + 1], rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(discriminator([x.requires_grad_()])[0].sum(), x)
    assert gradient[0].any() and not gradient[1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_first_frame_hides_the_frames_before_it(make_discriminator, kind):
    discriminator = make_discriminator(HeadConfig(kind, 16, (1,), first_frame=2), channels=12)
    whole = make_discriminator(HeadConfig(kind, 16, (1,)), channels=12)
    (x,) = features(1)
    assert torch.equal(discriminator([x]), whole([x[:, 2:]]))
    assert not torch.allclose(discriminator([x]), whole([x]))


def test_conv3d_head_by_plain_calls(make_discriminator):
    discriminator = make_discriminator(HeadConfig("conv3d", 16, (1,)), channels=12)
    first, norm, _, last = discriminator.heads[0].net
    (x,) = features(1)
    h = F.conv3d(x.permute(0, 4, 1, 2, 3), first.weight, first.bias, stride=(2, 2, 2), padding=(0, 1, 1))
    assert h.shape == (2, 16, 2, 2, 3)
    groups = h.reshape(2, 8, 2, -1)
    scale = (groups.var(dim=(2, 3), unbiased=False, keepdim=True) + 1e-5).rsqrt()
    h = ((groups - groups.mean(dim=(2, 3), keepdim=True)) * scale).reshape_as(h)
    h = h * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]
    h = torch.where(h > 0, h, 0.01 * h)
    expected = (torch.einsum("bcthw,oc->bothw", h, last.weight[:, :, 0, 0, 0]) + last.bias[:, None, None, None]).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(discriminator([x])[:, 0], expected)


def spatial(head: torch.nn.Module, x: Tensor) -> Tensor:
    first, norm, _, last = head.net
    logits = []
    for frame in x.unbind(dim=1):
        h = F.conv2d(frame.permute(0, 3, 1, 2), first.weight, first.bias, stride=2, padding=1)
        h = F.leaky_relu(F.group_norm(h, 8, norm.weight, norm.bias), 0.01)
        logits.append(F.conv2d(h, last.weight, last.bias).mean(dim=(1, 2, 3)))
    return torch.stack(logits).mean(dim=0)


def test_conv2d_head_judges_each_frame_alone(make_discriminator):
    discriminator = make_discriminator(HeadConfig("conv2d", 16, (1,)), channels=12)
    (x,) = features(1)
    torch.testing.assert_close(discriminator([x])[:, 0], spatial(discriminator.heads[0], x))
    torch.testing.assert_close(discriminator([x.flip(1)]), discriminator([x]))


def test_spatial_temporal_head_is_the_mean_of_both(make_discriminator):
    discriminator = make_discriminator(HeadConfig("spatial_temporal", 16, (1,)), channels=12)
    head, (x,) = discriminator.heads[0], features(1)
    first, norm, _, last = head.temporal
    logits = []
    for row in x.unbind(dim=2):
        for line in row.unbind(dim=2):
            h = F.conv1d(line.transpose(1, 2), first.weight, first.bias, padding=1)
            h = F.leaky_relu(F.group_norm(h, 8, norm.weight, norm.bias), 0.01)
            logits.append(F.conv1d(h, last.weight, last.bias).mean(dim=(1, 2)))
    expected = (spatial(head.spatial, x) + torch.stack(logits).mean(dim=0)) / 2
    torch.testing.assert_close(discriminator([x])[:, 0], expected)


def test_attention_head_adds_what_its_positions_tell_each_other(make_discriminator):
    discriminator = make_discriminator(HeadConfig("attention", 16, (1,)), channels=12)
    head, (x,) = discriminator.heads[0], features(1)
    h = head.down(x.permute(0, 4, 1, 2, 3)).flatten(2).transpose(1, 2)
    q, k, v = (y.reshape(2, -1, 4, 4).transpose(1, 2) for y in F.linear(h, head.attn.in_proj_weight, head.attn.in_proj_bias).chunk(3, -1))
    weight = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1)
    mixed = (weight @ v).transpose(1, 2).reshape_as(h)
    mixed = F.linear(mixed, head.attn.out_proj.weight, head.attn.out_proj.bias)
    torch.testing.assert_close(discriminator([x])[:, 0], head.out(h + mixed).mean(dim=(1, 2)))


@pytest.mark.parametrize("kind", ["conv3d", "attention"])
def test_heads_over_two_frames_refuse_one(make_discriminator, kind):
    with pytest.raises(ValueError, match=rf"{kind} head needs at least 2 latent frames, got 1.*conv2d"):
        make_discriminator(HeadConfig(kind, 16, (1,)), channels=12)(features(1, frames=1))


@pytest.mark.parametrize("kind", ["conv2d", "spatial_temporal"])
def test_heads_over_single_frames_take_one(make_discriminator, kind):
    assert make_discriminator(HeadConfig(kind, 16, (1,)), channels=12)(features(1, frames=1)).shape == (2, 1)


def test_as_many_features_as_heads(make_discriminator):
    with pytest.raises(ValueError):
        make_discriminator(HeadConfig("conv3d", 16, (1, 2)), channels=12)(features(1))


# --- Frames of a sample on several holders ---


class Holders:
    """Threads that each hold a part of the frames and add tensors up among them, as ranks would; gradients flow through the sums."""

    def __init__(self, count: int):
        self.barrier, self.parts = threading.Barrier(count, timeout=30), [None] * count
        self.sums = 0

    def across(self, place: int) -> Callable[[Tensor], Tensor]:
        def add_up(x: Tensor) -> Tensor:
            self.parts[place] = x
            self.barrier.wait()
            total = sum(self.parts[1:], self.parts[0])
            self.barrier.wait()
            self.sums += place == 0
            return total

        return add_up

    def run(self, work: list[Callable[[], Tensor]]) -> list[Tensor]:
        with ThreadPoolExecutor(len(work)) as pool:
            return [future.result() for future in [pool.submit(one) for one in work]]


def held_apart(network: torch.nn.Module, holders: Holders, place: int) -> torch.nn.Module:
    """The same parameters in a network of this holder."""
    mine = copy.deepcopy(network)
    for module, own in zip(network.modules(), mine.modules(), strict=True):
        for name, p in module._parameters.items():
            own._parameters[name] = p
        if hasattr(own, "across"):
            own.across = holders.across(place)
        if hasattr(own, "part"):
            own.part = place
    return mine


class ClipNorm(torch.nn.GroupNorm):
    """The head's norm with its parameters."""

    across = None

    def forward(self, x: Tensor) -> Tensor:
        return clip_norm(x, self.weight, self.bias, self.across)


def norm_of(dtype: torch.dtype, channels: int = 16) -> ClipNorm:
    norm = ClipNorm(8, channels).to(dtype)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return norm


@pytest.mark.parametrize("frames", [(2, 2), (1, 3), (1, 2, 1)])
def test_the_norm_over_parts_is_group_norm_of_the_whole(frames):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, sum(frames), 2, 3, generator=draw, dtype=torch.float64)
    x = x * torch.arange(1, sum(frames) + 1)[None, None, :, None, None] + 3  # the parts differ in mean and spread
    probe = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    norm, leaf = norm_of(torch.float64), x.clone().requires_grad_()
    whole = F.group_norm(leaf, 8, norm.weight, norm.bias)
    assert torch.equal(norm(leaf), whole)  # by itself it is one
    expected = torch.autograd.grad((whole * probe).sum(), (leaf, norm.weight, norm.bias))

    holders = Holders(len(frames))
    norms = [held_apart(norm, holders, place) for place in range(len(frames))]
    leaves = [part.clone().requires_grad_() for part in x.split(frames, dim=2)]
    parts = holders.run([lambda norm=norm, part=part: norm(part) for norm, part in zip(norms, leaves, strict=True)])
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-12, atol=1e-12)
    assert holders.sums == 2
    objective = sum((part * own).sum() for part, own in zip(parts, probe.split(frames, dim=2), strict=True))
    *got, weight, bias = torch.autograd.grad(objective, (*leaves, norm.weight, norm.bias))
    for ours, theirs in zip((torch.cat(got, dim=2), weight, bias), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_large_mean_does_not_cost_the_norm_its_digits():
    x = 1e4 + torch.randn(1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, norm, holders = norm_of(torch.float64)(x.float().double()), norm_of(torch.float32), Holders(2)
    norms = [held_apart(norm, holders, place) for place in range(2)]
    parts = holders.run([lambda n=n, part=part: n(part) for n, part in zip(norms, x.float().chunk(2, dim=2), strict=True)])
    assert (torch.cat(parts, dim=2) - exact).abs().max() < 0.02  # E[x^2] - E[x]^2 would be off by whole units


def test_the_norm_sums_in_float32_and_answers_in_its_type():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 4, 16, 16, generator=draw).bfloat16()
    norm, holders, seen = norm_of(torch.bfloat16), Holders(2), set()
    norms = [held_apart(norm, holders, place) for place in range(2)]
    for own in norms:
        own.across = lambda total, add_up=own.across: seen.add(total.dtype) or add_up(total)
    parts = holders.run([lambda n=n, part=part: n(part) for n, part in zip(norms, x.chunk(2, dim=2), strict=True)])
    assert seen == {torch.float32} and {part.dtype for part in parts} == {torch.bfloat16}
    expected = F.group_norm(x.float(), 8, norm.weight.float(), norm.bias.float())
    torch.testing.assert_close(torch.cat(parts, dim=2).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("kind", "first_frame"), [("conv3d", 0), ("conv3d", 2), ("conv2d", 0), ("conv2d", 1), ("conv2d", 3)])
def test_logits_over_parts_are_those_of_the_whole_on_every_holder(make_discriminator, kind, first_frame):
    discriminator = make_discriminator(HeadConfig(kind, 16, (1, 3), first_frame=first_frame), channels=12)
    scale = torch.arange(1, 9, dtype=torch.float64).reshape(1, -1, 1, 1, 1)
    inputs = [(x * scale).requires_grad_() for x in features(frames=8)]
    whole = discriminator(inputs)
    parameters = list(discriminator.parameters())
    expected = torch.autograd.grad(whole.pow(2).mean(), [*inputs, *parameters])
    holders = Holders(2)
    own = [held_apart(discriminator, holders, place) for place in range(2)]
    parts = [[x.detach().chunk(2, dim=1)[place].clone().requires_grad_() for x in inputs] for place in range(2)]
    found = holders.run([lambda d=d, part=part: d(part) for d, part in zip(own, parts, strict=True)])
    for logits in found:
        torch.testing.assert_close(logits, whole, rtol=1e-12, atol=1e-12)
    # The holders' objectives are averaged, as dp x cp averages gradients.
    gradients = torch.autograd.grad(sum(logits.pow(2).mean() for logits in found) / 2, [*parts[0], *parts[1], *parameters])
    joined = [torch.cat([gradients[i], gradients[2 + i]], dim=1) for i in range(2)]
    for ours, theirs in zip([*joined, *gradients[4:]], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv3d", "conv2d"])
@pytest.mark.parametrize(("part", "first_frame", "hidden"), [(0, 0, 0), (0, 2, 2), (1, 2, 0), (1, 4, 0), (1, 6, 2), (3, 2, 0)])
def test_first_frame_counts_from_the_beginning_of_the_clip(make_discriminator, kind, part, first_frame, hidden):
    discriminator = make_discriminator(HeadConfig(kind, 16, (1,), first_frame=first_frame), channels=12)
    plain = make_discriminator(HeadConfig(kind, 16, (1,)), channels=12)
    discriminator.part = part
    (x,) = features(1)
    assert torch.equal(discriminator([x]), plain([x[:, hidden:]]))
