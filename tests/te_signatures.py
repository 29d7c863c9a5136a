"""Read the signatures of Transformer Engine that we and megatron-core use from its published wheels, as text: nothing is imported.

pip download --no-deps -d WHEELS transformer-engine==2.16.0, and ==2.19.0 and ==2.20.2 likewise; then
python tests/te_signatures.py WHEELS > tests/data/te_signatures.json
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

DPA = "pytorch/attention/dot_product_attention/dot_product_attention.py"
RECIPES = "common/recipe/__init__.py"
# Where we or megatron-core look a name up: (file that defines it, what of it, file that hands it on or "").
USED = {
    "pytorch.Linear": ("pytorch/module/linear.py", ("__init__", "forward"), "pytorch/__init__.py"),
    "pytorch.RMSNorm": ("pytorch/module/rmsnorm.py", ("__init__",), "pytorch/__init__.py"),
    "pytorch.ops.RMSNorm": ("pytorch/ops/basic/rmsnorm.py", ("__init__",), "pytorch/ops/__init__.py"),  # takes the other's **kwargs
    "pytorch.DotProductAttention": (DPA, ("__init__", "forward", "set_context_parallel_group"), "pytorch/__init__.py"),
    "pytorch.attention.dot_product_attention.dot_product_attention._attention_backends": (DPA, (), ""),
    "pytorch.autocast": ("pytorch/quantization.py", ("__init__",), "pytorch/__init__.py"),
    "pytorch.is_fp8_available": ("pytorch/quantization.py", (), "pytorch/__init__.py"),
    "pytorch.is_mxfp8_available": ("pytorch/quantization.py", (), "pytorch/__init__.py"),
    "pytorch.is_fp8_block_scaling_available": ("pytorch/quantization.py", (), "pytorch/__init__.py"),
    "common.recipe.DelayedScaling": (RECIPES, ("fields",), ""),
    "common.recipe.Float8CurrentScaling": (RECIPES, ("fields",), ""),
    "common.recipe.Float8BlockScaling": (RECIPES, ("fields",), ""),
    "common.recipe.MXFP8BlockScaling": (RECIPES, ("fields",), ""),
    # megatron-core's extension names these when it is imported.
    "pytorch.fp8.FP8GlobalStateManager": ("pytorch/quantization.py", (), "pytorch/fp8.py"),
    "pytorch.fp8.fp8_autocast": ("pytorch/quantization.py", (), "pytorch/fp8.py"),
    "pytorch.LayerNormLinear": ("pytorch/module/layernorm_linear.py", (), "pytorch/__init__.py"),
    "pytorch.GroupedLinear": ("pytorch/module/grouped_linear.py", (), "pytorch/__init__.py"),
    "pytorch.distributed.CudaRNGStatesTracker": ("pytorch/distributed.py", (), ""),
    "pytorch.ops.Sequential": ("pytorch/ops/sequential.py", (), "pytorch/ops/__init__.py"),
    "pytorch.ops.FusibleOperation": ("pytorch/ops/op.py", (), "pytorch/ops/__init__.py"),
    "pytorch.router.fused_compute_score_for_moe_aux_loss": ("pytorch/router.py", (), ""),
    "pytorch.router.fused_moe_aux_loss": ("pytorch/router.py", (), ""),
    "pytorch.router.fused_topk_with_score_function": ("pytorch/router.py", (), ""),
}
BASES = {
    "pytorch.Linear": ("pytorch/module/base.py", "pytorch/module/linear.py"),
    "pytorch.RMSNorm": ("pytorch/module/rmsnorm.py", "pytorch/ops/basic/rmsnorm.py", "pytorch/ops/op.py"),
    "pytorch.DotProductAttention": ("pytorch/module/base.py", DPA),
}
"""The files with a class that we derive from, and its own bases."""


def signature(function: ast.FunctionDef) -> str:
    """A function's parameters without types; every default becomes None."""
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if value is None else ast.Constant(None) for value in arguments.kw_defaults]
    return ast.unparse(arguments)


def fields(node: ast.ClassDef) -> str:
    """The parameters that a dataclass makes of its fields."""
    own = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    return ", ".join(["self", *(line.target.id + ("" if line.value is None else "=None") for line in own)])


def members(tree: ast.Module) -> set[str]:
    """Names that the classes of a file define, and that their methods set on `self`."""
    found = set()
    for node in (inner for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) for inner in (*kind.body, *ast.walk(kind))):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (part for whole in targets for part in getattr(whole, "elts", [whole])):
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                    found.add(target.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fast_setattr":
            found.add(node.args[0].value)
    return {name for name in found if not name.startswith("__")}


def definition(tree: ast.Module, name: str) -> ast.AST | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            return node
    return None


def hands_on(tree: ast.Module, name: str) -> bool:
    """Whether a file imports a name, or everything of some module."""
    lines = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(alias.name in (name, "*") for line in lines for alias in line.names)


def read(wheel: Path) -> dict[str, str]:
    """Parameters by name, such as `pytorch.Linear.__init__`; names that are there without being called as functions have "", and classes
    that we derive from the names of their members.

    Raises:
        KeyError: the wheel lacks a name.
    """
    found = {}
    with zipfile.ZipFile(wheel) as archive:

        def parse(file: str) -> ast.Module:
            return ast.parse(archive.read(f"transformer_engine/{file}"))

        for path, (file, parts, handed_on) in USED.items():
            name = path.rpartition(".")[2]
            node = definition(parse(file), name)
            if node is None or (handed_on and not hands_on(parse(handed_on), name)):
                raise KeyError(f"{wheel.name} has no {path}")
            found[path] = signature(node) if isinstance(node, ast.FunctionDef) else ""
            for part in parts:
                inner = {line.name: line for line in node.body if isinstance(line, ast.FunctionDef)}
                found[f"{path}.{'__init__' if part == 'fields' else part}"] = fields(node) if part == "fields" else signature(inner[part])
        for path, files in BASES.items():
            found[f"{path}.members"] = " ".join(sorted(set().union(*(members(parse(file)) for file in files))))
    return found


if __name__ == "__main__":
    wheels = sorted(Path(sys.argv[1]).glob("transformer_engine-*.whl"))
    json.dump({wheel.name.split("-")[1]: read(wheel) for wheel in wheels}, sys.stdout, indent=1)
    print()
