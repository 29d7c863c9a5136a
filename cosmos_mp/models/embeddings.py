"""Patches, positions and time: everything between a latent and its tokens.

Tokens are (S, B, D) with S running over t, h, w (w fastest).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
PATCH = 2
"""Patches are 1 x 2 x 2 latent elements."""


def at_least_fp32(x: Tensor) -> torch.dtype:
    """float32, or the dtype of `x` where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def patchify(x_BCTHW: Tensor) -> Tensor:
    """(B, C, T, H, W) -> tokens (T*H/2*W/2, B, 4C), channels slowest within a patch."""
    batch, channels, frames, height, width = x_BCTHW.shape
    x = x_BCTHW.reshape(batch, channels, frames, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(2, 3, 5, 0, 1, 4, 6).reshape(-1, batch, channels * PATCH * PATCH)


def unpatchify(tokens_SBD: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Tokens (T*H/2*W/2, B, 4C), channels *fastest* within a patch, -> (B, C, T, H, W). Not the inverse order of `patchify`."""
    batch = tokens_SBD.shape[1]
    x = tokens_SBD.reshape(frames, height // PATCH, width // PATCH, batch, PATCH, PATCH, -1)
    return x.permute(3, 6, 0, 1, 4, 2, 5).reshape(batch, -1, frames, height, width)


def latent_padding_mask(padding_mask_BHW: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Pixel mask (B, 8H, 8W) -> (B, 1, T, H, W) by nearest neighbour, the same for every frame."""
    mask = F.interpolate(padding_mask_BHW[:, None], size=(height, width), mode="nearest")
    return mask[:, :, None].expand(-1, -1, frames, -1, -1)


def timestep_embedding(timestep_B: Tensor, size: int) -> Tensor:
    """[cos, sin](t * 10000^(-i / (size/2))), (B,) -> (B, size)."""
    half = size // 2
    steps = torch.arange(half, dtype=at_least_fp32(timestep_B), device=timestep_B.device)
    angles = timestep_B[:, None].to(steps.dtype) * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Conditioning vector RMSNorm(s) and the shared low-rank modulation linear_2(SiLU(linear_1(s))) of the sinusoid s."""

    def __init__(self, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.linear_1 = nn.Linear(hidden, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, 3 * hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=EPS)

    def forward(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> conditioning (B, D), shared modulation (B, 3D)."""
        sinusoid = timestep_embedding(timestep_B, self.hidden).to(self.linear_1.weight.dtype)
        return self.norm(sinusoid), self.linear_2(F.silu(self.linear_1(sinusoid)))


def rope_angles(
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    fps_B: Tensor,
    ratio: tuple[float, float, float],
    theta: float,
    base_fps: float,
    first_frame: int = 0,
) -> Tensor:
    """Rotary angles of a patched grid, (S, B, head_dim), layout [t, h, w] twice.

    h and w take head_dim // 6 * 2 entries each, t the rest; theta grows by ratio^(d / (d - 2)) per axis (NTK). Time runs in units of
    1 / base_fps seconds, so that clips of different rates share one clock. The grid starts at `first_frame` of its clip.
    """
    dtype = at_least_fp32(fps_B)
    spatial = head_dim // 6 * 2
    sizes = (head_dim - 2 * spatial, spatial, spatial)
    batch = fps_B.shape[0]
    clock = torch.arange(first_frame, first_frame + frames, dtype=dtype, device=fps_B.device)[:, None] * (base_fps / fps_B.to(dtype))
    rows = torch.arange(height, dtype=dtype, device=fps_B.device)[:, None].expand(-1, batch)
    columns = torch.arange(width, dtype=dtype, device=fps_B.device)[:, None].expand(-1, batch)
    parts = []
    for axis, (position, size, factor) in enumerate(zip((clock, rows, columns), sizes, ratio, strict=True)):
        base = theta * factor ** (size / (size - 2))
        exponent = torch.arange(0, size, 2, dtype=dtype, device=fps_B.device) / size
        angles = position[..., None] * torch.pow(torch.tensor(base, dtype=dtype, device=fps_B.device), -exponent)
        shape = [1, 1, 1, batch, size // 2]
        shape[axis] = position.shape[0]
        parts.append(angles.reshape(shape).expand(frames, height, width, -1, -1))
    half = torch.cat(parts, dim=-1).reshape(-1, batch, head_dim // 2)
    return torch.cat([half, half], dim=-1)


class Rotation(NamedTuple):
    """Cosine and sine of rotary angles, (S, B, 1, head_dim), made once per network call."""

    cos: Tensor
    sin: Tensor


def rotation(angles_SBD: Tensor) -> Rotation:
    """Angles (S, B, head_dim) -> what queries and keys are turned with."""
    return Rotation(angles_SBD.cos()[:, :, None], angles_SBD.sin()[:, :, None])


class LearnedPosition(nn.Module):
    """Sum of one learned vector per axis, divided by its root mean square; added to the stream before every block."""

    def __init__(self, hidden: int, frames: int, height: int, width: int):
        super().__init__()
        self.t = nn.Parameter(torch.empty(frames, hidden))
        self.h = nn.Parameter(torch.empty(height, hidden))
        self.w = nn.Parameter(torch.empty(width, hidden))

    def forward(self, frames: int, height: int, width: int, first_frame: int = 0) -> Tensor:
        """Patched sizes -> (S, 1, D), for a grid that starts at `first_frame` of its clip.

        Raises:
            ValueError: the grid is larger than the tables.
        """
        for name, size, table in (("T", first_frame + frames, self.t), ("H", height, self.h), ("W", width, self.w)):
            if size > table.shape[0]:
                raise ValueError(f"patched latent {name}={size} exceeds the position table's {table.shape[0]}: raise net.max_latent")
        e = self.t[first_frame : first_frame + frames, None, None] + self.h[None, :height, None] + self.w[None, None, :width]
        e = e.to(at_least_fp32(e))
        e = e / (EPS + e.pow(2).mean(dim=-1, keepdim=True).sqrt())
        return e.reshape(-1, 1, e.shape[-1]).to(self.t.dtype)
