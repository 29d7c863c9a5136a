"""Ranks of a test: results in order, and a failure that says whose it was."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cosmos_mp.config import ParallelConfig
from cosmos_mp.parallel.topology import join


def test_results_come_in_the_order_of_the_ranks(run_ranks):
    kept = torch.arange(3)  # reached by closure, not by pickling

    def work(rank, factor):
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        time.sleep(0.4 * (rank == 0))  # the first rank answers last
        return rank, kept * rank * factor, total

    for rank, (said, own, total) in enumerate(run_ranks(3, work, 10)):
        assert said == rank and total == 3
        assert torch.equal(own, kept * rank * 10)


@pytest.fixture
def parent():
    """A parent that is a run of its own, with megatron's groups, and one more group that nothing but torch refers to."""
    fresh = not parallel_state.is_initialized()
    topology = join(ParallelConfig())
    dist.new_group([0])
    yield topology
    if fresh:
        parallel_state.destroy_model_parallel()


def test_ranks_are_in_no_group_of_the_parent(run_ranks, parent):
    environment = dict(os.environ)

    def work(rank):
        topology = join(ParallelConfig(tp=2, cp=2))
        members = [dist.get_process_group_ranks(group) for group in (topology.tp_group, topology.cp_group)]
        return topology.rank, topology.world, *members

    assert run_ranks(4, work) == [(0, 4, [0, 1], [0, 2]), (1, 4, [0, 1], [1, 3]), (2, 4, [2, 3], [0, 2]), (3, 4, [2, 3], [1, 3])]
    assert join(ParallelConfig()).tp_group is parent.tp_group and dist.get_world_size() == 1
    dist.all_reduce(torch.zeros(1), group=parent.tp_group)
    assert dict(os.environ) == environment


def test_gradients_work_in_ranks_after_the_parent_has_computed_some(run_ranks):
    torch.ones(2, requires_grad=True).sum().backward()

    def work(rank):
        x = torch.full((2,), float(rank), requires_grad=True)
        x.pow(2).sum().backward()
        return x.grad

    assert [gradient.tolist() for gradient in run_ranks(2, work)] == [[0, 0], [2, 2]]


def test_an_exception_names_its_rank_and_line_and_nobody_is_waited_for(run_ranks):
    def fail_here(rank):
        if rank == 1:
            raise KeyError("lost")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1 failed:.*in fail_here.*KeyError: 'lost'"):
        run_ranks(3, fail_here)
    assert time.monotonic() - start < 30


def test_a_result_that_cannot_be_sent_is_an_error_of_its_rank(run_ranks):
    with pytest.raises(RuntimeError, match=r"(?s)^rank 0 failed:.*pickle"):
        run_ranks(1, lambda rank: (value for value in ()))


@pytest.mark.parametrize("waits", [True, False])
def test_a_rank_that_dies_is_named(run_ranks, waits):
    """Whether the other one notices, which is an error there too, or not."""

    def work(rank):
        if rank == 1:
            os._exit(7)
        if waits:
            dist.barrier()

    with pytest.raises(RuntimeError, match="^rank 1 died with exit code 7"):
        run_ranks(2, work, timeout=20)


def test_ranks_that_hang_are_named_with_their_places(run_ranks):
    """Rank 2 is done; rank 0 waits for rank 1."""

    def oversleep():
        time.sleep(60)

    def hear_of_it():
        dist.recv(torch.zeros(1), 1)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)^not done after 4 s: rank 0, 1\nrank 0: .*in hear_of_it.*\nrank 1: .*in oversleep"):
        run_ranks(3, lambda rank: (hear_of_it, oversleep, bool)[rank](), timeout=4)
    assert 4 <= time.monotonic() - start < 30


def test_no_rank_outlives_its_run(run_ranks):
    for process in run_ranks(2, lambda rank: os.getpid()):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
