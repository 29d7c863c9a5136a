"""The runs that are measured: a configuration, its networks over some ranks, drawn samples, and the training loop around them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from cosmos_mp.bench.reference import ReferenceDMD2, reference_net
from cosmos_mp.config import DiffusionConfig, DMD2Run, EMAConfig, HeadConfig, NetConfig, OptimConfig, TextConfig, TrainConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.models.weights import initialize
from cosmos_mp.parallel import noise
from cosmos_mp.parallel.context import frame_sums
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.roles import new_discriminator, transfer_net
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import fit

Procedure = Literal["reference", "full", "selective", "none"]
"""The reference's, or ours with this recomputation."""
OURS: tuple[Procedure, ...] = ("full", "selective", "none")
DENOISERS = ("student", "teacher", "fake_score")


def small_run(*, hidden: int, heads: int, blocks: int, control_blocks: int, latent: tuple[int, int, int]) -> DMD2Run:
    """The 7B recipe with narrower networks; their proportions are the 7B's.

    Args:
        latent: (T, H, W).
    """
    net = NetConfig(
        hidden=hidden,
        heads=heads,
        blocks=blocks,
        control_blocks=control_blocks,
        mlp_hidden=4 * hidden,
        adaln_lora_dim=hidden // 16,
        text_dim=hidden // 4,
        control_channels=16,
        control_mlp=(16, 16),
        max_latent=latent,
    )
    return DMD2Run(
        net=net,
        head=HeadConfig(hidden=max(8, hidden * 5 // 64 // 8 * 8), feature_blocks=(blocks // 2,)),
        diffusion=DiffusionConfig(latent_shape=(16, *latent)),
        text=TextConfig("tiny", "", tokens=8, dim=net.text_dim),
    )


def make_networks(run: DMD2Run, topology: Topology, procedure: Procedure) -> dict[str, nn.Module]:
    """All roles of DMD2, with first values where they have memory."""
    networks: dict[str, nn.Module] = {}
    for role in DENOISERS:
        reference = procedure == "reference"
        networks[role] = reference_net(run.net, topology) if reference else transfer_net(run.net, topology, procedure)
        if topology.device.type != "meta":
            initialize(Pieces(networks[role], topology), seed=0)
    networks["discriminator"] = new_discriminator(run.net, run.head, topology, seed=0)
    return networks


def make_method(run: DMD2Run, topology: Topology, procedure: Procedure, networks: dict[str, nn.Module], head_copies: int = 1) -> DMD2:
    """DMD2 on these networks.

    Args:
        head_copies: of the reference's head, see `ReferenceDMD2`.
    """
    text = torch.zeros(run.text.tokens, run.text.dim, device=topology.device)
    common = (networks, run.diffusion, run.dmd2, run.head, text, 0)
    if procedure == "reference":
        return ReferenceDMD2(*common, topology, head_copies)
    return DMD2(*common, frame_sums(topology))


class Clips:
    """Samples of normal numbers, of a run's shapes; `noise` is there for KD."""

    def __init__(self, run: DMD2Run):
        self.latent, self.text = run.diffusion.latent_shape, (run.text.tokens, run.text.dim)

    def batch(self, position: int, size: int) -> Batch:
        """Samples position .. position + size - 1."""
        samples = range(position, position + size)

        def draw(purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
            return noise.normal(shape, 0, f"bench/{purpose}", 0, samples)

        _, _, height, width = self.latent
        return Batch(
            position_B=torch.tensor(samples),
            latent_BCTHW=0.5 * draw("latent", self.latent),
            control_BCTHW=0.5 * draw("control", self.latent),
            text_BLD=draw("text", self.text),
            fps_B=torch.full((size,), 24.0),
            padding_mask_BHW=torch.zeros(size, 8 * height, 8 * width),
            noise_BCTHW=draw("noise", self.latent),
        )


class Enough(Exception):
    """A watcher has seen what it wanted: the run ends without a checkpoint."""


def watch(run: DMD2Run, topology: Topology, method: DMD2, watcher: Callback, batch: int = 1) -> None:
    """Train until the watcher raises `Enough`.

    Args:
        batch: samples of a micro-batch; an iteration has one on each data-parallel rank.
    """
    train = TrainConfig(global_batch_size=batch * topology.dp_group.size(), micro_batch_size=batch, picture_every=0)
    roles = [role for role in method.networks if role != "teacher"]
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(topology.on_first(lambda: folder))
        optim = dict.fromkeys(roles, OptimConfig())
        try:
            fit(method, Clips(run), train, optim, EMAConfig(), shared, [watcher], settings={}, topology=topology)
        except Enough:
            pass
