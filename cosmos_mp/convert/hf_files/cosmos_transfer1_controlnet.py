"""Control branch of Cosmos-Transfer1, built from diffusers' own Cosmos layers. Load with `trust_remote_code=True`.

`CosmosControlNetModel` of diffusers is the branch of Transfer2.5, another graph: there the control enters before block 0 and residuals
leave for every seventh block. Here the embedded control joins after block 0 and residuals leave for the first blocks of the base.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet_cosmos import CosmosControlNetOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_cosmos import (
    CosmosEmbedding,
    CosmosLearnablePositionalEmbed,
    CosmosPatchEmbed,
    CosmosRotaryPosEmbed,
    CosmosTransformerBlock,
)
from torch import nn

QK_NORM_EPS = 1e-6


class CosmosTransfer1ControlNetModel(ModelMixin, ConfigMixin):
    """Turns a control latent into residuals for the first blocks of a `CosmosTransformer3DModel` with `controlnet_block_every_n=1`.

    Args:
        n_controlnet_blocks: blocks, and residuals.
        in_channels: channels of the latent and the condition mask; the padding mask is one more.
        hint_channels: the control latent is zero-padded to this many channels; the padding mask is one more.
        hint_nf: widths of the hidden layers between the embedded control and the residual stream.
        num_attention_heads, attention_head_dim, mlp_ratio, text_embed_dim, adaln_lora_dim, max_size, patch_size, rope_scale: as in
            `CosmosTransformer3DModel`. The time ratio of `rope_scale` is 1 here and 2 in the base.
    """

    _no_split_modules = ["CosmosTransformerBlock"]
    _keep_in_fp32_modules = ["learnable_pos_embed"]
    _skip_layerwise_casting_patterns = ["patch_embed", "patch_embed_base", "norm"]

    @register_to_config
    def __init__(
        self,
        n_controlnet_blocks: int = 3,
        in_channels: int = 17,
        hint_channels: int = 128,
        hint_nf: tuple[int, ...] = (16, 16, 32, 32, 96, 96, 256),
        num_attention_heads: int = 32,
        attention_head_dim: int = 128,
        mlp_ratio: float = 4.0,
        text_embed_dim: int = 1024,
        adaln_lora_dim: int = 256,
        max_size: tuple[int, int, int] = (128, 240, 240),
        patch_size: tuple[int, int, int] = (1, 2, 2),
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        hidden_size = num_attention_heads * attention_head_dim
        self.patch_embed = CosmosPatchEmbed(hint_channels + 1, hidden_size, patch_size, bias=False)
        self.patch_embed_base = CosmosPatchEmbed(in_channels + 1, hidden_size, patch_size, bias=False)
        self.rope = CosmosRotaryPosEmbed(attention_head_dim, max_size=max_size, patch_size=patch_size, rope_scale=rope_scale)
        self.learnable_pos_embed = CosmosLearnablePositionalEmbed(hidden_size, max_size=max_size, patch_size=patch_size)
        self.time_embed = CosmosEmbedding(hidden_size, hidden_size)
        self.control_blocks = nn.ModuleList(
            CosmosTransformerBlock(
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim=text_embed_dim,
                mlp_ratio=mlp_ratio,
                adaln_lora_dim=adaln_lora_dim,
            )
            for _ in range(n_controlnet_blocks)
        )
        widths = (hidden_size, *hint_nf, hidden_size)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])
        self.zero_blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(n_controlnet_blocks))
        for block in self.control_blocks:
            for attention in (block.attn1, block.attn2):
                # diffusers' layers say 1e-5 and have no option for it.
                attention.norm_q.eps = attention.norm_k.eps = QK_NORM_EPS

    def forward(
        self,
        controls_latents: torch.Tensor,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        condition_mask: torch.Tensor,
        conditioning_scale: float = 1.0,
        padding_mask: torch.Tensor | None = None,
        fps: float | None = None,
        return_dict: bool = True,
    ) -> CosmosControlNetOutput | tuple[list[torch.Tensor]]:
        """Residuals (B, T*H/2*W/2, D), one per block.

        Args:
            controls_latents: latent of the control video (B, C, T, H, W), C at most `hint_channels`.
            latents: preconditioned noisy latent (B, in_channels - 1, T, H, W), the base's input.
            timestep: ln(sigma) / 4, (B,).
            encoder_hidden_states: text (B, L, text_embed_dim); every token is attended to.
            condition_mask: (B, 1, T, H, W), 1 on given frames.
            conditioning_scale: factor on every residual.
            padding_mask: (1, 1, height, width) in pixels, 1 on padding, shared by the batch; None = no padding.
            fps: frames per second; None means 24.

        Raises:
            ValueError: a padding mask of another shape, or a control latent with too many channels.
        """
        batch, _, frames, height, width = latents.shape
        channels, limit = controls_latents.shape[1], self.config.hint_channels
        if channels > limit:
            raise ValueError(f"controls_latents has {channels} channels, more than hint_channels={limit}")
        if padding_mask is None:
            padding_mask = latents.new_zeros(1, 1, height, width)
        if padding_mask.dim() != 4 or padding_mask.shape[:2] != (1, 1):
            raise ValueError(f"padding_mask is {tuple(padding_mask.shape)}, expected (1, 1, height, width): one mask for the batch")
        padding = F.interpolate(padding_mask.to(latents.dtype), size=(height, width), mode="nearest")
        padding = padding[:, :, None].expand(batch, 1, frames, height, width)

        inputs = torch.cat([latents, condition_mask, padding], dim=1)
        rotary, position = self.rope(inputs, fps=fps), self.learnable_pos_embed(inputs)
        hidden_states = self.patch_embed_base(inputs).flatten(1, 3)
        temb, embedded_timestep = self.time_embed(hidden_states, timestep)
        padded = F.pad(controls_latents, (0, 0, 0, 0, 0, 0, 0, limit - channels))
        control = self.input_hint_block(self.patch_embed(torch.cat([padded, padding], dim=1)).flatten(1, 3))

        residuals = []
        for index, (block, zero) in enumerate(zip(self.control_blocks, self.zero_blocks, strict=True)):
            hidden_states = block(hidden_states, encoder_hidden_states, embedded_timestep, temb, rotary, position)
            if index == 0:
                hidden_states = hidden_states + control
            residuals.append(zero(hidden_states) * conditioning_scale)
        return CosmosControlNetOutput(control_block_samples=residuals) if return_dict else (residuals,)
