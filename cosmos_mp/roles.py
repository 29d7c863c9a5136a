"""Networks of a run by role: made, filled and placed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cosmos_mp.backends import choice
from cosmos_mp.backends.fp8 import emulate
from cosmos_mp.config import ConfigError, FP8Recipe, HeadConfig, NetConfig, TextConfig
from cosmos_mp.convert.huggingface import import_huggingface, read_sizes
from cosmos_mp.convert.nvidia import read_networks
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import initialize, load_weights
from cosmos_mp.parallel.apply import parallelize
from cosmos_mp.parallel.pieces import Pieces
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.presets import NEGATIVE_PROMPT
from cosmos_mp.text import build_text_encoder
from cosmos_mp.training.checkpoint import load_role, load_weights_of

Recompute = Literal["none", "selective", "full"]


def transfer_net(
    net: NetConfig,
    topology: Topology,
    recompute: Recompute = "none",
    dtype: torch.dtype = torch.float32,
    fp8: FP8Recipe | None = None,
) -> TransferNet:
    """An unfilled network, laid out over the ranks of the topology; with a recipe, its linears compute in FP8, or as if."""
    chosen = choice.choose(topology, recompute)
    with torch.device("meta"):
        network = TransferNet(net, choice.make(chosen, net, topology))
    if chosen.kind == "transformer_engine":
        from cosmos_mp.backends.transformer_engine import use_fp8

        if fp8 is not None:
            use_fp8(network, fp8)
        if topology.mesh is None:  # no FSDP gathers the weights in what it computes in
            dtype = torch.bfloat16
    elif fp8 is not None:
        emulate(network, fp8)
    return parallelize(network, topology, recompute_mode=recompute, dtype=dtype)


def new_transfer_net(
    net: NetConfig, topology: Topology, seed: int, recompute: Recompute = "none", fp8: FP8Recipe | None = None
) -> TransferNet:
    """A network with first values; arguments as `transfer_net` takes them."""
    network = transfer_net(net, topology, recompute, fp8=fp8)
    initialize(Pieces(network, topology), seed)
    return network


def load_transfer_net(
    net: NetConfig, topology: Topology, source: str, role: str, recompute: Recompute = "none", fp8: FP8Recipe | None = None
) -> TransferNet:
    """A network with the weights of `source`, loaded strictly; every rank reads its own part of them.

    Args:
        source: what `read_weights` takes.
        role: whose weights, where the source is a run.
        recompute, fp8: as `transfer_net` takes them.
    """
    check_sizes(source, net)
    network = transfer_net(net, topology, recompute, fp8=fp8)
    pieces = Pieces(network, topology)
    if is_run(source):
        table = {name: pieces.as_stored(name, piece.parameter.detach()) for name, piece in pieces.items()}
        load_role(Path(source), role, table, topology=topology)
    else:
        load_weights(pieces, read_weights(source, role), source)
    return network


def is_run(source: str) -> bool:
    """Whether weights come from a run or checkpoint folder of ours."""
    return Path(source).is_dir() and not (Path(source) / "model_index.json").is_file()


def check_sizes(source: str, net: NetConfig) -> None:
    """Refuse a run or Hugging Face folder that records other sizes than `net`: the rotary ratios, for one, fit any weights.

    Raises:
        ConfigError: they differ; the message names folder and options.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        found = dataclasses.asdict(read_sizes(folder))
    elif (folder / "config.json").is_file():
        try:
            found = dict(json.loads((folder / "config.json").read_text())["net"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder / 'config.json'} is not a run's ({error!r}); name a run folder, a folder with model_index.json or weight files"
            ) from None
    else:
        return
    wanted = json.loads(json.dumps(dataclasses.asdict(net)))
    found = json.loads(json.dumps(found))
    differing = [f"net.{key}={found.get(key)}, here {value}" for key, value in wanted.items() if found.get(key) != value]
    if differing:
        raise ConfigError(
            f"{source} holds another network ({'; '.join(differing)}); name the preset or net.* options that it was made with"
        )


def read_weights(source: str, role: str) -> dict[str, Tensor]:
    """Weights under our names.

    Args:
        source: a run or checkpoint folder of ours (the average of the role where one is kept), a Hugging Face folder, NVIDIA's combined
            teacher or student file, or two files joined by a comma, base and control.
        role: whose weights, where the source is a run.
    """
    if not source:
        raise ConfigError(f"no weights given for the {role}: name a run folder or a weight file")
    path = Path(source)
    if (path / "model_index.json").is_file():
        return import_huggingface(path)[0]
    if is_run(source):
        return load_weights_of(path, role)
    return read_networks([Path(part) for part in source.split(",")])


def new_discriminator(net: NetConfig, head: HeadConfig, topology: Topology, seed: int) -> Discriminator:
    """A discriminator with first values for features of the network's width."""
    with torch.device("meta"):
        discriminator = Discriminator(net.hidden, head)
    parallelize(discriminator, topology)
    initialize(Pieces(discriminator, topology), seed)
    return discriminator


def unconditional_text(kind: str, prompt: str, text: TextConfig, device: torch.device) -> Tensor:
    """Embedding (L, D) of the unconditional branch: zeros, or the negative prompt (the recipe's own where `prompt` is empty)."""
    if kind == "empty":
        return torch.zeros(text.tokens, text.dim, device=device)
    return build_text_encoder(text, device).encode([prompt or NEGATIVE_PROMPT])[0].to(device)
