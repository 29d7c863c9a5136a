"""What the stages share: stores that fit, watchers, the exit code of a run that a signal ended."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_mp.config import ConfigError
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.shards import StoreError
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.distill.teacher import TeacherPretraining
from cosmos_mp.options import load
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.roles import new_transfer_net
from cosmos_mp.training import stage
from cosmos_mp.training.checkpoint import CheckpointError, latest, load_weights_of
from cosmos_mp.training.logs import lines
from cosmos_mp.training.pictures import picture_grid
from cosmos_mp.training.stage import INTERRUPTED, check_run, meet, open_held_out, open_store, train


@pytest.fixture
def run(tiny_world, tmp_path):
    """Train a teacher with `train`; `answers` makes the rows of its pictures from the denoiser."""

    def run(out: str, *options, answers=None) -> int:
        settings = tiny_world.config("teacher", str(tmp_path / out), *options)
        topology = single_process()
        held_out = open_held_out(settings, topology)
        network = new_transfer_net(settings.net, topology, settings.train.seed)
        method = TeacherPretraining(network, settings.diffusion, settings.loss, settings.train.seed)
        denoiser = Denoiser(network, settings.diffusion)
        rows = answers or {"teacher 1-step": lambda epsilon, condition: one_step(denoiser, epsilon, condition).x0}
        data = open_store(settings.clips, "clips", settings)
        return train(settings, topology, method, data, held_out, {"teacher": settings.optim_teacher}, rows, ema_role="teacher")

    return run


# --- Stores ---


def test_a_store_that_fits_is_opened_with_the_runs_order(tiny_world):
    settings = tiny_world.config("teacher", "unused", "--train.seed", 3)
    data = open_store(settings.clips, "clips", settings)
    assert (len(data), data.seed) == (36, 3)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("pairs", {}, "kind=clips, this run expects pairs"),
        (
            "clips",
            {"diffusion": {"latent_shape": (16, 2, 8, 8)}},
            r"diffusion.latent_shape=\(16, 3, 8, 8\), this run expects \(16, 2, 8, 8",
        ),
        ("clips", {"net": {"text_dim": 32}}, "net.text_dim=64, this run expects 32"),
    ],
)
def test_a_store_that_does_not_fit_is_named_with_the_option(tiny_world, kind, change, said):
    settings = tiny_world.config("teacher", "unused")
    parts = {name: dataclasses.replace(getattr(settings, name), **values) for name, values in change.items()}
    with pytest.raises(StoreError, match=said):
        open_store(settings.clips, kind, dataclasses.replace(settings, **parts))


def test_a_path_without_a_store_is_named(tiny_world, tmp_path):
    with pytest.raises(FileNotFoundError, match="header.json does not exist.*cosmos_mp encode"):
        open_store(str(tmp_path), "clips", tiny_world.config("teacher", "unused"))


# --- Watchers ---


def test_a_run_leaves_config_log_scalars_pictures_and_checkpoint(run, tmp_path, tiny_world, capsys):
    options = ["--train.iterations", 4, "--train.picture_every", 3, "--train.tensorboard", "--train.log_every", 2]
    assert run("a", *options) == 0
    folder = tmp_path / "a"
    assert load(folder / "config.json") == tiny_world.config("teacher", str(folder), *options)
    records = [record for _, record in lines(folder / "log.jsonl")]
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["iter_00000003.png", "iter_00000004.png"]
    assert latest(folder).name == "iter_00000004"
    assert list((folder / "tensorboard").glob("events.*"))
    captured = capsys.readouterr()
    assert [line.split("|")[0].split() for line in captured.out.splitlines()] == [["iteration", "2/4"], ["iteration", "4/4"]]
    assert "iteration 2/4, 0" in captured.err


@pytest.mark.parametrize(
    ("options", "profiled"),
    [([], False), (["--profile.kind", "torch"], True), (["--profile.kind", "torch", "--profile.ranks", 1, 2], False)],
)
def test_only_the_ranks_that_were_named_are_profiled(run, tmp_path, monkeypatch, options, profiled):
    named = []
    monkeypatch.setattr(stage, "name_blocks", named.append)
    assert run("a", "--train.iterations", 2, "--profile.start", 1, "--profile.stop", 2, *options) == 0
    assert (len(named) == 1) is profiled and (tmp_path / "a" / "profile" / "trace_rank0.json.gz").exists() is profiled


def test_watchers_can_be_left_out(run, tmp_path):
    assert run("a", "--train.iterations", 1) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".lock", "checkpoints", "config.json", "log.jsonl"]


def test_a_picture_has_a_grid_per_clip_with_the_rows_asked_for(run, tmp_path):
    def zeros(epsilon, condition):
        return torch.zeros_like(epsilon)

    rows = {"student 1-step": zeros, "teacher 1-step": zeros}
    assert run("a", "--train.iterations", 1, "--train.picture_every", 1, "--train.picture_samples", 3, answers=rows) == 0
    image = np.asarray(Image.open(tmp_path / "a" / "pictures" / "iter_00000001.png"))
    labels = ["student 1-step", "teacher 1-step", "control", "ground truth"]
    one = picture_grid(dict.fromkeys(labels, np.zeros((9, 64, 64, 3), np.uint8)))
    assert image.shape == (3 * one.shape[0], one.shape[1], 3)


def test_pictures_that_cannot_be_drawn_stop_the_run_before_it_begins(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="header.json does not exist"):
        run("a", "--train.picture_every", 1, "--holdout", tmp_path / "absent")
    with pytest.raises(ConfigError, match="picture_samples=99"):
        run("a", "--train.picture_every", 1, "--train.picture_samples", 99)
    assert not (tmp_path / "a").exists()


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_75_and_the_next_start_goes_on_to_the_same_weights(run, tmp_path, capsys, number):
    assert run("whole") == 0

    def stop(epsilon, condition):  # drawn at iteration 3: the signal comes in the middle of it
        os.kill(os.getpid(), number)
        return epsilon

    assert run("stopped", "--train.picture_every", 3, answers={"stop": stop}) == INTERRUPTED == 75
    assert "interrupted and saved at iteration 3; run the same command again to go on" in capsys.readouterr().out
    assert latest(tmp_path / "stopped").name == "iter_00000003"
    assert run("stopped") == 0
    for prefer_ema in (True, False):
        whole, resumed = (load_weights_of(tmp_path / name, "teacher", prefer_ema=prefer_ema) for name in ("whole", "stopped"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logged = [json.loads(line)["terms"] for name in ("whole", "stopped") for line in (tmp_path / name / "log.jsonl").open()]
    assert logged[:6] == logged[6:]


def test_a_finished_run_started_again_changes_nothing(run, tmp_path):
    assert run("a", "--train.iterations", 2) == 0
    checkpoint = latest(tmp_path / "a") / "COMPLETE.json"
    before, log = checkpoint.stat().st_mtime_ns, (tmp_path / "a" / "log.jsonl").read_text()
    assert run("a", "--train.iterations", 2) == 0
    assert checkpoint.stat().st_mtime_ns == before
    assert (tmp_path / "a" / "log.jsonl").read_text() == log


def test_another_run_in_the_folder_is_refused(run, tmp_path):
    assert run("a", "--train.iterations", 1) == 0
    with pytest.raises(ValueError, match="another run is here .train.seed: 0 -> 1.; set these options back, or choose another folder"):
        run("a", "--train.iterations", 1, "--train.seed", 1)


def test_other_samples_at_the_same_path_are_noticed(run, tiny_world, tmp_path):
    clips = tmp_path / "clips"
    shutil.copytree(tiny_world.root / "clips" / "train", clips)
    assert run("a", "--train.iterations", 1, "--clips", clips) == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["data_sha256"] == LatentDataset(clips, 0, expect={}).reader.sha256
    shutil.rmtree(clips)
    shutil.copytree(tiny_world.root / "clips" / "holdout", clips)
    with pytest.raises(ValueError, match='another run is here .data_sha256: "[0-9a-f]{64}" -> "[0-9a-f]{64}"'):
        run("a", "--train.iterations", 2, "--clips", clips)


def test_a_folder_where_another_process_trains_is_refused(run, tmp_path):
    hold = "import sys, time; from pathlib import Path; from cosmos_mp.training.checkpoint import exclusive\n"
    hold += "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"a: process {other.pid} trains here; wait for it, or stop it"):
            run("a", "--train.iterations", 1)
        other.kill()  # -9: nothing of its own can clean up
    assert run("a", "--train.iterations", 1) == 0


# --- Layouts ---


@pytest.fixture
def joined(monkeypatch) -> list:
    """The layouts for which groups would have been made."""
    asked: list = []
    monkeypatch.setattr(stage, "join", lambda options: asked.append(options) or single_process())
    return asked


@pytest.mark.parametrize(
    ("kind", "world", "options", "said"),
    [
        ("teacher", 3, ["--parallel.tp", 2], "parallel.tp=2 x parallel.cp=1 = 2 does not divide 3 process"),
        ("kd", 4, ["--parallel.dp", 2], "x parallel.dp=2 = 2, but 4 process.* were started: start 2, or set parallel.dp to 4 or 0"),
        ("teacher", 8, ["--parallel.tp", 8], "parallel.tp=8 does not divide net.heads=4: give one of 1, 2, 4"),
        ("teacher", 2, ["--parallel.cp", 2], "parallel.cp=2 does not divide the 3 latent frames"),
        ("kd", 3, [], "global_batch_size=4 is no multiple of .*micro_batch_size=2 x 3 data-parallel ranks = 6"),
        ("dmd2", 3, ["--parallel.cp", 3, "--parallel.cp_attention", "ring"], "head.kind=conv3d joins frames in pairs"),
        ("dmd2", 1, ["--parallel.reference_cp_scaling", 2], "parallel.reference_cp_scaling=2 must be"),
    ],
)
def test_a_run_that_does_not_fit_its_processes_is_refused_before_any_group_is_made(
    tiny_world, monkeypatch, joined, kind, world, options, said
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    settings = tiny_world.config(kind, "unused", *options)
    with pytest.raises(ConfigError, match=said):
        meet(settings)
    assert joined == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile.start", 7, "--profile.stop", 9], "profile.start=7 comes after the last of train.iterations=6"),
        (["--profile.start", 1, "--profile.stop", 3, "--profile.ranks", 0, 4], "profile.ranks names 4; the ranks of 2"),
    ],
)
def test_a_profile_of_nothing_is_refused_before_any_group_is_made(tiny_world, monkeypatch, joined, options, said):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=said):
        meet(tiny_world.config("teacher", "unused", "--profile.kind", "torch", *options))
    assert not joined


def test_a_profile_of_a_gpu_is_refused_without_one(tiny_world, monkeypatch, joined):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="profile.kind=nsight records a GPU"):
        meet(tiny_world.config("teacher", "unused", "--profile.kind", "nsight", "--profile.start", 1, "--profile.stop", 3))
    assert not joined


def test_a_run_that_fits_joins_with_its_layout(tiny_world, monkeypatch, joined):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = tiny_world.config("teacher", "unused", "--parallel.tp", 2, "--parallel.sequence_parallel")
    assert meet(settings) == dataclasses.replace(single_process(), backend=settings.backend)
    assert joined == [settings.parallel] and settings.parallel.tp == 2


@pytest.mark.parametrize(
    ("kind", "world", "options", "dp"),
    [
        ("teacher", 1, [], 1),
        ("teacher", 2, [], 2),
        ("kd", 4, ["--parallel.tp", 2], 2),
        ("kd", 3, ["--parallel.cp", 3, "--parallel.cp_attention", "ring"], 1),
        ("dmd2", 3, ["--parallel.cp", 3, "--parallel.cp_attention", "ring", "--head.kind", "conv2d"], 1),
        # Without a GAN there is no head that could be in the way.
        ("dmd2", 3, ["--parallel.cp", 3, "--parallel.cp_attention", "ring", "--dmd2.gan_weight", 0], 1),
    ],
)
def test_the_data_parallel_size_of_a_run_that_fits(tiny_world, kind, world, options, dp):
    assert check_run(tiny_world.config(kind, "unused", *options), world) == dp
