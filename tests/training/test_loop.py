"""The loop on a toy method with a 4:1 cycle: what moves, what is skipped, and resume to the last bit, kill -9 included."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from cosmos_mp.config import ConfigError, EMAConfig, OptimConfig, TrainConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.distill.method import StepOutput, Term
from cosmos_mp.parallel import noise
from cosmos_mp.training import checkpoint, loop
from cosmos_mp.training.callbacks import Callback, JsonLines
from cosmos_mp.training.loop import Event, NonFiniteError, Result, State, fit, micro_batches
from cosmos_mp.training.optim import learning_rate

CRITICS = ("fake_score", "discriminator")
OPTIM = {
    "student": OptimConfig(lr=1e-2, warmup=2, decay="cosine", clip_norm=0.5),
    "fake_score": OptimConfig(lr=2e-2, decay="cosine", decay_from=0.5, clip_norm=0.0),
    "discriminator": OptimConfig(lr=3e-2, warmup=3),
}
EMA_ON = EMAConfig(0.9)
SETTINGS = {"stage": "toy", "train": {"iterations": 12}}


class ToyData:
    """Samples of six numbers, functions of their position."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def batch(self, position: int, size: int) -> Batch:
        position_B = torch.arange(position, position + size)
        latent = noise.normal((1, 1, 1, 6), 7, "data", 0, position_B).to(self.dtype)
        empty = torch.zeros(size, 1, 1)
        return Batch(position_B, latent, latent, empty, torch.full((size,), 24.0), empty)


class Toy:
    """Student against frozen teacher and discriminator; every fifth iteration trains the student, the others the critics."""

    def __init__(self, dtype: torch.dtype = torch.float32, break_at: dict[int, str] | None = None):
        def net(role: str, out: int) -> nn.Module:
            made = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, out)).to(dtype)
            with torch.no_grad():
                for name, p in made.named_parameters():
                    p.copy_(torch.randn(p.shape, generator=noise.generator(3, role + name, 0, 0)) * 0.4)
            return made

        self.networks = {"student": net("student", 6), "teacher": net("teacher", 6)}
        self.networks |= {"fake_score": net("fake_score", 6), "discriminator": net("discriminator", 1)}
        self.break_at = break_at or {}
        self.seen: list[tuple[int, str]] = []
        self.touched: set[tuple[int, str]] = set()
        self.iteration = -1
        for role, network in self.networks.items():
            for p in network.parameters():
                p.register_post_accumulate_grad_hook(lambda p, role=role: self.touched.add((self.iteration, role)))

    def trained(self, iteration: int) -> tuple[str, ...]:
        return ("student",) if iteration % 5 == 0 else CRITICS

    def step(self, batch: Batch, iteration: int) -> StepOutput:
        self.iteration = iteration
        self.seen += [(iteration, int(p)) for p in batch.position_B]
        net, real = self.networks, batch.latent_BCTHW.flatten(1)
        x = noise.normal((6,), 1, "x", iteration, batch.position_B, like=real)
        y = net["student"](x)  # with its graph in either phase: freezing is the loop's work
        if iteration % 5 == 0:
            terms = {"vsd": Term((y - net["teacher"](x)).pow(2).mean()), "gan": Term(net["discriminator"](y).mean() - 3, 0.25)}
        else:
            terms = {"fake_score": Term((net["fake_score"](y) - x).pow(2).mean())}
            terms["discriminator"] = Term(nn.functional.softplus(net["discriminator"](y) - net["discriminator"](real)).mean())
        kind = self.break_at.get(iteration)
        if kind == "loss":
            name, term = next(iter(terms.items()))
            terms[name] = Term(term.value * float("nan"))
        if kind == "gradient":  # the value is 0, its gradient is not finite; of the last trained role alone
            weight = net[self.trained(iteration)[-1]][0].weight
            terms["edge"] = Term((weight * 0).sum().sqrt())
        return StepOutput(terms, {"y_std": y.detach().std()})


@dataclass
class Recorder(Callback):
    """Keeps state and events; stops the process's run by SIGTERM, or raises, after an iteration."""

    stop_after: int | None = None
    fail_after: int | None = None
    state: State | None = None
    events: list[Event] = field(default_factory=list)
    snapshots: list[dict[str, torch.Tensor]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def on_start(self, state):
        self.state = state
        self.snapshots.append(self.copy())
        self.calls.append(f"start {state.iteration}")

    def on_iteration(self, event):
        self.events.append(event)
        self.snapshots.append(self.copy())
        self.calls.append(f"iteration {event.iteration}")
        if event.iteration == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        if event.iteration == self.fail_after:
            raise RuntimeError("told to fail")

    def on_checkpoint(self, path):
        self.calls.append(f"checkpoint {path.name}")

    def on_error(self, exc):
        self.calls.append(f"error {exc}")

    def close(self):
        self.calls.append("close")

    def copy(self):
        return {name: value.clone() for name, value in self.state.tensors().items()}


def train(run_dir: Path, recorder: Recorder | None = None, method: Toy | None = None, dtype=torch.float32, **options) -> Result:
    values = {"iterations": 12, "global_batch_size": 4, "micro_batch_size": 2, "save_every": 3, "keep_last": 2} | options
    callbacks = [JsonLines()] + ([recorder] if recorder else [])
    return fit(method or Toy(), ToyData(dtype), TrainConfig(**values), OPTIM, EMA_ON, run_dir, callbacks, settings=SETTINGS)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(before: dict, after: dict, prefix: str) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(prefix))


def log_of(run_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "samples_per_second")} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    recorder = Recorder()
    assert train(run_dir, recorder) == Result(12, interrupted=False)
    return recorder, run_dir


# --- What moves ---


def test_each_iteration_moves_its_roles_alone(uninterrupted):
    recorder, _ = uninterrupted
    for event, before, after in zip(recorder.events, recorder.snapshots, recorder.snapshots[1:], strict=False):
        student = event.iteration % 5 == 0
        assert event.roles == (("student",) if student else CRITICS)
        for group in ("model", "optim", "counters/steps"):
            assert changed(before, after, f"{group}/student") is student, (event.iteration, group)
            assert changed(before, after, f"{group}/fake_score") is not student
            assert changed(before, after, f"{group}/discriminator") is not student
        assert changed(before, after, "model/student_ema/") is student
        assert changed(before, after, "counters/ema_updates") is student


def test_gradients_reach_exactly_the_trained_roles_and_none_stays(tmp_path):
    method = Toy()
    frozen = {name: p.clone() for name, p in method.networks["teacher"].named_parameters()}
    train(tmp_path, method=method)
    assert method.touched == {(i, role) for i in range(12) for role in method.trained(i)}
    assert all(p.grad is None for network in method.networks.values() for p in network.parameters())
    assert all(torch.equal(frozen[name], p) for name, p in method.networks["teacher"].named_parameters())


def test_layers_are_told_of_new_weights_at_the_start_and_after_every_step_taken(tmp_path, monkeypatch):
    method, told = Toy(break_at={3: "loss"}), []
    roles = {id(network): role for role, network in method.networks.items()}
    monkeypatch.setattr(loop, "weights_changed", lambda network: told.append((method.iteration, roles[id(network)])))
    train(tmp_path, method=method, iterations=7)
    steps = [(i, role) for i in range(7) if i != 3 for role in method.trained(i)]
    assert told == [(-1, role) for role in method.networks] + steps


def test_layers_are_told_when_the_average_takes_their_weights_place_and_goes_again(tmp_path, monkeypatch):
    @dataclass
    class Shows(Callback):
        state: State | None = None

        def on_start(self, state: State) -> None:
            self.state = state

        def on_iteration(self, event: Event) -> None:
            with self.state.ema.applied():
                told.append("shown")

    method, told = Toy(), []
    monkeypatch.setattr(loop, "weights_changed", lambda network: told.append(network))
    train(tmp_path, Shows(), method=method, iterations=1)
    student = method.networks["student"]
    assert told[-3:] == [student, "shown", student]


def test_samples_are_consumed_in_order(tmp_path):
    method = Toy()
    train(tmp_path, method=method)
    assert method.seen == [(position // 4, position) for position in range(48)]


def test_frozen_networks_are_not_saved(uninterrupted):
    recorder, _ = uninterrupted
    assert {name.split("/")[1] for name in recorder.state.tensors() if name.startswith("model/")} == {"student", "student_ema", *CRITICS}


# --- Numbers ---


def test_accumulation_does_not_change_the_step(tmp_path):
    runs = []
    for micro in (1, 4):
        recorder, method = Recorder(), Toy(torch.float64)
        train(tmp_path / str(micro), recorder, method, torch.float64, iterations=7, micro_batch_size=micro)
        runs.append(recorder)
    for name, value in runs[0].state.tensors().items():
        torch.testing.assert_close(value, runs[1].state.tensors()[name], rtol=1e-12, atol=1e-12)
    for one, four in zip(*(run.events for run in runs), strict=True):
        assert one.terms == pytest.approx(four.terms, rel=1e-12) and one.grad_norms == pytest.approx(four.grad_norms, rel=1e-12)


def test_first_step_is_adamw_on_the_clipped_mean_gradient(tmp_path):
    """Iteration 0 by hand, from the whole batch at once."""
    recorder, method = Recorder(), Toy(torch.float64)
    train(tmp_path, recorder, method, torch.float64, iterations=1, micro_batch_size=1)
    reference, optim = Toy(torch.float64), OPTIM["student"]
    output = reference.step(ToyData(torch.float64).batch(0, 4), 0)
    loss = output.terms["vsd"].value + 0.25 * output.terms["gan"].value
    names, parameters = zip(*reference.networks["student"].named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([g.flatten() for g in gradients]).pow(2).sum().sqrt()
    assert norm > optim.clip_norm  # or clipping would go unseen
    event = recorder.events[0]
    assert event.terms["total"] == pytest.approx(loss.item(), rel=1e-12)
    assert event.grad_norms == {"student": pytest.approx(norm.item(), rel=1e-12)}
    assert event.lrs == {"student": pytest.approx(optim.lr / 2)}
    for name, p, g in zip(names, parameters, gradients, strict=True):
        g = g * optim.clip_norm / (norm + 1e-6)
        expected = p * (1 - event.lrs["student"] * optim.weight_decay) - event.lrs["student"] * g / (g.abs() + optim.eps)
        torch.testing.assert_close(recorder.state.tensors()[f"model/student/{name}"], expected, rtol=1e-9, atol=1e-12)


def test_schedules_count_each_roles_own_steps(uninterrupted):
    recorder, _ = uninterrupted
    for role, total in (("student", 3), ("fake_score", 9), ("discriminator", 9)):
        rates = [event.lrs[role] for event in recorder.events if role in event.roles]
        assert rates == [learning_rate(OPTIM[role], step, total) for step in range(total)]


def test_event_and_log_carry_every_term(uninterrupted):
    recorder, run_dir = uninterrupted
    first = recorder.events[0]
    assert set(first.terms) == {"vsd", "gan", "total"} and set(first.metrics) == {"y_std"}
    assert first.terms["gan"] < 0 and log_of(run_dir)[0]["terms"]["gan"] == first.terms["gan"]
    assert first.terms["total"] == pytest.approx(first.terms["vsd"] + 0.25 * first.terms["gan"])
    assert first.samples_per_second == pytest.approx(4 / first.seconds)


# --- Micro-batches ---


@pytest.mark.parametrize(("batch", "micro", "dp", "count"), [(8, 1, 1, 8), (8, 2, 1, 4), (8, 2, 4, 1), (8, 2, 2, 2), (6, 1, 3, 2)])
def test_micro_batches_of_a_rank(batch, micro, dp, count):
    assert micro_batches(TrainConfig(global_batch_size=batch, micro_batch_size=micro), dp) == count


@pytest.mark.parametrize(("batch", "micro", "dp"), [(8, 2, 3), (8, 1, 16), (6, 3, 4)])
def test_a_global_batch_that_does_not_divide_over_the_ranks_is_refused(batch, micro, dp):
    said = f"train.global_batch_size={batch} is no multiple of train.micro_batch_size={micro} x {dp} data-parallel ranks = {micro * dp}"
    with pytest.raises(ConfigError, match=re.escape(said)):
        micro_batches(TrainConfig(global_batch_size=batch, micro_batch_size=micro), dp)


# --- Not finite ---


@pytest.mark.parametrize(
    ("iteration", "kind", "words"),
    [
        (5, "loss", ("'vsd'", "student", "iteration 5")),
        (5, "gradient", ("gradient norm of student", "iteration 5")),
        (7, "loss", ("'fake_score'", "fake_score+discriminator", "iteration 7")),
        (7, "gradient", ("gradient norm of discriminator", "iteration 7")),
    ],
)
def test_nothing_moves_on_a_non_finite_step(tmp_path, iteration, kind, words):
    recorder = Recorder()
    train(tmp_path, recorder, Toy(break_at={iteration: kind}))
    event, before, after = recorder.events[iteration], recorder.snapshots[iteration], recorder.snapshots[iteration + 1]
    assert all(word in event.skipped for word in words)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"counters/iteration", "counters/skipped_in_row"}
    assert [e.iteration for e in recorder.events if e.skipped] == [iteration]
    again = next(e for e in recorder.events[iteration + 1 :] if e.roles == event.roles)
    assert again.lrs == event.lrs  # the schedule stood still
    assert log_of(tmp_path)[iteration]["skipped"] == event.skipped


def test_run_stops_after_too_many_in_a_row_and_the_last_checkpoint_stands(tmp_path):
    recorder = Recorder()
    with pytest.raises(NonFiniteError, match=r"'fake_score' of fake_score\+discriminator is nan at iteration 8.*3 iterations in a row"):
        train(tmp_path, recorder, Toy(break_at={6: "loss", 7: "loss", 8: "loss"}))
    assert recorder.calls[-2].startswith("error loss term") and recorder.calls[-1] == "close"
    assert checkpoint.latest(tmp_path).name == "iter_00000006"


def test_a_good_step_between_resets_the_count_and_resume_remembers_it(tmp_path):
    broken = {3: "loss", 4: "loss", 6: "loss", 7: "loss"}
    assert train(tmp_path / "a", method=Toy(break_at=broken)).iteration == 12
    broken = {7: "loss", 8: "loss", 9: "loss"}
    train(tmp_path / "b", Recorder(stop_after=8), Toy(break_at=broken))
    with pytest.raises(NonFiniteError, match="iteration 9"):
        train(tmp_path / "b", method=Toy(break_at=broken))


# --- Stop and go on ---


@pytest.mark.parametrize("stop", range(11))
def test_resume_is_bit_exact_anywhere_in_the_cycle(tmp_path, uninterrupted, stop):
    whole, whole_dir = uninterrupted
    first, second = Recorder(stop_after=stop), Recorder()
    assert train(tmp_path, first) == Result(stop + 1, interrupted=True)
    assert checkpoint.latest(tmp_path).name == f"iter_{stop + 1:08d}"
    method = Toy()
    with torch.no_grad():  # whatever the networks hold must come from the checkpoint
        for role in OPTIM:
            for p in method.networks[role].parameters():
                p.fill_(9.0)
    assert train(tmp_path, second, method) == Result(12, interrupted=False)
    assert second.calls[0] == f"start {stop + 1}"
    assert equal(second.snapshots[0], first.snapshots[-1])
    assert equal(second.state.tensors(), whole.state.tensors())
    assert log_of(tmp_path) == log_of(whole_dir)


def test_resume_after_an_error_repeats_the_lost_iterations(tmp_path, uninterrupted):
    whole, whole_dir = uninterrupted
    with pytest.raises(RuntimeError, match="told to fail"):
        train(tmp_path, Recorder(fail_after=7))
    recorder = Recorder()
    train(tmp_path, recorder)
    assert recorder.calls[0] == "start 6"
    assert equal(recorder.state.tensors(), whole.state.tensors()) and log_of(tmp_path) == log_of(whole_dir)


def test_hooks_come_in_order_and_a_finished_run_does_nothing(tmp_path):
    recorder = Recorder()
    train(tmp_path, recorder, iterations=4)
    expected = ["start 0", "iteration 0", "iteration 1", "iteration 2", "checkpoint iter_00000003", "iteration 3"]
    assert recorder.calls == [*expected, "checkpoint iter_00000004", "close"]
    again = Recorder()
    assert train(tmp_path, again, iterations=4) == Result(4, interrupted=False)
    assert again.calls == ["start 4", "close"]


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(tmp_path, Recorder(stop_after=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.fixture
def interruptible():
    """What Python sets up by itself, but where a shell has started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_interrupt_acts_at_once(tmp_path, interruptible):
    class Twice(Recorder):
        def on_iteration(self, event):
            for _ in range(2):  # apart: two that are not yet handled count as one
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Twice())


def test_another_run_in_the_folder_is_refused_before_anything_is_touched(tmp_path):
    train(tmp_path, iterations=3)
    before = (tmp_path / "config.json").read_text()
    config = TrainConfig(iterations=3, global_batch_size=4)
    with pytest.raises(checkpoint.CheckpointError, match='stage: "toy" -> "other"'):
        fit(Toy(), ToyData(), config, OPTIM, EMA_ON, tmp_path, settings=SETTINGS | {"stage": "other"})
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("optim", "ema_role", "words"),
    [
        ({"student": OPTIM["student"]}, "student", "no optimizer options"),
        (OPTIM | {"critic": OPTIM["student"]}, "student", "'critic'"),
        (OPTIM, "teacher", "average of 'teacher'"),
    ],
)
def test_roles_that_do_not_fit_are_named(tmp_path, optim, ema_role, words):
    with pytest.raises(ValueError, match=words):
        fit(
            Toy(), ToyData(), TrainConfig(iterations=12, global_batch_size=4), optim, EMA_ON, tmp_path, settings=SETTINGS, ema_role=ema_role
        )


# --- kill -9 ---


def serve() -> None:
    """Run `RUN_DIR NTH_FSYNC` lines from standard input, each in a forked process that dies by SIGKILL at its n-th fsync (0 = never)."""
    with tempfile.TemporaryDirectory() as warm:  # what torch imports at first use is imported once, for all forks
        train(Path(warm), iterations=1)
    for line in sys.stdin:
        run_dir, nth = line.split()
        pid = os.fork()
        if pid == 0:
            count, fsync = 0, os.fsync

            def counted(descriptor: int) -> None:
                nonlocal count
                count += 1
                if count == int(nth):  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)
                fsync(descriptor)  # noqa: B023

            os.fsync = counted
            train(Path(run_dir), iterations=20)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def test_kill_9_anywhere_then_resume_gives_the_same_bits(tmp_path):
    whole = Recorder()
    began = time.perf_counter()
    train(tmp_path / "whole", whole, iterations=20)
    duration = time.perf_counter() - began
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__]
    chance = random.Random(5)
    killed = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def attempt(nth: int, after: float | None) -> int:
            print(tmp_path / "killed", nth, file=server.stdin, flush=True)
            pid = int(server.stdout.readline())
            if after is not None:
                time.sleep(after)
                with suppress(ProcessLookupError):  # it may have finished
                    os.kill(pid, signal.SIGKILL)
            return int(server.stdout.readline())

        for nth in range(1, 9):  # each place of a save, first one included: tensors, contents, config, marker, folder, renamed, the next
            killed += attempt(nth, None) == -signal.SIGKILL
        for _ in range(3):
            killed += attempt(0, chance.uniform(0.0, duration)) == -signal.SIGKILL
        assert attempt(0, None) == 0
        server.stdin.close()
    assert killed >= 8
    recorder = Recorder()
    train(tmp_path / "killed", recorder, iterations=20)
    assert equal(recorder.state.tensors(), whole.state.tensors())
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir()) == ["iter_00000018", "iter_00000020"]


if __name__ == "__main__":
    serve()
