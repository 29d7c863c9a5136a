"""Preconditioning, and what the denoiser tells the network about noise and given frames."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.diffusion.edm import Denoiser, bcast, scalings
from cosmos_mp.models.dit import NetInput, NetOutput

CONFIG = DiffusionConfig()
SIGMA = torch.tensor([3.0, 0.4], dtype=torch.float64)


def listen(denoiser: Denoiser) -> list[tuple[NetInput, dict, NetOutput]]:
    """What the network is called with and what it answers."""
    calls: list = []
    denoiser.network.register_forward_hook(lambda _, args, kwargs, out: calls.append((args[0], kwargs, out)), with_kwargs=True)
    return calls


def noisy(seed: int = 0) -> Tensor:
    x = torch.randn(2, 3, 4, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * bcast((SIGMA**2 + 0.25).sqrt())


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (80.0, (3.906097e-05, 4.999902e-01, 1.249976e-02, 1.095507)),
        (10.0159, (2.485874e-03, 4.993781e-01, 9.971708e-02, 0.576043)),
        (0.0126296, (9.993624e-01, 1.262557e-02, 1.999362e00, -1.092928)),
    ],
)
def test_scalings_of_the_reference(sigma, expected):
    got = scalings(torch.tensor([sigma], dtype=torch.float64), 0.5)
    assert [value.item() for value in got] == pytest.approx(expected, rel=1e-6)
    assert all(value.dtype == torch.float64 for value in got)


def test_scalings_follow_sigma_data_and_compute_in_float32_at_least():
    c_skip, c_out, c_in, c_noise = scalings(torch.tensor([3.0], dtype=torch.float64), 4.0)
    assert [x.item() for x in (c_skip, c_out, c_in, c_noise)] == pytest.approx([16 / 25, 12 / 5, 1 / 5, 0.25 * 1.0986122886681098])
    assert all(value.dtype == torch.float32 for value in scalings(torch.tensor([3.0]).bfloat16(), 0.5))


def test_preconditioning_around_the_network(make_network, make_condition):
    denoiser, xt, condition = Denoiser(make_network(), CONFIG), noisy(), make_condition()
    calls = listen(denoiser)
    denoised = denoiser(xt, SIGMA, condition)
    ((call, kwargs, out),) = calls
    total = bcast(SIGMA**2 + 0.25)
    torch.testing.assert_close(call.x_BCTHW, xt / total.sqrt())
    torch.testing.assert_close(call.timestep_B, SIGMA.log() / 4)
    assert torch.equal(call.text_BLD, condition.text_BLD) and torch.equal(call.control_BCTHW, condition.control_BCTHW)
    assert torch.equal(call.padding_mask_BHW, condition.padding_mask_BHW) and torch.equal(call.fps_B, condition.fps_B)
    assert call.condition_mask_B1THW.shape == (2, 1, 4, 4, 6) and not call.condition_mask_B1THW.any()
    assert kwargs["control_weight"] == 1.0 and kwargs["tail"] == "full"
    expected = 0.25 / total * xt + bcast(SIGMA) * 0.5 / total.sqrt() * out.out
    torch.testing.assert_close(denoised.x0, expected)
    torch.testing.assert_close(denoised.eps, (xt - expected) / bcast(SIGMA))


def test_given_frames_enter_almost_clean_and_leave_as_given(make_network, make_condition):
    denoiser, xt, condition = Denoiser(make_network(), CONFIG), noisy(), make_condition(given=2)
    given = condition.given
    calls = listen(denoiser)
    denoised = denoiser(xt, SIGMA, condition)
    ((call, _, out),) = calls
    total = bcast(SIGMA**2 + 0.25)
    level = (0.001**2 + 0.25) ** 0.5
    # c_in(sigma) times the frame scaled by c_in(0.001) / c_in(sigma): unit size whatever sigma is.
    noisy_given = (given.latent_BCTHW + 0.001 * given.noise_BCTHW) / level
    torch.testing.assert_close(call.x_BCTHW[:, :, :2], noisy_given[:, :, :2])
    torch.testing.assert_close(call.x_BCTHW[:, :, 2:], (xt / total.sqrt())[:, :, 2:])
    flags = call.condition_mask_B1THW
    assert flags.shape == (2, 1, 4, 4, 6) and (flags[:, :, :2] == 1).all() and (flags[:, :, 2:] == 0).all()

    assert torch.equal(denoised.x0[:, :, :2], given.latent_BCTHW[:, :, :2])
    made = 0.25 / total * xt + bcast(SIGMA) * 0.5 / total.sqrt() * out.out
    torch.testing.assert_close(denoised.x0[:, :, 2:], made[:, :, 2:])
    # eps of a given frame is what separates the real latent from x_t, not from what the network saw.
    torch.testing.assert_close(denoised.eps[:, :, :2], ((xt - given.latent_BCTHW) / bcast(SIGMA))[:, :, :2])
    torch.testing.assert_close(denoised.eps, (xt - denoised.x0) / bcast(SIGMA))


def test_what_stands_in_given_frames_of_xt_does_not_matter(make_network, make_condition):
    denoiser, condition = Denoiser(make_network(), CONFIG), make_condition(given=1)
    first = noisy()
    second = first.clone()
    second[:, :, :1] = noisy(seed=1)[:, :, :1]
    a, b = (denoiser(xt, SIGMA, condition, feature_blocks=(1,)) for xt in (first, second))
    torch.testing.assert_close(a.x0, b.x0)
    torch.testing.assert_close(a.features, b.features)
    gradient = torch.autograd.grad(denoiser(first.requires_grad_(), SIGMA, condition).x0.pow(2).sum(), first)[0]
    assert not gradient[:, :, :1].any() and gradient[:, :, 1:].any()


def test_each_sample_has_its_own_number_of_given_frames(make_network, make_condition):
    denoiser, xt, condition = Denoiser(make_network(), CONFIG), noisy(), make_condition(given=1)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    mixed = dataclasses.replace(condition, given=dataclasses.replace(condition.given, mask_BT=mask))
    together = denoiser(xt, SIGMA, mixed).x0
    torch.testing.assert_close(together[:1], denoiser(xt, SIGMA, make_condition()).x0[:1])
    torch.testing.assert_close(together[1:], denoiser(xt, SIGMA, make_condition(given=2)).x0[1:])


def test_condition_sigma_and_noise_reach_the_network(make_network, make_condition):
    xt, condition = noisy(), make_condition(given=1)
    loud = Denoiser(make_network(), dataclasses.replace(CONFIG, condition_sigma=0.3))
    calls = listen(loud)
    loud(xt, SIGMA, condition)
    expected = (condition.given.latent_BCTHW + 0.3 * condition.given.noise_BCTHW) / (0.09 + 0.25) ** 0.5
    torch.testing.assert_close(calls[0][0].x_BCTHW[:, :, :1], expected[:, :, :1])


def test_features_alone(make_network, make_condition):
    denoiser = Denoiser(make_network(), CONFIG)
    alone = denoiser(noisy(), SIGMA, make_condition(), feature_blocks=(1,), tail="none")
    assert alone.x0 is None and alone.eps is None
    assert torch.equal(alone.features[0], denoiser(noisy(), SIGMA, make_condition(), feature_blocks=(1,)).features[0])


def test_control_weight_and_absent_control(make_network, make_condition):
    network, condition = make_network(), make_condition()
    half, none = Denoiser(network, CONFIG, 0.5)(noisy(), SIGMA, condition).x0, Denoiser(network, CONFIG, 0.0)(noisy(), SIGMA, condition).x0
    assert not torch.allclose(half, none)
    absent = dataclasses.replace(condition, control_BCTHW=None)
    assert torch.equal(Denoiser(network, CONFIG)(noisy(), SIGMA, absent).x0, none)


def test_with_text_changes_the_text_alone(make_condition, unconditional):
    condition = make_condition(given=1)
    other = condition.with_text(unconditional.expand(2, -1, -1))
    assert torch.equal(other.text_BLD[1], unconditional)
    for f in dataclasses.fields(condition):
        assert f.name == "text_BLD" or getattr(other, f.name) is getattr(condition, f.name)


def test_a_bfloat16_network_is_preconditioned_in_float32(make_network, make_condition):
    denoiser = Denoiser(make_network().to(torch.bfloat16), CONFIG)
    calls, inside = listen(denoiser), []
    for part in (denoiser.network.base, denoiser.network.control):
        part.register_forward_pre_hook(lambda _, args: inside.append(args[0]))
    xt, sigma = noisy().float(), SIGMA.float()
    denoised = denoiser(xt, sigma, make_condition(dtype=torch.float32, given=1))
    ((call, _, out),) = calls
    precise = ("timestep_B", "fps_B")
    # The network casts for itself: only inside of it is known in which type it computes.
    assert {getattr(call, f.name).dtype for f in dataclasses.fields(call)} == {torch.float32}
    assert len(inside) == 2
    for cast in inside:
        for f in dataclasses.fields(call):
            expected = getattr(call, f.name).to(torch.float32 if f.name in precise else torch.bfloat16)
            assert getattr(cast, f.name).dtype == expected.dtype and torch.equal(getattr(cast, f.name), expected), f.name
    assert out.out.dtype == torch.bfloat16
    assert denoised.x0.dtype == denoised.eps.dtype == torch.float32
    expected = 0.25 / bcast(sigma**2 + 0.25) * xt + bcast(sigma / 2 / (sigma**2 + 0.25).sqrt()) * out.out.float()
    torch.testing.assert_close(denoised.x0[:, :, 1:], expected[:, :, 1:])
