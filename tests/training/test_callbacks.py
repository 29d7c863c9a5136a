"""Each watcher by what it leaves behind: lines, files, event logs, pictures."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from cosmos_mp.training.callbacks import Callback, ConsoleLog, JsonLines, Pictures, ProgressBar, TensorBoard
from cosmos_mp.training.ema import EMA
from cosmos_mp.training.loop import Event, State
from cosmos_mp.training.pictures import picture_grid, stack


def state_of(run_dir, iteration: int = 0, iterations: int = 10, ema: EMA | None = None) -> State:
    return State({}, {}, ema, "student", run_dir, iterations, iteration)


def event_of(iteration: int, skipped: str | None = None) -> Event:
    if iteration % 5 == 0:
        terms = {"vsd": 1.0 + iteration, "gan": -2.5, "total": 0.5}
        return Event(iteration, ("student",), terms, {}, {"student": 3.0}, {"student": 1e-3}, 8.0, 0.5, skipped)
    roles = ("fake_score", "discriminator")
    terms = {"fake_score": 2.0 * iteration, "total": 2.0 * iteration}
    return Event(iteration, roles, terms, {"accuracy": 0.75}, dict.fromkeys(roles, 4.0), dict.fromkeys(roles, 2e-3), 8.0, 0.5, skipped)


def play(callback: Callback, state: State, iterations) -> None:
    callback.on_start(state)
    for iteration in iterations:
        callback.on_iteration(event_of(iteration))
        if iteration % 2:
            callback.on_checkpoint(state.run_dir)
    callback.close()


def test_console_shows_every_phase_and_every_term(tmp_path):
    out = io.StringIO()
    play(ConsoleLog(log_every=5, file=out), state_of(tmp_path), range(10))
    lines = out.getvalue().splitlines()
    assert len(lines) == 4  # two phases, twice
    student, critic = lines[0], lines[1]
    for words in (
        "1/10",
        "student",
        "vsd 1.0000E+00",
        "gan -2.5000E+00",
        "total",
        "grad norm student 3",
        "lr student 1.000E-03",
        "8 samples/s",
    ):
        assert words in student, words
    for words in ("5/10", "fake_score+discriminator", "fake_score 5.0000E+00", "accuracy 0.75", "grad norm discriminator 4"):
        assert words in critic, words  # the mean of 2, 4, 6, 8 is 5
    assert "vsd 6.0000E+00" in lines[2] and "6/10" in lines[2]


def with_speed(iteration: int, seconds: float, mfu: float | None, **passes: float) -> Event:
    speed = {"tokens_per_second": 4e6 / seconds, "tflops": 800 / seconds} | ({} if mfu is None else {"mfu": mfu})
    peak = "no peak known for cpu" if mfu is None else "989 TFLOP/s, H100"
    return replace(event_of(iteration), seconds=seconds, speed=speed, peak=peak, passes=passes)


def test_console_says_speed_by_phase_over_all_its_time(tmp_path):
    out = io.StringIO()
    console = ConsoleLog(log_every=3, file=out)
    console.on_start(state_of(tmp_path, iterations=3))
    for event in (with_speed(0, 4.0, 0.3), with_speed(1, 1.0, 0.2), with_speed(2, 3.0, 0.4)):
        console.on_iteration(event)
    student, critic = out.getvalue().splitlines()
    assert "1e+06 tokens/s | 200 model TFLOP/s per rank | MFU 30.0 % of 989 TFLOP/s, H100" in student
    # Two iterations of 4e6 tokens in 4 s; the longer one weighs more.
    assert "2e+06 tokens/s | 400 model TFLOP/s per rank | MFU 35.0 % of" in critic


def test_console_says_why_there_is_no_mfu_and_what_was_profiled(tmp_path):
    out = io.StringIO()
    console = ConsoleLog(log_every=2, file=out)
    console.on_start(state_of(tmp_path, iterations=2))
    console.on_iteration(with_speed(1, 1.0, None))
    console.on_iteration(with_speed(3, 1.0, None, **{"student.fwd": 0.25, "bwd": 0.5}))
    line = out.getvalue()
    assert "800 model TFLOP/s per rank | no MFU: no peak known for cpu | student.fwd 0.25 s | bwd 0.5 s" in line


def test_console_and_log_of_a_run_without_known_work_say_nothing_of_it(tmp_path):
    out = io.StringIO()
    play(ConsoleLog(log_every=5, file=out), state_of(tmp_path), range(5))
    assert "tokens/s" not in out.getvalue() and "MFU" not in out.getvalue()


def test_console_leaves_skipped_steps_out_of_the_means_and_names_them(tmp_path):
    out = io.StringIO()
    console = ConsoleLog(log_every=4, file=out)
    console.on_start(state_of(tmp_path))
    for iteration, skipped in ((1, "loss term 'x' is nan"), (2, None), (3, None)):
        console.on_iteration(event_of(iteration, skipped))
    line = out.getvalue()
    assert "fake_score 5.0000E+00" in line and "skipped 1: loss term 'x' is nan" in line


def test_console_prints_what_is_left_on_error_and_once(tmp_path):
    out = io.StringIO()
    console = ConsoleLog(log_every=100, file=out)
    console.on_start(state_of(tmp_path))
    console.on_iteration(event_of(0))
    console.on_error(RuntimeError())
    console.close()
    assert out.getvalue().count("vsd") == 1


def test_progress_is_a_plain_line_off_a_terminal(tmp_path):
    out = io.StringIO()
    play(ProgressBar(log_every=4, file=out), state_of(tmp_path, iteration=2), range(2, 10))
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["iteration 4/10", "iteration 8/10", "iteration 10/10"]
    assert all(line.endswith(" left") for line in lines) and "00:00 left" in lines[-1]


def test_progress_bar_where_forced(tmp_path):
    out = io.StringIO()
    play(ProgressBar(force=True, file=out), state_of(tmp_path, iteration=4), range(4, 10))
    assert "10/10" in out.getvalue() and "4/10" in out.getvalue() and "\r" in out.getvalue()


def test_json_lines_hold_each_iteration_once_over_a_resume(tmp_path):
    play(JsonLines(), state_of(tmp_path), range(5))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"iteration": 5, "ro')
    play(JsonLines(), state_of(tmp_path, iteration=3), range(3, 10))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(10))
    assert records[0]["terms"]["gan"] == -2.5 and records[1]["roles"] == ["fake_score", "discriminator"]


def test_a_disk_that_is_full_is_named_with_the_file(tmp_path):
    callback = JsonLines()
    callback.on_start(state_of(tmp_path))
    callback.close()
    callback._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="the last checkpoint stands: make room and start the same command again: '/dev/full'"):
        callback.on_iteration(event_of(0))


def test_json_lines_are_on_disk_at_once(tmp_path):
    callback = JsonLines()
    callback.on_start(state_of(tmp_path))
    callback.on_iteration(event_of(0))
    assert (tmp_path / "log.jsonl").read_text().endswith("\n")
    callback.close()


def test_tensorboard_holds_each_iteration_once_over_a_resume(tmp_path):
    play(TensorBoard(), state_of(tmp_path), range(7))
    play(TensorBoard(), state_of(tmp_path, iteration=5), range(5, 10))
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("student/gan")] == [(0, -2.5), (5, -2.5)]
    assert [e.step for e in events.Scalars("grad_norm/discriminator")] == [1, 2, 3, 4, 6, 7, 8, 9]
    wanted = {
        "student/vsd",
        "student/total",
        "fake_score-discriminator/total",
        "metrics/accuracy",
        "lr/student",
        "speed/samples_per_second",
    }
    assert wanted <= set(events.Tags()["scalars"])


def test_tensorboard_keeps_the_speed_of_phases_apart(tmp_path):
    writer = TensorBoard()
    writer.on_start(state_of(tmp_path))
    writer.on_iteration(with_speed(0, 4.0, 0.25))
    writer.on_iteration(with_speed(1, 1.0, 0.5))
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("speed/student/mfu")] == [0.25]
    assert [e.value for e in events.Scalars("speed/fake_score-discriminator/mfu")] == [0.5]


def videos(value: float) -> dict[str, np.ndarray]:
    return {label: np.full((3, 8, 8, 3), value + row, np.uint8) for row, label in enumerate(("student 1-step", "control"))}


def test_pictures_come_every_so_often_and_at_the_end_from_the_average(tmp_path):
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 20.0)
    ema = EMA(dict(network.named_parameters()), 0.9)
    nn.init.constant_(network.weight, 90.0)
    asked = []

    def render(iteration):
        asked.append((iteration, torch.is_grad_enabled()))
        return [videos(network.weight.item()), videos(50.0)]

    play(Pictures(render, every=4), state_of(tmp_path, ema=ema), range(10))
    assert asked == [(4, False), (8, False), (10, False)]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [f"iter_{i:08d}.png" for i in (4, 8, 10)]
    from PIL import Image

    image = np.asarray(Image.open(tmp_path / "pictures/iter_00000008.png"))
    assert np.array_equal(image, stack([picture_grid(videos(20.0)), picture_grid(videos(50.0))]))
    assert network.weight.item() == 90.0


@pytest.mark.parametrize(("every", "expected"), [(0, []), (3, [3, 6])])
def test_pictures_without_an_average(tmp_path, every, expected):
    asked = []
    play(Pictures(lambda iteration: asked.append(iteration) or [videos(1.0)], every=every), state_of(tmp_path, iterations=99), range(7))
    assert asked == expected
