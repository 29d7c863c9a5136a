"""The Nsight lines: what would be run, what is run with stand-ins for the two tools, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = "import json, os, sys\njson.dump(sys.argv[1:], open(os.environ['SEEN'], 'w'))\nsys.exit(7)\n"
NSYS = "profile -s none -t nvtx,cuda -o REPORT --force-overwrite true --capture-range=cudaProfilerApi --capture-range-end=stop"
NCU = "--set full --nvtx --nvtx-include RANGE/ --clock-control none --profile-from-start off -o REPORT -f"
ALWAYS = "--profile.kind nsight --train.iterations 15 --train.picture_every 0".split()


@pytest.fixture
def profile(tmp_path):
    """Run the script on a PATH with stand-ins for the tools, which note their words and end with 7; `tools` says which are there."""

    def run(*words: str, tools: tuple[str, ...] = ("nsys", "ncu")):
        (tmp_path / "bin").mkdir()
        for name in tools:
            (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{TOOL}")
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "SEEN": str(tmp_path / "seen")}
        command = ["bash", "examples/profile_nsight.sh", *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        seen = json.loads((tmp_path / "seen").read_text()) if (tmp_path / "seen").exists() else None
        return done, seen

    return run


def printed(output: str) -> list[str]:
    lines = output.splitlines()
    return shlex.split(lines[lines.index("== command") + 1])


def test_a_dry_run_shows_the_line_of_nsight_systems_and_checks_the_stage(profile):
    words = ["--parallel.cp", "8", "--gpus", "8", "--dry-run"]
    done, seen = profile("nsys", "dmd2", "transfer1_7b_edge_dmd2", *words)
    assert done.returncode == 0 and seen is None, done.stderr
    stage = ["bash", "examples/train_node.sh", "dmd2", "transfer1_7b_edge_dmd2", "--out", "runs/profile", *ALWAYS, *words]
    assert printed(done.stdout) == ["nsys", *NSYS.replace("REPORT", "runs/profile/nsys").split(), *stage]
    assert "8,129,705,760 parameters" in done.stdout and "layout: 8 processes = tp 1 x cp 8" in done.stdout


def test_a_dry_run_shows_the_line_of_nsight_compute_and_checks_the_stage(profile):
    done, seen = profile("ncu", "kd", "tiny_kd", "--range", "blk3.mlp", "--out", "elsewhere", "--dry-run")
    assert done.returncode == 0 and seen is None, done.stderr
    stage = ["python", "pretrain_scripts/pretrain_kd.py", "tiny_kd", "--out", "runs/profile", *ALWAYS, "--out", "elsewhere", "--dry-run"]
    assert printed(done.stdout) == ["ncu", *NCU.replace("REPORT", "runs/profile/ncu").replace("RANGE", "blk3.mlp").split(), *stage]
    assert '"out": "elsewhere"' in done.stdout  # the later one counts


@pytest.mark.parametrize(("tool", "line"), [("nsys", NSYS), ("ncu", NCU)])
def test_the_tool_is_run_with_these_words_and_its_code_is_the_scripts(profile, tmp_path, tool, line):
    report = str(tmp_path / "new" / "report")
    done, seen = profile(tool, "teacher", "tiny_teacher", "--report", report)
    assert done.returncode == 7 and [tool, *seen] == printed(done.stdout)
    assert seen[: len(line.split())] == line.replace("REPORT", report).replace("RANGE", "blk0.attn").split()
    assert Path(report).parent.is_dir()


def test_a_window_that_the_run_does_not_reach_is_named(profile):
    done, _ = profile("ncu", "kd", "tiny_kd", "--profile.start", "20", "--profile.stop", "22", "--dry-run")
    assert done.returncode == 1 and "profile.start=20 comes after the last of train.iterations=15" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nsys", "kd"],
        ["perf", "kd", "tiny_kd"],
        ["nsys", "pairs", "tiny_pairs"],
        ["nsys", "kd", "--dry-run"],
        ["nsys", "kd", "tiny_kd", "--range", "blk0.attn"],
        ["ncu", "kd", "tiny_kd", "--report"],
    ],
)
def test_what_is_not_understood_is_answered_with_the_usage(profile, words):
    done, seen = profile(*words)
    assert done.returncode == 2 and seen is None
    assert done.stderr.startswith("A few iterations of a stage under Nsight") and "[--range NAME]" in done.stderr


def test_a_missing_tool_is_named(profile):
    done, _ = profile("nsys", "kd", "tiny_kd", tools=())
    assert done.returncode == 1 and "error: no nsys on PATH" in done.stderr
