"""The base network: what enters a block, where residuals and features sit, and what happens after the last feature."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from cosmos_mp.models.dit import NetInput
from cosmos_mp.models.embeddings import patchify, rope_angles, rotation


def count_calls(network: nn.Module) -> Counter:
    """Forward calls of every block and of the final layer, by name."""
    calls: Counter = Counter()
    for name, module in [*((f"block{i}", block) for i, block in enumerate(network.blocks)), ("final", network.final)]:
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def residuals_of(network: nn.Module, call: NetInput) -> list[Tensor]:
    with torch.no_grad():
        return [residual.clone() for residual in network.control(call)]


def test_tokens_hold_latent_then_condition_mask_then_padding_mask(make_network, make_input):
    base, call, seen = make_network().base, make_input(), []
    base.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    base(call)
    tokens = seen[0]
    assert tokens.shape == (4 * 2 * 3, 2, 5 * 4)
    assert torch.equal(tokens[..., :12], patchify(call.x_BCTHW))
    assert torch.equal(tokens[..., 12:16], patchify(call.condition_mask_B1THW))
    padding = call.padding_mask_BHW[:, None, None, ::8, ::8].expand(-1, -1, 4, -1, -1)
    assert torch.equal(tokens[..., 16:], patchify(padding))


def test_every_block_gets_the_base_rotation_of_the_clip(make_network, make_input):
    network, call, seen = make_network(rope_ratio=(2.0, 1.0, 1.0)), make_input(), []
    for block in network.base.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    network.base(call)
    common = {"ratio": (2.0, 1.0, 1.0), "theta": 10000.0, "base_fps": 24.0}
    expected = rotation(rope_angles(4, 2, 3, 12, fps_B=call.fps_B, **common))
    assert len(seen) == 3
    for cos, sin in seen:
        assert torch.equal(cos, expected.cos) and torch.equal(sin, expected.sin)


def test_residual_i_is_added_after_block_i_and_nowhere_else(make_network, make_input):
    network, call = make_network(), make_input()
    residuals = residuals_of(network, call)
    inputs, outputs = [], []
    for block in network.base.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
    network.base(call, residuals)
    torch.testing.assert_close(inputs[1], outputs[0] + residuals[0], rtol=0, atol=0)
    torch.testing.assert_close(inputs[2], outputs[1] + residuals[1], rtol=0, atol=0)


def test_residual_after_the_last_block_reaches_the_output(make_network, make_input):
    network, call = make_network(control_blocks=3), make_input()
    residuals = residuals_of(network, call)
    final_inputs = []
    network.base.blocks[2].register_forward_hook(lambda _, args, out: final_inputs.append(out))
    network.base.final.register_forward_pre_hook(lambda _, args: final_inputs.append(args[0]))
    network.base(call, residuals)
    assert torch.equal(final_inputs[1], final_inputs[0] + residuals[2])


def test_features_are_block_outputs_before_their_residual(make_network, make_input):
    network, call, outputs = make_network(), make_input(), []
    for block in network.base.blocks:
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
    result = network(call, feature_blocks=(0, 1))
    assert len(result.features) == 2
    for index, feature in enumerate(result.features):
        assert feature.shape == (2, 4, 2, 3, 24)
        for t in range(4):
            for h in range(2):
                for w in range(3):
                    assert torch.equal(feature[:, t, h, w], outputs[index][(t * 2 + h) * 3 + w])
    plain = network.base(call, feature_blocks=(0, 1))
    assert torch.equal(plain.features[0], result.features[0])
    assert not torch.allclose(plain.features[1], result.features[1])
    assert torch.equal(network(call).out, result.out) and network(call).features == ()


def test_tail_detached_changes_no_value_and_ends_the_graph(make_network, make_input):
    network = make_network(control_blocks=3)
    frozen_base = network.base.requires_grad_(False)
    call = make_input()
    results, gradients = {}, {}
    for tail in ("full", "detached", "none"):
        x = call.x_BCTHW.clone().requires_grad_()
        results[tail] = network(dataclasses.replace(call, x_BCTHW=x), feature_blocks=(0, 1), tail=tail)
        loss = sum((index + 1) * feature.pow(2).mean() for index, feature in enumerate(results[tail].features))
        gradients[tail] = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert results["full"].out.requires_grad
    # The control branch still trains here: its later residuals enter after the last feature, and must be cut as well.
    assert all(p.requires_grad for p in network.control.zero[2].parameters()) and frozen_base.final.linear.weight.requires_grad is False
    assert not results["detached"].out.requires_grad
    assert torch.equal(results["detached"].out, results["full"].out)
    assert results["none"].out is None
    for tail in ("detached", "none"):
        assert torch.equal(gradients[tail], gradients["full"])
        for got, expected in zip(results[tail].features, results["full"].features, strict=True):
            assert got.requires_grad and torch.equal(got, expected)


@pytest.mark.parametrize(
    ("feature_blocks", "tail", "ran"),
    [
        ((0,), "none", {"block0"}),
        ((1,), "none", {"block0", "block1"}),
        ((0, 1), "none", {"block0", "block1"}),
        ((1,), "detached", {"block0", "block1", "block2", "final"}),
        ((1,), "full", {"block0", "block1", "block2", "final"}),
    ],
)
def test_tail_none_runs_nothing_after_the_last_feature(make_network, make_input, feature_blocks, tail, ran):
    network = make_network()
    calls = count_calls(network.base)
    network(make_input(), feature_blocks=feature_blocks, tail=tail)
    assert calls == dict.fromkeys(ran, 1)


def test_every_sample_has_its_own_rate_padding_mask_time_and_text(make_network, make_input):
    network = make_network()
    call = make_input(range(3))
    masks = torch.zeros_like(call.padding_mask_BHW)
    masks[0, :8], masks[1, :, 16:] = 1.0, 1.0
    call = dataclasses.replace(call, fps_B=torch.tensor([24.0, 12.0, 30.0]).double(), padding_mask_BHW=masks)
    together = network(call, feature_blocks=(2,))
    for b in range(3):
        single = NetInput(**{f.name: getattr(call, f.name)[b : b + 1] for f in dataclasses.fields(call)})
        alone = network(single, feature_blocks=(2,))
        torch.testing.assert_close(together.out[b : b + 1], alone.out, rtol=0, atol=1e-13)
        torch.testing.assert_close(together.features[0][b : b + 1], alone.features[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(NetInput)])
def test_every_input_matters(make_network, make_input, name):
    network, call = make_network(), make_input()
    changed = dataclasses.replace(call, **{name: getattr(call, name) * 0.5 + 0.1})
    assert (network(changed).out - network(call).out).abs().max() > 1e-4


def test_padding_zeros_of_the_text_are_attended_to(make_network, make_input):
    network, call = make_network(), make_input()
    padded = dataclasses.replace(call, text_BLD=torch.cat([call.text_BLD, torch.zeros(2, 4, 7).double()], dim=1))
    assert (network(padded).out - network(call).out).abs().max() > 1e-3


@pytest.mark.parametrize(("heads", "hidden"), [(1, 12), (3, 42), (5, 60)])
def test_odd_numbers_of_heads(make_network, make_input, heads, hidden):
    network, call = make_network(heads=heads, hidden=hidden), make_input()
    out = network(call).out
    assert out.shape == call.x_BCTHW.shape and out.isfinite().all()


def test_float64_stays_float64_from_end_to_end(make_network, make_input):
    network, seen = make_network(), []
    call = make_input(fps_B=torch.tensor([23.976, 29.97]).double())
    for block in (*network.base.blocks, *network.control.blocks):
        block.register_forward_pre_hook(lambda _, args: seen.extend([*args[:2], *args[2], *args[3:]]))
    out = network(call).out
    assert out.dtype == torch.float64 and seen and all(value.dtype == torch.float64 for value in seen)
    # A central difference is exact to ~1e-9 only where nothing on the way is rounded to float32.
    for name in ("x_BCTHW", "timestep_B", "text_BLD", "control_BCTHW", "fps_B"):
        value = getattr(call, name)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        leaf = value.clone().requires_grad_()
        (network(dataclasses.replace(call, **{name: leaf})).out * probe).sum().backward()
        step, sides = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                moved = dataclasses.replace(call, **{name: value + sign * step * direction})
                sides.append((network(moved).out * probe).sum())
        numeric, exact = (sides[0] - sides[1]) / (2 * step), (leaf.grad * direction).sum()
        torch.testing.assert_close(numeric, exact, rtol=1e-6, atol=1e-7)


def test_float32_network_gives_float32(make_network, make_input):
    double = make_network()(make_input()).out
    single = make_network(dtype=torch.float32)(make_input(dtype=torch.float32)).out
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("axis", "largest"), [("T", (3, 8, 12)), ("H", (6, 2, 12)), ("W", (6, 8, 4))])
def test_latent_beyond_the_position_table_is_a_named_error(make_network, make_input, axis, largest):
    with pytest.raises(ValueError, match=rf"{axis}=\d+ exceeds .*net\.max_latent"):
        make_network(max_latent=largest)(make_input())
