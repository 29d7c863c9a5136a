"""What one micro-batch is made of. Nothing is added to it later."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of one micro-batch.

    Attributes:
        position_B: place of each sample in the training order (int64); it keys all randomness of the sample.
        latent_BCTHW: latent of the real clip, or for KD the teacher's answer; (B, 16, T, H, W), data standard deviation 0.5.
        control_BCTHW: latent of the control video, same shape.
        text_BLD: caption embedding (B, L, D); zeros beyond the caption.
        fps_B: frames per second of the clip.
        padding_mask_BHW: 1 where the pixel is padding, (B, 8H, 8W).
        noise_BCTHW: KD only: the unit-variance noise that the teacher started from.
    """

    position_B: Tensor
    latent_BCTHW: Tensor
    control_BCTHW: Tensor
    text_BLD: Tensor
    fps_B: Tensor
    padding_mask_BHW: Tensor
    noise_BCTHW: Tensor | None = None

    def __len__(self) -> int:
        return self.position_B.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{name: value if value is None else value.to(device, non_blocking=True) for name, value in moved.items()})
