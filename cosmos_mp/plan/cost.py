"""FLOPs of a training step from formulas: known before any run, and held against the FLOP counter by the benchmark.

Counted are the matrix products of the blocks and the head's convolution, two FLOPs per multiply-add; the rest of the 7B is below 1 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cosmos_mp.config import DMD2Run, HeadConfig, KDRun, NetConfig, TextConfig
from cosmos_mp.models.embeddings import PATCH


@dataclass(frozen=True)
class Flops:
    """Attention is kept apart, since its backward pass costs otherwise than that of linear layers."""

    linear: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.linear * factor, self.attention * factor)

    __rmul__ = __mul__


def block(net: NetConfig, tokens: int, text: int) -> Flops:
    """Forward pass of one block for one sample: projections and MLP, self- and cross-attention."""
    d = net.hidden
    per_token = 4 * d * d + 2 * d * d + 2 * d * net.mlp_hidden  # self: q, k, v, out; cross: q, out; MLP: up, down
    per_word = 2 * net.text_dim * d  # cross: k, v
    return Flops(2 * (tokens * per_token + text * per_word), 4 * tokens * (tokens + text) * d)


def network(net: NetConfig, tokens: int, text: int, blocks: int | None = None) -> Flops:
    """Forward pass of base and control branch for one sample; with `blocks`, no more than so many of the base's."""
    count = (net.blocks if blocks is None else blocks) + net.control_blocks
    return count * block(net, tokens, text) + Flops(linear=net.control_blocks * 2 * tokens * net.hidden**2)


def head(net: NetConfig, config: HeadConfig, frames: int, height: int, width: int) -> Flops:
    """Forward pass of the conv3d heads for one sample whose features are (frames, height, width)."""
    places = math.prod(size // 2 for size in (frames - config.first_frame, height, width))
    return Flops(linear=len(config.feature_blocks) * 2 * places * config.hidden * net.hidden * 2 * 4 * 4)


@dataclass(frozen=True)
class Step:
    """What one sample's step does, in forward passes.

    Attributes:
        without_graph, with_graph: forward passes by whether something is differentiated through them.
        input_gradients, weight_gradients: passes whose gradients with respect to inputs, or weights, are taken.
        heads: convolutions of the head, forward ones and gradients.
    """

    without_graph: Flops
    with_graph: Flops
    input_gradients: Flops
    weight_gradients: Flops
    heads: Flops = Flops()

    def flops(self, *, recompute: bool = False, attention_backward: float = 2.0, head_copies: int = 1) -> float:
        """The sum.

        Args:
            recompute: blocks with a graph run once more in the backward pass.
            attention_backward: its cost in forward passes: 2 by the mathematics, as the FLOP counter has it; 2.5 in fused kernels, which
                make the scores again.
            head_copies: ranks that run the head on the same features.
        """
        gradients = self.input_gradients.linear + self.weight_gradients.linear + attention_backward * self.input_gradients.attention
        forward = self.without_graph.total + (2 if recompute else 1) * self.with_graph.total
        return forward + gradients + head_copies * self.heads.total


def kd_step(config: KDRun, text: int = TextConfig.tokens) -> Step:
    """The student on a pair. How long its text is, the store of pairs knows."""
    whole = network(config.net, _tokens(config), text)
    return Step(Flops(), whole, whole, whole)


def student_step(config: DMD2Run) -> Step:
    """VSD and the GAN term on teacher features: the teacher is differentiated up to the last feature, by its inputs alone."""
    whole, early, judged = _dmd2(config)
    teacher_rest, guidance, fake_score = whole + (-1) * early, (whole if config.dmd2.guidance else Flops()), whole
    return Step(teacher_rest + guidance + fake_score, whole + early, whole + early, whole, 2 * judged)


def critic_step(config: DMD2Run) -> Step:
    """The fake score on the student's samples, and the head on features of fake and real latents."""
    whole, early, judged = _dmd2(config)
    return Step(whole + 2 * early, whole, whole, whole, 4 * judged)


def _tokens(config: KDRun | DMD2Run) -> int:
    _, frames, height, width = config.diffusion.latent_shape
    return frames * (height // PATCH) * (width // PATCH)


def _dmd2(config: DMD2Run) -> tuple[Flops, Flops, Flops]:
    """A pass through the whole network, one that ends at the last feature, and the head."""
    tokens, text = _tokens(config), config.text.tokens
    _, frames, height, width = config.diffusion.latent_shape
    early = network(config.net, tokens, text, blocks=config.head.feature_blocks[-1] + 1)
    return network(config.net, tokens, text), early, head(config.net, config.head, frames, height // PATCH, width // PATCH)
