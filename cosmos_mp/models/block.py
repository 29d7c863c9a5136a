"""One DiT block: self-attention, cross-attention and MLP, each behind its own adaptive layer norm with low-rank modulation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_mp.backends import Backend
from cosmos_mp.config import NetConfig
from cosmos_mp.kernels.adaln import adaln
from cosmos_mp.models.embeddings import Rotation


class Modulated(NamedTuple):
    """Vectors (B, D) of one adaptive layer norm; the final layer has no gate."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


class Modulation(nn.Module):
    """`parts` vectors from the time conditioning: up(down(SiLU(c))) plus the shared term of the time embedding (adaLN-LoRA)."""

    def __init__(self, hidden: int, rank: int, parts: int):
        super().__init__()
        self.parts = parts
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, parts * hidden, bias=False)

    def forward(self, conditioning_BD: Tensor, shared_B3D: Tensor) -> Modulated:
        """From the conditioning (B, D) and the shared term (B, 3D)."""
        values = self.up(self.down(F.silu(conditioning_BD)))
        return Modulated(*(values + shared_B3D[:, : values.shape[-1]]).chunk(self.parts, dim=-1))


class Attention(nn.Module):
    """Multi-head attention with a root-mean-square norm per head on queries and keys; no bias."""

    def __init__(self, net: NetConfig, context_dim: int, backend: Backend):
        super().__init__()
        self.head_dim = net.head_dim
        self.attend = backend.attention()
        self.q = backend.column_linear(net.hidden, net.hidden)
        self.k = backend.column_linear(context_dim, net.hidden)
        self.v = backend.column_linear(context_dim, net.hidden)
        self.out = backend.row_linear(net.hidden, net.hidden)
        self.q_norm = backend.head_norm(net.head_dim)
        self.k_norm = backend.head_norm(net.head_dim)

    def forward(self, x_SBD: Tensor, context_LBD: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from x to the context; a rotation turns both where one is given."""
        query, key, value = (y.view(*y.shape[:2], -1, self.head_dim) for y in (self.q(x_SBD), self.k(context_LBD), self.v(context_LBD)))
        return self.out(self.attend(self.q_norm(query, rotation), self.k_norm(key, rotation), value))


class MLP(nn.Module):
    """down(GELU(up(x))) with the exact GELU."""

    def __init__(self, net: NetConfig, backend: Backend):
        super().__init__()
        self.up = backend.column_linear(net.hidden, net.mlp_hidden)
        self.down = backend.row_linear(net.mlp_hidden, net.hidden)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD)))


class Block(nn.Module):
    """h <- h + position; then h <- h + gate * f(LN(h) (1 + scale) + shift) for self-attention, cross-attention and MLP."""

    def __init__(self, net: NetConfig, backend: Backend):
        super().__init__()
        self.self_attn = Attention(net, net.hidden, backend)
        self.cross_attn = Attention(net, net.text_dim, backend)
        self.mlp = MLP(net, backend)
        self.self_mod = Modulation(net.hidden, net.adaln_lora_dim, 3)
        self.cross_mod = Modulation(net.hidden, net.adaln_lora_dim, 3)
        self.mlp_mod = Modulation(net.hidden, net.adaln_lora_dim, 3)

    def forward(
        self, h_SBD: Tensor, position_S1D: Tensor, rotation: Rotation, text_LBD: Tensor, conditioning_BD: Tensor, shared_B3D: Tensor
    ) -> Tensor:
        attn, cross, mlp = (mod(conditioning_BD, shared_B3D) for mod in (self.self_mod, self.cross_mod, self.mlp_mod))
        h, x = adaln(h_SBD, position_S1D, attn.shift, attn.scale)
        h, x = adaln(h, self.self_attn(x, x, rotation), cross.shift, cross.scale, attn.gate)
        h, x = adaln(h, self.cross_attn(x, text_LBD), mlp.shift, mlp.scale, cross.gate)
        return torch.addcmul(h, mlp.gate, self.mlp(x))
