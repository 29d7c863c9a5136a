"""Predicted work against torch's counter, and against the published size's known numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosmos_mp.config import DiffusionConfig, DMD2Config, DMD2Run, HeadConfig, KDRun, NetConfig, ParallelConfig, TeacherRun
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.dit import NetInput
from cosmos_mp.plan.cost import dmd2_cycle_work, dmd2_work, forward_work, head_work, kd_traffic, model_work, tokens_of
from cosmos_mp.plan.dry_run import transfer_on_meta

RUN = DMD2Run()
GIVEN = (RUN.net, RUN.diffusion, RUN.head, 512)


def counted(work) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def small() -> tuple[NetConfig, DiffusionConfig, NetInput]:
    """The 7B's width and tokens with fewer blocks, without memory."""
    net = NetConfig(blocks=3, control_blocks=2)
    channels, *latent = RUN.diffusion.latent_shape
    meta = {"device": "meta"}
    x = torch.empty(1, channels, *latent, **meta)
    mask = torch.empty(1, 1, *latent, **meta)
    padding = torch.empty(1, 8 * latent[1], 8 * latent[2], **meta)
    one = torch.empty(1, **meta)
    return net, RUN.diffusion, NetInput(x, one, torch.empty(1, 512, 1024, **meta), x, mask, padding, one)


def test_a_pass_costs_what_torch_counts_at_the_7b_width(small):
    net, diffusion, call = small
    network = transfer_on_meta(net)
    work = forward_work(net, tokens_of(diffusion), 512)

    def forward(**options):
        return network(call, **options)

    with torch.no_grad():
        assert counted(forward) == pytest.approx(work.total, rel=5e-3)
        early = forward_work(net, tokens_of(diffusion), 512, 2)
        assert counted(lambda: forward(feature_blocks=(1,), tail="none")) == pytest.approx(early.total, rel=5e-3)
    assert counted(lambda: forward().out.sum().backward()) == pytest.approx(3 * work.total, rel=5e-3)

    network.requires_grad_(False)
    call.x_BCTHW.requires_grad_()
    call.x_BCTHW.grad = None
    # The control branch reads x too: the gradient goes back through all of it.
    assert counted(lambda: forward().out.sum().backward()) == pytest.approx(work.total + work.through, rel=5e-3)
    call.x_BCTHW.requires_grad_(False)


def test_a_head_costs_what_torch_counts():
    with torch.device("meta"):
        network = Discriminator(4096, HeadConfig(feature_blocks=(3, 14)))
        features = [torch.empty(1, 16, 44, 80, 4096) for _ in range(2)]
    work = head_work(RUN.net, RUN.diffusion, HeadConfig(feature_blocks=(3, 14))).total
    assert counted(lambda: network(features).sum().backward()) == pytest.approx(2 * work, rel=1e-3)  # forward, and to the weights alone


def test_the_7b_cycle_is_the_known_one():
    student = dmd2_cycle_work(*GIVEN, 0, "none")
    critic = dmd2_cycle_work(*GIVEN, 1, "none") - student
    assert student == pytest.approx(17.08e15, rel=2e-3) and critic == pytest.approx(12.66e15, rel=2e-3)
    assert dmd2_cycle_work(*GIVEN, 4, "selective") == pytest.approx(5 * 13.55e15, rel=2e-3)
    whole = forward_work(RUN.net, tokens_of(RUN.diffusion), 512).total
    to_feature = forward_work(RUN.net, tokens_of(RUN.diffusion), 512, 15).total
    # Full recomputation runs the trained pass again, and in the student's step the teacher's to its feature.
    assert dmd2_cycle_work(*GIVEN, 0, "full") - student == pytest.approx(whole + to_feature, rel=1e-2)
    assert dmd2_cycle_work(*GIVEN, 1, "full") - dmd2_cycle_work(*GIVEN, 0, "full") - critic == pytest.approx(whole, rel=1e-2)
    more = dmd2_cycle_work(*GIVEN, 4, "none", judges=8) - dmd2_cycle_work(*GIVEN, 4, "none")
    assert more == pytest.approx(7 * 18 * 0.59e12, rel=1e-2)


CRITICS = ("fake_score", "discriminator")


@pytest.mark.parametrize(
    ("config", "roles", "petaflop"),
    [
        (KDRun(), ("student",), 7.36),
        (TeacherRun(), ("teacher",), 7.36),
        (RUN, ("student",), 17.08),
        (RUN, CRITICS, 12.66),
    ],
)
def test_an_iteration_of_the_7b_is_the_known_work(config, roles, petaflop):
    assert model_work(config, 0, roles, 512) == pytest.approx(petaflop * 1e15, rel=1e-3)


def test_the_students_warm_up_is_one_trained_pass():
    config = DMD2Run(dmd2=DMD2Config(reconstruction_warmup=3))
    assert model_work(config, 2, ("student",), 512) == model_work(KDRun(), 2, ("student",), 512)
    assert model_work(config, 3, ("student",), 512) == model_work(RUN, 3, ("student",), 512)


def test_each_option_of_dmd2_counts_the_passes_that_it_adds():
    one = forward_work(RUN.net, tokens_of(RUN.diffusion), 512).total
    early = forward_work(RUN.net, tokens_of(RUN.diffusion), 512, 15)
    judge = head_work(RUN.net, RUN.diffusion, RUN.head).total

    def works(**options) -> tuple[float, float]:
        return dmd2_work(RUN.net, RUN.diffusion, RUN.head, DMD2Config(**options), 512)

    judged = (early.through + 2 * judge, 2 * early.total + 4 * judge)
    assert works() == pytest.approx((6 * one + judged[0], 4 * one + judged[1]))
    assert works(guidance=0.0) == pytest.approx((5 * one + judged[0], 4 * one + judged[1]))
    assert works(gan_weight=0.0) == pytest.approx((6 * one, 4 * one))
    assert works(ladd=True) == pytest.approx((3 * one + early.total + judged[0], one + judged[1]))
    assert works(r1_weight=1.0) == pytest.approx((6 * one + judged[0], 4 * one + 1.5 * judged[1]))


def test_the_7b_sends_the_known_bytes_per_layer():
    def sent(layout: ParallelConfig, dp: int = 1, parameters: int = 0) -> dict[str, int]:
        return kd_traffic(RUN.net, RUN.diffusion, layout, dp, parameters, size=2)

    assert sent(ParallelConfig(cp=8))["all_to_all"] / 31 == pytest.approx(2 * 202e6, rel=5e-3)
    ring = sent(ParallelConfig(cp=8, cp_attention="ring"))["send"] / 31
    # 807 MB of keys and values each way, and their gradients in float32 with one hop more: that home.
    assert ring == pytest.approx(2 * 807e6 + 2 * (807e6 + 2 * 57.7e6), rel=5e-3)
    assert sent(ParallelConfig(tp=2, cp=4))["all_reduce"] / 31 == pytest.approx(2 * 346e6, rel=5e-3)
    halves = sent(ParallelConfig(tp=2, cp=4, sequence_parallel=True))
    assert 2 * halves["reduce_scatter"] / 31 == pytest.approx(2 * 346e6, rel=5e-3)
    edges = halves["all_gather"] - halves["reduce_scatter"]
    assert edges == (5 * 56_320 // 4 * 4096 * 2 + 56_320 // 4 * 64 * 2) // 2
    parameters = 8_129_705_760
    flat = sent(ParallelConfig(), 128, parameters)
    assert flat["all_gather"] == pytest.approx(2 * 16.2e9 * 127 / 128, rel=5e-3) and flat["reduce_scatter"] == flat["all_gather"] / 2
    assert "all_reduce" not in flat
    hybrid = sent(ParallelConfig(shard=8), 128, parameters)
    assert hybrid["all_reduce"] == pytest.approx(2 * 2 * parameters / 8 * 15 / 16, rel=5e-3)
