"""Ranks that die, stop or hang, and whole runs that are killed: the others end in time and say who; what was saved goes on bit for bit."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cosmos_mp.config import ParallelConfig
from cosmos_mp.parallel.topology import Topology, join, single_process
from cosmos_mp.parallel.watch import LostRank, Watch
from cosmos_mp.training import checkpoint, stage

LAYOUT = ParallelConfig(timeout=12)


@pytest.fixture
def start(runs, tmp_path):
    """Starts ranks that nobody waits for; every one writes what became of it into a file of its own."""
    spec = importlib.util.spec_from_file_location("ranks_here", Path(__file__).with_name("ranks.py"))
    ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranks)
    context, started = multiprocessing.get_context("fork"), []

    def begin(world: int, name: str, work) -> list:
        folder = tmp_path / name
        folder.mkdir()

        def rank_main(rank: int) -> None:
            ranks.initialize(rank, world, folder, LAYOUT.collective_timeout)
            try:
                text = f"done {work(rank)}"
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            (folder / f"told.{rank}").write_text(text)
            os._exit(0)  # as a stage ends that has lost a rank

        processes = [context.Process(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        started.extend(processes)
        return processes

    yield begin
    for process in started:
        if process.is_alive():
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.join()


def wait_for(paths: list[Path], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, f"{[path.name for path in paths if not path.exists()]} not there after {seconds} s"
        time.sleep(0.05)
    return [path.read_text() for path in paths]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(1000)


@pytest.mark.parametrize(
    ("fate", "words"),
    [(die, "no answer from rank 1, dead or stopped"), (stop, "no answer from rank 1"), (hang, "rank 1 is reading data for")],
)
def test_the_others_end_in_time_and_name_the_rank(start, runs, tmp_path, fate, words):
    class Fateful(runs.Clips):
        def batch(self, position: int, size: int):
            if position >= 12 and torch.distributed.get_rank() == 1:
                (tmp_path / "lost").touch()
                fate()
            return super().batch(position, size)

    config = replace(runs.TRAIN, iterations=50, global_batch_size=3, micro_batch_size=1)

    def work(rank: int) -> None:
        runs.train("kd", LAYOUT, config, clips=Fateful(torch.float64), run_dir=tmp_path / "run")

    start(3, "ranks", work)
    files = [tmp_path / "ranks" / f"told.{rank}" for rank in (0, 2)]
    told = wait_for(files, 60)
    lost = (tmp_path / "lost").stat().st_mtime
    for file, text in zip(files, told, strict=True):
        assert file.stat().st_mtime - lost < LAYOUT.timeout, text
        assert text.startswith("LostRank: rank ") and "in iteration" in text and "start the same command again" in text, text
    assert any(words in text for text in told), told


@pytest.mark.parametrize(("stopped", "words"), [(0, "store of the ranks does not answer"), (1, "no answer from rank 1, dead or stopped")])
def test_a_stopped_rank_is_named_by_all_where_rank_0_holds_the_store(tmp_path, stopped, words):
    """As Slurm starts ranks: the store is in rank 0's own process, and the first to know must not take it along."""
    script = f"""
import os, signal, sys, torch.distributed as dist
from cosmos_mp.config import ParallelConfig
from cosmos_mp.parallel.topology import join
from cosmos_mp.parallel.watch import Watch
topology = join(ParallelConfig(timeout=8))
watch = Watch(topology)
dist.barrier()
if topology.rank == {stopped}:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    with watch.explaining("waiting"):
        dist.barrier()
except ConnectionError as error:
    print(error, flush=True)
    os._exit(3)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env=os.environ | place | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(ranks):
            if rank != stopped:
                said, _ = process.communicate(timeout=60)
                assert process.returncode == 3 and words in said, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_only_what_a_collective_raises_is_explained(monkeypatch):
    watch = Watch(single_process())
    watch.world = 2
    monkeypatch.setattr(watch, "_who", lambda: "no answer from rank 1")
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234")
    write = checkpoint.CheckpointWriteError("iter_00000002 could not be written (a rank is gone or silent)")
    write.__cause__ = lost
    for error in (lost, write, dist.DistBackendError("NCCL error")):
        assert isinstance(watch.explain(error), LostRank)
    full = OSError(28, "No space left on device", "runs/gloo_kd/log.jsonl")
    for error in (full, checkpoint.CheckpointError("runs/gloo_kd: another run is here"), RuntimeError("in runs/gloo/transport/x")):
        assert watch.explain(error) is error


def test_a_rank_that_dies_before_the_first_iteration_is_named(start, runs, tmp_path, monkeypatch):
    def latest(run_dir: Path, topology):
        if topology.rank == 1:
            die()
        return newest(run_dir, topology)

    newest = checkpoint.latest
    monkeypatch.setattr(checkpoint, "latest", latest)
    start(2, "ranks", lambda rank: runs.train("kd", LAYOUT, runs.TRAIN, run_dir=tmp_path / "run"))
    (told,) = wait_for([tmp_path / "ranks" / "told.0"], 30)
    assert told.startswith("LostRank: rank 0, opening the run for") and "no answer from rank 1, dead or stopped" in told, told


@pytest.mark.parametrize("nested", [False, True])
def test_a_rank_that_dies_while_networks_are_opened_is_named_once(start, tmp_path, monkeypatch, nested):
    monkeypatch.setattr(stage, "meet", join)

    @stage.on_all_ranks
    def main(config: ParallelConfig, topology: Topology) -> None:
        topology.on_first(lambda: "met")
        if topology.rank == 1:
            die()
        with topology.watch.explaining("in a part that explains for itself") if nested else nullcontext():
            torch.distributed.barrier()

    start(2, "ranks", lambda rank: main(LAYOUT))
    (told,) = wait_for([tmp_path / "ranks" / "told.0"], 30)
    place = "in a part that explains for itself" if nested else "opening data and networks"
    assert told.startswith(f"LostRank: rank 0, {place} for"), told
    assert told.count("no answer from rank 1, dead or stopped") == 1, told


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(start, run_ranks, runs, tmp_path):
    config = replace(runs.TRAIN, iterations=14, save_every=1, keep_last=2)
    layout = ParallelConfig(tp=2)
    straight = run_ranks(2, lambda rank: runs.train("dmd2", layout, config, run_dir=tmp_path / "straight"))
    moments = random.Random(0)
    kills = 0
    for attempt in range(40):
        processes = start(2, f"attempt{attempt}", lambda rank: runs.train("dmd2", layout, config, run_dir=tmp_path / "run"))
        if kills < 6:
            time.sleep(moments.uniform(0.5, 4.0))  # at least once in a save: one is made after every iteration
            for process in processes:
                process.kill()
            kills += any(not (tmp_path / f"attempt{attempt}" / f"told.{rank}").exists() for rank in range(2))
        for process in processes:
            process.join(60)
        if all((tmp_path / f"attempt{attempt}" / f"told.{rank}").exists() for rank in range(2)):
            break
    assert kills >= 3, "the run was through before it could be killed"
    resumed = run_ranks(2, lambda rank: runs.train("dmd2", layout, config, run_dir=tmp_path / "run"))
    for role in straight[0]["weights"]:
        ours, theirs = runs.whole(resumed, role, "weights"), runs.whole(straight, role, "weights")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
