"""Every command of the README is understood, and runs as far as small data carry it."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cosmos_mp import commands
from cosmos_mp.__main__ import COMMANDS
from cosmos_mp.bench import cpu, fp8, gpu, parallel, static
from cosmos_mp.cli import stage
from cosmos_mp.config import DMD2Run, KDRun, PairsRun, TeacherRun
from cosmos_mp.evaluate.report import markdown_table, number

ROOT = Path(__file__).parents[1]
STAGES = {"pretrain_teacher": TeacherRun, "generate_pairs": PairsRun, "pretrain_kd": KDRun, "pretrain_dmd2": DMD2Run}


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def _words(start: str) -> list[list[str]]:
    """Words after `start` of every command that begins so."""
    return [shlex.split(line)[len(shlex.split(start)) :] for line in _commands() if line.startswith(start)]


def test_every_command_is_of_a_kind_that_is_tested_here():
    # parallel_cpu.sh runs in tests/examples/test_parallel_cpu.py
    scripts = ("bash examples/quickstart.sh", "bash tests/run.sh", "bash examples/parallel_cpu.sh", "bash examples/train_node.sh ")
    scripts += ("bash examples/profile_nsight.sh ", "bash tests/gpu/run.sh")
    known = (*scripts, "python -m cosmos_mp ", "python pretrain_scripts/")
    assert _commands() and all(line.startswith(known) for line in _commands())
    assert {words[0] for words in _words("python -m cosmos_mp")} == {
        "index",
        "cache-text",
        "encode",
        "evaluate",
        "convert",
        "sample",
        "bench",
    }


def test_stage_commands_resolve(capsys):
    lines = [shlex.split(line) for line in _commands() if "pretrain_scripts/" in line]
    assert len(lines) >= 2
    for words in lines:
        script = next(index for index, word in enumerate(words) if word.startswith("pretrain_scripts/"))
        path = ROOT / words[script]
        assert importlib.util.spec_from_file_location("script", path) and path.is_file()
        stage(STAGES[path.stem], lambda config: pytest.fail("a dry run ran"), [*words[script + 1 :], "--dry-run"])
        assert "8,129,705,760 parameters" in capsys.readouterr().out


def test_node_commands_check_their_configuration():
    lines = [line for line in _commands() if line.startswith("bash examples/train_node.sh")]
    assert len(lines) >= 3
    for line in lines:
        done = subprocess.run(shlex.split(line) + ["--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "8,129,705,760 parameters" in done.stdout, done.stdout + done.stderr


def test_profile_commands_check_their_configuration():
    lines = [line for line in _commands() if line.startswith("bash examples/profile_nsight.sh")]
    assert [shlex.split(line)[2] for line in lines] == ["nsys", "ncu"]
    for line in lines:
        done = subprocess.run(shlex.split(line) + ["--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "56,320 tokens of width 4096" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["encode", "evaluate", "sample"])
def test_preset_commands_resolve(name, capsys):
    lines = _words(f"python -m cosmos_mp {name}")
    assert lines
    for words in lines:
        COMMANDS[name]([*words, "--dry-run"])
        assert f'"stage": "{name}"' in capsys.readouterr().out


def test_index_and_cache_text_run(tmp_path, monkeypatch, capsys, save_t5):
    monkeypatch.chdir(tmp_path)
    commands.synthesize(["datasets/dmd2", "2", "--frames", "121", "--height", "256", "--width", "256"])
    save_t5(tmp_path / "checkpoints" / "google-t5" / "t5-11b", d_model=1024)
    ((videos,),) = _words("python -m cosmos_mp index")
    commands.index([videos])
    assert "2 clips" in capsys.readouterr().out
    (words,) = _words("python -m cosmos_mp cache-text")
    commands.cache_text(words)
    assert "3 captions added" in capsys.readouterr().out  # two clips and the negative prompt


def test_convert_is_understood_up_to_the_missing_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = _words("python -m cosmos_mp convert")
    with pytest.raises(FileNotFoundError, match="runs/edge_dmd2"):
        commands.convert(words)


def test_bench_is_understood(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # They run in tests/distributed/test_bench.py and in tests/bench.
    monkeypatch.setattr(parallel, "bench_parallel", lambda fast: {"parallel": fast})
    monkeypatch.setattr(fp8, "bench_fp8", lambda fast: {"fp8": fast})
    monkeypatch.setattr(cpu, "bench_cpu", lambda fast: {"cpu": fast})
    monkeypatch.setattr(static, "bench_static", lambda: {"static": False})
    monkeypatch.setattr(gpu, "check_gpu", lambda: None)
    monkeypatch.setattr(gpu, "bench_gpu", lambda fast, limit: {"gpu": fast, "mistakes": []})
    found = {words[0]: words for words in _words("python -m cosmos_mp bench")}
    assert set(found) == {"parallel", "fp8", "cpu", "gpu", "static"}
    for name, words in found.items():
        commands.bench(words)
        assert json.loads((tmp_path / f"{name}.json").read_text())[name] is False


# --- Measured numbers ---


def measured(seed: int) -> dict:
    return json.loads((ROOT / "examples" / "measured" / f"quickstart_seed{seed}.json").read_text())


def results_table() -> str:
    return markdown_table(measured(0))


def seeds_table() -> str:
    """What the quickstart asserts, and DMD2 against KD by every Fréchet distance, for three seeds."""
    runs = [measured(seed) for seed in range(3)]
    rows = [
        [item["name"], f"{item['relation']} {number(item['bound'])}", *(number(run["checks"][i]["value"]) for run in runs)]
        for i, item in enumerate(runs[0]["checks"])
        if "calls" not in item["name"]
    ]
    for metric in runs[0]["metrics"]:
        if metric["label"].startswith("Fréchet") and "PCA" not in metric["label"]:
            pairs = [[run["variants"][name][metric["key"]]["value"] for name in ("DMD2", "KD")] for run in runs]
            rows.append([f"DMD2 / KD, {metric['label']}", "–", *(number(dmd2 / kd) for dmd2, kd in pairs)])
    lines = [["check", "bound", *(f"seed {seed}" for seed in range(3))], ["---", *["---:"] * 4], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def layouts_table() -> str:
    rows = json.loads((ROOT / "examples" / "measured" / "layouts.json").read_text())["layouts"]
    columns = list(next(iter(rows.values())))
    lines = [["layout", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, str(row["ranks"]), *(f"{row[column]:.0e}" for column in columns[1:])] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_tables_are_the_measured_ones():
    readme = (ROOT / "README.md").read_text()
    assert results_table() in readme
    assert seeds_table() in readme
    assert layouts_table() in readme
    assert all(table in readme for table in parallel.tables(bench()))
    assert all(table in readme for table in fp8.tables(bench("fp8")))
    assert static.table(bench("static")) in readme and cpu.table(bench("cpu")) in readme


def bench(name: str = "parallel") -> dict:
    return json.loads((ROOT / "examples" / "measured" / f"{name}.json").read_text())


def test_what_was_measured_keeps_its_promises():
    rows = bench()["procedures"]["rows"]
    for row in rows.values():
        assert row["flops"] == pytest.approx(row["flops_formula"], rel=0.01)
    assert rows["ours, no recompute"]["ratios"]["seconds"] < 0.9
    assert rows["ours, no recompute"]["ratios"]["flops"] < 0.84
    assert bench()["state"]["rows"]["4"]["share"] <= 0.3


def test_fp8_was_measured_within_what_the_readme_recommends_it_for():
    found = bench("fp8")
    for recipe in ("FP8 current", "FP8 block"):
        exact = found["teacher"]["bfloat16"]
        assert all(found["teacher"][recipe][sigma] < fp8.GATE * value for sigma, value in exact.items())
        assert 0 < sum(fp8.drift(found["kd"], recipe)) / found["size"]["seeds"] < 0.08
        walk = found["dmd2"]["change"] * (fp8.UPDATES_7B / found["dmd2"]["updates"]) ** 0.5
        assert found["dmd2"]["rounding"][recipe] > 10 * walk and walk < found["dmd2"]["rounding"]["bfloat16"] < 3 * walk


def test_every_layout_was_measured_within_the_bounds_of_its_test():
    for row in json.loads((ROOT / "examples" / "measured" / "layouts.json").read_text())["layouts"].values():
        assert max(row["gradients"], row["first losses"]) < 1e-9 and row["losses after 20 iterations"] < 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_every_check_held_where_it_was_measured(seed):
    results = measured(seed)
    assert results["run"]["seed"] == seed and results["run"]["clips"] > 400
    assert len(results["checks"]) == 13 and all(item["passed"] for item in results["checks"])
