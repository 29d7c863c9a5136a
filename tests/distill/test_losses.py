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


def vsd_in_noise_form(y: Tensor, eps: Tensor, teacher_eps: Tensor, fake_eps: Tensor) -> Tensor:
    """w = sigma / mean|eps - eps_T| per sample, target = y - w (eps_T - eps_F) / sigma, 0.5 mean((y - target)^2)."""
    weight = SIGMA / (eps - teacher_eps).abs().mean(dim=(1, 2, 3, 4))
    target = y.detach() - weight[:, None, None, None, None] * (teacher_eps - fake_eps) / SIGMA_B
    return 0.5 * ((y - target) ** 2).mean()


def test_vsd_loss_equals_its_noise_form_with_one_normaliser_per_sample():
    y, eps, teacher_eps, fake_eps = draw(0).requires_grad_(), draw(1), draw(2), draw(3)
    expected = vsd_in_noise_form(y, eps, teacher_eps, fake_eps)
    (expected_gradient,) = torch.autograd.grad(expected, y)
    yt = y.detach() + SIGMA_B * eps
    loss = losses.vsd_loss(y, yt - SIGMA_B * teacher_eps, yt - SIGMA_B * fake_eps)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], expected_gradient, rtol=1e-10, atol=1e-14)


def test_vsd_loss_in_clean_form():
    y, teacher_x0, fake_x0 = draw(0).requires_grad_(), draw(1).requires_grad_(), draw(2).requires_grad_()
    loss = losses.vsd_loss(y, teacher_x0, fake_x0)
    scale = (y - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    direction = ((fake_x0 - teacher_x0) / scale).detach()
    torch.testing.assert_close(loss, 0.5 * (direction**2).mean(), rtol=1e-12, atol=0)
    loss.backward()
    # A step down goes from the fake score's answer towards the teacher's.
    torch.testing.assert_close(y.grad, direction / y.numel(), rtol=1e-10, atol=1e-14)
    assert teacher_x0.grad is None and fake_x0.grad is None


def test_vsd_loss_stays_finite_where_the_teacher_agrees_exactly():
    y = draw(0)
    assert losses.vsd_loss(y, y.clone(), y.clone()).item() == 0.0


def test_vsd_weight_is_sigma_over_the_mean_error_in_noise():
    y, eps, teacher_eps = draw(0), draw(1), draw(2)
    teacher_x0 = y + SIGMA_B * eps - SIGMA_B * teacher_eps
    expected = SIGMA / (eps - teacher_eps).abs().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses.vsd_weight(SIGMA, losses.vsd_scale(y, teacher_x0)).flatten(), expected, rtol=1e-10, atol=0)


def test_vsd_scale_is_one_number_per_sample_or_per_chunk_of_frames():
    y, teacher_x0 = (torch.randn(3, 2, 6, 3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    whole = losses.vsd_scale(y, teacher_x0)
    assert whole.shape == (3, 1, 1, 1, 1) and torch.equal(whole, losses.vsd_scale(y, teacher_x0, chunks=1))
    torch.testing.assert_close(whole, (y - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True), rtol=1e-14, atol=0)
    for chunks in (2, 3, 6):
        scale = losses.vsd_scale(y, teacher_x0, chunks)
        assert scale.shape == (3, 1, 6, 1, 1)
        for index, (part, of_y, of_teacher) in enumerate(zip(*(x.chunk(chunks, dim=2) for x in (scale, y, teacher_x0)), strict=True)):
            torch.testing.assert_close(part, losses.vsd_scale(of_y, of_teacher).expand_as(part), rtol=1e-14, atol=0, msg=f"chunk {index}")
        assert scale.flatten(1).std(dim=1).min() > 1e-3  # the chunks differ
        torch.testing.assert_close(scale.mean(dim=2, keepdim=True), whole, rtol=1e-12, atol=0)


def test_vsd_scale_is_never_zero():
    for dtype in (torch.float32, torch.float64):
        y = draw(0).to(dtype)
        for chunks in (1, 2):
            scale = losses.vsd_scale(y, y.clone(), chunks)
            assert scale.dtype == dtype and (scale > 0).all() and (1 / scale).isfinite().all()


def test_vsd_loss_with_a_scale_that_is_given():
    y, teacher_x0, fake_x0 = draw(0).requires_grad_(), draw(1), draw(2)
    own = losses.vsd_scale(y, teacher_x0)
    assert torch.equal(losses.vsd_loss(y, teacher_x0, fake_x0), losses.vsd_loss(y, teacher_x0, fake_x0, own))
    torch.testing.assert_close(losses.vsd_loss(y, teacher_x0, fake_x0, 2 * own), losses.vsd_loss(y, teacher_x0, fake_x0) / 4)
    per_frame = torch.tensor([0.5, 4.0], dtype=torch.float64)[None, None, :, None, None].expand(3, 1, 2, 1, 1).clone().requires_grad_()
    loss = losses.vsd_loss(y, teacher_x0, fake_x0, per_frame)
    direction = (fake_x0 - teacher_x0) / per_frame.detach()
    torch.testing.assert_close(loss, 0.5 * direction.pow(2).mean(), rtol=1e-12, atol=0)
    loss.backward()
    torch.testing.assert_close(y.grad, direction / y.numel(), rtol=1e-10, atol=1e-14)
    assert per_frame.grad is None  # the scale is a constant


def test_vsd_weight_has_the_shape_of_the_scale():
    scale = torch.rand(3, 1, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    weight = losses.vsd_weight(SIGMA, scale)
    assert weight.shape == scale.shape
    for b in range(3):
        for t in range(2):
            assert weight[b, 0, t].item() == pytest.approx(SIGMA[b].item() ** 2 / scale[b, 0, t].item(), rel=1e-14)


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
    x, y, z = draw(0), draw(1), draw(2)
    values = (
        losses.kd_loss(x, y),
        losses.vsd_loss(x, y, z),
        losses.fake_score_loss(x, y, SIGMA, space="eps", sigma_data=0.5),
        losses.denoising_loss(x, y, SIGMA, sigma_data=0.5),
        losses.gan_generator_loss(x),
        losses.discriminator_loss(x, y),
    )
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in values)
