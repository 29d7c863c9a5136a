"""Runs of several ranks: samples, accumulation, recomputation, resuming in the same and in another layout, bad numbers, signals."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_mp.config import HeadConfig, ParallelConfig
from cosmos_mp.distill.kd import KD
from cosmos_mp.models.weights import fingerprint
from cosmos_mp.parallel.pieces import Pieces, Wholes
from cosmos_mp.parallel.topology import join, single_process
from cosmos_mp.roles import transfer_net
from cosmos_mp.training.callbacks import Callback
from cosmos_mp.training.loop import NonFiniteError

FULL = ParallelConfig(tp=2, cp=2)


def same_bits(runs, left: list[dict], right: list[dict]) -> bool:
    return all(
        torch.equal(ours, theirs)
        for role in left[0]["weights"]
        for ours, theirs in zip(runs.whole(left, role, "weights").values(), runs.whole(right, role, "weights").values(), strict=True)
    )


def test_replicas_see_different_samples_and_the_ranks_of_a_clip_the_same(run_ranks, runs):
    config = replace(runs.TRAIN, iterations=2, global_batch_size=4, micro_batch_size=1)
    results = run_ranks(8, lambda rank: runs.train("kd", FULL, config))
    by_replica = {}
    for result in results:
        by_replica.setdefault(result["place"][2], []).append(result["asked"])
    assert by_replica == {0: [[0, 2, 4, 6]] * 4, 1: [[1, 3, 5, 7]] * 4}


@pytest.mark.parametrize("attention", ["ulysses", "ring"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit_in_a_layout_that_communicates(run_ranks, runs, recompute, attention):
    layout = ParallelConfig(tp=2, cp=2, sequence_parallel=True, cp_attention=attention)

    def run(mode: str) -> list[dict]:
        config = replace(runs.TRAIN, iterations=2, recompute=mode)
        return run_ranks(4, lambda rank: runs.train("dmd2", layout, config))

    assert same_bits(runs, run(recompute), run("none"))


class Calls(TorchDispatchMode):
    """Names of the collectives that run under it."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.name().removeprefix("c10d::"))
        return func(*args, **(kwargs or {}))


REDUCTIONS = {
    "once": (ParallelConfig(), 1, 0),
    "scattered each time, summed over the replicas once": (ParallelConfig(shard=2), 3, 1),
    "each time": (ParallelConfig(reduce="micro_batch"), 3, 0),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradients_are_reduced_once_per_step_or_as_asked(run_ranks, runs, name):
    layout, scattered, summed = REDUCTIONS[name]
    config = replace(runs.TRAIN, iterations=1, global_batch_size=12, micro_batch_size=1)

    def count(rank: int) -> list[str]:
        with Calls() as calls:
            runs.train("kd", layout, config)
        return calls.names

    units = 4  # two blocks, the control branch's one, and the rest
    for names in run_ranks(4, count):
        assert names.count("_reduce_scatter_base_") == units * scattered
        assert names.count("allreduce_") == units * summed


def test_the_published_behaviour_does_not_depend_on_the_layout(run_ranks, runs):
    """As published at CP 4: another number than ours, and the same one on one, two and four ranks."""
    config = replace(runs.TRAIN, iterations=1)

    def run(world: int, **options) -> dict:
        layout = ParallelConfig(cp=world, **options)
        return run_ranks(world, lambda rank: runs.train("dmd2", layout, config))

    alone = run(1, reference_cp_scaling=4)
    for world in (2, 4):
        found = runs.largest_difference(run(world, reference_cp_scaling=4), alone)
        assert max(found.values()) < 1e-9, (world, found)
    ours = run(1)
    assert ours[0]["losses"][0]["vsd"] != pytest.approx(alone[0]["losses"][0]["vsd"], rel=1e-3)
    assert ours[0]["losses"][0]["gan"] == pytest.approx(alone[0]["losses"][0]["gan"], rel=1e-12)


def test_float32_and_bfloat16_follow_float64(run_ranks, runs):
    """bfloat16 computes over float32 masters; its first losses are a rounding away, and its masters take steps that bfloat16 could not."""
    config = replace(runs.TRAIN, iterations=6)

    def run(dtype: torch.dtype, **options) -> list[dict]:
        return run_ranks(4, lambda rank: runs.train("dmd2", replace(FULL, **options), config, dtype))

    exact, single, half = run(torch.float64), run(torch.float32), run(torch.float32, compute="bfloat16")
    for now, then in zip(single[0]["losses"], exact[0]["losses"], strict=True):
        assert now == pytest.approx(then, rel=1e-5 if now is single[0]["losses"][0] else 1e-3)
    alone = run_ranks(1, lambda rank: runs.train("dmd2", None, replace(config, iterations=1)))
    first = [result | {"losses": result["losses"][:1]} for result in single]
    assert max(runs.largest_difference(first, alone).values()) < 1e-5
    for now, then in zip(half[0]["losses"], exact[0]["losses"], strict=True):
        assert now["total"] == pytest.approx(then["total"], rel=0.01 if now is half[0]["losses"][0] else 0.2)
    assert half[0]["losses"][0]["vsd"] != single[0]["losses"][0]["vsd"]
    for role in ("student", "fake_score", "discriminator"):
        weights, gradients = runs.whole(half, role, "weights"), runs.whole(half, role)
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert all(g is None or g.dtype == torch.float32 for g in gradients.values())
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


def test_what_is_only_reported_is_the_same_number_too(run_ranks, runs):
    class Metrics(Callback):
        def on_iteration(self, event) -> None:
            self.seen = event.metrics

    def run(world: int, layout: ParallelConfig | None, **options) -> list[dict]:
        def one(rank: int) -> dict:
            metrics = Metrics()
            runs.train("dmd2", layout, replace(runs.TRAIN, iterations=1), callbacks=[metrics], **options)
            return metrics.seen

        return run_ranks(world, one)

    for options in ({}, {"critic_warmup": 1}):
        (alone,) = run(1, None, **options)
        assert len(alone) >= 2
        for metrics in run(4, ParallelConfig(cp=2), **options):
            assert metrics == pytest.approx(alone, rel=1e-9)


VARIANTS = {
    # The trained fake score stops early twice per micro-batch, at a block, and its first call of all is frozen.
    "features of the fake score": {"feature_role": "fake_score"},
    # The teacher's blocks after the feature never run.
    "LADD": {"ladd": True},
    "warm-up of the student": {"reconstruction_warmup": 2},
    "two heads on single frames": {"head": HeadConfig("conv2d", 16, (0, 1), first_frame=2)},
    "another space of the fake score": {"fake_score_space": "network", "guidance": 0.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_recipes_too_are_the_same_numbers_on_many_ranks(run_ranks, runs, name):
    config = replace(runs.TRAIN, iterations=3, global_batch_size=4, micro_batch_size=1)

    def run(world: int, layout: ParallelConfig | None) -> list[dict]:
        return run_ranks(world, lambda rank: runs.train("dmd2", layout, config, **VARIANTS[name]))

    found = runs.largest_difference(run(4, ParallelConfig(cp=2)), run(1, None))
    assert found.pop("last") < 1e-7 and max(found.values()) < 1e-9, found


@pytest.mark.parametrize(("world", "layout"), [(4, FULL), (3, ParallelConfig()), (4, ParallelConfig(cp=2, shard=2))])
def test_a_network_can_be_told_by_its_whole_parameters_wherever_they_are(run_ranks, runs, world, layout):
    def tell(rank: int, layout: ParallelConfig | None) -> str:
        topology = single_process() if layout is None else join(layout)
        pieces = Pieces(transfer_net(runs.NET, topology), topology)
        runs.random_weights(pieces, 5)
        return fingerprint(Wholes(pieces))

    assert set(run_ranks(world, tell, layout)) == set(run_ranks(1, tell, None))


# --- Resuming ---


@pytest.mark.parametrize("stop", [4, 5, 6])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_stopped_and_resumed_is_the_uninterrupted_run_bit_for_bit(run_ranks, runs, tmp_path, stop, asynchronous):
    """Before, on and after the student's step of a cycle of five."""
    config = replace(runs.TRAIN, iterations=8, save_every=100, async_save=asynchronous)

    def run(name: str, iterations: int) -> list[dict]:
        shortened = replace(config, iterations=iterations)
        return run_ranks(2, lambda rank: runs.train("dmd2", ParallelConfig(tp=2), shortened, run_dir=tmp_path / name))

    straight = run("straight", 8)
    run("broken", stop)
    resumed = run("broken", 8)
    assert resumed[0]["losses"] == straight[0]["losses"][stop:]
    assert same_bits(runs, resumed, straight)


@pytest.fixture(scope="module")
def saved(run_ranks, runs, tmp_path_factory):
    """Four iterations as TP2 x CP2, saved; the settings for going on to nine, and what comes out of that in the same layout."""
    folder = tmp_path_factory.mktemp("saved")
    config = replace(runs.TRAIN, iterations=4, global_batch_size=3, micro_batch_size=1)
    run_ranks(4, lambda rank: runs.train("dmd2", FULL, config, run_dir=folder / "run"))
    shutil.copytree(folder / "run", folder / "same")
    config = replace(config, iterations=9)
    return folder / "run", config, run_ranks(4, lambda rank: runs.train("dmd2", FULL, config, run_dir=folder / "same"))


@pytest.mark.parametrize(("world", "layout"), [(1, ParallelConfig()), (4, ParallelConfig(tp=4)), (3, ParallelConfig())])
def test_a_run_goes_on_in_another_layout(run_ranks, runs, saved, tmp_path, world, layout):
    folder, config, same = saved
    shutil.copytree(folder, tmp_path / "other")
    other = run_ranks(world, lambda rank: runs.train("dmd2", layout, config, run_dir=tmp_path / "other"))
    assert len(other[0]["losses"]) == 5
    for now, then in zip(other[0]["losses"], same[0]["losses"], strict=True):
        assert now == pytest.approx(then, rel=1e-7)


@dataclass
class Hook(Callback):
    """Calls a function after each iteration."""

    then: Callable[[int], None]

    def on_iteration(self, event) -> None:
        self.then(event.iteration)


# --- Bad numbers and signals ---


def poisoned(runs, rank: int, iterations: tuple[int, ...], *, only: int):
    """Clips of which those of some iterations are not finite, on one rank alone."""

    class Poisoned(runs.Clips):
        def batch(self, position: int, size: int):
            batch = super().batch(position, size)
            bad = rank == only and position // 4 in iterations
            return replace(batch, latent_BCTHW=batch.latent_BCTHW * torch.nan) if bad else batch

    return Poisoned(torch.float64)


class Told(Callback):
    def __init__(self):
        self.skipped, self.rates = [], []

    def on_iteration(self, event) -> None:
        self.skipped.append(event.skipped)
        self.rates.append(event.lrs)


def test_a_bad_number_on_one_rank_is_named_and_applied_nowhere(run_ranks, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Losses", lambda: _Quiet())
    config = replace(runs.TRAIN, iterations=4)

    def run(rank: int):
        told = Told()
        clips = poisoned(runs, rank, (3,), only=1)
        before = runs.train("kd", ParallelConfig(), replace(config, iterations=3), run_dir=tmp_path / "run", clips=clips, callbacks=[told])
        after = runs.train("kd", ParallelConfig(), config, run_dir=tmp_path / "run", clips=clips, callbacks=[told])
        return before, after, told.skipped

    results = run_ranks(2, run)
    before, after = [result[0] for result in results], [result[1] for result in results]
    assert same_bits(runs, before, after)
    assert [result[2] for result in results] == [[None, None, None, "loss term 'kd' of student is nan at iteration 3 on rank 1"]] * 2


class _Quiet(Callback):
    seen: list = []


def test_a_gradient_that_breaks_on_one_rank_is_applied_nowhere(run_ranks, runs, tmp_path, monkeypatch):
    """The losses are finite; by the time that gradients are looked at they have been summed over the ranks."""
    monkeypatch.setattr(runs, "Losses", lambda: _Quiet())
    config = replace(runs.TRAIN, iterations=2, global_batch_size=6, micro_batch_size=2)

    def run(rank: int) -> tuple[list, list]:
        told, weights = Told(), []

        class Breaking(KD):
            def step(self, batch, iteration):
                output = super().step(batch, iteration)
                if rank == 2 and iteration == 1:
                    output.terms["kd"].value.register_hook(lambda gradient: gradient * torch.nan)
                return output

        monkeypatch.setattr(runs, "KD", Breaking)
        result = runs.train("kd", ParallelConfig(), replace(config, iterations=1), run_dir=tmp_path / "run", callbacks=[told])
        weights.append(result["weights"]["student"])
        result = runs.train("kd", ParallelConfig(), config, run_dir=tmp_path / "run", callbacks=[told])
        weights.append(result["weights"]["student"])
        return told.skipped, [[value[2] for value in values.values()] for values in weights]

    for skipped, (before, after) in run_ranks(3, run):
        assert skipped == [None, "gradient norm of student is nan at iteration 1 in the part of rank 0"]
        assert all(map(torch.equal, before, after))


def test_after_so_many_in_a_row_every_rank_stops(run_ranks, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Losses", lambda: _Quiet())
    config = replace(runs.TRAIN, iterations=9, save_every=2, max_nonfinite=3)

    def run(rank: int) -> str:
        with pytest.raises(NonFiniteError) as caught:
            runs.train("kd", ParallelConfig(), config, run_dir=tmp_path / "run", clips=poisoned(runs, rank, (3, 4, 5), only=0))
        return str(caught.value)

    first, second = run_ranks(2, run)
    assert first == second and "loss term 'kd' of student is nan at iteration 5 on rank 0" in first
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["iter_00000002", "iter_00000004"]


def test_a_signal_to_one_rank_ends_all_after_the_same_iteration(run_ranks, runs, tmp_path):
    config = replace(runs.TRAIN, iterations=50)

    def run(rank: int) -> int:
        def then(iteration: int) -> None:
            if rank == 1 and iteration == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return runs.train("kd", ParallelConfig(), config, run_dir=tmp_path / "run", callbacks=[Hook(then)])["iteration"]

    ended = run_ranks(2, run)
    assert len(set(ended)) == 1 and 3 <= ended[0] <= 5
    assert (tmp_path / "run" / "checkpoints" / f"iter_{ended[0]:08d}").is_dir()
