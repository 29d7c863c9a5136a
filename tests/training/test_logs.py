"""The JSON-lines log: what is written is read back, a cut line is passed over, other damage is named."""

import json
import math

import numpy as np
import pytest

from cosmos_mp.training.logs import LogError, drop_from, read_log, to_line


def record(iteration: int, role: str = "student", **terms: float) -> dict:
    return {
        "iteration": iteration,
        "roles": [role],
        "terms": {**terms, "total": sum(terms.values())},
        "metrics": {"accuracy": 0.5},
        "grad_norms": {role: 2.0},
        "lrs": {role: 1e-3},
        "samples_per_second": 8.0,
        "seconds": 0.5,
        "skipped": None,
    }


def write(path, records, tail=""):
    path.write_text("".join(to_line(r) for r in records) + tail)


def test_quantities_come_back_with_their_iterations(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [record(0, gan=-1.5, vsd=0.25), record(1, "fake_score", fake_score=3.0), record(5, gan=-2.5, vsd=0.5)])
    log = read_log(path)
    iterations, values = log["terms/gan"]
    assert iterations.tolist() == [0, 5] and values.tolist() == [-1.5, -2.5] and values.dtype == np.float64
    assert log["total/student"][1].tolist() == [-1.25, -2.0] and log["total/fake_score"][0].tolist() == [1]
    assert set(log) == {
        *("terms/gan", "terms/vsd", "terms/fake_score", "total/student", "total/fake_score", "metrics/accuracy"),
        *("grad_norms/student", "grad_norms/fake_score", "lrs/student", "lrs/fake_score", "seconds", "samples_per_second"),
    }


def test_speed_and_passes_are_kept_apart_by_phase(tmp_path):
    path = tmp_path / "log.jsonl"
    measured = {"speed": {"tflops": 3.0}, "peak": "none", "passes": {"student.fwd": 0.5}}
    write(path, [record(0) | measured, record(1, "fake_score") | measured | {"speed": {"tflops": 4.0}}, record(5) | measured])
    log = read_log(path)
    assert log["speed/tflops/student"][0].tolist() == [0, 5] and log["speed/tflops/fake_score"][1].tolist() == [4.0]
    assert log["passes/student.fwd/student"][0].tolist() == [0, 5] and log["passes/student.fwd/fake_score"][0].tolist() == [1]


def test_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [record(0, vsd=math.inf)])
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["terms"]["vsd"] is None
    assert math.isnan(read_log(path)["terms/vsd"][1][0])


def test_a_line_cut_by_a_kill_is_passed_over_and_removed(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [record(0, a=1.0), record(1, a=2.0)], tail=to_line(record(2, a=3.0))[:30])
    assert read_log(path)["terms/a"][0].tolist() == [0, 1]
    drop_from(path, 1)
    assert path.read_text() == to_line(record(0, a=1.0))


def test_dropping_from_a_log_that_is_not_there_does_nothing(tmp_path):
    drop_from(tmp_path / "log.jsonl", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["{half\n", "3\n", "{}\n"])
def test_damage_before_the_end_is_named_and_the_file_stays(tmp_path, bad):
    path = tmp_path / "log.jsonl"
    path.write_text(to_line(record(0, a=1.0)) + bad + to_line(record(2, a=1.0)))
    before = path.read_text()
    with pytest.raises(LogError, match="log.jsonl, line 2"):
        read_log(path)
    with pytest.raises(LogError, match="line 2"):
        drop_from(path, 1)
    assert path.read_text() == before
