"""The reference's procedure, built from our networks, as the baseline of what ours costs.

It differs from ours where the published code does: the teacher's graph goes through every block although the GAN term needs it to the last
feature alone, features are gathered over the context-parallel ranks and each of these runs the whole head, and inside a recomputed block
its norms, rotations and activations are recomputed once more.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cosmos_mp.diffusion.edm import Condition, Denoised, Denoiser
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.kernels.adaln import modulate
from cosmos_mp.kernels.qk_norm_rope import rotate
from cosmos_mp.models.block import Attention, Block, Modulation
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.embeddings import Rotation
from cosmos_mp.parallel.collectives import join
from cosmos_mp.parallel.topology import Topology

again = partial(checkpoint, use_reentrant=False)


class ReferenceDMD2(DMD2):
    """DMD2 whose teacher keeps a graph through all of its blocks."""

    def _score(self, network: Denoiser, yt: Tensor, sigma: Tensor, condition: Condition, with_features: bool) -> Denoised:
        if with_features:
            return network(yt, sigma, condition, feature_blocks=self.feature_blocks)
        return super()._score(network, yt, sigma, condition, with_features)


def gather_features(discriminator: Discriminator, topology: Topology) -> None:
    """Let every rank of cp judge all frames; only the gradient of its own goes back."""

    def gathered(_: Discriminator, args: tuple) -> tuple:
        return ([join(feature.movedim(1, 0), topology.cp_group).movedim(0, 1) for feature in args[0]],)

    discriminator.part = 0
    for module in discriminator.modules():
        if hasattr(module, "across"):
            module.across = None
    discriminator.register_forward_pre_hook(gathered)


def nest_recompute(block: Block) -> None:
    """Recompute parts of the block inside a recomputation of the whole. Wrap the block itself afterwards."""
    block.forward = partial(_forward, block)


def _forward(block: Block, h: Tensor, position: Tensor, rotation: Rotation, text: Tensor, conditioning: Tensor, shared: Tensor) -> Tensor:
    h = h + position
    x, gate = _modulated(block.self_mod, h, conditioning, shared)
    h = h + gate * _attend(block.self_attn, x, x, rotation)
    x, gate = _modulated(block.cross_mod, h, conditioning, shared)
    h = h + gate * _attend(block.cross_attn, x, text, None)
    x, gate = _modulated(block.mlp_mod, h, conditioning, shared)
    # Through megatron's layer the second product would run a third time, which it does not in the reference.
    return h + gate * again(lambda up: F.linear(F.gelu(up), block.mlp.down.weight), block.mlp.up(x))


def _modulated(modulation: Modulation, h: Tensor, conditioning: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    shift, scale, gate = modulation(conditioning, shared)
    return again(modulate, h, shift, scale), gate


def _attend(attention: Attention, x: Tensor, context: Tensor, rotation: Rotation | None) -> Tensor:
    def normed(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = attention.q_norm(query), attention.k_norm(key)
        return (query, key) if rotation is None else (rotate(query, *rotation), rotate(key, *rotation))

    heads = (-1, attention.head_dim)
    query, key, value = (y.unflatten(-1, heads) for y in (attention.q(x), attention.k(context), attention.v(context)))
    query, key = again(normed, query, key)
    return attention.out(attention.attend(query, key, value))
