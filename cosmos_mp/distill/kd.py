"""Knowledge distillation on pairs: the student's one call from the teacher's noise must land on the teacher's answer."""

from __future__ import annotations

from cosmos_mp.config import DiffusionConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.distill.conditioning import condition_of
from cosmos_mp.distill.losses import kd_loss
from cosmos_mp.distill.method import StepOutput, Term
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.nvtx import nvtx


class KD:
    """One role, `student`, initialised from the teacher."""

    def __init__(self, student: TransferNet, diffusion: DiffusionConfig, seed: int):
        self.networks = {"student": student}
        self.student = Denoiser(student, diffusion)
        self.diffusion, self.seed = diffusion, seed

    def trained(self, iteration: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, iteration: int) -> StepOutput:
        """0.5 MSE to the stored answer from the stored noise."""
        if batch.noise_BCTHW is None:
            raise ValueError("KD needs pairs with their noise; this store holds clips: point pairs to the output of generate_pairs")
        condition = condition_of(batch, self.diffusion, self.seed, iteration)
        with nvtx("student.fwd"):
            x0 = one_step(self.student, batch.noise_BCTHW, condition).x0
        return StepOutput({"kd": Term(kd_loss(x0, batch.latent_BCTHW))})
