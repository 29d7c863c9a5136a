"""Where this process stands: rank, device and megatron-core's process groups, carried into the code as one object."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cosmos_mp.config import BackendConfig, ConfigError, ParallelConfig
from cosmos_mp.parallel.layout import check_world
from cosmos_mp.parallel.watch import LostRank, Watch

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """Place of this process in the run. Ranks run over tp fastest, then cp, then dp.

    Attributes:
        rank, world: this process among all.
        device: where its networks live.
        tp_group: tensor-parallel ranks, which split matrices.
        cp_group: context-parallel ranks, which split clips along their latent frames.
        dp_group: data-parallel ranks, which see different samples.
        dp_cp_group: dp and cp together: the ranks over which gradients are averaged.
        mesh: the world as (replicate, shard, tp); FSDP shards over the middle one. None in a process that works for itself alone and
            whose networks are whole.
        options: what the run asks of its layout.
        backend: what it asks of the layers of its networks.
        cp_levels: with cp_attention=ulysses_ring the ranks of cp that trade heads with this one, and those with which it forms a ring.
        watch: what answers for this process while others ask who is lost; None until a stage sets it up.
    """

    rank: int
    world: int
    device: torch.device
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    mesh: DeviceMesh | None = None
    options: ParallelConfig = ParallelConfig()
    backend: BackendConfig = BackendConfig()
    cp_levels: tuple[dist.ProcessGroup, ...] = ()
    watch: Watch | None = None

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """One dimension for full sharding. Two would mean HSDP to `fully_shard`, so they are given for that alone."""
        return self.mesh["shard"] if self.mesh.shape[0] == 1 else self.mesh["replicate", "shard"]

    def on_first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something; every rank gets its result, or its error."""
        box: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.rank == 0 or self.mesh is None:
            try:
                box = [(work(), None)]
            except Exception as error:
                box = [(None, error)]
        if self.mesh is not None and self.world > 1:
            box = [(box[0][0], box[0][1] and _sendable(box[0][1]))]
            dist.broadcast_object_list(box, src=0)
        value, error = box[0]
        if error is not None:
            raise error
        return value


def _sendable(error: Exception) -> Exception:
    """The error, or its words where it cannot be sent: rank 0 would fail alone, and the others wait for it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def rank_and_world() -> tuple[int, int]:
    """Rank and world size from torchrun's variables, else Slurm's, else a single process."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def single_process() -> Topology:
    """Groups of size one for this process alone, however many run beside it. Safe to call again, and beside `join`."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = rank_and_world()
    group = _alone(dist.group.WORLD)
    return Topology(rank, world, _device(), group, group, group, group)


@cache
def _alone(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def join(options: ParallelConfig) -> Topology:
    """Meet the other processes of the run, which torchrun or Slurm started with MASTER_ADDR and MASTER_PORT. Safe to call again.

    Raises:
        ConfigError: tp and cp do not divide the number of processes; the message names what fits. Or this process has no GPU of its own.
        LostRank: not all of them came in time.
    """
    rank, world = rank_and_world()
    check_world(options, world)
    device = _device()
    if not dist.is_initialized():
        # NCCL's watchdog names the collective that it gave up, sleeps four times this long (60 s by default), and ends the process.
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", f"{1000 * options.grace / 5:.0f}")
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world == 1:  # a store of its own: nobody else needs a port
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            try:
                dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world, timeout=options.collective_timeout)
            except dist.DistError as error:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise LostRank(
                    f"rank {rank}: the {world} ranks did not meet at {where}, where rank 0 waits for them, within parallel.timeout="
                    f"{options.timeout:g} s: see what the missing ones say ({str(error).splitlines()[0][:300]})"
                ) from error
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=options.tp,
            context_parallel_size=options.cp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=options.collective_timeout / timedelta(minutes=1),
        )
    tp_group, cp_group = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    dp_group, dp_cp_group = (parallel_state.get_data_parallel_group(with_context_parallel=both) for both in (False, True))
    mesh = _mesh(device, options, dp_cp_group, tp_group)
    levels = _cp_levels(options)
    return Topology(rank, world, device, tp_group, cp_group, dp_group, dp_cp_group, mesh, options, cp_levels=levels)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place, there = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))), torch.cuda.device_count()
    if place >= there:
        raise ConfigError(
            f"this is process {place} of its node, from 0, and sees {there} GPU(s): start as many as CUDA_VISIBLE_DEVICES shows"
        )
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def _mesh(device: torch.device, options: ParallelConfig, dp_cp_group: dist.ProcessGroup, tp_group: dist.ProcessGroup) -> DeviceMesh:
    """Megatron's groups as one mesh. Megatron has none for shards of dp x cp that do not divide its experts: those are made here."""
    shards = options.shard or dp_cp_group.size()
    ranks = torch.arange(dist.get_world_size()).view(-1, shards, options.tp)
    shard_group = dp_cp_group if shards == dp_cp_group.size() else _groups_along(ranks, 1, "SHARD", options)
    groups = [_groups_along(ranks, 0, "REPLICATE", options), shard_group, tp_group]
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard", "tp"))


def _cp_levels(options: ParallelConfig) -> tuple[dist.ProcessGroup, ...]:
    """Groups of neighbours in cp that trade heads, and across them those that form a ring; none where no run asks for both."""
    if options.cp_attention != "ulysses_ring":
        return ()
    ranks = torch.arange(dist.get_world_size()).view(-1, options.cp // options.cp_ulysses, options.cp_ulysses, options.tp)
    return _groups_along(ranks, 2, "CP_ULYSSES", options), _groups_along(ranks, 1, "CP_RING", options)


def _groups_along(ranks: torch.Tensor, dimension: int, name: str, options: ParallelConfig) -> dist.ProcessGroup:
    """This rank's group among those that run along one dimension of a grid of all ranks. Every rank calls."""
    rows = ranks.movedim(dimension, -1).flatten(0, -2).tolist()
    return dist.new_subgroups_by_enumeration(rows, timeout=options.collective_timeout, group_desc=name)[0]
