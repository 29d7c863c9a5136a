"""What a rank holds: rectangles, their gradients and norms. Other ranks are stand-ins here; tests/distributed has real ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cosmos_mp.config import ParallelConfig
from cosmos_mp.parallel import pieces as module
from cosmos_mp.parallel.pieces import Piece, Pieces, agree
from cosmos_mp.parallel.topology import join, single_process
from cosmos_mp.training.ema import EMA


def split_of(name: str) -> int | None:
    """By the names alone: columns of q, k, v and up are split along their rows, out and down along their columns."""
    layer = name.removesuffix(".weight")
    if layer.endswith(("_attn.q", "_attn.k", "_attn.v", ".mlp.up")):
        return 0
    return 1 if layer.endswith(("_attn.out", ".mlp.down")) else None


def random(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Rectangles ---


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        ((0, 0), (4, 3), lambda w: w),
        ((2, 0), (2, 3), lambda w: w[2:]),
        ((1, 1), (2, 2), lambda w: w[1:3, 1:]),
        ((0, 2), (4, 1), lambda w: w[:, 2:]),
        ((4, 0), (0, 3), lambda w: w[4:]),
    ],
)
def test_a_piece_cuts_its_rectangle_out_of_any_tensor_of_the_shape(offset, size, expected):
    whole = random((4, 3))
    piece = Piece(nn.Parameter(torch.empty(size)), whole.shape, offset, None, False)
    assert piece.of(whole).shape == size and torch.equal(piece.of(whole), expected(whole))
    vector = Piece(nn.Parameter(torch.empty(3)), torch.Size([7]), (4,), None, False)
    assert vector.of(torch.arange(7)).tolist() == [4, 5, 6]


def test_pieces_of_a_whole_network_are_its_parameters(make_network):
    network = make_network()
    pieces = Pieces(network, single_process())
    parameters = dict(network.named_parameters())
    assert list(pieces) == list(parameters) and len(pieces) == len(parameters) > 100
    for name, piece in pieces.items():
        assert piece.parameter is parameters[name]
        assert piece.shape == parameters[name].shape and piece.offset == (0,) * len(piece.shape)
        assert piece.split == split_of(name) and not piece.summed


def test_pieces_under_fsdp_are_plain_tensors_in_the_memory_of_the_network(lay_out, make_network, make_input):
    network, pieces = lay_out(dtype=torch.float64)
    whole = make_network()
    for (name, piece), p, own in zip(pieces.items(), network.parameters(), whole.parameters(), strict=True):
        assert isinstance(p, DTensor) and not isinstance(piece.parameter, DTensor), name
        assert piece.parameter.data_ptr() == p.to_local().data_ptr()
        assert piece.shape == p.shape == own.shape and piece.offset == (0,) * len(piece.shape)
    # What is written into the pieces is what the network computes with, and the average is lent to it through them.
    average = EMA({name: piece.parameter for name, piece in pieces.items()}, 0.9)
    other = make_network(seed=1)
    with torch.no_grad():
        for name, p in other.named_parameters():
            pieces[name].parameter.copy_(p)
        call = make_input()
        assert torch.equal(network(call).out, other(call).out)
        with average.applied():
            assert torch.equal(network(call).out, whole(call).out)
        assert torch.equal(network(call).out, other(call).out)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_tensor_parallel_ranks_hold_equal_parts_of_the_split_dimension(make_network, ranks, place):
    network = make_network()
    for name, piece in Pieces(network, replace(single_process(), tp_group=ranks(place, 3))).items():
        own, split = piece.parameter.shape, split_of(name)
        expected = [size * (3 if dim == split else 1) for dim, size in enumerate(own)]
        assert piece.split == split and list(piece.shape) == expected, name
        assert piece.offset == tuple(place * size if dim == split else 0 for dim, size in enumerate(own)), name


@pytest.mark.parametrize(("count", "tp"), [(4, 1), (5, 1), (48, 1), (4, 2)])
def test_shards_are_divided_as_torch_chunks_them(lay_out, ranks, count, tp):
    network, _ = lay_out()
    for place in range(count):
        topology = replace(join(ParallelConfig()), mesh={"shard": ranks(place, count)}, tp_group=ranks(tp - 1, tp))
        for name, piece in Pieces(network, topology).items():
            split, rows = split_of(name), len(piece.parameter)
            starts = [0]
            for chunk in torch.arange(rows).chunk(count):
                starts.append(starts[-1] + len(chunk))
            # tp has divided the rows first: FSDP divides what this rank of tp has of them.
            begin = (tp - 1) * rows if split == 0 else 0
            assert piece.offset[0] == begin + starts[min(place, len(starts) - 1)], (name, place)
            assert piece.shape[0] == rows * (tp if split == 0 else 1)


# --- Gradients ---


@pytest.mark.parametrize("sequence", [False, True])
def test_gradients_that_are_parts_of_a_sum_are_summed_over_tp_in_one_go(monkeypatch, make_network, make_input, ranks, sequence):
    network, group, sent = make_network(), ranks(1, 2), []

    def all_reduce(flat, group):
        sent.append((flat.clone(), group))
        flat.mul_(3)

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    options = ParallelConfig(tp=2, sequence_parallel=sequence)
    pieces = Pieces(network, replace(single_process(), tp_group=group, options=options))
    network(make_input()).out.pow(2).mean().backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    pieces.take_gradients()
    summed = [name for name, piece in pieces.items() if piece.summed]
    norms = [name for name in before if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert set(norms) <= set(summed) and len(norms) == 20
    assert (summed == norms) is not sequence
    assert {name for name in summed if before[name] is None} == ({n for n in before if "control.final." in n} if sequence else set())
    ((flat, asked),) = sent
    assert asked is group and torch.equal(flat, torch.cat([before[n].flatten() for n in summed if before[n] is not None]))
    for name, piece in pieces.items():
        if before[name] is None:
            assert piece.parameter.grad is None
        else:
            assert torch.equal(piece.parameter.grad, (3 if piece.summed else 1) * before[name]), name


def test_one_rank_of_tp_sums_nothing(monkeypatch, make_network, make_input):
    monkeypatch.setattr(module.dist, "all_reduce", lambda *_, **__: pytest.fail("a collective for nothing"))
    network = make_network()
    pieces = Pieces(network, single_process())
    network(make_input()).out.pow(2).mean().backward()
    expected = {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    pieces.take_gradients()
    for name, piece in pieces.items():
        assert piece.parameter.grad is expected[name] is None or torch.equal(piece.parameter.grad, expected[name])


def test_gradients_under_fsdp_are_taken_and_dropped_on_both_sides(lay_out, make_input):
    network, pieces = lay_out(dtype=torch.float64)
    call = make_input()
    network(call).out.pow(2).mean().backward()
    pieces.take_gradients()
    with_gradient = {name for name, piece in pieces.items() if piece.parameter.grad is not None}
    assert with_gradient == {name for name, p in network.named_parameters() if p.grad is not None} and len(with_gradient) > 100
    assert not any(isinstance(pieces[name].parameter.grad, DTensor) for name in with_gradient)
    pieces.drop_gradients()
    assert all(p.grad is None for p in network.parameters()) and all(piece.parameter.grad is None for piece in pieces.values())
    # A gradient that the network has not this time is not one of last time.
    network(call).out.pow(2).mean().backward()
    pieces.take_gradients()
    network.zero_grad(set_to_none=True)
    pieces.take_gradients()
    assert all(piece.parameter.grad is None for piece in pieces.values())


# --- Norms ---


def gradients(network: nn.Module, dtype: torch.dtype, scale: float = 1.0) -> float:
    """Give some parameters a gradient; returns the exact sum of its squares."""
    total = 0.0
    for index, p in enumerate(network.parameters()):
        if index % 7 != 3:
            p.grad = (scale * random(p.shape, index)).to(dtype)
            total += p.grad.double().pow(2).sum().item()
    return total


@pytest.mark.parametrize(
    ("dtype", "scale", "within"),
    [
        (torch.float64, 1.0, 1e-14),
        (torch.float32, 1.0, 1e-6),
        (torch.float16, 1e3, 1e-6),  # squares overflow in float16
        (torch.bfloat16, 1.0, 1e-6),  # and would keep three digits in bfloat16
    ],
)
def test_square_norm_of_a_whole_network(make_network, dtype, scale, within):
    network = make_network(dtype=dtype)
    exact = gradients(network, dtype, scale)
    square = Pieces(network, single_process()).square_norm()
    assert square.dtype == torch.float64 and square.item() == pytest.approx(exact, rel=within)
    if dtype == torch.float16:
        assert not torch.stack([p.grad.pow(2).sum() for p in network.parameters() if p.grad is not None]).isfinite().all()


def test_square_norm_without_any_gradient_is_zero(make_network):
    square = Pieces(make_network(), single_process()).square_norm()
    assert square.dtype == torch.float64 and square.shape == () and square.item() == 0.0


def test_square_norm_sees_what_is_not_finite(make_network):
    network = make_network()
    gradients(network, torch.float64)
    next(network.parameters()).grad[0, 0] = float("nan")
    assert Pieces(network, single_process()).square_norm().isnan()


@pytest.mark.parametrize(("tp", "replicas"), [(2, 1), (1, 3), (4, 2)])
def test_shares_of_all_ranks_add_up_to_the_whole(make_network, ranks, tp, replicas):
    """Every rank's share; whole parameters are on all ranks of tp, and everything is in each replica."""
    network = make_network()
    gradients(network, torch.float64)
    whole = split = 0.0
    for name, p in network.named_parameters():
        if p.grad is not None:
            square = p.grad.pow(2).sum().item()
            whole, split = (whole + square, split) if split_of(name) is None else (whole, split + square)
    mesh = SimpleNamespace(shape=(replicas, 1, tp))
    shares = []
    for place in range(tp):
        topology = replace(single_process(), tp_group=ranks(place, tp), mesh=mesh, options=ParallelConfig(tp=tp))
        shares += [Pieces(network, topology).square_norm().item()] * replicas
    # The stand-ins hold the same numbers as their own part of the split parameters.
    assert sum(shares) == pytest.approx(whole + tp * split, rel=1e-12)


# --- Agreement and checkpoints ---


def test_scalars_of_one_process_are_one_row_in_float64():
    for topology in (single_process(), join(ParallelConfig())):
        loss = torch.tensor(1.0, requires_grad=True)
        rows = agree([loss, torch.tensor(3, dtype=torch.int64), torch.tensor(0.1).half()], topology)
        assert rows.dtype == torch.float64 and rows.shape == (1, 3) and not rows.requires_grad
        assert rows[0].tolist() == [1.0, 3.0, torch.tensor(0.1).half().item()]


def test_one_process_stores_plain_tensors(lay_out, make_network):
    local = torch.ones(3)
    for pieces in (lay_out()[1], Pieces(make_network(), single_process())):
        assert all(pieces.as_stored(name, local) is local for name in pieces)
