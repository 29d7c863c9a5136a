"""The score-difference loss: its formula in noise form, and the fused version under Triton's interpreter against it in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosmos_mp.kernels import using
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss, dmd2_loss_torch, vsd_loss

SIGMA = torch.tensor([0.02, 1.3, 40.0], dtype=torch.float64)
SHAPES = [(3, 2, 4, 3, 5), (1, 1, 1, 1, 1), (2, 3, 2, 7, 11), (1, 2, 2, 47, 89)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt()


def mean_of_clip(error_BT: Tensor) -> Tensor:
    return error_BT.mean(dim=1, keepdim=True)


def case(shape: tuple[int, ...], guided: bool = True) -> tuple[Tensor, Tensor, Outputs, Tensor]:
    """y, x_t, raw outputs and sigma."""
    y, eps, *outputs = (draw(*shape, seed=seed) for seed in range(5))
    sigma = SIGMA.repeat(shape[0])[: shape[0]]
    outputs = Outputs(outputs[0], outputs[1] if guided else None, outputs[2])
    return y, y + sigma[:, None, None, None, None] * eps, outputs, sigma


def in_noise_form(y: Tensor, xt: Tensor, outputs: Outputs, sigma: Tensor, guidance: float) -> Tensor:
    """As the reference writes it: w = sigma / mean|eps - eps_T|, target = y - w (eps_T - eps_S) / sigma, per sample."""
    losses = []
    for b in range(len(y)):
        c_skip, c_out = factors(sigma[b])
        eps = [None if F is None else (xt[b] - (c_skip * xt[b] + c_out * F[b])) / sigma[b] for F in outputs]
        teacher = eps[0] if eps[1] is None else eps[0] + guidance * (eps[0] - eps[1])
        weight = sigma[b] / ((xt[b] - y[b].detach()) / sigma[b] - teacher).abs().mean()
        target = y[b].detach() - weight * (teacher - eps[2]) / sigma[b]
        losses.append(0.5 * ((y[b] - target) ** 2).mean())
    return torch.stack(losses).mean()


# --- The formula ---


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("version", ["torch", "triton"])
def test_it_equals_the_noise_form_with_one_normaliser_per_sample(version, guided):
    y, xt, outputs, sigma = case(SHAPES[0], guided)
    y.requires_grad_()
    expected = in_noise_form(y, xt, outputs, sigma, 5.0)
    with using(version):
        loss, scale = dmd2_loss(y, xt, outputs, *factors(sigma), 5.0, mean_of_clip)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], torch.autograd.grad(expected, y)[0], rtol=1e-8, atol=1e-13)
    assert scale.shape == (3, 1) and not scale.requires_grad


@pytest.mark.parametrize("version", ["torch", "triton"])
def test_a_step_down_goes_from_the_fake_scores_answer_towards_the_teachers(version):
    y, xt, outputs, _ = case(SHAPES[0], False)
    y.requires_grad_()
    # With these factors outputs are clean latents.
    ones = torch.ones(3, dtype=torch.float64)
    with using(version):
        loss, scale = dmd2_loss(y, xt, outputs, 0 * ones, ones, 0.0, mean_of_clip)
    direction = (outputs.fake - outputs.conditional) / scale[:, :, None, None, None]
    torch.testing.assert_close(scale[:, 0], (y - outputs.conditional).abs().mean(dim=(1, 2, 3, 4)).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, 0.5 * direction.pow(2).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], direction / y.numel(), rtol=1e-10, atol=1e-15)


def test_vsd_loss_is_the_distance_to_a_constant_target():
    y, direction = draw(2, 3, seed=0).requires_grad_(), draw(2, 3, seed=1).requires_grad_()
    loss = vsd_loss(y, direction)
    torch.testing.assert_close(loss, 0.5 * direction.pow(2).mean(), rtol=1e-12, atol=0)
    loss.backward()
    torch.testing.assert_close(y.grad, direction.detach() / 6, rtol=1e-12, atol=1e-15)
    assert direction.grad is None


@pytest.mark.parametrize("version", ["torch", "triton"])
def test_nothing_but_the_generated_latent_gets_a_gradient(version):
    y, xt, outputs, sigma = case(SHAPES[0])
    leaves = [x.requires_grad_() for x in (y, xt, *outputs)]
    with using(version):
        loss, _ = dmd2_loss(y, xt, outputs, *factors(sigma), 5.0, mean_of_clip)
    gradients = torch.autograd.grad(3 * loss, leaves, allow_unused=True)
    assert gradients[0].abs().max() > 0 and all(gradient is None for gradient in gradients[1:])
    expected = dmd2_loss_torch(y, xt.detach(), Outputs(*(F.detach() for F in outputs)), *factors(sigma), 5.0, mean_of_clip)[0]
    torch.testing.assert_close(gradients[0], 3 * torch.autograd.grad(expected, y)[0], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("version", ["torch", "triton"])
def test_given_frames_have_no_difference_and_no_error(version):
    y, xt, outputs, sigma = case(SHAPES[0])
    y.requires_grad_()
    given = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)
    seen = []

    def normalise(error_BT: Tensor) -> Tensor:
        seen.append(error_BT)
        return mean_of_clip(error_BT)

    with using(version):
        loss, _ = dmd2_loss(y, xt, outputs, *factors(sigma), 5.0, normalise, given)
    gradient = torch.autograd.grad(loss, y)[0]
    idle = given.bool()[:, None, :, None, None].expand_as(y)
    assert not gradient[idle].any() and gradient[~idle].abs().min() > 0
    # As if both scores had answered with what is there.
    teacher = outputs.conditional + 5.0 * (outputs.conditional - outputs.unconditional)
    c_skip, c_out = (factor[:, None, None, None, None] for factor in factors(sigma))
    x0 = [torch.where(idle, y.detach(), c_skip * xt + c_out * F) for F in (teacher, outputs.fake)]
    torch.testing.assert_close(seen[0], (y.detach() - x0[0]).abs().mean(dim=(1, 3, 4)), rtol=1e-10, atol=1e-14)
    scale = (y.detach() - x0[0]).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(loss, 0.5 * ((x0[1] - x0[0]) / scale).pow(2).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("version", ["torch", "triton"])
def test_the_normaliser_is_the_callers(version):
    y, xt, outputs, sigma = case(SHAPES[0])
    per_frame = draw(3, 4, seed=9).abs() + 0.1
    with using(version):
        whole, scale = dmd2_loss(y, xt, outputs, *factors(sigma), 5.0, mean_of_clip)
        half, _ = dmd2_loss(y, xt, outputs, *factors(sigma), 5.0, lambda error_BT: 2 * mean_of_clip(error_BT))
        uneven, own = dmd2_loss(y.requires_grad_(), xt, outputs, *factors(sigma), 5.0, lambda _: per_frame)
    torch.testing.assert_close(half, whole / 4, rtol=1e-12, atol=0)
    assert torch.equal(own, per_frame)
    c_out = factors(sigma)[1][:, None, None, None, None]
    teacher = outputs.conditional + 5.0 * (outputs.conditional - outputs.unconditional)
    direction = c_out * (outputs.fake - teacher) / per_frame[:, None, :, None, None]
    torch.testing.assert_close(uneven, 0.5 * direction.pow(2).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(uneven, y)[0], direction / y.numel(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("version", ["torch", "triton"])
def test_parts_of_a_clip_together_give_the_whole(version):
    """Cut along T, the normaliser being the mean of the parts': the same loss and gradient as whole."""
    y, xt, outputs, sigma = case(SHAPES[0])
    with using(version):
        loss, scale = dmd2_loss(y.requires_grad_(), xt, outputs, *factors(sigma), 5.0, mean_of_clip)
        whole = torch.autograd.grad(loss, y)[0]
        parts = []
        for part in range(2):
            own = y.detach().chunk(2, dim=2)[part].requires_grad_()
            cut = Outputs(*(F.chunk(2, dim=2)[part] for F in outputs))
            value, _ = dmd2_loss(own, xt.chunk(2, dim=2)[part], cut, *factors(sigma), 5.0, lambda _: scale)
            parts.append((value, torch.autograd.grad(value, own)[0] / 2))
    torch.testing.assert_close(torch.stack([value for value, _ in parts]).mean(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts], dim=2), whole, rtol=1e-10, atol=1e-15)


# --- The kernels ---


@pytest.mark.parametrize("outputs_in", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient_in_other_types_and_sizes(shape, guided, dtype, outputs_in):
    y, xt, outputs, sigma = case(shape, guided)
    y, xt = y.to(dtype), xt.to(dtype)
    outputs = Outputs(*(F if F is None else F.to(outputs_in or dtype) for F in outputs))
    exact = [y.double().requires_grad_(), xt.double(), Outputs(*(F if F is None else F.double() for F in outputs))]
    expected, expected_scale = dmd2_loss_torch(*exact, *factors(sigma), 7.3, mean_of_clip)
    with using("triton"):
        loss, scale = dmd2_loss(y.requires_grad_(), xt, outputs, *factors(sigma.to(dtype)), 7.3, mean_of_clip)
        gradient = torch.autograd.grad(loss, y)[0]
    wanted = torch.autograd.grad(expected, exact[0])[0]
    assert loss.dtype == scale.dtype == gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    torch.testing.assert_close(scale.double(), expected_scale, rtol=TOLERANCE[dtype], atol=0)
    assert (gradient.double() - wanted).abs().max() < TOLERANCE[dtype] * wanted.abs().max()


def test_inputs_need_not_be_contiguous():
    y, xt, outputs, sigma = case((2, 3, 4, 5, 6))
    given = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 0]], dtype=torch.float64).T
    expected = dmd2_loss_torch(y.requires_grad_(), xt, outputs, *factors(sigma), 5.0, mean_of_clip, given)[0]
    gradient = torch.autograd.grad(expected, y)[0]

    def turned(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 3).contiguous().transpose(1, 3)

    own = turned(y).requires_grad_()
    with using("triton"):
        loss, _ = dmd2_loss(own, turned(xt), Outputs(*map(turned, outputs)), *factors(sigma), 5.0, mean_of_clip, given)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, own)[0], gradient, rtol=1e-10, atol=1e-15)


def test_the_gradient_may_be_asked_for_twice():
    y, xt, outputs, sigma = case(SHAPES[0])
    with using("triton"):
        loss, _ = dmd2_loss(y.requires_grad_(), xt, outputs, *factors(sigma), 5.0, mean_of_clip)
        first, second = torch.autograd.grad(loss, y, retain_graph=True)[0], torch.autograd.grad(loss, y)[0]
    assert torch.equal(first, second)
