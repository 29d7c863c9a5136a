"""Names and sizes of a student in diffusers' terms. Converting only renames.

`transformer` is stock `CosmosTransformer3DModel`, `controlnet` our class of `hf_files/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cosmos_mp.config import NetConfig
from cosmos_mp.convert.nvidia import translate
from cosmos_mp.models.embeddings import PATCH

UNUSED = "control.final."
"""The control branch's final layer is never used: it is left out, and reading gives zeros for it."""
_SUBLAYERS = ("self", "cross", "mlp")
# (our name, their name) of what base and control branch have in common, inside one network; {} stand for numbers that are carried over.
_TRUNK = [
    *((f"position.{axis}", f"learnable_pos_embed.pos_emb_{axis}") for axis in "thw"),
    *((f"time.linear_{k}.weight", f"time_embed.t_embedder.linear_{k}.weight") for k in (1, 2)),
    ("time.norm.weight", "time_embed.norm.weight"),
]
_BLOCK = [
    *(
        (f"{sub}_mod.{ours}.weight", f"norm{j}.linear_{k}.weight")
        for j, sub in enumerate(_SUBLAYERS, 1)
        for k, ours in ((1, "down"), (2, "up"))
    ),
    *(
        (f"{sub}_attn.{ours}.weight", f"attn{j}.{theirs}.weight")
        for j, sub in enumerate(_SUBLAYERS[:2], 1)
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("q_norm", "norm_q"), ("k_norm", "norm_k"), ("out", "to_out.0"))
    ),
    ("mlp.up.weight", "ff.net.0.proj.weight"),
    ("mlp.down.weight", "ff.net.2.weight"),
]
# (our name, their folder and name), whole.
TABLE: list[tuple[str, str]] = [
    *((f"base.{ours}", f"transformer/{theirs}") for ours, theirs in _TRUNK),
    *((f"base.blocks.{{}}.{ours}", f"transformer/transformer_blocks.{{}}.{theirs}") for ours, theirs in _BLOCK),
    ("base.patch_embed.weight", "transformer/patch_embed.proj.weight"),
    ("base.final.mod.down.weight", "transformer/norm_out.linear_1.weight"),
    ("base.final.mod.up.weight", "transformer/norm_out.linear_2.weight"),
    ("base.final.linear.weight", "transformer/proj_out.weight"),
    *((f"control.{ours}", f"controlnet/{theirs}") for ours, theirs in _TRUNK),
    *((f"control.blocks.{{}}.{ours}", f"controlnet/control_blocks.{{}}.{theirs}") for ours, theirs in _BLOCK),
    ("control.patch_embed.weight", "controlnet/patch_embed_base.proj.weight"),
    ("control.control_embed.weight", "controlnet/patch_embed.proj.weight"),
    *((f"control.control_mlp.{{}}.{kind}", f"controlnet/input_hint_block.{{}}.{kind}") for kind in ("weight", "bias")),
    *((f"control.zero.{{}}.{kind}", f"controlnet/zero_blocks.{{}}.{kind}") for kind in ("weight", "bias")),
]


class ExportError(ValueError):
    """A folder that cannot be written, read or trusted; the message names file and remedy."""


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Our names to theirs, by folder ("transformer", "controlnet"); the control branch's unused final layer is left out.

    Raises:
        ExportError: a name is none of ours.
    """
    folders: dict[str, dict[str, Tensor]] = {"transformer": {}, "controlnet": {}}
    for name, value in weights.items():
        if name.startswith(UNUSED):
            continue
        theirs = translate(name, TABLE)
        if theirs is None:
            raise ExportError(f"{name!r} has no Hugging Face name: give the student's weights alone (base.*, control.*)")
        folder, _, inner = theirs.partition("/")
        folders[folder][inner] = value
    return folders


def from_huggingface(folders: Mapping[str, Mapping[str, Tensor]], source: str) -> dict[str, Tensor]:
    """Their names, by folder, to ours.

    Raises:
        ExportError: a name is none of theirs.
    """
    reverse = [(theirs, ours) for ours, theirs in TABLE]
    named = {}
    for folder, tensors in folders.items():
        for name, value in tensors.items():
            ours = translate(f"{folder}/{name}", reverse)
            if ours is None:
                raise ExportError(f"{source}: {folder}/{name} is no tensor of this network; export the folder again")
            named[ours] = value
    return named


def configs(net: NetConfig) -> dict[str, dict[str, Any]]:
    """Constructor arguments of the two diffusers models, by folder.

    Raises:
        ExportError: a size that diffusers' classes cannot express; the message names the option.
    """
    if net.mlp_hidden % net.hidden:
        raise ExportError(f"net.mlp_hidden={net.mlp_hidden} must be a multiple of net.hidden={net.hidden}: diffusers knows the ratio alone")
    for name, fixed in (("rope_theta", 10000.0), ("base_fps", 24.0)):
        if getattr(net, name) != fixed:
            raise ExportError(f"net.{name}={getattr(net, name)} cannot be exported: diffusers has {fixed:g} written into its layers")
    shared = {
        "in_channels": net.latent_channels + 1,
        "num_attention_heads": net.heads,
        "attention_head_dim": net.head_dim,
        "mlp_ratio": float(net.mlp_hidden // net.hidden),
        "text_embed_dim": net.text_dim,
        "adaln_lora_dim": net.adaln_lora_dim,
        "max_size": list(net.max_latent),
        "patch_size": [1, PATCH, PATCH],
    }
    transformer = {
        "out_channels": net.latent_channels,
        "num_layers": net.blocks,
        "rope_scale": list(net.rope_ratio),
        "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable",
        "use_crossattn_projection": False,
        "controlnet_block_every_n": 1,
        "img_context_dim_in": None,
    }
    controlnet = {
        "n_controlnet_blocks": net.control_blocks,
        "hint_channels": net.control_channels,
        "hint_nf": list(net.control_mlp),
        "rope_scale": list(net.control_rope_ratio),
    }
    return {"transformer": shared | transformer, "controlnet": shared | controlnet}


def net_config(found: Mapping[str, Mapping[str, Any]], source: str) -> NetConfig:
    """The sizes behind two config.json; whatever they say must be what `configs` would write."""
    try:
        base, control = found["transformer"], found["controlnet"]
        hidden = base["num_attention_heads"] * base["attention_head_dim"]
        net = NetConfig(
            hidden=hidden,
            heads=base["num_attention_heads"],
            blocks=base["num_layers"],
            control_blocks=control["n_controlnet_blocks"],
            mlp_hidden=int(base["mlp_ratio"] * hidden),
            adaln_lora_dim=base["adaln_lora_dim"],
            text_dim=base["text_embed_dim"],
            latent_channels=base["out_channels"],
            control_channels=control["hint_channels"],
            control_mlp=tuple(control["hint_nf"]),
            max_latent=tuple(base["max_size"]),
            rope_ratio=tuple(base["rope_scale"]),
            control_rope_ratio=tuple(control["rope_scale"]),
        )
    except KeyError as error:
        raise ExportError(f"{source}: a config.json lacks {error}; export the folder again") from None
    for folder, expected in configs(net).items():
        given = {key: value for key, value in found[folder].items() if not key.startswith("_") and key != "auto_map"}
        for key in sorted(expected.keys() | given.keys()):
            got, wanted = given.get(key, "missing"), expected.get(key, "absent")
            if got != wanted:
                raise ExportError(f"{source}/{folder}/config.json: {key} is {got}, expected {wanted}; export the folder again")
    return net
