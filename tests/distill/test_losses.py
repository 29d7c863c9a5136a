"""Every loss against its formula in float64: value, gradient, and where no gradient may go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cosmos_mp.distill import losses

SIGMA = torch.tensor([0.02, 1.3, 40.0], dtype=torch.float64)
SIGMA_B = SIGMA[:, None, None, None, None]


def draw(seed: int) -> Tensor:
    return torch.randn(3, 2, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kd_loss():
    x0, target = draw(0).requires_grad_(), draw(1).requires_grad_()
    loss = losses.kd_loss(x0, target)
    assert loss.item() == pytest.approx(0.5 * ((x0 - target) ** 2).sum().item() / x0.numel())
    loss.backward()
    torch.testing.assert_close(x0.grad, (x0 - target).detach() / x0.numel())
    assert target.grad is None


def test_vsd_weight_is_sigma_over_the_mean_error_in_noise():
    y, eps, teacher_eps = draw(0), draw(1), draw(2)
    teacher_x0 = y + SIGMA_B * eps - SIGMA_B * teacher_eps
    expected = SIGMA / (eps - teacher_eps).abs().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses.vsd_weight(SIGMA, (y - teacher_x0).abs().mean(dim=(1, 2, 3, 4))), expected, rtol=1e-10, atol=0)


def test_fake_score_loss_in_noise_space():
    y, eps, fake_eps = draw(0).requires_grad_(), draw(1), draw(2).requires_grad_()
    x0 = (y + SIGMA_B * eps).detach() - SIGMA_B * fake_eps
    loss = losses.fake_score_loss(y, x0, SIGMA, space="eps", sigma_data=0.5)
    torch.testing.assert_close(loss, ((eps - fake_eps) ** 2).mean(), rtol=1e-10, atol=0)
    loss.backward()
    torch.testing.assert_close(fake_eps.grad, 2 * (fake_eps.detach() - eps) / y.numel(), rtol=1e-9, atol=1e-13)
    assert y.grad is None


def outputs(x_t: Tensor, clean: Tensor) -> Tensor:
    """The network output F for which c_skip x_t + c_out F is `clean`."""
    total = SIGMA_B**2 + 0.25
    return (clean - 0.25 / total * x_t) / (SIGMA_B * 0.5 / total.sqrt())


def test_fake_score_loss_in_network_space_is_the_error_of_the_network_output():
    y, x0, eps = draw(0).requires_grad_(), draw(1).requires_grad_(), draw(2)
    yt = y.detach() + SIGMA_B * eps
    loss = losses.fake_score_loss(y, x0, SIGMA, space="network", sigma_data=0.5)
    torch.testing.assert_close(loss, (outputs(yt, x0) - outputs(yt, y)).pow(2).mean(), rtol=1e-10, atol=0)
    loss.backward()
    assert y.grad is None and x0.grad.any()


def test_denoising_loss_is_the_error_of_the_network_output():
    x0, latent, eps = draw(0), draw(1), draw(2)
    xt = latent + SIGMA_B * eps
    loss = losses.denoising_loss(x0, latent, SIGMA, sigma_data=0.5)
    torch.testing.assert_close(loss, (outputs(xt, x0) - outputs(xt, latent)).pow(2).mean(), rtol=1e-10, atol=0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_gan_losses_and_their_signs():
    fake, real = torch.tensor([[0.3, -1.2], [2.0, 0.1]]).double(), torch.tensor([[1.0, -0.4], [0.0, 3.0]]).double()
    fake, real = fake.requires_grad_(), real.requires_grad_()
    generator = losses.gan_generator_loss(fake)
    assert generator.item() == pytest.approx(sum(softplus(-x) for x in fake.flatten().tolist()) / 4)
    assert (torch.autograd.grad(generator, fake)[0] < 0).all()  # the student wants larger logits
    discriminator = losses.discriminator_loss(fake, real)
    expected = sum(softplus(x) for x in fake.flatten().tolist()) / 4 + sum(softplus(-x) for x in real.flatten().tolist()) / 4
    assert discriminator.item() == pytest.approx(expected)
    fake_gradient, real_gradient = torch.autograd.grad(discriminator, (fake, real))
    assert (fake_gradient > 0).all() and (real_gradient < 0).all()
    zero = torch.zeros(2, 1)
    assert losses.gan_generator_loss(zero).item() == pytest.approx(0.693147, rel=1e-5)
    assert losses.discriminator_loss(zero, zero).item() == pytest.approx(1.386294, rel=1e-5)


def test_r1_penalty_is_the_mean_squared_change_of_the_logit():
    real, nudged = torch.tensor([[1.0, 2.0]]).requires_grad_(), torch.tensor([[1.5, 0.0]]).requires_grad_()
    loss = losses.r1_penalty(real, nudged)
    assert loss.item() == pytest.approx((0.25 + 4.0) / 2)
    loss.backward()
    assert real.grad.tolist() == [[-0.5, 2.0]] and nudged.grad.tolist() == [[0.5, -2.0]]


def test_discriminator_accuracy_counts_the_right_sides():
    fake, real = torch.tensor([[-1.0, 2.0], [-3.0, -0.1]]), torch.tensor([[1.0, -2.0], [-3.0, -0.1]])
    assert losses.discriminator_accuracy(fake, real).item() == pytest.approx(0.5 * (0.75 + 0.25))
    assert losses.discriminator_accuracy(-torch.ones(2, 1), torch.ones(2, 1)).item() == 1.0


def test_losses_keep_float64():
    x, y = draw(0), draw(1)
    values = (
        losses.kd_loss(x, y),
        losses.fake_score_loss(x, y, SIGMA, space="eps", sigma_data=0.5),
        losses.denoising_loss(x, y, SIGMA, sigma_data=0.5),
        losses.gan_generator_loss(x),
        losses.discriminator_loss(x, y),
    )
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in values)
