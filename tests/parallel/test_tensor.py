"""Which parameters tensor parallelism splits and sums, and where its collectives stand. Real ranks are in tests/distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import HeadConfig, ParallelConfig
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.parallel import tensor as module
from cosmos_mp.parallel.tensor import partial_gradients, split_dims, tensor_parallel
from cosmos_mp.parallel.topology import single_process

BLOCKS = {"base": 3, "control": 2}
MODULATION = ("self_mod", "cross_mod", "mlp_mod")

# --- By hand, from the drawing of a block ---

COLUMNS = ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "cross_attn.k", "cross_attn.v", "mlp.up")
ROWS = ("self_attn.out", "cross_attn.out", "mlp.down")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm", "cross_attn.q_norm", "cross_attn.k_norm")


def in_blocks(*layers: str) -> set[str]:
    return {f"{trunk}.blocks.{i}.{layer}.weight" for trunk, count in BLOCKS.items() for i in range(count) for layer in layers}


SPLIT = dict.fromkeys(in_blocks(*COLUMNS), 0) | dict.fromkeys(in_blocks(*ROWS), 1)
BETWEEN = (
    in_blocks(*HEAD_NORMS, *(f"{mod}.{layer}" for mod in MODULATION for layer in ("down", "up")))
    | {f"{trunk}.time.{layer}.weight" for trunk in BLOCKS for layer in ("linear_1", "linear_2", "norm")}
    | {f"{trunk}.final.{layer}.weight" for trunk in BLOCKS for layer in ("mod.down", "mod.up", "linear")}
    | {f"control.zero.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
)
OUTSIDE = (
    {f"{trunk}.{layer}" for trunk in BLOCKS for layer in ("patch_embed.weight", "position.t", "position.h", "position.w")}
    | {"control.control_embed.weight"}
    | {f"control.control_mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
)
"""Made before the tokens are split: `split` puts their gradient together again."""


@pytest.fixture
def unfilled(tiny_net) -> TransferNet:
    with torch.device("meta"):
        return TransferNet(tiny_net(), LocalBackend(single_process().tp_group))


def test_the_lists_of_this_file_are_all_parameters(unfilled):
    assert {name for name, _ in unfilled.named_parameters()} == SPLIT.keys() | BETWEEN | OUTSIDE
    assert len(SPLIT) + len(BETWEEN) + len(OUTSIDE) == len(list(unfilled.parameters()))


@pytest.mark.parametrize("how", ["meta", "to_empty", "built", "fsdp"])
def test_split_parameters_and_their_dimension(unfilled, make_network, lay_out, how):
    if how == "meta":
        network = unfilled
    elif how == "to_empty":
        assert unfilled.base.blocks[0].mlp.up.weight.tensor_model_parallel  # megatron's mark,
        network = unfilled.to_empty(device="cpu")
        assert not hasattr(network.base.blocks[0].mlp.up.weight, "tensor_model_parallel")  # which is gone
    else:
        network = make_network() if how == "built" else lay_out()[0]
    assert split_dims(network) == SPLIT


@pytest.mark.parametrize("how", ["meta", "built", "fsdp"])
@pytest.mark.parametrize(("sequence", "expected"), [(False, in_blocks(*HEAD_NORMS)), (True, BETWEEN)])
def test_parameters_whose_gradient_is_a_part_of_a_sum(unfilled, make_network, lay_out, how, sequence, expected):
    network = {"meta": lambda: unfilled, "built": make_network, "fsdp": lambda: lay_out()[0]}[how]()
    assert partial_gradients(network, sequence) == expected
    for trunk in BLOCKS:  # of a trunk by itself: the same without the prefix
        own = {name.removeprefix(f"{trunk}.") for name in expected if name.startswith(f"{trunk}.")}
        assert partial_gradients(getattr(network, trunk), sequence) == own


def test_a_discriminator_is_whole_on_every_rank():
    discriminator = Discriminator(24, HeadConfig("attention", 8, (0, 1)))
    assert split_dims(discriminator) == {} and partial_gradients(discriminator, True) == set()


# --- Where the collectives stand ---


def state(network: nn.Module) -> dict[str, tuple]:
    """What tensor parallelism may touch in a network."""
    return {
        name: (list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()), {k: v for k, v in vars(m).items() if k[0] != "_"})
        for name, m in network.named_modules()
    }


def test_one_rank_changes_nothing(make_network):
    network = make_network()
    before = state(network)
    tensor_parallel(network, single_process())
    assert state(network) == before


@pytest.mark.parametrize("sequence", [False, True])
def test_one_collective_into_every_attention_and_mlp_and_one_out_of_it(monkeypatch, make_network, make_input, ranks, sequence):
    network, call, group, log = make_network(), make_input(), ranks(0, 2), []
    expected = network(call).out.detach()

    def stand_in(name: str):
        def collective(x, group):
            log.append((name, group))
            return x.clone()

        return collective

    for name in ("enter", "leave", "gather", "scatter_sum", "split", "join"):
        monkeypatch.setattr(module.collectives, name, stand_in(name))
    # Columns and rows are not really split here, so that with collectives that hand on what they get the numbers stay.
    tensor_parallel(network, replace(single_process(), tp_group=group, options=ParallelConfig(tp=2, sequence_parallel=sequence)))
    inside = []
    for trunk in (network.base, network.control):
        for block in trunk.blocks:
            block.self_attn.register_forward_pre_hook(lambda _, args: inside.append(args[0] is args[1]))
            block.cross_attn.register_forward_pre_hook(lambda _, args: inside.append(args[1].shape[0] == 5))
    torch.testing.assert_close(network(call).out, expected, rtol=0, atol=0)
    assert {asked for _, asked in log} == {group}
    into, out_of = ("gather", "scatter_sum") if sequence else ("enter", "leave")
    blocks = sum(BLOCKS.values())
    assert [name for name, _ in log if name in (into, out_of)] == [into, out_of] * 3 * blocks
    # Keys and values of self-attention come from the tokens that entered, those of cross-attention from the text as it is.
    assert len(inside) == 2 * blocks and all(inside)
    # Tokens and positions of both trunks and the control's tokens are split; the output alone is joined again.
    others = [name for name, _ in log if name not in (into, out_of)]
    assert sorted(others) == (["join"] + ["split"] * 5 if sequence else [])


def test_features_are_joined_too(monkeypatch, make_network, make_input, ranks):
    network, joined = make_network(), []
    options = ParallelConfig(tp=2, sequence_parallel=True)
    for name in ("gather", "scatter_sum", "split"):
        monkeypatch.setattr(module.collectives, name, lambda x, group: x)
    monkeypatch.setattr(module.collectives, "join", lambda x, group: joined.append(x.shape[0]) or x)
    tensor_parallel(network, replace(single_process(), tp_group=ranks(0, 2), options=options))
    network(make_input(), feature_blocks=(0, 2), tail="none")
    assert joined == [24, 24]


def test_a_control_map_is_split_like_the_tokens(monkeypatch, make_network, make_input, ranks):
    network, shapes = make_network(), []
    for name in ("gather", "scatter_sum", "join"):
        monkeypatch.setattr(module.collectives, name, lambda x, group: x)
    monkeypatch.setattr(module.collectives, "split", lambda x, group: shapes.append(tuple(x.shape)) or x)
    options = ParallelConfig(tp=2, sequence_parallel=True)
    tensor_parallel(network, replace(single_process(), tp_group=ranks(0, 2), options=options))
    network.control(make_input(), torch.rand(4, 2, 3, dtype=torch.float64))
    assert (24, 1, 1) in shapes[:3]


@pytest.mark.parametrize("sequence", [False, True])
def test_megatron_makes_no_reduction_of_its_own(make_network, ranks, sequence):
    # Its sums would come on top of those at the entries and exits.
    network = make_network()
    tensor_parallel(network, replace(single_process(), tp_group=ranks(0, 2), options=ParallelConfig(tp=2, sequence_parallel=sequence)))
    layers = dict(network.named_modules())
    for name, dim in SPLIT.items():
        layer = layers[name.removesuffix(".weight")]
        if dim == 0:
            assert layer.disable_grad_reduce and not layer.allreduce_dgrad
        else:
            assert layer.explicit_expert_comm
