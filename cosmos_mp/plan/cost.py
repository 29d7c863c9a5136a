"""Work and communication of a step, from sizes and layout alone: *predicted*, for what the benchmark counts.

Only matrix products, attention and convolutions count, two operations per multiply-add; attention is not causal and its backward is taken
at twice its forward. Everything that grows with neither tokens nor width squared (time embedding, modulations) is left out, under 1 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cosmos_mp.config import DiffusionConfig, DMD2Config, DMD2Run, HeadConfig, KDRun, NetConfig, ParallelConfig, TeacherRun
from cosmos_mp.models.embeddings import PATCH


@dataclass(frozen=True)
class Work:
    """FLOPs: of products with weights, and of products of two activations, which cost a frozen network's backward twice as much."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.linear + other.linear, self.attention + other.attention)

    def __rmul__(self, times: float) -> Work:
        return Work(times * self.linear, times * self.attention)

    @property
    def total(self) -> float:
        return self.linear + self.attention

    @property
    def through(self) -> float:
        """Backward to the input alone: one product per linear, two per product of activations."""
        return self.linear + 2 * self.attention


def tokens_of(diffusion: DiffusionConfig) -> int:
    _, frames, height, width = diffusion.latent_shape
    return frames * (height // PATCH) * (width // PATCH)


def block_work(net: NetConfig, tokens: int, text_tokens: int) -> Work:
    """Forward of one block for one sample: 28 N d^2 + 4 N^2 d where the MLP is 4 d wide, and the text's small part."""
    d = net.hidden
    linear = 2 * tokens * d * (4 * d + 2 * d + 2 * net.mlp_hidden) + 4 * text_tokens * net.text_dim * d
    return Work(linear, 4 * tokens * (tokens + text_tokens) * d)


def forward_work(net: NetConfig, tokens: int, text_tokens: int, base_blocks: int | None = None) -> Work:
    """Forward of base and control branch for one sample, the base up to `base_blocks`."""
    blocks = net.control_blocks + (net.blocks if base_blocks is None else base_blocks)
    return blocks * block_work(net, tokens, text_tokens) + Work(2 * tokens * net.hidden**2 * net.control_blocks)


def head_work(net: NetConfig, diffusion: DiffusionConfig, head: HeadConfig) -> Work:
    """Forward of all conv3d heads for one sample."""
    outputs = tokens_of(diffusion) // 8
    return len(head.feature_blocks) * Work(2 * outputs * head.hidden * (net.hidden * 2 * 4 * 4 + 1))


def dmd2_work(
    net: NetConfig, diffusion: DiffusionConfig, head: HeadConfig, dmd2: DMD2Config, text_tokens: int, judges: int = 1
) -> tuple[float, float]:
    """Model FLOPs per sample of a student iteration and of a critic iteration. Heads of every kind count as the default one.

    Args:
        judges: ranks that each run the heads on all frames.
    """
    tokens = tokens_of(diffusion)
    one = forward_work(net, tokens, text_tokens).total
    to_feature = forward_work(net, tokens, text_tokens, head.feature_blocks[-1] + 1)
    judge = judges * head_work(net, diffusion, head).total
    student, critic = 3 * one, one  # trained; run once
    if not dmd2.ladd:
        student += (3 if dmd2.guidance != 0 else 2) * one  # teacher with and without text, fake score
        critic += 3 * one
    if dmd2.gan_weight > 0:
        student += to_feature.through + 2 * judge  # back through head and teacher
        student += to_feature.total if dmd2.ladd else 0  # otherwise the score's own pass has the features
        latents = 3 if dmd2.r1_weight > 0 else 2  # fake, real, and real with noise
        critic += latents * (to_feature.total + 2 * judge)
    return student, critic


def model_work(config: TeacherRun | KDRun | DMD2Run, iteration: int, roles: Sequence[str], text_tokens: int) -> float:
    """Model FLOPs per sample of an iteration that trains these roles: what the mathematics asks for, nothing recomputed."""
    if not isinstance(config, DMD2Run) or iteration < config.dmd2.reconstruction_warmup:
        return 3 * forward_work(config.net, tokens_of(config.diffusion), text_tokens).total
    student, critic = dmd2_work(config.net, config.diffusion, config.head, config.dmd2, text_tokens)
    return student if "student" in roles else critic


def dmd2_cycle_work(
    net: NetConfig, diffusion: DiffusionConfig, head: HeadConfig, text_tokens: int, critics: int, recompute: str, judges: int = 1
) -> float:
    """FLOPs per sample of one student iteration and `critics` critic iterations, with guidance, and the GAN on the teacher's features.

    Args:
        judges: ranks that each run the heads on all frames.
        recompute: "full" runs the blocks of every pass that has a graph once more; "none" and "selective" repeat no product.
    """
    student, critic = dmd2_work(net, diffusion, head, DMD2Config(), text_tokens, judges)
    if recompute == "full":
        block = block_work(net, tokens_of(diffusion), text_tokens).total
        every, some = net.control_blocks + net.blocks, net.control_blocks + head.feature_blocks[-1] + 1
        student += (every + some) * block
        critic += every * block
    return student + critics * critic


def kd_traffic(
    net: NetConfig,
    diffusion: DiffusionConfig,
    parallel: ParallelConfig,
    dp: int,
    parameters: int,
    *,
    summed: int = 0,
    size: int = 4,
) -> Counter[str]:
    """Bytes that one rank sends in a KD iteration of one sample without recomputation, by collective, as rings of ranks send them.

    Scalars are left out.

    Args:
        parameters: numbers that a rank of tp holds before they are sharded.
        summed: numbers whose gradients a rank, after sharding, sums over tp.
        size: bytes of an activation and of a gathered weight.
    """
    tp, cp = parallel.tp, parallel.cp
    blocks = net.blocks + net.control_blocks
    unit = tokens_of(diffusion) // cp * net.hidden * size  # the tokens of a rank of cp, once
    bytes_sent: Counter[str] = Counter()
    if cp > 1 and parallel.cp_attention == "ulysses":  # q, k, v and the result change hands, and their gradients
        bytes_sent["all_to_all"] += 2 * blocks * 4 * (unit // tp) * (cp - 1) // cp
    elif cp > 1:  # keys and values pass cp - 1 ranks forward and again backward; their gradients all, to come home, at least in float32
        bytes_sent["send"] += blocks * 2 * (unit // tp) * (2 * (cp - 1) + cp * max(size, 4) // size)
    if tp > 1:  # at the exits of attentions and MLP forward, at their entries backward
        sums = 2 * blocks * 3 * unit * (tp - 1) // tp
        if parallel.sequence_parallel:  # each sum in two halves: scatter, and gather where the next one begins
            bytes_sent["reduce_scatter"] += sums
            bytes_sent["all_gather"] += sums
            # At the region's edges: gradients of tokens (three times) and of positions (once per trunk), and the network's output.
            output = tokens_of(diffusion) // cp * PATCH**2 * net.latent_channels * size
            bytes_sent["all_gather"] += (5 * unit + output) * (tp - 1) // tp
        else:
            bytes_sent["all_reduce"] += 2 * sums
    if summed:
        bytes_sent["all_reduce"] += 2 * summed * size * (tp - 1) // tp
    ranks = cp * dp
    shards = parallel.shard or ranks
    if shards > 1:  # weights forward and again backward, gradients once
        share = parameters * size * (shards - 1) // shards
        bytes_sent["all_gather"] += 2 * share
        bytes_sent["reduce_scatter"] += share
    if ranks > shards:  # HSDP: sharded gradients are summed over the replicas
        replicas = ranks // shards
        bytes_sent["all_reduce"] += 2 * parameters * size // shards * (replicas - 1) // replicas
    return bytes_sent
