"""Heads that judge features of a denoiser: one per feature block, one logit each.

Layouts follow Cosmos-Transfer1's distillation heads: every head is a small convolutional network over (B, D, T, H, W) whose output is
averaged over space and time.

Where several processes hold a sample's frames, every one computes the outputs of its own: features are not brought together, only the
sums of norms and logits are, by `across`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cosmos_mp.config import HeadConfig
from cosmos_mp.kernels.gan_head import GROUPS, SLOPE, Across, head_logits, mean_of_clip
from cosmos_mp.models.embeddings import at_least_fp32


def _norm_act(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, channels), nn.LeakyReLU(SLOPE)]


def _check_frames(x_BDTHW: Tensor, kind: str) -> None:
    if x_BDTHW.shape[2] < 2:
        raise ValueError(f"the {kind} head needs at least 2 latent frames, got {x_BDTHW.shape[2]}: use head.kind=conv2d")


class Conv3dHead(nn.Module):
    """Conv3d 2x4x4 stride 2 -> GroupNorm(8) -> LeakyReLU -> 1x1x1; kernel = stride along T, so frames pair up without overlap."""

    across: Across = None

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        first = nn.Conv3d(channels, hidden, (2, 4, 4), stride=2, padding=(0, 1, 1))
        self.net = nn.Sequential(first, *_norm_act(hidden), nn.Conv3d(hidden, 1, 1))

    def forward(self, x_BDTHW: Tensor) -> Tensor:
        _check_frames(x_BDTHW, "conv3d")
        first, norm, _, out = self.net
        return head_logits(first(x_BDTHW), norm.weight, norm.bias, out.weight, out.bias, self.across)


class Conv2dHead(nn.Module):
    """The same on each frame alone: Conv2d 4x4 stride 2."""

    across: Across = None

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, hidden, 4, stride=2, padding=1), *_norm_act(hidden), nn.Conv2d(hidden, 1, 1))

    def forward(self, x_BDTHW: Tensor) -> Tensor:
        batch = x_BDTHW.shape[0]
        logits = self.net(x_BDTHW.transpose(1, 2).flatten(0, 1))
        return mean_of_clip(logits.reshape(batch, -1), self.across)


class AttentionHead(nn.Module):
    """Conv3d 2x4x4 stride 2 -> GroupNorm -> LeakyReLU -> self-attention over all positions (4 heads) -> 1x1x1.

    The reference normalises over the batch here; GroupNorm keeps every sample's logit its own.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(channels, hidden, (2, 4, 4), stride=2, padding=(0, 1, 1)), *_norm_act(hidden))
        self.attn = nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x_BDTHW: Tensor) -> Tensor:
        _check_frames(x_BDTHW, "attention")
        tokens = self.down(x_BDTHW).flatten(2).transpose(1, 2)
        mixed, _ = self.attn(tokens, tokens, tokens, need_weights=False)
        return self.out(tokens + mixed).mean(dim=(1, 2))


class SpatialTemporalHead(nn.Module):
    """Mean of a spatial head (Conv2d per frame) and a temporal one (Conv1d along T per position), as in SF-V (arXiv 2406.04324)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.spatial = Conv2dHead(channels, hidden)
        self.temporal = nn.Sequential(nn.Conv1d(channels, hidden, 3, padding=1), *_norm_act(hidden), nn.Conv1d(hidden, 1, 1))

    def forward(self, x_BDTHW: Tensor) -> Tensor:
        batch = x_BDTHW.shape[0]
        lines = x_BDTHW.permute(0, 3, 4, 1, 2).flatten(0, 2)
        temporal = self.temporal(lines).reshape(batch, -1).mean(dim=1)
        return (self.spatial(x_BDTHW) + temporal) / 2


HEADS: dict[str, type[nn.Module]] = {
    "conv3d": Conv3dHead,
    "conv2d": Conv2dHead,
    "attention": AttentionHead,
    "spatial_temporal": SpatialTemporalHead,
}


class Discriminator(nn.Module):
    """One head per feature; logits (B, heads)."""

    def __init__(self, channels: int, config: HeadConfig):
        super().__init__()
        self.first_frame = config.first_frame
        self.part = 0  # which of equal parts along T the features hold
        self.heads = nn.ModuleList(HEADS[config.kind](channels, config.hidden) for _ in config.feature_blocks)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features (B, T, H/2, W/2, D), in the order of the feature blocks; logits are float32 or wider."""
        dtype = next(self.parameters()).dtype
        first = max(0, self.first_frame - self.part * features[0].shape[1])
        channels_first = [feature[:, first:].permute(0, 4, 1, 2, 3).to(dtype) for feature in features]
        logits = torch.stack([head(x) for head, x in zip(self.heads, channels_first, strict=True)], dim=1)
        return logits.to(at_least_fp32(logits))
