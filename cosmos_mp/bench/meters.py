"""What is counted while code runs: bytes of collectives, peak of tensor memory, peak of process memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PAGE = Path("/proc/self")


SENT: dict[str, Callable[[int], float]] = {
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "send": lambda n: 1,
}
"""Bytes that a rank of n sends per byte of its input, as rings of ranks do it."""
OPERATORS: dict[str, tuple[str, int]] = {
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
}
"""The collective of an operator, and which of its arguments is the input."""
SILENT = {"c10d::recv_", "c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends, by collective; messages of a few numbers are the loop's agreements and are not counted."""

    FEW = 64

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and (name := func._schema.name) not in SILENT:
            kind, place = OPERATORS[name]  # a KeyError where one is not known: nothing may go uncounted
            tensors = _tensors(args[place])
            if sum(tensor.numel() for tensor in tensors) > self.FEW:
                self.sent[kind] += round(sum(tensor.nbytes for tensor in tensors) * SENT[kind](_ranks(args)))
        return func(*args, **(kwargs or {}))


def _ranks(args: tuple) -> int:
    """Size of the group that a collective is called with."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            return dist.ProcessGroup.unbox(arg).size() if arg._type().name() == "ProcessGroup" else 0
        if isinstance(arg, dist.ProcessGroup):
            return arg.size()
    return dist.distributed_c10d._resolve_process_group(args[-1]).size()


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class TensorMemory(TorchDispatchMode):
    """Peak of the memory of tensors that appear after the start; what was there before is not in it.

    Scratch space inside an operator is not seen; what FSDP frees and takes again by resizing is. (Torch's own tracker, in
    `torch.distributed._tools`, fails on recomputed blocks.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> TensorMemory:
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            before = storage.nbytes()
            resize(storage, size)
            if storage._cdata in self._sizes:
                self._sizes[storage._cdata] = size
            self._add(size - before)
            return storage

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._sizes.keys():  # neither a view nor seen before
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
                self._add(storage.nbytes())
        return found

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class ProcessMemory:
    """Peak of the process's resident memory beyond what it was when this was made (Linux)."""

    def __init__(self) -> None:
        self._start = _status("VmRSS")
        (PAGE / "clear_refs").write_text("5")  # the kernel's peak begins anew

    def read(self) -> int:
        """The peak so far."""
        return _status("VmHWM") - self._start


def _status(key: str) -> int:
    """Bytes."""
    line = next(line for line in (PAGE / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
