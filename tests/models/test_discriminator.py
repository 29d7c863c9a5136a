"""Discriminator heads: shapes, formulas, and logits that belong to one sample each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mp.config import HeadConfig

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
