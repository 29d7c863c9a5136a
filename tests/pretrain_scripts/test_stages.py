"""The stages as their scripts run them: teacher -> pairs -> KD -> DMD2 on real files."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_mp import config, options, presets, roles
from cosmos_mp.data.shards import StoreError
from cosmos_mp.plan.cost import model_work
from cosmos_mp.training.checkpoint import latest, load_weights_of
from cosmos_mp.training.logs import lines, read_log
from cosmos_mp.training.pictures import picture_grid

ROOT = Path(__file__).parents[2]
CRITICS = ["fake_score", "discriminator"]


def records(run: Path) -> list[dict]:
    return [record for _, record in lines(run / "log.jsonl")]


def weights(run: Path, role: str, *, ema: bool = False) -> dict[str, torch.Tensor]:
    return load_weights_of(run, role, prefer_ema=ema)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- What a run leaves ---


@pytest.mark.parametrize("stage", ["teacher", "kd", "dmd2"])
def test_a_run_folder_has_its_configuration_and_last_checkpoint(tiny_chain, stage):
    run = tiny_chain.root / stage
    stored = options.load(run / "config.json")
    assert isinstance(stored, config.STAGES[stage])
    assert stored.net.hidden == 48 and stored.out == str(run)
    assert json.loads((latest(run) / "config.json").read_text()) == json.loads((run / "config.json").read_text())
    assert latest(run).name == f"iter_{stored.train.iterations:08d}"


@pytest.mark.parametrize(("stage", "file", "rows"), [("teacher", 6, 3), ("kd", 3, 4), ("kd", 4, 4), ("dmd2", 10, 4)])
def test_pictures_have_their_rows(tiny_chain, stage, file, rows):
    image = np.asarray(Image.open(tiny_chain.root / stage / "pictures" / f"iter_{file:08d}.png"))
    labels = ["teacher 1-step", "control", "ground truth", "student 1-step"][:rows]
    grid = picture_grid(dict.fromkeys(labels, np.zeros((9, 64, 64, 3), np.uint8)))
    assert image.shape == (2 * grid.shape[0], grid.shape[1], 3), "two clips, one under the other"
    assert image.std() > 10


def test_the_log_of_teacher_and_kd(tiny_chain):
    for stage, role, term, count in (("teacher", "teacher", "denoising", 6), ("kd", "student", "kd", 4)):
        logged = records(tiny_chain.root / stage)
        assert [record["iteration"] for record in logged] == list(range(count))
        for record in logged:
            assert (record["roles"], set(record["terms"])) == ([role], {term, "total"})
            assert record["terms"][term] == record["terms"]["total"] > 0
            assert set(record["grad_norms"]) == set(record["lrs"]) == {role}
            assert record["grad_norms"][role] > 0 and record["samples_per_second"] > 0
    assert list((tiny_chain.root / "kd" / "tensorboard").glob("events.*"))
    assert not (tiny_chain.root / "teacher" / "tensorboard").exists()


def test_the_log_of_dmd2_has_every_term_norm_rate_and_the_accuracy(tiny_chain):
    logged = records(tiny_chain.root / "dmd2")
    assert [record["roles"] for record in logged] == [["student"] if i % 5 == 0 else CRITICS for i in range(10)]
    for record in logged:
        student = record["roles"] == ["student"]
        assert set(record["terms"]) == ({"vsd", "gan", "total"} if student else {*CRITICS, "total"})
        assert set(record["grad_norms"]) == set(record["lrs"]) == set(record["roles"])
        assert all(norm > 0 for norm in record["grad_norms"].values()) and record["samples_per_second"] > 0
        terms = record["terms"]
        total = terms["vsd"] + 0.3 * terms["gan"] if student else terms["fake_score"] + terms["discriminator"]
        assert terms["total"] == pytest.approx(total, rel=1e-6)
        if not student:
            assert 0 <= record["metrics"]["discriminator_accuracy"] <= 1
    assert logged[0]["lrs"] == {"student": pytest.approx(1e-4)} and logged[1]["lrs"]["discriminator"] == pytest.approx(1e-3)
    # Student and fake score start as KD's student and the teacher: the scores agree, and at guidance 0 there is nothing to learn yet.
    assert logged[0]["terms"]["vsd"] == 0 < logged[5]["terms"]["vsd"]


@pytest.mark.parametrize(("stage", "text_tokens"), [("teacher", 12), ("kd", 12), ("dmd2", 12)])
def test_the_log_says_tokens_and_work_of_each_phase(tiny_chain, stage, text_tokens):
    stored = options.load(tiny_chain.root / stage / "config.json")
    for record in records(tiny_chain.root / stage):
        speed, seconds = record["speed"], record["seconds"]
        work = model_work(stored, record["iteration"], record["roles"], text_tokens)
        assert set(speed) == {"tokens_per_second", "tflops"} and record["peak"] == "no peak known for cpu"
        assert speed["tokens_per_second"] == pytest.approx(4 * 3 * 4 * 4 / seconds)
        assert speed["tflops"] == pytest.approx(4 * work / seconds / 1e12) and record["passes"] == {}


def test_a_stage_is_profiled_where_and_when_asked(tiny_chain):
    window = ["--profile.kind", "torch", "--profile.start", 1, "--profile.stop", 3]
    run = tiny_chain.run("kd", "profiled", "--train.iterations", 4, *window)
    logged = records(run)
    assert [bool(record["passes"]) for record in logged] == [False, True, True, False] and "student.fwd" in logged[1]["passes"]
    with gzip.open(run / "profile" / "trace_rank0.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("cosmos_mp.step/student") == 2 and names.count("control.blk1.mlp") == names.count("student.fwd") == 4
    assert [r["terms"] for r in logged] == [r["terms"] for r in records(tiny_chain.root / "kd")]
    # What was profiled may change when the run goes on.
    tiny_chain.run("kd", "profiled", "--train.iterations", 5, "--profile.kind", "none", "--profile.ranks", 0, 1)
    assert len(records(run)) == 5


# --- Where each role starts ---

# A rate that rounds to zero in float32: what is saved is what the run started from.
FROZEN = ["--train.iterations", 1, "--optim_student.lr", 1e-60]


def test_kd_starts_as_the_teachers_average(tiny_chain):
    run = tiny_chain.run("kd", "kd_start", *FROZEN, "--train.global_batch_size", 2)
    average, plain = (weights(tiny_chain.root / "teacher", "teacher", ema=ema) for ema in (True, False))
    assert same(weights(run, "student"), average)
    assert not same(average, plain)


def test_pairs_of_another_teacher_are_noticed(tiny_chain, capsys):
    note = "are another teacher's than"
    tiny_chain.run("kd", "kd_own", *FROZEN, "--train.global_batch_size", 2)
    assert note not in capsys.readouterr().out
    other = tiny_chain.run("teacher", "other_teacher", "--train.iterations", 1)
    tiny_chain.run("kd", "kd_other", *FROZEN, "--train.global_batch_size", 2, "--teacher", other)
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["teacher", "kd", "dmd2"])
@pytest.mark.parametrize("wrong", ["holdout", "tokenizer.path"])
def test_a_wrong_path_is_named_before_any_network_is_built(tiny_chain, tmp_path, monkeypatch, stage, wrong):
    monkeypatch.setattr(roles, "transfer_net", lambda *_: pytest.fail("a network was built"))
    with pytest.raises(FileNotFoundError, match="gone"):
        tiny_chain.run(stage, "wrong", "--train.picture_every", 1, f"--{wrong}", tmp_path / "gone")
    assert not (tiny_chain.root / "wrong").exists()


@pytest.mark.parametrize("init", ["teacher", "student"])
def test_dmd2_starts_from_kds_average_and_its_fake_score_as_the_option_says(tiny_chain, init):
    rates = [word for role in ("fake_score", "discriminator") for word in (f"--optim_{role}.lr", 1e-60)]
    options = [*FROZEN, *rates, "--train.iterations", 2, "--dmd2.fake_score_init", init]
    run = tiny_chain.run("dmd2", f"dmd2_start_{init}", *options, "--train.global_batch_size", 2)
    student, teacher = weights(tiny_chain.root / "kd", "student", ema=True), weights(tiny_chain.root / "teacher", "teacher", ema=True)
    assert same(weights(run, "student"), student)
    assert same(weights(run, "fake_score"), {"teacher": teacher, "student": student}[init])
    assert not same(student, teacher) and not same(student, weights(tiny_chain.root / "kd", "student"))


def test_dmd2_without_a_student_starts_from_the_teacher(tiny_chain):
    run = tiny_chain.run("dmd2", "dmd2_direct", *FROZEN, "--student", "", "--train.global_batch_size", 2)
    assert same(weights(run, "student"), weights(tiny_chain.root / "teacher", "teacher", ema=True))


def test_a_teacher_can_start_from_another(tiny_chain):
    options = ["--train.iterations", 1, "--optim_teacher.lr", 1e-60, "--train.global_batch_size", 2]
    run = tiny_chain.run("teacher", "teacher_again", *options, "--init", tiny_chain.root / "teacher")
    assert same(weights(run, "teacher"), weights(tiny_chain.root / "teacher", "teacher", ema=True))
    fresh = tiny_chain.run("teacher", "teacher_seeded", *options, "--train.seed", 1)
    assert not same(weights(run, "teacher"), weights(fresh, "teacher"))


def test_training_moves_the_trained_roles(tiny_chain):
    root = tiny_chain.root
    assert not same(weights(root / "dmd2", "student"), weights(root / "kd", "student", ema=True))
    assert not same(weights(root / "dmd2", "fake_score"), weights(root / "teacher", "teacher", ema=True))
    with pytest.raises(ValueError, match="no role 'teacher'; it holds discriminator, fake_score, student, student_ema"):
        weights(root / "dmd2", "teacher")


# --- Options of DMD2 ---


def small(world, out: str, *options) -> list[dict]:
    return records(world.run("dmd2", out, "--train.global_batch_size", 2, "--train.iterations", 6, *options))


def phases(logged: list[dict]) -> list[tuple[str, ...]]:
    return [tuple(record["roles"]) for record in logged]


def test_warm_ups_come_before_the_cycle(tiny_chain):
    logged = small(tiny_chain, "warm", "--dmd2.reconstruction_warmup", 2, "--dmd2.critic_warmup", 2, "--dmd2.student_update_freq", 2)
    assert phases(logged) == [("student",)] * 2 + [tuple(CRITICS)] * 2 + [("student",), tuple(CRITICS)]
    assert set(logged[0]["terms"]) == set(logged[1]["terms"]) == {"reconstruction", "total"}
    assert set(logged[4]["terms"]) == {"vsd", "gan", "total"}


def test_ladd_trains_without_a_fake_score(tiny_chain):
    logged = small(tiny_chain, "ladd", "--dmd2.ladd")
    assert phases(logged) == [("student",)] + [("discriminator",)] * 4 + [("student",)]
    assert set(logged[0]["terms"]) == {"gan", "total"} and set(logged[1]["terms"]) == {"discriminator", "total"}


def test_without_a_gan_there_is_no_discriminator(tiny_chain):
    logged = small(tiny_chain, "plain", "--dmd2.gan_weight", 0, "--dmd2.reconstruction_weight", 0.5)
    assert phases(logged) == [("student",)] + [("fake_score",)] * 4 + [("student",)]
    assert set(logged[0]["terms"]) == {"vsd", "reconstruction", "total"} and set(logged[1]["terms"]) == {"fake_score", "total"}
    assert logged[0]["terms"]["total"] == pytest.approx(0.5 * logged[0]["terms"]["reconstruction"], rel=1e-6)


def test_other_features_r1_guidance_and_recomputation_run(tiny_chain):
    options = ["--dmd2.feature_role", "fake_score", "--dmd2.r1_weight", 1, "--head.feature_blocks", 0, 2, "--dmd2.fake_score_space", "eps"]
    guided = ["--dmd2.guidance", 1, "--dmd2.unconditional", "negative_prompt"]
    plain = small(tiny_chain, "options", *options, *guided)
    assert "r1" in plain[1]["terms"] and plain[0]["terms"]["vsd"] > 0
    assert [r["terms"] for r in small(tiny_chain, "recomputed", *options, *guided, "--train.recompute", "full")] == [
        r["terms"] for r in plain
    ]
    empty = small(tiny_chain, "empty", *options, "--dmd2.guidance", 1)
    assert empty[0]["terms"]["vsd"] != plain[0]["terms"]["vsd"]


# --- Interruption ---


def test_dmd2_resumed_inside_the_cycle_is_bit_exact(tiny_chain):
    """Iterations 0..9 at once, and 0..6 then 7..9: the cut lies two critic steps after a student step."""
    options = ["--train.save_every", 7, "--train.picture_every", 0]
    tiny_chain.run("dmd2", "cut", *options)
    run, whole = tiny_chain.root / "cut", tiny_chain.root / "dmd2"
    cut = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in cut] == ["iter_00000007", "iter_00000010"]
    (cut[1] / "COMPLETE.json").unlink()  # as a kill leaves it
    tiny_chain.run("dmd2", "cut", *options)
    for role in ("student", *CRITICS):
        assert same(weights(run, role), weights(whole, role)), role
    assert same(weights(run, "student", ema=True), weights(whole, "student", ema=True))
    logged = read_log(run / "log.jsonl")
    for name, (iterations, values) in read_log(whole / "log.jsonl").items():
        if name not in ("seconds", "samples_per_second") and not name.startswith("speed/"):
            assert np.array_equal(logged[name][0], iterations) and np.array_equal(logged[name][1], values), name


def test_sigterm_ends_the_script_with_75_and_the_same_command_goes_on(tiny_world):
    run = tiny_world.root / "terminated"
    words = tiny_world.words("teacher", "terminated", "--train.iterations", 100_000)
    command = [sys.executable, "pretrain_scripts/pretrain_teacher.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not ((run / "log.jsonl").exists() and records(run)):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    done = len(records(run))
    assert f"interrupted and saved at iteration {done}; run the same command again to go on" in out
    assert latest(run).name == f"iter_{done:08d}"
    tiny_world.run("teacher", "terminated", "--train.iterations", done + 2)
    assert [record["iteration"] for record in records(run)] == list(range(done + 2))


# --- Errors come before networks ---


@pytest.mark.parametrize(
    ("stage", "options", "error", "said"),
    [
        ("teacher", ["--clips", "{pairs}", "--init", "absent"], StoreError, "kind=pairs, this run expects clips"),
        ("kd", ["--pairs", "{clips}", "--teacher", "absent"], StoreError, "kind=clips, this run expects pairs"),
        ("kd", ["--pairs", "absent", "--teacher", "absent"], FileNotFoundError, "absent/header.json does not exist.*generate_pairs"),
        ("dmd2", ["--clips", "{pairs}", "--teacher", "absent"], StoreError, "kind=pairs, this run expects clips"),
        ("dmd2", ["--diffusion.latent_shape", 16, 3, 8, 16, "--teacher", "absent"], StoreError, "diffusion.latent_shape"),
        ("dmd2", ["--net.text_dim", 32, "--text.dim", 32, "--teacher", "absent"], StoreError, "net.text_dim=64, this run expects 32"),
        ("dmd2", ["--teacher", "absent"], FileNotFoundError, "absent: no such weight file"),
        ("dmd2", ["--student", "{teacher}"], ValueError, "no role 'student'; it holds teacher"),
    ],
)
def test_what_cannot_be_trained_is_named_before_anything_is_written(tiny_chain, stage, options, error, said):
    where = {"clips": tiny_chain.root / "clips" / "train", "pairs": tiny_chain.root / "pairs", "teacher": tiny_chain.root / "teacher"}
    options = [str(option).format(**where) for option in options]
    with pytest.raises(error, match=said):
        tiny_chain.run(stage, "never", *options)
    assert not (tiny_chain.root / "never").exists()


# --- Scripts ---


def test_every_stage_has_a_script_that_takes_its_presets():
    scripts = {path.stem for path in (ROOT / "pretrain_scripts").glob("*.py")}
    assert scripts == {"pretrain_teacher", "generate_pairs", "pretrain_kd", "pretrain_dmd2"}
    for script, stage in (("pretrain_teacher", "teacher"), ("generate_pairs", "pairs"), ("pretrain_kd", "kd"), ("pretrain_dmd2", "dmd2")):
        kind = config.STAGES[stage]
        assert f"stage_main({kind.__name__}, main)" in (ROOT / "pretrain_scripts" / f"{script}.py").read_text()
        assert f"tiny_{stage}" in presets.names(kind)
