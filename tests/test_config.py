"""Configuration files and command lines: what is read back, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cosmos_mp import config, presets
from cosmos_mp.config import (
    ClipConfig,
    ConfigError,
    DiffusionConfig,
    DMD2Config,
    DMD2Run,
    EMAConfig,
    EvaluateRun,
    HeadConfig,
    KDRun,
    NetConfig,
    OptimConfig,
    PairsRun,
    SamplerConfig,
    TeacherLossConfig,
    TeacherRun,
    TextConfig,
    TrainConfig,
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
        config.save(kind(), path)
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
        config.save(value, path)
        again = config.load(path)
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
        ({"train__recompute": "half"}, "train: recompute: 'half' is none of none, full"),
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
        config.load(path)


def test_whole_numbers_are_taken_for_real_ones(written):
    value = config.load(written(KDRun, diffusion__sigma_max=70)).diffusion.sigma_max
    assert value == 70.0 and type(value) is float


def test_lists_of_any_length_come_back_as_tuples(written):
    assert config.load(written(KDRun, net__control_mlp=[8, 9])).net.control_mlp == (8, 9)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"stage": "kd"'])
def test_a_broken_file_is_a_named_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: (not valid JSON|stage is None)"):
        config.load(path)


# --- Values that cannot run ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NetConfig(hidden=100, heads=3), "net.hidden=100 over net.heads=3"),
        (lambda: NetConfig(hidden=26, heads=2), "even head size"),
        (lambda: NetConfig(hidden=20, heads=2), "at least 12"),
        (lambda: NetConfig(control_blocks=0), "net.control_blocks=0"),
        (lambda: NetConfig(blocks=2, control_blocks=3), "1..net.blocks=2"),
        (lambda: DMD2Config(student_update_freq=0), "dmd2.student_update_freq=0"),
        (lambda: DMD2Config(ladd=True, gan_weight=0.0), "dmd2.gan_weight"),
        (lambda: DMD2Config(ladd=True, feature_role="fake_score"), "dmd2.feature_role to teacher"),
        (lambda: TrainConfig(global_batch_size=6, micro_batch_size=4), "train.global_batch_size=6 .*train.micro_batch_size=4"),
        *((lambda n=name: TrainConfig(**{n: 0}), f"train.{name}=0 must be") for name in ("iterations", "save_every", "keep_last")),
        *((lambda b=b: DMD2Run(head=HeadConfig(feature_blocks=b)), "head.feature_blocks") for b in ((), (28,), (3, 3), (4, 2), (-1, 2))),
    ],
)
def test_values_that_cannot_run_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_recipe_of_the_7b_is_the_default():
    assert (NetConfig().head_dim, TrainConfig().accumulation) == (128, 64)
    assert (KDRun().optim_student.lr, KDRun().train.iterations, KDRun().train.global_batch_size) == (1e-5, 10_000, 64)
    run = DMD2Run()
    rates = (run.optim_student.lr, run.optim_fake_score.lr, run.optim_discriminator.lr)
    assert rates == (5e-7, 5e-7, 5e-7) and run.train.iterations == 24_000
    assert (run.dmd2.guidance, run.dmd2.gan_weight, run.dmd2.student_update_freq, run.head.feature_blocks) == (5.0, 1e-3, 5, (14,))
    assert (config.PairsRun().count, config.PairsRun().sampler.steps, config.PairsRun().sampler.guidance) == (10_000, 35, 7.0)


# --- Command line ---


def test_options_override_a_preset():
    run = config.parse(KDRun, ["tiny_kd", "--train.iterations", "7", "--optim_student.betas", "0.5", "0.7", "--out", "elsewhere"])
    preset = presets.get("tiny_kd")
    train = dataclasses.replace(preset.train, iterations=7)
    optim = dataclasses.replace(preset.optim_student, betas=(0.5, 0.7))
    assert run == dataclasses.replace(preset, train=train, optim_student=optim, out="elsewhere")


def test_options_override_an_earlier_run(written):
    path = written(KDRun, train__seed=5)
    run = config.parse(KDRun, [str(path), "--train.iterations", "7"])
    assert (run.train.seed, run.train.iterations, run.optim_student.lr) == (5, 7, 1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.iteratons", "3"], ("--train.iteratons", "--train.iterations")),
        (["--train.iterations", "many"], ("--train.iterations", "many")),
        (["--train.recompute", "half"], ("--train.recompute", "half")),
        (["--optim_student.lr"], ("--optim_student.lr",)),
    ],
)
def test_unknown_and_ill_typed_options_end_with_status_2_and_the_name(capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        config.parse(KDRun, ["tiny_kd", *options], prog="kd")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    said = captured.err + captured.out
    assert all(word in said for word in words)


def test_an_impossible_value_on_the_command_line_names_the_option(capsys):
    with pytest.raises((ConfigError, SystemExit)) as stop:
        config.parse(KDRun, ["tiny_kd", "--train.micro_batch_size", "7"])
    captured = capsys.readouterr()
    assert "micro_batch_size" in str(stop.value) + captured.err + captured.out


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'tiny_kdd'; did you mean 'tiny_kd'"):
        config.parse(KDRun, ["tiny_kdd"])


def test_a_preset_of_another_stage_is_unknown_here():
    with pytest.raises(ConfigError, match="unknown preset 'tiny_dmd2'"):
        config.parse(KDRun, ["tiny_dmd2"])


@pytest.mark.parametrize("argv", [[], ["--train.iterations", "3"]])
def test_without_a_preset_the_presets_are_listed(argv):
    with pytest.raises(SystemExit, match="usage: kd PRESET(.|\n)*tiny_kd"):
        config.parse(KDRun, argv, prog="kd")


def test_files_that_do_not_fit_the_command(tmp_path, written):
    with pytest.raises(ConfigError, match="absent.json: no such configuration file"):
        config.parse(KDRun, [str(tmp_path / "absent.json")])
    with pytest.raises(ConfigError, match="configures stage 'teacher'.*pretrain_kd"):
        config.parse(KDRun, [str(written(TeacherRun))])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DMD2Config(gan_weight=-1.0), "dmd2.gan_weight=-1.0 must be 0 or above"),
        (lambda: DMD2Config(gan_weight=0.0, r1_weight=1.0), "dmd2.r1_weight needs a discriminator"),
        (lambda: HeadConfig(hidden=0), "head.hidden=0 must be above 0"),
        (lambda: HeadConfig(hidden=12), "head.hidden=12 must be a multiple"),
        (lambda: DiffusionConfig(sigma_max=-3.0), "diffusion.sigma_max=-3.0 must be above 0"),
        (lambda: DiffusionConfig(sigma_min=90.0), "diffusion.sigma_min=90.0 must lie below"),
        (lambda: SamplerConfig(steps=0), "sampler.steps=0 must be above 0"),
        (lambda: ClipConfig(stride=0), "clip.stride=0 must be above 0"),
        (lambda: OptimConfig(betas=(0.9, 1.5)), "optimizer option betas="),
        (lambda: OptimConfig(decay_from=1.5), "decay_from=1.5 must be between 0 and 1"),
        (lambda: EMAConfig(1.0), "ema.decay=1.0"),
        (lambda: TeacherLossConfig(text_dropout=7.0), "loss.text_dropout=7.0 must be between 0 and 1"),
        (lambda: TeacherLossConfig(uniform_range=(2.0, 1.0)), "loss.uniform_range"),
        (lambda: TrainConfig(picture_samples=0), "train.picture_samples=0 must be at least 1"),
        (lambda: PairsRun(batch_size=0), "batch_size=0 must be above 0"),
        (lambda: EvaluateRun(samples=1), "samples=1 must be at least 2"),
        (lambda: DMD2Run(text=TextConfig(dim=8)), "text.dim=8 is not the network's net.text_dim=1024"),
        (lambda: DMD2Run(head=HeadConfig(first_frame=16)), "head.first_frame=16 leaves none"),
        (lambda: NetConfig(control_channels=8), "net.control_channels=8"),
    ],
)
def test_options_out_of_range_are_named(make, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make()
