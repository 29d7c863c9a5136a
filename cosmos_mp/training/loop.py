"""The training loop: micro-batches -> backward -> clip and step per role -> callbacks and checkpoint.

It knows neither networks nor losses. Everything random lies in the method and is keyed by (seed, iteration, sample), so the state of a run
is its trained parameters, optimizers, average and a few counters.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cosmos_mp.config import EMAConfig, OptimConfig, TrainConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.distill.method import Method
from cosmos_mp.training import checkpoint
from cosmos_mp.training.ema import EMA
from cosmos_mp.training.optim import build_optimizer, clip_by_norm, learning_rate

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
        samples_per_second, seconds: of the iteration, without checkpoint and callbacks.
        skipped: why the step was not applied; None if it was.
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


@dataclass
class State:
    """What a run is made of, and what a checkpoint holds.

    Attributes:
        networks: the trained ones, by role.
        optimizers: one per trained role.
        ema: average of `ema_role`, or None.
        iterations: length of the run; `iteration` is the next one to run.
        steps: optimizer steps taken, per role.
        skipped_in_row: iterations skipped since the last step.
    """

    networks: dict[str, nn.Module]
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
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                table[f"model/{role}/{name}"] = parameter.detach()
                for key, value in self.optimizers[role].state[parameter].items():
                    table[f"optim/{role}/{name}/{key}"] = value
            table[f"counters/steps/{role}"] = torch.tensor(self.steps[role])
        if self.ema is not None:
            table |= {f"model/{self.ema_role}_ema/{name}": value for name, value in self.ema.averages.items()}
            table["counters/ema_updates"] = torch.tensor(self.ema.updates)
        table["counters/iteration"] = torch.tensor(self.iteration)
        table["counters/skipped_in_row"] = torch.tensor(self.skipped_in_row)
        return table

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; see `checkpoint.load` for what is refused."""
        table = self.tensors()
        checkpoint.load(path, table)
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
    device: torch.device | str = "cpu",
) -> Result:
    """Train from the newest good checkpoint of `run_dir`, or from the networks as they are, to `config.iterations`.

    SIGTERM or SIGINT ends the run after the current iteration, saved; a second SIGINT acts at once.

    Args:
        optim: an entry for every role that `method` ever trains, and no other.
        run_dir: takes config.json, checkpoints and what the callbacks write.
        settings: the resolved configuration (`options.to_dict`); a resumed run must have the same.
        ema_role: the role whose average is kept where `ema.decay` > 0.
        device: where micro-batches go.

    Raises:
        ValueError: `optim` or `ema_role` do not fit the method.
        CheckpointError: the folder holds another run, or no checkpoint in it is usable.
        NonFiniteError: `config.max_nonfinite` steps in a row were skipped; the checkpoints before stand.
        CheckpointWriteError: a checkpoint could not be written.
    """
    own_steps = _count_steps(method, config.iterations, optim)
    checkpoint.open_run(run_dir, settings)
    state = _start(method, config, optim, ema, ema_role, Path(run_dir))
    parameters = {role: list(network.parameters()) for role, network in state.networks.items()}

    def save() -> None:
        path = checkpoint.save(state.run_dir, state.iteration, state.tensors(), settings, config.keep_last)
        for callback in callbacks:
            callback.on_checkpoint(path)

    try:
        with _stop_signals() as signals:
            saved = state.iteration
            for callback in callbacks:
                callback.on_start(state)
            while state.iteration < config.iterations and not signals:
                iteration, began = state.iteration, time.perf_counter()

                # --- Gradients: exactly the trained roles get some ---
                roles = method.trained(iteration)
                for role, network in method.networks.items():
                    network.requires_grad_(role in roles)
                terms, metrics, weights = _Mean(config.accumulation), _Mean(config.accumulation), {}
                for micro_batch in range(config.accumulation):
                    position = iteration * config.global_batch_size + micro_batch * config.micro_batch_size
                    output = method.step(data.batch(position, config.micro_batch_size).to(device), iteration)
                    weights = {name: term.weight for name, term in output.terms.items()}
                    (sum(term.weight * term.value for term in output.terms.values()) / config.accumulation).backward()
                    terms.add({name: term.value for name, term in output.terms.items()})
                    metrics.add(output.metrics)
                values = terms.items()
                values["total"] = sum(weights[name] * value for name, value in values.items())

                # --- Step: all trained roles, or none if anything is not finite ---
                norms = {role: clip_by_norm(parameters[role], optim[role].clip_norm).item() for role in roles}
                rates = {role: learning_rate(optim[role], state.steps[role], own_steps[role]) for role in roles}
                skipped = _not_finite(values, norms, roles, iteration)
                if skipped is None:
                    for role in roles:
                        state.optimizers[role].param_groups[0]["lr"] = rates[role]
                        state.optimizers[role].step()
                        state.steps[role] += 1
                    if state.ema is not None and ema_role in roles:
                        state.ema.update()
                for network in method.networks.values():
                    network.zero_grad(set_to_none=True)
                state.skipped_in_row = 0 if skipped is None else state.skipped_in_row + 1
                state.iteration += 1

                # --- Tell, stop, save ---
                seconds = time.perf_counter() - began
                speed = config.global_batch_size / seconds
                event = Event(iteration, tuple(roles), values, metrics.items(), norms, rates, speed, seconds, skipped)
                for callback in callbacks:
                    callback.on_iteration(event)
                if skipped is not None and state.skipped_in_row >= config.max_nonfinite:
                    raise NonFiniteError(
                        f"{skipped}; {state.skipped_in_row} iterations in a row were skipped (train.max_nonfinite={config.max_nonfinite}): "
                        "lower the learning rate or look at the data; the last checkpoint is from before"
                    )
                if state.iteration % config.save_every == 0:
                    save()
                    saved = state.iteration
            if state.iteration > saved:
                save()
            return Result(state.iteration, interrupted=state.iteration < config.iterations)
    except BaseException as exc:
        for callback in callbacks:
            callback.on_error(exc)
        raise
    finally:
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


def _start(method: Method, config: TrainConfig, optim: Mapping[str, OptimConfig], ema: EMAConfig, ema_role: str, run_dir: Path) -> State:
    if ema.decay > 0 and ema_role not in optim:
        raise ValueError(f"ema.decay={ema.decay} asks for an average of {ema_role!r}, which is not trained here; set ema.decay to 0")
    networks = {role: method.networks[role] for role in optim}
    optimizers = {role: build_optimizer(network.parameters(), optim[role]) for role, network in networks.items()}
    average = EMA(networks[ema_role], ema.decay) if ema.decay > 0 else None
    state = State(networks, optimizers, average, ema_role, run_dir, config.iterations)
    newest = checkpoint.latest(run_dir)
    if newest is not None:
        state.load(newest)
    return state


def _not_finite(terms: Mapping[str, float], norms: Mapping[str, float], roles: Sequence[str], iteration: int) -> str | None:
    for name, value in terms.items():
        if not math.isfinite(value):
            return f"loss term {name!r} of {'+'.join(roles)} is {value} at iteration {iteration}"
    for role, norm in norms.items():
        if not math.isfinite(norm):
            return f"gradient norm of {role} is {norm} at iteration {iteration}"
    return None


class _Mean:
    """Means of named scalars over the micro-batches, kept on their device until read once."""

    def __init__(self, count: int):
        self.count = count
        self.sums: dict[str, Tensor] = {}

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        for name, value in scalars.items():
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def items(self) -> dict[str, float]:
        return {name: value.item() / self.count for name, value in self.sums.items()}


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT received, as a list that fills. A second SIGINT interrupts at once; SIGTERM never does: schedulers repeat it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
