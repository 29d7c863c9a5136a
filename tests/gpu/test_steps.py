"""Iterations of KD and DMD2 at the 7B's width, with two blocks and one control block, on a small latent. Not run on a GPU yet.

In bfloat16 with float32 masters, as a run on a GPU computes by default. DMD2 holds about 40 GB.

With COSMOS_MP_REHEARSE=1 they run on a CPU, with tiny networks, gloo and interpreted kernels.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_mp.bench.sizes import RandomClips, Size
from cosmos_mp.config import BackendConfig, DiffusionConfig, DMD2Config, EMAConfig, HeadConfig, NetConfig, OptimConfig, TrainConfig
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.distill.kd import KD
from cosmos_mp.distill.method import Method
from cosmos_mp.kernels import using
from cosmos_mp.kernels.language import triton
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.parallel.apply import parallelize
from cosmos_mp.parallel.context import frame_sums
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.roles import transfer_net
from cosmos_mp.training.loop import Saver, fit

REHEARSED = os.environ.get("COSMOS_MP_REHEARSE") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="needs a CUDA device"),
    pytest.mark.skipif(
        triton is None or triton.knobs.runtime.interpret != REHEARSED,
        reason=f"kernels are {'compiled' if REHEARSED else 'interpreted'}: set TRITON_INTERPRET={int(REHEARSED)}",
    ),
]

TINY = dict(hidden=96, heads=4, mlp_hidden=128, adaln_lora_dim=8, text_dim=16, control_mlp=(16, 32), max_latent=(4, 4, 8))
NET = NetConfig(blocks=2, control_blocks=1, **(TINY if REHEARSED else {}))
LATENT, HEAD, TEXT = ((16, 4, 4, 8), 16, 5) if REHEARSED else ((16, 4, 16, 16), HeadConfig().hidden, 64)
SIZE = Size(NET, DiffusionConfig(latent_shape=LATENT, condition_frames=1), HeadConfig(hidden=HEAD, feature_blocks=(0,)), TEXT)
ITERATIONS = 4
"""Of DMD2, where two in three are the critics': the student's, two of theirs, and the student's again."""


@torch.no_grad()
def fill(network: torch.nn.Module, topology: Topology, seed: int) -> torch.nn.Module:
    """Random values everywhere, drawn on the device."""
    draw = torch.Generator(topology.device).manual_seed(seed)
    for name, piece in Pieces(network, topology).items():
        value = piece.parameter
        if value.dim() > 1:
            value.normal_(0, 1 if ".position." in name else piece.shape[1:].numel() ** -0.5, generator=draw)
        else:
            value.normal_(0 if name.endswith("bias") else 1, 0.1, generator=draw)
    return network


def kd(topology: Topology) -> Method:
    return KD(fill(transfer_net(SIZE.net, topology), topology, 0), SIZE.diffusion, 0)


def dmd2(topology: Topology) -> Method:
    roles = ("student", "teacher", "fake_score")
    networks = {role: fill(transfer_net(SIZE.net, topology), topology, seed) for seed, role in enumerate(roles)}
    networks["teacher"].requires_grad_(False)
    with torch.device("meta"):
        discriminator = Discriminator(SIZE.net.hidden, SIZE.head)
    networks["discriminator"] = fill(parallelize(discriminator, topology), topology, 3)
    text = torch.zeros(SIZE.text_tokens, SIZE.net.text_dim, device=topology.device)
    options = DMD2Config(student_update_freq=3, gan_weight=0.1)
    return DMD2(networks, SIZE.diffusion, options, SIZE.head, text, 0, frame_sums(topology))


@pytest.mark.parametrize("make", [kd, dmd2])
def test_steps_at_the_7bs_width_are_those_of_plain_torch(make: Callable[[Topology], Method], join_alone, runs, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(Saver, "save", lambda *_: None)  # tens of gigabytes
    # Transformer Engine has norms of its own, and the kernels are what differs here.
    topology = replace(join_alone(compute="bfloat16" if REHEARSED else "auto"), backend=BackendConfig(kind="local"))
    train = TrainConfig(ITERATIONS, global_batch_size=1, picture_every=0, recompute="none")
    found: dict[str, list[dict[str, float]]] = {}
    for kernels in ("torch", "triton"):
        with using(kernels):
            method, terms = make(topology), runs.Losses()
            optim = {role: OptimConfig(lr=1e-5) for role in ("student", "fake_score", "discriminator") if role in method.networks}
            folder = tmp_path / kernels
            fit(method, RandomClips(SIZE), train, optim, EMAConfig(0.0), folder, [terms], settings={}, topology=topology)
        found[kernels] = terms.seen
        del method
        gc.collect()
    assert len(found["triton"]) == len(found["torch"]) == ITERATIONS
    for step, (ours, theirs) in enumerate(zip(found["triton"], found["torch"], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert math.isfinite(value), (step, name)
            assert abs(value - theirs[name]) <= 5e-2 * max(abs(theirs[name]), 1e-3), (step, name, value, theirs[name])
