"""Errors as one line, exit codes passed through, and `--dry-run` before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cosmos_mp.cli import guarded, stage, stage_main
from cosmos_mp.config import ConfigError, KDRun
from cosmos_mp.data.shards import StoreError
from cosmos_mp.data.video import VideoError
from cosmos_mp.models.weights import WeightError
from cosmos_mp.training.checkpoint import CheckpointError, CheckpointWriteError
from cosmos_mp.training.loop import NonFiniteError


def status(run) -> int:
    with pytest.raises(SystemExit) as stop:
        guarded(run)
    return stop.value.code


def failing(error: BaseException):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("train.seed is wrong"),
        StoreError("shard_00001 is damaged"),
        VideoError("clip.mp4: no frames"),
        WeightError("teacher.pt does not fit"),
        CheckpointError("another run is here"),
        CheckpointWriteError("disk full"),
        NonFiniteError("loss term 'kd' is nan"),
        FileNotFoundError(2, "No such file or directory", "clips.jsonl"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_known_error_is_one_line_and_status_1(capsys, monkeypatch, error):
    monkeypatch.delenv("COSMOS_MP_TRACEBACK", raising=False)
    assert status(failing(error)) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {type(error).__name__}: {error}\n"
    assert captured.out == ""


@pytest.mark.parametrize("error", [KeyError("name"), IndexError("list index out of range"), ZeroDivisionError("division by zero")])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        guarded(failing(error))


def test_the_traceback_is_there_for_who_wants_it(capsys, monkeypatch):
    monkeypatch.setenv("COSMOS_MP_TRACEBACK", "1")
    assert status(failing(ConfigError("train.seed is wrong"))) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("ConfigError: train.seed is wrong\n")


@pytest.mark.parametrize("traceback", ["", "1"])
def test_no_thread_holds_a_process_that_has_lost_a_rank(traceback):
    code = "import threading, time; from cosmos_mp.cli import guarded; from cosmos_mp.parallel.watch import LostRank\n"
    code += "def run():\n threading.Thread(target=time.sleep, args=(1000,)).start()\n raise LostRank('rank 1 is gone')\nguarded(run)"
    env = os.environ | {"COSMOS_MP_TRACEBACK": traceback}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "LostRank: rank 1 is gone\n" in done.stderr, done.stderr
    assert ("Traceback" in done.stderr) == bool(traceback)


def test_a_mistake_in_the_code_is_not_hidden(monkeypatch):
    monkeypatch.delenv("COSMOS_MP_TRACEBACK", raising=False)
    with pytest.raises(TypeError):
        guarded(failing(TypeError("a bug")))
    with pytest.raises(KeyboardInterrupt):
        guarded(failing(KeyboardInterrupt()))


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_exit_codes_pass_through(code, expected):
    assert status(lambda: code) == expected


def test_a_stage_gets_its_configuration():
    seen = []
    assert stage(KDRun, lambda config: seen.append(config.train.seed) or 75, ["tiny_kd", "--train.seed", "9"]) == 75
    assert seen == [9]


@pytest.mark.parametrize("words", [["tiny_kd", "--dry-run"], ["--dry-run", "tiny_kd", "--train.seed", "0"]])
def test_a_dry_run_runs_nothing(capsys, words):
    assert not stage(KDRun, failing(AssertionError("ran")), words)
    assert '"stage": "kd"' in capsys.readouterr().out


def test_a_stage_script_reads_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_kd.py", "tiny_kd", "--train.seed", "4"])
    with pytest.raises(SystemExit) as stop:
        stage_main(KDRun, lambda config: config.train.seed)
    assert stop.value.code == 4
