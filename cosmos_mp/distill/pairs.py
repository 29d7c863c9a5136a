"""The teacher's answers to fixed noises, stored exactly as KD will read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cosmos_mp.config import PairsRun
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.shards import Field, Header, Sample, ShardWriter
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import sample_teacher
from cosmos_mp.distill.conditioning import condition_of_clips
from cosmos_mp.models.weights import fingerprint
from cosmos_mp.parallel import noise


def pair_noise(shape: tuple[int, ...], seed: int, pairs: list[int]) -> Tensor:
    """Unit noise of each pair, a function of (seed, number of the pair): no two pairs of a store share one."""
    return noise.normal(shape, seed, "pair_noise", 0, pairs)


def pairs_header(config: PairsRun, clips: LatentDataset, teacher_hash: str, unconditional_LD: Tensor) -> Header:
    """What the store will hold, and every setting that its contents depend on."""
    fields = {**clips.reader.header.fields, "noise": Field(tuple(config.diffusion.latent_shape), torch.float32)}
    fields["latent"] = Field(tuple(config.diffusion.latent_shape), torch.float32)
    meta = {
        "teacher": teacher_hash,
        "clips": clips.reader.sha256,
        "seed": config.seed,
        "sampler": dataclasses.asdict(config.sampler),
        "net": dataclasses.asdict(config.net),
        "fp8": config.backend.recipe_of("teacher"),
        "diffusion": dataclasses.asdict(config.diffusion),
        "unconditional": fingerprint({"text": unconditional_LD}),
    }
    return Header("pairs", config.count, config.shard_size, fields, meta)


def generate_pairs(
    config: PairsRun,
    teacher: Denoiser,
    clips: LatentDataset,
    unconditional_LD: Tensor,
    writer: ShardWriter,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make this rank's missing shards. Pair i answers clip i (counting round) from the noise of pair i.

    Args:
        progress: called with (pairs done, pairs to do) of this rank.
    """
    shards = writer.missing_shards(rank, world)
    total, done = sum(len(writer.header.samples(shard)) for shard in shards), 0
    for shard in shards:
        numbers, samples = list(writer.header.samples(shard)), []
        for start in range(0, len(numbers), config.batch_size):
            chunk = numbers[start : start + config.batch_size]
            samples += _answer(config, teacher, clips, unconditional_LD, chunk)
            done += len(chunk)
            progress(done, total)
        writer.write(shard, samples)


def _answer(config: PairsRun, teacher: Denoiser, clips: LatentDataset, unconditional_LD: Tensor, pairs: list[int]) -> list[Sample]:
    device = unconditional_LD.device
    sources = [pair % len(clips) for pair in pairs]
    batch = clips.fixed(sources).to(device)
    epsilon = pair_noise(tuple(config.diffusion.latent_shape), config.seed, pairs)
    condition = condition_of_clips(batch)
    unconditional = unconditional_LD.expand_as(batch.text_BLD)
    answers = sample_teacher(teacher, epsilon.to(device), condition, unconditional, config.sampler).float().cpu()
    samples = []
    for row, (pair, source) in enumerate(zip(pairs, sources, strict=True)):
        tensors = {**clips.reader.read(source), "noise": epsilon[row], "latent": answers[row]}
        samples.append(Sample(tensors, {**clips.info(source), "clip_sample": source, "noise_seed": [config.seed, pair]}))
    return samples
