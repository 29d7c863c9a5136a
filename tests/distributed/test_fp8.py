"""FP8 on several ranks: under FSDP the numbers of one process, under tensor parallelism each rank's own scales."""

from __future__ import annotations

import pytest
import torch

from cosmos_mp.backends.fp8 import E4M3, quantise
from cosmos_mp.config import ParallelConfig
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import join


@pytest.mark.parametrize(("recipe", "recompute"), [("current", "none"), ("block", "selective"), ("current", "full")])
def test_sharded_weights_are_rounded_whole(run_ranks, runs, recipe, recompute):
    """Two ranks hold a half of each weight; losses and gradients are those of one process whose networks are whole."""

    def train(rank: int, layout: ParallelConfig | None, fp8: str | None) -> dict:
        made = runs.transfer_net
        runs.transfer_net = lambda *args: made(*args, fp8=fp8)
        # One sample at a time in either: an activation is scaled by the largest value among the tokens that are there.
        config = runs.replace(runs.TRAIN, iterations=3, global_batch_size=2, micro_batch_size=1, recompute=recompute)
        return runs.train("kd", layout, config)

    sharded, alone, plain = (
        run_ranks(world, train, layout, fp8, timeout=120)
        for world, layout, fp8 in ((2, ParallelConfig(), recipe), (1, None, recipe), (1, None, None))
    )
    assert max(runs.largest_difference(sharded, alone).values()) < 1e-5
    assert runs.largest_difference(alone, plain)["student"] > 1e-3


@pytest.mark.parametrize("recipe", ["current", "block"])
def test_ranks_of_a_tensor_parallel_layer_scale_their_own_shards(run_ranks, runs, recipe):
    def products(rank: int) -> list[float]:
        network = runs.transfer_net(runs.NET, topology := join(ParallelConfig(tp=2, compute="float32")), "none", torch.float32, fp8=recipe)
        runs.random_weights(Pieces(network, topology), 0)
        tiles = (None, None) if recipe == "current" else ((1, 128), (128, 128))
        seen, differences = {}, []
        for name in ("q", "out"):
            layer = getattr(network.base.blocks[0].self_attn, name)
            forward = layer._forward_impl

            def noting(input, weight, name=name, forward=forward, **options):
                seen[name] = (input.detach(), weight.detach().clone(), forward(input=input, weight=weight, **options).detach())
                return forward(input=input, weight=weight, **options)

            layer._forward_impl = noting
        batch = runs.Clips(torch.float32).batch(0, 1)
        runs.KD(network, runs.DIFFUSION, 0).step(batch, 0)
        for x, w, out in seen.values():
            expected = quantise(x.flatten(0, 1), E4M3, tiles[0]) @ quantise(w, E4M3, tiles[1]).t()
            differences.append((out.flatten(0, 1) - expected).abs().max().item())
        return [*differences, *(w.abs().max().item() for _, w, _ in seen.values())]

    one, other = run_ranks(2, products)
    assert one[:2] == other[:2] == [0, 0]
    assert one[2:] != other[2:]
