"""The predicted bytes of a layout against what its ranks hold."""

from __future__ import annotations

import pytest
import torch

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import ParallelConfig
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import join, single_process
from cosmos_mp.plan.memory import role_memory
from cosmos_mp.roles import transfer_net

LAYOUTS = [(4, ParallelConfig(tp=2)), (3, ParallelConfig()), (4, ParallelConfig(cp=2, shard=2))]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_predicted_bytes_are_those_of_the_rank_that_holds_most(run_ranks, runs, world, layout):
    def held(rank: int) -> int:
        topology = join(layout)
        pieces = Pieces(transfer_net(runs.NET, topology), topology)
        return sum(piece.parameter.numel() * piece.parameter.element_size() for piece in pieces.values())

    with torch.device("meta"):
        network = TransferNet(runs.NET, LocalBackend(single_process().tp_group))
    dp = world // layout.tp // layout.cp
    share = role_memory(network, layout, dp, trained=True, averaged=True, micro_batches=2)
    assert share.masters == max(run_ranks(world, held))
    assert (share.gradients, share.adam, share.average) == (share.masters, 2 * share.masters, share.masters)


def test_whole_gradients_wait_only_where_they_are_reduced_once_and_not_kept_sharded(runs):
    with torch.device("meta"):
        network = TransferNet(runs.NET, LocalBackend(single_process().tp_group))
    whole = 4 * sum(p.numel() for p in network.parameters())

    def accumulated(layout: ParallelConfig, micro_batches: int = 2, trained: bool = True) -> int:
        return role_memory(network, layout, 4, trained=trained, micro_batches=micro_batches).accumulated

    assert accumulated(ParallelConfig()) == whole
    assert accumulated(ParallelConfig(), micro_batches=1) == 0
    assert accumulated(ParallelConfig(), trained=False) == 0
    assert accumulated(ParallelConfig(shard=2)) == 0
    assert accumulated(ParallelConfig(reduce="micro_batch")) == 0
    assert accumulated(ParallelConfig(tp=2)) < whole
