"""Losses as pure functions of tensors. Latents are (B, C, T, H, W), sigma is (B,), every loss is a scalar.

They compute in at least float32 and never below their input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_mp.diffusion.edm import bcast, scalings
from cosmos_mp.kernels.gan_head import gan_loss


def kd_loss(x0: Tensor, target: Tensor) -> Tensor:
    """0.5 mean((x0 - target)^2)."""
    return 0.5 * (x0 - target.detach()).pow(2).mean()


def vsd_weight(sigma: Tensor, scale: Tensor) -> Tensor:
    """The reference's weight w = sigma / mean|eps - eps_T| = sigma^2 / mean|y - teacher_x0|, (B,); `scale` is the last mean."""
    return sigma**2 / scale


def fake_score_loss(y: Tensor, x0: Tensor, sigma: Tensor, *, space: str, sigma_data: float) -> Tensor:
    """Denoising error of the fake score on a generated latent y: mean over all elements of the error in one of two spaces.

    eps: (eps - eps_F)^2 = ((x0 - y) / sigma)^2, the recipe's. network: ((x0 - y) / c_out)^2, the network's own output, which neither
    vanishes at large sigma nor explodes at small.
    """
    unit = sigma if space == "eps" else scalings(sigma, sigma_data).c_out
    return ((x0 - y.detach()) / bcast(unit)).pow(2).mean()


def denoising_loss(x0: Tensor, latent: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """EDM training loss: mean of ((x0 - latent) / c_out)^2, the error at the network's output."""
    return ((x0 - latent) / bcast(scalings(sigma, sigma_data).c_out)).pow(2).mean()


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-D(fake)) over samples and heads."""
    return gan_loss(fake_logits, 0)


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """mean softplus(D(fake)) + mean softplus(-D(real))."""
    return gan_loss(torch.cat([fake_logits, real_logits]), len(fake_logits))


def r1_penalty(real_logits: Tensor, noised_real_logits: Tensor) -> Tensor:
    """Approximate R1 (arXiv 2501.08316): mean((D(real) - D(real + noise))^2); no second derivative is needed."""
    return (real_logits - noised_real_logits).pow(2).mean()


def discriminator_accuracy(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Share of logits on the right side of zero."""
    return 0.5 * ((fake_logits < 0).float().mean() + (real_logits > 0).float().mean())
