"""DMD2 (arXiv 2405.14867): the student learns from the difference of two scores and from a discriminator on teacher features.

Iteration i trains the student where i % student_update_freq == 0; every other one trains the fake score, which follows the student's
distribution, and the discriminator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosmos_mp.config import DiffusionConfig, DMD2Config, HeadConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.edm import Condition, Denoised, Denoiser, bcast
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.diffusion.schedules import draw_dmd2_sigma
from cosmos_mp.distill import losses
from cosmos_mp.distill.conditioning import condition_of, unit_noise
from cosmos_mp.distill.method import StepOutput, Term
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss
from cosmos_mp.nvtx import nvtx

ADVERSARIAL_ROLES = ("fake_score", "discriminator")


@dataclass(frozen=True)
class Draws:
    """Everything random in one step.

    Attributes:
        epsilon: unit noise from which the student generates.
        eps: noise added to the generated latent.
        eps_real: noise added to the real latent, at the same level.
        sigma_B: noise level per sample.
    """

    epsilon: Tensor
    eps: Tensor
    eps_real: Tensor
    sigma_B: Tensor


@dataclass(frozen=True)
class Scores:
    """What the student's step saw: generated latent, the teacher with text and without, the fake score, normaliser, logits (B, heads)."""

    y: Tensor
    teacher: Denoised | None
    unconditional: Denoised | None
    fake_score: Denoised | None
    scale: Tensor | None
    fake_logits: Tensor | None


class Logits(NamedTuple):
    """The discriminator's logits (B, heads) on generated and on real latents."""

    fake: Tensor
    real: Tensor


class DMD2:
    """Roles `student`, `teacher` (frozen), and as the options need them `fake_score` and `discriminator`.

    Args:
        networks: by role; `fake_score` is absent under LADD, `discriminator` where the GAN weight is 0.
        unconditional_LD: text embedding of the unconditional branch: the negative prompt, or zeros.
        across: adds a tensor up over the holders of a clip's parts, where clips are cut.
        reference_cp: 0, or the context-parallel size N whose published behaviour is wanted: VSD normalised per N-th of a clip, and the
            gradient of the generator's GAN term divided by N.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        diffusion: DiffusionConfig,
        config: DMD2Config,
        head: HeadConfig,
        unconditional_LD: Tensor,
        seed: int,
        across: Callable[[Tensor], Tensor] | None = None,
        reference_cp: int = 0,
    ):
        self.networks = networks
        self.student = Denoiser(networks["student"], diffusion)
        self.teacher = Denoiser(networks["teacher"], diffusion)
        self.fake_score = Denoiser(networks["fake_score"], diffusion) if "fake_score" in networks else None
        self.discriminator = networks.get("discriminator")
        self.diffusion, self.config, self.feature_blocks = diffusion, config, head.feature_blocks
        self.unconditional_LD, self.seed = unconditional_LD, seed
        self.across, self.reference_cp = across, reference_cp

    # --- Phases ---

    def trained(self, iteration: int) -> tuple[str, ...]:
        config = self.config
        if iteration < config.reconstruction_warmup:
            return ("student",)
        critics = tuple(role for role in ADVERSARIAL_ROLES if role in self.networks)
        if iteration < config.reconstruction_warmup + config.critic_warmup:
            return critics
        return ("student",) if iteration % config.student_update_freq == 0 else critics

    def step(self, batch: Batch, iteration: int) -> StepOutput:
        draws = self.draw(batch, iteration)
        condition = condition_of(batch, self.diffusion, self.seed, iteration)
        if "student" not in self.trained(iteration):
            return self.critic_step(batch.latent_BCTHW, draws, condition)[0]
        if iteration < self.config.reconstruction_warmup:
            y = self._generate(draws, condition)
            return StepOutput({"reconstruction": Term((y - batch.latent_BCTHW).pow(2).mean())})
        return self.student_step(batch.latent_BCTHW, draws, condition, batch.parts)[0]

    def draw(self, batch: Batch, iteration: int) -> Draws:
        """The step's noises and levels, functions of (seed, iteration, sample)."""
        sigma = draw_dmd2_sigma(self.diffusion, self.seed, iteration, batch.position_B).to(batch.latent_BCTHW)
        return Draws(*(unit_noise(batch, self.seed, purpose, iteration) for purpose in ("epsilon", "eps", "eps_real")), sigma)

    # --- Student ---

    def student_step(self, real: Tensor, draws: Draws, condition: Condition, parts: int = 1) -> tuple[StepOutput, Scores]:
        """VSD + gan_weight * GAN + reconstruction_weight * MSE to the real latent; gradient reaches the student alone.

        Args:
            parts: into how many parts along T the clips are cut; `real` holds one of them.
        """
        config, sigma = self.config, draws.sigma_B
        y = self._generate(draws, condition)
        yt = y + bcast(sigma) * draws.eps
        judged = self.discriminator is not None
        teacher, without_text, fake, scale, logits = None, None, None, None, None
        terms: dict[str, Term] = {}
        metrics: dict[str, Tensor] = {}
        if not config.ladd:
            # Only the way to the last feature belongs to the graph; the scores enter the loss as constants.
            with nvtx("teacher.cond.fwd"):
                teacher = self._score(self.teacher, yt, sigma, condition, judged and config.feature_role == "teacher")
            with nvtx("fake_score.fwd"):
                fake = self._score(self.fake_score, yt, sigma, condition, judged and config.feature_role == "fake_score")
            if config.guidance != 0:
                text = self.unconditional_LD.to(condition.text_BLD).expand_as(condition.text_BLD)
                with nvtx("teacher.uncond.fwd"):
                    without_text = self._score(self.teacher, yt, sigma, condition.with_text(text), False)
            outputs = Outputs(teacher.out, None if without_text is None else without_text.out, fake.out)
            normalise, given = partial(self._normaliser, parts=parts), condition.given and condition.given.mask_BT
            with nvtx("loss.dmd2"):
                loss, scale = dmd2_loss(y, yt, outputs, teacher.factors.c_skip, teacher.factors.c_out, config.guidance, normalise, given)
            terms["vsd"] = Term(loss)
            metrics["vsd_weight"] = losses.vsd_weight(sigma, scale.mean(dim=1)).mean()
        if judged:
            source = {"teacher": teacher, "fake_score": fake}[config.feature_role] or self._features(yt, sigma, condition)
            with nvtx("gan.head"):
                logits = self.discriminator(source.features)
            terms["gan"] = Term(losses.gan_generator_loss(logits), config.gan_weight / max(1, self.reference_cp))
        if config.reconstruction_weight > 0:
            terms["reconstruction"] = Term((y - real).pow(2).mean(), config.reconstruction_weight)
        metrics["student_std"] = self._std(y.detach(), parts)
        return StepOutput(terms, metrics), Scores(y, teacher, without_text, fake, scale, logits)

    def _generate(self, draws: Draws, condition: Condition) -> Tensor:
        """The student's clean latent, by its one call."""
        with nvtx("student.fwd"):
            return one_step(self.student, draws.epsilon, condition).x0

    def _normaliser(self, error_BT: Tensor, parts: int) -> Tensor:
        """Of each frame's mean error, the mean over the whole clip, wherever its frames are, (B, 1); or, as published, over each N-th of
        it, (B, T). Never 0."""
        if self.reference_cp:
            chunks = error_BT.unflatten(1, (self.reference_cp // parts, -1))
            scale = chunks.mean(dim=2, keepdim=True).expand_as(chunks).flatten(1)
        else:
            scale = error_BT.mean(dim=1, keepdim=True)
            scale = scale if self.across is None else self.across(scale) / parts
        return scale.clamp_min(torch.finfo(scale.dtype).tiny)

    def _std(self, y: Tensor, parts: int) -> Tensor:
        """Standard deviation within each whole clip, and its mean over the clips."""
        moments = torch.stack([y.flatten(1).mean(dim=1), y.pow(2).flatten(1).mean(dim=1)])
        mean, square = moments if self.across is None else self.across(moments) / parts
        return (square - mean.pow(2)).clamp(min=0).sqrt().mean()

    def _score(self, network: Denoiser, yt: Tensor, sigma: Tensor, condition: Condition, with_features: bool) -> Denoised:
        if with_features:
            return network(yt, sigma, condition, feature_blocks=self.feature_blocks, tail="detached")
        with torch.no_grad():
            return network(yt, sigma, condition)

    def _features(self, xt: Tensor, sigma: Tensor, condition: Condition) -> Denoised:
        """Features alone, from the network that the discriminator reads."""
        network = self.teacher if self.config.feature_role == "teacher" else self.fake_score
        with nvtx(f"{self.config.feature_role}.early.fwd"):
            return network(xt, sigma, condition, feature_blocks=self.feature_blocks, tail="none")

    # --- Fake score and discriminator ---

    def critic_step(self, real: Tensor, draws: Draws, condition: Condition) -> tuple[StepOutput, Logits | None]:
        """Fake-score denoising loss on the student's samples, and the discriminator's loss on features of fake and real latents."""
        config, sigma = self.config, draws.sigma_B
        terms: dict[str, Term] = {}
        metrics: dict[str, Tensor] = {}
        logits = None
        with torch.no_grad():
            y = self._generate(draws, condition)
            yt = y + bcast(sigma) * draws.eps
        if self.fake_score is not None:
            with nvtx("fake_score.fwd"):
                x0 = self.fake_score(yt, sigma, condition).x0
            loss = losses.fake_score_loss(y, x0, sigma, space=config.fake_score_space, sigma_data=self.diffusion.sigma_data)
            terms["fake_score"] = Term(loss)
        if self.discriminator is not None:
            with torch.no_grad():
                real_t = real + bcast(sigma) * draws.eps_real
                fake_features = self._features(yt, sigma, condition).features
                real_features = self._features(real_t, sigma, condition).features
            judged = [fake_features, real_features]
            if config.r1_weight > 0:
                with torch.no_grad():
                    judged.append(self._features(real_t + config.r1_sigma * draws.eps, sigma, condition).features)
            # One call for all: its norms are per sample, and sharded weights are gathered and reduced once.
            with nvtx("gan.head"):
                fake, real, *nudged = self.discriminator([torch.cat(features) for features in zip(*judged, strict=True)]).chunk(len(judged))
            logits = Logits(fake, real)
            terms["discriminator"] = Term(losses.discriminator_loss(*logits))
            fake_logits, real_logits = (value.detach() for value in logits)
            metrics["discriminator_accuracy"] = losses.discriminator_accuracy(fake_logits, real_logits)
            metrics["fake_logit"], metrics["real_logit"] = fake_logits.mean(), real_logits.mean()
            if nudged:
                terms["r1"] = Term(losses.r1_penalty(logits.real, nudged[0]), config.r1_weight)
        return StepOutput(terms, metrics), logits
