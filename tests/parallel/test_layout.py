"""Layouts that fit and layouts that do not: the message names the option and exactly the values that would."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from cosmos_mp.config import ConfigError, DiffusionConfig, HeadConfig, NetConfig, ParallelConfig
from cosmos_mp.parallel.layout import check_layout, check_world, divisors

NET = NetConfig(hidden=144, heads=12, blocks=2, control_blocks=1, mlp_hidden=40)
DIFFUSION = DiffusionConfig(latent_shape=(16, 12, 6, 10))
"""12 frames of 3 x 5 patches."""
CONV3D, CONV2D = HeadConfig("conv3d", feature_blocks=(0,)), HeadConfig("conv2d", feature_blocks=(0,))


def check(world: int, head: HeadConfig | None = None, net: NetConfig = NET, diffusion: DiffusionConfig = DIFFUSION, **options) -> int:
    return check_layout(ParallelConfig(**options), world, net, diffusion, head)


def refusal(world: int, *args, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        check(world, *args, **options)
    return str(caught.value)


def fits(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except ConfigError:
        return False
    return True


def named(message: str, before: str = "one of ") -> list[int]:
    """The values that a message offers."""
    return [int(n) for n in re.search(rf"{re.escape(before)}(\d+(?:, \d+)*)", message).group(1).split(", ")]


# --- What fits ---


@pytest.mark.parametrize(
    ("world", "options", "dp"),
    [
        (1, {}, 1),
        (7, {}, 7),
        (8, {"tp": 2}, 4),
        (8, {"tp": 2, "cp": 2}, 2),
        (12, {"cp": 12}, 1),
        (12, {"tp": 4, "cp": 3, "dp": 1}, 1),
        (24, {"tp": 2, "cp": 6, "dp": 2}, 2),
        (16, {"tp": 4, "cp": 2, "cp_attention": "ring"}, 2),
        (8, {"tp": 4, "sequence_parallel": True, "cp": 1}, 2),
        (8, {"tp": 4, "sequence_parallel": True, "cp": 1, "shard": 2}, 2),
        (6, {"shard": 3}, 6),
        (8, {"cp": 4, "shard": 4}, 2),
        (8, {"cp": 4, "shard": 8, "reference_cp_scaling": 4}, 2),
        (8, {"cp": 4, "reference_cp_scaling": 12}, 2),
        (1, {"reference_cp_scaling": 3}, 1),
    ],
)
def test_a_layout_that_fits_gives_its_data_parallel_size(world, options, dp):
    assert check(world, **options) == dp == world // (options.get("tp", 1) * options.get("cp", 1))


def test_the_recipe_of_the_7b_fits_its_machines():
    net, diffusion = NetConfig(), DiffusionConfig()
    for world, options, dp in (
        (64, {"tp": 8, "sequence_parallel": True, "cp": 2}, 4),
        (32, {"cp": 8}, 4),
        (64, {"tp": 8, "cp": 4}, 2),
        (1024, {"cp": 8, "shard": 8, "reference_cp_scaling": 8}, 128),
    ):
        assert check(world, HeadConfig(), net, diffusion, **options) == dp


@pytest.mark.parametrize(
    ("head", "cp"),
    [
        *((replace(CONV3D, first_frame=first), cp) for first, cp in ((0, 1), (0, 2), (0, 3), (0, 6), (4, 2), (2, 3), (7, 1))),
        *((replace(CONV2D, first_frame=first), cp) for first, cp in ((0, 12), (0, 4), (1, 4), (2, 4), (5, 2))),
        (replace(CONV3D, kind="attention"), 1),
        (replace(CONV3D, kind="spatial_temporal"), 1),
    ],
)
def test_heads_that_fit(head, cp):
    assert check(cp, head, cp=cp, cp_attention="ring") == 1


def test_common_divisors():
    assert divisors(12) == "1, 2, 3, 4, 6, 12"
    assert divisors(12, 40) == divisors(40, 12) == "1, 2, 4"
    assert divisors(7, 12) == "1"


# --- What does not: processes ---


@pytest.mark.parametrize(("world", "tp", "cp"), [(1, 2, 1), (6, 2, 2), (12, 4, 2), (8, 1, 3)])
def test_tp_times_cp_must_divide_the_processes(world, tp, cp):
    message = refusal(world, tp=tp, cp=cp)
    assert message.startswith(f"parallel.tp={tp} x parallel.cp={cp} = {tp * cp} does not divide {world} process(es)")
    assert f"start a multiple of {tp * cp} processes" in message
    assert named(message) == [n for n in range(1, world + 1) if fits(lambda n=n: check_world(ParallelConfig(cp=n), world))]
    assert fits(lambda: check_world(ParallelConfig(tp=tp, cp=cp), 5 * tp * cp))


@pytest.mark.parametrize(("world", "tp", "cp", "dp"), [(8, 2, 2, 4), (8, 2, 2, 1), (6, 1, 1, 4)])
def test_a_data_parallel_size_that_is_asked_for_must_be_the_one_there_is(world, tp, cp, dp):
    message = refusal(world, tp=tp, cp=cp, dp=dp)
    total, left = tp * cp * dp, world // (tp * cp)
    assert f"parallel.tp={tp} x parallel.cp={cp} x parallel.dp={dp} = {total}, but {world} process(es) were started" in message
    assert f"start {total}, or set parallel.dp to {left} or 0" in message
    assert check(total, tp=tp, cp=cp, dp=dp) == dp
    assert check(world, tp=tp, cp=cp, dp=left) == check(world, tp=tp, cp=cp) == left


@pytest.mark.parametrize(("world", "options"), [(8, {"shard": 3}), (8, {"tp": 4, "shard": 4}), (12, {"tp": 2, "cp": 3, "shard": 4})])
def test_shards_must_divide_dp_times_cp(world, options):
    message, ranks = refusal(world, **options), world // options.get("tp", 1)
    assert f"parallel.shard={options['shard']} does not divide the {ranks} ranks of dp x cp" in message and "or 0 for all" in message
    assert named(message) == [n for n in range(1, 20) if fits(lambda n=n: check(world, **options | {"shard": n}))]


# --- Networks ---


@pytest.mark.parametrize(("tp", "name"), [(3, "mlp_hidden=40"), (8, "heads=12"), (5, "heads=12"), (6, "mlp_hidden=40")])
def test_tp_must_divide_heads_and_mlp(tp, name):
    message = refusal(tp, tp=tp)
    assert message.startswith(f"parallel.tp={tp} does not divide net.{name}")
    assert named(message) == [n for n in range(1, 50) if fits(lambda n=n: check(n, tp=n))] == [1, 2, 4]


@pytest.mark.parametrize(("tp", "cp"), [(2, 12), (4, 2), (4, 4)])
def test_ulysses_needs_whole_heads_per_rank(tp, cp):
    message = refusal(tp * cp, tp=tp, cp=cp)
    assert f"net.heads=12 is no multiple of parallel.tp={tp} x parallel.cp={cp} = {tp * cp}, as Ulysses needs" in message
    assert "set parallel.cp_attention to ring" in message and check(tp * cp, tp=tp, cp=cp, cp_attention="ring") == 1
    assert named(message) == [n for n in range(1, 50) if fits(lambda n=n: check(n, cp=n))]


# --- Clips ---


@pytest.mark.parametrize(("cp", "attention"), [(5, "ring"), (8, "ring"), (24, "ring")])
def test_cp_must_divide_the_latent_frames(cp, attention):
    message = refusal(cp, cp=cp, cp_attention=attention)
    assert f"parallel.cp={cp} does not divide the 12 latent frames of a clip" in message
    assert named(message) == [n for n in range(1, 50) if fits(lambda n=n: check(n, cp=n, cp_attention=attention))]


def test_sequence_parallelism_must_divide_the_tokens_of_a_rank():
    # 12 frames / 12 ranks x 15 patches: 15 tokens of a rank do not divide by 2.
    options = {"cp": 12, "cp_attention": "ring", "sequence_parallel": True}
    message = refusal(24, tp=2, **options)
    assert "parallel.tp=2 does not divide the 15 tokens of a rank, as sequence_parallel needs" in message
    assert message.endswith("or leave it off") and check(24, tp=2, cp=12, cp_attention="ring") == 1
    wide = replace(NET, mlp_hidden=60)
    offered = named(refusal(24, net=wide, tp=2, **options))
    fitting = [n for n in range(2, 50) if fits(lambda n=n: check(12 * n, net=wide, tp=n, **options))]
    assert [n for n in offered if n > 1] == fitting == [3]


@pytest.mark.parametrize(("cp", "published"), [(1, 5), (1, 24), (2, 3), (4, 6), (4, 2)])
def test_published_scaling_must_be_a_multiple_of_cp_that_divides_the_frames(cp, published):
    message = refusal(cp, cp=cp, reference_cp_scaling=published)
    assert f"parallel.reference_cp_scaling={published} must be a multiple of parallel.cp={cp} that divides the 12 latent" in message
    assert message.endswith("or 0") and check(cp, cp=cp) == 1
    fitting = [n for n in range(1, 50) if fits(lambda n=n: check(cp, cp=cp, reference_cp_scaling=n))]
    assert named(message) == fitting == [n for n in (1, 2, 3, 4, 6, 12) if n % cp == 0]


# --- Heads ---


@pytest.mark.parametrize("kind", ["attention", "spatial_temporal"])
def test_heads_that_look_across_all_frames_need_whole_clips(kind):
    head = replace(CONV3D, kind=kind)
    message = refusal(2, head, cp=2)
    assert message.startswith(f"head.kind={kind} looks across all frames of a clip, which parallel.cp=2 divides")
    assert "use conv3d or conv2d, or set parallel.cp to 1" in message
    assert check(2, CONV3D, cp=2) == check(2, CONV2D, cp=2) == 1 and check(1, head) == 1


@pytest.mark.parametrize(("cp", "first"), [(4, 0), (12, 0), (2, 1), (3, 3), (4, 1)])
def test_conv3d_joins_frames_in_pairs_and_no_pair_may_lie_on_two_ranks(cp, first):
    head = replace(CONV3D, first_frame=first)
    message = refusal(cp, head, cp=cp)
    assert message.startswith("head.kind=conv3d joins frames in pairs") and f"with parallel.cp={cp} a rank holds {12 // cp}" in message
    assert f"the first {first} of a clip are left out" in message and message.endswith("or use conv2d")
    assert named(message, "(parallel.cp one of ") == [n for n in range(1, 50) if fits(lambda n=n: check(n, CONV3D, cp=n))]
    assert fits(lambda: check(cp, replace(CONV2D, first_frame=min(first, 12 // cp - 1)), cp=cp))


@pytest.mark.parametrize(("head", "cp"), [(CONV2D, 4), (CONV2D, 12), (CONV3D, 3)])
def test_every_rank_must_have_frames_to_judge(head, cp):
    own = 12 // cp
    for first in (own, own + 2):
        message = refusal(cp, replace(head, first_frame=first), cp=cp)
        assert f"head.first_frame={first} leaves nothing to judge on the first rank" in message
        assert f"which holds {own} of 12 latent frames with parallel.cp={cp}: lower either" in message
    assert fits(lambda: check(cp, replace(head, first_frame=max(0, own - 2)), cp=cp))
