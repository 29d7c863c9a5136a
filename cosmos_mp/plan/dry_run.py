"""`--dry-run`: the resolved configuration, parameters per role and shapes, with nothing allocated."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import DMD2Run, EncodeRun, EvaluateRun, KDRun, NetConfig, PairsRun, SampleRun, TeacherRun
from cosmos_mp.diffusion.samplers import guidance_words
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.embeddings import PATCH
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.options import to_dict
from cosmos_mp.parallel.topology import single_process


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def role_parameters(config: TeacherRun | PairsRun | KDRun | DMD2Run | EvaluateRun | SampleRun) -> dict[str, int]:
    """Number of parameters of each role of a stage."""
    transfer = parameters(transfer_on_meta(config.net))
    if isinstance(config, TeacherRun | PairsRun):
        return {"teacher": transfer}
    if isinstance(config, EvaluateRun):
        return {"teacher": transfer} | {entry.partition("=")[0]: transfer for entry in config.students}
    if isinstance(config, SampleRun):
        return {"student": transfer}
    if isinstance(config, KDRun):  # the frozen teacher is there for the pictures
        return {"student": transfer} | ({"teacher": transfer} if config.train.picture_every else {})
    roles = {"student": transfer, "teacher": transfer}
    if not config.dmd2.ladd:
        roles["fake_score"] = transfer
    if config.dmd2.gan_weight > 0:
        with torch.device("meta"):
            roles["discriminator"] = parameters(Discriminator(config.net.hidden, config.head))
    return roles


def transfer_on_meta(net: NetConfig) -> TransferNet:
    """Base and control branch without memory."""
    with torch.device("meta"):
        return TransferNet(net, LocalBackend(single_process().tp_group))


def dry_run(config: Any) -> None:
    """Print what the stage would run with."""
    print(json.dumps(to_dict(config), indent=1))
    if isinstance(config, EncodeRun):
        clip = config.clip
        span = (clip.frames - 1) * clip.stride + 1
        print(f"clip ({clip.frames}, {clip.height}, {clip.width}, 3) from {span} frames of a video, {clip.control} control")
        print(f"text ({config.text.tokens}, {config.text.dim})")
        return
    network = transfer_on_meta(config.net)
    base, control = parameters(network.base), parameters(network.control)
    print(f"base {base:,} + control {control:,} = {base + control:,} parameters")
    for role, count in role_parameters(config).items():
        print(f"{role}: {count:,} parameters")
    channels, frames, height, width = config.diffusion.latent_shape
    tokens = frames * (height // PATCH) * (width // PATCH)
    print(f"latent ({channels}, {frames}, {height}, {width}), {tokens:,} tokens of width {config.net.hidden}")
    train = getattr(config, "train", None)
    if train:
        print(f"batch {train.global_batch_size} = {train.accumulation} x {train.micro_batch_size}, {train.iterations:,} iterations")
    for name in ("sampler", "dmd2"):
        guidance = getattr(getattr(config, name, None), "guidance", None)
        if guidance is not None:
            print(guidance_words(guidance))
