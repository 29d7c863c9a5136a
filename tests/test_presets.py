"""Presets: the recipe's numbers under every control, and a tiny setting whose stages fit one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cosmos_mp import config, presets
from cosmos_mp.config import DMD2Run, KDRun, PairsRun
from cosmos_mp.text import build_text_encoder
from cosmos_mp.tokenizers import tiny

CONTROLS = ("edge", "vis", "depth", "keypoint", "seg")
ROLES = ("student", "fake_score", "discriminator")


def stages(prefix: str) -> dict[str, config.Run]:
    return {stage: presets.get(f"{prefix}_{stage}") for stage in config.STAGES}


# --- 7B ---


@pytest.mark.parametrize("control", CONTROLS)
def test_kd_has_the_recipes_numbers(control):
    run = presets.get(f"transfer1_7b_{control}_kd")
    assert isinstance(run, KDRun)
    assert run.optim_student.lr == 1e-5
    assert (run.train.global_batch_size, run.train.iterations, run.optim_student.clip_norm) == (64, 10_000, 10.0)


@pytest.mark.parametrize("control", CONTROLS)
def test_dmd2_has_the_recipes_numbers(control):
    run = presets.get(f"transfer1_7b_{control}_dmd2")
    assert isinstance(run, DMD2Run)
    assert {role: getattr(run, f"optim_{role}").lr for role in ROLES} == dict.fromkeys(ROLES, 5e-7)
    assert {role: getattr(run, f"optim_{role}").clip_norm for role in ROLES} == dict.fromkeys(ROLES, 10.0)
    assert (run.train.global_batch_size, run.train.iterations) == (64, 24_000)
    assert (run.dmd2.guidance, run.dmd2.gan_weight, run.dmd2.student_update_freq) == (5.0, 1e-3, 5)
    assert run.dmd2.unconditional == "negative_prompt" and run.negative_prompt == ""
    assert (run.dmd2.fake_score_space, run.dmd2.ladd, run.dmd2.feature_role) == ("eps", False, "teacher")


@pytest.mark.parametrize("control", CONTROLS)
def test_pairs_have_the_recipes_numbers(control):
    run = presets.get(f"transfer1_7b_{control}_pairs")
    assert isinstance(run, PairsRun)
    assert (run.count, run.sampler.steps, run.sampler.guidance, run.sampler.unconditional) == (10_000, 35, 7.0, "negative_prompt")


@pytest.mark.parametrize("control", CONTROLS)
def test_every_7b_stage_knows_the_same_clip_latent_network_and_control(control):
    runs = stages(f"transfer1_7b_{control}")
    for stage, run in runs.items():
        if hasattr(run, "diffusion"):
            assert run.diffusion.latent_shape == (16, 16, 88, 160), stage
            assert (run.diffusion.sigma_data, run.diffusion.sigma_max, run.diffusion.condition_frames) == (0.5, 80.0, 2)
            assert run.diffusion.video_noise_multiplier == 4.0
        if hasattr(run, "net"):
            assert run.net == config.NetConfig()
        if hasattr(run, "clip"):
            assert (run.clip.control, run.clip.frames, run.clip.height, run.clip.width) == (control, 121, 704, 1280)


@pytest.mark.parametrize("control", CONTROLS)
def test_each_stage_reads_what_the_one_before_writes(control):
    linked(stages(f"transfer1_7b_{control}"))
    assert control in presets.get(f"transfer1_7b_{control}_pairs").teacher


def test_controls_do_not_share_a_folder():
    outs = [presets.get(f"transfer1_7b_{control}_{stage}").out for control in CONTROLS for stage in ("pairs", "kd", "dmd2")]
    assert len(set(outs)) == len(outs)


def test_the_negative_prompt_is_the_recipes():
    assert presets.NEGATIVE_PROMPT.startswith("The video captures a game playing, with bad crappy graphics and cartoonish frames.")
    assert presets.NEGATIVE_PROMPT.endswith("Overall, the video is unrealistic at all.")


# --- Tiny ---


def test_tiny_stages_agree_with_one_another():
    runs = stages("tiny")
    clip, text = runs["encode"].clip, runs["encode"].text
    latent_shape = tiny_latent_shape(clip)
    for stage, run in runs.items():
        if hasattr(run, "diffusion"):
            assert run.diffusion.latent_shape == latent_shape, stage
            assert run.diffusion.condition_frames == 0
        if hasattr(run, "net"):
            assert run.net == presets.TINY_NET
            assert all(size <= most for size, most in zip(run.diffusion.latent_shape[1:], run.net.max_latent, strict=True))
            assert run.net.text_dim == text.dim
        for name, expected in (("text", text), ("clip", clip), ("tokenizer", runs["encode"].tokenizer)):
            assert getattr(run, name, expected) == expected, f"{stage}.{name}"
    assert runs["pairs"].sampler == runs["evaluate"].sampler
    assert build_text_encoder(text).encode(["a red circle"]).shape == (1, text.tokens, text.dim)
    linked(runs)


def tiny_latent_shape(clip: config.ClipConfig) -> tuple[int, ...]:
    frames = np.random.default_rng(0).integers(0, 256, (clip.frames, clip.height, clip.width, 3), dtype=np.uint8)
    return tiny.fit_tiny([frames], seed=0).latent_shape(clip.frames, clip.height, clip.width)


def linked(runs: dict[str, config.Run]) -> None:
    """Paths between the stages: teacher -> pairs -> KD -> DMD2 -> evaluation and sample."""
    train, holdout = runs["encode"].out, str(Path(runs["encode"].out).with_name("holdout"))
    assert {runs[stage].clips for stage in ("teacher", "pairs", "dmd2")} == {train}
    assert {runs[stage].holdout for stage in ("teacher", "kd", "dmd2")} | {runs["evaluate"].clips} == {holdout}
    assert runs["kd"].pairs == runs["pairs"].out
    assert len({runs[stage].teacher for stage in ("pairs", "kd", "dmd2", "evaluate")}) == 1
    assert runs["dmd2"].student == runs["kd"].out
    assert runs["sample"].student == runs["dmd2"].out
    assert runs["evaluate"].students == (f"KD={runs['kd'].out}", f"DMD2={runs['dmd2'].out}")


# --- Names ---


def test_names_lists_the_presets_of_one_stage():
    assert presets.names(KDRun) == [f"transfer1_7b_{control}_kd" for control in CONTROLS] + ["tiny_kd"]
    every = [name for kind in config.STAGES.values() for name in presets.names(kind)]
    assert len(set(every)) == len(every) == 6 * len(config.STAGES)
    assert all(dataclasses.is_dataclass(presets.get(name)) for name in every)


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match="tiny_kdd"):
        presets.get("tiny_kdd")
