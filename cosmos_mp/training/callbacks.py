"""What watches a run: progress, console, JSON lines, TensorBoard, pictures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from cosmos_mp.training import logs
from cosmos_mp.training.loop import Event, State
from cosmos_mp.training.pictures import picture_grid, stack, write_png

Rows = dict[str, np.ndarray]


@dataclass
class Callback:
    """A watcher of a run, with one hook per moment; each does nothing here."""

    def on_start(self, state: State) -> None:
        """Before the first iteration, after a checkpoint has been loaded; `state.iteration` is the next to run."""

    def before_iteration(self, iteration: int) -> None:
        """Right before an iteration's first work."""

    def on_iteration(self, event: Event) -> None:
        """After each iteration, also one whose step was skipped, and before its checkpoint."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint has become visible at `path`."""

    def on_error(self, exc: BaseException) -> None:
        """The run ends by `exc`, which is raised again afterwards."""

    def close(self) -> None:
        """Last of all, however the run ended."""


def _due(iteration: int, every: int, total: int) -> bool:
    """Whether a moment that comes every `every` iterations (0 = never), and after the last, comes after this one (0-based)."""
    return every > 0 and ((iteration + 1) % every == 0 or iteration + 1 == total)


@dataclass
class ProgressBar(Callback):
    """A tqdm bar with the time left on a terminal; elsewhere a plain line every `log_every` iterations."""

    log_every: int = 10
    force: bool = False
    """Draw the bar also where the stream is no terminal."""
    file: IO[str] | None = None
    """Where to; standard error if not given."""
    _bar: tqdm | None = field(default=None, init=False, repr=False)
    _state: State | None = field(default=None, init=False, repr=False)
    _first: int = field(default=0, init=False, repr=False)
    _began: float = field(default=0.0, init=False, repr=False)

    def on_start(self, state: State) -> None:
        self._state, self._first, self._began = state, state.iteration, time.monotonic()
        file = self.file or sys.stderr
        if self.force or file.isatty():
            self._bar = tqdm(total=state.iterations, initial=state.iteration, file=file, unit="it", dynamic_ncols=True)

    def on_iteration(self, event: Event) -> None:
        done, total = event.iteration + 1, self._state.iterations
        if self._bar is not None:
            self._bar.set_postfix_str(f"{'+'.join(event.roles)} {event.terms['total']:.4g}", refresh=False)
            self._bar.update()
        elif _due(event.iteration, self.log_every, total):
            left = (time.monotonic() - self._began) / (done - self._first) * (total - done)
            print(f"iteration {done}/{total}, {tqdm.format_interval(left)} left", file=self.file or sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass
class ConsoleLog(Callback):
    """Every `log_every` iterations one line per phase: means over its iterations since the last line, in Megatron's manner.

    A phase is a set of roles trained together. Were only every n-th iteration shown, a cycle that divides n would hide a phase for good.
    """

    log_every: int = 10
    file: IO[str] | None = None
    """Where to; standard output if not given."""
    _events: list[Event] = field(default_factory=list, init=False, repr=False)
    _total: int = field(default=0, init=False, repr=False)

    def on_start(self, state: State) -> None:
        self._total = state.iterations

    def on_iteration(self, event: Event) -> None:
        self._events.append(event)
        if _due(event.iteration, self.log_every, self._total):
            self._print()

    def on_error(self, exc: BaseException) -> None:
        self._print()

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        for roles in dict.fromkeys(event.roles for event in self._events):
            tqdm.write(self._line([event for event in self._events if event.roles == roles]), file=self.file or sys.stdout)
        self._events.clear()

    def _line(self, events: list[Event]) -> str:
        last = events[-1]
        skipped = [event for event in events if event.skipped]
        good = [event for event in events if not event.skipped] or events
        seconds = sum(event.seconds for event in events)
        parts = [f"iteration {last.iteration + 1:>7}/{self._total}", "+".join(last.roles)]
        parts += [f"{name} {_mean(good, 'terms', name):.4E}" for name in last.terms]
        parts += [f"{name} {_mean(good, 'metrics', name):.4g}" for name in last.metrics]
        parts += [f"grad norm {role} {_mean(good, 'grad_norms', role):.4g}" for role in last.grad_norms]
        parts += [f"lr {role} {rate:.3E}" for role, rate in last.lrs.items()]
        samples = sum(event.samples_per_second * event.seconds for event in events)
        parts += [f"{samples / seconds if seconds else 0.0:.3g} samples/s", f"{seconds / len(events):.3g} s"]
        if last.speed:  # rates: what was done in all that time
            rate = {name: sum(event.speed[name] * event.seconds for event in events) / seconds for name in last.speed}
            share = f"MFU {100 * rate['mfu']:.1f} % of {last.peak}" if "mfu" in rate else f"no MFU: {last.peak}"
            parts += [f"{rate['tokens_per_second']:.3g} tokens/s", f"{rate['tflops']:.3g} model TFLOP/s per rank", share]
        profiled = [event for event in events if event.passes]
        if profiled:
            parts += [f"{name} {_mean(profiled, 'passes', name):.3g} s" for name in profiled[-1].passes]
        parts += [f"skipped {len(skipped)}: {skipped[-1].skipped}"] if skipped else []
        return " | ".join(parts)


def _mean(events: list[Event], group: str, name: str) -> float:
    values = [getattr(event, group)[name] for event in events if name in getattr(event, group)]
    return sum(values) / len(values)


@dataclass
class JsonLines(Callback):
    """`log.jsonl`: one line per iteration, each iteration exactly once over all interruptions; read it with `logs.read_log`."""

    _file: IO[str] | None = field(default=None, init=False, repr=False)

    def on_start(self, state: State) -> None:
        path = state.run_dir / "log.jsonl"
        logs.drop_from(path, state.iteration)
        self._file = path.open("a")

    def on_iteration(self, event: Event) -> None:
        try:
            self._file.write(logs.to_line(asdict(event)))
            self._file.flush()
        except OSError as error:
            words = f"{error.strerror}; the last checkpoint stands: make room and start the same command again"
            raise OSError(error.errno, words, self._file.name) from error

    def on_checkpoint(self, path: Path) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass
class TensorBoard(Callback):
    """Scalars under `tensorboard/`: `<roles>/<term>`, metrics, gradient norms, learning rates, `speed/samples_per_second` and
    `speed/<roles>/<quantity>`."""

    _writer: Any = field(default=None, init=False, repr=False)

    def on_start(self, state: State) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run writes these iterations again: TensorBoard drops what was logged from there on.
        self._writer = SummaryWriter(str(state.run_dir / "tensorboard"), purge_step=state.iteration)

    def on_iteration(self, event: Event) -> None:
        phase = "-".join(event.roles)
        scalars = {f"{phase}/{name}": value for name, value in event.terms.items()}
        scalars |= {f"metrics/{name}": value for name, value in event.metrics.items()}
        scalars |= {f"grad_norm/{role}": value for role, value in event.grad_norms.items()}
        scalars |= {f"lr/{role}": value for role, value in event.lrs.items()}
        scalars["speed/samples_per_second"] = event.samples_per_second
        scalars |= {f"speed/{phase}/{name}": value for name, value in event.speed.items()}
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, event.iteration)

    def on_checkpoint(self, path: Path) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@dataclass
class Pictures(Callback):
    """`pictures/iter_<N>.png` every `every` iterations (0 = never) and after the last; with an average, the averaged network draws.

    `render(iteration)` gives one entry per held-out sample: row label -> video (F, H, W, 3) uint8. It is called without gradients, on every
    rank; where it gives nothing, nothing is written.
    """

    render: Callable[[int], list[Rows]]
    every: int
    _state: State | None = field(default=None, init=False, repr=False)

    def on_start(self, state: State) -> None:
        self._state = state

    def on_iteration(self, event: Event) -> None:
        if _due(event.iteration, self.every, self._state.iterations):
            with torch.no_grad(), self._state.ema.applied() if self._state.ema else nullcontext():
                samples = self.render(event.iteration + 1)
            if samples:
                grid = stack([picture_grid(rows) for rows in samples])
                write_png(self._state.run_dir / "pictures" / f"iter_{event.iteration + 1:08d}.png", grid)
