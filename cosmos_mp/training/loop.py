"""The training loop: micro-batches -> backward -> reduce once -> clip and step per role -> callbacks and checkpoint.

It knows neither networks nor losses. Everything random lies in the method and is keyed by (seed, iteration, sample), so the state of a run
is its trained parameters, optimizers, average and a few counters.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cosmos_mp.backends import weights_changed
from cosmos_mp.config import ConfigError, EMAConfig, OptimConfig, TrainConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.distill.method import Method
from cosmos_mp.nvtx import nvtx
from cosmos_mp.parallel.fsdp import synchronise
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology, single_process
from cosmos_mp.parallel.watch import Watch
from cosmos_mp.training import checkpoint
from cosmos_mp.training.ema import EMA
from cosmos_mp.training.optim import build_optimizer, clip, learning_rate
from cosmos_mp.training.report import Sums, report
from cosmos_mp.training.saver import Saver
from cosmos_mp.training.signals import stop_signals
from cosmos_mp.training.speed import Speed

if TYPE_CHECKING:
    from cosmos_mp.training.callbacks import Callback


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss term or gradient that is not finite; the message names it, its role and the iteration."""


class Data(Protocol):
    """An endless order of samples."""

    def batch(self, position: int, size: int) -> Batch:
        """Samples position .. position + size - 1: a function of the position alone."""
        ...


@dataclass(frozen=True)
class Event:
    """One finished iteration.

    Attributes:
        iteration: 0-based.
        roles: roles that it trained.
        terms: mean of each loss term over the micro-batches, and `total`, their weighted sum.
        metrics: means of what the method only reports.
        grad_norms: L2 norm per role before clipping.
        lrs: learning rate per role.
        samples_per_second, seconds: of the iteration, without checkpoint and callbacks. A GPU may still be at its optimizer step then,
            which counts with the next one.
        skipped: why the step was not applied; None if it was.
        speed: tokens_per_second of all ranks together; tflops, model TFLOP/s of one rank; mfu, their share of the peak. Empty where the
            run's work is not known, mfu missing where the peak is not.
        peak: which peak; or that none is known.
        passes: seconds of this rank in each part of the step; filled in by `Profile` in its window, empty elsewhere.
    """

    iteration: int
    roles: tuple[str, ...]
    terms: dict[str, float]
    metrics: dict[str, float]
    grad_norms: dict[str, float]
    lrs: dict[str, float]
    samples_per_second: float
    seconds: float
    skipped: str | None = None
    speed: dict[str, float] = field(default_factory=dict)
    peak: str = ""
    passes: dict[str, float] = field(default_factory=dict)


@dataclass
class State:
    """What a run is made of, and what a checkpoint holds.

    Attributes:
        networks: what this rank holds of the trained ones, by role.
        optimizers: one per trained role.
        ema: average of `ema_role`, or None.
        iterations: length of the run; `iteration` is the next one to run.
        steps: optimizer steps taken, per role.
        skipped_in_row: iterations skipped since the last step.
    """

    networks: dict[str, Pieces]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: EMA | None
    ema_role: str
    run_dir: Path
    iterations: int
    iteration: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    skipped_in_row: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything by its name in the checkpoint; parameters and optimizer state are the live ones, counters are copies."""
        table: dict[str, Tensor] = {}
        for role, pieces in self.networks.items():
            for name, piece in pieces.items():
                table[f"model/{role}/{name}"] = pieces.as_stored(name, piece.parameter.detach())
                for key, value in self.optimizers[role].state[piece.parameter].items():
                    table[f"optim/{role}/{name}/{key}"] = pieces.as_stored(name, value)
            table[f"counters/steps/{role}"] = torch.tensor(self.steps[role])
        if self.ema is not None:
            pieces = self.networks[self.ema_role]
            table |= {f"model/{self.ema_role}_ema/{name}": pieces.as_stored(name, value) for name, value in self.ema.averages.items()}
            table["counters/ema_updates"] = torch.tensor(self.ema.updates)
        table["counters/iteration"] = torch.tensor(self.iteration)
        table["counters/skipped_in_row"] = torch.tensor(self.skipped_in_row)
        return table

    def load(self, path: Path, topology: Topology) -> None:
        """Go on from a checkpoint, of whatever layout; see `checkpoint.load` for what is refused."""
        table = self.tensors()
        checkpoint.load(path, table, topology)
        self.steps = Counter({role: table[f"counters/steps/{role}"].item() for role in self.networks})
        if self.ema is not None:
            self.ema.updates = table["counters/ema_updates"].item()
        self.iteration = table["counters/iteration"].item()
        self.skipped_in_row = table["counters/skipped_in_row"].item()


@dataclass(frozen=True)
class Result:
    """How a run ended: iterations done, and whether a signal ended it before the last."""

    iteration: int
    interrupted: bool


def fit(
    method: Method,
    data: Data,
    config: TrainConfig,
    optim: Mapping[str, OptimConfig],
    ema: EMAConfig,
    run_dir: Path,
    callbacks: Sequence[Callback] = (),
    *,
    settings: Mapping[str, Any],
    ema_role: str = "student",
    topology: Topology | None = None,
    speed: Speed | None = None,
) -> Result:
    """Train from the newest good checkpoint of `run_dir`, or from the networks as they are, to `config.iterations`.

    SIGTERM or SIGINT, to any rank, ends the run after the current iteration, saved; a second SIGINT acts at once.

    Args:
        optim: an entry for every role that `method` ever trains, and no other.
        run_dir: takes config.json, checkpoints and what the callbacks write.
        settings: the resolved configuration (`options.to_dict`); a resumed run must have the same.
        ema_role: the role whose average is kept where `ema.decay` > 0.
        topology: the ranks that train together, over which the networks have been laid out; this process alone if not given. All call.
        speed: makes tokens and FLOPs of an iteration's seconds, for the log.

    Raises:
        ValueError: `optim` or `ema_role` do not fit the method, or the batch does not divide over the ranks.
        CheckpointError: the folder holds another run, or no checkpoint in it is usable.
        NonFiniteError: `config.max_nonfinite` steps in a row were skipped; the checkpoints before stand.
        CheckpointWriteError: a checkpoint could not be written.
        LostRank: another rank died or stopped, or hung for longer than the layout's timeout.
    """
    topology = topology or single_process()
    own_steps = _count_steps(method, config.iterations, optim)
    accumulation = micro_batches(config, topology.dp_group.size())
    watch = topology.watch or Watch(topology)
    with watch.explaining("opening the run"):
        checkpoint.open_run(run_dir, settings, topology)
        state = _start(method, config, optim, ema, ema_role, Path(run_dir), topology)
        for network in method.networks.values():
            weights_changed(network)
        saver = Saver(state.run_dir, settings, config.keep_last, topology, asynchronous=config.async_save)

    def save() -> None:
        watch.at("saving")
        saver.save(state.iteration, state.tensors())

    def tell_saved() -> None:
        for path in saver.finished():
            for callback in callbacks:
                callback.on_checkpoint(path)

    try:
        with stop_signals() as signals:
            saved = state.iteration
            for callback in callbacks:
                callback.on_start(state)
            # A signal reaches one rank first: all leave after the iteration in which they have heard of it together.
            alone, stopping = topology.world == 1 or topology.mesh is None, False
            while state.iteration < config.iterations and not (signals if alone else stopping):
                for callback in callbacks:
                    callback.before_iteration(state.iteration)
                iteration, began = state.iteration, time.perf_counter()
                roles = method.trained(iteration)
                with nvtx(f"cosmos_mp.step/{'+'.join(roles)}"):
                    # --- Gradients: exactly the trained roles get some ---
                    for role, network in method.networks.items():
                        network.requires_grad_(role in roles)
                    sums = Sums()
                    for micro_batch in range(accumulation):
                        for role in roles:
                            synchronise(method.networks[role], micro_batch == accumulation - 1, topology)
                        position = _position(iteration, micro_batch, config, topology)
                        watch.at("reading data")
                        with nvtx("data"):
                            batch = _batch(data, position, config.micro_batch_size, topology)
                        watch.at(f"in iteration {iteration} of {'+'.join(roles)}")
                        output = method.step(batch, iteration)
                        with nvtx("bwd"):
                            (sum(term.weight * term.value for term in output.terms.values()) / accumulation).backward()
                        sums.add(output)
                    with nvtx("grad.reduce"):
                        for role in roles:
                            state.networks[role].take_gradients()

                    # --- Step: all trained roles, or none if anything is not finite; decided on what all ranks have seen ---
                    with nvtx("report"):
                        squares = {role: state.networks[role].square_norm() for role in roles}
                        agreed = report(sums, accumulation, squares, bool(signals), topology)
                    stopping = agreed.stopping
                    rates = {role: learning_rate(optim[role], state.steps[role], own_steps[role]) for role in roles}
                    skipped = agreed.trouble(roles, iteration)
                    if skipped is None:
                        for role in roles:
                            with nvtx("clip"):
                                clip(state.optimizers[role], agreed.norms[role], optim[role].clip_norm)
                            with nvtx(f"optim.{role}"):
                                state.optimizers[role].param_groups[0]["lr"] = rates[role]
                                state.optimizers[role].step()
                            state.steps[role] += 1
                            weights_changed(method.networks[role])
                        if state.ema is not None and ema_role in roles:
                            state.ema.update()
                    for role in roles:
                        state.networks[role].drop_gradients()
                state.skipped_in_row = 0 if skipped is None else state.skipped_in_row + 1
                state.iteration += 1

                # --- Tell, stop, save ---
                seconds = time.perf_counter() - began
                per_second = config.global_batch_size / seconds
                event = Event(iteration, tuple(roles), agreed.terms, agreed.metrics, agreed.norms, rates, per_second, seconds, skipped)
                if speed is not None:
                    event = replace(event, speed=speed.of(iteration, roles, seconds), peak=speed.peak)
                for callback in callbacks:
                    callback.on_iteration(event)
                if skipped is not None and state.skipped_in_row >= config.max_nonfinite:
                    raise NonFiniteError(
                        f"{skipped}; {state.skipped_in_row} iterations in a row were skipped (train.max_nonfinite={config.max_nonfinite}): "
                        "look at the data, or start a new run from the last checkpoint, which is from before, with a lower learning rate"
                    )
                if state.iteration % config.save_every == 0:
                    save()
                    saved = state.iteration
                tell_saved()
            if state.iteration > saved:
                save()
            saver.wait()
            tell_saved()
            saver.close()
            return Result(state.iteration, interrupted=state.iteration < config.iterations)
    except BaseException as exc:
        found = watch.explain(exc)
        for callback in callbacks:
            callback.on_error(found)
        if found is exc:
            raise
        raise found from exc
    finally:
        watch.close()
        for callback in callbacks:
            callback.close()


def _count_steps(method: Method, iterations: int, optim: Mapping[str, OptimConfig]) -> Counter[str]:
    """Iterations in which each role is trained: the length of its schedule."""
    steps = Counter(role for iteration in range(iterations) for role in method.trained(iteration))
    for role in steps.keys() | optim.keys():
        if role not in method.networks:
            raise ValueError(f"optim names role {role!r}; the method's networks are {', '.join(method.networks)}")
        if role not in optim:
            raise ValueError(f"role {role!r} is trained and has no optimizer options; give optim_{role}")
    return steps


def micro_batches(config: TrainConfig, dp: int) -> int:
    """Micro-batches of one rank per iteration.

    Raises:
        ConfigError: the global batch does not divide so.
    """
    per_round = config.micro_batch_size * dp
    if config.global_batch_size % per_round:
        raise ConfigError(
            f"train.global_batch_size={config.global_batch_size} is no multiple of train.micro_batch_size={config.micro_batch_size} "
            f"x {dp} data-parallel ranks = {per_round}"
        )
    return config.global_batch_size // per_round


def _position(iteration: int, micro_batch: int, config: TrainConfig, topology: Topology) -> int:
    """Where this rank's micro-batch begins in the training order: data-parallel ranks take turns, tp and cp ranks share."""
    turn = micro_batch * topology.dp_group.size() + topology.dp_group.rank()
    return iteration * config.global_batch_size + turn * config.micro_batch_size


def _batch(data: Data, position: int, size: int, topology: Topology) -> Batch:
    cp = topology.cp_group
    batch = data.batch(position, size)
    return (batch if cp.size() == 1 else batch.cut(cp.rank(), cp.size())).to(topology.device)


def _start(
    method: Method,
    config: TrainConfig,
    optim: Mapping[str, OptimConfig],
    ema: EMAConfig,
    ema_role: str,
    run_dir: Path,
    topology: Topology,
) -> State:
    if ema.decay > 0 and ema_role not in optim:
        raise ValueError(f"ema.decay={ema.decay} asks for an average of {ema_role!r}, which is not trained here; set ema.decay to 0")
    networks = {role: Pieces(method.networks[role], topology) for role in optim}
    parameters = {role: {name: piece.parameter for name, piece in pieces.items()} for role, pieces in networks.items()}
    optimizers = {role: build_optimizer(own.values(), optim[role]) for role, own in parameters.items()}
    average = EMA(parameters[ema_role], ema.decay, partial(weights_changed, method.networks[ema_role])) if ema.decay > 0 else None
    state = State(networks, optimizers, average, ema_role, run_dir, config.iterations)
    newest = checkpoint.latest(run_dir, topology)
    if newest is not None:
        state.load(newest, topology)
    return state
