"""Fully sharded data parallelism (torch FSDP2) around the blocks of a network, over dp x cp or, as HSDP, inside groups of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree

from cosmos_mp.models.block import Block
from cosmos_mp.models.dit import NetInput, NetOutput
from cosmos_mp.parallel.topology import Topology

# FSDP looks for tensors in what goes into a module and comes out of it; in a dataclass it finds them only once that is registered.
for _kind in (NetInput, NetOutput):
    _pytree.register_dataclass(_kind)


def shard(network: nn.Module, topology: Topology) -> None:
    """Shard a network's parameters, block by block and then the rest, in place; also over one rank, for the precision policy."""
    options = topology.options
    bf16 = options.compute == "bfloat16" or (options.compute == "auto" and topology.device.type == "cuda")
    # Whatever the network's own type, gradients are reduced in it: float32 masters, or float64 in tests.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
    for module in network.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=topology.fsdp_mesh, mp_policy=policy)
    # By default the outermost unit stays gathered after a forward without a backward, as frozen roles have: it would enter the next
    # iteration with old values, and without gradients for its first micro-batch.
    fully_shard(network, mesh=topology.fsdp_mesh, mp_policy=policy, reshard_after_forward=True)


def settle(network: nn.Module) -> None:
    """Fix what FSDP fixes at a network's first forward, while every parameter is trainable.

    It takes a group's types for reduction from the parameters that require gradients at that moment. A role that is first run frozen, as
    the fake score is, would later fail in its backward pass, or reduce in the wrong type without a word.
    """
    if isinstance(network, FSDPModule):
        if not all(p.requires_grad for p in network.parameters()):
            raise RuntimeError("a network must be settled before any of its parameters is frozen")
        network._get_fsdp_state()._lazy_init()


def synchronise(network: nn.Module, last: bool, topology: Topology) -> None:
    """Say before a micro-batch whether its gradients are reduced: after the last of a step, or always with reduce=micro_batch.

    Under HSDP they are always reduced and kept sharded inside a group; only the sum across groups waits.
    """
    if not isinstance(network, FSDPModule) or topology.options.reduce == "micro_batch":
        return
    if topology.mesh.shape[0] > 1:
        network.set_requires_all_reduce(last)
    else:
        network.set_requires_gradient_sync(last)
