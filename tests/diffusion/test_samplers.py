"""The teacher's sampler on problems with a known answer, and what it asks of the network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cosmos_mp.config import DiffusionConfig, SamplerConfig
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import first_step, guide, one_step, sample_teacher, second_order_sample, second_order_step
from cosmos_mp.diffusion.schedules import edm_ramp

CONFIG = DiffusionConfig()


def level(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def count_texts(denoiser: Denoiser) -> list[Tensor]:
    texts: list[Tensor] = []
    denoiser.network.register_forward_hook(lambda _, args, out: texts.append(args[0].text_BLD))
    return texts


def test_guidance_in_the_reference_form():
    conditional, unconditional = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    assert guide(conditional, unconditional, 5.0).tolist() == [13.0, -4.0]
    assert torch.equal(guide(conditional, unconditional, 0.0), conditional)


def test_first_step_is_exact_for_a_constant_clean_latent():
    x0, direction = torch.tensor([0.3, -0.2]).double(), torch.tensor([1.0, 2.0]).double()
    torch.testing.assert_close(first_step(x0 + 80 * direction, x0, level(80), level(3)), x0 + 3 * direction)


def test_second_order_step_is_exact_where_the_clean_estimate_is_linear_in_log_sigma():
    # With l = -ln sigma the flow is dx/dl = x0 - x; for x0 = a + b l its solution is a + b (l - 1) + k e^-l.
    a, b, k = 0.7, -0.4, 1.9

    def x0(sigma: float) -> Tensor:
        return level(a - b * math.log(sigma))

    def x(sigma: float) -> Tensor:
        return level(a + b * (-math.log(sigma) - 1) + k * sigma)

    for previous, sigma, target in ((9.0, 4.0, 1.5), (2.0, 1.9, 0.1), (0.01, 0.007, 0.002)):
        got = second_order_step(x(sigma), x0(sigma), x0(previous), level(sigma), level(target), level(previous))
        assert got.item() == pytest.approx(x(target).item(), rel=1e-12)


def test_sampling_a_constant_gives_the_constant():
    x0, levels = torch.full((2, 3), 0.3, dtype=torch.float64), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma.item())
        # The state lies on the straight line to the noise at every level.
        torch.testing.assert_close(x, x0 + sigma, rtol=1e-12, atol=1e-12)
        return x0

    sigmas = edm_ramp(80.0, 0.002, 9)
    assert torch.equal(second_order_sample(denoise, x0 + 80.0, sigmas), x0)
    assert levels == sigmas.tolist()


def test_sampling_gaussian_data_converges_at_second_order():
    # Data of standard deviation s has the denoiser s^2 / (s^2 + sigma^2) x; x then shrinks with sqrt(s^2 + sigma^2).
    s, start = 0.5, torch.tensor([80.0, -30.0]).double()
    end = 0.002
    exact = start * math.sqrt((s**2 + end**2) / (s**2 + 80**2)) * s**2 / (s**2 + end**2)
    errors = []
    for steps in (100, 200, 400):
        got = second_order_sample(lambda x, sigma: s**2 / (s**2 + sigma**2) * x, start, edm_ramp(80.0, end, steps))
        errors.append((got - exact).abs().max().item())
    assert errors[0] < 0.02 * exact.abs().max()
    assert all(3.5 < coarse / fine < 4.6 for coarse, fine in zip(errors[:-1], errors[1:], strict=True))


def test_state_is_float64_even_for_a_float32_network():
    seen = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x.dtype)
        return (0.25 / (0.25 + sigma**2) * x).float()

    second_order_sample(denoise, torch.ones(2), edm_ramp(80.0, 0.002, 3))
    assert seen == [torch.float64] * 4


def test_35_guided_steps_are_72_network_calls(make_network, make_condition, unconditional):
    teacher, condition = Denoiser(make_network(), CONFIG), make_condition([0])
    texts = count_texts(teacher)
    sample_teacher(teacher, noise(1), condition, unconditional[None], SamplerConfig())
    assert len(texts) == 72
    for conditional, negative in zip(texts[::2], texts[1::2], strict=True):
        assert torch.equal(conditional, condition.text_BLD) and torch.equal(negative[0], unconditional)


def test_without_guidance_nothing_unconditional_is_asked(make_network, make_condition, unconditional):
    teacher = Denoiser(make_network(), CONFIG)
    texts = count_texts(teacher)
    sample_teacher(teacher, noise(1), make_condition([0]), unconditional[None], SamplerConfig(steps=5, guidance=0.0))
    assert len(texts) == 6


def test_sampling_guides_from_the_negative_prompt_to_the_prompt(make_network, make_condition, unconditional):
    teacher, condition, g = Denoiser(make_network(), CONFIG), make_condition(given=1), 2.5
    negative = condition.with_text(unconditional.expand(2, -1, -1))
    got = sample_teacher(teacher, noise(), condition, negative.text_BLD, SamplerConfig(steps=3, guidance=g))
    levels = [(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)]

    @torch.no_grad()
    def guided(x: Tensor, sigma: float) -> Tensor:
        sigmas = torch.full((2,), sigma, dtype=torch.float64)
        with_prompt, with_negative = teacher(x, sigmas, condition).x0, teacher(x, sigmas, negative).x0
        return with_prompt + g * (with_prompt - with_negative)

    x, estimates = levels[0] * noise(), []
    for i in range(3):
        s, t = levels[i], levels[i + 1]
        estimates.append(guided(x, s))
        # Over one step of length h in ln sigma, x0 is extrapolated linearly through the two estimates; integrate that exactly.
        slope = 0 if i == 0 else (estimates[i] - estimates[i - 1]) / math.log(levels[i - 1] / s)
        h = math.log(s / t)
        x = math.exp(-h) * x + (1 - math.exp(-h)) * estimates[i] + (h - 1 + math.exp(-h)) * slope
    torch.testing.assert_close(got, guided(x, levels[3]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[:, :, 0], condition.given.latent_BCTHW[:, :, 0])


def test_the_answer_has_the_dtype_of_the_noise_and_no_graph(make_network, make_condition, unconditional):
    teacher = Denoiser(make_network(dtype=torch.float32), CONFIG)
    condition, text = make_condition([0], torch.float32), unconditional[None].float()
    answer = sample_teacher(teacher, noise(1).float(), condition, text, SamplerConfig(steps=2))
    assert answer.dtype == torch.float32 and not answer.requires_grad


def test_one_step_is_one_call_at_the_largest_level(make_network, make_condition):
    student, condition, calls = Denoiser(make_network(), DiffusionConfig(sigma_max=70.0)), make_condition(given=1), []
    student.network.register_forward_hook(lambda _, args, out: calls.append(args[0].timestep_B))
    got = one_step(student, noise(), condition)
    assert len(calls) == 1 and calls[0].tolist() == pytest.approx([math.log(70.0) / 4] * 2)
    expected = student(70.0 * noise(), torch.tensor([70.0, 70.0]).double(), condition)
    assert torch.equal(got.x0, expected.x0) and torch.equal(got.eps, expected.eps)
    assert got.x0.requires_grad
