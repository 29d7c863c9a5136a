"""The shell scripts: their syntax and options, and the shortened quickstart, killed once on its way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_mp.data.video import probe

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for room in ("examples", "tests") for path in (ROOT / room).rglob("*.sh"))
SCRIPTS += [path.relative_to(ROOT).as_posix() for path in (ROOT / ".ci").glob("*")]


def test_the_scripts_are_found():
    assert {"examples/quickstart.sh", "examples/setup.sh", "tests/run.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--fats"], ["--seed"], ["--out"], ["--fast", "--videos"]])
def test_a_wrong_option_ends_with_2_and_the_usage_before_anything_runs(words):
    done = subprocess.run(["bash", "examples/quickstart.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "bash examples/quickstart.sh [--fast] [--videos DIR] [--out DIR] [--seed N]" in done.stdout + done.stderr
    assert "==" not in done.stdout
    if words[0].startswith("--fats"):
        assert "unknown option --fats" in done.stderr


def test_the_clip_of_a_large_folder_is_its_first(tmp_path):
    """A pipe whose reader stops early fails under pipefail, and only once its text is longer than the pipe."""
    records = [{"id": f"{i:06d}", "video": f"videos/{i:06d}.webm", "caption": "x" * 60} for i in range(5000)]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    first = next(line for line in (ROOT / "examples" / "quickstart.sh").read_text().splitlines() if line.startswith("first()"))
    script = f'set -euo pipefail\nindex={tmp_path} PATH="{Path(sys.executable).parent}:$PATH"\n{first}\necho "$(first video) $(first id)"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "videos/000000.webm 000000\n")


def test_set_up_installs_only_what_is_not_there(tmp_path):
    """`python` writes down what it is asked: whether pip would run is all that counts here."""
    for name in ("examples", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("examples/setup.sh", "setup.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@" >>"$0.log"\n')
    python.chmod(0o755)

    def installs(extras: str) -> bool:
        log = python.with_name("python.log")
        log.unlink(missing_ok=True)
        subprocess.run(["bash", "-euo", "pipefail", "-c", f". examples/setup.sh; set_up '{extras}'"], cwd=tmp_path, check=True)
        return "pip install" in log.read_text()

    assert [installs(extras) for extras in ("", "", "test", "test", "", "test")] == [True, False, True, False, False, False]
    with (tmp_path / "setup.py").open("a") as file:
        file.write("# another version\n")
    assert [installs(extras) for extras in ("", "")] == [True, False]


# --- The shortened quickstart ---


def start(out: Path, log: Path) -> subprocess.Popen:
    command = ["bash", "examples/quickstart.sh", "--fast", "--out", str(out)]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def finish(out: Path, log: Path) -> str:
    """Run to the end; returns what it printed."""
    process = start(out, log)
    try:
        code = process.wait(timeout=1200)
    finally:
        stop(process)
    said = log.read_text()
    assert code == 0, said[-4000:]
    return said


def stop(process: subprocess.Popen) -> None:
    """kill -9 of the script and of everything that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measured(out: Path) -> dict:
    """The results but for wall times."""
    results = json.loads((out / "evaluation" / "results.json").read_text())
    variants = {
        name: {key: value for key, value in values.items() if not key.endswith("_ms")} for name, values in results["variants"].items()
    }
    return {"variants": variants, "checks": results["checks"], "metrics": results["metrics"]}


def made(out: Path) -> dict[str, int]:
    """When each file was made that a finished run must not make again."""
    kept = [
        "videos/videos/*",
        "tokenizer/*",
        "clips/*/shard_*",
        "pairs/shard_*",
        "*/checkpoints/*/*",
        "evaluation/latents/*",
        "student/**/*",
    ]
    files = {pattern: [path for path in out.glob(pattern) if path.is_file()] for pattern in kept}
    assert all(files.values()), [pattern for pattern, found in files.items() if not found]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for found in files.values() for path in found}


@pytest.mark.quickstart
def test_the_shortened_quickstart_survives_kill_9_and_a_finished_one_changes_nothing(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log.txt"
    process = start(out, log)
    try:
        process.wait(timeout=random.Random(1).uniform(20, 60))
        pytest.fail(f"ended before it could be killed, with status {process.returncode}:\n{log.read_text()[-4000:]}")
    except subprocess.TimeoutExpired:
        stop(process)

    said = finish(out, log)
    for name in ("comparison.png", "report.html", "results.json", "clip.mp4", "config.json"):
        assert (out / "evaluation" / name).stat().st_size > 0, name
        assert name not in ("comparison.png", "report.html", "results.json") or str(out / "evaluation" / name) in said
    facts = probe(out / "sample.mp4")
    assert (facts.num_frames, facts.height, facts.width) == (9, 64, 64)
    assert (out / "student" / "model_index.json").is_file()
    assert "loaded again with diffusers" in said
    results = measured(out)
    assert list(results["variants"]) == ["teacher", "teacher 1-step", "KD", "DMD2 without GAN", "DMD2"]
    assert [values["calls"] for values in results["variants"].values()] == [72, 1, 1, 1, 1]
    assert len(results["checks"]) == 3 and all(item["passed"] for item in results["checks"])
    assert "network calls per clip" in said

    before, clip = made(out), (out / "sample.mp4").read_bytes()
    finish(out, log)
    assert measured(out) == results
    after = made(out)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()
    assert (out / "sample.mp4").read_bytes() == clip
