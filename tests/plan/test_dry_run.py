"""`--dry-run` at 7B: exact counts and shapes of every training stage, in little memory."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_mp import presets
from cosmos_mp.config import ConfigError, DMD2Run, EncodeRun, KDRun, TeacherRun
from cosmos_mp.models.weights import named_weights
from cosmos_mp.options import parse
from cosmos_mp.plan.dry_run import dry_run, parameters, role_networks, transfer_on_meta

ROOT = Path(__file__).parents[2]
STUDENT = 8_129_705_760
# The real scripts one after the other in one process, which then tells its peak memory in kB.
EVERY_STAGE = """
import resource, runpy, sys
for script, preset in (("pretrain_teacher", "teacher"), ("generate_pairs", "pairs"), ("pretrain_kd", "kd"), ("pretrain_dmd2", "dmd2")):
    sys.argv = [script, f"transfer1_7b_edge_{preset}", "--dry-run"]
    print(f"@{preset}")
    try:
        runpy.run_path(f"pretrain_scripts/{script}.py", run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, stop.code
print("@memory")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def role_parameters(config) -> dict[str, int]:
    return {role: parameters(network) for role, network in role_networks(config).items()}


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each stage's script prints, and the peak memory of all."""
    command = [sys.executable, "-c", EVERY_STAGE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return dict(part.split("\n", 1) for part in done.stdout.split("@")[1:])


@pytest.mark.parametrize("stage", ["teacher", "pairs", "kd", "dmd2"])
def test_a_7b_stage_prints_exact_counts_and_shapes(printed, stage):
    lines = printed[stage].splitlines()
    assert "base 7,236,208,640 + control 893,497,120 = 8,129,705,760 parameters" in lines
    assert "latent (16, 16, 88, 160), 56,320 tokens of width 4096" in lines
    roles = {"teacher": ["teacher"], "pairs": ["teacher"], "kd": ["student", "teacher"], "dmd2": ["student", "teacher", "fake_score"]}[
        stage
    ]
    for role in roles:
        assert f"{role}: 8,129,705,760 parameters" in lines
    others = {"student", "teacher", "fake_score", "discriminator"} - set(roles) - ({"discriminator"} if stage == "dmd2" else set())
    assert not [line for line in lines if line.split(":")[0] in others]


def test_batches_and_guidance_are_printed(printed):
    assert "batch 64 = 64 x 1 x dp 1, 10,000 iterations" in printed["kd"]
    assert "batch 64 = 64 x 1 x dp 1, 24,000 iterations" in printed["dmd2"]
    assert "guidance: cond + 7 (cond - uncond), which is 8 in the Ho-Salimans form" in printed["pairs"]
    assert "guidance: cond + 5 (cond - uncond), which is 6 in the Ho-Salimans form" in printed["dmd2"]
    assert "guidance" not in printed["kd"].rpartition("}")[2]


def test_the_configuration_is_printed_as_it_resolves(printed):
    values = json.loads(printed["dmd2"].rpartition("}")[0] + "}")
    assert values["stage"] == "dmd2"
    assert values["optim_student"]["lr"] == 5e-7


def test_nothing_of_the_7b_is_allocated(printed):
    assert int(printed["memory"]) < 2e6, "one network in float32 alone would take 32 GB"


def test_roles_follow_the_options():
    def roles(*words: str) -> dict[str, int]:
        return role_parameters(parse(DMD2Run, ["tiny_dmd2", *words]))

    student = sum(p.numel() for p in transfer_on_meta(presets.TINY_NET).parameters())
    full = roles()
    assert list(full) == ["student", "teacher", "fake_score", "discriminator"]
    assert {full[role] for role in ("student", "teacher", "fake_score")} == {student}
    assert full["discriminator"] != student
    assert list(roles("--dmd2.gan_weight", "0")) == ["student", "teacher", "fake_score"]
    assert list(roles("--dmd2.ladd")) == ["student", "teacher", "discriminator"]
    assert roles("--head.feature_blocks", "1", "2")["discriminator"] == 2 * full["discriminator"]
    evaluated = role_parameters(presets.get("tiny_evaluate"))
    assert evaluated == {"teacher": student, "KD": student, "DMD2": student}
    assert role_parameters(parse(KDRun, ["tiny_kd", "--train.picture_every", "0"])) == {"student": student}
    assert role_parameters(presets.get("tiny_sample")) == {"student": student}


def test_a_network_on_meta_has_no_memory():
    assert all(value.is_meta for value in named_weights(transfer_on_meta(presets.TINY_NET)).values())


def test_overrides_are_in_the_printed_configuration(capsys):
    dry_run(parse(TeacherRun, ["tiny_teacher", "--train.seed", "17"]))
    assert '"seed": 17' in capsys.readouterr().out


def test_encoding_prints_its_configuration_and_shapes(capsys):
    dry_run(parse(EncodeRun, ["transfer1_7b_vis_encode", "--clip.stride", "2"]))
    printed = capsys.readouterr().out
    values, _, rest = printed.partition("\n}\n")
    assert json.loads(values + "}")["clip"]["control"] == "vis"
    assert rest.splitlines() == ["clip (121, 704, 1280, 3) from 241 frames of a video, vis control", "text (512, 1024)"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["transfer1_7b_edge_dmd"], 1, "transfer1_7b_edge_dmd2"),
        (["tiny_dmd2", "--dmd2.gan_weigth", "1"], 2, "--dmd2.gan_weight"),
        (["tiny_dmd2", "--dmd2.feature_role", "student"], 2, "fake_score"),
    ],
)
def test_what_is_wrong_ends_with_a_status_and_no_traceback(monkeypatch, capsys, words, status, said):
    monkeypatch.delenv("COSMOS_MP_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain_dmd2.py", *words, "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "pretrain_scripts" / "pretrain_dmd2.py"), run_name="__main__")
    captured = capsys.readouterr()
    assert stop.value.code == status
    assert said in captured.err
    assert "Traceback" not in captured.err and not captured.out


def test_bytes_per_rank_of_the_production_layout_without_its_processes(capsys):
    """16 nodes of 8: every role is cut into 128, but for what does not divide; the teacher has neither gradients nor moments."""
    words = ["transfer1_7b_edge_dmd2", "--parallel.tp", "1", "--parallel.cp", "8", "--parallel.dp", "16"]
    dry_run(parse(DMD2Run, words))
    said = capsys.readouterr().out
    assert "layout: 128 processes = tp 1 x cp 8 x dp 16, shards over 128" in said
    assert "batch 64 = 4 x 1 x dp 16, 24,000 iterations" in said
    least = 4 * 8_129_705_760 / 128 / 1e9
    for role, moments in (("student", True), ("teacher", False), ("fake_score", True)):
        line = next(line for line in said.splitlines() if line.startswith(f"{role}: 8,129,705,760 parameters: "))
        masters, gradients, adam, average = map(float, line.split(": ")[2].split(" | ")[0].split(", "))
        assert least - 1e-3 < masters < least * 1.01
        assert (gradients, adam, average) == ((masters, pytest.approx(2 * masters, abs=2e-3), 0) if moments else (0, 0, 0))


def test_a_layout_that_does_not_fit_is_refused_as_in_a_run():
    with pytest.raises(ConfigError, match=r"parallel\.cp=3 .*latent frames.*1, 2, 4, 8, 16"):
        dry_run(parse(DMD2Run, ["transfer1_7b_edge_dmd2", "--parallel.cp", "3", "--parallel.cp_attention", "ring"]))


def test_the_processes_that_a_launcher_has_started_are_those_that_count(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="does not divide 4 process"):
        dry_run(parse(DMD2Run, ["transfer1_7b_edge_dmd2", "--parallel.cp", "8"]))
    with pytest.raises(ConfigError, match=r"parallel\.dp=16"):
        dry_run(parse(DMD2Run, ["transfer1_7b_edge_dmd2", "--parallel.cp", "2", "--parallel.dp", "16"]))
