"""Which backend a run gets: what it asks for, and what is found on the machine."""

from __future__ import annotations

import importlib
from typing import Literal, NamedTuple

from packaging.version import Version

from cosmos_mp.backends import Backend
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import ConfigError, NetConfig
from cosmos_mp.parallel.topology import Topology

OLDEST = Version("2.16")
INSTALL = (
    "install it with `pip install --no-build-isolation 'transformer_engine[pytorch]>=2.16'`, or run in NVIDIA's PyTorch container, "
    "26.06 or later, or set backend.kind to local"
)


class Choice(NamedTuple):
    """What was chosen; the version, or in words why it is no other."""

    kind: Literal["local", "transformer_engine"]
    words: str


def found() -> tuple[Version | None, str]:
    """The installed Transformer Engine, or None and why not."""
    try:
        importlib.import_module("transformer_engine.pytorch")
        return Version(importlib.import_module("transformer_engine").__version__), ""
    except ModuleNotFoundError as error:
        return None, f"Transformer Engine is not installed ({error})"
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA, or no driver
        return None, f"Transformer Engine is there but does not load ({error})"


def choose(topology: Topology, recompute: str = "none") -> Choice:
    """The backend of a run's networks.

    Args:
        topology: its device, its layout, and what it asks of its layers.
        recompute: what is computed again in the backward pass.

    Raises:
        ConfigError: what is asked for cannot run here; the message names the option and the remedy.
    """
    options, parallel, cuda, fsdp = topology.backend, topology.options, topology.device.type == "cuda", topology.mesh is not None
    if options.kind == "local":
        return _local(topology, "as asked for")
    if options.fp8 == "emulate":
        return _local(topology, "backend.fp8=emulate")
    bf16 = parallel.compute == "bfloat16" or (parallel.compute == "auto" and cuda)
    open_ = options.kind == "auto" and options.fp8 != "native"
    if open_ and not cuda:
        return _local(topology, "no GPU")
    if open_ and not (fsdp and bf16):
        return _local(topology, "networks compute in float32")
    version, missing = found()
    if open_ and version is None:
        return _local(topology, missing)

    asked = "backend.fp8=native" if options.fp8 == "native" else f"backend.kind={options.kind}"
    if version is None:
        raise ConfigError(f"{asked}: {missing}; {INSTALL}")
    if not cuda:
        raise ConfigError(f"{asked} needs a GPU: set backend.kind to local and backend.fp8 to off or emulate")
    if fsdp and version < OLDEST:
        raise ConfigError(
            f"{asked}: under FSDP2, Transformer Engine {version} leaks FP8 weights, and its all-to-all attention errs; "
            f"{OLDEST} mended both: {INSTALL}"
        )
    if fsdp and not bf16:
        raise ConfigError(f"{asked}: its attention computes in bfloat16; set parallel.compute to bfloat16, or backend.kind to local")
    if recompute == "selective":
        raise ConfigError(
            f"{asked}: train.recompute=selective knows torch's operators by name, and none of Transformer Engine's; set it to full or none"
        )
    roles = f", FP8 ({options.recipe}) for {', '.join(options.fp8_roles)}" if options.fp8 == "native" else ""
    return Choice("transformer_engine", f"{version}{roles}")


def _local(topology: Topology, words: str) -> Choice:
    if topology.options.cp_attention == "ulysses_ring":
        raise ConfigError(
            f"parallel.cp_attention=ulysses_ring is Transformer Engine's alone, and the backend is local ({words}): give ulysses or ring"
        )
    return Choice("local", words)


def make(choice: Choice, net: NetConfig, topology: Topology) -> Backend:
    """The chosen backend, for networks of these sizes."""
    if choice.kind == "local":
        return LocalBackend(topology.tp_group)
    from cosmos_mp.backends.transformer_engine import TransformerEngineBackend

    return TransformerEngineBackend(net, topology.tp_group, sequence_parallel=topology.options.sequence_parallel)
