"""Named configurations: the 7B recipe for each control, and a tiny setting that runs on a laptop."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from cosmos_mp.config import (
    TEACHER_7B,
    ClipConfig,
    Control,
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
    Run,
    SamplerConfig,
    SampleRun,
    TeacherLossConfig,
    TeacherRun,
    TextConfig,
    TokenizerConfig,
    TrainConfig,
)

NEGATIVE_PROMPT = (
    "The video captures a game playing, with bad crappy graphics and cartoonish frames. It represents a recording of old outdated games. "
    "The lighting looks very fake. The textures are very raw and basic. The geometries are very primitive. The images are very pixelated "
    "and of poor CG quality. There are many subtitles in the footage. Overall, the video is unrealistic at all."
)
"""The recipe's negative prompt."""


def _transfer1_7b(control: str) -> dict[str, Run]:
    teacher = TEACHER_7B.replace("edge_control", f"{control}_control")
    clips, holdout, pairs = f"datasets/clips/{control}/train", f"datasets/clips/{control}/holdout", f"datasets/pairs/{control}"
    runs = {
        "encode": EncodeRun(out=clips, clip=ClipConfig(control=control)),
        "teacher": TeacherRun(out=f"runs/{control}_teacher", clips=clips, holdout=holdout),
        "pairs": PairsRun(out=pairs, teacher=teacher, clips=clips),
        "kd": KDRun(out=f"runs/{control}_kd", teacher=teacher, pairs=pairs, holdout=holdout),
        "dmd2": DMD2Run(out=f"runs/{control}_dmd2", teacher=teacher, student=f"runs/{control}_kd", clips=clips, holdout=holdout),
        "evaluate": EvaluateRun(
            out=f"runs/{control}_evaluation",
            teacher=teacher,
            students=(f"KD=runs/{control}_kd", f"DMD2=runs/{control}_dmd2"),
            clips=holdout,
        ),
        "sample": SampleRun(student=f"runs/{control}_dmd2", clip=ClipConfig(control=control, edge_preset="medium")),
    }
    return {f"transfer1_7b_{control}_{stage}": run for stage, run in runs.items()}


# The 7B's graph at a size that two cores train in minutes. The control MLP is one wide layer: the 7B's bottleneck of 16 would pass
# too little of a control that the small network has to follow closely.
TINY_NET = NetConfig(
    hidden=96,
    heads=4,
    blocks=4,
    control_blocks=2,
    mlp_hidden=288,
    adaln_lora_dim=32,
    text_dim=64,
    control_mlp=(96,),
    max_latent=(8, 16, 16),
)
TINY_DIFFUSION = DiffusionConfig(latent_shape=(16, 3, 8, 8), condition_frames=0)
TINY_SAMPLER = SamplerConfig(guidance=0.5, unconditional="empty")
TINY_TOKENIZER = TokenizerConfig("tiny", "runs/tiny/tokenizer")
TINY_TEXT = TextConfig("tiny", "", tokens=12, dim=64)
TINY_CLIP = ClipConfig(control="edge", frames=9, height=64, width=64, edge_preset="medium")
TINY_TRAIN = TrainConfig(global_batch_size=32, micro_batch_size=32, log_every=10, save_every=200, picture_every=500, recompute="none")


def _tiny() -> dict[str, Run]:
    root = "runs/tiny"
    clips, holdout, pairs = f"{root}/clips/train", f"{root}/clips/holdout", f"{root}/pairs"
    common = {"net": TINY_NET, "diffusion": TINY_DIFFUSION}
    return {
        "tiny_encode": EncodeRun(
            videos=f"{root}/videos",
            out=clips,
            shard_size=512,
            clip=TINY_CLIP,
            tokenizer=TINY_TOKENIZER,
            text=TINY_TEXT,
        ),
        "tiny_teacher": TeacherRun(
            out=f"{root}/teacher",
            clips=clips,
            holdout=holdout,
            loss=TeacherLossConfig(log_sigma_mean=-0.7, log_sigma_std=1.4, uniform_fraction=0.25, text_dropout=0.1),
            tokenizer=TINY_TOKENIZER,
            optim_teacher=OptimConfig(lr=3e-3, betas=(0.9, 0.99), clip_norm=1.0, warmup=100, decay="cosine"),
            ema=EMAConfig(0.998),
            train=replace(TINY_TRAIN, iterations=2400),
            **common,
        ),
        "tiny_pairs": PairsRun(
            out=pairs,
            count=2048,
            teacher=f"{root}/teacher",
            clips=clips,
            batch_size=32,
            shard_size=128,
            sampler=TINY_SAMPLER,
            text=TINY_TEXT,
            **common,
        ),
        "tiny_kd": KDRun(
            out=f"{root}/kd",
            teacher=f"{root}/teacher",
            pairs=pairs,
            holdout=holdout,
            tokenizer=TINY_TOKENIZER,
            optim_student=OptimConfig(lr=2e-3, betas=(0.9, 0.99), warmup=50, decay="cosine"),
            ema=EMAConfig(0.99),
            train=replace(TINY_TRAIN, iterations=800, picture_every=200),
            **common,
        ),
        "tiny_dmd2": DMD2Run(
            out=f"{root}/dmd2",
            teacher=f"{root}/teacher",
            student=f"{root}/kd",
            clips=clips,
            holdout=holdout,
            head=HeadConfig(hidden=64, feature_blocks=(2,)),
            # At this size guidance over-saturates at once, eps-space errors are all in the smallest sigmas, and large ones
            # teach nothing.
            dmd2=DMD2Config(guidance=0.0, unconditional="empty", gan_weight=0.3, fake_score_space="network"),
            tokenizer=TINY_TOKENIZER,
            text=TINY_TEXT,
            optim_student=OptimConfig(lr=1e-4, betas=(0.0, 0.99), decay="cosine", decay_from=0.5),
            optim_fake_score=OptimConfig(lr=1e-3, betas=(0.0, 0.99), decay="cosine", decay_from=0.5),
            optim_discriminator=OptimConfig(lr=1e-3, betas=(0.0, 0.99), decay="cosine", decay_from=0.5),
            ema=EMAConfig(0.98),
            train=replace(TINY_TRAIN, iterations=400, picture_every=100, save_every=100),
            net=TINY_NET,
            diffusion=replace(TINY_DIFFUSION, video_noise_multiplier=0.3),
        ),
        "tiny_evaluate": EvaluateRun(
            out=f"{root}/evaluation",
            teacher=f"{root}/teacher",
            students=(f"KD={root}/kd", f"DMD2={root}/dmd2"),
            clips=holdout,
            videos=f"{root}/videos",
            samples=512,
            batch_size=64,
            texture_period=64 / 3,
            sampler=TINY_SAMPLER,
            tokenizer=TINY_TOKENIZER,
            text=TINY_TEXT,
            **common,
        ),
        "tiny_sample": SampleRun(student=f"{root}/dmd2", clip=TINY_CLIP, tokenizer=TINY_TOKENIZER, text=TINY_TEXT, **common),
    }


def _all() -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for control in get_args(Control):
        runs |= _transfer1_7b(control)
    return runs | _tiny()


def names(kind: type) -> list[str]:
    """Presets of one stage."""
    return [name for name, run in _all().items() if isinstance(run, kind)]


def get(name: str) -> Run:
    """A preset by name.

    Raises:
        KeyError: no such preset.
    """
    return _all()[name]
