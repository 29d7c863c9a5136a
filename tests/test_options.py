"""Configuration files and command lines: what is read back, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cosmos_mp import config, options, presets
from cosmos_mp.config import (
    ConfigError,
    KDRun,
    TeacherRun,
)


def altered(value):
    """The same configuration with every number, word and flag changed, where that is allowed."""
    if not dataclasses.is_dataclass(value):
        return value
    changes = {}
    for f in dataclasses.fields(value):
        old = getattr(value, f.name)
        if dataclasses.is_dataclass(old):
            changes[f.name] = altered(old)
        elif type(old) is float:
            changes[f.name] = old * 0.7 + 0.1
        elif type(old) is str and f.type == "str":
            changes[f.name] = f"{old} \u00e9 'x'\n"
        elif type(old) is bool:
            changes[f.name] = old
    return dataclasses.replace(value, **changes)


@pytest.fixture
def written(tmp_path):
    """Write a configuration with changes to its values, {"section.key": value}; None drops the key."""

    def write(kind: type, **changes) -> Path:
        path = tmp_path / "config.json"
        options.save(kind(), path)
        values = json.loads(path.read_text())
        for name, value in changes.items():
            *sections, key = name.split("__")
            table = values
            for section in sections:
                table = table[section]
            if value is None:
                del table[key]
            else:
                table[key] = value
        path.write_text(json.dumps(values))
        return path

    return write


# --- Files ---


@pytest.mark.parametrize("stage", config.STAGES)
def test_what_is_saved_is_read_back(tmp_path, stage):
    kind = config.STAGES[stage]
    for value in (kind(), altered(kind())):
        path = tmp_path / "run" / "config.json"
        options.save(value, path)
        again = options.load(path)
        assert type(again) is kind and again == value
        assert json.loads(path.read_text())["stage"] == stage
        assert [p.name for p in path.parent.iterdir()] == ["config.json"]  # no partial file stays
    assert altered(kind()) != kind()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": 1}, "unknown key 'trian'; did you mean 'train'"),
        ({"train__iteratons": 3}, "train: unknown key 'iteratons'; did you mean 'iterations'"),
        ({"train__zzz": 3}, "train: unknown key 'zzz'; known: iterations, "),
        ({"pairs": None}, "missing key.* pairs"),
        ({"diffusion__sigma_max": None}, "diffusion: missing key.* sigma_max"),
        ({"train__iterations": "many"}, "train: iterations: 'many' is str, expected int"),
        ({"train__iterations": 3.0}, "train: iterations: 3.0 is float, expected int"),
        ({"train__iterations": True}, "train: iterations: True is bool, expected int"),
        ({"train__tensorboard": 1}, "train: tensorboard: 1 is int, expected bool"),
        ({"train__recompute": "half"}, "train: recompute: 'half' is none of none, selective, full"),
        ({"optim_student__betas": [0.9]}, "optim_student: betas: "),
        ({"optim_student__betas": [0.9, "x"]}, "optim_student: betas: 'x' is str, expected float"),
        ({"net__control_mlp": 16}, "net: control_mlp: 16 does not fit"),
        ({"net": 3}, "net: expected a table of options, found int"),
        ({"stage": "kdd"}, "stage is 'kdd', expected one of .*teacher.*kd"),
        ({"stage": None}, "stage is None"),
    ],
)
def test_what_does_not_fit_names_file_key_and_remedy(written, changes, message):
    path = written(KDRun, **changes)
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        options.load(path)


def test_whole_numbers_are_taken_for_real_ones(written):
    value = options.load(written(KDRun, diffusion__sigma_max=70)).diffusion.sigma_max
    assert value == 70.0 and type(value) is float


def test_lists_of_any_length_come_back_as_tuples(written):
    assert options.load(written(KDRun, net__control_mlp=[8, 9])).net.control_mlp == (8, 9)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"stage": "kd"'])
def test_a_broken_file_is_a_named_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: (not valid JSON|stage is None)"):
        options.load(path)


# --- Command line ---


def test_options_override_a_preset():
    run = options.parse(KDRun, ["tiny_kd", "--train.iterations", "7", "--optim_student.betas", "0.5", "0.7", "--out", "elsewhere"])
    preset = presets.get("tiny_kd")
    train = dataclasses.replace(preset.train, iterations=7)
    optim = dataclasses.replace(preset.optim_student, betas=(0.5, 0.7))
    assert run == dataclasses.replace(preset, train=train, optim_student=optim, out="elsewhere")


def test_options_override_an_earlier_run(written):
    path = written(KDRun, train__seed=5)
    run = options.parse(KDRun, [str(path), "--train.iterations", "7"])
    assert (run.train.seed, run.train.iterations, run.optim_student.lr) == (5, 7, 1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--train.iteratons", "3"], ("--train.iteratons", "--train.iterations")),
        (["--train.iterations", "many"], ("--train.iterations", "many")),
        (["--train.recompute", "half"], ("--train.recompute", "half")),
        (["--optim_student.lr"], ("--optim_student.lr",)),
    ],
)
def test_unknown_and_ill_typed_options_end_with_status_2_and_the_name(capsys, given, words):
    with pytest.raises(SystemExit) as stop:
        options.parse(KDRun, ["tiny_kd", *given], prog="kd")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    said = captured.err + captured.out
    assert all(word in said for word in words)


def test_an_impossible_value_on_the_command_line_names_the_option(capsys):
    with pytest.raises((ConfigError, SystemExit)) as stop:
        options.parse(KDRun, ["tiny_kd", "--train.micro_batch_size", "7"])
    captured = capsys.readouterr()
    assert "micro_batch_size" in str(stop.value) + captured.err + captured.out


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'tiny_kdd'; did you mean 'tiny_kd'"):
        options.parse(KDRun, ["tiny_kdd"])


def test_a_preset_of_another_stage_is_unknown_here():
    with pytest.raises(ConfigError, match="unknown preset 'tiny_dmd2'"):
        options.parse(KDRun, ["tiny_dmd2"])


@pytest.mark.parametrize("argv", [[], ["--train.iterations", "3"]])
def test_without_a_preset_the_presets_are_listed(argv):
    with pytest.raises(SystemExit, match="usage: kd PRESET(.|\n)*tiny_kd"):
        options.parse(KDRun, argv, prog="kd")


def test_files_that_do_not_fit_the_command(tmp_path, written):
    with pytest.raises(ConfigError, match="absent.json: no such configuration file"):
        options.parse(KDRun, [str(tmp_path / "absent.json")])
    with pytest.raises(ConfigError, match="configures stage 'teacher'.*pretrain_kd"):
        options.parse(KDRun, [str(written(TeacherRun))])
