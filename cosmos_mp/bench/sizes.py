"""The networks and clips that are measured: the 7B's proportions at sizes that two cores carry."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cosmos_mp.config import DiffusionConfig, HeadConfig, NetConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.parallel import noise


@dataclass(frozen=True)
class Size:
    """Networks, clips and texts of one benchmark."""

    net: NetConfig
    diffusion: DiffusionConfig
    head: HeadConfig
    text_tokens: int


def _size(hidden: int, blocks: int, control_blocks: int, feature: int, latent: tuple[int, int, int]) -> Size:
    net = NetConfig(
        hidden=hidden,
        heads=4,
        blocks=blocks,
        control_blocks=control_blocks,
        mlp_hidden=4 * hidden,
        adaln_lora_dim=max(hidden // 16, 4),
        text_dim=hidden // 4,
        control_channels=16,
        control_mlp=(16, 16, 32),
        max_latent=latent,
    )
    return Size(net, DiffusionConfig(latent_shape=(16, *latent), condition_frames=0), HeadConfig("conv3d", 16, (feature,)), 16)


WHOLE = _size(128, 14, 2, 7, (8, 28, 32))
"""1,792 tokens of width 128: attention is two thirds of the work, as at the 7B's 56,320 of width 4096."""
SHORT = _size(48, 2, 1, 0, (8, 4, 4))
"""For a look that takes seconds."""
DEEP = _size(384, 40, 4, 20, (2, 4, 4))
"""Weights outweigh everything else."""
SIZES = {"whole": WHOLE, "short": SHORT, "deep": DEEP}


@dataclass(frozen=True)
class RandomClips:
    """Random samples of a size, each a function of its place in the order."""

    size: Size

    def batch(self, position: int, size: int) -> Batch:
        positions = list(range(position, position + size))
        shape = self.size.diffusion.latent_shape
        latent, control, eps = (noise.normal(shape, 0, f"bench/{name}", 0, positions) for name in ("latent", "control", "noise"))
        text = noise.normal((self.size.text_tokens, self.size.net.text_dim), 0, "bench/text", 0, positions)
        mask = torch.zeros(size, 8 * shape[2], 8 * shape[3])
        return Batch(torch.tensor(positions), 0.5 * latent, control, text, torch.full((size,), 24.0), mask, eps)
