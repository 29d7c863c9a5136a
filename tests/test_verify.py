"""Golden cases: all pass, in float64 to the last stored digit, and each kind of damage is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_mp.models.weights import WeightError
from cosmos_mp.verify import CaseError, find_cases, run_case, verify

CASES = ["dmd2_step", "dmd2_step_given", "forward", "one_step", "ops", "teacher_sample"]


@pytest.fixture
def copied(golden, tmp_path):
    """A writable copy of one case with the weights it names."""

    def copy(name: str) -> Path:
        for part in ("weights", name):
            shutil.copytree(golden / part, tmp_path / part)
        return tmp_path / name

    return copy


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_set_is_whole(golden):
    assert [case.name for case in find_cases(golden)] == CASES
    assert list(find_cases(golden / "ops")) == [golden / "ops"]


@pytest.mark.parametrize("name", CASES)
def test_golden_case(golden, name):
    case = golden / name
    differences = run_case(case)
    config = json.loads((case / "config.json").read_text())
    assert {d.name for d in differences} == {*config["expected_shapes"], *config["expected_numbers"]}
    assert [d for d in differences if not d.passed] == []
    for d in differences:
        assert d.limit == config["tolerance"]["tensors" if d.name in config["expected_shapes"] else "numbers"]


@pytest.mark.parametrize("name", CASES)
def test_golden_case_in_float64(golden, name):
    numbers = json.loads((golden / name / "config.json").read_text())["expected_numbers"]
    for d in run_case(golden / name, torch.float64):
        # Tensors are stored in float32, numbers in float64.
        assert d.value < (1e-9 if d.name in numbers else 1e-7), d.name


@pytest.mark.parametrize(
    ("name", "entry"), [("forward", "out_base"), ("one_step", "x0_gen"), ("dmd2_step", "grad_disc.cls_pred_heads.0.net.0.bias")]
)
def test_an_altered_tensor_fails_by_name(copied, capsys, name, entry):
    case = copied(name)
    assert verify(case)
    capsys.readouterr()

    def nudge(tensors: dict) -> None:
        limit = 1e-4 if name == "dmd2_step" else 5e-6
        tensors[entry].flatten()[3] += 3 * limit * tensors[entry].abs().max()

    edit_tensors(case / "expected.safetensors", nudge)
    assert verify(case) is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{name}: ") and lines[0].endswith("FAILED")
    assert [line.split()[-1] for line in lines if line.startswith("  FAIL")] == [entry]


@pytest.mark.parametrize(
    ("name", "entry", "factor"),
    [("dmd2_step", "vsd_weight", 1 + 5e-5), ("one_step", "c_noise_student", 1 + 2e-5), ("teacher_sample", "sigmas_N4", 1 + 4e-9)],
)
def test_an_altered_number_fails_by_name(copied, capsys, name, entry, factor):
    case = copied(name)

    def nudge(values: dict) -> None:
        scaled = [factor * x for x in values[entry]] if isinstance(values[entry], list) else factor * values[entry]
        values[entry] = scaled

    edit_json(case / "expected.json", nudge)
    assert verify(case) is False
    failed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  FAIL")]
    assert failed == [entry]


def test_one_failing_case_fails_the_set_and_the_others_still_run(copied, golden, capsys):
    case = copied("one_step")
    shutil.copytree(golden / "ops", case.parent / "ops")
    edit_json(case / "expected.json", lambda values: values.update(c_noise_student=2.0))
    assert verify(case.parent) is False
    heads = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [head.split(", ")[1] for head in heads] == ["FAILED", "ok"]


def test_not_a_number_fails(copied):
    case = copied("one_step")
    edit_tensors(case / "io.safetensors", lambda io: io["epsilon"].flatten()[:1].fill_(float("nan")))
    assert not all(d.passed for d in run_case(case))


def test_weights_matter(copied):
    case = copied("one_step")
    name = "net.zero_blocks.block0.bias"
    edit_tensors(case.parent / "weights" / "student.safetensors", lambda weights: weights[name][3:4].add_(0.05))
    assert {d.name for d in run_case(case) if not d.passed} == {"x0_gen"}


# --- Named errors ---


def drop(name: str):
    return lambda values: values.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: edit_json(c / "config.json", lambda v: v.update(kind="mystery")), "kind 'mystery' is none of forward"),
        (lambda c: edit_json(c / "config.json", drop("kind")), "kind None"),
        (lambda c: (c / "io.safetensors").unlink(), r"io\.safetensors: missing file"),
        (lambda c: (c / "expected.safetensors").unlink(), r"expected\.safetensors: missing file"),
        (lambda c: (c / "expected.json").unlink(), "promises c_noise_student"),
        (lambda c: edit_tensors(c / "expected.safetensors", drop("x0_gen")), "promises x0_gen"),
        (
            lambda c: edit_tensors(c / "expected.safetensors", lambda v: v.update(more=torch.ones(2))),
            "'more' is not computed",
        ),
        (lambda c: edit_tensors(c / "expected.safetensors", lambda v: v.update(x_T=v["x_T"][:, :-1].clone())), "x_T: shape .*expected"),
        (lambda c: edit_tensors(c / "io.safetensors", drop("epsilon")), "no entry 'epsilon'"),
        (lambda c: edit_json(c / "config.json", drop("sigma_max")), "no entry 'sigma_max'"),
        (lambda c: edit_json(c / "config.json", lambda v: v["net"].update(gelu="tanh")), "net.gelu is 'tanh'; these networks have 'erf'"),
        (lambda c: edit_json(c / "config.json", lambda v: v["net"].update(qk_norm_eps=1e-5)), "net.qk_norm_eps is 1e-05"),
    ],
)
def test_a_case_that_cannot_be_run_says_why(copied, damage, message):
    case = copied("one_step")
    damage(case)
    with pytest.raises(CaseError, match=message):
        run_case(case)


def test_an_unknown_head_setting_is_a_named_error(copied):
    case = copied("dmd2_step")
    edit_json(case / "config.json", lambda v: v["head"].update(leaky_slope=0.2))
    with pytest.raises(CaseError, match="head.leaky_slope is 0.2"):
        run_case(case)


@pytest.mark.parametrize("name", ["config.json", "io.safetensors", "expected.safetensors", "expected.json"])
def test_a_damaged_file_is_named(copied, name):
    case = copied("one_step")
    (case / name).write_bytes(b"junk")
    with pytest.raises(CaseError, match=f"{name}: cannot be read"):
        run_case(case)


def test_a_missing_weight_file_is_named(copied):
    case = copied("one_step")
    (case.parent / "weights" / "student.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"student\.safetensors"):
        run_case(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"net.zero_blocks.block7.bias": torch.zeros(48)}), "unexpected: control.zero.7.bias"),
        (drop("net.zero_blocks.block0.bias"), "missing: control.zero.0.bias"),
        (lambda w: w.update({"net.zero_blocks.block0.bias": torch.zeros(47)}), r"control.zero.0.bias is \(47,\), expected \(48,\)"),
    ],
)
def test_weights_are_loaded_strictly(copied, change, message):
    case = copied("one_step")
    edit_tensors(case.parent / "weights" / "student.safetensors", change)
    with pytest.raises(WeightError, match=rf"student\.safetensors does not fit.*{message}"):
        run_case(case)


def test_a_name_of_no_layout_is_refused(copied):
    case = copied("one_step")
    edit_tensors(case.parent / "weights" / "student.safetensors", lambda w: w.update({"net.stranger.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"student\.safetensors.*net\.stranger\.weight"):
        run_case(case)


def test_a_folder_without_cases_is_a_named_error(tmp_path):
    with pytest.raises(CaseError, match="golden set"):
        verify(tmp_path)
