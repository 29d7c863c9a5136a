"""Place of a process among all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cosmos_mp.config import ConfigError, ParallelConfig
from cosmos_mp.parallel import topology as module
from cosmos_mp.parallel.topology import Topology, join, rank_and_world, single_process

NAMES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "16"}, (5, 16)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "16"}, (3, 8)),
        ({"RANK": "3"}, (0, 1)),
        ({"RANK": "3", "SLURM_PROCID": "5", "SLURM_NTASKS": "16"}, (5, 16)),
    ],
)
def test_rank_and_world_from_torchrun_then_slurm(monkeypatch, values, expected):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert rank_and_world() == expected


def test_single_process_can_be_asked_again_and_keeps_its_rank(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    first, second = single_process(), single_process()
    assert (first.rank, first.world) == (2, 4)
    assert first.tp_group is second.tp_group and dist.get_world_size(first.tp_group) == 1
    assert first.mesh is None  # whose networks are whole, however many run beside it


def groups(topology: Topology) -> list[dist.ProcessGroup]:
    return [topology.tp_group, topology.cp_group, topology.dp_group, topology.dp_cp_group]


# --- Joining, in a run of one ---


def test_a_run_of_one_process_has_every_group_and_a_mesh():
    topology = join(ParallelConfig())
    assert (topology.rank, topology.world, topology.device) == (0, 1, torch.device("cpu"))
    assert [dist.get_world_size(group) for group in groups(topology)] == [1, 1, 1, 1]
    assert topology.mesh.mesh_dim_names == ("replicate", "shard", "tp") and tuple(topology.mesh.shape) == (1, 1, 1)
    assert topology.mesh["shard"].get_group() is topology.dp_cp_group and topology.mesh["tp"].get_group() is topology.tp_group


def test_joining_again_keeps_the_groups_and_takes_the_options():
    alone = single_process()
    first, second = join(ParallelConfig()), join(ParallelConfig(compute="bfloat16", reduce="micro_batch"))
    assert all(a is b for a, b in zip(groups(first), groups(second), strict=True))
    assert second.options == ParallelConfig(compute="bfloat16", reduce="micro_batch") != first.options
    assert single_process() == alone and alone.options == ParallelConfig()


def test_both_ways_in_a_fresh_process():
    """Either may come first; in this process it is long since decided."""
    code = "from cosmos_mp.config import ParallelConfig; from cosmos_mp.parallel.topology import join, single_process\n"
    code += "for topology in (single_process(), join(ParallelConfig()), single_process()): print(topology.dp_cp_group.size())"
    orders = (code, code.replace("single_process(), join(ParallelConfig()), single", "join(ParallelConfig()), single_process(), single"))
    processes = [subprocess.Popen([sys.executable, "-c", order], stdout=subprocess.PIPE, text=True) for order in orders]
    assert [process.communicate()[0].split() for process in processes] == [["1", "1", "1"]] * 2
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.parametrize(("given", "expected"), [(None, "1000"), ("7", "7")])
def test_nccls_watchdog_ends_a_process_within_the_timeout(given, expected):
    """It sleeps four times this many milliseconds, and collectives give up `grace` before the timeout."""
    name = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
    code = "import os; from cosmos_mp.config import ParallelConfig; from cosmos_mp.parallel.topology import join\n"
    code += f"join(ParallelConfig(timeout=10)); print(os.environ[{name!r}])"
    env = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.split() == [expected]
    assert ParallelConfig(timeout=10).grace == 5


def test_ranks_that_do_not_come_are_missed_in_words():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = "from cosmos_mp.config import ParallelConfig; from cosmos_mp.parallel.topology import join; join(ParallelConfig(timeout=4))"
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stderr.splitlines()[-1]
    assert "LostRank: rank 0: the 2 ranks did not meet at 127.0.0.1:" + port in said and "1/2 clients joined" in said, said


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"process 2 of its node, from 0, and sees 2 GPU\(s\): start as many as CUDA_VISIBLE_DEVICES"):
        module._device()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert module._device() == torch.device("cuda", 1) and taken == [torch.device("cuda", 1)]


@pytest.mark.parametrize("options", [{"tp": 2}, {"cp": 3}, {"dp": 2}, {"shard": 2}])
def test_a_layout_that_does_not_fit_joins_nothing(monkeypatch, options):
    for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration"):
        monkeypatch.setattr(module.dist, name, lambda *_, **__: pytest.fail("a group was made"))
    with pytest.raises(ConfigError, match="parallel."):
        join(ParallelConfig(**options))


# --- Meshes ---


@pytest.mark.parametrize(("replicas", "dimensions"), [(1, "shard"), (2, ("replicate", "shard"))])
def test_fsdp_gets_two_dimensions_for_hsdp_alone(replicas, dimensions):
    class Mesh:
        shape = (replicas, 4, 2)

        def __getitem__(self, names):
            return names

    assert replace(single_process(), mesh=Mesh()).fsdp_mesh == dimensions


def test_fsdp_mesh_of_one_process_has_one_dimension():
    mesh = join(ParallelConfig()).fsdp_mesh
    assert mesh.ndim == 1 and mesh.mesh_dim_names == ("shard",)


@pytest.mark.parametrize(
    ("options", "world", "replicate", "shard", "tp"),
    [
        (ParallelConfig(), 4, [[0], [1], [2], [3]], [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
        (ParallelConfig(shard=2), 4, [[0, 2], [1, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]),
        (ParallelConfig(tp=2), 4, [[0], [1], [2], [3]], [[0, 2], [1, 3]], [[0, 1], [2, 3]]),
        (
            ParallelConfig(tp=2, shard=2),
            8,
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            [[0, 2], [1, 3], [4, 6], [5, 7]],
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
    ],
)
def test_which_ranks_make_a_line_of_the_mesh(monkeypatch, ranks, options, world, replicate, shard, tp):
    """Ranks run over tp fastest; neighbours along dp x cp share a copy."""
    made = {}

    def enumerate_groups(rows, timeout, group_desc):
        made[group_desc] = sorted(rows)
        return group_desc, None

    monkeypatch.setattr(module.dist, "get_world_size", lambda group=None: world)
    monkeypatch.setattr(module.dist, "new_subgroups_by_enumeration", enumerate_groups)
    monkeypatch.setattr(module, "DeviceMesh", SimpleNamespace(from_group=lambda groups, kind, mesh, mesh_dim_names: (groups, mesh)))
    dp_cp = ranks(0, world // options.tp)
    lines, mesh = module._mesh(torch.device("cpu"), options, dp_cp, "TP")
    assert made.pop("REPLICATE") == replicate
    assert made == ({"SHARD": shard} if options.shard else {})
    assert lines == ["REPLICATE", "SHARD" if options.shard else dp_cp, "TP"]
    for dimension, expected in ((0, replicate), (1, shard), (2, tp)):
        assert sorted(mesh.movedim(dimension, -1).flatten(0, 1).tolist()) == expected


# --- Work of the first rank ---


def test_one_process_does_the_work_itself_and_gets_its_result_or_error():
    class OwnError(ValueError):
        pass

    def fail():
        raise OwnError("this one")

    for topology in (single_process(), join(ParallelConfig()), replace(single_process(), rank=3, world=4)):
        assert topology.on_first(lambda: {"a": 1}) == {"a": 1}
        with pytest.raises(OwnError, match="this one"):
            topology.on_first(fail)


@pytest.mark.parametrize("sent", [("result", None), (None, ValueError("of rank 0"))])
def test_the_others_get_what_the_first_has_found(monkeypatch, sent):
    def broadcast(box, src):
        assert src == 0 and len(box) == 1
        box[0] = sent

    monkeypatch.setattr(module.dist, "broadcast_object_list", broadcast)
    topology = replace(join(ParallelConfig()), rank=1, world=2)

    def work():
        pytest.fail("the first rank's work")

    if sent[1] is None:
        assert topology.on_first(work) == "result"
    else:
        with pytest.raises(ValueError, match="of rank 0"):
            topology.on_first(work)


def test_the_first_tells_the_others_also_of_its_error(monkeypatch):
    told = []
    monkeypatch.setattr(module.dist, "broadcast_object_list", lambda box, src: told.append(box[0]))
    topology = replace(join(ParallelConfig()), world=2)
    assert topology.on_first(lambda: 5) == 5
    error = KeyError("lost")

    def fail():
        raise error

    with pytest.raises(KeyError, match="lost"):
        topology.on_first(fail)
    assert told == [(5, None), (None, error)]


def test_an_error_that_cannot_be_sent_goes_in_words(monkeypatch):
    told = []
    monkeypatch.setattr(module.dist, "broadcast_object_list", lambda box, src: told.append(box[0]))
    topology = replace(join(ParallelConfig()), world=2)

    class Local(ValueError):  # pickle finds no class inside a function
        pass

    def fail():
        raise Local("disk 3")

    with pytest.raises(RuntimeError, match="Local: disk 3"):
        topology.on_first(fail)
    assert str(told[0][1]) == "Local: disk 3"
