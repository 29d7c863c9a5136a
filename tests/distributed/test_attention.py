"""Attention over a context-parallel group against plain attention of one process: the result, and the gradients of q, k and v."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import ParallelConfig
from cosmos_mp.parallel import attention, noise
from cosmos_mp.parallel.attention import ring, ulysses
from cosmos_mp.parallel.topology import join, single_process

# Sizes that differ from one another, so that no two axes can be confused; also on every rank.
SHAPE = TOKENS, BATCH, HEADS, SIZE = 24, 3, 4, 5
MEMBERS = {"ulysses": [2, 4], "ring": [2, 3, 4]}
CASES = [(kind, ranks) for kind, counts in MEMBERS.items() for ranks in counts]


def draw(seed=0, sharpness=2.0, dtype=torch.float64):
    """q, k, v and the gradient of the result. Sharp: the parts of different ranks weigh very differently."""
    tensors = [noise.normal(SHAPE, seed, f"test/{name}", 0, [0])[0].double() for name in ("q", "k", "v", "gradient")]
    return [(sharpness * x if place < 2 else x).to(dtype) for place, x in enumerate(tensors)]


def plain(query, key, value, gradient):
    """Result and gradients written out, in float64."""
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    query, key, value = leaves
    weights = torch.softmax(torch.einsum("sbhd,tbhd->bhst", query, key) / query.shape[-1] ** 0.5, dim=-1)
    out = torch.einsum("bhst,tbhd->sbhd", weights, value)
    return out.detach(), *torch.autograd.grad(out, leaves, gradient.double())


@pytest.fixture
def attention_of():
    """`attention_of(kind, group)`."""
    local = LocalBackend(single_process().tp_group).attention()
    return lambda kind, group: ulysses(local, group) if kind == "ulysses" else ring(group)


def part(x, group):
    """This rank's tokens."""
    return x.chunk(group.size())[group.rank()]


def attended(attend, tensors, group, call=lambda f, *x: f(*x)):
    """Result and gradients on this rank; the result as (S / cp, B, H, D)."""
    leaves = [part(x, group).clone().requires_grad_() for x in tensors[:3]]
    out = call(attend, *leaves)
    assert out.shape == (TOKENS // group.size(), BATCH, HEADS * SIZE) and out.dtype == tensors[0].dtype
    out = out.unflatten(2, (HEADS, SIZE))
    return out.detach(), *torch.autograd.grad(out, leaves, part(tensors[3], group))


def assert_close(parts, expected, tolerance):
    """All ranks' parts put together, relative to the largest number."""
    for name, got, right in zip(("out", "dq", "dk", "dv"), zip(*parts, strict=True), expected, strict=True):
        error = (torch.cat(got).double() - right).abs().max() / right.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("kind", "ranks"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_result_and_gradients_are_those_of_plain_attention(run_ranks, attention_of, kind, ranks, dtype, tolerance):
    tensors = draw(dtype=dtype)
    parts = run_ranks(ranks, lambda rank: attended(attention_of(kind, dist.group.WORLD), tensors, dist.group.WORLD))
    assert_close(parts, plain(*tensors), tolerance)


@pytest.mark.parametrize("kind", MEMBERS)
def test_large_scores_do_not_overflow(run_ranks, attention_of, kind):
    tensors = draw(sharpness=60.0)
    assert torch.einsum("sbhd,tbhd->bhst", *tensors[:2]).max() / SIZE**0.5 > 5000
    parts = run_ranks(3 if kind == "ring" else 2, lambda rank: attended(attention_of(kind, dist.group.WORLD), tensors, dist.group.WORLD))
    assert_close(parts, plain(*tensors), 1e-10)


def test_many_blocks_are_summed_in_more_than_their_own_precision(run_ranks, attention_of):
    """Twelve ranks in bfloat16 stray little farther than one; sums in bfloat16 would show."""
    tensors = draw(dtype=torch.bfloat16)
    expected = plain(*tensors)

    def errors(ranks):
        parts = run_ranks(ranks, lambda rank: attended(attention_of("ring", dist.group.WORLD), tensors, dist.group.WORLD))
        together = [torch.cat(got).double() for got in zip(*parts, strict=True)]
        return [(got - right).pow(2).mean().sqrt() for got, right in zip(together, expected, strict=True)]

    growth = [many / one for many, one in zip(errors(12), errors(1), strict=True)]
    assert all(ratio < most for ratio, most in zip(growth, (1.3, 1.3, 1.3, 1.6), strict=True)), growth


def test_the_two_levels_of_context_parallelism_are_neighbours_and_those_across(run_ranks):
    """For Transformer Engine's a2a+p2p: world 8 = tp 2 x cp 4, of which 2 trade heads."""

    def work(rank):
        topology = join(ParallelConfig(tp=2, cp=4, cp_attention="ulysses_ring", cp_ulysses=2))
        return [dist.get_process_group_ranks(group) for group in (topology.cp_group, *topology.cp_levels)]

    results = run_ranks(8, work)
    assert results[0] == [[0, 2, 4, 6], [0, 2], [0, 4]]
    assert results[3] == [[1, 3, 5, 7], [1, 3], [3, 7]]
    assert results[6] == [[0, 2, 4, 6], [4, 6], [2, 6]]


@pytest.mark.parametrize("kind", MEMBERS)
def test_groups_are_apart_from_one_another(run_ranks, attention_of, kind):
    """Ranks 0, 2 and ranks 1, 3, each with tokens of their own."""
    members = [[0, 2], [1, 3]]
    tensors = [draw(seed) for seed in range(2)]

    def work(rank):
        group, _ = dist.new_subgroups_by_enumeration(members)
        return attended(attention_of(kind, group), tensors[rank % 2], group)

    results = run_ranks(4, work)
    for seed, ranks in enumerate(members):
        assert_close([results[rank] for rank in ranks], plain(*tensors[seed]), 1e-10)


@pytest.mark.parametrize("kind", MEMBERS)
def test_inside_a_checkpoint(run_ranks, attention_of, kind):
    tensors = draw()
    calls = []

    def work(rank):
        attend = attention_of(kind, dist.group.WORLD)

        def counted(*x):
            calls.append(rank)
            return attend(*x)

        result = attended(counted, tensors, dist.group.WORLD, lambda f, *x: checkpoint(f, *x, use_reentrant=False))
        assert len(calls) == 2
        return result

    assert_close(run_ranks(2, work), plain(*tensors), 1e-10)


@pytest.mark.parametrize("kind", MEMBERS)
def test_two_calls_before_one_backward(run_ranks, attention_of, kind):
    """As a network asked with and without its text; keys and values are the same ones in both calls."""
    first, second = draw(0), draw(1)
    second[1:3] = first[1:3]

    def work(rank):
        group = dist.group.WORLD
        attend = attention_of(kind, group)
        queries = [part(x[0], group).clone().requires_grad_() for x in (first, second)]
        pair = [part(x, group).clone().requires_grad_() for x in first[1:3]]
        outs = [attend(query, *pair).unflatten(2, (HEADS, SIZE)) for query in queries]
        loss = sum((out * part(x[3], group)).sum() for out, x in zip(outs, (first, second), strict=True))
        gradients = torch.autograd.grad(loss, queries + pair)
        return [(outs[0].detach(), gradients[0], *gradients[2:]), (outs[1].detach(), gradients[1], *gradients[2:])]

    ranks = 4 if kind == "ring" else 2
    results = run_ranks(ranks, work)
    one, other = plain(*first), plain(*second)
    both = [one[2] + other[2], one[3] + other[3]]
    assert_close([result[0] for result in results], [*one[:2], *both], 1e-10)
    assert_close([result[1] for result in results], [*other[:2], *both], 1e-10)


@pytest.mark.parametrize("kind", MEMBERS)
def test_any_memory_layout_and_the_gradient_of_a_sum(run_ranks, attention_of, kind):
    tensors = draw()
    tensors[3] = torch.ones(())

    def work(rank):
        group = dist.group.WORLD
        leaves = [part(x, group).clone().requires_grad_() for x in tensors[:3]]
        strange = [leaves[0].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), leaves[1][:, :1].expand(-1, BATCH, -1, -1)]
        strange.append(torch.stack((leaves[2], leaves[2]), dim=-1)[..., 0])
        assert not any(x.is_contiguous() for x in strange)
        out = attention_of(kind, group)(*strange).unflatten(2, (HEADS, SIZE))
        gradients = list(torch.autograd.grad(out.sum(), strange))
        return out.detach(), *gradients

    tensors[1] = tensors[1][:, :1].expand(-1, BATCH, -1, -1)
    assert_close(run_ranks(2, work), plain(*tensors[:3], tensors[3].expand(SHAPE)), 1e-10)


@pytest.mark.parametrize("kind", MEMBERS)
def test_without_gradients(run_ranks, attention_of, kind):
    tensors = draw()

    def work(rank):
        with torch.no_grad():
            out = attention_of(kind, dist.group.WORLD)(*(part(x, dist.group.WORLD).requires_grad_() for x in tensors[:3]))
        assert not out.requires_grad
        return (out.unflatten(2, (HEADS, SIZE)),)

    out = torch.cat([result[0] for result in run_ranks(2, work)])
    assert torch.allclose(out, plain(*tensors)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_rank_alone_attends_as_ever(attention_of, kind):
    tensors, group = draw(), single_process().cp_group
    assert_close([attended(attention_of(kind, group), tensors, group)], plain(*tensors), 1e-10)


def test_heads_that_do_not_divide_are_refused(run_ranks, attention_of):
    def work(rank):
        with pytest.raises(ValueError, match="4 attention heads do not divide among 3 context-parallel ranks"):
            attended(attention_of("ulysses", dist.group.WORLD), draw(), dist.group.WORLD)
        return "refused"

    assert run_ranks(3, work) == ["refused"] * 3


def test_the_calls_of_the_gpu_kernels_fit_their_signatures():
    """Shapes and dtypes alone, nothing is computed."""
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(BATCH, HEADS, 6, SIZE, dtype=torch.bfloat16, device="cuda")
        key, value = torch.empty(2, BATCH, HEADS, 8, SIZE, dtype=torch.bfloat16, device="cuda")
        out, lse = attention._attend(query, key, value)
        assert out.shape == query.shape and lse.shape == (BATCH, HEADS, 6) and lse.dtype == torch.float32
        gradients = attention._attend_backward(out, query, key, value, out, lse)
        assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


def test_a_dtype_without_gpu_kernel_is_refused_with_the_way_out():
    with FakeTensorMode(), torch.no_grad():
        tensors = [torch.empty(BATCH, HEADS, TOKENS, SIZE, device="cuda") for _ in range(3)]
        with pytest.raises(ValueError, match="not torch.float32; Ulysses"):
            attention._attend(*tensors)
