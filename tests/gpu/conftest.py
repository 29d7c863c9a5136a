"""What the tests on a GPU share: a process that is the only rank of a run over NCCL, or gloo where a CPU rehearses."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cosmos_mp.config import ParallelConfig
from cosmos_mp.parallel.topology import Topology, join


def forget_groups() -> None:
    """End whatever groups this process has; the next `join` or `single_process` makes new ones."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.fixture
def join_alone(monkeypatch) -> Iterator[Callable[..., Topology]]:
    """`join_alone(**parallel)`: the topology of a run of one rank, over NCCL; all of one test have one layout of ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    if not torch.cuda.is_available():  # oneDNN's bfloat16 Conv3d can give NaN as the gradient of its weight
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    forget_groups()
    yield lambda **options: join(ParallelConfig(**options))
    forget_groups()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """Small runs of KD and DMD2: tests/distributed/runs.py."""
    return load(Path(__file__).parents[1] / "distributed" / "runs.py")


@pytest.fixture(scope="session")
def pictures() -> ModuleType:
    """Frames of many kinds and cv2's edges of them: tests/kernels/test_canny.py."""
    return load(Path(__file__).parents[1] / "kernels" / "test_canny.py")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
