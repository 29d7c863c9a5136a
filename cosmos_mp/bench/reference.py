"""The DMD2 step as NVIDIA's Cosmos-Transfer1 runs it, with the networks and losses of this package, to be measured beside ours.

What differs: in the student's step the teacher's graph goes through all its blocks, though only features of one are differentiated;
features are gathered over the context-parallel ranks, and every one of them runs the head on all of them; each block is computed again in
the backward pass, and inside it norms, head norms with rotation, and GELU with the layer after it are once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import DiffusionConfig, DMD2Config, HeadConfig, NetConfig
from cosmos_mp.diffusion.edm import Condition, Denoised, Denoiser, bcast
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.distill import losses
from cosmos_mp.distill.dmd2 import DMD2, Draws, Logits
from cosmos_mp.distill.method import StepOutput, Term
from cosmos_mp.models.block import MLP, Attention, Block, modulate
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.embeddings import Rotation, rotate
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.parallel import collectives
from cosmos_mp.parallel.apply import parallelize
from cosmos_mp.parallel.topology import Topology

again = partial(checkpoint, use_reentrant=False)


class ReferenceDMD2(DMD2):
    """DMD2 step by step as published, on networks of `reference_net`; VSD is normalised over each rank's own frames.

    Args:
        head_copies: how often to run the head. A rank does it once; a process that stands for N ranks, to count their FLOPs, N times.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        diffusion: DiffusionConfig,
        config: DMD2Config,
        head: HeadConfig,
        unconditional_LD: Tensor,
        seed: int,
        topology: Topology,
        head_copies: int = 1,
    ):
        super().__init__(networks, diffusion, config, head, unconditional_LD, seed)
        judge = networks["discriminator"]
        for module in judge.modules():  # it sees all frames: nothing is to be summed over their holders
            if hasattr(module, "across"):
                module.across = None
        judge.part = 0
        self.discriminator = partial(_judge_gathered, judge, topology.cp_group, head_copies)

    def _score(self, network: Denoiser, yt: Tensor, sigma: Tensor, condition: Condition, with_features: bool) -> Denoised:
        if with_features:
            return network(yt, sigma, condition, feature_blocks=self.feature_blocks, tail="full")
        return super()._score(network, yt, sigma, condition, with_features)

    def critic_step(self, real: Tensor, draws: Draws, condition: Condition) -> tuple[StepOutput, Logits]:
        """As ours without R1, but the head is called once for fake and once for real features."""
        sigma = draws.sigma_B
        with torch.no_grad():
            y = one_step(self.student, draws.epsilon, condition).x0
            yt = y + bcast(sigma) * draws.eps
        x0 = self.fake_score(yt, sigma, condition).x0
        space, sigma_data = self.config.fake_score_space, self.diffusion.sigma_data
        terms = {"fake_score": Term(losses.fake_score_loss(y, x0, sigma, space=space, sigma_data=sigma_data))}
        with torch.no_grad():
            fake = self._features(yt, sigma, condition).features
            real = self._features(real + bcast(sigma) * draws.eps_real, sigma, condition).features
        logits = Logits(self.discriminator(fake), self.discriminator(real))
        terms["discriminator"] = Term(losses.discriminator_loss(*logits))
        return StepOutput(terms), logits


def _judge_gathered(judge: Discriminator, group: dist.ProcessGroup, copies: int, features: Sequence[Tensor]) -> Tensor:
    """Logits from the frames of all context-parallel ranks; of the features' gradient a rank keeps its own frames'."""
    whole = [collectives.join(feature.movedim(1, 0), group).movedim(0, 1) for feature in features]
    return sum(judge(whole) for _ in range(copies)) / copies


def reference_net(net: NetConfig, topology: Topology) -> TransferNet:
    """An unfilled network with the reference's recomputation, laid out like ours."""
    with torch.device("meta"):
        network = TransferNet(net, LocalBackend(topology.tp_group))
    nest(network)
    return parallelize(network, topology, recompute_mode="full")


def nest(network: nn.Module) -> None:
    """Checkpoints inside the blocks; those around them are `parallelize`'s."""
    for module in network.modules():
        for kind, forward in ((Block, _block), (Attention, _attention), (MLP, _mlp)):
            if isinstance(module, kind):
                module.forward = partial(forward, module)


def _block(self: Block, h: Tensor, position: Tensor, rotation: Rotation, text: Tensor, conditioning: Tensor, shared: Tensor) -> Tensor:
    h = h + position
    shift, scale, gate = self.self_mod(conditioning, shared)
    x = again(modulate, h, shift, scale)
    h = torch.addcmul(h, gate, self.self_attn(x, x, rotation))
    shift, scale, gate = self.cross_mod(conditioning, shared)
    h = torch.addcmul(h, gate, self.cross_attn(again(modulate, h, shift, scale), text))
    shift, scale, gate = self.mlp_mod(conditioning, shared)
    return torch.addcmul(h, gate, self.mlp(again(modulate, h, shift, scale)))


def _attention(self: Attention, x: Tensor, context: Tensor, rotation: Rotation | None = None) -> Tensor:
    query, key, value = (y.view(*y.shape[:2], -1, self.head_dim) for y in (self.q(x), self.k(context), self.v(context)))

    def norms(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.q_norm(query), self.k_norm(key)
        return (query, key) if rotation is None else (rotate(query, rotation), rotate(key, rotation))

    query, key = again(norms, query, key)
    return self.out(self.attend(query, key, value))


def _mlp(self: MLP, x: Tensor) -> Tensor:
    return again(lambda up: self.down(F.gelu(up)), self.up(x))
