"""The control branch of Cosmos-Transfer1: a short copy of the trunk that turns a control latent into residuals for the base."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_mp.backends import Backend
from cosmos_mp.config import NetConfig
from cosmos_mp.models.dit import NetInput, Trunk
from cosmos_mp.models.embeddings import PATCH, latent_padding_mask, patchify


class ControlBranch(Trunk):
    """Own embedders and `control_blocks` blocks; the embedded control joins after block 0, zero-initialised linears lead out.

    The inherited final layer is never used: the reference carries it in its weight files, so it is kept to hold them strictly.
    """

    def __init__(self, net: NetConfig, backend: Backend):
        super().__init__(net, net.control_blocks, net.control_rope_ratio, backend)
        self.control_embed = nn.Linear((net.control_channels + 1) * PATCH * PATCH, net.hidden, bias=False)
        widths = (net.hidden, *net.control_mlp, net.hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.control_mlp = nn.Sequential(*layers[:-1])
        self.zero = nn.ModuleList(nn.Linear(net.hidden, net.hidden) for _ in range(net.control_blocks))

    def forward(self, call: NetInput, control_weight: float | Tensor = 1.0) -> list[Tensor]:
        """Residuals (S, B, D) for the base's first blocks.

        Args:
            control_weight: strength of the control: a number, or a map (T, H/2, W/2) or (B, T, H/2, W/2) over the patches of the call.
        """
        h, shared_inputs = self.embed(call)
        weight = control_weight
        if isinstance(weight, Tensor):
            maps = weight if weight.dim() == 4 else weight[None]
            grid = (call.x_BCTHW.shape[2], *(size // PATCH for size in call.x_BCTHW.shape[3:]))
            if maps.dim() != 4 or tuple(maps.shape[1:]) != grid or maps.shape[0] not in (1, call.x_BCTHW.shape[0]):
                raise ValueError(f"control_weight {tuple(control_weight.shape)} must be a number or a map over the patches {grid}")
            weight = self.spread(maps.to(h).flatten(1).transpose(0, 1)[..., None])
        residuals = []
        for index, (block, zero) in enumerate(zip(self.blocks, self.zero, strict=True)):
            h = block(h, *shared_inputs)
            if index == 0:
                h = h + self.spread(self.control_tokens(call))
            residuals.append(zero(h) * weight)
        return residuals

    def control_tokens(self, call: NetInput) -> Tensor:
        """The control latent, zero-padded to `control_channels`, with the padding mask, as tokens (S, B, D)."""
        control = call.control_BCTHW
        if control is None:
            raise ValueError("the control branch was called without a control latent")
        missing = self.net.control_channels - control.shape[1]
        padded = F.pad(control, (0, 0, 0, 0, 0, 0, 0, missing))
        mask = latent_padding_mask(call.padding_mask_BHW.to(control.dtype), *control.shape[2:])
        return self.control_mlp(self.control_embed(patchify(torch.cat([padded, mask], dim=1))))
