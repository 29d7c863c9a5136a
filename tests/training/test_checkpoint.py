"""Checkpoints: whole or not there, damage found and named, the newest good one chosen, strict loading."""

import errno
import json
import logging
import os
import pickle
import resource
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cosmos_mp.parallel.topology import single_process
from cosmos_mp.training import checkpoint
from cosmos_mp.training.checkpoint import (
    CheckpointError,
    CheckpointWriteError,
    check_same_run,
    damage,
    latest,
    load,
    load_weights_of,
    open_run,
    save,
)

SETTINGS = {"stage": "toy", "out": "runs/toy", "net": {"hidden": 8, "heads": (1, 2)}, "train": {"iterations": 10, "seed": 0}}


def tensors(value: float, *, ema: bool = True) -> dict[str, torch.Tensor]:
    table = {
        "model/student/block.0.weight": torch.full((3, 2), value),
        "model/fake_score/block.0.weight": torch.full((2,), value + 0.5, dtype=torch.float64),
        "optim/student/block.0.weight/step": torch.tensor(value),
        "counters/iteration": torch.tensor(int(value)),
    }
    return table | ({"model/student_ema/block.0.weight": torch.full((3, 2), value + 0.25)} if ema else {})


def saved(run_dir: Path, *iterations: int, keep_last: int = 9) -> list[Path]:
    return [save(run_dir, i, tensors(float(i)), SETTINGS, keep_last) for i in iterations]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# --- Saving and loading ---


def test_what_is_saved_comes_back(tmp_path):
    (path,) = saved(tmp_path, 7)
    assert path == tmp_path / "checkpoints/iter_00000007"
    table = {name: torch.zeros_like(value) for name, value in tensors(7.0).items()}
    load(path, table)
    assert all(torch.equal(value, table[name]) and value.dtype == table[name].dtype for name, value in tensors(7.0).items())
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(SETTINGS))


def test_a_single_process_saves_and_loads_without_collectives(tmp_path, monkeypatch):
    """Gloo's thread would open a second OpenMP team, which slows the training's own for good."""
    single_process()
    assert dist.is_initialized() and dist.get_world_size() == 1
    collectives = ("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "broadcast", "all_gather")
    for name in collectives:
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    (path,) = saved(tmp_path, 7)
    load(path, {name: torch.zeros_like(value) for name, value in tensors(7.0).items()})


def test_marker_lists_every_file(tmp_path):
    (path,) = saved(tmp_path, 7)
    listed = json.loads((path / "COMPLETE.json").read_text())["files"]
    assert set(listed) == {file.name for file in path.iterdir()} - {"COMPLETE.json"} >= {".metadata", "config.json"}
    assert all(entry["bytes"] == (path / name).stat().st_size for name, entry in listed.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("optim/student/block.0.weight/step"), "optim/student/block.0.weight/step is unexpected"),
        (lambda t: t.update({"model/student/new": torch.zeros(1)}), "model/student/new is missing"),
        (lambda t: t.update({"model/student/block.0.weight": torch.zeros(2, 3)}), r"block.0.weight is \(3, 2\).*expected \(2, 3\)"),
        (lambda t: t.update({"counters/iteration": torch.tensor(0.0)}), "counters/iteration is .*int64, expected .*float32"),
    ],
)
def test_loading_is_strict_and_fills_nothing_on_refusal(tmp_path, change, words):
    (path,) = saved(tmp_path, 7)
    table = {name: torch.zeros_like(value) for name, value in tensors(7.0).items()}
    change(table)
    with pytest.raises(CheckpointError, match=words):
        load(path, table)
    assert not any(value.any() for value in table.values())


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
    save(tmp_path, 2, {"model/student/w": torch.zeros(10)}, SETTINGS, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointWriteError, match="iter_00000004 could not be written .*iter_00000002 is intact: make room"):
            save(tmp_path, 4, {"model/student/w": torch.zeros(100_000)}, SETTINGS, 1)
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


# --- Choosing ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_no_checkpoint_yet_is_none(tmp_path):
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints/iter_00000002.partial").mkdir(parents=True)
    assert latest(tmp_path) is None


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp has another checksum"),
        (lambda path: flip(path / ".metadata"), ".metadata has another checksum"),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp has 100 bytes, expected"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "COMPLETE.json").unlink(), "no COMPLETE.json"),
        (lambda path: os.truncate(path / "COMPLETE.json", 40), "COMPLETE.json cannot be read"),
        (lambda path: (path / "COMPLETE.json").write_text("[]"), "COMPLETE.json cannot be read"),
        (lambda path: (path / "COMPLETE.json").write_text('{"files": {}}'), "does not list .metadata"),
    ],
)
def test_damaged_ones_are_skipped_with_their_reason(tmp_path, caplog, harm, words):
    first, second = saved(tmp_path, 2, 4)
    harm(second)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == first
    assert f"{second} skipped" in caplog.text and words in caplog.text
    harm(first)
    with pytest.raises(CheckpointError, match="no usable checkpoint") as error:
        latest(tmp_path)
    assert str(error.value).count(words) == 2 and "iter_00000002" in str(error.value) and "iter_00000004" in str(error.value)


def test_leftover_partial_is_named(tmp_path, caplog):
    (first,) = saved(tmp_path, 2)
    (tmp_path / "checkpoints/iter_00000004.partial").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == first
    assert "iter_00000004.partial skipped: a save that did not finish" in caplog.text


def test_contents_that_call_code_are_refused(tmp_path):
    (path,) = saved(tmp_path, 2)
    (path / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(CheckpointError, match="refers to posix.getcwd"):
        load(path, tensors(2.0))


# --- Hand-over ---


def test_weights_of_a_role_come_from_the_newest_good_checkpoint(tmp_path):
    _, second, third = saved(tmp_path, 2, 4, 6)
    flip(third / "__0_0.distcp")
    for path in (tmp_path, second):
        assert torch.equal(load_weights_of(path, "fake_score")["block.0.weight"], tensors(4.0)["model/fake_score/block.0.weight"])
        assert load_weights_of(path, "student")["block.0.weight"].unique().tolist() == [4.25]
        assert load_weights_of(path, "student", prefer_ema=False)["block.0.weight"].unique().tolist() == [4.0]


def test_weights_without_an_average_are_the_roles_own(tmp_path):
    save(tmp_path, 2, tensors(2.0, ema=False), SETTINGS, 1)
    assert {name: value.unique().tolist() for name, value in load_weights_of(tmp_path, "student").items()} == {"block.0.weight": [2.0]}


def test_hand_over_errors_name_path_and_roles(tmp_path):
    (path,) = saved(tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match="no role 'teacher'; it holds fake_score, student, student_ema"):
        load_weights_of(tmp_path / "run", "teacher")
    with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
        load_weights_of(tmp_path / "nowhere", "student")
    with pytest.raises(FileNotFoundError, match="no checkpoint in it"):
        load_weights_of(tmp_path, "student")
    flip(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="another checksum"):
        load_weights_of(path, "student")


# --- The same run ---


def changed(**options) -> dict:
    return json.loads(json.dumps(SETTINGS)) | options


def test_settings_of_length_and_logging_may_change():
    train = {name: 99 for name in ("iterations", "log_every", "save_every", "keep_last", "picture_every", "picture_samples")}
    check_same_run(SETTINGS, changed(out="elsewhere", train={"seed": 0, **train}))


def test_every_other_difference_is_listed_old_to_new():
    new = changed(net={"hidden": 16, "heads": [1, 3]}, train={"iterations": 20})
    with pytest.raises(CheckpointError) as error:
        check_same_run(SETTINGS, new)
    for words in ("net.hidden: 8 -> 16", "net.heads: [1, 2] -> [1, 3]", "train.seed: 0 -> absent", "choose another folder"):
        assert words in str(error.value)
    assert "iterations" not in str(error.value)


def test_run_folder_keeps_its_config_and_says_which_it_is(tmp_path):
    open_run(tmp_path / "run", SETTINGS)
    open_run(tmp_path / "run", changed(stage="other"))  # nothing was saved yet: a corrected start goes through
    open_run(tmp_path / "run", SETTINGS)
    (tmp_path / "run/checkpoints/iter_00000001").mkdir(parents=True)
    open_run(tmp_path / "run", changed(train={"iterations": 30, "seed": 0}))
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["iterations"] == 30
    with pytest.raises(CheckpointError, match="run: another run is here"):
        open_run(tmp_path / "run", changed(stage="other"))
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        open_run(tmp_path / "run", SETTINGS)


def test_allowed_changes_are_options_that_exist():
    from cosmos_mp.config import TrainConfig

    assert all(hasattr(TrainConfig, name.removeprefix("train.")) for name in checkpoint.MAY_CHANGE if name.startswith("train."))
