"""Every layout against one process: the same losses, the same gradients, the same run.

In float64, so that a missing sum, a wrong factor or a shard of the wrong clip cannot hide in rounding. How large the differences are:
python tests/distributed/measure_layouts.py
"""

from __future__ import annotations

import pytest

NAMES = (
    "FSDP 1",
    "TP2",
    "TP4",
    "TP2+SP",
    "CP2 Ulysses",
    "CP4 Ulysses",
    "CP2 ring",
    "CP4 ring",
    "TP2 x CP2",
    "TP2+SP x CP2 ring",
    "FSDP 2",
    "FSDP 3",
    "HSDP 2 x 2",
    "TP2 x CP2 x DP2",
)


@pytest.fixture(scope="module")
def reference(run_ranks, runs):
    """One process, by the global batch: it decides which samples an iteration sees."""
    return {batch: runs.all_kinds(run_ranks, 1, None, batch, batch) for batch in (4, 6)}


def test_no_layout_is_left_out(runs):
    assert tuple(runs.LAYOUTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_gives_the_numbers_of_one_process(run_ranks, reference, runs, name):
    world, layout, batch, micro_batch = runs.LAYOUTS[name]
    results = runs.all_kinds(run_ranks, world, layout, batch, micro_batch)
    for kind in runs.KINDS:
        found = runs.largest_difference(results[kind], reference[batch][kind])
        last = found.pop("last")
        assert max(found.values()) < 1e-9, (kind, found)
        assert last < 1e-7, (kind, last)
