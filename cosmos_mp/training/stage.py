"""What the training stages share around the loop: their data, their watchers, their exit code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cosmos_mp.config import ConfigError, DMD2Run, KDRun, OptimConfig, TeacherRun
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.diffusion.samplers import Answer
from cosmos_mp.distill.method import Method
from cosmos_mp.options import DATA, to_dict
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.training.callbacks import Callback, ConsoleLog, JsonLines, Pictures, ProgressBar, TensorBoard
from cosmos_mp.training.checkpoint import exclusive
from cosmos_mp.training.loop import fit
from cosmos_mp.training.samples import HeldOut

INTERRUPTED = 75
"""Exit code of a run that a signal ended after saving (EX_TEMPFAIL): start it again and it goes on."""


def open_store(path: str, kind: str, config: TeacherRun | KDRun | DMD2Run) -> LatentDataset:
    """A store of encoded clips or pairs, checked against the run's configuration."""
    expect = {"kind": kind, "diffusion.latent_shape": config.diffusion.latent_shape, "net.text_dim": config.net.text_dim}
    if isinstance(config, DMD2Run):  # its unconditional text must be as long as the captions
        expect["text.tokens"] = config.text.tokens
    return LatentDataset(Path(path), config.train.seed, expect=expect)


def open_held_out(config: TeacherRun | KDRun | DMD2Run, topology: Topology) -> HeldOut | None:
    """What the run's pictures show; None where it draws none. Opened before any network is built: a wrong path costs seconds.

    Raises:
        ConfigError: this is one of several processes, or there are fewer held-out clips than the pictures show.
    """
    if topology.world > 1:
        raise ConfigError(f"{topology.world} processes were started; training runs in one, and they would overwrite each other's run")
    if not config.train.picture_every:
        return None
    holdout = open_store(config.holdout, "clips", config)
    return HeldOut(holdout, config.tokenizer, config.train.picture_samples, topology.device)


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
    callbacks: list[Callback] = [ConsoleLog(options.log_every), JsonLines(), ProgressBar(options.log_every)]
    if options.tensorboard:
        callbacks.append(TensorBoard())
    if held_out is not None:
        callbacks.append(Pictures(held_out.renderer(answers), options.picture_every))
    settings = to_dict(config) | {DATA: data.reader.sha256}  # a resumed run must see the same samples
    with exclusive(run_dir):
        result = fit(
            method, data, options, optim, config.ema, run_dir, callbacks, settings=settings, ema_role=ema_role, device=topology.device
        )
    if result.interrupted:
        print(f"interrupted and saved at iteration {result.iteration}; run the same command again to go on")
    return INTERRUPTED if result.interrupted else 0
