"""Tensor parallelism over megatron-core's column and row linears, and sequence parallelism around them.

The layers themselves are built on the tensor-parallel group by the backend. Here their inputs and outputs are joined up, where they do not
communicate themselves: one collective at the entry of every attention and MLP and one at its exit, in each direction.

    tensor parallel    entry: same tokens everywhere, gradients summed      exit: outputs summed
    with sequence      entry: tokens gathered, gradients summed + scattered exit: outputs summed + scattered
"""

from __future__ import annotations

from functools import partial

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from cosmos_mp.models.block import MLP, Attention, Block
from cosmos_mp.models.dit import Trunk
from cosmos_mp.parallel import collectives
from cosmos_mp.parallel.topology import Topology

HEAD_NORMS = (".q_norm.weight", ".k_norm.weight")


def tensor_parallel(network: nn.Module, topology: Topology) -> None:
    """Join up the split layers of a network, in place; with `sequence_parallel`, what lies between them is split along the tokens."""
    group, sequence = topology.tp_group, topology.options.sequence_parallel
    if group.size() == 1:
        return
    enter = collectives.gather if sequence else collectives.enter
    for module in network.modules():
        if isinstance(module, Trunk) and sequence:
            module.spread, module.collect = partial(collectives.split, group=group), partial(collectives.join, group=group)
        elif isinstance(module, Block) and module.mlp.up.communicates and sequence:
            # Text is whole on every rank: there is nothing to gather.
            module.cross_attn.k.sequence_parallel = module.cross_attn.v.sequence_parallel = False
        elif isinstance(module, Attention) and not module.q.communicates:
            module.register_forward_pre_hook(partial(_enter_attention, partial(enter, group=group)))
        elif isinstance(module, MLP) and not module.up.communicates:
            module.register_forward_pre_hook(lambda _, args: (enter(args[0], group),))
        elif isinstance(module, ColumnParallelLinear):
            # q, k and v share one input: its gradient is summed once, at the entry, instead of in each of them.
            module.disable_grad_reduce, module.allreduce_dgrad = True, False
        elif isinstance(module, RowParallelLinear):
            # Stay clear of megatron's own reduction: its sequence-parallel one needs CUDA, and a mapping must see contiguous tensors.
            module.explicit_expert_comm = True
            leave = collectives.scatter_sum if sequence else collectives.leave
            module.register_forward_hook(lambda _, args, output, leave=leave: leave(output, group))


def _enter_attention(enter: partial[Tensor], module: nn.Module, args: tuple) -> tuple:
    x, context, *rest = args
    entered = enter(x)
    return entered, entered if context is x else context, *rest  # text is whole on every rank and takes no gradient


def split_dims(network: nn.Module) -> dict[str, int]:
    """The dimension along which each split parameter is divided over tp; read from the layers, since `to_empty` drops megatron's marks."""
    return {f"{name}.weight": module.split_dim for name, module in network.named_modules() if hasattr(module, "split_dim")}


def partial_gradients(network: nn.Module, sequence: bool) -> set[str]:
    """Whole parameters whose gradient on one rank of tp is a part of the sum: head norms see this rank's heads alone, and between
    sequence-parallel layers everything sees this rank's tokens alone."""
    whole = {name for name, _ in network.named_parameters()} - split_dims(network).keys()
    partial_names = {name for name in whole if name.endswith(HEAD_NORMS)}
    if sequence:
        for trunk_name, trunk in network.named_modules():
            if isinstance(trunk, Trunk):
                inside = tuple(f"{trunk_name}.{part}." if trunk_name else f"{part}." for part in ("blocks", "time", "final", "zero"))
                partial_names |= {name for name in whole if name.startswith(inside)}
    return partial_names
