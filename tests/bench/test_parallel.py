"""The benchmark itself, at its smallest, and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosmos_mp import commands
from cosmos_mp.bench import parallel
from cosmos_mp.bench.launch import launch
from cosmos_mp.config import ConfigError

MEASURED = Path(__file__).parents[2] / "examples" / "measured" / "parallel.json"


@pytest.fixture(scope="module")
def small() -> dict:
    """Everything that `bench parallel` finds, of two procedures and one layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "PROCEDURES", {name: parallel.PROCEDURES[name] for name in ("reference", "ours, no recompute")})
        patch.setattr(parallel, "LAYOUTS", {"TP2+SP": parallel.LAYOUTS["TP2+SP"]})
        patch.setattr(parallel, "procedures", lambda size, ranks, repeats, run=parallel.procedures: run("short", 2, 1))
        patch.setattr(parallel, "state", lambda size, ranks, run=parallel.state: run("short", 2))
        return parallel.bench_parallel(fast=True)


def test_ours_does_the_counted_work_and_the_reference_more(small):
    reference, ours = small["procedures"]["rows"].values()
    for row in (reference, ours):  # at this size what the formula leaves out weighs
        assert row["flops"] == pytest.approx(row["flops_formula"], rel=0.15)
    assert ours["flops"] < 0.85 * reference["flops"]
    assert ours["ratios"]["flops"] == ours["flops"] / reference["flops"] and reference["ratios"]["seconds"] == 1
    assert all(row["seconds"] > 0 and row["working_bytes"] > 0 for row in (reference, ours))


def test_a_layout_sends_what_is_predicted(small):
    (row,) = small["traffic"]["rows"].values()
    assert row["counted"] == row["formula"]


def test_ranks_hold_parts(small):
    one, two = small["state"]["rows"].values()
    assert two["parameter_bytes"] == pytest.approx(one["parameter_bytes"] / 2, rel=0.02)
    assert one["ready_bytes"] >= 3 * one["parameter_bytes"] and one["trained_bytes"] >= one["ready_bytes"]


def test_every_number_is_in_a_table(small):
    procedures, predicted, sent, held = parallel.tables(small)
    assert "| reference |" in procedures and "| 1.00 |" in procedures
    assert "| ours, no recompute | 67.7 | 0.83 |" in predicted
    assert "| TP2+SP | all_gather |" in sent and "| 2 |" in held
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in (procedures, predicted, sent, held))


def test_a_measurement_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)state .* on 1 processes failed.*KeyError: 'none such'"):
        launch(1, "state", size="none such", run="nowhere", iterations=1)


def test_bench_without_or_with_a_wrong_name(capsys):
    with pytest.raises(ConfigError, match="known: parallel"):
        commands.bench([])
    with pytest.raises(ConfigError, match="did you mean 'parallel'"):
        commands.bench(["paralel"])


def test_the_command_writes_its_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "bench_parallel", lambda fast: {"fast": fast})
    commands.bench(["parallel", "--json", str(tmp_path / "new" / "numbers.json"), "--fast"])
    assert json.loads((tmp_path / "new" / "numbers.json").read_text()) == {"fast": True}
