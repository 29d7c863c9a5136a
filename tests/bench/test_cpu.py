"""The CPU benchmark: what it compares gives the same numbers, and ratios are of the measured values."""

from __future__ import annotations

import time

import cv2
import pytest
import torch

from cosmos_mp.bench import cpu


@pytest.fixture(scope="module")
def found():
    before = torch.get_num_threads()
    found = cpu.bench_cpu(fast=True)
    assert torch.get_num_threads() == before
    return found


def test_every_comparison_is_measured_and_named(found):
    assert [name.split(",")[0].split(" against")[0] for name in found["rows"]] == [
        "DiT blocks",
        "canny",
        "canny",
        "DMD2 loss",
        "GAN head's end and loss",
    ]
    for row in found["rows"].values():
        assert row["ours"]["seconds"] > 0 and row["baseline"]["seconds"] > 0
        assert row["ratios"]["seconds"] == pytest.approx(row["ours"]["all_seconds"][0] / row["baseline"]["all_seconds"][0])
    assert len(found["commit"]) >= 7 and found["date"] and found["machine"]


def test_the_table_shows_times_and_ratios(found):
    lines = cpu.table(found).splitlines()
    assert len(lines) == 2 + len(found["rows"])
    for (name, row), line in zip(found["rows"].items(), lines[2:], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name and cells[3] == f"{row['ratios']['seconds']:.2f}"


def test_rounds_take_turns_after_one_that_warms_up_and_the_median_counts():
    order = []

    def work(name: str, seconds: float):
        def run() -> torch.Tensor:
            order.append(name)
            time.sleep(seconds)
            return torch.zeros(10 if name == "ours" else 40)

        return run

    row = cpu.compare(work("ours", 0.01), work("baseline", 0.03), repeats=3)
    assert order == ["ours", "baseline"] * 4 + ["ours", "baseline"]  # the last two have their memory counted
    assert len(row["ours"]["all_seconds"]) == 3 and row["ratios"]["seconds"] < 1
    assert (row["ours"]["working_bytes"], row["baseline"]["working_bytes"], row["ratios"]["working_bytes"]) == (40, 160, 0.25)


def test_both_sides_have_the_threads_that_the_table_names(monkeypatch):
    seen = []

    def work() -> None:
        seen.append((torch.get_num_threads(), cv2.getNumThreads()))

    monkeypatch.setattr(cpu, "comparisons", lambda fast: [("one", work, work, 1), ("two", work, work, 2)])
    found = cpu.bench_cpu(fast=True)
    assert seen == [(1, 1)] * 6 + [(2, 2)] * 6
    assert [row["threads"] for row in found["rows"].values()] == [1, 2]


def test_both_sides_of_a_loss_give_one_gradient(monkeypatch):
    taken = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: taken.append(grad(*args, **kwargs)))
    for ours, baseline in (cpu._loss((4, 2, 4, 4)), cpu._head((2, 16, 2, 4, 4))):
        ours()
        baseline()
        for a, b in zip(*taken, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
        taken.clear()
