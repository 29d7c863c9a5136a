"""Place of a process among all."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from cosmos_mp.parallel.topology import rank_and_world, single_process

NAMES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "16"}, (5, 16)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "16"}, (3, 8)),
        ({"RANK": "3"}, (0, 1)),
        ({"RANK": "3", "SLURM_PROCID": "5", "SLURM_NTASKS": "16"}, (5, 16)),
    ],
)
def test_rank_and_world_from_torchrun_then_slurm(monkeypatch, values, expected):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert rank_and_world() == expected


def test_single_process_can_be_asked_again_and_keeps_its_rank(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    first, second = single_process(), single_process()
    assert (first.rank, first.world) == (2, 4)
    assert first.tp_group is second.tp_group and dist.get_world_size(first.tp_group) == 1
