"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, width and bytes of every access to global memory.

Each launch that a kernel's file lists is compiled ahead of time with the alignment that torch's allocator gives. Traffic is modelled:
widths of the accesses in PTX, times threads and programs, a loop's body times its trips; what caches save is not in it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from cosmos_mp.bench.parallel import markdown
from cosmos_mp.kernels import adaln, dmd2_loss, gan_head, qk_norm_rope
from cosmos_mp.kernels.language import Shipped, triton
from cosmos_mp.revision import revision

CAPABILITIES = (90, 100)
ALIGNED = 16
"""Pointers and row strides are multiples of this many bytes and elements; the JIT finds that out for itself at run time."""


@dataclass(frozen=True)
class Audit:
    """One launch on one architecture.

    Attributes:
        registers: per thread; `cap` is what the launch is meant to keep.
        stack, local: bytes of stack, and instructions on local memory: spills.
        wide, narrow: accesses to global memory of 16 bytes per thread, and smaller ones.
        bytes: modelled traffic of the launch; `ratio` is that over the least possible.
    """

    name: str
    capability: int
    registers: int
    cap: int
    stack: int
    local: int
    wide: int
    narrow: int
    scalars: int
    bytes: float
    ratio: float


def shipped() -> list[Shipped]:
    """The launches of all kernels."""
    return [launch for kernel in (adaln, dmd2_loss, gan_head, qk_norm_rope) for launch in kernel.shipped()]


def audit(launch: Shipped, capability: int) -> Audit:
    """Compile a launch and read what came out.

    Raises:
        RuntimeError: Triton is not installed, or TRITON_INTERPRET is set: there is nothing to compile then.
    """
    ptx, cubin = _compile(launch, capability)
    resources, instructions = _inspect(cubin)
    wide, narrow, moved = _traffic(ptx, launch)
    return Audit(
        launch.name,
        capability,
        registers=resources["REG"],
        cap=launch.registers,
        stack=resources["STACK"],
        local=instructions,
        wide=wide,
        narrow=narrow,
        scalars=launch.scalars,
        bytes=moved,
        ratio=moved / launch.least_bytes,
    )


def bench_static() -> dict[str, Any]:
    """Audits of all launches on all architectures, printed as a table."""
    rows = [asdict(audit(launch, capability)) for launch in shipped() for capability in CAPABILITIES]
    found = {"date": str(date.today()), "commit": revision(), "triton": triton.__version__, "rows": rows}
    print(table(found))
    return found


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, a launch on its architectures in one line."""
    rows = [["launch at CP8", "registers sm_90, sm_100", "cap", "spills", "16-byte accesses", "other than scalars", "MB", "of the least"]]
    for first, *others in zip(*(found["rows"][start :: len(CAPABILITIES)] for start in range(len(CAPABILITIES))), strict=True):
        both = (first, *others)
        registers = ", ".join(str(row["registers"]) for row in both)
        spills = sum(row["stack"] + row["local"] for row in both)
        narrow = max(row["narrow"] - row["scalars"] for row in both)
        numbers = [registers, first["cap"], spills, first["wide"], narrow, f"{first['bytes'] / 1e6:.1f}", f"{first['ratio']:.2f}"]
        rows.append([first["name"], *map(str, numbers)])
    return markdown(rows)


def _compile(launch: Shipped, capability: int) -> tuple[str, bytes]:
    if triton is None or not hasattr(launch.kernel, "arg_names") or triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled by Triton: install it, and leave TRITON_INTERPRET unset")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: "constexpr" if name in launch.constants else launch.signature[name] for name in names}
    places = {name: index for index, name in enumerate(names)}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in launch.aligned]
    attributes = {(places[name],): [["tt.divisibility", ALIGNED]] for name in aligned}
    source = ASTSource(launch.kernel, signature, {(places[name],): value for name, value in launch.constants.items()}, attributes)
    # Contraction of multiply and add is Triton's default up to 3.9; named, so that results do not depend on the version.
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.asm["ptx"], compiled.asm["cubin"]


def _inspect(cubin: bytes) -> tuple[dict[str, int], int]:
    """Resources of the kernel, and its instructions on local memory."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said, code = (_run(tools / "cuobjdump", "-res-usage", file.name), _run(tools / "nvdisasm", "-c", file.name))
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    return resources, len(re.findall(r"\b(?:LDL|STL)\b", code))


def _run(*words: object) -> str:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True).stdout


ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.[\w:]+)*?(?:\.(v2|v4|v8))?\.[a-z](8|16|32|64|128)\b")
"""Of PTX: how many elements of how many bits."""


def _traffic(ptx: str, launch: Shipped) -> tuple[int, int, float]:
    """Wide accesses, narrow ones, and bytes of the launch. A narrow one is a scalar: the same address in all threads of a program."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0].strip(): index for index, line in enumerate(lines) if re.match(r"\s*\$\w+:", line)}
    loops = [(labels[target], index) for index, line in enumerate(lines) for target in re.findall(r"\bbra(?:\.uni)?\s+(\$\w+)", line)]
    loops = [(first, last) for first, last in loops if first < last]
    wide, narrow, moved = 0, 0, 0.0
    for index, line in enumerate(lines):
        found = ACCESS.search(line)
        if found is None:
            continue
        size = int((found.group(1) or "v1")[1:]) * int(found.group(2)) // 8
        trips = launch.trips if any(first < index < last for first, last in loops) else 1
        full = size >= 16
        wide, narrow = wide + full, narrow + (not full)
        moved += size * trips * launch.programs * (32 * launch.warps if full else 1)
    return wide, narrow, moved
