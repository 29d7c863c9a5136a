"""Fixtures of all tests: one thread, the golden set, and factories of tiny networks, inputs and batches filled with random values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import HeadConfig, NetConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.edm import Condition, Given
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.dit import NetInput
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import build
from cosmos_mp.parallel import noise
from cosmos_mp.parallel.topology import single_process

torch.set_num_threads(1)

# Sizes that differ from one another, so that no two axes can be confused.
TINY = NetConfig(
    hidden=24,
    heads=2,
    blocks=3,
    control_blocks=2,
    mlp_hidden=40,
    adaln_lora_dim=5,
    text_dim=7,
    latent_channels=3,
    control_channels=5,
    control_mlp=(6, 10),
    max_latent=(6, 8, 12),
)
LATENT = (3, 4, 4, 6)
"""(C, T, H, W) of the tiny latents."""
TOKENS = 5


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden cases."""
    return Path(__file__).parent / "data" / "golden"


@torch.no_grad()
def randomize(network: nn.Module, seed: int) -> None:
    """Normal values everywhere, also where training starts from zero, scaled so that the output stays near unit size."""
    for name, value in network.named_parameters():
        draw = torch.randn(value.shape, generator=noise.generator(seed, "test/" + name, 0, 0), dtype=torch.float64)
        if value.dim() > 1:
            value.copy_(draw if ".position." in name else draw / value[0].numel() ** 0.5)
        else:
            value.copy_(0.1 * draw + (0.0 if name.endswith("bias") else 1.0))


@pytest.fixture
def tiny_net() -> Callable[..., NetConfig]:
    """Sizes of the tiny network, with changes."""
    return lambda **changes: dataclasses.replace(TINY, **changes)


@pytest.fixture
def make_network() -> Callable[..., TransferNet]:
    """A tiny network with random values in every weight."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> TransferNet:
        net, backend = dataclasses.replace(TINY, **changes), LocalBackend(single_process().tp_group)
        network = build(lambda: TransferNet(net, backend), "cpu", dtype)
        randomize(network, seed)
        return network

    return make


@pytest.fixture
def make_discriminator() -> Callable[..., Discriminator]:
    """A discriminator with random values in every weight."""

    def make(head: HeadConfig, channels: int = TINY.hidden, seed: int = 0, dtype: torch.dtype = torch.float64) -> Discriminator:
        discriminator = build(lambda: Discriminator(channels, head), "cpu", dtype)
        randomize(discriminator, seed)
        return discriminator

    return make


def _normal(purpose: str, shape: tuple[int, ...], positions: range | list[int], dtype: torch.dtype) -> Tensor:
    return noise.normal(shape, 0, "test/" + purpose, 0, list(positions)).to(dtype)


def _padding(batch: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(batch, 8 * LATENT[2], 8 * LATENT[3], dtype=dtype)
    mask[:, -8:] = 1.0
    return mask


@pytest.fixture
def make_input() -> Callable[..., NetInput]:
    """A network call with random tensors; every sample is a function of its position."""

    def make(positions: range | list[int] = range(2), dtype: torch.dtype = torch.float64, **changes) -> NetInput:
        flags = torch.zeros(len(positions), 1, *LATENT[1:], dtype=dtype)
        flags[:, :, :1] = 1.0
        call = NetInput(
            x_BCTHW=_normal("x", LATENT, positions, dtype),
            timestep_B=0.5 * _normal("timestep", (), positions, dtype),
            text_BLD=_normal("text", (TOKENS, TINY.text_dim), positions, dtype),
            control_BCTHW=_normal("control", LATENT, positions, dtype),
            condition_mask_B1THW=flags,
            padding_mask_BHW=_padding(len(positions), dtype),
            fps_B=torch.full((len(positions),), 24.0, dtype=dtype),
        )
        return dataclasses.replace(call, **changes)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """A micro-batch with random tensors; every sample is a function of its position."""

    def make(positions: range | list[int] = range(2), dtype: torch.dtype = torch.float64, *, noise: bool = False) -> Batch:
        return Batch(
            position_B=torch.tensor(list(positions)),
            latent_BCTHW=0.5 * _normal("latent", LATENT, positions, dtype),
            control_BCTHW=_normal("control", LATENT, positions, dtype),
            text_BLD=_normal("text", (TOKENS, TINY.text_dim), positions, dtype),
            fps_B=torch.full((len(positions),), 24.0, dtype=dtype),
            padding_mask_BHW=_padding(len(positions), dtype),
            noise_BCTHW=_normal("noise", LATENT, positions, dtype) if noise else None,
        )

    return make


@pytest.fixture
def make_condition(make_batch) -> Callable[..., Condition]:
    """What a denoiser is told, with the first `given` latent frames given."""

    def make(positions: range | list[int] = range(2), dtype: torch.dtype = torch.float64, *, given: int = 0) -> Condition:
        batch, frames = make_batch(positions, dtype), None
        if given:
            mask = (torch.arange(LATENT[1]) < given).to(dtype).expand(len(positions), -1)
            frames = Given(batch.latent_BCTHW, mask, _normal("condition_noise", LATENT, positions, dtype))
        return Condition(batch.text_BLD, batch.control_BCTHW, batch.fps_B, batch.padding_mask_BHW, frames)

    return make


@pytest.fixture
def unconditional() -> Tensor:
    """Text embedding (L, D) of the unconditional branch."""
    return _normal("unconditional", (TOKENS, TINY.text_dim), [0], torch.float64)[0]
