"""Memory of this process as Linux has it (proc(5), /proc/self/status)."""

from __future__ import annotations

import ctypes
from pathlib import Path

M_MMAP_THRESHOLD, SMALL = -3, 65536
"""Of mallopt(3), and the size from which a block is a mapping of its own."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status() -> dict[str, int]:
    fields = (line.split() for line in STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in fields if words[-1] == "kB"}


def resident() -> int:
    """Bytes of memory of its own. Pages of program files are left out: they come in as code is first run."""
    return _status()["RssAnon"]


def peak() -> int:
    """The most of it since `forget_peak`; the kernel keeps it, so that nothing short is missed."""
    status = _status()
    return status["VmHWM"] - status["RssFile"] - status["RssShmem"]


def forget_peak() -> None:
    """Let the peak begin anew."""
    CLEAR.write_text("5")


def return_freed_memory() -> None:
    """Have the allocator give every larger block back when it is freed: what is resident is then in use, not kept for later. Slower."""
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL):
        raise OSError("mallopt refuses M_MMAP_THRESHOLD")
