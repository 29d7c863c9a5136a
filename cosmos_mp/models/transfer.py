"""Base and control branch as one network: the student, the teacher and the fake score are all this class."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cosmos_mp.backends import Backend
from cosmos_mp.config import NetConfig
from cosmos_mp.models.controlnet import ControlBranch
from cosmos_mp.models.dit import BaseDiT, NetInput, NetOutput, Tail


class TransferNet(nn.Module):
    """Cosmos-Transfer1: `base` and `control`."""

    def __init__(self, net: NetConfig, backend: Backend):
        super().__init__()
        self.base = BaseDiT(net, backend)
        self.control = ControlBranch(net, backend)

    def forward(
        self,
        call: NetInput,
        *,
        control_weight: float | Tensor = 1.0,
        feature_blocks: Sequence[int] = (),
        tail: Tail = "full",
    ) -> NetOutput:
        """Network output, with the control's residuals where the call carries a control latent; computed in the weights' dtype."""
        call = call.to(self.base.patch_embed.weight.dtype)
        residuals = self.control(call, control_weight) if call.control_BCTHW is not None else ()
        return self.base(call, residuals, feature_blocks=feature_blocks, tail=tail)
