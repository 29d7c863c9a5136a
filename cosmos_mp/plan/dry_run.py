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
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.options import to_dict
from cosmos_mp.parallel.topology import rank_and_world, single_process
from cosmos_mp.plan.cost import tokens_of
from cosmos_mp.plan.memory import role_memory
from cosmos_mp.training.loop import micro_batches
from cosmos_mp.training.stage import check_run


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def role_networks(config: TeacherRun | PairsRun | KDRun | DMD2Run | EvaluateRun | SampleRun) -> dict[str, nn.Module]:
    """Networks of a stage by role, without memory; roles of the same sizes share one."""
    transfer = transfer_on_meta(config.net)
    if isinstance(config, TeacherRun | PairsRun):
        return {"teacher": transfer}
    if isinstance(config, EvaluateRun):
        return {"teacher": transfer} | {entry.partition("=")[0]: transfer for entry in config.students}
    if isinstance(config, SampleRun):
        return {"student": transfer}
    if isinstance(config, KDRun):  # the frozen teacher is there for the pictures
        return {"student": transfer} | ({"teacher": transfer} if config.train.picture_every else {})
    roles: dict[str, nn.Module] = {"student": transfer, "teacher": transfer}
    if not config.dmd2.ladd:
        roles["fake_score"] = transfer
    if config.dmd2.gan_weight > 0:
        with torch.device("meta"):
            roles["discriminator"] = Discriminator(config.net.hidden, config.head)
    return roles


def transfer_on_meta(net: NetConfig) -> TransferNet:
    """Base and control branch without memory."""
    with torch.device("meta"):
        return TransferNet(net, LocalBackend(single_process().tp_group))


def _print_memory(config: TeacherRun | KDRun | DMD2Run, dp: int, again: int) -> None:
    """A line per role: what one rank will hold."""
    trained = {name.removeprefix("optim_") for name in vars(config) if name.startswith("optim_")}
    averaged = "teacher" if isinstance(config, TeacherRun) else "student"
    lasting, most = 0, 0
    print("per rank, predicted, in 1e9 bytes: masters, gradients, Adam, average | whole gradients while accumulating | gathered weights")
    for role, network in role_networks(config).items():
        share = role_memory(
            network,
            config.parallel,
            dp,
            trained=role in trained,
            averaged=config.ema.decay > 0 and role == averaged,
            micro_batches=again,
        )
        parts = (share.masters, share.gradients, share.adam, share.average)
        words = ", ".join(f"{value / 1e9:.3f}" for value in parts)
        print(f"{role}: {share.parameters:,} parameters: {words} | {share.accumulated / 1e9:.3f} | {share.gathered / 1e9:.3f}")
        lasting += share.lasting
        most = max(most, share.gradients + share.accumulated + share.gathered)
    print(f"all roles: {lasting / 1e9:.3f} GB stay; about {most / 1e9:.3f} GB more for a role at work; activations come on top")


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
    for role, network in role_networks(config).items():
        print(f"{role}: {parameters(network):,} parameters")
    channels, frames, height, width = config.diffusion.latent_shape
    print(f"latent ({channels}, {frames}, {height}, {width}), {tokens_of(config.diffusion):,} tokens of width {config.net.hidden}")
    train = getattr(config, "train", None)
    if train:
        parallel = config.parallel
        model = parallel.tp * parallel.cp
        started = rank_and_world()[1]  # by a launcher, whose number holds; else as many as the layout asks for
        world = started if started > 1 else model * max(parallel.dp, 1)
        dp = check_run(config, world)
        again = micro_batches(train, dp)
        shards = parallel.shard or world // parallel.tp
        print(f"layout: {world} processes = tp {parallel.tp} x cp {parallel.cp} x dp {dp}, shards over {shards}")
        print(f"batch {train.global_batch_size} = {again} x {train.micro_batch_size} x dp {dp}, {train.iterations:,} iterations")
        _print_memory(config, dp, again)
    for name in ("sampler", "dmd2"):
        guidance = getattr(getattr(config, name, None), "guidance", None)
        if guidance is not None:
            print(guidance_words(guidance))
