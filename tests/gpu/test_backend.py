"""Transformer Engine against the local backend on a GPU: output and every gradient, with the same weights. Not run on a GPU yet.

How far bfloat16 itself is from float32 is the yardstick of both.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cosmos_mp.backends import choice
from cosmos_mp.bench.fp8 import GATE
from cosmos_mp.config import BackendConfig, NetConfig
from cosmos_mp.kernels import using
from cosmos_mp.models.dit import NetInput
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import load_weights, named_weights
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.roles import transfer_net

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NET = NetConfig(hidden=512, heads=4, blocks=2, control_blocks=1, mlp_hidden=2048, adaln_lora_dim=64, text_dim=128, max_latent=(4, 16, 32))
LATENT = (2, 16, 2, 16, 32)
"""512 tokens of two samples: both sides of every product are multiples of 128."""


def call(device: torch.device) -> NetInput:
    draw = torch.Generator().manual_seed(0)
    x, control = (torch.randn(LATENT, generator=draw).to(device) for _ in range(2))
    text = torch.randn(2, 128, NET.text_dim, generator=draw).to(device)
    flags, padding = torch.zeros(2, 1, *LATENT[2:], device=device), torch.zeros(2, 8 * LATENT[3], 8 * LATENT[4], device=device)
    return NetInput(x, torch.tensor([0.3, -0.4], device=device), text, control, flags, padding, torch.full((2,), 24.0, device=device))


def weights() -> dict[str, Tensor]:
    """Of the network by name, none of them zero; representable in bfloat16."""
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in named_weights(TransferNet(NET, choice.LocalBackend(single_process().tp_group))).items()
        }
    draw = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=draw)
        scaled = value if ".position." in name else value / shape[1:].numel() ** 0.5
        found[name] = (scaled if len(shape) > 1 else 0.1 * value + (not name.endswith("bias"))).bfloat16().float()
    return found


def results(network: TransferNet, given: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    load_weights(network, given, "the test")
    with torch.no_grad():  # what Transformer Engine keeps of one forward must not change the next
        network(call(device))
    out = network(call(device)).out
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, parameters, gradient, allow_unused=True)
    found = {name: value.float() for name, value in zip(names, gradients, strict=True) if value is not None}
    return found | {"the output": out.detach().float()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys()
    return {name: ((found[name] - value).norm() / value.norm()).item() for name, value in exact.items()}


@pytest.mark.parametrize(("recipe", "factor"), [(None, 3), ("current", GATE)])
def test_transformer_engine_computes_what_the_local_backend_computes(recipe, factor):
    version, missing = choice.found()
    if version is None:
        pytest.skip(missing)
    topology, given = single_process(), weights()
    local, te = (replace(topology, backend=BackendConfig(kind=kind)) for kind in ("local", "transformer_engine"))
    with using("torch"):
        exact = results(transfer_net(NET, local), given, topology.device)
    bf16 = errors(results(transfer_net(NET, local, dtype=torch.bfloat16), given, topology.device), exact)
    found = errors(results(transfer_net(NET, te, fp8=recipe), given, topology.device), exact)
    worse = {name: (value, bf16[name]) for name, value in found.items() if not value <= factor * max(bf16[name], 5e-3)}
    assert not worse, worse
