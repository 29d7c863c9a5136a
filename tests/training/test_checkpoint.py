"""Checkpoints: damage found and named, the newest good one chosen, strict loading; whose folder it is."""

import errno
import io
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch

from cosmos_mp.training import checkpoint
from cosmos_mp.training.checkpoint import (
    CheckpointError,
    check_same_run,
    latest,
    load,
    load_role,
    load_weights_of,
    open_run,
)
from cosmos_mp.training.saver import Saver

SETTINGS = {"stage": "toy", "out": "runs/toy", "net": {"hidden": 8, "heads": (1, 2)}, "train": {"iterations": 10, "seed": 0}}


def tensors(value: float, *, ema: bool = True) -> dict[str, torch.Tensor]:
    table = {
        "model/student/block.0.weight": torch.full((3, 2), value),
        "model/fake_score/block.0.weight": torch.full((2,), value + 0.5, dtype=torch.float64),
        "optim/student/block.0.weight/step": torch.tensor(value),
        "counters/iteration": torch.tensor(int(value)),
    }
    return table | ({"model/student_ema/block.0.weight": torch.full((3, 2), value + 0.25)} if ema else {})


def saved(run_dir: Path, *iterations: int, ema: bool = True) -> list[Path]:
    saver = Saver(run_dir, SETTINGS, 9)
    for iteration in iterations:
        saver.save(iteration, tensors(float(iteration), ema=ema))
    return saver.finished()


# --- Loading ---


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


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch, caplog):
    first, second = saved(tmp_path, 2, 4)
    sha256 = checkpoint.file_sha256

    def broken_disk(file: Path) -> str:
        if file.parent == second and file.name == ".metadata":
            raise OSError(errno.EIO, "Input/output error")
        return sha256(file)

    monkeypatch.setattr(checkpoint, "file_sha256", broken_disk)
    assert latest(tmp_path) == first
    assert f"{second} skipped: .metadata cannot be read ([Errno 5] Input/output error)" in caplog.text


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


def test_a_role_is_read_into_given_tensors_of_any_type(tmp_path):
    saved(tmp_path, 2, 4)
    for prefer_ema, value in ((True, 4.25), (False, 4.0)):
        table = {"block.0.weight": torch.zeros(3, 2, dtype=torch.float64)}
        load_role(tmp_path, "student", table, prefer_ema=prefer_ema)
        assert (table["block.0.weight"] == value).all()


def test_a_role_that_does_not_fit_is_refused_and_nothing_is_filled(tmp_path):
    (path,) = saved(tmp_path, 2)
    table = {"block.0.weight": torch.zeros(3, 2), "block.1.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="iter_00000002 does not fit this run: block.1.weight is missing; check the net"):
        load_role(tmp_path, "student", table)
    assert not table["block.0.weight"].any()
    with pytest.raises(CheckpointError, match=r"block.0.weight is \(3, 2\) torch.float32, expected \(2, 3\)"):
        load_role(path, "student", {"block.0.weight": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match="block.0.weight is unexpected"):
        load_role(path, "student", {})
    flip(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="iter_00000002: __0_0.distcp has another checksum"):
        load_role(path, "student", {})


def test_weights_without_an_average_are_the_roles_own(tmp_path):
    saved(tmp_path, 2, ema=False)
    assert {name: value.unique().tolist() for name, value in load_weights_of(tmp_path, "student").items()} == {"block.0.weight": [2.0]}


def test_hand_over_errors_name_path_and_roles(tmp_path):
    (path,) = saved(tmp_path / "run", 2)
    for read in (load_weights_of, lambda path, role: load_role(path, role, {})):
        with pytest.raises(CheckpointError, match="no role 'teacher'; it holds fake_score, student, student_ema"):
            read(tmp_path / "run", "teacher")
        with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
            read(tmp_path / "nowhere", "student")
        with pytest.raises(FileNotFoundError, match="no checkpoint in it"):
            read(tmp_path, "student")
    flip(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="another checksum"):
        load_weights_of(path, "student")


# --- The same run ---


def changed(**options) -> dict:
    return json.loads(json.dumps(SETTINGS)) | options


def test_settings_of_length_and_logging_may_change():
    train = {name: 99 for name in ("iterations", "log_every", "save_every", "keep_last", "picture_every", "picture_samples")}
    check_same_run(SETTINGS, changed(out="elsewhere", train={"seed": 0, **train}))


def test_the_layout_may_change_but_not_what_changes_the_numbers():
    layout = {
        "tp": 2,
        "cp": 4,
        "dp": 0,
        "shard": 8,
        "sequence_parallel": True,
        "cp_attention": "ring",
        "reduce": "micro_batch",
        "timeout": 9.0,
    }
    check_same_run(changed(parallel=dict.fromkeys(layout)), changed(parallel=layout))
    for option in ("compute", "reference_cp_scaling"):
        with pytest.raises(CheckpointError, match=f"parallel.{option}: 1 -> 2"):
            check_same_run(changed(parallel={option: 1}), changed(parallel={option: 2}))


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
    from cosmos_mp.config import ParallelConfig, ProfileConfig, TrainConfig

    assert {f"profile.{name}" for name in ProfileConfig.__dataclass_fields__} | {"kernels"} <= checkpoint.MAY_CHANGE
    for prefix, options in (("train.", TrainConfig), ("parallel.", ParallelConfig), ("profile.", ProfileConfig)):
        names = [name.removeprefix(prefix) for name in checkpoint.MAY_CHANGE if name.startswith(prefix)]
        assert names and all(hasattr(options, name) for name in names)
    # Of a layout, all but what changes numbers.
    fixed = {f"parallel.{name}" for name in ParallelConfig.__dataclass_fields__} - checkpoint.MAY_CHANGE
    assert fixed == {"parallel.compute", "parallel.reference_cp_scaling"}


def test_a_copy_beside_the_checkpoints_is_none_of_them(tmp_path):
    for name in ("iter_00000002", "iter_00000002.keep", "iter_00000004.partial", "iter_best", "iter_00000001"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.published(tmp_path)] == ["iter_00000002", "iter_00000001"]


def test_whatever_stands_in_a_checkpoints_place_is_damage(tmp_path):
    (tmp_path / "iter_1").write_text("a file")
    (tmp_path / "iter_2" / checkpoint.MARKER).mkdir(parents=True)
    (tmp_path / "iter_3").mkdir()
    (tmp_path / "iter_3" / checkpoint.MARKER).write_text(100_000 * "[")
    found = [checkpoint.damage(tmp_path / f"iter_{number}") for number in (1, 2, 3)]
    assert [words.split(":")[0] for words in found] == [
        f"{checkpoint.MARKER} cannot be read ({name}" for name in ("NotADirectoryError", "IsADirectoryError", "RecursionError")
    ]


class Reduced:
    """Pickled as a call of getattr."""

    def __init__(self, *call: object):
        self.call = call

    def __reduce__(self):
        return getattr, self.call


def test_a_member_of_an_enumeration_may_be_written_as_old_pythons_do():
    kind = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    read = checkpoint._Contents(io.BytesIO(pickle.dumps(Reduced(kind, "TORCH_CONTIGUOUS_FORMAT")))).load()
    assert read is kind.TORCH_CONTIGUOUS_FORMAT
    for call in ((kind, "__class__"), (torch.Size, "numel"), ("text", "format")):
        with pytest.raises(checkpoint.CheckpointError, match="it was not written by this package"):
            checkpoint._Contents(io.BytesIO(pickle.dumps(Reduced(*call)))).load()
