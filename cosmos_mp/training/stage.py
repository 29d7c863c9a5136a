"""What the training stages share around the loop: their data, their watchers, their exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TypeVar

from cosmos_mp.backends.choice import choose
from cosmos_mp.config import DMD2Run, KDRun, OptimConfig, TeacherRun
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.diffusion.samplers import Answer
from cosmos_mp.distill.method import Method
from cosmos_mp.options import DATA, to_dict
from cosmos_mp.parallel.layout import check_layout
from cosmos_mp.parallel.topology import Topology, join, rank_and_world
from cosmos_mp.parallel.watch import Watch
from cosmos_mp.training.callbacks import Callback, ConsoleLog, JsonLines, Pictures, ProgressBar, TensorBoard
from cosmos_mp.training.checkpoint import exclusive
from cosmos_mp.training.loop import fit, micro_batches
from cosmos_mp.training.optim import optimizer_words
from cosmos_mp.training.profile import Profile, check_device, check_window, name_blocks
from cosmos_mp.training.samples import HeldOut
from cosmos_mp.training.speed import Speed, device_name

Run = TypeVar("Run", TeacherRun, KDRun, DMD2Run)

INTERRUPTED = 75
"""Exit code of a run that a signal ended after saving (EX_TEMPFAIL): start it again and it goes on."""


def meet(config: TeacherRun | KDRun | DMD2Run) -> Topology:
    """Join the other processes of a training run, once its layout is known to fit; the first says which backend and optimizer were found.

    Raises:
        ConfigError: it does not, and the message names the values that do; or profile or backend ask for what is not there.
    """
    check_run(config, rank_and_world()[1])
    check_device(config.profile)
    topology = replace(join(config.parallel), backend=config.backend)
    kind, words = choose(topology, config.train.recompute)
    if topology.rank == 0:
        print(f"backend: {kind} ({words}); optimizer: {optimizer_words(topology.device)}")
    return topology


def on_all_ranks(main: Callable[[Run, Topology], int]) -> Callable[[Run], int]:
    """A stage's main function, given its place among the processes that run it; one that is lost on the way is named.

    Raises:
        ConfigError: as `meet`.
        LostRank: another rank died or hung while data and networks were being opened, or later.
    """

    @wraps(main)
    def run(config: Run) -> int:
        topology = meet(config)
        watch = Watch(topology)
        with watch.explaining("opening data and networks"):
            return main(config, replace(topology, watch=watch))

    return run


def check_run(config: TeacherRun | KDRun | DMD2Run, world: int) -> int:
    """Whether a run over `world` processes fits its layout, networks, batch and profile; gives its data-parallel size. Errors as `meet`."""
    head = config.head if isinstance(config, DMD2Run) and config.dmd2.gan_weight > 0 else None
    dp = check_layout(config.parallel, world, config.net, config.diffusion, head)
    micro_batches(config.train, dp)
    check_window(config.profile, config.train.iterations, world)
    return dp


def open_store(path: str, kind: str, config: TeacherRun | KDRun | DMD2Run) -> LatentDataset:
    """A store of encoded clips or pairs, checked against the run's configuration."""
    expect = {"kind": kind, "diffusion.latent_shape": config.diffusion.latent_shape, "net.text_dim": config.net.text_dim}
    if isinstance(config, DMD2Run):  # its unconditional text must be as long as the captions
        expect["text.tokens"] = config.text.tokens
    return LatentDataset(Path(path), config.train.seed, expect=expect)


def open_held_out(config: TeacherRun | KDRun | DMD2Run, topology: Topology) -> HeldOut | None:
    """What the run's pictures show; None where it draws none. Opened before any network is built: a wrong path costs seconds.

    Raises:
        ConfigError: there are fewer held-out clips than the pictures show.
    """
    if not config.train.picture_every:
        return None
    holdout = open_store(config.holdout, "clips", config)
    return HeldOut(holdout, config.tokenizer, config.train.picture_samples, topology)


def train(
    config: TeacherRun | KDRun | DMD2Run,
    topology: Topology,
    method: Method,
    data: LatentDataset,
    held_out: HeldOut | None,
    optim: Mapping[str, OptimConfig],
    answers: dict[str, Answer],
    *,
    ema_role: str = "student",
) -> int:
    """Run the loop with every watcher on; returns the exit code.

    Args:
        answers: rows of the pictures above control and ground truth.
    """
    run_dir, options = Path(config.out), config.train
    callbacks: list[Callback] = []
    if config.profile.on and topology.rank in config.profile.ranks:
        for network in method.networks.values():
            name_blocks(network)
        callbacks.append(Profile(config.profile, topology))  # first: what it measures is in the event that the others write
    if topology.rank == 0:
        callbacks += [ConsoleLog(options.log_every), JsonLines(), ProgressBar(options.log_every)]
        callbacks += [TensorBoard()] if options.tensorboard else []
    if held_out is not None:
        callbacks.append(Pictures(held_out.renderer(answers), options.picture_every))
    speed = Speed(config, data.reader.header.fields["text"].shape[0], topology.world, device_name(topology.device))
    settings = to_dict(config) | {DATA: data.reader.sha256}  # a resumed run must see the same samples
    with exclusive(run_dir, topology):
        result = fit(
            method,
            data,
            options,
            optim,
            config.ema,
            run_dir,
            callbacks,
            settings=settings,
            ema_role=ema_role,
            topology=topology,
            speed=speed,
        )
    if result.interrupted and topology.rank == 0:
        print(f"interrupted and saved at iteration {result.iteration}; run the same command again to go on")
    return INTERRUPTED if result.interrupted else 0
