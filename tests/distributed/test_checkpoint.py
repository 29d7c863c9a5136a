"""Checkpoints of several ranks: whatever layout wrote one, any other reads it; and what befalls one rank is known to all."""

from __future__ import annotations

import errno
import importlib.util
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from cosmos_mp.config import NetConfig, ParallelConfig
from cosmos_mp.parallel import noise
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology, join
from cosmos_mp.roles import transfer_net
from cosmos_mp.training import checkpoint, saver
from cosmos_mp.training.checkpoint import (
    CheckpointError,
    CheckpointWriteError,
    damage,
    exclusive,
    latest,
    load,
    load_role,
    load_weights_of,
    open_run,
)
from cosmos_mp.training.saver import Saver

SETTINGS = {"stage": "toy", "net": {"hidden": 8}}
FOREVER = 30.0
SPLITS = {
    "column": ((8, 3), 0),
    "few": ((4, 3), 0),
    "row": ((5, 8), 1),
    "table": ((2, 3, 2), None),
    "norm": ((7,), None),
    "bias": ((1,), None),
}
"""Shape and dimension that tp divides. Rows that two or three ranks do not share evenly, and fewer rows than ranks."""
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2 x shard2": (4, ParallelConfig(tp=2)),
    "tp2 x shard3": (6, ParallelConfig(tp=2)),
    "tp4": (4, ParallelConfig(tp=4)),
    "shard3": (3, ParallelConfig()),
    "hsdp 2 x 2": (4, ParallelConfig(shard=2)),
}


# --- Tables laid out by hand ---


def wholes(value: float = 0.0) -> dict[str, tuple[Tensor, int | None]]:
    """Every tensor of a checkpoint, whole, and the dimension that tp divides; no two elements are equal."""
    names = {
        f"{kind}/{parameter}{state}": entry
        for parameter, entry in SPLITS.items()
        for kind, state in (
            ("model/student", ""),
            ("model/student_ema", ""),
            ("optim/student", "/exp_avg"),
            ("optim/student", "/exp_avg_sq"),
        )
    }
    table = {}
    for place, (name, (shape, split)) in enumerate(names.items()):
        count = torch.Size(shape).numel()
        table[name] = (value + 1000.0 * place + torch.arange(count, dtype=torch.float64).view(shape) / 3, split)
    table |= {f"optim/student/{parameter}/step": (torch.tensor(value + 0.5), None) for parameter in SPLITS}
    return table | {"counters/iteration": (torch.tensor(int(value)), None)}


def rectangle(whole: Tensor, split: int | None, topology: Topology) -> Tensor:
    """The part of this rank: tp divides first, then the rows of what is left are dealt out."""
    if whole.dim() == 0:
        return whole
    _, shard, tp = topology.mesh.get_coordinate()
    part = whole if split is None else whole.tensor_split(topology.tp_group.size(), split)[tp]
    rows = -(-len(part) // topology.mesh["shard"].size())
    return part[shard * rows : (shard + 1) * rows]


def laid_out(local: Tensor, whole: Tensor, split: int | None, topology: Topology) -> Tensor:
    if topology.world == 1 or whole.dim() == 0:
        return local
    rows = _StridedShard(0, split_factor=topology.tp_group.size()) if split == 0 and topology.tp_group.size() > 1 else Shard(0)
    placements = [rows, Replicate() if split is None else Shard(split)]
    return DTensor.from_local(local, topology.mesh["shard", "tp"], placements, run_check=False, shape=whole.shape, stride=whole.stride())


def table_of(topology: Topology, value: float = 0.0) -> dict[str, Tensor]:
    return {
        name: laid_out(rectangle(whole, split, topology).clone(), whole, split, topology) for name, (whole, split) in wholes(value).items()
    }


def emptied(table: dict[str, Tensor]) -> dict[str, Tensor]:
    for tensor in table.values():
        local(tensor).fill_(-1)
    return table


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_holds(table: dict[str, Tensor], topology: Topology, value: float = 0.0) -> None:
    for name, (whole, split) in wholes(value).items():
        assert torch.equal(local(table[name]), rectangle(whole, split, topology)), name


def write(rank: int, run_dir: Path, layout: ParallelConfig, *iterations: int, keep_last: int = 9) -> list[str]:
    topology = join(layout)
    saver = Saver(run_dir, SETTINGS, keep_last, topology)
    for iteration in iterations:
        saver.save(iteration, table_of(topology, float(iteration)))
    return [path.name for path in saver.finished()]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def runs(run_ranks, tmp_path_factory) -> dict[str, Path]:
    """A run folder with iter_00000002 for every layout."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (world, layout) in LAYOUTS.items():
        assert run_ranks(world, write, folder / name, layout, 2) == [["iter_00000002"]] * world
    return {name: folder / name for name in LAYOUTS}


# --- Any layout into any other ---


@pytest.mark.parametrize("reading", LAYOUTS)
def test_whatever_layout_wrote_it_any_other_reads_it(run_ranks, runs, reading):
    world, layout = LAYOUTS[reading]

    def read(rank):
        topology = join(layout)
        for run_dir in runs.values():
            table = emptied(table_of(topology))
            load(latest(run_dir, topology), table, topology)
            assert_holds(table, topology, 2.0)

    run_ranks(world, read)


def test_parts_are_stored_once_and_by_the_ranks_that_hold_them(runs):
    for name, (world, _) in LAYOUTS.items():
        contents = checkpoint._Reader(runs[name] / "checkpoints/iter_00000002").contents
        for key, entry in contents.state_dict_metadata.items():
            assert sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel(), (name, key)
        elements = [0] * world
        for index, stored in contents.storage_data.items():
            chunk = next(chunk for chunk in contents.state_dict_metadata[index.fqn].chunks if chunk.offsets == index.offset)
            elements[int(stored.relative_path[2 : stored.relative_path.index("_", 2)])] += chunk.sizes.numel()
        assert min(elements) > 0 and max(elements) < 1.7 * sum(elements) / world, (name, elements)


def test_each_rank_reads_back_for_its_checksum_what_it_wrote(run_ranks, tmp_path):
    def save(rank):
        seen, sha256 = [], saver.file_sha256
        saver.file_sha256 = lambda file: seen.append(file.name) or sha256(file)
        write(rank, tmp_path, ParallelConfig(), 2)
        return sorted(seen)

    assert run_ranks(3, save) == [[".metadata", "__0_0.distcp", "config.json"], ["__1_0.distcp"], ["__2_0.distcp"]]


def test_one_role_is_read_straight_into_its_parts(run_ranks, runs):
    """And no rank reads more than the stored parts that overlap with its own."""
    own = [name.removeprefix("model/student/") for name in wholes() if name.startswith("model/student/")]

    def read(rank, layout, written, prefer_ema, share):
        topology, prefix = join(layout), "model/student_ema/" if prefer_ema else "model/student/"
        everything, seen, torch_load = table_of(topology), [], torch.load
        table = emptied({name: everything[f"model/student/{name}"] for name in own})

        def count(*args, **kwargs):
            seen.append(torch_load(*args, **kwargs))
            return seen[-1]

        torch.load = count
        load_role(runs[written], "student", table, prefer_ema=prefer_ema, topology=topology)
        for name in own:
            assert torch.equal(local(table[name]), rectangle(*wholes(2.0)[prefix + name], topology))
        mine = sum(local(tensor).numel() for tensor in table.values())
        assert sum(tensor.numel() for tensor in seen) <= share * mine

    run_ranks(4, read, ParallelConfig(tp=4), "tp4", True, 1.0)
    run_ranks(4, read, ParallelConfig(tp=2), "tp2 x shard2", False, 1.0)
    run_ranks(4, read, ParallelConfig(tp=4), "tp2 x shard2", True, 2.5)
    run_ranks(3, read, ParallelConfig(), "hsdp 2 x 2", False, 2.5)
    run_ranks(1, read, ParallelConfig(), "tp2 x shard3", True, 1.0)


def test_tools_read_a_whole_role_from_the_files_of_many_ranks(runs):
    weights = load_weights_of(runs["tp2 x shard3"], "student")
    assert weights.keys() == SPLITS.keys()
    assert all(torch.equal(value, wholes(2.0)[f"model/student_ema/{name}"][0]) for name, value in weights.items())


def test_what_does_not_fit_is_refused_on_all_ranks_and_nothing_is_filled(run_ranks, runs):
    """Also where only one rank's table is wrong: the others do not go on alone."""

    def read(rank):
        topology = join(ParallelConfig(tp=2))
        table = emptied(table_of(topology))
        if rank == 1:
            table["model/student/new"] = table.pop("model/student/bias")
        with pytest.raises(CheckpointError, match="student/new is missing; model/student/bias is unexpected; resume with") as error:
            load(latest(runs["tp4"], topology), table, topology)
        assert all((local(tensor) == -1).all() for tensor in table.values())
        with pytest.raises(CheckpointError, match="no role 'teacher'; it holds student, student_ema"):
            load_role(runs["tp4"], "teacher", {}, topology=topology)
        with pytest.raises(CheckpointError, match=r"row is \(5, 8\) torch.float64, expected \(7,\) torch.float64.*check the net"):
            load_role(runs["tp4"], "student", {name: table["model/student/norm"] for name in SPLITS}, topology=topology)
        with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
            load_role(runs["tp4"] / "nowhere", "student", {}, topology=topology)
        return str(error.value)

    assert len(set(run_ranks(2, read))) == 1


# --- Real networks ---


NET = NetConfig(
    hidden=48, heads=4, blocks=1, control_blocks=1, mlp_hidden=56, adaln_lora_dim=5, text_dim=7,
    latent_channels=3, control_channels=5, control_mlp=(6, 10), max_latent=(6, 8, 12),
)  # fmt: skip


def whole_value(name: str, shape: torch.Size, purpose: str) -> Tensor:
    return torch.randn(shape, generator=noise.generator(0, f"{purpose}/{name}", 0, 0), dtype=torch.float64)


STATES = {
    "model/student/{}": "value",
    "model/student_ema/{}": "average",
    "optim/student/{}/exp_avg": "m",
    "optim/student/{}/exp_avg_sq": "v",
}


@pytest.fixture(scope="module")
def real_run(run_ranks, tmp_path_factory) -> Path:
    """A checkpoint of a network and its optimizer state at tp2 x shard2."""
    folder = tmp_path_factory.mktemp("real")

    def save(rank):
        topology = join(ParallelConfig(tp=2))
        _, wanted, given = pieces_of(topology)
        for name, tensor in given.items():
            local(tensor).copy_(wanted[name])
        Saver(folder, SETTINGS, 1, topology).save(2, given)

    run_ranks(4, save)
    return folder


def pieces_of(topology: Topology) -> tuple[Pieces, dict[str, Tensor], dict[str, Tensor]]:
    """A network's pieces, what this rank's part of each tensor should be, and the tensors as they go to torch."""
    pieces = Pieces(transfer_net(NET, topology, dtype=torch.float64), topology)
    keys = [(key.format(name), name, piece, purpose) for name, piece in pieces.items() for key, purpose in STATES.items()]
    wanted = {key: piece.of(whole_value(name, piece.shape, purpose)) for key, name, piece, purpose in keys}
    given = {key: pieces.as_stored(name, torch.full_like(piece.parameter.detach(), -1)) for key, name, piece, _ in keys}
    return pieces, wanted, given


@pytest.mark.parametrize("reading", LAYOUTS)
def test_a_real_networks_pieces_go_from_layout_to_layout(run_ranks, real_run, reading):
    def read(rank, layout):
        topology = join(layout)
        pieces, wanted, given = pieces_of(topology)
        empty = 0
        for name, piece in pieces.items():
            shown = given[f"model/student/{name}"]
            assert shown.shape == piece.shape
            assert isinstance(shown, DTensor) == (topology.world > 1)
            if topology.world > 1:  # what torch makes of it is the rectangle that the piece says it is
                (chunk,) = shown.__create_chunk_list__()
                assert chunk.sizes == piece.parameter.shape, name
                empty += not piece.parameter.numel()
                assert not piece.parameter.numel() or tuple(chunk.offsets) == piece.offset, name  # where nothing lies does not matter
        load(latest(real_run, topology), given, topology)
        for name, tensor in given.items():
            assert torch.equal(local(tensor), wanted[name]), name
        table = {name: pieces.as_stored(name, piece.parameter.detach()) for name, piece in pieces.items()}
        load_role(real_run, "student", table, topology=topology)
        for name, piece in pieces.items():
            assert torch.equal(piece.parameter, wanted[f"model/student_ema/{name}"]), name
        return empty

    world, layout = LAYOUTS[reading]
    assert (sum(run_ranks(world, read, layout)) > 0) == reading.endswith("shard3")


# --- The choice of a checkpoint ---


def test_checksums_are_shared_out_and_the_answer_is_the_same_everywhere(run_ranks, runs):
    folder = runs["tp2 x shard3"] / "checkpoints/iter_00000002"

    def read(rank):
        topology, seen, sha256 = join(ParallelConfig()), [], checkpoint.file_sha256
        checkpoint.file_sha256 = lambda file: seen.append(file.name) or sha256(file)
        assert latest(runs["tp2 x shard3"], topology) == folder
        return seen

    seen = run_ranks(3, read)
    everything = sorted(path.name for path in folder.iterdir() if path.name != "COMPLETE.json")
    assert sorted(name for own in seen for name in own) == everything
    sizes = [sum((folder / name).stat().st_size for name in own) for own in seen]
    assert max(sizes) < 2 * min(sizes)


def test_damage_that_one_rank_sees_is_known_to_all_and_named_once(run_ranks, tmp_path, caplog):
    run_ranks(3, write, tmp_path, ParallelConfig(), 2, 4, 6)
    flip(tmp_path / "checkpoints/iter_00000006/__2_0.distcp")
    (tmp_path / "checkpoints/iter_00000004/__1_0.distcp").unlink()
    (tmp_path / "checkpoints/iter_00000008.partial").mkdir()

    def choose(rank):
        records, handler = [], logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        checkpoint.log.addHandler(handler)
        return latest(tmp_path, join(ParallelConfig())), records

    chosen, records = zip(*run_ranks(3, choose), strict=True)
    assert [path.name for path in chosen] == ["iter_00000002"] * 3
    assert [len(record) for record in records] == [3, 0, 0]
    for line, words in zip(
        records[0], ("00008.partial skipped", "00006 skipped: __2_0.distcp has another", "00004 skipped: __1_0"), strict=True
    ):
        assert words in line
    flip(tmp_path / "checkpoints/iter_00000002/.metadata")

    def none(rank):
        with pytest.raises(CheckpointError, match="no usable checkpoint.*00006: __2_0.*00004: __1_0.distcp is missing.*00002: .metadata"):
            latest(tmp_path, join(ParallelConfig()))

    run_ranks(3, none)


def test_a_folder_in_use_is_refused_on_all_ranks(run_ranks, tmp_path):
    def train(rank):
        with pytest.raises(CheckpointError, match=f"process {os.getppid()} trains here"), exclusive(tmp_path, join(ParallelConfig())):
            pytest.fail("went in")

    with exclusive(tmp_path):
        run_ranks(2, train)

    def hold(rank):
        topology = join(ParallelConfig())
        with exclusive(tmp_path, topology):
            first = topology.on_first(os.getpid)
            dist.barrier()
            with pytest.raises(CheckpointError, match=f"process {first} trains here"), exclusive(tmp_path):
                pytest.fail("went in")
            dist.barrier()
        dist.barrier()
        with exclusive(tmp_path, topology):
            pass

    run_ranks(2, hold)


def test_another_run_is_refused_on_all_ranks(run_ranks, tmp_path):
    def start(rank):
        topology = join(ParallelConfig())
        open_run(tmp_path, SETTINGS, topology)
        write(rank, tmp_path, ParallelConfig(), 2)
        dist.barrier()
        open_run(tmp_path, SETTINGS | {"parallel": {"tp": 4}}, topology)
        with pytest.raises(CheckpointError, match='stage: "toy" -> "other"'):
            open_run(tmp_path, SETTINGS | {"stage": "other"}, topology)

    run_ranks(2, start)


# --- Failures of one rank ---


def full_disk(number: int) -> Callable[[int], None]:
    """A disk that is full when this process syncs its n-th file or folder."""
    count, fsync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    return full


def failing(rank: int, run_dir: Path, asynchronous: bool, harm: Callable[[int], Callable[[], None]]) -> str:
    """Save 2, then 4 with what `harm` does to this rank, then, undone, 6; the complaint about 4."""
    topology = join(ParallelConfig(tp=2))
    writer = Saver(run_dir, SETTINGS, 1, topology, asynchronous)
    writer.save(2, table_of(topology, 2.0))
    writer.wait()
    undo = harm(rank)
    with pytest.raises(CheckpointWriteError) as error:
        writer.save(4, table_of(topology, 4.0))
        writer.wait()
    undo()
    assert names(run_dir) == ["iter_00000002"] and latest(run_dir, topology).name == "iter_00000002"
    dist.barrier()
    writer.save(6, table_of(topology, 6.0))
    writer.wait()
    assert [path.name for path in writer.finished()] == ["iter_00000002", "iter_00000006"] and names(run_dir) == ["iter_00000006"]
    writer.close()
    return str(error.value)


@pytest.mark.parametrize(
    ("number", "who", "asynchronous"), [(1, 3, False), (1, 3, True), *((number, 0, number == 4) for number in range(1, 6))]
)
def test_a_full_disk_of_one_rank_is_an_error_of_all(run_ranks, tmp_path, number, who, asynchronous):
    def harm(rank):
        fsync = os.fsync
        if rank == who:
            os.fsync = full_disk(number)
        return lambda: setattr(os, "fsync", fsync)

    (complaint,) = set(run_ranks(4, failing, tmp_path, asynchronous, harm))
    assert complaint.startswith(f"{tmp_path}/checkpoints/iter_00000004 could not be written (rank {who}: OSError: [Errno 28] No space left")
    assert " MB are free; iter_00000002 is intact: make room" in complaint


def test_a_real_limit_in_the_middle_of_one_ranks_file(run_ranks, tmp_path):
    def harm(rank):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    (complaint,) = set(run_ranks(4, failing, tmp_path, False, harm))
    assert "(rank 2: " in complaint and "iter_00000002 is intact" in complaint


def test_a_file_that_cannot_be_read_back_is_an_error_of_all(run_ranks, tmp_path):
    def unreadable(file):
        raise OSError(errno.EIO, "Input/output error")

    def harm(rank):
        sha256 = saver.file_sha256
        if rank == 1:
            saver.file_sha256 = unreadable
        return lambda: setattr(saver, "file_sha256", sha256)

    (complaint,) = set(run_ranks(2, failing, tmp_path, True, harm))
    assert "(rank 1: OSError: [Errno 5] Input/output error)" in complaint


def test_a_copy_that_fails_on_one_rank_is_an_error_of_all(run_ranks, tmp_path):
    def no_memory(*_, **__):
        raise MemoryError("no memory")

    def harm(rank):
        detach = Tensor.detach
        if rank == 1:
            Tensor.detach = no_memory
        return lambda: setattr(Tensor, "detach", detach)

    (complaint,) = set(run_ranks(2, failing, tmp_path, True, harm))
    assert "(rank 1: MemoryError: no memory)" in complaint


def test_folders_that_the_ranks_do_not_share_are_noticed(run_ranks, tmp_path):
    def save(rank):
        with pytest.raises(CheckpointWriteError, match="rank 0: OSError: __1_0.distcp of another rank is not in .*all nodes share it"):
            write(rank, tmp_path / f"node{rank}", ParallelConfig(), 2)

    run_ranks(2, save)


def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_timeout(run_ranks, tmp_path):
    def save(rank):
        topology, opened, dcp_save = join(ParallelConfig(timeout=4)), threading.Event(), dcp.save
        if rank == 1:
            dcp.save = lambda *args, **kwargs: opened.wait(7) or dcp_save(*args, **kwargs)
        began = time.monotonic()
        with pytest.raises(CheckpointWriteError, match="iter_00000002 could not be written .a rank is gone or silent: ") as error:
            Saver(tmp_path, SETTINGS, 1, topology).save(2, table_of(topology, 2.0))
        assert rank == 1 or "imed out" in str(error.value)
        return time.monotonic() - began

    assert run_ranks(2, save)[0] < 7


# --- Beside the training ---


def test_the_training_goes_on_with_its_own_collectives_while_ranks_write(run_ranks, tmp_path):
    def train(rank):
        topology, arrived, opened, dcp_save = join(ParallelConfig(tp=2)), threading.Event(), threading.Event(), dcp.save

        def slow(*args, **kwargs):
            arrived.set()
            assert opened.wait(FOREVER)
            return dcp_save(*args, **kwargs)

        if rank == 1:
            dcp.save = slow
        beside, table = Saver(tmp_path, SETTINGS, 9, topology, asynchronous=True), table_of(topology, 2.0)
        beside.save(2, table)
        if rank == 1:
            assert arrived.wait(FOREVER)
        for step in range(50):  # the others are inside a collective of the writers all the while
            total = torch.tensor(float(rank))
            dist.all_reduce(total)
            assert total == 6
            emptied(table)
            assert beside.finished() == [], step
        opened.set()
        beside.save(4, table_of(topology, 4.0))
        assert "iter_00000002" in [path.name for path in beside.finished()]
        beside.wait()
        dist.barrier()
        beside.close()
        table = emptied(table_of(topology))
        load(tmp_path / "checkpoints/iter_00000002", table, topology)
        assert_holds(table, topology, 2.0)
        load(latest(tmp_path, topology), table, topology)
        assert_holds(table, topology, 4.0)

    run_ranks(4, train)
    assert names(tmp_path) == ["iter_00000002", "iter_00000004"]


# --- A rank that dies ---


def _ranks_module():
    spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("victim", "moment", "asynchronous"), [(1, 1, False), (1, 1, True), (0, 1, False), (0, 2, False), (0, 4, True), (0, 5, False)]
)
def test_a_rank_killed_during_a_save_leaves_the_one_before_and_no_rank_waiting(run_ranks, tmp_path, victim, moment, asynchronous):
    """Killed at its n-th fsync: in the middle of its tensors; rank 0 also at the table of contents, the marker and the folder."""
    run_dir, outcomes = tmp_path / "run", tmp_path / "outcomes"
    outcomes.mkdir()
    initialize = _ranks_module().initialize

    def rank(rank):
        initialize(rank, 3, tmp_path, timedelta(seconds=FOREVER + 10))
        topology = join(ParallelConfig())
        saver = Saver(run_dir, SETTINGS, 1, topology, asynchronous)
        saver.save(2, table_of(topology, 2.0))
        saver.wait()
        dist.barrier()
        count = 0

        def kill(descriptor):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        if rank == victim:
            os.fsync = kill
        try:
            saver.save(4, table_of(topology, 4.0))
            saver.wait()
        except CheckpointWriteError as error:
            (outcomes / str(rank)).write_text(str(error))
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,), daemon=True) for number in range(3)]
    began = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(FOREVER)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if number == victim else 0 for number in range(3)]
    assert time.monotonic() - began < FOREVER / 2
    for number in {0, 1, 2} - {victim}:
        complaint = (outcomes / str(number)).read_text()
        assert "iter_00000004 could not be written (a rank is gone or silent" in complaint and "iter_00000002 is intact" in complaint

    assert damage(run_dir / "checkpoints/iter_00000002") is None and "iter_00000004" not in names(run_dir)
    assert run_ranks(2, lambda rank: latest(run_dir, join(ParallelConfig())).name) == ["iter_00000002"] * 2
    run_ranks(2, write, run_dir, ParallelConfig(), 4)
    assert "iter_00000004" in names(run_dir) and not list(run_dir.glob("checkpoints/*.partial"))
