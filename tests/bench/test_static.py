"""Every launch at the 7B's size, compiled ahead of time: no spills, full-width accesses, modelled traffic near the least, few registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cosmos_mp.bench import static
from cosmos_mp.kernels.language import Shipped

LAUNCHES = {
    "adaln": 6,
    "dmd2_loss": 3,
    "gan_head": 3,
    "qk_norm_rope": 6,
}
"""Launches that each kernel's file lists."""


@pytest.fixture(scope="module")
def audits(tmp_path_factory) -> list[dict]:
    """In a process of its own: here the kernels are interpreted."""
    file = tmp_path_factory.mktemp("static") / "static.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cosmos_mp", "bench", "static", "--json", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert static.table(found) in done.stdout and len(found["commit"]) >= 7
    return found["rows"]


def test_every_launch_is_compiled_for_both_architectures(audits):
    for kernel, launches in LAUNCHES.items():
        names = [row["name"] for row in audits if row["name"].split()[0] == kernel]
        assert len(names) == 2 * launches and len(set(names)) == launches, kernel
    assert {row["name"].split()[0] for row in audits} == set(LAUNCHES)
    assert {row["capability"] for row in audits} == {90, 100}


def test_nothing_spills(audits):
    assert [row for row in audits if row["stack"] or row["local"]] == []


def test_accesses_are_16_bytes_wide_but_for_scalars(audits):
    assert [row for row in audits if row["narrow"] != row["scalars"] or not row["wide"]] == []


def test_traffic_is_the_least_possible(audits):
    """Between: a ratio far below 1 would mean that accesses are missed, or that the formula is wrong."""
    assert [row for row in audits if not 0.99 <= row["ratio"] <= 1.02] == []


def test_registers_leave_the_occupancy_that_is_meant(audits):
    assert [row for row in audits if row["registers"] > row["cap"]] == []


PTX = """
	ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd1 + 0 ];
$L__BB0_2:                              // %body
	@%p1 ld.global.b32 { %r5 }, [ %rd2 + 0 ];
	st.global.v4.b32 [ %rd3 + 0 ], { %r1, %r2, %r3, %r4 };
	st.shared.v4.b32 [ %r9 + 0 ], { %r1, %r2, %r3, %r4 };
	@%p2 bra 	$L__BB0_2;
	@%p3 bra 	$L__BB0_4;
	st.global.b16 [ %rd4 + 0 ], { %rs1 };
$L__BB0_4:
	ret;
"""


def test_traffic_counts_a_loops_body_once_per_trip_and_a_scalar_once_per_program():
    launch = Shipped("made up", None, {}, {}, warps=2, programs=10, least_bytes=1, registers=1, trips=7)
    wide, narrow, moved = static._traffic(PTX, launch)
    assert (wide, narrow) == (3, 2)
    assert moved == 10 * (2 * 16 * 64 + 7 * (16 * 64 + 4) + 2)


def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="leave TRITON_INTERPRET unset"):
        static.audit(static.shipped()[0], 90)
