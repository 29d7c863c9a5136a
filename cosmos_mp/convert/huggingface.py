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
from cosmos_mp.convert.hf_names import UNUSED, ExportError, configs, from_huggingface, net_config, to_huggingface
from cosmos_mp.convert.nvidia import compact
from cosmos_mp.diffusion.edm import Condition, Denoiser
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.kernels.qk_norm_rope import EPS
from cosmos_mp.models.embeddings import PATCH
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import build, load_weights, named_weights
from cosmos_mp.parallel.topology import single_process

FILES = Path(__file__).with_name("hf_files")
CONTROLNET, PIPELINE = "cosmos_transfer1_controlnet", "pipeline_cosmos_transfer1_distilled"
STEM = "diffusion_pytorch_model"
TOLERANCE = 1e-5


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
        "left_out": sorted(name for name in weights if name.startswith(UNUSED)),
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
    net = read_sizes(folder)
    weights = from_huggingface({part: _read_weights(folder / part) for part in ("transformer", "controlnet")}, str(folder))
    backend = LocalBackend(single_process().tp_group)
    stored = next(iter(weights.values())).dtype
    for name, value in named_weights(build(lambda: TransferNet(net, backend), "meta")).items():
        if name.startswith(UNUSED):
            weights[name] = torch.zeros(value.shape, dtype=stored)
    _check(weights, net, str(folder))
    return weights, net


def read_sizes(folder: Path) -> NetConfig:
    """The network's sizes alone; errors as of `import_huggingface`."""
    return net_config({part: _read_json(folder / part / "config.json") for part in ("transformer", "controlnet")}, str(folder))


def _check(weights: Mapping[str, Tensor], net: NetConfig, source: str) -> None:
    """Strictly, on the meta device: nothing is copied."""
    backend = LocalBackend(single_process().tp_group)
    load_weights(build(lambda: TransferNet(net, backend), "meta"), weights, source)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing file of an exported student; export the folder again")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ExportError(f"{path}: not valid JSON ({error}); export the folder again") from None
    if not isinstance(values, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(values).__name__}; export the folder again")
    return values


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
