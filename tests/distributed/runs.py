"""Small runs of KD and DMD2 on any layout, and how they are compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_mp.config import (
    DiffusionConfig,
    DMD2Config,
    EMAConfig,
    HeadConfig,
    NetConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from cosmos_mp.data.batch import Batch
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.distill.kd import KD
from cosmos_mp.distill.method import Method
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.weights import load_weights
from cosmos_mp.parallel import noise
from cosmos_mp.parallel.apply import parallelize
from cosmos_mp.parallel.context import frame_sums
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology, join, single_process
from cosmos_mp.roles import transfer_net
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import Event, fit

NET = NetConfig(
    hidden=48,
    heads=4,
    blocks=2,
    control_blocks=1,
    mlp_hidden=56,
    adaln_lora_dim=5,
    text_dim=7,
    latent_channels=3,
    control_channels=5,
    control_mlp=(6, 10),
    max_latent=(10, 8, 12),
)
LATENT = (3, 8, 4, 6)
TOKENS = 5
# Up to three of eight frames are given: with cp=4 they fill the first rank's shard.
DIFFUSION = DiffusionConfig(latent_shape=LATENT, condition_frames=3, sigma_max=3.0)
HEAD = HeadConfig("conv3d", 16, (0, 1))
TRAIN = TrainConfig(iterations=20, global_batch_size=4, micro_batch_size=2, save_every=1000, picture_every=0, recompute="none")


@torch.no_grad()
def random_weights(pieces: Pieces, seed: int) -> None:
    """Normal values everywhere, also where training starts from zero, the same for every layout."""
    weights = {}
    for name, piece in pieces.items():
        draw = torch.randn(piece.shape, generator=noise.generator(seed, name, 0, 0), dtype=torch.float64)
        if len(piece.shape) > 1:
            weights[name] = draw if ".position." in name else draw / piece.shape[1:].numel() ** 0.5
        else:
            weights[name] = 0.1 * draw + (0.0 if name.endswith("bias") else 1.0)
    load_weights(pieces, weights, "random weights")


@dataclass
class Clips:
    """Random samples, each a function of its place in the order; the places that were asked for are noted."""

    dtype: torch.dtype
    asked: list[int] = field(default_factory=list)

    def batch(self, position: int, size: int) -> Batch:
        positions = list(range(position, position + size))
        self.asked += positions

        def normal(purpose: str, shape: tuple[int, ...]) -> Tensor:
            return noise.normal(shape, 0, "test/" + purpose, 0, positions).to(self.dtype)

        mask = torch.zeros(size, 8 * LATENT[2], 8 * LATENT[3], dtype=self.dtype)
        mask[:, -8:] = 1.0
        rates = torch.tensor([24.0, 30.0, 12.0], dtype=self.dtype)[torch.tensor(positions) % 3]
        latent, control, eps = (normal(name, LATENT) for name in ("latent", "control", "noise"))
        return Batch(torch.tensor(positions), 0.5 * latent, control, normal("text", (TOKENS, NET.text_dim)), rates, mask, eps)


@dataclass
class Losses(Callback):
    """Terms and gradient norms of every iteration."""

    seen: list[dict[str, float]] = field(default_factory=list)

    def on_iteration(self, event: Event) -> None:
        assert event.skipped is None, event.skipped
        self.seen.append(event.terms | {f"norm of {role}": norm for role, norm in event.grad_norms.items()})


def make_method(kind: str, topology: Topology, dtype: torch.dtype, recompute: str, **options) -> Method:
    """KD, or DMD2 over differing random networks."""
    networks: dict[str, nn.Module] = {}
    for seed, role in enumerate(("student",) if kind == "kd" else ("student", "teacher", "fake_score")):
        networks[role] = transfer_net(NET, topology, recompute, dtype)
        random_weights(Pieces(networks[role], topology), seed)
    if kind == "kd":
        return KD(networks["student"], DIFFUSION, 0)
    head = options.pop("head", HEAD)
    with torch.device("meta"):
        networks["discriminator"] = Discriminator(NET.hidden, head)
    parallelize(networks["discriminator"], topology, dtype=dtype)
    random_weights(Pieces(networks["discriminator"], topology), 3)
    networks["teacher"].requires_grad_(False)
    if options.get("ladd"):
        del networks["fake_score"]
    text = noise.normal((TOKENS, NET.text_dim), 0, "unconditional", 0, [0])[0].to(dtype)
    config = DMD2Config(**{"gan_weight": 0.3, "reconstruction_weight": 0.1, "r1_weight": 0.2, "r1_sigma": 0.1} | options)
    published = topology.options.reference_cp_scaling
    return DMD2(networks, DIFFUSION, config, head, text, 0, frame_sums(topology), published)


def train(
    kind: str,
    layout: ParallelConfig | None,
    config: TrainConfig = TRAIN,
    dtype: torch.dtype = torch.float64,
    *,
    run_dir: Path | None = None,
    clips: Clips | None = None,
    callbacks: Sequence[Callback] = (),
    **options,
) -> dict:
    """One run on this rank: its losses, each role's first gradients and last weights as rectangles, and the samples it saw.

    Args:
        layout: None = a process whose networks are whole.
        run_dir: where to save and to go on; nowhere that lasts if not given.
    """
    topology = single_process() if layout is None else join(layout)
    method = make_method(kind, topology, dtype, config.recompute, **options)
    roles = tuple(role for role in ("student", "fake_score", "discriminator") if role in method.networks)
    # AdamW divides by the gradient's size: without a sizable eps, rounding of the smallest gradients would grow.
    optim = {role: OptimConfig(lr=1e-3, eps=1e-3, clip_norm=2.0) for role in roles}
    gradients: dict[str, dict[str, tuple]] = {}
    original = Pieces.take_gradients

    def take_gradients(pieces: Pieces) -> None:
        original(pieces)
        role = next(role for role, network in method.networks.items() if network is pieces.network)
        gradients.setdefault(
            role,
            {
                name: (piece.shape, piece.offset, None if piece.parameter.grad is None else piece.parameter.grad.clone())
                for name, piece in pieces.items()
            },
        )

    Pieces.take_gradients = take_gradients
    losses, clips = Losses(), clips or Clips(dtype)
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = run_dir or Path(topology.on_first(lambda: folder))
            watching = [losses, *callbacks]
            ended = fit(method, clips, config, optim, EMAConfig(0.9), folder, watching, settings={}, topology=topology)
    finally:
        Pieces.take_gradients = original
    weights = {
        role: {name: (p.shape, p.offset, p.parameter.detach().clone()) for name, p in Pieces(method.networks[role], topology).items()}
        for role in roles
    }
    place = tuple(group.rank() for group in (topology.tp_group, topology.cp_group, topology.dp_group))
    return {
        "losses": losses.seen,
        "gradients": gradients,
        "weights": weights,
        "asked": clips.asked,
        "place": place,
        "iteration": ended.iteration,
    }


def whole(results: list[dict], role: str, what: str = "gradients") -> dict[str, Tensor | None]:
    """Gradients or weights put together from the ranks' rectangles; those that several ranks hold must agree in every bit."""
    tensors: dict[str, Tensor | None] = {}
    for name, (shape, _, gradient) in results[0][what][role].items():
        if gradient is None:
            assert all(result[what][role][name][2] is None for result in results), f"{name}: a gradient on some ranks only"
            tensors[name] = None
            continue
        total = torch.full(shape, torch.nan, dtype=gradient.dtype)
        for result in results:
            _, offset, part = result[what][role][name]
            place = tuple(slice(o, o + size) for o, size in zip(offset, part.shape, strict=True))
            known = total[place]
            assert (known.isnan() | (known == part)).all(), f"{role} {name}: ranks disagree"
            total[place] = part
        assert not total.isnan().any(), f"{role} {name}: a hole"
        tensors[name] = total
    return tensors


def largest_difference(results: list[dict], reference: list[dict]) -> dict[str, float]:
    """Largest relative difference of the first iteration's gradients per role, of its terms, and of all later iterations' terms."""
    found: dict[str, float] = {}
    for role in reference[0]["gradients"]:
        ours, theirs = whole(results, role), whole(reference, role)
        assert ours.keys() == theirs.keys()
        assert {name for name in ours if ours[name] is None} == {name for name in theirs if theirs[name] is None}
        scale = {name: g.abs().max().item() for name, g in theirs.items() if g is not None}
        assert all(value > 0 for value in scale.values()), f"{role}: a gradient that is zero shows nothing"
        found[role] = max((ours[name] - theirs[name]).abs().max().item() / scale[name] for name in scale)
    for result in results:
        for index, (now, then) in enumerate(zip(result["losses"], reference[0]["losses"], strict=True)):
            assert now.keys() == then.keys()
            worst = max(abs(now[name] - then[name]) / abs(then[name]) for name in then)
            when = "last" if index else "first"
            found[when] = max(worst, found.get(when, 0.0))
    found.setdefault("last", found["first"])
    return found


KINDS = {"kd": (20, {}), "dmd2": (20, {}), "critic": (1, {"critic_warmup": 1})}
"""Runs with their lengths: KD; DMD2, which begins with a student step; and a critic step on the first weights."""


LAYOUTS: dict[str, tuple[int, ParallelConfig, int, int]] = {
    "FSDP 1": (1, ParallelConfig(), 4, 4),
    "TP2": (2, ParallelConfig(tp=2), 4, 4),
    "TP4": (4, ParallelConfig(tp=4), 4, 4),
    "TP2+SP": (2, ParallelConfig(tp=2, sequence_parallel=True), 4, 4),
    "CP2 Ulysses": (2, ParallelConfig(cp=2), 4, 4),
    "CP4 Ulysses": (4, ParallelConfig(cp=4), 4, 4),
    "CP2 ring": (2, ParallelConfig(cp=2, cp_attention="ring"), 4, 4),
    "CP4 ring": (4, ParallelConfig(cp=4, cp_attention="ring"), 4, 4),
    "TP2 x CP2": (4, ParallelConfig(tp=2, cp=2), 4, 2),
    "TP2+SP x CP2 ring": (4, ParallelConfig(tp=2, cp=2, sequence_parallel=True, cp_attention="ring"), 4, 4),
    "FSDP 2": (2, ParallelConfig(), 4, 1),
    "FSDP 3": (3, ParallelConfig(), 6, 2),
    "HSDP 2 x 2": (4, ParallelConfig(cp=2, shard=2), 4, 1),
    "TP2 x CP2 x DP2": (8, ParallelConfig(tp=2, cp=2), 4, 2),
}
"""Ranks, layout, global batch and micro-batch: one micro-batch per iteration is quickest; three layouts accumulate two."""


def all_kinds(
    run_ranks: Callable[..., list], world: int, layout: ParallelConfig | None, batch: int, micro_batch: int
) -> dict[str, list[dict]]:
    """Results of all ranks by kind; layout None = one process whose networks are whole."""
    sizes = {"global_batch_size": batch, "micro_batch_size": micro_batch}

    def rank_runs(rank: int) -> dict[str, dict]:
        return {
            kind: train(kind, layout, replace(TRAIN, iterations=iterations, **sizes), **options)
            for kind, (iterations, options) in KINDS.items()
        }

    results = run_ranks(world, rank_runs, timeout=300)
    return {kind: [result[kind] for result in results] for kind in KINDS}
