"""What the benchmark counts and compares, on real ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cosmos_mp.bench.meters import Traffic
from cosmos_mp.bench.reference import ReferenceDMD2, gather_features, nest_recompute
from cosmos_mp.config import ParallelConfig
from cosmos_mp.models.block import Block
from cosmos_mp.parallel import collectives
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.recompute import recompute
from cosmos_mp.parallel.topology import Topology, join
from cosmos_mp.plan.cost import kd_traffic
from cosmos_mp.training.callbacks import Callback


def test_every_collective_is_counted_as_a_ring_sends_it(run_ranks):
    def count(rank: int) -> dict[str, int]:
        group = join(ParallelConfig()).dp_cp_group
        x = torch.zeros(128, 3)  # 1,536 bytes
        with Traffic() as traffic:
            collectives.exchange(x, group)
            collectives.sum_over(x, group)
            dist.all_reduce(x, group=group)
            collectives.gather(x, group)
            dist.all_gather_into_tensor(torch.empty(512, 3), x, group=group)
            collectives.scatter_sum(x, group)
            dist.reduce_scatter_tensor(torch.empty(32, 3), x, group=group)
            passed = [dist.isend(x, (rank + 1) % 4, group), dist.irecv(torch.empty_like(x), (rank - 1) % 4, group)]
            for transfer in passed:
                transfer.wait()
            dist.all_reduce(torch.zeros(8), group=group)  # an agreement, no data
            dist.barrier()
        return dict(traffic.sent)

    expected = {"all_to_all": 1152, "all_reduce": 2 * 2304, "all_gather": 2 * 4608, "reduce_scatter": 2 * 1152, "send": 1536}
    assert run_ranks(4, count) == [expected] * 4


LAYOUTS = {
    "TP2": (2, ParallelConfig(tp=2)),
    "TP2+SP": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "CP4 Ulysses": (4, ParallelConfig(cp=4)),
    "CP4 ring": (4, ParallelConfig(cp=4, cp_attention="ring")),
    "TP2 x CP2": (4, ParallelConfig(tp=2, cp=2)),
    "FSDP 4": (4, ParallelConfig()),
    "HSDP 2 x 2": (4, ParallelConfig(shard=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_send_what_is_predicted(run_ranks, runs, name):
    world, layout = LAYOUTS[name]

    class Counted(Callback):
        def on_start(self, state):
            self.traffic = Traffic()
            self.traffic.__enter__()

        def on_iteration(self, event):
            self.traffic.__exit__(None, None, None)

    def count(rank: int) -> tuple[dict[str, int], dict[str, int]]:
        watching, held = Counted(), {}
        take = Pieces.take_gradients

        def note(pieces: Pieces) -> None:
            held["parameters"] = sum(parameter.numel() for parameter in pieces.network.parameters())
            take(pieces)
            due = [piece for piece in pieces.values() if piece.summed and piece.parameter.grad is not None]
            held["summed"] = sum(piece.parameter.numel() for piece in due)

        Pieces.take_gradients = note
        dp = join(layout).dp_group.size()
        config = replace(runs.TRAIN, iterations=1, global_batch_size=dp, micro_batch_size=1)
        runs.train("kd", layout, config, torch.float32, callbacks=[watching])
        return dict(watching.traffic.sent), {"dp": dp, **held}

    for sent, held in run_ranks(world, count):
        formula = kd_traffic(runs.NET, runs.DIFFUSION, layout, **held)
        assert sent.keys() == formula.keys()
        for kind in formula:
            # Shards that do not divide are padded.
            assert sent[kind] == pytest.approx(formula[kind], rel=0.025), kind


def test_the_reference_procedure_gives_what_our_switch_for_it_gives(run_ranks, runs):
    """Its GAN gradient shrinks by 1 / CP and its VSD is normalised per shard: `reference_cp_scaling` on one process says the same."""
    make_method = runs.make_method

    def as_published(kind: str, topology: Topology, dtype: torch.dtype, mode: str, **options) -> ReferenceDMD2:
        ours = make_method(kind, topology, dtype, "none", **options)
        for network in ours.networks.values():
            for module in network.modules():
                if isinstance(module, Block):
                    nest_recompute(module)
            recompute(network, Block, mode)
        gather_features(ours.discriminator, topology)
        return ReferenceDMD2(ours.networks, ours.diffusion, ours.config, runs.HEAD, ours.unconditional_LD, ours.seed)

    config = replace(runs.TRAIN, iterations=6, recompute="full")

    def published(rank: int) -> dict:
        runs.make_method = as_published
        return runs.train("dmd2", ParallelConfig(cp=2), config)

    results = run_ranks(2, published)
    reference = run_ranks(1, lambda rank: runs.train("dmd2", ParallelConfig(reference_cp_scaling=2), config))
    for result in (*results, *reference):
        for terms in result["losses"]:
            del terms["total"]  # ours is reported with the weight that acts
    assert max(runs.largest_difference(results, reference).values()) < 1e-9
