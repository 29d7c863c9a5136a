"""The base diffusion transformer (Cosmos-1.0 Diffusion 7B Video2World) and what it shares with the control branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cosmos_mp.backends import Backend
from cosmos_mp.config import NetConfig
from cosmos_mp.kernels.adaln import modulate
from cosmos_mp.models.block import Block, Modulation
from cosmos_mp.models.embeddings import (
    PATCH,
    LearnedPosition,
    Rotation,
    TimeEmbedding,
    latent_padding_mask,
    patchify,
    rope_angles,
    rotation,
    unpatchify,
)

Tail = Literal["full", "detached", "none"]


@dataclass(frozen=True)
class NetInput:
    """One network call.

    Attributes:
        x_BCTHW: preconditioned noisy latent, (B, 16, T, H, W).
        timestep_B: c_noise = ln(sigma) / 4.
        text_BLD: caption embedding; every token is attended to, padding zeros too.
        control_BCTHW: latent of the control video, (B, 16, T, H, W); None where no control acts.
        condition_mask_B1THW: 1 on given latent frames.
        padding_mask_BHW: 1 on padding, in pixels (B, 8H, 8W).
        fps_B: frames per second.
    """

    x_BCTHW: Tensor
    timestep_B: Tensor
    text_BLD: Tensor
    control_BCTHW: Tensor | None
    condition_mask_B1THW: Tensor
    padding_mask_BHW: Tensor
    fps_B: Tensor

    def to(self, dtype: torch.dtype) -> NetInput:
        """The same call in another precision; time and frame rate stay as they are."""
        names = ("x_BCTHW", "text_BLD", "condition_mask_B1THW", "padding_mask_BHW")
        control = None if self.control_BCTHW is None else self.control_BCTHW.to(dtype)
        return replace(self, control_BCTHW=control, **{name: getattr(self, name).to(dtype) for name in names})


@dataclass(frozen=True)
class NetOutput:
    """Raw network output F (B, 16, T, H, W), None where the call ended at the last feature; features (B, T, H/2, W/2, D)."""

    out: Tensor | None
    features: tuple[Tensor, ...] = ()


class BlockInputs(NamedTuple):
    """What every block of one network call reads beside the stream."""

    position_S1D: Tensor
    rotation: Rotation
    text_LBD: Tensor
    conditioning_BD: Tensor
    shared_B3D: Tensor


class FinalLayer(nn.Module):
    """linear(LN(h) (1 + scale) + shift)."""

    def __init__(self, net: NetConfig):
        super().__init__()
        self.mod = Modulation(net.hidden, net.adaln_lora_dim, 2)
        self.linear = nn.Linear(net.hidden, PATCH * PATCH * net.latent_channels, bias=False)

    def forward(self, h_SBD: Tensor, conditioning_BD: Tensor, shared_B3D: Tensor) -> Tensor:
        mod = self.mod(conditioning_BD, shared_B3D)
        return self.linear(modulate(h_SBD, mod.shift, mod.scale))


def _as_is(tokens: Tensor) -> Tensor:
    return tokens


class Trunk(nn.Module):
    """Embedders and blocks, the part that the base and the control branch have in common (each has its own weights).

    Args:
        net: sizes.
        blocks: number of blocks.
        rope_ratio: extrapolation ratios (t, h, w) of the rotary embedding.
        backend: builds the layers that tensor parallelism splits.

    Attributes:
        part: which of equal parts along T the calls hold, 0 where they hold whole clips; frames are numbered accordingly.
        spread, collect: what happens to tokens on the way into the blocks and out of them; nothing here.
    """

    part: int = 0
    spread = staticmethod(_as_is)
    collect = staticmethod(_as_is)

    def __init__(self, net: NetConfig, blocks: int, rope_ratio: tuple[float, float, float], backend: Backend):
        super().__init__()
        self.net, self.rope_ratio = net, rope_ratio
        frames, height, width = net.max_latent
        self.patch_embed = nn.Linear((net.latent_channels + 2) * PATCH * PATCH, net.hidden, bias=False)
        self.position = LearnedPosition(net.hidden, frames, height // PATCH, width // PATCH)
        self.time = TimeEmbedding(net.hidden)
        self.blocks = nn.ModuleList(Block(net, backend) for _ in range(blocks))
        self.final = FinalLayer(net)

    def embed(self, call: NetInput) -> tuple[Tensor, BlockInputs]:
        """Tokens (S, B, D) and what every block reads beside them."""
        frames, height, width = call.x_BCTHW.shape[2:]
        padding = latent_padding_mask(call.padding_mask_BHW.to(call.x_BCTHW.dtype), frames, height, width)
        tokens = patchify(torch.cat([call.x_BCTHW, call.condition_mask_B1THW.to(padding.dtype), padding], dim=1))
        grid = (frames, height // PATCH, width // PATCH)
        # The angles follow the compute dtype upwards only: float64 networks get float64 angles, bf16 ones float32.
        fps = call.fps_B.to(torch.promote_types(call.x_BCTHW.dtype, torch.float32))
        net, first = self.net, self.part * frames
        angles = rope_angles(
            *grid,
            net.head_dim,
            fps_B=fps,
            ratio=self.rope_ratio,
            theta=net.rope_theta,
            base_fps=net.base_fps,
            first_frame=first,
        )
        conditioning, shared = self.time(call.timestep_B)
        text = call.text_BLD.transpose(0, 1).contiguous()
        position = self.spread(self.position(*grid, first))
        return self.spread(self.patch_embed(tokens)), BlockInputs(position, rotation(angles), text, conditioning, shared)


class BaseDiT(Trunk):
    """The base network; residuals of a control branch enter after the first blocks."""

    def __init__(self, net: NetConfig, backend: Backend):
        super().__init__(net, net.blocks, net.rope_ratio, backend)

    def forward(
        self,
        call: NetInput,
        residuals: Sequence[Tensor] = (),
        *,
        feature_blocks: Sequence[int] = (),
        tail: Tail = "full",
    ) -> NetOutput:
        """Run the network.

        Args:
            residuals: (S, B, D) tensors; the i-th is added after block i.
            feature_blocks: ascending blocks whose output, before its residual, is returned.
            tail: what happens after the last feature: "full" goes on; "detached" goes on outside the graph, so that no block pays for a
                gradient that nobody asks for; "none" stops, and `out` is None.
        """
        frames, height, width = call.x_BCTHW.shape[2:]
        h, shared_inputs = self.embed(call)
        features = []
        for index, block in enumerate(self.blocks):
            h = block(h, *shared_inputs)
            if index in feature_blocks:
                grid = self.collect(h).reshape(frames, height // PATCH, width // PATCH, *h.shape[1:])
                features.append(grid.permute(3, 0, 1, 2, 4))
                if len(features) == len(feature_blocks) and tail != "full":
                    if tail == "none":
                        return NetOutput(None, tuple(features))
                    h, residuals = h.detach(), [residual.detach() for residual in residuals]
            if index < len(residuals):
                h = h + residuals[index]
        out = self.collect(self.final(h, shared_inputs.conditioning_BD, shared_inputs.shared_B3D))
        return NetOutput(unpatchify(out, frames, height, width), tuple(features))
