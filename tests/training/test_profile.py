"""The profile window: the tree of ranges of real iterations, when it opens and closes, and what it writes."""

from __future__ import annotations

import gzip
import json
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from cosmos_mp.config import (
    ConfigError,
    DiffusionConfig,
    DMD2Config,
    EMAConfig,
    HeadConfig,
    OptimConfig,
    ProfileConfig,
    TeacherLossConfig,
    TrainConfig,
)
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.distill.kd import KD
from cosmos_mp.distill.teacher import TeacherPretraining
from cosmos_mp.models.block import Block
from cosmos_mp.nvtx import nvtx, recording
from cosmos_mp.parallel.recompute import recompute
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.training import profile
from cosmos_mp.training.callbacks import Callback, JsonLines
from cosmos_mp.training.loop import fit
from cosmos_mp.training.profile import Clock, Profile, check_device, check_window, name_blocks

DIFFUSION = DiffusionConfig(condition_frames=2)
HEAD = HeadConfig("conv3d", 8, (1,))
PARTS = ("attn", "xattn", "mlp")


def blocks(*numbers: int, control: bool = False) -> list[str]:
    return [f"{'control.' * control}blk{number}.{part}" for number in numbers for part in PARTS]


WHOLE = [*blocks(0, 1, control=True), *blocks(0, 1, 2)]
EARLY = [*blocks(0, 1, control=True), *blocks(0, 1)]
"""A pass that ends at the feature of block 1."""


def ended(*roles: str) -> list:
    steps = [part for role in roles for part in ("clip", f"optim.{role}")]
    return ["grad.reduce", "report", *steps]


STUDENT_MICRO_BATCH = [
    "data",
    ("student.fwd", WHOLE),
    ("teacher.cond.fwd", WHOLE),
    ("fake_score.fwd", WHOLE),
    ("teacher.uncond.fwd", WHOLE),
    "loss.dmd2",
    "gan.head",
    "bwd",
]
CRITIC_MICRO_BATCH = [
    "data",
    ("student.fwd", WHOLE),
    ("fake_score.fwd", WHOLE),
    ("teacher.early.fwd", EARLY),
    ("teacher.early.fwd", EARLY),
    "gan.head",
    "bwd",
]
CRITICS = ("fake_score", "discriminator")


class Tree:
    """A recorder: every range with those inside it, a name alone where there are none."""

    def __init__(self):
        self.roots: list = []
        self._open = [self.roots]

    @contextmanager
    def __call__(self, name: str):
        inside: list = []
        self._open.append(inside)
        try:
            yield
        finally:
            assert self._open.pop() is inside, "ranges cross"
            self._open[-1].append((name, inside) if inside else name)


class Data:
    def __init__(self, make_batch, **options):
        self.make_batch, self.options = make_batch, options

    def batch(self, position: int, size: int):
        return self.make_batch(range(position, position + size), torch.float32, **self.options)


@pytest.fixture
def make_dmd2(make_network, make_discriminator, unconditional):
    def make(**options) -> DMD2:
        networks = {role: make_network(i, torch.float32) for i, role in enumerate(("student", "teacher", "fake_score"))}
        networks["discriminator"] = make_discriminator(HEAD, dtype=torch.float32)
        return DMD2(networks, DIFFUSION, DMD2Config(**options), HEAD, unconditional.float(), 3)

    return make


@pytest.fixture
def train(make_batch, tmp_path):
    """Train a method for some iterations of two micro-batches of one sample."""

    def train(method, iterations: int, *callbacks: Callback, **options):
        config = TrainConfig(iterations, 2, 1, save_every=100, **options)
        optim = {role: OptimConfig(lr=1e-4) for i in range(iterations) for role in method.trained(i)}
        data = Data(make_batch, noise=isinstance(method, KD))
        return fit(method, data, config, optim, EMAConfig(), tmp_path / "run", callbacks, settings={})

    return train


def named(method) -> None:
    for network in method.networks.values():
        name_blocks(network)


# --- The tree ---


def test_a_student_and_a_critic_iteration_of_dmd2_are_the_known_trees(make_dmd2, train):
    method, tree = make_dmd2(student_update_freq=2), Tree()
    named(method)
    with recording(tree):
        train(method, 2)
    assert tree.roots == [
        ("cosmos_mp.step/student", STUDENT_MICRO_BATCH * 2 + ended("student")),
        ("cosmos_mp.step/fake_score+discriminator", CRITIC_MICRO_BATCH * 2 + ended(*CRITICS)),
    ]


def test_features_of_the_fake_score_and_a_student_without_scores_are_named_so(make_dmd2, train):
    method, tree = make_dmd2(student_update_freq=2, feature_role="fake_score"), Tree()
    with recording(tree):
        train(method, 2)
    assert tree.roots[1][1].count("fake_score.early.fwd") == 4 and "teacher.early.fwd" not in tree.roots[1][1]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_kd_and_teacher_training_are_the_known_trees(make_network, train, role):
    network, tree = make_network(0, torch.float32), Tree()
    method = KD(network, DIFFUSION, 0) if role == "student" else TeacherPretraining(network, DIFFUSION, TeacherLossConfig(), 0)
    named(method)
    with recording(tree):
        train(method, 1)
    micro_batch = ["data", (f"{role}.fwd", WHOLE), "bwd"]
    assert tree.roots == [(f"cosmos_mp.step/{role}", micro_batch * 2 + ended(role))]


def test_a_recomputed_block_shows_again_inside_the_backward_pass(make_network, train):
    network, tree = make_network(0, torch.float32), Tree()
    recompute(network, Block, "full")
    method = KD(network, DIFFUSION, 0)
    named(method)
    with recording(tree):
        train(method, 1)
    (_, inside), *_ = [part for part in tree.roots[0][1] if part[0] == "bwd"]
    assert sorted(inside) == sorted(WHOLE)


def test_named_blocks_compute_the_same_and_keep_their_weights_names(make_network, make_input):
    plain, named_ = make_network(), make_network()
    name_blocks(named_)
    assert torch.equal(plain(make_input()).out, named_(make_input()).out)
    assert list(plain.state_dict()) == list(named_.state_dict())


@pytest.mark.parametrize("attribute", ["self_attn", "mlp"])
def test_ranges_end_where_an_exception_passes_through_every_level(make_dmd2, train, attribute):
    method, tree, seen = make_dmd2(), Tree(), []

    def broken(*_, **__):
        seen.append(1)
        raise RuntimeError("told to fail")

    getattr(method.networks["teacher"].base.blocks[1], attribute).forward = broken
    named(method)
    with recording(tree):
        with pytest.raises(RuntimeError, match="told to fail"):
            train(method, 1)
        with nvtx("after"):
            pass
    step, after = tree.roots
    assert seen and after == "after" and step[0] == "cosmos_mp.step/student"
    *_, (pass_, parts) = step[1]
    last = {"self_attn": "blk1.attn", "mlp": "blk1.mlp"}[attribute]
    assert (pass_, parts[-1]) == ("teacher.cond.fwd", last)


# --- When ---


class Watched(Profile):
    """Notes each opening and closing, and the iterations between."""

    def __init__(self, options, topology):
        super().__init__(options, topology)
        self.notes: list[str] = []

    def before_iteration(self, iteration):
        was = self._window
        super().before_iteration(iteration)
        if self._window is not was:
            self.notes.append(f"open before {iteration}")

    def close(self):
        was = self._window
        super().close()
        if was is not None:
            self.notes.append("closed")

    def on_iteration(self, event):
        super().on_iteration(event)
        self.notes += [str(event.iteration)] if self._window is not None else []


def watched(**options) -> Watched:
    return Watched(ProfileConfig(kind="torch", **options), single_process())


def test_the_window_holds_its_iterations_and_no_other(make_network, train, tmp_path):
    watching = watched(start=1, stop=3)
    train(KD(make_network(0, torch.float32), DIFFUSION, 0), 5, watching, JsonLines())
    assert watching.notes == ["open before 1", "1", "closed"]  # closed within iteration 2's own word
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    parts = {"data", "student.fwd", "bwd", "grad.reduce", "report", "clip", "optim.student"}
    assert [set(record["passes"]) for record in records] == [set(), parts, parts, set(), set()]
    for record in records[1:3]:
        assert all(value > 0 for value in record["passes"].values())
        assert sum(record["passes"].values()) <= record["seconds"]


def test_a_window_that_the_runs_end_cuts_is_closed_and_written(make_network, train, tmp_path):
    watching = watched(start=1, stop=9)
    (tmp_path / "run" / "profile").mkdir(parents=True)  # another rank's, or an earlier start's
    train(KD(make_network(0, torch.float32), DIFFUSION, 0), 3, watching)
    assert watching.notes == ["open before 1", "1", "2", "closed"]
    assert (tmp_path / "run" / "profile" / "trace_rank0.json.gz").is_file()


def test_a_run_that_fails_inside_its_window_closes_it_and_writes(make_network, train, tmp_path):
    class Fails(Callback):
        def on_iteration(self, event):
            raise RuntimeError("told to fail")

    watching = watched(start=0, stop=9)
    with pytest.raises(RuntimeError, match="told to fail"):
        train(KD(make_network(0, torch.float32), DIFFUSION, 0), 3, watching, Fails())
    assert watching.notes == ["open before 0", "0", "closed"]
    assert (tmp_path / "run" / "profile" / "trace_rank0.json.gz").is_file()
    with nvtx("a") as off:
        assert off is None


def test_a_run_that_goes_on_inside_its_window_profiles_the_rest_and_after_it_says_so(make_network, train, capsys):
    network = make_network(0, torch.float32)
    train(KD(network, DIFFUSION, 0), 2)
    watching = watched(start=1, stop=3)
    train(KD(network, DIFFUSION, 0), 4, watching)
    assert watching.notes == ["open before 2", "closed"] and not capsys.readouterr().err
    late = watched(start=1, stop=3)
    train(KD(network, DIFFUSION, 0), 5, late)
    assert late.notes == [] and "window ended before iteration 4" in capsys.readouterr().err


# --- What ---


def trace(path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_the_trace_of_torch_names_the_ranges_of_the_window(make_dmd2, train, tmp_path):
    method = make_dmd2(student_update_freq=2)
    named(method)
    train(method, 4, Profile(ProfileConfig("torch", start=1, stop=3, ranks=(0,)), single_process()))
    events = trace(tmp_path / "run" / "profile" / "trace_rank0.json.gz")
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    names = [mark["name"] for mark in marks]
    assert [name for name in names if name.startswith("cosmos_mp.step/")] == [
        "cosmos_mp.step/fake_score+discriminator",
        "cosmos_mp.step/student",
    ]
    assert names.count("loss.dmd2") == 2 and names.count("optim.student") == 1 and names.count("blk2.xattn") == 2 * (2 + 4)
    assert any(event.get("name") == "aten::addmm" or event.get("name") == "aten::mm" for event in events)
    by_name = {mark["name"]: mark for mark in marks}
    step, loss = by_name["cosmos_mp.step/student"], by_name["loss.dmd2"]
    assert step["ts"] <= loss["ts"] and loss["ts"] + loss["dur"] <= step["ts"] + step["dur"]


class FakeCuda:
    """What the window asks of a GPU, noted."""

    def __init__(self, monkeypatch):
        self.calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.calls.append("synchronize"))
        monkeypatch.setattr(torch.cuda.profiler, "start", lambda: self.calls.append("start"))
        monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: self.calls.append("stop"))
        monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: self.calls.append(f"push {name}"))
        monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: self.calls.append("pop"))
        memory = torch.cuda.memory
        monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all": self.calls.append(f"history {enabled}"))
        monkeypatch.setattr(memory, "_dump_snapshot", lambda path: self.calls.append(f"snapshot {path.rpartition('/')[2]}"))


def test_nsights_capture_is_started_and_stopped_around_whole_work(make_network, train, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    train(KD(make_network(0, torch.float32), DIFFUSION, 0), 3, Profile(ProfileConfig("nsight", start=1, stop=2), single_process()))
    assert cuda.calls[:3] == ["synchronize", "start", "push cosmos_mp.step/student"]
    assert cuda.calls[-3:] == ["pop", "synchronize", "stop"]
    pushes = [call for call in cuda.calls if call.startswith("push")]
    assert len(pushes) == cuda.calls.count("pop") and cuda.calls.count("start") == cuda.calls.count("stop") == 1
    assert "push optim.student" in pushes and pushes.count("push student.fwd") == 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_memory_snapshot_is_written_at_the_windows_end_and_recording_stops(make_network, train, monkeypatch, fails):
    class Fails(Callback):
        def on_iteration(self, event):
            if fails:
                raise RuntimeError("told to fail")

    cuda, options = FakeCuda(monkeypatch), ProfileConfig(memory=True, start=0, stop=2)
    with pytest.raises(RuntimeError, match="told") if fails else nullcontext():
        train(KD(make_network(0, torch.float32), DIFFUSION, 0), 3, Profile(options, replace(single_process(), rank=3)), Fails())
    assert cuda.calls == ["history all", "snapshot memory_rank3.pickle", "history None"]


def test_what_is_open_when_the_window_fails_to_open_is_closed(make_network, train, monkeypatch):
    def fails():
        raise RuntimeError("no profiler")

    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(profile, "_capture", fails)
    with pytest.raises(RuntimeError, match="no profiler"):
        train(KD(make_network(0, torch.float32), DIFFUSION, 0), 1, Profile(ProfileConfig("nsight", True, 0, 1), single_process()))
    assert cuda.calls[-1] == "history None"


# --- Clock ---


def test_the_clock_adds_up_the_parts_of_a_step_and_no_part_of_a_part(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with recording(clock):
        with pytest.raises(ValueError), nvtx("step"):
            for _ in range(2):
                with nvtx("a"), nvtx("inside"):
                    pass
            with nvtx("b"):
                raise ValueError
        assert clock.read() == {"a": 2, "b": 1} and clock.read() == {}
        with nvtx("step"), nvtx("c"):
            pass
    assert clock.read() == {"c": 1}


def test_a_gpus_clock_reads_events_and_waits_only_then(monkeypatch):
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def elapsed_time(self, end):
            calls.append("elapsed")
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    clock = Clock(torch.device("cuda", 0))
    with recording(clock), nvtx("step"):
        with nvtx("a"):
            pass
    assert calls == ["record", "record"]
    assert clock.read() == {"a": 0.25} and calls == ["record", "record", "synchronize", "elapsed"]


# --- Options ---


def test_a_profile_that_would_record_nothing_is_refused():
    torch_, off = ProfileConfig("torch", ranks=(0, 7)), ProfileConfig(start=90, stop=91, ranks=(50,))
    check_window(torch_, 11, 8)
    check_window(off, 5, 1)
    with pytest.raises(ConfigError, match=re.escape("profile.start=10 comes after the last of train.iterations=10")):
        check_window(torch_, 10, 8)
    with pytest.raises(ConfigError, match=re.escape("profile.ranks names 7; the ranks of 7 process(es) are 0..6")):
        check_window(torch_, 11, 7)
    with pytest.raises(ConfigError, match=r"profile\.ranks"):
        check_window(ProfileConfig(memory=True, ranks=(1,)), 11, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"kind": "nsight"}, "profile.kind=nsight records a GPU.*profile.kind=torch works"), ({"memory": True}, "profile.memory records")],
)
def test_what_needs_a_gpu_is_refused_without_one(monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device(ProfileConfig("torch"))
    with pytest.raises(ConfigError, match=said):
        check_device(ProfileConfig(**options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device(ProfileConfig(**options))
