"""AdamW of one role, its learning rate as a pure function of its own steps, and clipping by gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from cosmos_mp.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over all parameters, weight decay on all of them as the reference has it.

    The state is there at once, zero, so that a checkpoint has the same keys before and after the first step.

    Raises:
        ValueError: an option out of range; the message names it.
    """
    for name, fits, wanted in (
        ("lr", config.lr > 0, "above 0"),
        ("clip_norm", config.clip_norm >= 0, "0 (never clip) or above"),
        ("warmup", config.warmup >= 0, "0 or above"),
        ("decay_from", 0 <= config.decay_from <= 1, "in 0..1, a fraction of the role's steps"),
    ):
        if not fits:
            raise ValueError(f"optimizer option {name}={getattr(config, name)} must be {wanted}")
    optimizer = torch.optim.AdamW(
        list(parameters), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of a role's optimizer step `step` (0-based) of `total_steps`.

    Warm-up rises linearly, (step + 1) / warmup. The cosine falls from 1 at the fraction `decay_from` of the steps to 0 at their end.
    """
    factor = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    done = min(1.0, step / total_steps)
    if config.decay == "cosine" and done > config.decay_from:
        factor *= 0.5 * (1 + math.cos(math.pi * (done - config.decay_from) / (1 - config.decay_from)))
    return config.lr * factor


def clip(optimizer: torch.optim.Optimizer, norm: float, clip_norm: float) -> None:
    """Scale every gradient by clip_norm / (norm + 1e-6) where the norm over all of them, on all ranks, exceeds clip_norm > 0."""
    if clip_norm > 0 and norm > clip_norm:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))
