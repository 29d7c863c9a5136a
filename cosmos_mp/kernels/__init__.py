"""Fused kernels: what is bound by memory traffic, in one pass each. One per file, beside its plain-torch version.

Each file has one public function that models and losses call. Which version runs is one word, `use`; nothing else in the code knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cosmos_mp.kernels.language import triton

_choice = "auto"


class KernelError(ValueError):
    """Kernels that cannot run here; the message names the option and the remedy."""


def use(choice: str) -> None:
    """Which versions run from now on, in this process.

    Args:
        choice: torch; triton; or auto = Triton for CUDA tensors in at most 32 bits, else torch.

    Raises:
        KernelError: Triton is asked for where it cannot run.
    """
    global _choice
    if choice == "triton":
        if triton is None:
            raise KernelError("kernels=triton, but Triton is not installed: pip install triton, or give kernels auto or torch")
        if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
            raise KernelError("kernels=triton needs a GPU, or TRITON_INTERPRET=1, which is slow and meant for tests; give kernels auto")
    _choice = choice


@contextmanager
def using(choice: str) -> Iterator[None]:
    """`use` for the time of a with block."""
    before = _choice
    use(choice)
    try:
        yield
    finally:
        use(before)


def fused(x: Tensor) -> bool:
    """Whether the Triton version is to run on a tensor like this."""
    if _choice == "auto":
        return x.is_cuda and triton is not None and x.dtype != torch.float64
    return _choice == "triton"
