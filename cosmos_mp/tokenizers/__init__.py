"""Video <-> latent. One protocol, three tokenizers: NVIDIA's files, the same network in diffusers' format, and a tiny linear one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cosmos_mp.config import TokenizerConfig

LATENT_CHANNELS = 16
SIGMA_DATA = 0.5
"""Standard deviation of every latent, the data's in the EDM equations."""


class Tokenizer(Protocol):
    """Causal in time: latent frame 0 is video frame 0 alone, each later one `temporal_compression` frames."""

    spatial_compression: int
    temporal_compression: int

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Video in [-1, 1] to (x - mean) / std * 0.5, float32, with mean and std per channel and latent frame.

        Raises:
            ValueError: not a floating (B, 3, F, H, W) video in [-1, 1], or a size that does not fit (see `latent_shape`).
        """
        ...

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Latent to float32 video, clamped to [-1, 1]."""
        ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(16, T, h, w) of a clip.

        Raises:
            ValueError: the size does not fit; the message names the option and the nearest values that do.
        """
        ...


def build_tokenizer(config: TokenizerConfig, device: torch.device | str = "cpu") -> Tokenizer:
    """The tokenizer of a configuration, read from its local folder, on the device where its videos and latents are.

    Raises:
        FileNotFoundError, ValueError: a missing, damaged or foreign file; the message names it and the remedy.
    """
    return _load(config.kind, Path(config.path)).to(device)


def _load(kind: str, path: Path) -> nn.Module:
    if kind == "nvidia":
        from cosmos_mp.tokenizers import nvidia

        return nvidia.load(path)
    if kind == "diffusers":
        from cosmos_mp.tokenizers import kl

        return kl.load(path)
    if kind == "tiny":
        from cosmos_mp.tokenizers.tiny import TinyTokenizer

        return TinyTokenizer.load(path)
    raise ValueError(f"tokenizer.kind={kind!r} is none of nvidia, diffusers, tiny")


def spatial_shape(height: int, width: int, factor: int) -> tuple[int, int]:
    """(h, w) of the latent; a ValueError names the nearest multiples of `factor` where a side does not divide."""
    for name, side in (("height", height), ("width", width)):
        if side < factor or side % factor:
            below = side // factor * factor
            near = [str(value) for value in (below, below + factor) if value > 0]
            raise ValueError(f"clip.{name}={side} is no multiple of {factor}, as the tokenizer needs; nearest: {' or '.join(near)}")
    return height // factor, width // factor


def frames_error(frames: int, rule: str, below: int, above: int) -> ValueError:
    """The error for a number of frames that does not fit; `below` may be zero or less, then only `above` is named."""
    near = [str(value) for value in (below, above) if value > 0]
    return ValueError(f"clip.frames={frames} does not fit the tokenizer ({rule}); nearest: {' or '.join(near)}")


def check_video(video_BCTHW: Tensor) -> None:
    """Refuse what is no (B, 3, F, H, W) floating-point video in [-1, 1]; unscaled bytes are the usual mistake."""
    if video_BCTHW.dim() != 5 or video_BCTHW.shape[1] != 3:
        raise ValueError(f"video is {tuple(video_BCTHW.shape)}, expected (B, 3, F, H, W)")
    if not video_BCTHW.is_floating_point() or not bool(video_BCTHW.abs().amax() <= 1 + 1e-3):
        raise ValueError(f"video ({video_BCTHW.dtype}) must be floating point in [-1, 1]; bytes become that by video / 127.5 - 1")


def check_latent(latent_BCTHW: Tensor) -> None:
    """Refuse what is no (B, 16, T, h, w) latent."""
    if latent_BCTHW.dim() != 5 or latent_BCTHW.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"latent is {tuple(latent_BCTHW.shape)}, expected (B, {LATENT_CHANNELS}, T, h, w)")
