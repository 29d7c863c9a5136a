"""Collectives against the same sums in one process: values, and gradients as the exact transpose. Whole numbers, so nothing is rounded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cosmos_mp.parallel import collectives, noise
from cosmos_mp.parallel.topology import single_process


def _gathered(xs):
    return [torch.cat(xs)] * len(xs)


def _summed(xs):
    return [sum(xs)] * len(xs)


def _scattered(xs):
    return list(sum(xs).chunk(len(xs)))


def _exchanged(xs):
    return [torch.cat([x.chunk(len(xs))[rank] for x in xs]) for rank in range(len(xs))]


def _parts(xs):
    return list(xs[0].chunk(len(xs)))


# name: what the ranks get from what they give; do they give the same tensor; do they all go on with the same work.
MATHS = {
    "sum_over": (_summed, False, False),
    "exchange": (_exchanged, False, False),
    "gather": (_gathered, False, False),
    "scatter_sum": (_scattered, False, False),
    "enter": (lambda xs: xs, True, False),
    "split": (_parts, True, False),
    "join": (_gathered, False, True),
    "leave": (_summed, False, True),
}
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack((x, -x), dim=-1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "scalar": lambda x: x[0, 0, 0].expand(x.shape),  # as the gradient of a sum is
}


def _draw(purpose, rank, rows):
    return (10 * noise.normal((rows, 5, 2), 0, purpose, 0, [rank])[0]).round().double()


def _apply(name, group, x, gradient):
    """Value and gradient on this rank; the input stays what it was."""
    before, x = x.clone(), x.detach().requires_grad_()
    y = getattr(collectives, name)(x, group)
    (x_gradient,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(x, before)
    return y.detach(), x_gradient


def _expected(name, xs, gradients):
    """The same from autograd of one process, where the objective is what all ranks say together."""
    maths, same_input, same_work = MATHS[name]
    leaves = [x.clone().requires_grad_() for x in (xs[:1] if same_input else xs)]
    ys = maths(leaves * len(xs) if same_input else leaves)
    count = 1 if same_work else len(ys)
    x_gradients = torch.autograd.grad(ys[:count], leaves, gradients[:count])
    return [y.detach() for y in ys], list(x_gradients) * (len(xs) if same_input else 1)


def _inputs(name, ranks, layout="contiguous", gradient_layout="contiguous"):
    """What each of these ranks gives, and the gradient of what it gets."""
    maths, same_input, same_work = MATHS[name]
    xs = [LAYOUTS[layout](_draw("x", ranks[0] if same_input else rank, 2 * len(ranks))) for rank in ranks]
    rows = len(maths(xs)[0])
    gradients = [LAYOUTS[gradient_layout](_draw("gradient", ranks[0] if same_work else rank, rows)) for rank in ranks]
    return xs, gradients


def _check(name, xs, gradients, results):
    ys, x_gradients = _expected(name, xs, gradients)
    for place, (y, x_gradient) in enumerate(results):
        assert torch.equal(y, ys[place]), place
        assert torch.equal(x_gradient, x_gradients[place]), place


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", MATHS)
def test_values_and_gradients_in_any_memory_layout(run_ranks, name, world):
    cases = [_inputs(name, range(world), layout, layout) for layout in LAYOUTS]
    assert [x[0].is_contiguous() and gradient[0].is_contiguous() for x, gradient in cases] == [True] + [False] * (len(LAYOUTS) - 1)

    def work(rank):
        return [_apply(name, dist.group.WORLD, xs[rank], gradients[rank]) for xs, gradients in cases]

    for (xs, gradients), *results in zip(cases, *run_ranks(world, work), strict=True):
        _check(name, xs, gradients, results)


def test_a_group_is_its_own_world(run_ranks):
    """Ranks 0, 2 and ranks 1, 3, as context parallelism has them beside tensor parallelism."""
    members = [[0, 2], [1, 3]]
    cases = {name: [_inputs(name, ranks) for ranks in members] for name in MATHS}

    def work(rank):
        group, _ = dist.new_subgroups_by_enumeration(members)
        return [_apply(name, group, *(tensors[rank // 2] for tensors in groups[rank % 2])) for name, groups in cases.items()]

    for name, *results in zip(cases, *run_ranks(4, work), strict=True):
        for case, ranks in zip(cases[name], members, strict=True):
            _check(name, *case, [results[rank] for rank in ranks])


def test_a_rank_alone_gets_its_tensor_back():
    x = torch.ones(2)
    for name in MATHS:
        assert getattr(collectives, name)(x, single_process().cp_group) is x


def test_every_collective_is_tested():
    own = {name for name, value in vars(collectives).items() if getattr(value, "__module__", None) == collectives.__name__}
    assert set(MATHS) == {name for name in own if not name.startswith("_")}
