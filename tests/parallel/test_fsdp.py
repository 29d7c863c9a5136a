"""Sharding as one process sees it: precision, frozen roles, and parameters that never stay gathered."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import HeadConfig, ParallelConfig
from cosmos_mp.models.block import Block
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.dit import NetInput, NetOutput
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.parallel import apply, fsdp
from cosmos_mp.parallel.apply import parallelize
from cosmos_mp.parallel.fsdp import settle, shard, synchronise
from cosmos_mp.parallel.topology import join, single_process

BF16 = ParallelConfig(compute="bfloat16")


class Products(TorchDispatchMode):
    """Types in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.types: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.types.update(value.dtype for value in args if isinstance(value, torch.Tensor))
        return func(*args, **(kwargs or {}))


def step(network: nn.Module, pieces, call: NetInput) -> dict[str, torch.Tensor]:
    """Gradients of one forward and backward pass, as the pieces hold them."""
    pieces.drop_gradients()
    network(call).out.double().pow(2).mean().backward()
    pieces.take_gradients()
    return {name: piece.parameter.grad.clone() for name, piece in pieces.items() if piece.parameter.grad is not None}


def frozen_call(network: nn.Module, call: NetInput) -> torch.Tensor:
    """A forward pass as a role has it in an iteration that does not train it."""
    network.requires_grad_(False)
    with torch.no_grad():
        out = network(call).out
    network.requires_grad_(True)
    return out


# --- What is sharded how ---


@pytest.mark.parametrize(
    ("options", "device", "policy"),
    [
        (ParallelConfig(), "cpu", MixedPrecisionPolicy()),
        (ParallelConfig(), "cuda", MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)),
        (ParallelConfig(compute="float32"), "cuda", MixedPrecisionPolicy()),
        (BF16, "cpu", MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)),
    ],
)
def test_blocks_first_then_the_rest_with_the_precision_asked_for(monkeypatch, make_network, options, device, policy):
    sharded = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **how: sharded.append((module, how)))
    network, topology = make_network(), dataclasses.replace(join(options), device=torch.device(device))
    shard(network, topology)
    blocks = [*network.base.blocks, *network.control.blocks]
    assert [module for module, _ in sharded] == [*blocks, network]
    assert all(how["mp_policy"] == policy and how["mesh"] == topology.fsdp_mesh for _, how in sharded)
    assert sharded[-1][1]["reshard_after_forward"] is True


def test_a_network_for_one_process_is_left_whole(tiny_net):
    topology = single_process()
    with torch.device("meta"):
        network = TransferNet(tiny_net(), LocalBackend(topology.tp_group))
    parallelize(network, topology)
    assert not any(isinstance(module, FSDPModule) for module in network.modules())
    assert {(p.device.type, p.dtype, type(p)) for p in network.parameters()} == {("cpu", torch.float32, nn.Parameter)}


def test_the_same_numbers_as_the_whole_network(lay_out, make_network, make_input):
    network, pieces = lay_out(dtype=torch.float64)
    whole, call = make_network(), make_input()
    assert torch.equal(network(call).out, whole(call).out)
    whole(call).out.double().pow(2).mean().backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    gradients = step(network, pieces, call)
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("control", [True, False])
def test_calls_and_answers_are_nodes_in_which_fsdp_finds_the_tensors(make_input, control):
    call = make_input() if control else make_input(control_BCTHW=None)
    answer = NetOutput(call.x_BCTHW, (call.text_BLD, call.fps_B))
    for value, count in ((call, 7 if control else 6), (answer, 3), (NetOutput(None, (call.fps_B,)), 1)):
        leaves = [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        assert len(leaves) == count
        same = _pytree.tree_map(lambda leaf: leaf, value)
        assert type(same) is type(value) and same is not value
        assert all(getattr(same, f.name) is getattr(value, f.name) for f in dataclasses.fields(call) if value is call)
        doubled = _pytree.tree_map_only(torch.Tensor, lambda leaf: 2 * leaf, value)
        found = [leaf for leaf in _pytree.tree_leaves(doubled) if isinstance(leaf, torch.Tensor)]
        assert all(torch.equal(a, 2 * b) for a, b in zip(found, leaves, strict=True))


# --- Precision ---


def test_bfloat16_computes_over_float32_masters_and_gradients(lay_out, make_network, make_input):
    network, pieces = lay_out(BF16)
    call = make_input(dtype=torch.float32)
    with Products() as forward:
        out = network(call).out
    assert set(forward.types) == {torch.bfloat16} and forward.types[torch.bfloat16] > 100 and out.dtype == torch.bfloat16
    gradients = step(network, pieces, call)
    assert {p.dtype for p in network.parameters()} == {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float32}
    assert {piece.parameter.dtype for piece in pieces.values()} == {value.dtype for value in gradients.values()} == {torch.float32}
    # Not only of that type: rounding to bfloat16 and back would leave no bits below.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in (p.parameter for p in pieces.values()))
    exact = make_network()(make_input()).out
    assert 1e-4 < (out.double() - exact).abs().max() / exact.abs().max() < 0.1


def test_a_role_that_is_first_run_frozen_trains_like_any_other(lay_out, make_input):
    call = make_input(dtype=torch.float32)
    plain, first_frozen = lay_out(BF16), lay_out(BF16)
    expected = step(*plain, call)
    frozen_call(first_frozen[0], call)
    gradients = step(*first_frozen, call)
    assert gradients.keys() == expected.keys() and len(gradients) > 100
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in gradients.items())


def test_without_settling_it_would_fail_in_its_backward_pass(monkeypatch, lay_out, make_input):
    # Why `settle` is there. Should this pass without it one day, it can go.
    monkeypatch.setattr(apply, "settle", lambda network: None)
    network, pieces = lay_out(BF16)
    call = make_input(dtype=torch.float32)
    frozen_call(network, call)
    with pytest.raises(RuntimeError, match="gradient with dtype"):
        step(network, pieces, call)


@pytest.mark.parametrize("name", ["base.final.linear.weight", "control.blocks.1.mlp.up.weight"])
def test_a_network_must_be_settled_before_anything_is_frozen(lay_out, name):
    network, _ = lay_out()
    settle(network)
    dict(network.named_parameters())[name].requires_grad_(False)
    with pytest.raises(RuntimeError, match="settled before any of its parameters is frozen"):
        settle(network)


def test_a_network_without_fsdp_needs_no_settling(make_network):
    settle(make_network().requires_grad_(False))


# --- Nothing stays gathered ---


@pytest.mark.parametrize("options", [ParallelConfig(), BF16])
@pytest.mark.parametrize("name", ["base.final.linear.weight", "base.blocks.0.mlp.down.weight"])
def test_a_frozen_forward_leaves_nothing_gathered(lay_out, make_input, options, name):
    # As between two iterations: the optimizer writes into the pieces, and the next forward must see it.
    network, pieces = lay_out(options)
    call = make_input(dtype=torch.float32)
    before = frozen_call(network, call)
    with torch.no_grad():
        pieces[name].parameter.mul_(2)
    after = frozen_call(network, call)
    assert not torch.equal(after, before)
    whole, changed = lay_out(options)
    with torch.no_grad():
        changed[name].parameter.mul_(2)
    assert torch.equal(after, frozen_call(whole, call))


def test_a_discriminator_is_one_unit_and_leaves_nothing_gathered():
    topology = join(ParallelConfig())
    with torch.device("meta"):
        discriminator = Discriminator(24, HeadConfig("conv2d", 8, (0,)))
    parallelize(discriminator, topology)
    assert [m for m in discriminator.modules() if isinstance(m, FSDPModule)] == [discriminator]
    assert not any(isinstance(module, Block) for module in discriminator.modules())
    local = [p.to_local() for p in discriminator.parameters()]
    features = [torch.randn(1, 2, 2, 3, 24, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        for value in local:
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        first = discriminator(features)
        for value in local:
            value.mul_(0.5)
        assert not torch.allclose(discriminator(features), first)


# --- When gradients are reduced ---


def micro_batches(network: nn.Module, pieces, calls: list[NetInput], topology) -> list[bool]:
    """After each micro-batch: whether the network has its gradients yet."""
    seen = []
    for index, call in enumerate(calls):
        synchronise(network, index == len(calls) - 1, topology)
        network(call).out.pow(2).mean().backward()
        seen.append(network.base.final.linear.weight.grad is not None)
    pieces.take_gradients()
    return seen


@pytest.mark.parametrize(("reduce", "seen"), [("step", [False, False, True]), ("micro_batch", [True, True, True])])
def test_gradients_are_reduced_with_the_last_micro_batch_or_with_each(lay_out, make_network, make_input, reduce, seen):
    options = ParallelConfig(reduce=reduce)
    network, pieces = lay_out(options, dtype=torch.float64)
    calls = [make_input([2 * i, 2 * i + 1]) for i in range(3)]
    whole = make_network()
    for call in calls:
        whole(call).out.pow(2).mean().backward()
    for _ in range(2):  # the second step must not inherit that nothing is to be reduced, nor any sum
        assert micro_batches(network, pieces, calls, join(options)) == seen
        for name, p in whole.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(pieces[name].parameter.grad, p.grad, rtol=1e-12, atol=1e-15)
        pieces.drop_gradients()
        assert all(p.grad is None for p in network.parameters())


def test_under_hsdp_only_the_sum_across_groups_waits(monkeypatch, lay_out):
    network, _ = lay_out()
    asked = []
    monkeypatch.setattr(network, "set_requires_all_reduce", lambda last: asked.append(("across groups", last)))
    monkeypatch.setattr(network, "set_requires_gradient_sync", lambda last: asked.append(("all", last)))

    class Mesh:
        shape = (2, 4, 1)

    topology = join(ParallelConfig())
    for last in (False, True):
        synchronise(network, last, dataclasses.replace(topology, mesh=Mesh()))
        synchronise(network, last, topology)
        synchronise(network, last, dataclasses.replace(topology, options=ParallelConfig(reduce="micro_batch")))
    assert asked == [("across groups", False), ("all", False), ("across groups", True), ("all", True)]


def test_a_network_without_fsdp_has_nothing_to_synchronise(make_network):
    synchronise(make_network(), False, single_process())
