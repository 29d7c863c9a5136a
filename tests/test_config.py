"""Values of a configuration that cannot run, and the defaults."""

from __future__ import annotations

import re

import pytest

from cosmos_mp import config
from cosmos_mp.config import (
    ClipConfig,
    ConfigError,
    DiffusionConfig,
    DMD2Config,
    DMD2Run,
    EMAConfig,
    EncodeRun,
    EvaluateRun,
    HeadConfig,
    KDRun,
    NetConfig,
    OptimConfig,
    PairsRun,
    ParallelConfig,
    ProfileConfig,
    SamplerConfig,
    SampleRun,
    TeacherLossConfig,
    TextConfig,
    TrainConfig,
)
from cosmos_mp.training.loop import micro_batches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NetConfig(hidden=100, heads=3), "net.hidden=100 over net.heads=3"),
        (lambda: NetConfig(hidden=26, heads=2), "even head size"),
        (lambda: NetConfig(hidden=20, heads=2), "at least 12"),
        (lambda: NetConfig(control_blocks=0), "net.control_blocks=0"),
        (lambda: NetConfig(blocks=2, control_blocks=3), "1..net.blocks=2"),
        *((lambda k=k: DMD2Config(student_update_freq=k), f"dmd2.student_update_freq={k} must be at least 2") for k in (0, 1)),
        (lambda: NetConfig(heads=0), "net.heads=0 must be above 0"),
        (lambda: NetConfig(mlp_hidden=-1), "net.mlp_hidden=-1 must be above 0"),
        (lambda: NetConfig(rope_ratio=(0.0, 1.0, 1.0)), "net.rope_ratio="),
        (lambda: NetConfig(base_fps=0.0), "net.base_fps=0.0 must be above 0"),
        (lambda: DiffusionConfig(latent_shape=(16, 3, 7, 8)), "height and width must be even"),
        (lambda: KDRun(diffusion=DiffusionConfig(latent_shape=(8, 3, 8, 8))), "has 8 channels, net.latent_channels=16"),
        (lambda: SampleRun(diffusion=DiffusionConfig(latent_shape=(16, 3, 8, 242))), "exceeds net.max_latent"),
        (lambda: SampleRun(control_weight=float("nan")), "control_weight=nan must be a finite number"),
        (lambda: EncodeRun(limit=-70), "limit=-70 must be 0 or above"),
        (lambda: EncodeRun(holdout_share=7.0), "holdout_share=7.0 must be between 0 and 1"),
        (lambda: PairsRun(text=TextConfig(dim=8)), "text.dim=8 is not"),
        (lambda: TextConfig(tokens=0), "text.tokens=0 must be above 0"),
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
    assert NetConfig().head_dim == 128
    assert (KDRun().optim_student.lr, KDRun().train.iterations, KDRun().train.global_batch_size) == (1e-5, 10_000, 64)
    run = DMD2Run()
    # One step of 64 clips on one GPU is 64 micro-batches; on eight, eight each.
    assert [micro_batches(run.train, dp) for dp in (1, 8, 64)] == [64, 8, 1]
    rates = (run.optim_student.lr, run.optim_fake_score.lr, run.optim_discriminator.lr)
    assert rates == (5e-7, 5e-7, 5e-7) and run.train.iterations == 24_000
    assert (run.dmd2.guidance, run.dmd2.gan_weight, run.dmd2.student_update_freq, run.head.feature_blocks) == (5.0, 1e-3, 5, (14,))
    assert (config.PairsRun().count, config.PairsRun().sampler.steps, config.PairsRun().sampler.guidance) == (10_000, 35, 7.0)


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
        *((lambda n=n: DMD2Run(head=HeadConfig(first_frame=n)), f"head.first_frame={n} leaves too few of the 16") for n in (15, 16)),
        (lambda: NetConfig(control_channels=8), "net.control_channels=8"),
    ],
)
def test_options_out_of_range_are_named(make, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": -1}, "profile.start=-1 must be 0 or above"),
        ({"start": 10, "stop": 10}, "profile.stop=10, the first iteration after the window, must lie above profile.start=10"),
        ({"ranks": ()}, "profile.ranks=() must be numbers of ranks"),
        ({"ranks": (0, -1)}, "profile.ranks=(0, -1) must be numbers of ranks"),
    ],
)
def test_a_window_that_holds_nothing_is_refused(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        ProfileConfig(**options)


def test_nothing_is_profiled_unless_told():
    assert not ProfileConfig().on and ProfileConfig("torch").on and ProfileConfig(memory=True).on
    # The default window is one whole cycle of DMD2.
    window = range(ProfileConfig().start, ProfileConfig().stop)
    assert len(window) == DMD2Config().student_update_freq and all(kind().profile == ProfileConfig() for kind in (KDRun, DMD2Run))


# --- Parallelism ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(({name: 0}, f"parallel.{name}=0 must be above 0") for name in ("tp", "cp")),
        *(({"timeout": s}, f"parallel.timeout={s} must be between 4 and a day: in a quarter") for s in (3.9, float("inf"), float("nan"))),
        *(({name: -1}, f"parallel.{name}=-1 must be 0 or above") for name in ("dp", "shard", "reference_cp_scaling")),
        ({"sequence_parallel": True}, "parallel.sequence_parallel splits over the ranks of tp: give parallel.tp at least 2"),
        ({"sequence_parallel": True, "cp": 4}, "give parallel.tp at least 2, or leave it off"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        ParallelConfig(**options)


def test_a_run_is_not_split_unless_told():
    plain = ParallelConfig()
    assert (plain.tp, plain.cp, plain.dp, plain.shard, plain.sequence_parallel) == (1, 1, 0, 0, False)
    assert (plain.cp_attention, plain.reduce, plain.compute, plain.reference_cp_scaling) == ("ulysses", "step", "auto", 0)
    assert all(kind().parallel == plain for kind in (config.TeacherRun, KDRun, DMD2Run))
    assert ParallelConfig(tp=2, sequence_parallel=True, reference_cp_scaling=8, shard=4, timeout=4.5).tp == 2
