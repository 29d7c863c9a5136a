"""From a batch to what a denoiser is told, with the randomly given frames drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.edm import Condition, Given
from cosmos_mp.parallel import noise


def first_frames(count_B: Tensor, frames: int) -> Tensor:
    """Mask (B, T): 1 on the first `count` latent frames of each sample."""
    return (torch.arange(frames, device=count_B.device) < count_B[:, None]).float()


def condition_of_clips(batch: Batch, given: Given | None = None) -> Condition:
    """Text, control, rate and padding of a batch; no frame is given unless one is named."""
    return Condition(batch.text_BLD, batch.control_BCTHW, batch.fps_B, batch.padding_mask_BHW, given)


def condition_of(batch: Batch, config: DiffusionConfig, seed: int, iteration: int) -> Condition:
    """Text, control, rate and padding of a batch; each sample is given its first 0..condition_frames real latent frames."""
    given = None
    if config.condition_frames > 0:
        latent = batch.latent_BCTHW
        count = noise.integers(0, config.condition_frames, seed, "condition_frames", iteration, batch.position_B)
        drawn = noise.normal(latent.shape[1:], seed, "condition_noise", iteration, batch.position_B, like=latent)
        given = Given(latent, first_frames(count, latent.shape[2]).to(latent), drawn)
    return condition_of_clips(batch, given)
