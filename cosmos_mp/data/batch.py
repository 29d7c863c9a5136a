"""What one micro-batch is made of. Nothing is added to it later."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
        part, parts: which of how many equal parts along T the latents hold; one rank of a context-parallel group has one of them.
    """

    position_B: Tensor
    latent_BCTHW: Tensor
    control_BCTHW: Tensor
    text_BLD: Tensor
    fps_B: Tensor
    padding_mask_BHW: Tensor
    noise_BCTHW: Tensor | None = None
    part: int = 0
    parts: int = 1

    def __len__(self) -> int:
        return self.position_B.shape[0]

    def rows(self, index: Tensor) -> Batch:
        """Some of the samples, by row."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def cut(self, part: int, parts: int) -> Batch:
        """Part `part` of `parts` along the latent frames of every sample.

        Raises:
            ValueError: the frames do not divide so, or the batch has been cut already.
        """
        frames = self.latent_BCTHW.shape[2]
        if frames % parts or self.parts != 1:
            raise ValueError(f"{frames} latent frames (part {self.part} of {self.parts}) cannot be cut into {parts} equal parts")
        latents = {name: getattr(self, name) for name in ("latent_BCTHW", "control_BCTHW", "noise_BCTHW")}
        cut = {name: None if x is None else x.chunk(parts, dim=2)[part].contiguous() for name, x in latents.items()}
        return dataclasses.replace(self, **cut, part=part, parts=parts)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)
