"""Where this process stands: rank, device and megatron-core's process groups, carried into the code as one object."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Topology:
    """Place of this process in the run.

    Attributes:
        rank, world: this process among all.
        device: where its networks live.
        tp_group: tensor-parallel group; the linear layers are built on it.
    """

    rank: int
    world: int
    device: torch.device
    tp_group: dist.ProcessGroup


def rank_and_world() -> tuple[int, int]:
    """Rank and world size from torchrun's variables, else Slurm's, else a single process."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def single_process() -> Topology:
    """Groups of size one for this process alone, however many run beside it. Safe to call again."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1, create_gloo_process_groups=False)
    rank, world = rank_and_world()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    return Topology(rank, world, device, parallel_state.get_tensor_model_parallel_group())
