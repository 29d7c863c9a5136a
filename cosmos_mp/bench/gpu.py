"""`bench gpu`: our kernels beside torch's eager and compiled operators, and one block of the network, on one GPU. Not run on a GPU yet.

Sizes are the 7B's on one rank of CP8. Copy bandwidth and the rate of matrix products are measured first, and every time is told as a share
of them. A call is timed twice: alone, with an emptied L2 cache and with what its launches cost the host beyond the time in which the cache
is emptied (some 80 us), and inside a CUDA graph over so many copies of its inputs that none stays in the cache. GB/s count the bytes that a
call must move: what a kernel reads again comes from L2 at these sizes, so that dmd2_loss and gan_head may show more than the copy. Before
it is timed, a result is compared with the same computation in float64 (a block's: float32) on the same inputs: no wrong kernel shows a good
time.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from cosmos_mp.backends import choice
from cosmos_mp.bench.gpu_rows import Missing, Row, Run, Side, Sizes, rows
from cosmos_mp.bench.parallel import markdown
from cosmos_mp.config import ConfigError
from cosmos_mp.kernels import using
from cosmos_mp.kernels.language import triton
from cosmos_mp.revision import revision

Timer = Callable[[Run, float], list[float]]
"""Milliseconds of every repetition of a call, of which there are as many as fit into so many milliseconds."""
CACHES = 3
"""The copies of a call's inputs fill so many L2 caches."""


def bench_gpu(fast: bool = False, limit: float = math.inf) -> dict[str, Any]:
    """Measure everything on the first GPU and print it.

    Args:
        fast: each time measured for a fifth as long.
        limit: seconds after which nothing more is begun; what is left out is said.

    Raises:
        ConfigError: there is no GPU, or the kernels do not run on it.
    """
    check_gpu()
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # what is compared with is float32
    sizes, milliseconds, deadline = Sizes(), 20.0 if fast else 100.0, time.monotonic() + limit
    found = machine() | {"ceilings": ceilings("cuda", sizes, events, milliseconds)}
    print(f"{found['gpu']}, {ceiling_words(found['ceilings'])}", flush=True)
    found |= measure(rows("cuda", sizes, compiled), found["ceilings"], events, graph_times, milliseconds, deadline)
    print("\n" + table(found))
    return found


def check_gpu() -> None:
    """Raises ConfigError, with the remedy, where nothing can be measured."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "bench gpu needs a GPU, and torch sees none: run it on a machine with one, in an environment whose torch has CUDA"
        )
    if triton is None:
        raise ConfigError("bench gpu measures Triton's kernels, and Triton is not installed: pip install triton")
    if triton.knobs.runtime.interpret:
        raise ConfigError("bench gpu measures compiled kernels, and TRITON_INTERPRET is set: unset it")


def machine() -> dict[str, Any]:
    """What it is measured on, and by which commit."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    version, missing = choice.found()
    return {
        "date": str(date.today()),
        "commit": revision(),
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformer_engine": missing if version is None else str(version),
    }


def compiled(function: Callable) -> Callable:
    """torch.compile for one set of shapes. A backward pass that runs again needs its inputs whole: no buffer is given away."""
    import torch._functorch.config as config

    config.donated_buffer = False
    return torch.compile(function, dynamic=False)


# --- Timing ---


def events(run: Run, milliseconds: float) -> list[float]:
    """Milliseconds of every repetition by the GPU's own clock, with an emptied L2 cache before each."""
    return triton.testing.do_bench(run, warmup=25, rep=milliseconds, return_mode="all")


def host_clock(run: Run, milliseconds: float) -> list[float]:
    """Milliseconds of every repetition by the host's clock, after one that warms up; at least three."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < milliseconds:
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def graph_times(make: Callable[[], Run], least_bytes: float, milliseconds: float) -> list[float]:
    """Milliseconds of a call in each replay of a CUDA graph, in which calls on several copies of the inputs take turns."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(64, math.ceil(CACHES * cache / least_bytes)))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward pass runs on the stream of its forward
        runs = [make() for _ in range(copies)]
        for run in runs:
            run()
    stream.synchronize()
    kept: list[Any] = [None] * copies  # results that are alive have memory of their own
    with torch.cuda.graph(graph, stream=stream):
        for number in range(4 * copies):
            kept[number % copies] = runs[number % copies]()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times: list[float] = []
    graph.replay()
    while len(times) < 5 or sum(times) * 4 * copies < milliseconds:
        marks[0].record()
        graph.replay()
        marks[1].record()
        torch.cuda.synchronize()
        times.append(marks[0].elapsed_time(marks[1]) / (4 * copies))
    return times


def summary(times: Sequence[float], row: Row, limits: dict[str, Any]) -> dict[str, Any]:
    """Median and spread of milliseconds, in microseconds, and rates with their shares of the measured ceilings."""
    fifths = quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    low, middle, high = (1e3 * fifths[place] for place in (1, 4, 7))
    told = {"median_us": middle, "p20_us": low, "p80_us": high, "repetitions": len(times)}
    if row.least_bytes is not None:
        told["gb_per_s"] = row.least_bytes / middle / 1e3
        told["share_of_copy"] = told["gb_per_s"] / limits["copy"]["gb_per_s"]
    if row.flops is not None:
        told["tflops"] = row.flops / middle / 1e6
        told["share_of_product"] = told["tflops"] / limits["product"]["tflops"]
    return told


def ceilings(device: str, sizes: Sizes, timer: Timer, milliseconds: float) -> dict[str, Any]:
    """Bytes per second of a copy on the device, read and written, and FLOP/s of a bfloat16 product of random matrices."""
    source = torch.randint(0, 256, (sizes.copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).bfloat16() for _ in range(2))
    copy = Row("copy", {}, list, 0.0, least_bytes=2 * sizes.copied)
    product = Row("product", {}, list, 0.0, flops=2 * sizes.matrix**3)
    itself = {"copy": {"gb_per_s": math.inf}, "product": {"tflops": math.inf}}
    told = {
        "copy": summary(timer(lambda: [target.copy_(source)], milliseconds), copy, itself),
        "product": summary(timer(lambda: [a @ b], milliseconds), product, itself),
    }
    return {name: {key: value for key, value in row.items() if not key.startswith("share")} for name, row in told.items()}


# --- Measuring ---


def measure(
    rows: Sequence[Row],
    limits: dict[str, Any],
    timer: Timer,
    in_graph: Callable[[Callable[[], Run], float, float], list[float]],
    milliseconds: float,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """`rows`: errors and times of every side of every row, or why there is none; `mistakes`: what makes the run a failure, in words.

    A side that fails is recorded and the others go on. It is a mistake where it computes something else, or where it is our own code and
    what it needs is there. An interrupt ends the measurement, which is a mistake too, and what was found until then is kept.
    """
    told, mistakes = {}, []
    for row in rows:
        print(row.name, flush=True)
        told[row.name] = {"least_bytes": row.least_bytes, "flops": row.flops, "sides": {}}
        try:
            _sides(row, told[row.name]["sides"], mistakes, limits, timer, in_graph, milliseconds, deadline)
        except KeyboardInterrupt:
            mistakes.append(f"{row.name}: interrupted, and nothing after it was measured")
            break
    return {"rows": told, "mistakes": mistakes}


def _sides(row: Row, told: dict, mistakes: list[str], limits: dict, timer: Timer, in_graph: Callable, ms: float, deadline: float) -> None:
    """Fill in what is found for every side of a row."""
    exact: Sequence[Tensor] | None = None
    for name, side in row.sides.items():
        found = told[name] = {}
        try:
            if time.monotonic() > deadline:
                raise Missing("left out: the time is over")
            if exact is None:
                with using("torch"):
                    exact = row.exact()
            with using(side.kernels):
                run = side.make()
                found["error"] = error(run(), exact)
                if not found["error"] <= row.loose.get(name, row.tolerance):  # nor is NaN
                    mistakes.append(f"{row.name}, {name}: error {found['error']:.1e}")
                if side.host:  # no share of what a GPU reaches
                    found |= summary(host_clock(run, ms), replace(row, least_bytes=None, flops=None), limits)
                else:
                    found |= summary(timer(run, ms), row, limits)
        except Missing as reason:
            found["missing"] = str(reason)
        except Exception as reason:  # whatever it is: the other sides are to be measured
            found["failed"] = _words(reason)
            if side.own:
                mistakes.append(f"{row.name}, {name}: {found['failed']}")
        else:
            if row.graphs:
                found["graph"] = _in_graph(row, side, limits, in_graph, ms)


def _in_graph(row: Row, side: Side, limits: dict[str, Any], timer: Callable, milliseconds: float) -> dict[str, Any]:
    try:
        with using(side.kernels):
            return summary(timer(side.make, row.least_bytes, milliseconds), row, limits)
    except Exception as reason:  # what cannot be captured has been timed alone
        return {"failed": _words(reason)}


def _words(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}".strip().splitlines()[0][:300]


def error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of all tensors the largest error of an element, relative to the tensor's largest; NaN where one has any."""
    errors = [(a.detach().to(b) - b).abs().max() / b.abs().max() for a, b in zip(got, exact, strict=True)]
    return torch.stack([value.double() for value in errors]).max().item()


# --- Table ---


def ceiling_words(limits: dict[str, Any]) -> str:
    """What everything is a share of."""
    return f"copy {limits['copy']['gb_per_s']:.0f} GB/s, bf16 product {limits['product']['tflops']:.0f} TFLOP/s"


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, with what was not measured and why below."""
    head = f"on one {found['gpu']}: {ceiling_words(found['ceilings'])}"
    lines = [[head, "", "us", "p20", "p80", "GB/s or TFLOP/s", "of the copy or product", "us in a graph", "GB/s", "of the copy", "error"]]
    words = []
    for row, told in found["rows"].items():
        for name, side in told["sides"].items():
            reason = side.get("missing") or side.get("failed")
            if reason:
                words.append(f"- {row}, {name}: {reason}")
            cells = [*_times(side, ("median_us", "p20_us", "p80_us")), *_rates(side)]
            graph = side.get("graph", {})
            if "failed" in graph:
                words.append(f"- {row}, {name}, in a graph: {graph['failed']}")
            cells += [*_times(graph, ("median_us",)), *_rates(graph)]
            lines.append([row, name, *cells, f"{side['error']:.1e}" if "error" in side else ""])
    words += [f"- WRONG: {mistake}" for mistake in found["mistakes"]]
    return markdown(lines) + ("\n\n" + "\n".join(words) if words else "")


def _times(side: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{side[name]:.1f}" if name in side else "" for name in names]


def _rates(side: dict[str, Any]) -> list[str]:
    for rate, share in (("gb_per_s", "share_of_copy"), ("tflops", "share_of_product")):
        if rate in side:
            return [f"{side[rate]:.0f}", f"{side[share]:.2f}"]
    return ["", ""]
