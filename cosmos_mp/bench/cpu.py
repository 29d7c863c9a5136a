"""`bench cpu`: ours beside what a user would otherwise run, on this machine's CPU. Each ratio is of one process; the two take turns."""

from __future__ import annotations

import os
import platform
import time
import types
from collections.abc import Callable
from datetime import date
from statistics import median
from typing import Any

import cv2
import diffusers.models.transformers.transformer_cosmos as transformer_cosmos
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from torch import Tensor, nn

from cosmos_mp.bench.meters import TensorMemory
from cosmos_mp.bench.parallel import markdown
from cosmos_mp.config import NetConfig
from cosmos_mp.convert.hf_names import configs, to_huggingface
from cosmos_mp.kernels.canny import canny
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss
from cosmos_mp.kernels.gan_head import gan_loss, head_logits
from cosmos_mp.models.dit import NetInput
from cosmos_mp.models.weights import named_weights
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.revision import revision
from cosmos_mp.roles import new_transfer_net

Work = Callable[[], Any]


def bench_cpu(fast: bool = False) -> dict[str, Any]:
    """Measure everything on this machine and print it.

    Args:
        fast: small sizes, each time measured once.
    """
    found: dict[str, Any] = {
        "date": str(date.today()),
        "commit": revision(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "rows": {},
    }
    threads_before = torch.get_num_threads()
    try:
        for name, ours, baseline, threads in comparisons(fast):
            print(name, flush=True)
            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)
            found["rows"][name] = {"threads": threads} | compare(ours, baseline, repeats=1 if fast else 7)
    finally:
        torch.set_num_threads(threads_before)
        cv2.setNumThreads(-1)
    print("\n" + table(found))
    return found


def comparisons(fast: bool) -> list[tuple[str, Work, Work, int]]:
    """Name, ours, baseline and threads."""
    blocks, stock = _blocks(fast)
    loss, eager_loss = _loss((16, 4, 8, 8) if fast else (16, 16, 88, 160))
    head, eager_head = _head((2, 16, 2, 4, 4) if fast else (2, 320, 8, 22, 40))
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3) if fast else (16, 704, 1280, 3), dtype=np.uint8)
    frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in frames])
    return [
        ("DiT blocks, forward + backward, against diffusers", blocks, stock, 2),
        *(
            (f"canny, {threads} thread(s), against cv2", lambda: canny(torch.from_numpy(frames), 100, 200), lambda: _cv2(frames), threads)
            for threads in (1, 2)
        ),
        ("DMD2 loss, forward + backward, against the reference's formula", loss, eager_loss, 2),
        ("GAN head's end and loss, forward + backward, against its layers", head, eager_head, 2),
    ]


def compare(ours: Work, baseline: Work, repeats: int) -> dict[str, Any]:
    """Seconds and peak of tensor memory of both, and their ratios; median over rounds that take turns, after one that warms up."""
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    for attempt in range(repeats + 1):
        for name, work in (("ours", ours), ("baseline", baseline)):
            began = time.perf_counter()
            work()
            if attempt:
                seconds[name].append(time.perf_counter() - began)
    found: dict[str, Any] = {}
    for name, work in (("ours", ours), ("baseline", baseline)):
        with TensorMemory() as memory:
            work()
        found[name] = {"seconds": median(seconds[name]), "all_seconds": seconds[name], "working_bytes": memory.peak}
    ratios = {"seconds": median(a / b for a, b in zip(seconds["ours"], seconds["baseline"], strict=True))}
    if found["baseline"]["working_bytes"]:
        ratios["working_bytes"] = found["ours"]["working_bytes"] / found["baseline"]["working_bytes"]
    return found | {"ratios": ratios}


# --- What is compared ---


def _blocks(fast: bool) -> tuple[Work, Work]:
    """The base network with one set of weights, ours and diffusers', checked against each other first."""
    hidden, heads, blocks = (96, 4, 2) if fast else (512, 8, 4)
    sizes = {"hidden": hidden, "heads": heads, "blocks": blocks, "mlp_hidden": 4 * hidden}
    net = NetConfig(**sizes, control_blocks=1, adaln_lora_dim=64, text_dim=128, control_mlp=(16,), max_latent=(16, 64, 64))
    frames, height, width, tokens = (2, 8, 8, 16) if fast else (4, 32, 32, 128)
    network = new_transfer_net(net, single_process(), seed=0)
    with torch.no_grad():  # what training starts from at zero would hide what it multiplies
        draw = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    stock = CosmosTransformer3DModel(**configs(net)["transformer"])
    stock.load_state_dict(to_huggingface(named_weights(network))["transformer"], strict=True)
    for block in stock.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-6
    x, text = torch.randn(1, 16, frames, height, width, generator=draw), torch.randn(1, tokens, net.text_dim, generator=draw)
    given, padding = torch.zeros(1, 1, frames, height, width), torch.zeros(1, 1, 8 * height, 8 * width)
    timestep, fps = torch.tensor([0.3]), torch.tensor([24.0])
    call = NetInput(x, timestep, text, None, given, padding[0], fps)
    shared = {"timestep": timestep, "encoder_hidden_states": text, "condition_mask": given, "padding_mask": padding, "fps": 24}

    def stock_out() -> Tensor:
        return stock(hidden_states=x, **shared, return_dict=False)[0]

    def step(module: nn.Module, out: Callable[[], Tensor]) -> None:
        out().square().mean().backward()
        module.zero_grad(set_to_none=True)

    _without_torchvision()
    with torch.no_grad():
        torch.testing.assert_close(network.base(call).out, stock_out(), rtol=1e-3, atol=1e-4)
    return lambda: step(network, lambda: network.base(call).out), lambda: step(stock, stock_out)


def _without_torchvision() -> None:
    """diffusers resizes the padding mask with torchvision, which has no build beside this torch; nearest is nearest."""

    def resize(image: Tensor, size: list[int], interpolation: object) -> Tensor:
        return F.interpolate(image, size=size, mode="nearest")

    functional, modes = types.SimpleNamespace(resize=resize), types.SimpleNamespace(NEAREST="nearest")
    transformer_cosmos.transforms = types.SimpleNamespace(functional=functional, InterpolationMode=modes)


def _loss(shape: tuple[int, int, int, int]) -> tuple[Work, Work]:
    """From raw outputs to the gradient at the generated latent."""
    y, eps, conditional, unconditional, fake = (torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(5))
    sigma = torch.tensor([3.0])
    xt, total = y + sigma * eps, sigma**2 + 0.25
    c_skip, c_out = 0.25 / total, sigma * 0.5 / total.sqrt()
    y.requires_grad_()

    def ours() -> None:
        outputs = Outputs(conditional, unconditional, fake)
        loss, _ = dmd2_loss(y, xt, outputs, c_skip, c_out, 5.0, lambda error_BT: error_BT.mean(dim=1, keepdim=True))
        torch.autograd.grad(loss, y)

    def reference() -> None:
        """In noise form, each network through its preconditioning, as the published code has it."""
        noises = [(xt - (c_skip * xt + c_out * out)) / sigma for out in (conditional, unconditional, fake)]
        teacher = noises[0] + 5.0 * (noises[0] - noises[1])
        weight = sigma / (eps - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        with torch.no_grad():
            target = y - weight * (-noises[2] / sigma + teacher / sigma)
        torch.autograd.grad(0.5 * F.mse_loss(y, target), y)

    return ours, reference


def _head(shape: tuple[int, ...]) -> tuple[Work, Work]:
    """From the first convolution's output to the gradients at it and at the parameters; half of the batch is fake."""
    norm, out = nn.GroupNorm(8, shape[1]), nn.Conv3d(shape[1], 1, 1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last_3d).requires_grad_()
    leaves, fakes = (x, *norm.parameters(), *out.parameters()), shape[0] // 2

    def ours() -> None:
        logits = head_logits(x, norm.weight, norm.bias, out.weight, out.bias)
        torch.autograd.grad(gan_loss(logits[:, None], fakes), leaves)

    def layers() -> None:
        logits = out(F.leaky_relu(norm(x), 0.01)).mean(dim=(1, 2, 3, 4))
        loss = F.softplus(logits[:fakes]).mean() + F.softplus(-logits[fakes:]).mean()
        torch.autograd.grad(loss, leaves)

    return ours, layers


def _cv2(frames: np.ndarray) -> list[np.ndarray]:
    return [cv2.Canny(frame, 100, 200) for frame in frames]


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [["on a CPU", "ms", "baseline ms", "ratio", "MB at work", "baseline MB", "ratio"]]
    for name, row in found["rows"].items():
        times = [f"{row[side]['seconds'] * 1e3:.1f}" for side in ("ours", "baseline")]
        counted = "working_bytes" in row["ratios"]
        memory = [f"{row[side]['working_bytes'] / 1e6:.1f}" if counted else "" for side in ("ours", "baseline")]
        ratios = [f"{row['ratios']['seconds']:.2f}", f"{row['ratios']['working_bytes']:.2f}" if counted else ""]
        rows.append([name, *times, ratios[0], *memory, ratios[1]])
    return markdown(rows)
