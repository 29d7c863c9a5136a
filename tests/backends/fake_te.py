"""A stand-in for Transformer Engine, which needs a GPU and cannot run here: for tests alone.

Its classes take exactly the arguments that the real ones of a version take (tests/data/te_signatures.json), and compute with torch on one
process. What it cannot show: numbers in FP8, kernels, communication.
"""

from __future__ import annotations

import inspect
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGNATURES: dict[str, dict[str, str]] = json.loads((Path(__file__).parents[1] / "data" / "te_signatures.json").read_text())


class _Module(nn.Module):
    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None: ...


class Linear(_Module):
    def __init__(self, **given: Any):
        super().__init__()
        self.given, self.calls, self.parallel_mode = given, [], given["parallel_mode"]
        self.fp8 = False
        tp = given["tp_group"].size()
        self.tp_size, self.sequence_parallel = tp, tp > 1 and given["sequence_parallel"]
        outputs = given["out_features"] // (tp if self.parallel_mode == "column" else 1)
        inputs = given["in_features"] // (tp if self.parallel_mode == "row" else 1)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=given["params_dtype"], device=given["device"]))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Tensor:
        recipe = autocast.regions[-1] if autocast.regions else None
        self.fp8 = recipe is not None  # the real one keeps its state there, between forwards too
        self.calls.append((is_first_microbatch, recipe))
        return F.linear(inp, self.weight)


class RMSNorm(_Module):
    def __init__(self, normalized_shape: int, eps: float, params_dtype: torch.dtype, device: str, **_: Any):
        super().__init__()
        self.eps, self.calls = eps, 0
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DotProductAttention(_Module):
    def __init__(self, **given: Any):
        super().__init__()
        self.given, self.context_parallel = given, None

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p", **_: Any) -> None:
        self.context_parallel = (cp_group, cp_global_ranks, cp_stream, cp_comm_type)

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, mask: None, **given: Any) -> Tensor:
        assert mask is None and given == {"attn_mask_type": "no_mask"}, given
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)


class autocast:
    """Remembers which regions are open: the recipe of each, a default one where none is given, None where FP8 is off."""

    regions: list[Any] = []

    def __init__(self, enabled: bool = True, recipe: Any = None, **_: Any):
        self.recipe = (recipe or Recipe()) if enabled else None

    def __enter__(self) -> None:
        self.regions.append(self.recipe)

    def __exit__(self, *_: object) -> None:
        self.regions.pop()


class Recipe:
    def __init__(self, **_: Any): ...


def _checked(cls: type, name: str, signatures: dict[str, str]) -> type:
    """The class, whose methods refuse what the real ones do not take."""

    def guarded(method: str) -> Any:
        real = inspect.signature(eval(f"lambda {signatures[f'{name}.{method}']}: None"))
        extra = inspect.signature(eval(f"lambda {signatures['pytorch.ops.RMSNorm.__init__']}: None"))
        own = getattr(cls, method)

        def call(self, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(real.bind(self, *args, **kwargs).arguments)
            arguments.pop("self")
            more = arguments.pop("kwargs", {})
            assert more.keys() <= extra.parameters.keys(), f"{name}.{method} does not take {more}"
            if method == "__init__":
                return own(self, **arguments, **more)
            return own(self, *args, **kwargs)

        return call

    methods = {key.rpartition(".")[2] for key in signatures if key.startswith(name + ".") and key.count(".") == name.count(".") + 1} - {
        "members"
    }
    return type(name.rpartition(".")[2], (cls,), {method: guarded(method) for method in methods})


def _tells(has: bool, reason: str, return_reason: bool = False) -> Any:
    return (has, reason) if return_reason else has


def make(version: str, has: dict[str, bool] | None = None) -> dict[str, ModuleType]:
    """Modules for `sys.modules` by name.

    Args:
        version: whose arguments are taken; another than those of the fixture takes the oldest's.
        has: whether the GPU has what `is_<key>_available` tells of; all of it if not given.
    """
    signatures = SIGNATURES.get(version) or min(SIGNATURES.items())[1]
    modules = {"transformer_engine": ModuleType("transformer_engine")}
    modules["transformer_engine"].__version__ = version

    def module(path: str) -> ModuleType:
        name = f"transformer_engine.{path}" if path else "transformer_engine"
        if name not in modules:
            parent, _, last = path.rpartition(".")
            modules[name] = ModuleType(name)
            setattr(module(parent), last, modules[name])
        modules[name].__path__ = []
        return modules[name]

    standing_in = {"Linear": Linear, "RMSNorm": RMSNorm, "DotProductAttention": DotProductAttention, "autocast": autocast}
    for path, parameters in signatures.items():
        where, _, name = path.rpartition(".")
        if name in ("__init__", "forward", "set_context_parallel_group", "members"):
            continue
        if name.endswith("_available"):
            kind = name.removeprefix("is_").removesuffix("_available")
            assert parameters == "return_reason=None"
            value: Any = partial(_tells, (has or {}).get(kind, True), f"no {kind} here")
        elif name == "_attention_backends":
            value = {"use_fused_attention": True, "use_flash_attention": False, "use_unfused_attention": False}
        elif where == "pytorch" and name in standing_in:
            value = _checked(standing_in[name], path, signatures)
        elif where == "common.recipe":
            value = _checked(Recipe, path, signatures)
        else:
            value = type(name, (nn.Module,), {})
        setattr(module(where), name, value)
    return modules


def install(monkeypatch: Any, version: str, has: dict[str, bool] | None = None) -> dict[str, ModuleType]:
    """Let imports find the stand-in, in megatron-core's extension too, until the test ends."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    modules = make(version, has)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    import megatron.core.extensions
    import megatron.core.utils

    import cosmos_mp.backends

    monkeypatch.setattr(megatron.core.utils, "_te_version", None)
    for package in (megatron.core.extensions, cosmos_mp.backends):
        # Both are made anew here, and what was there before comes back.
        for table, name in ((sys.modules, f"{package.__name__}.transformer_engine"), (package.__dict__, "transformer_engine")):
            monkeypatch.setitem(table, name, None)
            del table[name]
    return modules
