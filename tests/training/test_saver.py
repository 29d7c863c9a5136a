"""Writing checkpoints: whole or not there, at once or beside the training, the oldest deleted, a full disk survived."""

import errno
import json
import logging
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from cosmos_mp.parallel.topology import single_process
from cosmos_mp.training.checkpoint import CheckpointWriteError, damage, latest, load
from cosmos_mp.training.saver import Saver

SETTINGS = {"stage": "toy", "net": {"hidden": 8, "heads": (1, 2)}}
FOREVER = 60.0


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "model/student/block.0.weight": torch.full((3, 2), value),
        "model/fake_score/block.0.weight": torch.full((2,), value + 0.5, dtype=torch.float64),
        "optim/student/block.0.weight/step": torch.tensor(value),
        "counters/iteration": torch.tensor(int(value)),
    }


def saved(run_dir: Path, *iterations: int, keep_last: int = 9) -> list[Path]:
    saver = Saver(run_dir, SETTINGS, keep_last)
    for iteration in iterations:
        saver.save(iteration, tensors(float(iteration)))
    return saver.finished()


def holds(path: Path, value: float) -> bool:
    table = {name: torch.zeros_like(tensor) for name, tensor in tensors(value).items()}
    load(path, table)
    return all(torch.equal(tensor, table[name]) and tensor.dtype == table[name].dtype for name, tensor in tensors(value).items())


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- What is written ---


def test_what_is_saved_comes_back(tmp_path):
    (path,) = saved(tmp_path, 7)
    assert path == tmp_path / "checkpoints/iter_00000007" and holds(path, 7.0)
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(SETTINGS))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_single_process_saves_and_loads_without_collectives(tmp_path, monkeypatch, asynchronous):
    """Gloo's thread would open a second OpenMP team, which slows the training's own for good."""
    topology = single_process()
    assert dist.is_initialized() and dist.get_world_size() == 1
    collectives = ("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "broadcast", "all_gather")
    called = []  # not a failure on the spot: the saver would catch it
    for name in (*collectives, "new_group"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: called.append(name))
    saver = Saver(tmp_path, SETTINGS, 9, topology, asynchronous)
    saver.save(7, tensors(7.0))
    saver.wait()
    saver.close()
    table = {name: torch.zeros_like(value) for name, value in tensors(7.0).items()}
    load(latest(tmp_path, topology), table, topology)
    assert called == []


def test_marker_lists_every_file(tmp_path):
    (path,) = saved(tmp_path, 7)
    marker = json.loads((path / "COMPLETE.json").read_text())
    listed = marker["files"]
    assert marker["iteration"] == 7
    assert set(listed) == {file.name for file in path.iterdir()} - {"COMPLETE.json"} >= {".metadata", "config.json"}
    assert all(entry["bytes"] == (path / name).stat().st_size for name, entry in listed.items())


# --- Which ones are kept ---


def test_keep_last_deletes_the_oldest(tmp_path):
    saved(tmp_path, 2, 4, 6, 8, keep_last=2)
    assert names(tmp_path) == ["iter_00000006", "iter_00000008"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    paths = saved(tmp_path, 2, 4, 6)
    (paths[1] / "COMPLETE.json").unlink()
    saved(tmp_path, 8, keep_last=3)
    assert [path.name for path in paths] + ["iter_00000008"] == names(tmp_path)
    assert saved(tmp_path, 10, keep_last=1)[0].name in names(tmp_path) and len(names(tmp_path)) == 1


def test_newer_damaged_ones_never_push_out_the_one_just_saved(tmp_path):
    paths = saved(tmp_path, 2, 9)
    flip(paths[1] / "__0_0.distcp")
    saved(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == ["iter_00000004", "iter_00000009"] and latest(tmp_path).name == "iter_00000004"


def test_a_damaged_one_is_replaced_when_its_iteration_is_saved_again(tmp_path):
    paths = saved(tmp_path, 2, 4)
    flip(paths[1] / "__0_0.distcp")
    saved(tmp_path, 4)
    assert damage(paths[1]) is None and names(tmp_path) == ["iter_00000002", "iter_00000004"]


def test_an_old_one_that_cannot_be_deleted_is_no_failure_of_the_new_one(tmp_path, monkeypatch, caplog):
    saved(tmp_path, 2)
    with monkeypatch.context() as stuck:
        stuck.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EBUSY, "Device or resource busy")))
        (path,) = saved(tmp_path, 4, keep_last=1)
    assert holds(path, 4.0) and latest(tmp_path) == path
    assert "iter_00000002.partial could not be deleted" in caplog.text and "resource busy" in caplog.text
    saved(tmp_path, 6, keep_last=1)
    assert names(tmp_path) == ["iter_00000006"]


def test_an_old_one_that_cannot_be_moved_away_is_no_failure_of_the_new_one(tmp_path, monkeypatch, caplog):
    saved(tmp_path, 2)
    rename = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if path.name == "iter_00000002":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stuck)
    (path,) = saved(tmp_path, 4, keep_last=1)
    assert holds(path, 4.0) and latest(tmp_path) == path
    assert "iter_00000004 is saved; an older one could not be removed" in caplog.text and "Permission denied" in caplog.text


def test_leftovers_of_a_killed_save_go_at_the_next_one(tmp_path):
    leftover = tmp_path / "checkpoints/iter_00000002.partial"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(b"half")
    saved(tmp_path, 4)
    assert names(tmp_path) == ["iter_00000004"]


def test_what_is_visible_is_whole_at_every_moment_of_a_save(tmp_path):
    """Python tells an audit hook of every file operation before it happens; each is a moment at which the power may fail."""
    saved(tmp_path, 2)
    complaints, moments, watching = [], [], True

    def look(event, _):
        nonlocal watching
        if watching and event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            watching = False  # looking opens files too
            whole = [path for path in (tmp_path / "checkpoints").glob("iter_*") if path.suffix != ".partial"]
            moments.append(event)
            complaints.extend(f"{event}: {path.name}: {damage(path)}" for path in whole if damage(path))
            complaints.extend([f"{event}: nothing to resume from"] if not whole else [])
            watching = True

    sys.addaudithook(look)  # it cannot be taken away, only silenced
    try:
        saved(tmp_path, 4, 6, keep_last=1)
    finally:
        watching = False
    assert {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"} <= set(moments)
    assert complaints == [] and names(tmp_path) == ["iter_00000006"]


# --- Full disk ---


def test_disk_full_in_the_middle_of_the_tensors(tmp_path):
    """A real limit on file size, so that the writer itself fails half-way."""
    Saver(tmp_path, SETTINGS, 3).save(2, {"model/student/w": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointWriteError, match="iter_00000004 could not be written .*iter_00000002 is intact: make room"):
            Saver(tmp_path, SETTINGS, 1).save(4, {"model/student/w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["iter_00000002"] and damage(latest(tmp_path)) is None


@pytest.mark.parametrize("nth", range(1, 7))
def test_disk_full_at_any_place_of_a_save(tmp_path, monkeypatch, nth):
    saved(tmp_path, 2)
    count, fsync = 0, os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        saved(tmp_path, 4, keep_last=1)
    monkeypatch.undo()
    assert count == nth
    assert damage(tmp_path / "checkpoints/iter_00000002") is None and latest(tmp_path) is not None
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_complaint_calls_intact_what_is(tmp_path, monkeypatch):
    paths = saved(tmp_path, 2, 4)
    (paths[1] / "COMPLETE.json").unlink()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(CheckpointWriteError, match="iter_00000006 could not .*; iter_00000002 is intact"):
        saved(tmp_path, 6)


# --- Beside the training ---


class Gate:
    """Holds the writer back until it is opened."""

    def __init__(self, monkeypatch):
        self.arrived, self.opened, self.write = threading.Event(), threading.Event(), dcp.save
        monkeypatch.setattr(dcp, "save", self)

    def __call__(self, *args, **kwargs):
        self.arrived.set()
        assert self.opened.wait(FOREVER)
        return self.write(*args, **kwargs)


@pytest.fixture
def beside(tmp_path):
    saver = Saver(tmp_path, SETTINGS, 9, asynchronous=True)
    yield saver
    saver.close()


def test_what_is_written_beside_the_training_is_the_state_of_the_moment_of_the_call(tmp_path, monkeypatch, beside):
    gate, table = Gate(monkeypatch), tensors(2.0)
    beside.save(2, table)
    assert gate.arrived.wait(FOREVER)
    for tensor in table.values():
        tensor.fill_(9)
    assert beside.finished() == [] and latest(tmp_path) is None
    gate.opened.set()
    beside.wait()
    (path,) = beside.finished()
    assert path.name == "iter_00000002" and holds(path, 2.0)
    assert beside.finished() == []


def test_one_save_at_a_time(tmp_path, monkeypatch, beside):
    gate = Gate(monkeypatch)
    beside.save(2, tensors(2.0))
    assert gate.arrived.wait(FOREVER)
    threading.Timer(0.2, gate.opened.set).start()
    beside.save(4, tensors(4.0))
    assert [path.name for path in beside.finished()][:1] == ["iter_00000002"]  # before the second was even copied
    beside.wait()
    assert names(tmp_path) == ["iter_00000002", "iter_00000004"] and holds(latest(tmp_path), 4.0)


@pytest.mark.parametrize("meet", [lambda saver: saver.wait(), lambda saver: saver.save(6, tensors(6.0))], ids=["wait", "save"])
def test_an_error_beside_the_training_shows_where_the_ranks_meet_next(tmp_path, monkeypatch, caplog, beside, meet):
    beside.save(2, tensors(2.0))
    beside.wait()
    with monkeypatch.context() as full, caplog.at_level(logging.ERROR):
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        beside.save(4, tensors(4.0))
        deadline = time.monotonic() + FOREVER
        while not caplog.records and time.monotonic() < deadline:  # said at once, though raised only later
            time.sleep(0.01)
        assert [path.name for path in beside.finished()] == ["iter_00000002"]
        with pytest.raises(CheckpointWriteError, match="iter_00000004 could not .*No space left.*iter_00000002 is intact: make room"):
            meet(beside)
    assert "iter_00000004 could not be written" in caplog.text
    assert names(tmp_path) == ["iter_00000002"]
    beside.save(6, tensors(6.0))  # it has been told once
    beside.wait()
    assert holds(latest(tmp_path), 6.0)


def test_tensors_that_cannot_be_copied_are_an_error_like_any_other(tmp_path, beside):
    class Broken:
        def detach(self):
            raise RuntimeError("CUDA error: out of memory")

    beside.save(4, {"model/student/w": Broken()})
    with pytest.raises(CheckpointWriteError, match="iter_00000004 could not be written .*out of memory.*no earlier checkpoint"):
        beside.wait()
    assert not (tmp_path / "checkpoints").exists()


def test_close_lets_the_writer_end_and_raises_nothing(tmp_path, monkeypatch):
    saver = Saver(tmp_path, SETTINGS, 9, asynchronous=True)
    saver.save(2, tensors(2.0))
    saver.close()
    assert names(tmp_path) == ["iter_00000002"]
    saver = Saver(tmp_path, SETTINGS, 9, asynchronous=True)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    saver.save(4, tensors(4.0))
    saver.close()
    assert names(tmp_path) == ["iter_00000002"]
