"""From noise to a clean latent: the teacher's guided second-order sampler, and the student's single call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cosmos_mp.config import SamplerConfig
from cosmos_mp.diffusion.edm import Condition, Denoised, Denoiser
from cosmos_mp.diffusion.schedules import edm_ramp

Answer = Callable[[Tensor, Condition], Tensor]
"""A way to generate: (unit noise, condition) -> clean latent."""


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """cond + g (cond - uncond); g is one less than in the Ho-Salimans form."""
    return conditional + guidance * (conditional - unconditional)


def guidance_words(guidance: float) -> str:
    """The guidance in both forms in use, for logs."""
    return f"guidance: cond + {guidance:g} (cond - uncond), which is {guidance + 1:g} in the Ho-Salimans form"


def first_step(x: Tensor, x0: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    """Euler step from sigma to target: t/s x + (s - t)/s x0."""
    return target / sigma * x + (sigma - target) / sigma * x0


def second_order_step(x: Tensor, x0: Tensor, x0_previous: Tensor, sigma: Tensor, target: Tensor, previous: Tensor) -> Tensor:
    """RES 2ab: exponential Adams-Bashforth step in -ln sigma, with the clean estimate at the previous level (arXiv 2308.02157).

    With h = ln(s/t), c = ln(s/s1)/h < 0, phi1 = (e^-h - 1)/-h and phi2 = (phi1 - 1)/-h:
    x <- e^-h x + h ((phi1 - phi2/c) x0 + phi2/c x0').
    """
    h = (sigma / target).log()
    c = (sigma / previous).log() / h
    phi1 = torch.expm1(-h) / -h
    phi2 = (phi1 - 1) / -h
    return torch.exp(-h) * x + h * ((phi1 - phi2 / c) * x0 + phi2 / c * x0_previous)


def second_order_sample(denoise: Callable[[Tensor, Tensor], Tensor], xT: Tensor, sigmas: Tensor) -> Tensor:
    """Walk `sigmas` (N + 1,) from xT with float64 state, then once more denoise at the last level: N + 1 evaluations."""
    x, previous = xT.double(), None
    for index in range(len(sigmas) - 1):
        x0 = denoise(x, sigmas[index]).double()
        if previous is None:
            x = first_step(x, x0, sigmas[index], sigmas[index + 1])
        else:
            x = second_order_step(x, x0, previous, sigmas[index], sigmas[index + 1], sigmas[index - 1])
        previous = x0
    return denoise(x, sigmas[-1])


@torch.no_grad()
def sample_teacher(
    teacher: Denoiser, noise_BCTHW: Tensor, condition: Condition, unconditional_BLD: Tensor, sampler: SamplerConfig
) -> Tensor:
    """The teacher's answer to unit noise: `steps` + 1 guided evaluations of two calls each. Returns x0 in the noise's dtype.

    Args:
        unconditional_BLD: text of the unconditional branch: the negative prompt or zeros.
    """
    diffusion = teacher.config
    sigmas = edm_ramp(diffusion.sigma_max, diffusion.sigma_min, sampler.steps).to(noise_BCTHW.device)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        xt, level = x.to(noise_BCTHW.dtype), sigma.to(noise_BCTHW.dtype).expand(len(noise_BCTHW))
        conditional = teacher(xt, level, condition).x0
        if sampler.guidance == 0:
            return conditional
        return guide(conditional, teacher(xt, level, condition.with_text(unconditional_BLD)).x0, sampler.guidance)

    return second_order_sample(guided, sigmas[0] * noise_BCTHW.double(), sigmas).to(noise_BCTHW.dtype)


def one_step(network: Denoiser, noise_BCTHW: Tensor, condition: Condition) -> Denoised:
    """The student's single call: pure noise at sigma_max, clean latent out. Differentiable."""
    sigma_max = network.config.sigma_max
    return network(sigma_max * noise_BCTHW, noise_BCTHW.new_full((len(noise_BCTHW),), sigma_max), condition)


def answer_in_one_step(network: Denoiser) -> Answer:
    """`one_step` as a way to generate."""
    return lambda noise_BCTHW, condition: one_step(network, noise_BCTHW, condition).x0
