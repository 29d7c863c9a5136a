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
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from statistics import quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_mp.backends import Backend, choice, weights_changed
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.bench.parallel import markdown
from cosmos_mp.config import ConfigError, NetConfig
from cosmos_mp.kernels import using
from cosmos_mp.kernels.adaln import adaln, adaln_torch
from cosmos_mp.kernels.canny import canny, canny_torch, library
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss, dmd2_loss_torch
from cosmos_mp.kernels.gan_head import EPS, GROUPS, gan_loss, gan_loss_torch, head_logits, head_logits_torch
from cosmos_mp.kernels.language import triton
from cosmos_mp.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_torch
from cosmos_mp.models.block import Block
from cosmos_mp.models.embeddings import rope_angles, rotation
from cosmos_mp.models.weights import load_weights, named_weights
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.plan.cost import block_work
from cosmos_mp.revision import revision

Run = Callable[[], Sequence[Tensor]]
"""One call of what is timed; the tensors that it computes."""
Timer = Callable[[Run, float], list[float]]
"""Milliseconds of every repetition of a call, of which there are as many as fit into so many milliseconds."""
Compiler = Callable[[Callable], Callable]

CACHES = 3
"""The copies of a call's inputs fill so many L2 caches."""


class Missing(RuntimeError):
    """Something that a row needs is not installed here, which is no mistake."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        grid: patches (T, H/2, W/2) of a rank; their number is that of its tokens.
        latent: (C, T, H, W) of a rank's part of a clip; features: output of the discriminator's first convolution, (B, C, T, H, W).
        frames: (F, H, W, C) of the frames whose edges are found.
        copied: bytes of the buffer that is copied; matrix: side of the square product.
    """

    net: NetConfig = NetConfig()
    grid: tuple[int, int, int] = (2, 44, 80)
    text_tokens: int = 512
    latent: tuple[int, int, int, int] = (16, 2, 88, 160)
    features: tuple[int, int, int, int, int] = (2, 320, 1, 22, 40)
    frames: tuple[int, int, int, int] = (16, 704, 1280, 3)
    copied: int = 1 << 30
    matrix: int = 8192


class Side(NamedTuple):
    """One way to compute a row.

    Attributes:
        make: a call on tensors of its own. Raises Missing where it cannot run here.
        kernels: which versions of our kernels run.
        host: timed by the host's clock, since it does not run on the GPU.
    """

    make: Callable[[], Run]
    kernels: str = "torch"
    host: bool = False


@dataclass(frozen=True)
class Row:
    """What is computed, in several ways.

    Attributes:
        exact: the same tensors in higher precision.
        tolerance: an error above it is a mistake; `loose` has the sides that may err more.
        least_bytes: what must be read and written; flops: what must be computed.
        graphs: whether calls are timed in a CUDA graph too.
    """

    name: str
    sides: dict[str, Side]
    exact: Callable[[], Sequence[Tensor]]
    tolerance: float
    least_bytes: float | None = None
    flops: float | None = None
    graphs: bool = False
    loose: dict[str, float] = field(default_factory=dict)


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


# --- Rows ---


def measure(
    rows: Sequence[Row],
    limits: dict[str, Any],
    timer: Timer,
    in_graph: Callable[[Callable[[], Run], float, float], list[float]],
    milliseconds: float,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """`rows`: errors and times of every side of every row, or why there is none; `mistakes`: what makes the run a failure, in words.

    A side that fails is recorded and the others go on. It is a mistake where it computes something else, or where it is ours and what it
    needs is there. An interrupt ends the measurement, which is a mistake too, and what was found until then is kept.
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
            if name == "ours":
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


def rows(device: str, sizes: Sizes, compiler: Compiler) -> list[Row]:
    """All rows, in the order of the table."""
    draw = partial(_draw, device=device)
    kernels = [*_adaln(draw, sizes), *_qk_norm_rope(draw, sizes), _dmd2_loss(draw, sizes), _gan_head(draw, sizes)]
    return [*(kernel.row(compiler) for kernel in kernels), _canny(device, sizes), _block(draw, sizes, compiler)]


def _draw(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


@dataclass(frozen=True)
class Kernel:
    """A pass of one of our kernels.

    Attributes:
        ours, plain: the function, and its plain-torch version, from `inputs` to a tuple of tensors.
        inputs: those that require gradients get some. gradients: what comes back at the outputs.
        passes: what is timed: forward, backward, or both.
        least_bytes: what these must read and write by the formula in the kernel's file; what a cache holds meanwhile is not in it.
    """

    name: str
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    passes: str
    least_bytes: float
    tolerance: float = 2e-2

    def row(self, compiler: Compiler) -> Row:
        """The comparison of both with what a compiler makes of the plain one."""
        optimised = compiler(self.plain)
        return Row(
            name=f"{self.name}, {self.passes}",
            sides={
                "ours": Side(lambda: self.call(self.ours), "triton"),
                "eager": Side(lambda: self.call(self.plain)),
                "torch.compile": Side(lambda: self.call(optimised)),
            },
            exact=lambda: self.call(self.plain, torch.float64)(),
            tolerance=self.tolerance,
            least_bytes=self.least_bytes,
            graphs=True,
        )

    def call(self, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype | None = None) -> Run:
        """The passes on copies of the inputs, in a type of their own or all in `dtype`."""
        inputs = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_(x.requires_grad) for x in self.inputs]
        leaves = [x for x in inputs if x.requires_grad]
        gradients = [g.to(dtype or g.dtype) for g in self.gradients]
        if self.passes == "forward":
            return lambda: function(*inputs)
        if self.passes == "backward":
            out = function(*inputs)
            return lambda: torch.autograd.grad(out, leaves, gradients, retain_graph=True)

        def both() -> Sequence[Tensor]:
            out = function(*inputs)
            return (*out, *torch.autograd.grad(out, leaves, gradients))

        return both


def _adaln(draw: Callable[..., Tensor], sizes: Sizes) -> list[Kernel]:
    tokens, width = math.prod(sizes.grid), sizes.net.hidden
    h, y, dr, dx = (draw(tokens, 1, width, seed=seed) for seed in range(4))
    vectors = [draw(1, width, seed=seed) for seed in range(4, 7)]
    inputs = tuple(x.requires_grad_() for x in (h, y, *vectors))
    least = {"forward": 4 * h.nbytes, "backward": 6 * h.nbytes}
    return [Kernel("adaln", adaln, adaln_torch, inputs, (dr, dx), passes, least[passes]) for passes in least]


def _rotation(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    net = sizes.net
    fps = torch.tensor([net.base_fps], device=device)
    angles = rope_angles(*sizes.grid, net.head_dim, fps_B=fps, ratio=net.rope_ratio, theta=net.rope_theta, base_fps=net.base_fps)
    return rotation(angles)


def _qk_norm_rope(draw: Callable[..., Tensor], sizes: Sizes) -> list[Kernel]:
    net = sizes.net
    x, gradient = (draw(math.prod(sizes.grid), 1, net.heads, net.head_dim, seed=seed) for seed in range(2))
    inputs = (x.requires_grad_(), (1 + 0.1 * draw(net.head_dim, seed=2)).requires_grad_(), *_rotation(sizes, x.device))

    def ours(*given: Tensor) -> tuple[Tensor, ...]:
        return (qk_norm_rope(*given),)

    def plain(*given: Tensor) -> tuple[Tensor, ...]:
        return (qk_norm_rope_torch(*given),)

    turns = sum(value.nbytes for value in inputs[2:]) / 2  # of which the halves are equal
    least = {"forward": 2 * x.nbytes + turns, "backward": 3 * x.nbytes + turns}
    return [Kernel("qk_norm_rope", ours, plain, inputs, (gradient,), passes, least[passes]) for passes in least]


def _dmd2_loss(draw: Callable[..., Tensor], sizes: Sizes) -> Kernel:
    y, eps = (draw(1, *sizes.latent, seed=seed, dtype=torch.float32) for seed in range(2))
    outputs = [draw(1, *sizes.latent, seed=seed) for seed in range(2, 5)]
    sigma = torch.full((1,), 3.0, device=y.device)
    total = sigma**2 + 0.25
    inputs = (y.requires_grad_(), (y + sigma * eps).detach(), *outputs, 0.25 / total, 0.5 * sigma / total.sqrt())

    def version(loss: Callable[..., tuple[Tensor, Tensor]], *given: Tensor) -> tuple[Tensor, ...]:
        y, xt, conditional, unconditional, fake, c_skip, c_out = given
        return loss(y, xt, Outputs(conditional, unconditional, fake), c_skip, c_out, 5.0, _over_the_clip)[:1]

    least = 5 * y.nbytes + 3 * outputs[0].nbytes
    one = (torch.ones((), device=y.device),)
    return Kernel("dmd2_loss", partial(version, dmd2_loss), partial(version, dmd2_loss_torch), inputs, one, "both", least, 1e-4)


def _over_the_clip(error_BT: Tensor) -> Tensor:
    return error_BT.mean(dim=1, keepdim=True)


def _gan_head(draw: Callable[..., Tensor], sizes: Sizes) -> Kernel:
    """The sample of each half of the batch is fake, then real. No value lies where the slope of the activation would depend on rounding."""
    batch, channels, *_ = sizes.features
    weight, bias, out_weight = 1 + 0.1 * draw(channels, seed=1), 0.1 * draw(channels, seed=2), draw(channels, seed=3)
    x = draw(*sizes.features, seed=0)
    y = F.group_norm(x.double(), GROUPS, weight.double(), bias.double(), EPS)
    x = torch.where(y.abs() < 1e-3, x + 0.05, x).to(memory_format=torch.channels_last_3d)
    inputs = tuple(v.requires_grad_() for v in (x, weight, bias, out_weight, draw(1, seed=4)))

    def ours(*given: Tensor) -> tuple[Tensor, ...]:
        return (gan_loss(head_logits(*given)[:, None], batch // 2),)

    def plain(*given: Tensor) -> tuple[Tensor, ...]:
        return (gan_loss_torch(head_logits_torch(*given)[:, None], batch // 2),)

    one = (torch.ones((), device=x.device),)
    return Kernel("gan_head", ours, plain, inputs, one, "both", 4 * x.nbytes)


def _block(draw: Callable[..., Tensor], sizes: Sizes, compiler: Compiler) -> Row:
    """One block of the network, forward and backward to its input and all of its weights; attention is over the rank's tokens alone."""
    net, tokens = sizes.net, math.prod(sizes.grid)
    group = single_process().tp_group
    h, gradient = (draw(tokens, 1, net.hidden, seed=seed) for seed in range(2))
    position, text = draw(tokens, 1, net.hidden, seed=2), draw(sizes.text_tokens, 1, net.text_dim, seed=3)
    conditioning, shared = draw(1, net.hidden, seed=4), draw(1, 3 * net.hidden, seed=5)
    turn = _rotation(sizes, h.device)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in named_weights(Block(net, LocalBackend(group))).items()}
    weights = {}
    for number, (name, shape) in enumerate(shapes.items(), 10):
        value = draw(*shape, seed=number)
        weights[name] = value / shape[1] ** 0.5 if len(shape) > 1 else 1 + 0.1 * value

    def block(backend: Backend, dtype: torch.dtype = torch.bfloat16) -> Block:
        with torch.device("meta"):
            made = Block(net, backend)
        made = made.to(dtype).to_empty(device=h.device)
        load_weights(made, weights, "the benchmark")
        return made

    def call(made: nn.Module, forward: Callable, dtype: torch.dtype = torch.bfloat16) -> Run:
        own = h.to(dtype, copy=True).requires_grad_()
        beside = [x.to(dtype) for x in (position, text, conditioning, shared)]
        leaves = [own, *named_parameters(made).values()]

        def run() -> Sequence[Tensor]:
            weights_changed(made)  # FP8 weights are made anew in every step
            out = forward(own, beside[0], turn, *beside[1:])
            return (out, *torch.autograd.grad(out, leaves, gradient.to(dtype)))

        return run

    def ours(wrap: Compiler = lambda made: made, dtype: torch.dtype = torch.bfloat16) -> Run:
        made = block(LocalBackend(group), dtype)
        return call(made, wrap(made), dtype)

    def transformer_engine(fp8: bool) -> Run:
        version, missing = choice.found()
        if version is None:
            raise Missing(missing)
        from cosmos_mp.backends.transformer_engine import TransformerEngineBackend, use_fp8

        made = block(TransformerEngineBackend(net, group))
        if fp8:
            use_fp8(made, "current")
        return call(made, made)

    exact = torch.float64 if h.device.type == "cpu" else torch.float32  # in float64, attention would keep 13 GB for each of its steps
    return Row(
        name="one block, forward and backward",
        sides={
            "ours": Side(ours, "triton"),
            "eager": Side(ours),
            "torch.compile": Side(lambda: ours(compiler)),
            "Transformer Engine": Side(lambda: transformer_engine(False), "triton"),
            "Transformer Engine, FP8": Side(lambda: transformer_engine(True), "triton"),
        },
        exact=lambda: ours(dtype=exact)(),
        tolerance=0.1,
        flops=3 * block_work(net, tokens, sizes.text_tokens).total,
        loose={"Transformer Engine, FP8": 0.5},
    )


def named_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in one order for every backend."""
    return dict(sorted(network.named_parameters()))


def _canny(device: str, sizes: Sizes) -> Row:
    """Edges of smooth random frames. They are equal in every pixel, or wrong."""
    count, height, width, channels = sizes.frames
    small = torch.rand(count, channels, height // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(0))
    frames = F.interpolate(255 * small, size=(height, width), mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    low, high = 100, 200

    def with_cv2() -> Sequence[Tensor]:
        try:
            import cv2
        except ImportError as error:
            raise Missing(f"cv2 is not installed ({error})") from None
        return [torch.stack([torch.from_numpy(cv2.Canny(frame.numpy(), low, high)) for frame in frames])]

    def ours() -> Run:
        if library(device) is None:
            raise Missing(f"libcanny_{device}.so is not built: python setup.py build_ext --inplace, with nvcc and a torch with CUDA")
        there = frames.to(device)
        return lambda: [canny(there, low, high)]

    def plain() -> Run:
        there = frames.to(device)
        return lambda: [canny_torch(there, low, high)]

    return Row(
        name=f"canny, {count} frames",
        sides={"ours": Side(ours), "eager": Side(plain), "cv2 on the CPU": Side(lambda: with_cv2, host=True)},
        exact=lambda: [x.double() for x in with_cv2()],
        tolerance=0.0,
        least_bytes=frames.numel() + frames.numel() / channels,
    )


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
