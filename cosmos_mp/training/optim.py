"""AdamW of one role, its learning rate as a pure function of its own steps, and clipping by gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from cosmos_mp.config import OptimConfig


def apex_fused_adam() -> type[torch.optim.Optimizer] | None:
    """FusedAdam of NVIDIA's apex, None where it is not installed with its CUDA extensions. PyPI's `apex` is another project."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except (ImportError, OSError):
        return None
    return FusedAdam


def optimizer_words(device: torch.device) -> str:
    """Whose fused AdamW `build_optimizer` takes for parameters on a device."""
    return "apex FusedAdam" if device.type == "cuda" and apex_fused_adam() else "torch AdamW"


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over all parameters, weight decay on all of them as the reference has it: apex's fused one, for float32 on
    a GPU where it is installed, else torch's.

    The state is there at once, zero, so that a checkpoint has the same keys before and after the first step; both have the same.

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
    parameters = list(parameters)
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    # Of a role with fewer rows than ranks some hold nothing, and apex takes no empty list.
    some = [p for p in parameters if p.numel()]
    fused_adam = apex_fused_adam() if some and all(map(_apex_takes, parameters)) else None
    if fused_adam is None:
        optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    else:
        # Left to itself, apex never launches its last kernel where the last tensor is empty, as a rank's piece may be.
        optimizer = fused_adam(some, adam_w_mode=True, **options)
        optimizer.register_step_pre_hook(_tell_step)
        optimizer.register_step_post_hook(_count_step)
    for parameter in parameters:
        optimizer.state[parameter] = {
            # apex counts on the CPU, in the group; the count of the state is what checkpoints hold.
            "step": torch.zeros((), dtype=torch.float32, device="cpu" if fused_adam else parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def _apex_takes(parameter: nn.Parameter) -> bool:
    return parameter.is_cuda and parameter.dtype == torch.float32


def _tell_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Let apex count from where the state stands, which a checkpoint may have set."""
    steps = {int(state["step"]) for parameter, state in optimizer.state.items() if parameter.grad is not None}
    if len(steps) > 1:
        raise RuntimeError(f"apex's FusedAdam counts the steps of all parameters together, and these have taken {sorted(steps)}")
    optimizer.param_groups[0]["step"] = steps.pop() if steps else 0


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for parameter, state in optimizer.state.items():
        if parameter.grad is not None:
            state["step"] += 1


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
