"""Activation recomputation, applied from outside: non-reentrant, once per unit, never nested."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten, _collective = torch.ops.aten, torch.ops._c10d_functional
KEPT = {
    op.default
    for op in (
        _aten.mm,
        _aten.bmm,
        _aten.addmm,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
        _collective.all_reduce,
        _collective.all_gather_into_tensor,
        _collective.reduce_scatter_tensor,
        _collective.all_to_all_single,
        _collective.wait_tensor,
    )
}
"""What is dear: matrix products, attention and collectives. Norms, modulations and activations are cheap to run again.

A ring's sends are no results of operators and are made again."""


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(network: nn.Module, unit: type[nn.Module], mode: Literal["none", "selective", "full"]) -> None:
    """Run each `unit` of the network, a transformer block, again in the backward pass: all of it from its inputs, or with "selective"
    all but what is dear."""
    if mode == "none":
        return
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    for module in network.modules():
        if isinstance(module, unit):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, **options)
