"""A run of one rank over NCCL: its groups, its collectives, and FSDP that computes in bfloat16. Not run on a GPU yet.

With COSMOS_MP_REHEARSE=1 the same tests run on a CPU over gloo.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cosmos_mp.parallel import collectives

REHEARSED = os.environ.get("COSMOS_MP_REHEARSE") == "1"
DEVICE, BACKEND, COMPUTE, ITERATIONS = ("cpu", "gloo", "bfloat16", 3) if REHEARSED else ("cuda", "nccl", "auto", 6)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="needs a CUDA device"),
]

NAMES = ("sum_over", "exchange", "gather", "scatter_sum", "enter", "split", "join", "leave")


def test_all_groups_are_nccls_and_on_the_device(join_alone):
    topology = join_alone()
    assert topology.device.type == DEVICE and topology.world == 1
    groups = (topology.tp_group, topology.cp_group, topology.dp_group, topology.dp_cp_group)
    assert {dist.get_backend(group) for group in groups} == {BACKEND}
    assert topology.mesh.device_type == DEVICE and topology.fsdp_mesh.size() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_collectives_of_one_rank_give_back_what_they_got(join_alone, monkeypatch, dtype):
    monkeypatch.setattr(collectives, "_apply", collectives._Collective.apply)  # also where one rank needs none
    topology = join_alone()
    x = torch.randn(8, 6, device=topology.device).to(dtype).t()
    for name in NAMES:
        y = x.clone().requires_grad_()
        out = getattr(collectives, name)(y, topology.cp_group)
        out.backward(2 * x)
        assert torch.equal(out, x) and torch.equal(y.grad, 2 * x), name


def losses(result: dict) -> list[dict[str, float]]:
    return [{name: value for name, value in seen.items() if not name.startswith("norm of ")} for seen in result["losses"]]


@pytest.mark.parametrize("kind", ["kd", "dmd2"])
def test_fsdp_trains_in_bfloat16_as_whole_networks_do_in_float32(join_alone, runs, monkeypatch, kind):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = replace(runs.TRAIN, iterations=ITERATIONS)
    topology = join_alone()
    whole = runs.train(kind, None, config, torch.float32)
    for options, bound in ((replace(topology.options, compute="float32"), 1e-3), (replace(topology.options, compute=COMPUTE), 5e-2)):
        found = runs.train(kind, options, config, torch.float32)
        assert found["iteration"] == config.iterations
        for step, (ours, theirs) in enumerate(zip(losses(found), losses(whole), strict=True)):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert math.isfinite(value)
                # One step apart in rounding, later steps of a GAN go their own way.
                assert step > 1 or abs(value - theirs[name]) <= bound * max(abs(theirs[name]), 0.1), (options.compute, step, name)
        for role, gradients in found["gradients"].items():
            for name, (_, _, gradient) in gradients.items():
                expected = whole["gradients"][role][name][2]
                assert (gradient is None) == (expected is None), name
                if gradient is not None:
                    assert gradient.dtype == torch.float32 and gradient.device.type == topology.device.type
                    assert gradient.isfinite().all(), name
        for role, weights in found["weights"].items():
            assert {value.dtype for _, _, value in weights.values()} == {torch.float32}, role
            flat, expected = (
                torch.cat([g.flatten() for _, _, g in r["gradients"][role].values() if g is not None]) for r in (found, whole)
            )
            assert (flat - expected).norm() <= 2 * bound * expected.norm(), (options.compute, role)
    if kind == "kd":
        assert losses(found)[-1]["kd"] < losses(found)[0]["kd"]
