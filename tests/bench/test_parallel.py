"""The command and its processes. What it finds is tested in tests/distributed/test_bench.py."""

from __future__ import annotations

import json

import pytest

from cosmos_mp import commands
from cosmos_mp.bench import parallel
from cosmos_mp.bench.launch import launch
from cosmos_mp.config import ConfigError


def test_a_measurement_runs_in_processes_of_its_own():
    one, other = launch(2, "traffic", size="short", layout={"tp": 2})
    assert one == other and one["sent"].keys() == {"all_reduce"} and one["dp"] == 1


def test_a_measurement_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)state .* on 1 processes failed.*KeyError: 'none such'"):
        launch(1, "state", size="none such", run="nowhere", iterations=1)


def test_bench_without_or_with_a_wrong_name(capsys):
    with pytest.raises(ConfigError, match="known: cpu, fp8, gpu, parallel, static"):
        commands.bench([])
    with pytest.raises(ConfigError, match="did you mean 'parallel'"):
        commands.bench(["paralel"])


def test_the_command_writes_its_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "bench_parallel", lambda fast: {"fast": fast})
    commands.bench(["parallel", "--json", str(tmp_path / "new" / "numbers.json"), "--fast"])
    assert json.loads((tmp_path / "new" / "numbers.json").read_text()) == {"fast": True}
