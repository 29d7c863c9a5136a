"""NVIDIA's weight files: names, layouts, strict reading and writing.

Converting only renames; no tensor is transposed or split. Files: `base_model.pt` (`base_model.net.*`), `{control}_control.pt` (`net.*`),
the combined teacher (both), a training checkpoint (`net_ctrl.*` for the control branch) and the released student
(`net.base_model.net.*`, `net.net_ctrl.*`, possibly under "model"). Averaged weights write "-" for "." in the same names.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from cosmos_mp.files import whole

_SUBLAYERS = ("self", "cross", "mlp")
# (their name inside one network, our name inside one network); {} stand for what is carried over.
_TABLE: list[tuple[str, str]] = [
    ("x_embedder.proj.1.weight", "patch_embed.weight"),
    ("extra_pos_embedder.pos_emb_t", "position.t"),
    ("extra_pos_embedder.pos_emb_h", "position.h"),
    ("extra_pos_embedder.pos_emb_w", "position.w"),
    ("t_embedder.1.linear_1.weight", "time.linear_1.weight"),
    ("t_embedder.1.linear_2.weight", "time.linear_2.weight"),
    ("affline_norm.weight", "time.norm.weight"),
    *(
        (f"blocks.block{{}}.blocks.{j}.adaLN_modulation.{k}.weight", f"blocks.{{}}.{sub}_mod.{part}.weight")
        for j, sub in enumerate(_SUBLAYERS)
        for k, part in ((1, "down"), (2, "up"))
    ),
    *(
        (f"blocks.block{{}}.blocks.{j}.block.attn.{theirs}.weight", f"blocks.{{}}.{sub}_attn.{ours}.weight")
        for j, sub in enumerate(_SUBLAYERS[:2])
        for theirs, ours in (
            ("to_q.0", "q"),
            ("to_k.0", "k"),
            ("to_v.0", "v"),
            ("to_q.1", "q_norm"),
            ("to_k.1", "k_norm"),
            ("to_out.0", "out"),
        )
    ),
    ("blocks.block{}.blocks.2.block.layer1.weight", "blocks.{}.mlp.up.weight"),
    ("blocks.block{}.blocks.2.block.layer2.weight", "blocks.{}.mlp.down.weight"),
    ("final_layer.adaLN_modulation.1.weight", "final.mod.down.weight"),
    ("final_layer.adaLN_modulation.2.weight", "final.mod.up.weight"),
    ("final_layer.linear.weight", "final.linear.weight"),
    ("x_embedder2.proj.1.weight", "control_embed.weight"),
    ("input_hint_block.{}.weight", "control_mlp.{}.weight"),
    ("input_hint_block.{}.bias", "control_mlp.{}.bias"),
    ("zero_blocks.block{}.weight", "zero.{}.weight"),
    ("zero_blocks.block{}.bias", "zero.{}.bias"),
]
_BASE_PREFIXES = ("net.base_model.net.", "base_model.net.")
_CONTROL_PREFIXES = ("net.net_ctrl.", "net_ctrl.", "net.")
_IGNORED = re.compile(r"([.-]_extra_state|pos_embedder[.-]seq)$|(^|[.-])(logvar|conditioner)[.-]|(^|[.-])trained_data_record($|[.-])")
Layout = Literal["teacher", "student"]
# Prefixes of (base, control branch) in the files that we write.
_WRITTEN: dict[Layout, tuple[str, str]] = {"teacher": ("base_model.net.", "net."), "student": ("net.base_model.net.", "net.net_ctrl.")}


class LayoutError(ValueError):
    """A tensor name that belongs to no known layout."""


def translate(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """`name` after the first row (source, target) that it fits, None if there is none; {} stands for a number that is carried over."""
    for source, target in table:
        match = re.fullmatch(re.escape(source).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return target.format(*match.groups())
    return None


def compact(value: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage: a view would take the whole of it into a file."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def from_nvidia(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Their names to ours (`base.*`, `control.*`, `heads.*`); "-" in place of "." is understood.

    TE's `_extra_state`, `pos_embedder.seq`, `logvar`, `conditioner` and `trained_data_record` are dropped: no network here has them.

    Raises:
        LayoutError: a name fits no layout, or two names mean the same tensor.
    """
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        if _IGNORED.search(name):
            continue
        ours = _our_name(name if "." in name else name.replace("-", "."))
        if ours is None:
            raise LayoutError(f"{source}: {name!r} is no name of NVIDIA's Transfer1 files; is this the right file?")
        if ours in named:
            raise LayoutError(f"{source}: {name!r} and another name both mean {ours!r}")
        named[ours] = value
    return named


def _our_name(name: str) -> str | None:
    if name.startswith("cls_pred_heads."):
        return name.replace("cls_pred_heads.", "heads.", 1)
    for prefixes, ours in ((_BASE_PREFIXES, "base."), (_CONTROL_PREFIXES, "control.")):
        for prefix in prefixes:
            if name.startswith(prefix):
                translated = translate(name.removeprefix(prefix), _TABLE)
                return None if translated is None else ours + translated
    return None


def to_nvidia(weights: Mapping[str, Tensor], layout: Layout = "teacher") -> dict[str, Tensor]:
    """Our names to theirs: the combined teacher's (`base_model.net.*`, `net.*`) or the released student's.

    Raises:
        LayoutError: a name is none of ours.
    """
    reverse = [(ours, theirs) for theirs, ours in _TABLE]
    prefixes = dict(zip(("base", "control"), _WRITTEN[layout], strict=True))
    named = {}
    for name, value in weights.items():
        network, _, rest = name.partition(".")
        if network == "heads":
            named["cls_pred_heads." + rest] = value
            continue
        translated = translate(rest, reverse)
        if network not in prefixes or translated is None:
            raise LayoutError(f"{name!r} has no NVIDIA name")
        named[prefixes[network] + translated] = value
    return named


def write_nvidia(weights: Mapping[str, Tensor], path: Path, layout: Layout = "teacher") -> None:
    """Write weights under our names as NVIDIA's file; whole or not at all.

    Args:
        layout: "teacher", the flat combined file, or "student", {"model": weights, "ema": None} as the student was released.

    Raises:
        LayoutError: a name is none of ours.
        ValueError: the file exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists: remove it or choose another name")
    named = {name: compact(value) for name, value in to_nvidia(weights, layout).items()}
    with whole(path) as partial:
        torch.save(named if layout == "teacher" else {"model": named, "ema": None}, partial)


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pt` or `.safetensors` file under the names written there; a top-level "model" table is entered.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a flat table of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file; README tells where the weights come from")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([io.BytesIO]):  # what older versions of TE keep in `_extra_state`
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable weight file ({error}); fetch it again") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a flat table of tensors, found {type(content).__name__}")
    kept = {name: value for name, value in content.items() if not _IGNORED.search(str(name))}
    others = [str(name) for name, value in kept.items() if not isinstance(value, Tensor)]
    if others or not kept:
        raise ValueError(f"{path}: expected a flat table of tensors, found other values at {', '.join(others[:3]) or 'no key at all'}")
    return kept


def read_network(path: Path) -> dict[str, Tensor]:
    """Weights of a file under our names."""
    return from_nvidia(read_file(path), str(path))


def read_networks(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Weights spread over files (`base_model.pt` and `edge_control.pt`), as one table under our names.

    Raises:
        LayoutError: no file is named, or two of them hold the same tensor.
        FileNotFoundError, ValueError: as `read_file`.
    """
    if not paths:
        raise LayoutError("no weight file is named: give one, or the base's and the control branch's")
    merged: dict[str, Tensor] = {}
    for path in paths:
        part = read_network(path)
        twice = sorted(merged.keys() & part.keys())
        if twice:
            raise LayoutError(f"{path}: {twice[0]!r} and {len(twice) - 1} more are in an earlier file too; name each network once")
        merged |= part
    return merged
