"""Training of a teacher: EDM denoising with text and control dropout."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cosmos_mp.config import DiffusionConfig, TeacherLossConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.edm import Denoiser, bcast
from cosmos_mp.diffusion.schedules import draw_teacher_sigma
from cosmos_mp.distill.conditioning import condition_of, unit_noise
from cosmos_mp.distill.losses import denoising_loss
from cosmos_mp.distill.method import StepOutput, Term
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.nvtx import nvtx
from cosmos_mp.parallel import noise


class TeacherPretraining:
    """One role, `teacher`: predict the clean latent of a clip from its noisy version."""

    def __init__(self, teacher: TransferNet, diffusion: DiffusionConfig, loss: TeacherLossConfig, seed: int):
        self.networks = {"teacher": teacher}
        self.teacher = Denoiser(teacher, diffusion)
        self.diffusion, self.loss, self.seed = diffusion, loss, seed

    def trained(self, iteration: int) -> tuple[str, ...]:
        return ("teacher",)

    def step(self, batch: Batch, iteration: int) -> StepOutput:
        """One denoising loss at a drawn noise level."""
        latent = batch.latent_BCTHW
        sigma = draw_teacher_sigma(self.loss, self.seed, iteration, batch.position_B).to(latent)
        eps = unit_noise(batch, self.seed, "eps", iteration)
        condition = condition_of(batch, self.diffusion, self.seed, iteration)
        condition = replace(
            condition,
            text_BLD=self._drop(condition.text_BLD, "text_dropout", self.loss.text_dropout, batch, iteration),
            control_BCTHW=self._drop(condition.control_BCTHW, "control_dropout", self.loss.control_dropout, batch, iteration),
        )
        with nvtx("teacher.fwd"):
            x0 = self.teacher(latent + bcast(sigma) * eps, sigma, condition).x0
        return StepOutput({"denoising": Term(denoising_loss(x0, latent, sigma, sigma_data=self.diffusion.sigma_data))})

    def _drop(self, x: Tensor, purpose: str, rate: float, batch: Batch, iteration: int) -> Tensor:
        """Zero whole samples at `rate`: zeros are what 'no text' and 'no control' look like to the network."""
        kept = (noise.uniform(self.seed, purpose, iteration, batch.position_B) >= rate).to(x)
        return x * kept.reshape(-1, *[1] * (x.dim() - 1))
