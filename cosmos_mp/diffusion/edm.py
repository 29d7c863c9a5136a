"""EDM preconditioning (arXiv 2206.00364, table 1) around a network: noisy latent and sigma in, clean latent out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.models.dit import NetInput, Tail
from cosmos_mp.models.embeddings import at_least_fp32
from cosmos_mp.models.transfer import TransferNet


class Scalings(NamedTuple):
    """Per-sample factors (B,) of the preconditioning."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def scalings(sigma_B: Tensor, sigma_data: float) -> Scalings:
    """c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), c_in = 1 / sqrt(s^2 + d^2), c_noise = ln(s) / 4."""
    sigma = sigma_B.to(at_least_fp32(sigma_B))
    total = sigma**2 + sigma_data**2
    return Scalings(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4)


def bcast(values_B: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1, 1)."""
    return values_B[:, None, None, None, None]


@dataclass(frozen=True)
class Given:
    """Latent frames that the network is given instead of having to make them.

    Attributes:
        latent_BCTHW: the real latent.
        mask_BT: 1 on given frames.
        noise_BCTHW: unit noise, scaled by `condition_sigma` before it is added to the given frames.
    """

    latent_BCTHW: Tensor
    mask_BT: Tensor
    noise_BCTHW: Tensor


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told beside the noisy latent. Guidance changes the text alone."""

    text_BLD: Tensor
    control_BCTHW: Tensor | None
    fps_B: Tensor
    padding_mask_BHW: Tensor
    given: Given | None = None

    def with_text(self, text_BLD: Tensor) -> Condition:
        return replace(self, text_BLD=text_BLD)


@dataclass(frozen=True)
class Denoised:
    """A denoiser's answer at x_t; what is made of the network's raw output is made when it is asked for.

    Attributes:
        out: the raw output F, (B, C, T, H, W); None where only features were asked for, and then so are x0 and eps.
        features: of the blocks that were asked for.
        xt_BCTHW, sigma_B, factors, given: what the denoiser was asked, and its preconditioning.
    """

    out: Tensor | None
    features: tuple[Tensor, ...]
    xt_BCTHW: Tensor
    sigma_B: Tensor
    factors: Scalings
    given: Given | None

    @cached_property
    def x0(self) -> Tensor | None:
        """c_skip x_t + c_out F, and given frames as they were given."""
        if self.out is None:
            return None
        x0 = bcast(self.factors.c_skip) * self.xt_BCTHW + bcast(self.factors.c_out) * self.out.to(at_least_fp32(self.out))
        if self.given is None:
            return x0
        mask = self.given.mask_BT[:, None, :, None, None].to(self.xt_BCTHW.dtype)
        return mask * self.given.latent_BCTHW + (1 - mask) * x0

    @cached_property
    def eps(self) -> Tensor | None:
        """(x_t - x0) / sigma."""
        return None if self.out is None else (self.xt_BCTHW - self.x0) / bcast(self.sigma_B)


class Denoiser:
    """A network as a function (x_t, sigma, Condition) -> Denoised; the only way in which anything calls a network."""

    def __init__(self, network: TransferNet, config: DiffusionConfig, control_weight: float | Tensor = 1.0):
        self.network, self.config, self.control_weight = network, config, control_weight

    def __call__(
        self,
        xt_BCTHW: Tensor,
        sigma_B: Tensor,
        condition: Condition,
        *,
        feature_blocks: Sequence[int] = (),
        tail: Tail = "full",
    ) -> Denoised:
        """Denoise. Given frames enter with almost no noise, and leave as they were given."""
        factors = scalings(sigma_B, self.config.sigma_data)
        x, mask = xt_BCTHW, None
        given = condition.given
        if given is not None:
            mask = given.mask_BT[:, None, :, None, None].to(xt_BCTHW.dtype)
            level = torch.full_like(sigma_B, self.config.condition_sigma)
            # The given frames are scaled as at their own noise level, so that c_in(sigma) below brings them to unit size.
            rescale = scalings(level, self.config.sigma_data).c_in / factors.c_in
            noisy = given.latent_BCTHW + self.config.condition_sigma * given.noise_BCTHW
            x = mask * noisy * bcast(rescale).to(x.dtype) + (1 - mask) * x
        batch, _, frames, height, width = x.shape
        flags = x.new_zeros(batch, 1, frames, height, width) if mask is None else mask.expand(-1, -1, -1, height, width)
        call = NetInput(
            x_BCTHW=bcast(factors.c_in) * x,
            timestep_B=factors.c_noise,
            text_BLD=condition.text_BLD,
            control_BCTHW=condition.control_BCTHW,
            condition_mask_B1THW=flags,
            padding_mask_BHW=condition.padding_mask_BHW,
            fps_B=condition.fps_B,
        )
        output = self.network(call, control_weight=self.control_weight, feature_blocks=feature_blocks, tail=tail)
        return Denoised(output.out, output.features, xt_BCTHW, sigma_B, factors, given)
