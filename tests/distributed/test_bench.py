"""What the benchmark counts and compares, on real ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cosmos_mp.bench import parallel
from cosmos_mp.bench.meters import Traffic
from cosmos_mp.bench.reference import ReferenceDMD2, gather_features, nest_recompute
from cosmos_mp.bench.worker import MEASUREMENTS
from cosmos_mp.config import HeadConfig, ParallelConfig
from cosmos_mp.distill.conditioning import condition_of
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.models.block import Block
from cosmos_mp.parallel import collectives
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.recompute import recompute
from cosmos_mp.parallel.topology import Topology, join, single_process
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


@pytest.mark.parametrize("name", parallel.LAYOUTS)
def test_layouts_send_what_is_predicted(run_ranks, runs, name):
    world, options = parallel.LAYOUTS[name]
    layout = ParallelConfig(**options)

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


def test_the_references_teacher_has_a_graph_through_all_blocks(runs):
    topology = single_process()
    seen = []
    for kind in (DMD2, ReferenceDMD2):
        ours = runs.make_method("dmd2", topology, torch.float64, "none", head=HeadConfig("conv3d", 16, (0,)))
        method = kind(ours.networks, ours.diffusion, ours.config, HeadConfig("conv3d", 16, (0,)), ours.unconditional_LD, 0)
        batch = runs.Clips(torch.float64).batch(0, 2)
        condition = condition_of(batch, runs.DIFFUSION, 0, 0)
        graphs = []
        ours.networks["teacher"].base.blocks[-1].register_forward_hook(lambda _, args, out, graphs=graphs: graphs.append(out.requires_grad))
        method.student_step(batch.latent_BCTHW, method.draw(batch, 0), condition)
        seen.append(graphs)
    assert seen == [[False, False], [True, False]]  # with text, and without


# --- The whole benchmark, at its smallest ---


@pytest.fixture(scope="module")
def small(run_ranks) -> dict:
    """Everything that `bench parallel` finds, of two procedures and one layout, on forked ranks instead of new processes."""

    def launch(world: int, name: str, keep: bool = True, **arguments) -> list[dict]:
        return run_ranks(world, lambda rank: MEASUREMENTS[name](**arguments), timeout=120)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "launch", launch)
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
