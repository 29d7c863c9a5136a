"""Triton where it is installed, and what a kernel of this folder says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for macOS and Windows; there the plain-torch versions run
    triton = tl = None


def jit(function: Callable) -> Any:
    """`triton.jit`; a function that cannot be launched where there is no Triton."""
    return function if triton is None else triton.jit(function)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Type in which a kernel computes: float32, or float64 where a tensor has it."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


TYPES = {} if tl is None else {torch.float32: tl.float32, torch.float64: tl.float64}
"""Triton's names of them."""


@dataclass(frozen=True)
class Shipped:
    """One launch of a kernel at the size of the 7B network, for the compiler ahead of time and for the audit of its traffic.

    Attributes:
        kernel: the jitted function.
        signature: Triton's type of every argument, in order; "constexpr" where `constants` has its value.
        constants: compile-time arguments.
        warps: of 32 threads, in each program.
        programs: in the launch.
        least_bytes: what the launch must at least read and write.
        registers: per thread, at most: the occupancy that `warps` is meant to have.
        scalars: accesses to global memory that are one number per program.
        aligned: whole-number arguments that are multiples of 16, besides all pointers.
        trips: how often a program runs the body of its loop, where it has one.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    programs: int
    least_bytes: float
    registers: int
    scalars: int = 0
    aligned: tuple[str, ...] = ()
    trips: float = 1
