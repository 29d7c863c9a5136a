"""Construction on the meta device, named weights, strict loading and first values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from cosmos_mp.parallel.noise import generator

N = TypeVar("N", bound=nn.Module)


class WeightError(ValueError):
    """Weights that do not fit a network; the message names source and tensors."""


def build(make: Callable[[], N], device: torch.device | str, dtype: torch.dtype = torch.float32) -> N:
    """Make a network without filling it: on the meta device first, so that nothing is initialised twice."""
    with torch.device("meta"):
        network = make()
    return network.to(dtype).to_empty(device=device)


def named_weights(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name. Not `state_dict`: megatron's layers add `_extra_state` entries to it."""
    buffers = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    return {**buffers, **dict(network.named_parameters())}


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network, all of them and nothing else.

    Raises:
        WeightError: a tensor is missing, unexpected or of another shape; nothing has been copied then.
    """
    own = named_weights(network)
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    complaints = [
        f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", sorted(shapes)))
        if names
    ]
    if complaints:
        raise WeightError(f"{source} does not fit the network ({'; '.join(complaints)}); check the file and the net.* options")
    for name, value in own.items():
        value.copy_(weights[name])


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """First values: Xavier-uniform matrices, ones for norms, zeros where the reference starts from zero.

    Zero are biases, the up-projections of the modulations (so every block starts as the identity), the control branch's outgoing
    linears and the last layer of its control MLP. Every tensor draws from a generator keyed by its name.
    """
    last_of_mlp = {f"{name}.{len(m) - 1}.weight" for name, m in network.named_modules() if name.endswith("control_mlp")}
    for name, value in named_weights(network).items():
        draw = generator(seed, "weights/" + name, 0, 0)
        zero = name.endswith(("bias", "_mod.up.weight", ".mod.up.weight", "time.linear_2.weight")) or ".zero." in name
        if zero or name in last_of_mlp:
            value.zero_()
        elif value.dim() == 1:
            value.fill_(1.0)
        elif name.split(".")[-2] == "position":
            value.copy_(torch.randn(value.shape, generator=draw) * 0.02)
        else:
            fan_out, fan_in = value.shape[0], value[0].numel()
            bound = (6.0 / (fan_in + fan_out * value[0, 0].numel())) ** 0.5
            value.copy_((torch.rand(value.shape, generator=draw) * 2 - 1) * bound)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values: tells whether two files hold the same network."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
