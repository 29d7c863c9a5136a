"""DMD2 on a tiny network: phases, who learns from what, and every term against a slow calculation of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_mp.config import DiffusionConfig, DMD2Config, HeadConfig
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.schedules import draw_dmd2_sigma
from cosmos_mp.distill.conditioning import condition_of
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.distill.method import StepOutput

DIFFUSION = DiffusionConfig(condition_frames=2)
HEAD = HeadConfig("conv3d", 8, (0, 1))
STUDENT, CRITIC = 10, 11
"""An iteration of each phase."""


@pytest.fixture
def make_method(make_network, make_discriminator, unconditional):
    """DMD2 over differing random networks; `without` leaves roles out."""

    def make(
        head: HeadConfig = HEAD, *, without: tuple[str, ...] = (), text: Tensor | None = None, across=None, reference_cp=0, **options
    ) -> DMD2:
        networks: dict[str, nn.Module] = {role: make_network(seed=i) for i, role in enumerate(("student", "teacher", "fake_score"))}
        networks["discriminator"] = make_discriminator(head)
        for role in without:
            del networks[role]
        text = unconditional if text is None else text
        return DMD2(networks, DIFFUSION, DMD2Config(**options), head, text, 3, across, reference_cp)

    return make


def run(method: DMD2, batch, iteration: int) -> StepOutput:
    """One step as the loop takes it: exactly the trained roles require gradients."""
    for role, network in method.networks.items():
        network.requires_grad_(role in method.trained(iteration))
    return method.step(batch, iteration)


def total(output: StepOutput) -> Tensor:
    return sum(term.weight * term.value for term in output.terms.values())


def values(output: StepOutput) -> dict[str, float]:
    return {name: term.value.item() for name, term in output.terms.items()}


def wide(x_B: Tensor) -> Tensor:
    return x_B.reshape(-1, 1, 1, 1, 1)


def with_gradient(method: DMD2) -> set[str]:
    return {role for role, network in method.networks.items() if any(p.grad is not None for p in network.parameters())}


# --- Phases ---


def phases(method: DMD2, count: int) -> str:
    """One letter per iteration: s(tudent) or c(ritics)."""
    letters = {("student",): "s", ("fake_score", "discriminator"): "c", ("discriminator",): "d", ("fake_score",): "f"}
    return "".join(letters[method.trained(i)] for i in range(count))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "sccccsccccsc"),
        ({"student_update_freq": 3}, "sccsccsccscc"),
        ({"critic_warmup": 6}, "ccccccccccsc"),
        ({"reconstruction_warmup": 3}, "sssccsccccsc"),
        ({"reconstruction_warmup": 2, "critic_warmup": 4}, "ssccccccccsc"),
    ],
)
def test_phase_schedule(make_method, options, expected):
    assert phases(make_method(**options), 12) == expected


def test_phases_of_a_run_without_a_role(make_method):
    assert phases(make_method(without=("fake_score",), ladd=True), 6) == "sdddds"
    assert phases(make_method(without=("discriminator",), gan_weight=0.0), 6) == "sffffs"


@pytest.mark.parametrize(
    ("options", "iteration", "terms"),
    [
        ({}, STUDENT, {"vsd": 1.0, "gan": 1e-3}),
        ({"gan_weight": 0.3, "reconstruction_weight": 0.2}, STUDENT, {"vsd": 1.0, "gan": 0.3, "reconstruction": 0.2}),
        ({}, CRITIC, {"fake_score": 1.0, "discriminator": 1.0}),
        ({"r1_weight": 7.0}, CRITIC, {"fake_score": 1.0, "discriminator": 1.0, "r1": 7.0}),
        ({"without": ("discriminator",), "gan_weight": 0.0}, STUDENT, {"vsd": 1.0}),
        ({"without": ("discriminator",), "gan_weight": 0.0}, CRITIC, {"fake_score": 1.0}),
        ({"without": ("fake_score",), "ladd": True}, STUDENT, {"gan": 1e-3}),
        ({"without": ("fake_score",), "ladd": True}, CRITIC, {"discriminator": 1.0}),
        ({"reconstruction_warmup": 12}, CRITIC, {"reconstruction": 1.0}),
        ({"critic_warmup": 12}, STUDENT, {"fake_score": 1.0, "discriminator": 1.0}),
    ],
)
def test_terms_and_weights_of_each_phase(make_method, make_batch, options, iteration, terms):
    output = run(make_method(**options), make_batch(), iteration)
    assert {name: term.weight for name, term in output.terms.items()} == terms
    assert not any(value.requires_grad for value in output.metrics.values())
    assert all(term.value.isfinite() and term.value.dim() == 0 for term in output.terms.values())


@pytest.mark.parametrize(("iteration", "roles"), [(STUDENT, {"student"}), (CRITIC, {"fake_score", "discriminator"})])
@pytest.mark.parametrize("feature_role", ["teacher", "fake_score"])
def test_only_the_trained_roles_get_a_gradient(make_method, make_batch, iteration, roles, feature_role):
    method = make_method(feature_role=feature_role, r1_weight=1.0, reconstruction_weight=1.0)
    total(run(method, make_batch(), iteration)).backward()
    assert with_gradient(method) == roles
    for role in roles:
        idle = {name for name, p in method.networks[role].named_parameters() if p.grad is None or not p.grad.any()}
        assert all(name.startswith("control.final.") for name in idle)  # the layer that the reference carries unused


@pytest.mark.parametrize("feature_role", ["teacher", "fake_score"])
def test_a_critic_step_never_reaches_student_or_teacher(make_method, make_batch, feature_role):
    method = make_method(feature_role=feature_role, r1_weight=1.0)
    for network in method.networks.values():
        network.requires_grad_(True)
    total(method.step(make_batch(), CRITIC)).backward()
    assert with_gradient(method) == {"fake_score", "discriminator"}


def test_the_discriminator_loss_does_not_train_its_features(make_method, make_batch):
    method = make_method(feature_role="fake_score")
    run(method, make_batch(), CRITIC).terms["discriminator"].value.backward()
    assert with_gradient(method) == {"discriminator"}


# --- Student ---


def student_terms(method: DMD2, batch, iteration: int) -> dict[str, Tensor]:
    """vsd (noise form), gan and reconstruction with full graphs, from the paper's formulas."""
    networks, config = method.networks, method.config
    student, teacher, fake_score = (Denoiser(networks[role], DIFFUSION) for role in ("student", "teacher", "fake_score"))
    draws, condition = method.draw(batch, iteration), condition_of(batch, DIFFUSION, method.seed, iteration)
    negative = condition.with_text(method.unconditional_LD.expand_as(batch.text_BLD))
    sigma = draws.sigma_B
    y = student(80 * draws.epsilon, torch.full_like(sigma, 80), condition).x0
    yt = y + wide(sigma) * draws.eps
    conditional = teacher(yt, sigma, condition, feature_blocks=method.feature_blocks)
    fake = fake_score(yt, sigma, condition, feature_blocks=method.feature_blocks)
    guided = conditional.eps + config.guidance * (conditional.eps - teacher(yt, sigma, negative).eps)
    weight = sigma / (draws.eps - guided).abs().mean(dim=(1, 2, 3, 4))
    target = (y - wide(weight) * (guided - fake.eps) / wide(sigma)).detach()
    source = {"teacher": conditional, "fake_score": fake}[config.feature_role]
    logits = networks["discriminator"](source.features)
    return {
        "vsd": 0.5 * ((y - target) ** 2).mean(),
        "gan": F.softplus(-logits).mean(),
        "reconstruction": ((y - batch.latent_BCTHW) ** 2).mean(),
    }


@pytest.mark.parametrize("feature_role", ["teacher", "fake_score"])
def test_student_terms_and_their_gradients(make_method, make_batch, feature_role):
    method = make_method(guidance=2.0, feature_role=feature_role, reconstruction_weight=0.5)
    batch = make_batch(range(3))
    output = run(method, batch, STUDENT)
    expected = student_terms(method, batch, STUDENT)
    parameters = [p for name, p in method.networks["student"].named_parameters() if not name.startswith("control.final.")]
    for name, term in output.terms.items():
        torch.testing.assert_close(term.value, expected[name], rtol=1e-7, atol=0)
        got = torch.autograd.grad(term.value, parameters, retain_graph=True)
        wanted = torch.autograd.grad(expected[name], parameters, retain_graph=True)
        largest = max(x.abs().max() for x in wanted)
        assert largest > 1e-8
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * largest.item())


def listen(network: nn.Module, log: list) -> None:
    """Record (text, c_noise, x, blocks run with a graph, blocks run) of every call of a network."""
    running: list[bool] = []
    for block in network.base.blocks:
        block.register_forward_hook(lambda _, args, out: running.append(out.requires_grad))

    def end(_, args, out):
        call = args[0]
        log.append((call.text_BLD, call.timestep_B, call.x_BCTHW, sum(running), len(running)))
        running.clear()

    network.register_forward_hook(end)


def test_scores_are_asked_with_the_prompt_and_the_negative_prompt(make_method, make_batch, unconditional):
    method, batch, teacher, fake = make_method(), make_batch(), [], []
    listen(method.networks["teacher"], teacher)
    listen(method.networks["fake_score"], fake)
    run(method, batch, STUDENT)
    assert len(teacher) == 2 and len(fake) == 1
    assert torch.equal(teacher[0][0], batch.text_BLD) and torch.equal(fake[0][0], batch.text_BLD)
    assert torch.equal(teacher[1][0], unconditional.expand(2, -1, -1))
    sigma = method.draw(batch, STUDENT).sigma_B
    for call in (*teacher, *fake):
        torch.testing.assert_close(call[1], sigma.log() / 4)


def test_the_negative_prompt_moves_the_vsd_loss_and_nothing_else(make_method, make_batch, unconditional):
    first, second = (values(run(make_method(text=text), make_batch(), STUDENT)) for text in (unconditional, unconditional.flip(0) * 2))
    assert first["vsd"] != pytest.approx(second["vsd"], rel=1e-4)
    assert first["gan"] == second["gan"]


def guided_x0(scores) -> Tensor:
    """By the default guidance."""
    conditional, unconditional = scores.teacher.x0.detach(), scores.unconditional.x0.detach()
    return conditional + 5.0 * (conditional - unconditional)


def chunked_vsd(scores, chunks: int) -> tuple[Tensor, Tensor]:
    """VSD with one normaliser per sample and chunk of frames, and the mean of its weights over sigma^2, slowly."""
    losses, inverses = [], []
    for b in range(len(scores.y)):
        parts = [x[b].detach().chunk(chunks, dim=1) for x in (scores.y, guided_x0(scores), scores.fake_score.x0)]
        for y, guided, fake in zip(*parts, strict=True):
            scale = (y - guided).abs().mean()
            # Given frames agree exactly: a chunk of nothing else has no scale, and nothing to learn.
            losses.append(0.5 * ((fake - guided) / scale).pow(2).mean() if scale > 0 else scale)
            inverses.append(1 / scale)
    return torch.stack(losses).mean(), torch.stack(inverses).reshape(len(scores.y), -1)


@pytest.mark.parametrize("published", [1, 2, 4])
def test_as_published_at_a_context_parallel_size(make_method, make_batch, published):
    batch = make_batch(range(3))
    plain = run(make_method(gan_weight=0.3, reconstruction_weight=0.2), batch, STUDENT)
    method = make_method(gan_weight=0.3, reconstruction_weight=0.2, reference_cp=published)
    output = run(method, batch, STUDENT)
    # The GAN's gradient is divided, not its value; the reconstruction stays; VSD is normalised per N-th of a clip.
    assert output.terms["gan"].value.item() == plain.terms["gan"].value.item()
    assert {name: term.weight for name, term in output.terms.items()} == {"vsd": 1.0, "gan": 0.3 / published, "reconstruction": 0.2}
    assert output.terms["reconstruction"].value.item() == plain.terms["reconstruction"].value.item()
    draws, condition = method.draw(batch, STUDENT), condition_of(batch, DIFFUSION, 3, STUDENT)
    again, scores = method.student_step(batch.latent_BCTHW, draws, condition)
    vsd, inverses = chunked_vsd(scores, published)
    for value in (output.terms["vsd"].value, again.terms["vsd"].value):
        torch.testing.assert_close(value, vsd, rtol=1e-9, atol=0)
    # The weight is reported over the mean of the chunks' normalisers: one of given frames alone has none.
    torch.testing.assert_close(again.metrics["vsd_weight"], (draws.sigma_B**2 / (1 / inverses).mean(dim=1)).mean(), rtol=1e-9, atol=0)
    assert inverses.isfinite().all() == (published < 4)  # up to two of four frames are given
    assert (published == 1) is (output.terms["vsd"].value.item() == pytest.approx(plain.terms["vsd"].value.item(), rel=1e-6))


def test_the_critics_are_not_scaled(make_method, make_batch):
    options = {"r1_weight": 0.7, "gan_weight": 0.3}
    plain, published = (run(make_method(reference_cp=n, **options), make_batch(), CRITIC) for n in (0, 4))
    assert values(plain) == values(published)
    assert {name: term.weight for name, term in published.terms.items()} == {"fake_score": 1.0, "discriminator": 1.0, "r1": 0.7}


def test_the_normaliser_of_a_cut_clip_is_the_mean_over_its_parts(make_method, make_batch):
    half, asked = make_batch(range(3)).cut(0, 2), []

    def across(scale: Tensor) -> Tensor:
        asked.append(scale)
        return 2 * scale  # the other part's is the same

    alone, together = make_method(), make_method(across=across)
    draws, condition = alone.draw(half, STUDENT), condition_of(half, DIFFUSION, 3, STUDENT)
    expected, scores = alone.student_step(half.latent_BCTHW, draws, condition)
    output = run(together, half, STUDENT)  # the step knows into how many parts its batch is cut
    assert values(output) == pytest.approx(values(expected), rel=1e-12)
    assert output.metrics["vsd_weight"].item() == pytest.approx(expected.metrics["vsd_weight"].item(), rel=1e-12)
    scale, moments = asked
    assert output.metrics["student_std"].item() == pytest.approx(expected.metrics["student_std"].item(), rel=1e-9)
    torch.testing.assert_close(moments, torch.stack([scores.y.mean(dim=(1, 2, 3, 4)), scores.y.pow(2).mean(dim=(1, 2, 3, 4))]).detach())
    torch.testing.assert_close(scale, (scores.y - guided_x0(scores)).abs().mean(dim=(2, 3, 4)).mean(dim=1, keepdim=True).detach())
    assert not scale.requires_grad
    # With a part that says three times as much the mean is twice this one's, and the loss a quarter.
    larger = run(make_method(across=lambda scale: 4 * scale), half, STUDENT)
    assert values(larger)["vsd"] == pytest.approx(values(expected)["vsd"] / 4, rel=1e-12)
    assert values(larger)["gan"] == values(expected)["gan"]


def test_the_normaliser_is_never_zero(make_method, make_batch):
    """Where all frames are given both scores agree with the student, and there is nothing to learn."""
    method, batch = make_method(), make_batch()
    draws, condition = method.draw(batch, STUDENT), condition_of(batch, DIFFUSION, 3, STUDENT)
    given = dataclasses.replace(condition.given, mask_BT=torch.ones_like(condition.given.mask_BT))
    output, scores = method.student_step(batch.latent_BCTHW, draws, dataclasses.replace(condition, given=given))
    assert output.terms["vsd"].value.item() == 0.0 and (scores.scale > 0).all() and (1 / scores.scale).isfinite().all()


@pytest.mark.parametrize("published", [2, 4])
def test_published_chunks_are_counted_in_whole_clips(make_method, make_batch, published):
    half = make_batch(range(3)).cut(1, 2)

    def across(moments: Tensor) -> Tensor:
        assert moments.shape == (2, 3), "a chunk lies on one holder: only what is reported goes across"
        return 2 * moments

    method = make_method(across=across, reference_cp=published)
    for network in method.networks.values():
        for module in network.modules():
            if hasattr(module, "part"):
                module.part = 1
    draws, condition = method.draw(half, STUDENT), condition_of(half, DIFFUSION, 3, STUDENT)
    output, scores = method.student_step(half.latent_BCTHW, draws, condition, half.parts)
    torch.testing.assert_close(output.terms["vsd"].value, chunked_vsd(scores, published // 2)[0], rtol=1e-9, atol=0)


def test_without_guidance_the_negative_prompt_is_never_asked(make_method, make_batch):
    method, teacher = make_method(guidance=0.0), []
    listen(method.networks["teacher"], teacher)
    output = run(method, make_batch(), STUDENT)
    assert len(teacher) == 1
    assert output.terms["vsd"].value.item() == pytest.approx(student_terms(method, make_batch(), STUDENT)["vsd"].item())


@pytest.mark.parametrize("role", ["teacher", "fake_score"])
def test_the_graph_through_a_score_ends_at_the_last_feature(make_method, make_batch, role):
    method, teacher, fake = make_method(feature_role=role), [], []
    listen(method.networks["teacher"], teacher)
    listen(method.networks["fake_score"], fake)
    output = run(method, make_batch(), STUDENT)
    graphs = {"teacher": [call[3] for call in teacher], "fake_score": [call[3] for call in fake]}
    assert graphs == ({"teacher": [2, 0], "fake_score": [0]} if role == "teacher" else {"teacher": [0, 0], "fake_score": [2]})
    assert {call[4] for call in (*teacher, *fake)} == {3}
    output.terms["gan"].value.backward()
    assert all(p.grad is not None for p in method.networks["student"].base.parameters())


def test_ladd_asks_the_teacher_for_features_alone(make_method, make_batch):
    method, teacher = make_method(without=("fake_score",), ladd=True), []
    method.networks["teacher"].base.blocks[2].register_forward_hook(lambda *_: teacher.append("too far"))
    output = run(method, make_batch(), STUDENT)
    assert not teacher
    full = values(run(make_method(), make_batch(), STUDENT))
    assert values(output) == {"gan": pytest.approx(full["gan"])}
    total(output).backward()
    assert with_gradient(method) == {"student"}


def test_reconstruction_warm_up_compares_with_the_real_latent(make_method, make_batch):
    method, batch = make_method(reconstruction_warmup=20), make_batch()
    output = run(method, batch, CRITIC)
    y = Denoiser(method.networks["student"], DIFFUSION)(
        80 * method.draw(batch, CRITIC).epsilon, torch.full((2,), 80.0).double(), condition_of(batch, DIFFUSION, 3, CRITIC)
    ).x0
    assert values(output) == {"reconstruction": pytest.approx(((y - batch.latent_BCTHW) ** 2).mean().item())}
    total(output).backward()
    assert with_gradient(method) == {"student"}


# --- Critics ---


def critic_terms(method: DMD2, batch, iteration: int) -> dict[str, float]:
    """fake_score, discriminator and r1 from the paper's formulas."""
    networks, config = method.networks, method.config
    student, teacher, fake_score = (Denoiser(networks[role], DIFFUSION) for role in ("student", "teacher", "fake_score"))
    judge = {"teacher": teacher, "fake_score": fake_score}[config.feature_role]
    draws, condition = method.draw(batch, iteration), condition_of(batch, DIFFUSION, method.seed, iteration)
    sigma = draws.sigma_B
    y = student(80 * draws.epsilon, torch.full_like(sigma, 80), condition).x0
    yt, real_t = y + wide(sigma) * draws.eps, batch.latent_BCTHW + wide(sigma) * draws.eps_real

    def logits(x: Tensor) -> Tensor:
        return networks["discriminator"](judge(x, sigma, condition, feature_blocks=method.feature_blocks).features)

    fake, real, nudged = logits(yt), logits(real_t), logits(real_t + config.r1_sigma * draws.eps)
    fake_eps = fake_score(yt, sigma, condition).eps
    weight = 1.0 if config.fake_score_space == "eps" else (wide(sigma) ** 2 + 0.25) / 0.25
    return {
        "fake_score": (weight * (draws.eps - fake_eps) ** 2).mean().item(),
        "discriminator": (F.softplus(fake).mean() + F.softplus(-real).mean()).item(),
        "r1": ((real - nudged) ** 2).mean().item(),
        "accuracy": 0.5 * ((fake < 0).double().mean() + (real > 0).double().mean()).item(),
        "fake_logit": fake.mean().item(),
        "real_logit": real.mean().item(),
    }


@pytest.mark.parametrize("space", ["eps", "network"])
@pytest.mark.parametrize("feature_role", ["teacher", "fake_score"])
def test_critic_terms(make_method, make_batch, space, feature_role):
    method = make_method(fake_score_space=space, feature_role=feature_role, r1_weight=1.0, r1_sigma=20.0)
    batch = make_batch(range(3))
    output, expected = run(method, batch, CRITIC), critic_terms(method, batch, CRITIC)
    for name, value in values(output).items():
        assert value == pytest.approx(expected[name], rel=1e-7), name
    assert output.metrics["discriminator_accuracy"].item() == pytest.approx(expected["accuracy"])
    for name in ("fake_logit", "real_logit"):
        assert output.metrics[name].item() == pytest.approx(expected[name])
    assert expected["r1"] > 1e-6


@pytest.mark.parametrize(("r1_weight", "judged"), [(0.0, 2), (1.0, 3)])
def test_the_discriminator_is_called_once_per_critic_step(make_method, make_batch, r1_weight, judged):
    # Sharded weights are gathered and their gradients reduced once; the order is fake, real, nudged.
    method, batch, calls = make_method(r1_weight=r1_weight, r1_sigma=2.0), make_batch(range(3)), []
    method.networks["discriminator"].register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    output = run(method, batch, CRITIC)
    ((features, logits),) = calls
    assert [len(feature) for feature in features] == [3 * judged] * 2 and logits.shape == (3 * judged, 2)
    fake, real, *nudged = logits.chunk(judged)
    assert output.metrics["fake_logit"].item() == pytest.approx(fake.mean().item())
    assert output.metrics["real_logit"].item() == pytest.approx(real.mean().item())
    assert len(nudged) == judged - 2 and ("r1" in output.terms) is bool(nudged)
    calls.clear()
    run(method, batch, STUDENT)
    assert len(calls) == 1


def test_real_and_fake_are_judged_at_one_level_under_the_prompt_with_noises_of_their_own(make_method, make_batch):
    method, batch, teacher = make_method(), make_batch(), []
    listen(method.networks["teacher"], teacher)
    run(method, batch, CRITIC)
    draws = method.draw(batch, CRITIC)
    (fake_call, real_call) = teacher
    assert torch.equal(fake_call[1], real_call[1]) and torch.equal(fake_call[0], real_call[0])
    assert {call[4] for call in teacher} == {2}  # features alone: nothing runs after the last feature block
    mask = condition_of(batch, DIFFUSION, 3, CRITIC).given.mask_BT[:, None, :, None, None]
    c_in = (draws.sigma_B**2 + 0.25).rsqrt()
    expected = wide(c_in) * (batch.latent_BCTHW + wide(draws.sigma_B) * draws.eps_real)
    torch.testing.assert_close(real_call[2] * (1 - mask), expected * (1 - mask))


# --- Randomness ---


def test_the_three_noises_are_unrelated_and_the_level_is_the_drawn_one(make_method, make_batch):
    method, batch = make_method(), make_batch(range(24))
    draws = method.draw(batch, 7)
    assert torch.equal(draws.sigma_B, draw_dmd2_sigma(DIFFUSION, 3, 7, batch.position_B))
    streams = torch.stack([x.flatten() for x in (draws.epsilon, draws.eps, draws.eps_real)])
    given = condition_of(batch, DIFFUSION, 3, 7).given.noise_BCTHW.flatten()[None]
    assert (torch.corrcoef(torch.cat([streams, given])) - torch.eye(4).double()).abs().max() < 0.06
    other = method.draw(batch, 8)
    assert all(not torch.allclose(getattr(draws, f.name), getattr(other, f.name)) for f in dataclasses.fields(draws))


@pytest.mark.parametrize("iteration", [STUDENT, CRITIC])
def test_micro_batches_do_not_change_any_term(make_method, make_batch, iteration):
    method = make_method(reconstruction_weight=1.0, r1_weight=1.0)
    whole = values(run(method, make_batch([4, 1, 7, 2]), iteration))
    halves = [values(run(method, make_batch(part), iteration)) for part in ([4, 1], [7, 2])]
    for name, value in whole.items():
        assert (halves[0][name] + halves[1][name]) / 2 == pytest.approx(value, rel=1e-9), name
        assert halves[0][name] != pytest.approx(halves[1][name], rel=1e-9), name
