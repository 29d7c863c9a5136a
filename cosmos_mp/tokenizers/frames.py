"""Bytes <-> tokenizer input: uint8 RGB frames and float videos in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def frames_to_video(frames_BFHWC: np.ndarray) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1]: x / 127.5 - 1."""
    return torch.from_numpy(frames_BFHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def video_to_frames(video_BCTHW: Tensor) -> np.ndarray:
    """Float (B, 3, F, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3), rounded."""
    return ((video_BCTHW.cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
