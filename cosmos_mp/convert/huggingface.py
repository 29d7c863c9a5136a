"""The student as a Hugging Face folder, and back.

`transformer/` is stock `diffusers.CosmosTransformer3DModel`; control branch and one-call pipeline are the files of `hf_files/`, which the
folder carries. Converting only renames. The control branch's final layer is never used and is left out; reading gives zeros for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch
from diffusers import CosmosTransformer3DModel, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import ModelCardData, split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos_mp import __version__
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import DiffusionConfig, NetConfig
from cosmos_mp.convert.nvidia import compact, translate
from cosmos_mp.diffusion.edm import Condition, Denoiser
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.models.embeddings import EPS, PATCH
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import build, load_weights, named_weights
from cosmos_mp.parallel.topology import single_process

FILES = Path(__file__).with_name("hf_files")
CONTROLNET, PIPELINE = "cosmos_transfer1_controlnet", "pipeline_cosmos_transfer1_distilled"
STEM = "diffusion_pytorch_model"
TOLERANCE = 1e-5
_UNUSED = "control.final."
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


@dataclass(frozen=True)
class Card:
    """What the model card tells beyond the sizes.

    Attributes:
        clip: size and rate of the training clips, in words.
        fps: their frames per second.
        base_model: Hub id of the weights that the student descends from; empty = trained from random weights.
        vae, text_encoder: Hub ids, or words, for what makes latents and caption embeddings.
        text_tokens: length to which caption embeddings are zero-padded.
        metrics: evaluation results by name; empty = none was run.
    """

    control: str = "edge"
    clip: str = "121 frames of 704 x 1280 at 24 frames per second"
    fps: float = 24.0
    base_model: str = "nvidia/Cosmos-Transfer1-7B"
    vae: str = "nvidia/Cosmos-Tokenize1-CV8x8x8-720p"
    text_encoder: str = "google-t5/t5-11b"
    text_tokens: int = 512
    metrics: Mapping[str, float] = field(default_factory=dict)


# --- Names and sizes ---


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Our names to theirs, by folder ("transformer", "controlnet"); the control branch's unused final layer is left out.

    Raises:
        ExportError: a name is none of ours.
    """
    folders: dict[str, dict[str, Tensor]] = {"transformer": {}, "controlnet": {}}
    for name, value in weights.items():
        if name.startswith(_UNUSED):
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


def _net_config(found: Mapping[str, Mapping[str, Any]], source: str) -> NetConfig:
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


def _check(weights: Mapping[str, Tensor], net: NetConfig, source: str) -> None:
    """Strictly, on the meta device: nothing is copied."""
    backend = LocalBackend(single_process().tp_group)
    load_weights(build(lambda: TransferNet(net, backend), "meta"), weights, source)


# --- Writing ---


def export_student(
    weights: Mapping[str, Tensor],
    net: NetConfig,
    diffusion: DiffusionConfig,
    out: Path,
    *,
    provenance: Mapping[str, Any],
    card: Card | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a student as a folder that diffusers loads; whole or not at all.

    Args:
        weights: every tensor of the network under our names, `control.final.*` (which is not written) too.
        provenance: where the weights come from, as JSON values; kept in cosmos_mp_export.json.
        dtype: float32 or bfloat16, the type of every tensor written.
        shard_bytes: largest weight file; a single tensor may exceed it.

    Raises:
        ExportError: the folder is not empty, or sizes or provenance cannot be written.
        WeightError: a tensor is missing, unexpected or of another shape.
    """
    out, card = Path(out), card or Card()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder: remove it or choose another name")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ExportError(f"dtype={dtype}: students are written as torch.float32 or torch.bfloat16")
    sizes = configs(net)
    _check(weights, net, "the student to export")
    dtype_name = str(dtype).removeprefix("torch.")
    record = {
        "cosmos_mp": __version__,
        "dtype": dtype_name,
        "net": dataclasses.asdict(net),
        "diffusion": dataclasses.asdict(diffusion),
        "qk_norm_eps": EPS,
        "left_out": sorted(name for name in weights if name.startswith(_UNUSED)),
        "provenance": dict(provenance),
    }
    try:
        json.dumps(record)
    except TypeError as error:
        raise ExportError(f"provenance must hold JSON values: {error}") from None

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for folder, tensors in to_huggingface(weights).items():
        (partial / folder).mkdir()
        _write_weights(tensors, partial / folder, dtype, shard_bytes)
    classes = {"transformer": "CosmosTransformer3DModel", "controlnet": "CosmosTransfer1ControlNetModel"}
    auto_map = {"transformer": {}, "controlnet": {"auto_map": {"AutoModel": f"{CONTROLNET}.{classes['controlnet']}"}}}
    for folder, name in classes.items():
        _write_json(partial / folder / "config.json", {**_header(name), **auto_map[folder], **sizes[folder]})
    scheduler = {
        "sigma_min": diffusion.sigma_min,
        "sigma_max": diffusion.sigma_max,
        "sigma_data": diffusion.sigma_data,
        "sigma_schedule": "karras",
        "rho": 7.0,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        # With "sigma_min" a single step would return its own input.
        "final_sigmas_type": "zero",
    }
    (partial / "scheduler").mkdir()
    _write_json(partial / "scheduler" / "scheduler_config.json", {**_header("EDMEulerScheduler"), **scheduler})
    index = {
        **_header([PIPELINE, "CosmosTransfer1DistilledPipeline"]),
        "transformer": ["diffusers", classes["transformer"]],
        "controlnet": [CONTROLNET, classes["controlnet"]],
        "scheduler": ["diffusers", "EDMEulerScheduler"],
        "vae": [None, None],
        "is_distilled": True,
        "distilled_sigmas": [diffusion.sigma_max],
    }
    _write_json(partial / "model_index.json", index)
    _write_json(partial / "cosmos_mp_export.json", record)
    shutil.copyfile(FILES / f"{PIPELINE}.py", partial / f"{PIPELINE}.py")
    shutil.copyfile(FILES / f"{CONTROLNET}.py", partial / "controlnet" / f"{CONTROLNET}.py")
    (partial / "README.md").write_text(_model_card(card, net, diffusion, dtype_name))
    partial.replace(out)


def _header(class_name: str | list[str]) -> dict[str, Any]:
    return {"_class_name": class_name, "_diffusers_version": version("diffusers")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_weights(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    # Cut by shape alone; only one shard is in memory at a time in its new type.
    shapes = {name: torch.empty(tensors[name].shape, dtype=dtype, device="meta") for name in sorted(tensors)}
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=STEM + "{suffix}.safetensors", max_shard_size=shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: compact(tensors[name].to(dtype)) for name in names}, folder / filename, {"format": "pt"})
    if split.is_sharded:
        _write_json(folder / f"{STEM}.safetensors.index.json", {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _model_card(card: Card, net: NetConfig, diffusion: DiffusionConfig, dtype: str) -> str:
    tags = ["cosmos", "distillation", card.control]
    facts: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "video-to-video", "tags": tags}
    origin, terms = "The weights started at random values.", ""
    if card.base_model:
        link = "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license"
        facts |= {"base_model": card.base_model, "license": "other", "license_name": "nvidia-open-model-license", "license_link": link}
        origin, terms = f"The weights descend from `{card.base_model}`.", (FILES / "terms.md").read_text()
    rows = "\n".join(f"| {name} | {value:g} |" for name, value in card.metrics.items())
    return Template((FILES / "model_card.md").read_text()).substitute(
        front_matter=ModelCardData(**facts).to_yaml(),
        control=card.control,
        sigma=f"{diffusion.sigma_max:g}",
        sigma_data=f"{diffusion.sigma_data:g}",
        blocks=net.blocks,
        control_blocks=net.control_blocks,
        hidden=net.hidden,
        channels=net.latent_channels,
        dtype=dtype,
        fps=f"{card.fps:g}",
        clip=card.clip,
        text_tokens=card.text_tokens,
        text_dim=net.text_dim,
        text_encoder=card.text_encoder,
        vae=card.vae,
        origin=origin,
        evaluation=f"| quantity | value |\n|---|---|\n{rows}" if rows else "None run.",
        terms=terms,
    )


# --- Reading ---


def import_huggingface(folder: Path) -> tuple[dict[str, Tensor], NetConfig]:
    """Weights under our names, in the type they are stored in, and the network's sizes. Zeros stand for the unused final layer.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ExportError: a file is damaged, or describes another network.
        WeightError: a tensor is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    net = _net_config({part: _read_json(folder / part / "config.json") for part in ("transformer", "controlnet")}, str(folder))
    weights = from_huggingface({part: _read_weights(folder / part) for part in ("transformer", "controlnet")}, str(folder))
    backend = LocalBackend(single_process().tp_group)
    stored = next(iter(weights.values())).dtype
    for name, value in named_weights(build(lambda: TransferNet(net, backend), "meta")).items():
        if name.startswith(_UNUSED):
            weights[name] = torch.zeros(value.shape, dtype=stored)
    _check(weights, net, str(folder))
    return weights, net


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing file of an exported student; export the folder again")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ExportError(f"{path}: not valid JSON ({error}); export the folder again") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of one model folder; with an index, each shard holds exactly what the index says."""
    index = folder / f"{STEM}.safetensors.index.json"
    where = _read_json(index)["weight_map"] if index.is_file() else None
    tensors: dict[str, Tensor] = {}
    for filename in sorted(set(where.values())) if where else [f"{STEM}.safetensors"]:
        path = folder / filename
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing weight file of an exported student; export the folder again")
        try:
            shard = load_file(path)
        except SafetensorError as error:
            raise ExportError(f"{path}: damaged weight file ({error}); export the folder again") from error
        listed = {name for name, file in where.items() if file == filename} if where else shard.keys()
        if wrong := sorted(listed ^ shard.keys()):
            raise ExportError(f"{path}: {wrong[0]!r} and {len(wrong) - 1} more are not where {index.name} says; export the folder again")
        tensors |= shard
    return tensors


# --- Checking ---


def check_export(folder: Path, weights: Mapping[str, Tensor], net: NetConfig, diffusion: DiffusionConfig) -> float:
    """Load a folder with diffusers alone, run its pipeline and our one-step sampler on the same input, in float32.

    Args:
        weights: what was exported; rounded to the folder's type before the comparison.

    Returns:
        max|theirs - ours| / max|ours| of the clean latents.

    Raises:
        ExportError: diffusers misses or does not know a tensor, or the difference is above 1e-5.
    """
    folder = Path(folder)
    stored = getattr(torch, _read_json(folder / "cosmos_mp_export.json")["dtype"])
    # Every check a reader may skip: no control, no padding or 24 frames per second would hide a mistake.
    draw = torch.Generator().manual_seed(0)
    frames = min(3, net.max_latent[0])
    height, width = (min(wanted, size // PATCH * PATCH) for wanted, size in zip((8, 12), net.max_latent[1:], strict=True))
    noise, control = (torch.randn(2, net.latent_channels, frames, height, width, generator=draw) for _ in range(2))
    text = torch.randn(2, 5, net.text_dim, generator=draw)
    padding = torch.zeros(8 * height, 8 * width)
    padding[:, : 8 * PATCH] = 1
    fps = 30.0

    with torch.no_grad():
        backend = LocalBackend(single_process().tp_group)
        network = build(lambda: TransferNet(net, backend), "cpu")
        load_weights(network, {name: value.to(stored) for name, value in weights.items()}, "the exported student")
        condition = Condition(text, control, torch.full((2,), fps), padding.expand(2, -1, -1))
        ours = one_step(Denoiser(network, diffusion), noise, condition).x0
    del network
    pipe = load_pipeline(folder)
    theirs = pipe(text, fps, control_latents=control, padding_mask=padding[None, None], noise=noise).frames
    difference = ((theirs - ours).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ExportError(f"{folder}: diffusers' answer differs from ours by {difference:.1e}, above {TOLERANCE:.0e}; export again")
    return difference


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """The folder's own pipeline in float32, loaded by diffusers; every tensor must be there and known.

    The code that diffusers copies while loading goes into a folder of its own for the moment, so that no home need be writable.

    Raises:
        ExportError: a tensor is missing, unexpected or of another shape.
    """
    with _module_cache():
        transformer, info = CosmosTransformer3DModel.from_pretrained(folder / "transformer", output_loading_info=True)
        pipe = DiffusionPipeline.from_pretrained(folder, transformer=transformer, trust_remote_code=True)
        _, control_info = type(pipe.controlnet).from_pretrained(folder / "controlnet", output_loading_info=True)
    for part, found in (("transformer", info), ("controlnet", control_info)):
        for kind, names in found.items():
            if names:
                raise ExportError(f"{folder / part}: diffusers reports {kind} {sorted(map(str, names))[:3]}; export the folder again")
    return pipe


@contextlib.contextmanager
def _module_cache() -> Iterator[None]:
    known, path = dynamic_modules_utils.HF_MODULES_CACHE, list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        dynamic_modules_utils.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            dynamic_modules_utils.HF_MODULES_CACHE = known
            sys.path[:] = path
