"""Construction on the meta device, named weights, strict loading and first values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

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
    """Parameters and persistent buffers by name. Not `state_dict`: megatron's and Transformer Engine's layers add `_extra_state` to it."""
    state = network.state_dict().items()
    buffers = {name: value for name, value in state if isinstance(value, Tensor) and not name.endswith("_extra_state")}
    return {**buffers, **dict(network.named_parameters())}


class Part(Protocol):
    """What a rank holds of a weight of `shape`: `parameter`, which is that part `of` the whole."""

    shape: torch.Size
    parameter: Tensor

    def of(self, whole: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Whole:
    parameter: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def of(self, whole: Tensor) -> Tensor:
        return whole


def _own(network: nn.Module | Mapping[str, Part]) -> Mapping[str, Part]:
    return network if isinstance(network, Mapping) else {name: _Whole(value) for name, value in named_weights(network).items()}


@torch.no_grad()
def load_weights(network: nn.Module | Mapping[str, Part], weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network, or into what this rank holds of one: all of them and nothing else.

    Raises:
        WeightError: a tensor is missing, unexpected or of another shape; nothing has been copied then.
    """
    own = _own(network)
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
    for name, part in own.items():
        part.parameter.copy_(part.of(weights[name]))


@torch.no_grad()
def initialize(network: nn.Module | Mapping[str, Part], seed: int) -> None:
    """First values of a network, or of what this rank holds of one; the same for every layout.

    Xavier-uniform matrices, ones for norms. Zero, as in the reference, are biases, the up-projections of the modulations (so every block
    starts as the identity), the control branch's outgoing linears and the last layer of its control MLP. Every tensor draws from a
    generator keyed by its name.
    """
    own = _own(network)
    mlp = [name for name in own if "control_mlp." in name and name.endswith(".weight")]
    last_of_mlp = max(mlp, key=lambda name: int(name.split(".")[-2]), default=None)
    for name, part in own.items():
        draw, shape = generator(seed, "weights/" + name, 0, 0), part.shape
        zero = name.endswith(("bias", "_mod.up.weight", ".mod.up.weight", "time.linear_2.weight")) or ".zero." in name
        if zero or name == last_of_mlp:
            part.parameter.zero_()
        elif len(shape) == 1:
            part.parameter.fill_(1.0)
        elif name.split(".")[-2] == "position":
            part.parameter.copy_(part.of(torch.randn(shape, generator=draw)) * 0.02)
        else:
            fan_out, fan_in = shape[0], math.prod(shape[1:])
            bound = (6.0 / (fan_in + fan_out * math.prod(shape[2:]))) ** 0.5
            part.parameter.copy_((part.of(torch.rand(shape, generator=draw)) * 2 - 1) * bound)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values: tells whether two files hold the same network, in whatever type."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
