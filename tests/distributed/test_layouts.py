"""Every layout against one process: the same losses, the same gradients, the same run.

In float64, so that a missing sum, a wrong factor or a shard of the wrong clip cannot hide in rounding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosmos_mp.config import ParallelConfig

KINDS = {"kd": (20, {}), "dmd2": (20, {}), "critic": (1, {"critic_warmup": 1})}
"""Runs with their lengths: KD; DMD2, which begins with a student step; and a critic step on the first weights."""


@pytest.fixture(scope="module")
def all_kinds(run_ranks, runs):
    """Results of all ranks of a layout, by kind; None = one process whose networks are whole."""

    def run(world: int, layout: ParallelConfig | None, dtype: torch.dtype = torch.float64, **changes) -> dict[str, list[dict]]:
        config = replace(runs.TRAIN, **changes)

        def rank_runs(rank: int) -> dict[str, dict]:
            return {
                kind: runs.train(kind, layout, replace(config, iterations=iterations), dtype, **options)
                for kind, (iterations, options) in KINDS.items()
            }

        results = run_ranks(world, rank_runs, timeout=300)
        return {kind: [result[kind] for result in results] for kind in KINDS}

    return run


@pytest.fixture(scope="module")
def reference(all_kinds):
    """One process, by the global batch: it decides which samples an iteration sees."""
    return {batch: all_kinds(1, None, global_batch_size=batch) for batch in (4, 6)}


LAYOUTS = {
    "FSDP 1": (1, ParallelConfig()),
    "TP2": (2, ParallelConfig(tp=2)),
    "TP4": (4, ParallelConfig(tp=4)),
    "TP2+SP": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "CP2 Ulysses": (2, ParallelConfig(cp=2)),
    "CP4 Ulysses": (4, ParallelConfig(cp=4)),
    "CP2 ring": (2, ParallelConfig(cp=2, cp_attention="ring")),
    "CP4 ring": (4, ParallelConfig(cp=4, cp_attention="ring")),
    "TP2 x CP2": (4, ParallelConfig(tp=2, cp=2)),
    "TP2+SP x CP2 ring": (4, ParallelConfig(tp=2, cp=2, sequence_parallel=True, cp_attention="ring")),
    "FSDP 2": (2, ParallelConfig()),
    "FSDP 3": (3, ParallelConfig()),
    "HSDP 2 x 2": (4, ParallelConfig(cp=2, shard=2)),
    "TP2 x CP2 x DP2": (8, ParallelConfig(tp=2, cp=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_numbers_of_one_process(all_kinds, reference, runs, name):
    world, layout = LAYOUTS[name]
    batch = 6 if world == 3 else 4
    results = all_kinds(world, layout, global_batch_size=batch)
    for kind in KINDS:
        found = runs.largest_difference(results[kind], reference[batch][kind])
        last = found.pop("last")
        assert max(found.values()) < 1e-9, (kind, found)
        assert last < 1e-7, (kind, last)
