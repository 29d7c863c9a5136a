"""What an iteration's seconds mean: tokens, model FLOPs by the formula of `plan.cost`, and their share of a named peak (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cosmos_mp.config import DMD2Run, KDRun, TeacherRun
from cosmos_mp.plan.cost import model_work, tokens_of

PEAKS = {"H100": 989.0, "H200": 989.0, "B200": 2250.0}
"""Dense bfloat16 TFLOP/s by a word of the device's name, for SXM boards."""
SLOWER = {"PCIe", "NVL", "MIG"}
"""Words of boards and parts of the same names that do less."""


@dataclass(frozen=True)
class Speed:
    """Speed of a run's iterations.

    Attributes:
        text_tokens: length of the captions in its store.
        ranks: processes that share the work.
        device: name of what each of them computes on.
    """

    config: TeacherRun | KDRun | DMD2Run
    text_tokens: int
    ranks: int
    device: str

    @property
    def peak_tflops(self) -> float | None:
        """Dense bfloat16 TFLOP/s of the device, None where unknown."""
        words = set(self.device.split())
        return None if words & SLOWER else next((peak for name, peak in PEAKS.items() if name in words), None)

    @property
    def peak(self) -> str:
        """The same in words."""
        peak = self.peak_tflops
        return f"no peak known for {self.device}" if peak is None else f"{peak:g} TFLOP/s, {self.device}, dense bfloat16"

    def of(self, iteration: int, roles: Sequence[str], seconds: float) -> dict[str, float]:
        """tokens_per_second of all ranks, tflops of one, and mfu in 0..1 where the peak is known."""
        samples, peak = self.config.train.global_batch_size, self.peak_tflops
        tflops = samples * model_work(self.config, iteration, roles, self.text_tokens) / seconds / self.ranks / 1e12
        found = {"tokens_per_second": samples * tokens_of(self.config.diffusion) / seconds, "tflops": tflops}
        return found if peak is None else found | {"mfu": tflops / peak}


def device_name(device: torch.device) -> str:
    """As the driver names it; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
