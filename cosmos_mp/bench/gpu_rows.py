"""What `bench gpu` measures: each of our kernels and one block of the network, at the 7B's sizes on one rank of CP8."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_mp.backends import Backend, choice, weights_changed
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import NetConfig
from cosmos_mp.kernels.adaln import adaln, adaln_torch
from cosmos_mp.kernels.canny import canny, canny_torch, library
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss, dmd2_loss_torch
from cosmos_mp.kernels.gan_head import EPS, GROUPS, gan_loss, gan_loss_torch, head_logits, head_logits_torch
from cosmos_mp.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_torch
from cosmos_mp.models.block import Block
from cosmos_mp.models.embeddings import rope_angles, rotation
from cosmos_mp.models.weights import load_weights, named_weights
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.plan.cost import block_work

Run = Callable[[], Sequence[Tensor]]
"""One call of what is timed; the tensors that it computes."""
Compiler = Callable[[Callable], Callable]


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
        own: our code: where what it needs is there, failing is a mistake.
    """

    make: Callable[[], Run]
    kernels: str = "torch"
    host: bool = False
    own: bool = False


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
                "ours": Side(lambda: self.call(self.ours), "triton", own=True),
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

        run()  # layers keep state between calls, so that the second one is compared
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
            "ours": Side(ours, "triton", own=True),
            "eager": Side(ours),
            "torch.compile": Side(lambda: ours(compiler)),
            "Transformer Engine": Side(lambda: transformer_engine(False), "triton", own=True),
            "Transformer Engine, FP8": Side(lambda: transformer_engine(True), "triton", own=True),
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
        sides={"ours": Side(ours, own=True), "eager": Side(plain), "cv2 on the CPU": Side(lambda: with_cv2, host=True)},
        exact=lambda: [x.double() for x in with_cv2()],
        tolerance=0.0,
        least_bytes=frames.numel() + frames.numel() / channels,
    )
