"""The control branch: its own trunk, where the control joins, and its weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cosmos_mp.models.embeddings import patchify, rope_angles, rotation


def test_control_is_padded_with_zeros_and_followed_by_the_padding_mask(make_network, make_input):
    branch, call, seen = make_network().control, make_input(), []
    branch.control_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    branch(call)
    assert seen[0].shape == (4 * 2 * 3, 2, 6 * 4)
    assert torch.equal(seen[0][..., :12], patchify(call.control_BCTHW))
    assert not seen[0][..., 12:20].any()
    padding = call.padding_mask_BHW[:, None, None, ::8, ::8].expand(-1, -1, 4, -1, -1)
    assert torch.equal(seen[0][..., 20:], patchify(padding))


def test_control_mlp_has_silu_between_its_layers_and_none_after(make_network, make_input):
    branch, call, seen = make_network().control, make_input(), []
    branch.control_embed.register_forward_hook(lambda _, args, out: seen.append(out))
    tokens = branch.control_tokens(call)
    first, second, last = (m for m in branch.control_mlp if hasattr(m, "weight"))
    assert [tuple(m.weight.shape) for m in (first, second, last)] == [(6, 24), (10, 6), (24, 10)]
    h = F.silu(F.linear(seen[0], first.weight, first.bias))
    h = F.silu(F.linear(h, second.weight, second.bias))
    torch.testing.assert_close(tokens, F.linear(h, last.weight, last.bias))


def test_control_joins_after_block_0_and_before_its_zero_linear(make_network, make_input):
    branch, call, inputs, outputs = make_network().control, make_input(), [], []
    for block in branch.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
    residuals = branch(call)
    assert len(residuals) == 2
    joined = outputs[0] + branch.control_tokens(call)
    torch.testing.assert_close(inputs[1], joined)
    torch.testing.assert_close(residuals[0], F.linear(joined, branch.zero[0].weight, branch.zero[0].bias))
    torch.testing.assert_close(residuals[1], F.linear(outputs[1], branch.zero[1].weight, branch.zero[1].bias))
    other = dataclasses.replace(call, control_BCTHW=call.control_BCTHW + 1)
    branch(other)
    assert torch.equal(outputs[2], outputs[0])  # block 0 does not see the control
    assert not torch.allclose(outputs[3], outputs[1])


def test_rotation_uses_the_branch_own_temporal_ratio(make_network, make_input):
    network, call, seen = make_network(rope_ratio=(2.0, 1.0, 1.0), control_rope_ratio=(1.0, 1.0, 1.0)), make_input(), []
    network.control.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    network.base.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    network(call)
    for (cos, _), ratio in zip(seen, ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0)), strict=True):
        angles = rope_angles(4, 2, 3, 12, fps_B=call.fps_B, ratio=ratio, theta=10000.0, base_fps=24.0)
        assert torch.equal(cos, rotation(angles).cos)
    assert not torch.equal(seen[0].cos, seen[1].cos)


def test_control_weight_scales_every_residual(make_network, make_input):
    branch, call = make_network().control, make_input()
    for got, unit in zip(branch(call, 0.3), branch(call), strict=True):
        torch.testing.assert_close(got, 0.3 * unit)


def test_control_weight_map_over_the_patches(make_network, make_input):
    branch, call = make_network().control, make_input()
    weight = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for got, unit in zip(branch(call, weight), branch(call), strict=True):
        grid, expected = got.reshape(4, 2, 3, 2, 24), unit.reshape(4, 2, 3, 2, 24)
        for t in range(4):
            for h in range(2):
                for w in range(3):
                    torch.testing.assert_close(grid[t, h, w], expected[t, h, w] * weight[t, h, w])


def test_control_weight_map_per_sample(make_network, make_input):
    network, call = make_network(), make_input()
    weight = torch.rand(2, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = network.control(call, weight)
    for b in range(2):
        alone = network.control(call, weight[b])
        for got, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(got[:, b], expected[:, b])
    assert not torch.allclose(together[0][:, 1], network.control(call, weight[0])[0][:, 1])


def test_weight_of_zero_silences_the_control(make_network, make_input):
    network, call = make_network(), make_input()
    silent, absent = network(call, control_weight=0.0).out, network(dataclasses.replace(call, control_BCTHW=None)).out
    assert torch.equal(silent, absent)
    assert not torch.allclose(network(call).out, absent)


@pytest.mark.parametrize("shape", [(4, 4, 6), (2, 3), (3, 4, 2, 3), (2, 1, 4, 2, 3), (4, 3, 2)])
def test_map_of_another_shape_is_a_named_error(make_network, make_input, shape):
    with pytest.raises(ValueError, match=r"control_weight .*patches \(4, 2, 3\)"):
        make_network().control(make_input(), torch.ones(shape))


def test_branch_without_control_is_a_named_error(make_network, make_input):
    with pytest.raises(ValueError, match="without a control latent"):
        make_network().control(make_input(control_BCTHW=None))
