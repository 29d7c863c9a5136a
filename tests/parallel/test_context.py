"""Context parallelism as one process sees it: what is told to which module, and frames that know where in their clip they are."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from cosmos_mp.config import HeadConfig, ParallelConfig
from cosmos_mp.models.dit import NetInput
from cosmos_mp.parallel import context as module
from cosmos_mp.parallel.context import context_parallel, frame_sums, whole_clips
from cosmos_mp.parallel.topology import join, single_process


def half(call: NetInput, part: int) -> NetInput:
    """Part 0 or 1 of a call's clips along their frames."""
    names = ("x_BCTHW", "control_BCTHW", "condition_mask_B1THW")
    return dataclasses.replace(call, **{name: getattr(call, name).chunk(2, dim=2)[part] for name in names})


def test_one_process_changes_nothing(make_network, make_discriminator, make_input):
    network, discriminator, call = make_network(), make_discriminator(HeadConfig("conv3d", 8, (0,))), make_input()
    for topology in (single_process(), join(ParallelConfig())):
        before = [dict(vars(module)) for module in (*network.modules(), *discriminator.modules())]
        context_parallel(network, topology)
        context_parallel(discriminator, topology)
        assert [vars(module) for module in (*network.modules(), *discriminator.modules())] == before
        assert frame_sums(topology) is None
        clips = call.x_BCTHW.clone().requires_grad_()
        whole = whole_clips(clips, topology)
        assert torch.equal(whole, clips) and not whole.requires_grad


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_has_the_angles_positions_and_tokens_of_its_frames(make_network, make_input, part):
    network = make_network(rope_ratio=(2.0, 1.0, 1.0))
    call = make_input(fps_B=torch.tensor([24.0, 10.0], dtype=torch.float64))
    trunks, seen = (network.base, network.control), []
    for trunk in trunks:
        for block in trunk.blocks:
            block.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1], *args[2])))
    network(call)
    whole, seen[:] = list(seen), []
    for trunk in trunks:
        trunk.part = part
    network(half(call, part))
    assert len(seen) == len(whole) == 5
    for index, (ours, theirs) in enumerate(zip(seen, whole, strict=True)):
        for name, mine, all_of_it in zip(("tokens", "position", "cos", "sin"), ours, theirs, strict=True):
            expected = all_of_it.chunk(2)[part]
            if name != "tokens" or index in (0, 2):  # before the first block of either trunk: attention mixes them later
                torch.testing.assert_close(mine, expected, rtol=1e-14, atol=1e-14, msg=f"{name} of call {index}")
                assert not torch.allclose(mine, all_of_it.chunk(2)[1 - part])


def test_a_part_beyond_the_position_table_is_a_named_error(make_network, make_input):
    network = make_network(max_latent=(6, 8, 12))
    network.base.part = network.control.part = 1
    with pytest.raises(ValueError, match=r"T=8 exceeds the position table's 6: raise net\.max_latent"):
        network(make_input())


@pytest.mark.parametrize(("attention", "words"), [("ulysses", "ulysses."), ("ring", "ring.")])
def test_self_attention_alone_is_told_of_the_other_frames(make_network, ranks, attention, words):
    network, group = make_network(), ranks(2, 3)
    topology = replace(single_process(), cp_group=group, options=ParallelConfig(cp=3, cp_attention=attention))
    core = network.base.blocks[0].self_attn.attend
    context_parallel(network, topology)
    for trunk in (network.base, network.control):
        assert trunk.part == 2
        for block in trunk.blocks:
            assert block.self_attn.attend.__qualname__.startswith(words)
            assert block.cross_attn.attend == core  # text is whole on every rank
            held = [cell.cell_contents for cell in block.self_attn.attend.__closure__]
            assert group in held or 3 in held
            assert (core in held) is (attention == "ulysses")


@pytest.mark.parametrize("kind", ["conv3d", "conv2d"])
def test_heads_get_their_part_and_the_sums_over_frames(monkeypatch, make_discriminator, ranks, kind):
    discriminator, group, asked = make_discriminator(HeadConfig(kind, 8, (0, 1))), ranks(1, 2), []
    monkeypatch.setattr(module.collectives, "sum_over", lambda x, group: asked.append(group) or 2 * x)
    topology = replace(single_process(), cp_group=group, options=ParallelConfig(cp=2))
    sums = frame_sums(topology)
    assert sums(torch.tensor(3.0)).item() == 6.0 and asked == [group]
    features = [torch.randn(2, 4, 4, 6, 24, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    before = discriminator(features)
    context_parallel(discriminator, topology)
    assert discriminator.part == 1
    asked.clear()
    torch.testing.assert_close(discriminator(features), before)  # twice the sum of twice as many: the same means
    # Per head the mean of its logits, and in 3-D the mean and the variance of its norm.
    assert asked == [group] * 2 * (3 if kind == "conv3d" else 1)


def test_whole_clips_are_joined_along_their_frames(monkeypatch, ranks):
    parts = torch.arange(2 * 3 * 4 * 2 * 2.0).reshape(2, 3, 4, 2, 2).chunk(2, dim=2)
    group = ranks(0, 2)

    def fake_join(x, group):
        other = parts[1].movedim(2, 0)
        assert group.size() == 2 and x.is_contiguous()
        return torch.cat([x, other])

    monkeypatch.setattr(module.collectives, "join", fake_join)
    assert torch.equal(whole_clips(parts[0], replace(single_process(), cp_group=group)), torch.cat(parts, dim=2))
