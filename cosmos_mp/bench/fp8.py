"""`bench fp8`: how accurate the recipes of FP8 are on a small teacher, and on a student that learns from it; bfloat16 is the yardstick.

Everything is made on the spot, from synthetic clips to the teacher's pairs, by the quickstart's recipe at a width that fills blocks of 128.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cosmos_mp import commands, presets
from cosmos_mp.backends.fp8 import E4M3, RECIPES, linears, quantise
from cosmos_mp.bench.parallel import markdown
from cosmos_mp.config import (
    BackendConfig,
    DMD2Config,
    EMAConfig,
    FP8Recipe,
    HeadConfig,
    OptimConfig,
    ParallelConfig,
    SamplerConfig,
    TrainConfig,
)
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.shards import ShardWriter
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.distill.conditioning import condition_of_clips
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.distill.kd import KD
from cosmos_mp.distill.method import Method
from cosmos_mp.distill.pairs import generate_pairs, pair_noise, pairs_header
from cosmos_mp.distill.teacher import TeacherPretraining
from cosmos_mp.models.weights import fingerprint, load_weights, named_weights
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology, join, single_process
from cosmos_mp.revision import revision
from cosmos_mp.roles import new_transfer_net, transfer_net
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import Event, fit

NET = replace(presets.TINY_NET, hidden=128, mlp_hidden=512, control_mlp=(128,))
DIFFUSION = presets.TINY_DIFFUSION
SIGMAS = (0.1, 1.0, 10.0)
PRECISIONS: dict[str, tuple[str, FP8Recipe | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "FP8 current": ("bfloat16", "current"),
    "FP8 block": ("bfloat16", "block"),
}
"""What the network computes in, and the recipe of its linears."""
GATE = 16
"""FP8 may err as many times more than bfloat16 does: its E4M3 has four bits of mantissa fewer."""
UPDATES_7B = 4800
"""Updates of the student in the recipe's 24,000 iterations of DMD2."""


class Size(NamedTuple):
    """Clips, iterations of the teacher, pairs, steps and seeds of KD, updates of DMD2's student."""

    clips: int
    teacher: int
    pairs: int
    kd: int
    seeds: int
    updates: int


WHOLE = Size(clips=256, teacher=300, pairs=128, kd=200, seeds=2, updates=10)
FAST = Size(clips=48, teacher=4, pairs=8, kd=4, seeds=1, updates=2)
BATCH, LAST = 8, 20
"""384 tokens at once, three blocks of 128; and the steps at the end of KD whose losses are averaged."""


def bench_fp8(fast: bool = False) -> dict[str, Any]:
    """Measure everything and print it.

    Args:
        fast: hardly trained, for a look.
    """
    size = FAST if fast else WHOLE
    torch.set_num_threads(1)  # in one order, sums are the same numbers each time
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), size)
        found = {
            "date": str(date.today()),
            "commit": revision(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "size": size._asdict(),
            "net": asdict(NET),
            "layers": layers(world),
            "teacher": teacher_error(world),
            "kd": kd_drift(world, size),
            "dmd2": dmd2_change(world, size.updates),
        }
    print("\n" + "\n\n".join(tables(found)))
    return found


# --- What is measured on ---


class World(NamedTuple):
    """Clips on either side of the split, the teacher's weights, its pairs, and a folder for runs."""

    train: LatentDataset
    holdout: LatentDataset
    teacher: dict[str, Tensor]
    pairs: Path
    runs: Path


def make_world(root: Path, size: Size) -> World:
    """The quickstart's stages up to the pairs."""
    videos, tokenizer = str(root / "videos"), str(root / "tokenizer")
    commands.synthesize([videos, str(size.clips)])
    commands.index([videos, "--min-frames", "9"])
    commands.fit_tokenizer([videos, tokenizer])
    stores = {}
    for split in ("train", "holdout"):
        out = ["--out", str(root / split), "--split", split, "--holdout_share", "0.25"]
        commands.encode(["tiny_encode", "--videos", videos, *out, "--tokenizer.path", tokenizer])
        stores[split] = LatentDataset(root / split, 0, expect={})
    print(f"teacher, {size.teacher} iterations", flush=True)
    run, topology = presets.get("tiny_teacher"), _topology("float32")
    network = new_transfer_net(NET, topology, 0)
    method = TeacherPretraining(network, DIFFUSION, run.loss, 0)
    _fit(method, topology, stores["train"], size.teacher, 0, {"teacher": run.optim_teacher}, root / "teacher")
    weights = {name: piece.parameter.detach().clone() for name, piece in Pieces(network, topology).items()}
    print(f"{size.pairs} pairs", flush=True)
    config = replace(presets.get("tiny_pairs"), count=size.pairs, net=NET, sampler=SamplerConfig(12, 0.5, "empty"), out=str(root / "pairs"))
    teacher, text = _whole(weights), torch.zeros(config.text.tokens, config.text.dim)
    writer = ShardWriter(Path(config.out), pairs_header(config, stores["train"], fingerprint(named_weights(teacher)), text))
    generate_pairs(config, Denoiser(teacher.requires_grad_(False), DIFFUSION), stores["train"], text, writer)
    writer.finish()
    return World(stores["train"], stores["holdout"], weights, Path(config.out), root)


def _topology(compute: str) -> Topology:
    return replace(join(ParallelConfig(compute=compute)), backend=BackendConfig(kind="local"))


def _whole(weights: dict[str, Tensor]) -> nn.Module:
    """The network in one process, in float32."""
    network = transfer_net(NET, single_process())
    load_weights(network, weights, "the teacher")
    return network


def _network(weights: dict[str, Tensor], topology: Topology, fp8: FP8Recipe | None = None) -> nn.Module:
    """The network as a run has it: computing in the topology's type over float32 masters."""
    network = transfer_net(NET, topology, fp8=fp8)
    load_weights(Pieces(network, topology), weights, "the teacher")
    return network


@dataclass
class Losses(Callback):
    """The loss of every iteration."""

    seen: list[float] = field(default_factory=list)

    def on_iteration(self, event: Event) -> None:
        if event.skipped is not None:
            raise RuntimeError(f"iteration {event.iteration}: {event.skipped}")
        self.seen.append(event.terms["total"])


def _fit(
    method: Method, topology: Topology, data: LatentDataset, iterations: int, seed: int, optim: dict[str, OptimConfig], folder: Path
) -> list[float]:
    options = TrainConfig(iterations, BATCH, BATCH, seed, save_every=10**9, picture_every=0, recompute="none")
    losses = Losses()
    fit(method, data, options, optim, EMAConfig(0.0), folder, [losses], settings={}, topology=topology)
    return losses.seen


# --- Measurements ---


def layers(world: World) -> dict[str, dict[str, dict[str, float]]]:
    """By layer and precision, signal-to-noise in dB of operands as they are rounded and of the three products made of them; operands are
    those of a KD step in float32, so that no layer sees the errors of another."""
    student = _whole(world.teacher)
    seen: dict[str, list[Tensor]] = {}
    for name, module in linears(student).items():
        module.register_forward_hook(lambda m, args, _, name=name: seen.update({name: [args[0].detach(), m.weight.detach()]}))
        module.register_full_backward_hook(lambda m, _, gradients, name=name: seen[name].append(gradients[0]))
    output = KD(student, DIFFUSION, 0).step(LatentDataset(world.pairs, 0, expect={}).batch(0, BATCH), 0)
    output.terms["kd"].value.backward()
    found = {}
    for name, (x, w, g) in seen.items():
        operands = x.flatten(0, 1), w, g.flatten(0, 1)
        found[name] = {"bfloat16": _noise(operands, None)} | {f"FP8 {recipe}": _noise(operands, recipe) for recipe in RECIPES}
    return found


def _noise(operands: tuple[Tensor, Tensor, Tensor], recipe: FP8Recipe | None) -> dict[str, float]:
    x, w, g = operands
    if recipe is None:
        along = across = [value.bfloat16().float() for value in operands]
    else:
        r = RECIPES[recipe]
        along = [quantise(x, E4M3, r.rows), quantise(w, E4M3, r.weight), quantise(g, r.gradient, r.rows)]
        across = [quantise(x, E4M3, r.columns), along[1], quantise(g, r.gradient, r.columns)]
    return {
        "activation": decibels(x, along[0]),
        "weight": decibels(w, along[1]),
        "gradient": decibels(g, along[2]),
        "output": decibels(x @ w.t(), along[0] @ along[1].t()),
        "gradient of the activation": decibels(g @ w, along[2] @ along[1]),
        "gradient of the weight": decibels(g.t() @ x, across[2].t() @ across[0]),
    }


def decibels(exact: Tensor, found: Tensor) -> float:
    """10 log10 of signal over noise, by energy."""
    exact = exact.double()
    return 10 * (exact.pow(2).sum() / (found.double() - exact).pow(2).sum()).log10().item()


@torch.no_grad()
def teacher_error(world: World) -> dict[str, dict[str, float]]:
    """By precision and noise level: |eps - eps in float32| / |eps in float32| of the teacher on held-out clips."""
    batch = world.holdout.fixed(list(range(BATCH)))
    condition, noise = condition_of_clips(batch), pair_noise(DIFFUSION.latent_shape, 0, list(range(BATCH)))
    answers: dict[str, dict[float, Tensor]] = {}
    for name, (compute, fp8) in PRECISIONS.items():
        teacher = Denoiser(_network(world.teacher, _topology(compute), fp8), DIFFUSION)
        levels = {sigma: torch.full((BATCH,), sigma) for sigma in SIGMAS}
        answers[name] = {s: teacher(batch.latent_BCTHW + s * noise, level, condition).eps.double() for s, level in levels.items()}
    exact = answers.pop("float32")
    return {name: {str(s): ((eps - exact[s]).norm() / exact[s].norm()).item() for s, eps in row.items()} for name, row in answers.items()}


def kd_drift(world: World, size: Size) -> dict[str, list[list[float]]]:
    """By precision and seed: the losses of KD's student, which starts as the teacher, over the same pairs in the same order."""
    optim = {"student": presets.get("tiny_kd").optim_student}
    found: dict[str, list[list[float]]] = {name: [] for name in PRECISIONS}
    for seed in range(size.seeds):
        for name, (compute, fp8) in PRECISIONS.items():
            print(f"KD, {name}, seed {seed}", flush=True)
            topology = _topology(compute)
            student, pairs = _network(world.teacher, topology, fp8), LatentDataset(world.pairs, seed, expect={})
            folder = world.runs / f"kd {name} {seed}"
            found[name].append(_fit(KD(student, DIFFUSION, seed), topology, pairs, size.kd, seed, optim, folder))
    return found


def dmd2_change(world: World, updates: int) -> dict[str, Any]:
    """How far `updates` of DMD2's student at the recipe's rate move the weights of FP8's linears, and how far rounding moves them; rms."""
    print(f"DMD2, {updates} updates", flush=True)
    config = DMD2Config(gan_weight=0.0)
    optim, topology = OptimConfig(), _topology("bfloat16")
    networks = {role: _network(world.teacher, topology) for role in ("student", "teacher", "fake_score")}
    networks["teacher"].requires_grad_(False)
    shape = world.train.fixed([0]).text_BLD.shape[1:]
    method = DMD2(networks, presets.get("tiny_dmd2").diffusion, config, HeadConfig(), torch.zeros(shape), 0)
    _fit(
        method,
        topology,
        world.train,
        updates * config.student_update_freq,
        0,
        dict.fromkeys(("student", "fake_score"), optim),
        world.runs / "dmd2",
    )
    after = {name: piece.parameter.detach() for name, piece in Pieces(networks["student"], topology).items()}
    names = [f"{name}.weight" for name in linears(networks["student"])]
    before = [world.teacher[name] for name in names]
    rounded = {"bfloat16": [w.bfloat16().float() for w in before]}
    rounded |= {f"FP8 {name}": [quantise(w, E4M3, recipe.weight) for w in before] for name, recipe in RECIPES.items()}
    change = _rms([after[name] - w for name, w in zip(names, before, strict=True)])
    return {
        "updates": updates,
        "lr": optim.lr,
        "weights": _rms(before),
        "change": change,
        "rounding": {name: _rms([r - w for r, w in zip(values, before, strict=True)]) for name, values in rounded.items()},
    }


def _rms(values: list[Tensor]) -> float:
    return torch.cat([value.flatten() for value in values]).double().pow(2).mean().sqrt().item()


# --- Tables ---


def tables(found: dict[str, Any]) -> Sequence[str]:
    """The results as Markdown: layers, teacher, KD, DMD2."""
    return [_layers_table(found["layers"]), _teacher_table(found["teacher"]), _kd_table(found["kd"]), _dmd2_table(found["dmd2"])]


def _layers_table(layers: dict[str, Any]) -> str:
    first = next(iter(layers.values()))
    names, quantities = list(first), list(first["bfloat16"])
    rows = [["signal-to-noise, dB, " + " / ".join(names), *quantities]]
    for kind in dict.fromkeys(".".join(name.split(".")[-2:]) for name in layers):
        blocks = [row for name, row in layers.items() if name.endswith(f".{kind}")]
        worst = [[min(row[name][quantity] for row in blocks) for name in names] for quantity in quantities]
        rows.append([kind, *(" / ".join(f"{value:.1f}" for value in values) for values in worst)])
    return markdown(rows)


def _teacher_table(teacher: dict[str, dict[str, float]]) -> str:
    rows = [["teacher's eps, relative L2 to float32", *(f"sigma {sigma}" for sigma in teacher["bfloat16"]), "worst ratio", "gate"]]
    for name, row in teacher.items():
        ratio = max(value / teacher["bfloat16"][sigma] for sigma, value in row.items())
        verdict = "–" if name == "bfloat16" else f"< {GATE}: {'holds' if ratio < GATE else 'fails'}"
        rows.append([name, *(f"{value:.1e}" for value in row.values()), f"{ratio:.1f}", verdict])
    return markdown(rows)


def drift(kd: dict[str, list[list[float]]], name: str) -> list[float]:
    """By seed: the loss at the end of KD against that of bfloat16, less 1."""
    ends = {row: [sum(losses[-LAST:]) / len(losses[-LAST:]) for losses in kd[row]] for row in (name, "bfloat16")}
    return [own / other - 1 for own, other in zip(ends[name], ends["bfloat16"], strict=True)]


def _kd_table(kd: dict[str, list[list[float]]]) -> str:
    steps, seeds = len(kd["bfloat16"][0]), range(len(kd["bfloat16"]))
    rows = [[f"KD over {steps} steps", *(f"loss, seed {seed}" for seed in seeds), *(f"to bfloat16, seed {seed}" for seed in seeds)]]
    for name, runs in kd.items():
        ends = [sum(losses[-LAST:]) / len(losses[-LAST:]) for losses in runs]
        rows.append([name, *(f"{end:.5f}" for end in ends), *(f"{100 * value:+.2f} %" for value in drift(kd, name))])
    return markdown(rows)


def _dmd2_table(dmd2: dict[str, Any]) -> str:
    updates, change, bound = dmd2["updates"], dmd2["change"], UPDATES_7B * dmd2["lr"]
    walk = change * (UPDATES_7B / updates) ** 0.5
    rows = [
        [
            f"weights, rms {dmd2['weights']:.3f}",
            "rounding",
            f"/ change of {updates} updates",
            f"/ of {UPDATES_7B:,}, a random walk",
            "/ of all one way",
        ]
    ]
    rows += [[name, f"{rms:.1e}", *(f"{rms / far:.3g}" for far in (change, walk, bound))] for name, rms in dmd2["rounding"].items()]
    return markdown(rows)
