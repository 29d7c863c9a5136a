"""The profile window of a run: on chosen ranks and iterations, ranges are named and timed, and a profiler or the memory's history records.

What needs a GPU here was not run on one.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_mp.config import ConfigError, ProfileConfig
from cosmos_mp.models.controlnet import ControlBranch
from cosmos_mp.models.dit import Trunk
from cosmos_mp.nvtx import Recorder, nvtx, recording
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import Event, State

PARTS = {"self_attn": "attn", "cross_attn": "xattn", "mlp": "mlp"}


def check_window(options: ProfileConfig, iterations: int, world: int) -> None:
    """Refuse a window in which a run of this length over `world` processes would record nothing.

    Raises:
        ConfigError: the message names the option.
    """
    if not options.on:
        return
    if options.start >= iterations:
        raise ConfigError(f"profile.start={options.start} comes after the last of train.iterations={iterations}")
    if gone := [rank for rank in options.ranks if rank >= world]:
        raise ConfigError(f"profile.ranks names {gone[0]}; the ranks of {world} process(es) are 0..{world - 1}")


def check_device(options: ProfileConfig) -> None:
    """Refuse, where there is no GPU, what only a GPU can record.

    Raises:
        ConfigError: the message names the option.
    """
    if torch.cuda.is_available():
        return
    if options.kind == "nsight":
        raise ConfigError("profile.kind=nsight records a GPU, and there is none here; profile.kind=torch works without")
    if options.memory:
        raise ConfigError("profile.memory records a GPU's memory, and there is no GPU here; leave it off")


def name_blocks(network: nn.Module) -> None:
    """Open a range around every part of the network's blocks: `blk{i}.{attn,xattn,mlp}`, and `control.blk{i}...` in a control branch."""
    for trunk in network.modules():
        if not isinstance(trunk, Trunk):
            continue
        branch = "control." if isinstance(trunk, ControlBranch) else ""
        for index, block in enumerate(trunk.blocks):
            for attribute, part in PARTS.items():
                module = getattr(block, attribute)
                module.forward = partial(_within, f"{branch}blk{index}.{part}", module.forward)


def _within(name: str, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with nvtx(name):
        return forward(*args, **kwargs)


class Clock:
    """Seconds in a step's own parts, the ranges right inside its own; a GPU's by events, which wait for nothing until read."""

    def __init__(self, device: torch.device):
        self.device, self._depth = device, 0
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._depth += 1
        timed = self._depth == 2
        began = self._now() if timed else None
        try:
            yield
        finally:
            self._depth -= 1
            if timed:
                self._spans.append((name, began, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """What was measured since the last time, per name; waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: Counter[str] = Counter()
        for name, began, ended in self._spans:
            seconds[name] += began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
        self._spans.clear()
        return dict(seconds)


@dataclass
class Profile(Callback):
    """Opens the window before its first iteration, and closes it after its last or when the run ends inside.

    Writes `profile/trace_rank<N>.json.gz` (Perfetto or chrome://tracing show it) and `profile/memory_rank<N>.pickle`
    (docs.pytorch.org/memory_viz does) under the run's folder, as the options ask.
    """

    options: ProfileConfig
    topology: Topology
    _folder: Path | None = field(default=None, init=False, repr=False)
    _clock: Clock | None = field(default=None, init=False, repr=False)
    _window: ExitStack | None = field(default=None, init=False, repr=False)

    def on_start(self, state: State) -> None:
        self._folder = state.run_dir / "profile"
        if state.iteration >= self.options.stop:
            print(f"note: the profile's window ended before iteration {state.iteration}, where this run goes on", file=sys.stderr)

    def before_iteration(self, iteration: int) -> None:
        if self._window is None and self.options.start <= iteration < self.options.stop:
            self._clock = Clock(self.topology.device)
            with ExitStack() as stack:  # what is open when another part fails to open is closed
                if self.options.memory:
                    stack.enter_context(_memory(self._file("memory", "pickle")))
                if self.options.kind == "torch":
                    stack.enter_context(_trace(self._file("trace", "json.gz"), self.topology.device))
                if self.options.kind == "nsight":
                    stack.enter_context(_capture())
                stack.enter_context(recording(self._recorder()))
                self._window = stack.pop_all()

    def _file(self, what: str, ending: str) -> Path:
        self._folder.mkdir(exist_ok=True)
        return self._folder / f"{what}_rank{self.topology.rank}.{ending}"

    def _recorder(self) -> Recorder:
        shown = {"nsight": torch.cuda.nvtx.range, "torch": torch.profiler.record_function, "none": nullcontext}[self.options.kind]
        clock = self._clock

        @contextmanager
        def both(name: str) -> Iterator[None]:
            with shown(name), clock(name):
                yield

        return both

    def on_iteration(self, event: Event) -> None:
        if self._window is not None:
            event.passes.update(self._clock.read())
            if event.iteration + 1 >= self.options.stop:
                self.close()

    def close(self) -> None:
        if self._window is not None:
            window, self._window = self._window, None
            window.close()


@contextmanager
def _capture() -> Iterator[None]:
    """What Nsight's --capture-range=cudaProfilerApi waits for. Work from before the window, and work left of it, stays on its own side."""
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        try:
            yield
        finally:
            torch.cuda.synchronize()


@contextmanager
def _trace(path: Path, device: torch.device) -> Iterator[None]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))


@contextmanager
def _memory(path: Path) -> Iterator[None]:
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
