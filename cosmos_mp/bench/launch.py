"""A measurement on ranks of its own: fresh processes under torchrun, one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Freed memory is kept for the next step instead of going back to the system page by page, which would be measured too.
KEEP = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def launch(world: int, name: str, *, keep: bool = True, **arguments: Any) -> list[dict[str, Any]]:
    """Answers of all ranks of a measurement of `bench.worker`, in order.

    Args:
        keep: whether freed memory stays with the processes: yes where time is measured, no where memory is.

    Raises:
        RuntimeError: it failed; the message has its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m"]
        command = [*start, "cosmos_mp.bench.worker", name, json.dumps(arguments), folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (KEEP if keep else RETURN)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{name} {arguments} on {world} processes failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
