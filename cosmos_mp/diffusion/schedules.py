"""Noise levels: the ramps that DMD2 and the sampler walk on, and the draw of a training level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosmos_mp.config import DiffusionConfig, TeacherLossConfig
from cosmos_mp.parallel import noise

RHO = 7.0
ENTRIES = 1000
FIRST, LAST = 20, 980
"""DMD2 draws entries 2 % to 98 % into the ramp, both ends included."""
INFERENCE_SIGMA_MIN = 2e-4


def edm_ramp(sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """sigma_i = (max^(1/7) + i/N (min^(1/7) - max^(1/7)))^7 for i = 0..N, float64 (N + 1,)."""
    fraction = torch.arange(steps + 1, dtype=torch.float64) / steps
    return (sigma_max ** (1 / RHO) + fraction * (sigma_min ** (1 / RHO) - sigma_max ** (1 / RHO))) ** RHO


def log_ramp(sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """Log-spaced levels from max to min, float64 (N + 1,)."""
    fraction = torch.arange(steps + 1, dtype=torch.float64) / steps
    return torch.exp(math.log(sigma_max) * (1 - fraction) + math.log(sigma_min) * fraction)


def training_ramp(config: DiffusionConfig) -> Tensor:
    """The 1000 levels of DMD2, video factor included, float64."""
    if config.noise_schedule == "edm_sampling":
        ramp = edm_ramp(config.sigma_max, config.sigma_min, ENTRIES - 1)
    else:
        ramp = log_ramp(config.sigma_max, INFERENCE_SIGMA_MIN, ENTRIES - 1)
    return ramp * config.video_noise_multiplier


def draw_dmd2_sigma(config: DiffusionConfig, seed: int, iteration: int, samples: Tensor) -> Tensor:
    """One level per sample, uniform over the ramp's entries 20..980; float64 (B,)."""
    return training_ramp(config)[noise.integers(FIRST, LAST, seed, "sigma", iteration, samples)]


def draw_teacher_sigma(config: TeacherLossConfig, seed: int, iteration: int, samples: Tensor) -> Tensor:
    """One level per sample: ln sigma normal, or for a share of the samples log-uniform; float64 (B,)."""
    gaussian = noise.normal((), seed, "sigma", iteration, samples).double()
    sigma = torch.exp(config.log_sigma_mean + config.log_sigma_std * gaussian)
    low, high = (torch.tensor(x, dtype=torch.float64).log() for x in config.uniform_range)
    wide = torch.exp(low + (high - low) * noise.uniform(seed, "sigma_uniform", iteration, samples))
    return torch.where(noise.uniform(seed, "sigma_kind", iteration, samples) < config.uniform_fraction, wide, sigma)
