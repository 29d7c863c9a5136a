"""From a batch to what a denoiser is told, with the randomly given frames drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.edm import Condition, Given
from cosmos_mp.parallel import noise


def first_frames(count_B: Tensor, frames: int, part: int = 0) -> Tensor:
    """Mask (B, T): 1 on the first `count` latent frames of each sample; of the part of a cut clip, those that lie in it."""
    return (torch.arange(part * frames, (part + 1) * frames, device=count_B.device) < count_B[:, None]).float()


def unit_noise(batch: Batch, seed: int, purpose: str, iteration: int) -> Tensor:
    """Standard normal numbers for the batch's latents. A cut batch gets its part of what the whole clips would get."""
    latent, frames = batch.latent_BCTHW, batch.latent_BCTHW.shape[2]
    channels, _, *size = latent.shape[1:]
    whole = noise.normal((channels, frames * batch.parts, *size), seed, purpose, iteration, batch.position_B)
    return whole[:, :, batch.part * frames : (batch.part + 1) * frames].to(latent)


def condition_of_clips(batch: Batch, given: Given | None = None) -> Condition:
    """Text, control, rate and padding of a batch; no frame is given unless one is named."""
    return Condition(batch.text_BLD, batch.control_BCTHW, batch.fps_B, batch.padding_mask_BHW, given)


def condition_of(batch: Batch, config: DiffusionConfig, seed: int, iteration: int) -> Condition:
    """Text, control, rate and padding of a batch; each sample is given its first 0..condition_frames real latent frames."""
    given = None
    if config.condition_frames > 0:
        latent = batch.latent_BCTHW
        count = noise.integers(0, config.condition_frames, seed, "condition_frames", iteration, batch.position_B)
        drawn = unit_noise(batch, seed, "condition_noise", iteration)
        given = Given(latent, first_frames(count, latent.shape[2], batch.part).to(latent), drawn)
    return condition_of_clips(batch, given)
