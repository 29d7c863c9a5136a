"""Typed run configuration: one dataclass per stage, built from shared parts. Every default is the 7B recipe's number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

Control = Literal["edge", "vis", "depth", "keypoint", "seg"]
EdgePreset = Literal["random", "none", "very_low", "low", "medium", "high", "very_high"]
Head = Literal["conv3d", "conv2d", "attention", "spatial_temporal"]
Kernels = Literal["auto", "triton", "torch"]
FP8Recipe = Literal["current", "block", "delayed", "mxfp8"]
Role = Literal["teacher", "student", "fake_score"]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the option and the remedy."""


def _need(section: str, options: object, **rules: tuple[Callable[[Any], bool], str]) -> None:
    """Refuse an option that breaks its rule: name=(test, what is wanted)."""
    for name, (holds, wanted) in rules.items():
        value = getattr(options, name)
        if not holds(value):
            raise ConfigError(f"{section}{name}={value} must be {wanted}")


POSITIVE = (lambda value: value > 0, "above 0")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or above")
SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
ALL_POSITIVE = (lambda values: all(value > 0 for value in values), "numbers above 0")
FINITE = (math.isfinite, "a finite number")
ENOUGH_TO_ASK = (lambda seconds: 4 <= seconds <= 86400, "between 4 and a day: in a quarter of it, or in 5 s, a rank asks who is lost")

TEACHER_7B = "checkpoints/nvidia/Cosmos-Transfer1-7B/base_model.pt,checkpoints/nvidia/Cosmos-Transfer1-7B/edge_control.pt"
"""The teacher as NVIDIA publishes it: the base's file and the control branch's."""


# --- Networks and diffusion ---


@dataclass(frozen=True)
class NetConfig:
    """Sizes of the base DiT and of its control branch (Cosmos-Transfer1-7B)."""

    hidden: int = 4096
    heads: int = 32
    blocks: int = 28
    control_blocks: int = 3
    mlp_hidden: int = 16384
    adaln_lora_dim: int = 256
    text_dim: int = 1024
    latent_channels: int = 16
    """Channels of the latent; the network reads two more, the condition mask and the padding mask."""
    control_channels: int = 128
    """The control latent is zero-padded to this many channels; the padding mask is one more."""
    control_mlp: tuple[int, ...] = (16, 16, 32, 32, 96, 96, 256)
    """Widths of the hidden layers between the embedded control and the residual stream."""
    max_latent: tuple[int, int, int] = (128, 240, 240)
    """Largest latent (T, H, W) that the learned position embedding covers."""
    rope_theta: float = 10000.0
    rope_ratio: tuple[float, float, float] = (2.0, 1.0, 1.0)
    """NTK extrapolation ratio of the base's rotary embedding along (t, h, w)."""
    control_rope_ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """The same for the control branch. The reference never sets its t ratio to the base's 2."""
    base_fps: float = 24.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def __post_init__(self) -> None:
        sizes = ("hidden", "heads", "blocks", "control_blocks", "mlp_hidden", "adaln_lora_dim", "text_dim", "latent_channels")
        _need("net.", self, **dict.fromkeys((*sizes, "control_channels", "rope_theta", "base_fps"), POSITIVE))
        _need("net.", self, **dict.fromkeys(("control_mlp", "max_latent", "rope_ratio", "control_rope_ratio"), ALL_POSITIVE))
        if self.hidden % self.heads or self.head_dim % 2 or self.head_dim < 12:
            raise ConfigError(f"net.hidden={self.hidden} over net.heads={self.heads} must give an even head size of at least 12")
        if self.control_channels < self.latent_channels:
            raise ConfigError(f"net.control_channels={self.control_channels} cannot hold a control of {self.latent_channels} channels")
        if not 0 < self.control_blocks <= self.blocks:
            raise ConfigError(f"net.control_blocks={self.control_blocks} must lie in 1..net.blocks={self.blocks}")


@dataclass(frozen=True)
class HeadConfig:
    """Discriminator heads on features of the teacher (or of the fake score)."""

    kind: Head = "conv3d"
    hidden: int = 320
    feature_blocks: tuple[int, ...] = (14,)
    """Base blocks whose output is judged, ascending, 0-based; one head each."""
    first_frame: int = 0
    """Latent frames before this one are not judged."""

    def __post_init__(self) -> None:
        _need("head.", self, hidden=POSITIVE, first_frame=NOT_NEGATIVE)
        if self.hidden % 8:
            raise ConfigError(f"head.hidden={self.hidden} must be a multiple of the 8 groups of its norm")


@dataclass(frozen=True)
class DiffusionConfig:
    """EDM diffusion in latent space."""

    latent_shape: tuple[int, int, int, int] = (16, 16, 88, 160)
    """(C, T, H, W) of a sample: 121 frames of 704 x 1280. The stores are checked against it."""
    sigma_data: float = 0.5
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    noise_schedule: Literal["edm_sampling", "inference"] = "edm_sampling"
    """The 1000-entry ramp from which DMD2 draws its noise levels."""
    video_noise_multiplier: float = 4.0
    """Factor on the drawn level: the square root of the 16 latent frames."""
    condition_frames: int = 2
    """Given latent frames: each training sample draws 0..this many."""
    condition_sigma: float = 0.001
    """Noise on the given frames before they enter the network."""

    def __post_init__(self) -> None:
        positive = dict.fromkeys(("sigma_data", "sigma_max", "sigma_min", "video_noise_multiplier", "condition_sigma"), POSITIVE)
        _need("diffusion.", self, condition_frames=NOT_NEGATIVE, **positive)
        _need("diffusion.", self, latent_shape=ALL_POSITIVE)
        if self.latent_shape[2] % 2 or self.latent_shape[3] % 2:
            raise ConfigError(f"diffusion.latent_shape={self.latent_shape}: height and width must be even, patches are 2 x 2")
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"diffusion.sigma_min={self.sigma_min} must lie below diffusion.sigma_max={self.sigma_max}")


@dataclass(frozen=True)
class SamplerConfig:
    """The teacher's second-order sampler (RES 2ab): steps + 1 evaluations, two network calls each when guided."""

    steps: int = 35
    guidance: float = 7.0
    """cond + guidance * (cond - uncond); 7 is 8 in the Ho-Salimans form."""
    unconditional: Literal["negative_prompt", "empty"] = "negative_prompt"

    def __post_init__(self) -> None:
        _need("sampler.", self, steps=POSITIVE, guidance=FINITE)


# --- Text, latents, clips ---


@dataclass(frozen=True)
class TokenizerConfig:
    """Video <-> latent."""

    kind: Literal["nvidia", "diffusers", "tiny"] = "nvidia"
    path: str = "checkpoints/nvidia/Cosmos-Tokenize1-CV8x8x8-720p"


@dataclass(frozen=True)
class TextConfig:
    """Caption -> embedding."""

    kind: Literal["t5", "cached", "tiny"] = "t5"
    path: str = "checkpoints/google-t5/t5-11b"
    tokens: int = 512
    dim: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of T5's weights and computing; bfloat16 halves its memory. Embeddings are float32."""

    def __post_init__(self) -> None:
        _need("text.", self, tokens=POSITIVE, dim=POSITIVE)


@dataclass(frozen=True)
class ClipConfig:
    """How a video file becomes a training sample."""

    control: Control = "edge"
    frames: int = 121
    stride: int = 1
    height: int = 704
    width: int = 1280
    edge_preset: EdgePreset = "random"
    """Canny thresholds: random (drawn per clip), or none, very_low, low, medium, high, very_high."""
    windows: int = 1
    """Windows taken from each clip, each with its own start and control draw."""

    def __post_init__(self) -> None:
        _need("clip.", self, **dict.fromkeys(("frames", "stride", "height", "width", "windows"), POSITIVE))


# --- Optimisation ---


@dataclass(frozen=True)
class OptimConfig:
    """AdamW of one role."""

    lr: float = 5e-7
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    """Gradient norm of the role above which its gradient is scaled down; 0 = never."""
    warmup: int = 0
    """Optimizer steps of this role over which the rate rises from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    decay_from: float = 0.0
    """Fraction of the role's steps after which the cosine begins."""

    def __post_init__(self) -> None:
        betas = (lambda pair: all(0 <= beta < 1 for beta in pair), "two numbers in 0..1, 1 excluded")
        _need("optimizer option ", self, lr=POSITIVE, betas=betas, eps=POSITIVE, weight_decay=NOT_NEGATIVE)
        _need("optimizer option ", self, clip_norm=NOT_NEGATIVE, warmup=NOT_NEGATIVE, decay_from=SHARE)


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the trained network; it advances on that network's own steps only."""

    decay: float = 0.0
    """0 = no average is kept."""

    def __post_init__(self) -> None:
        _need("ema.", self, decay=(lambda value: 0 <= value < 1, "in 0..1, 1 excluded"))


@dataclass(frozen=True)
class TeacherLossConfig:
    """EDM denoising loss: how the noise level is drawn and what is dropped."""

    log_sigma_mean: float = 0.0
    log_sigma_std: float = 1.0
    uniform_fraction: float = 0.0
    """Share of samples whose sigma is log-uniform over uniform_range instead."""
    uniform_range: tuple[float, float] = (1.0, 160.0)
    text_dropout: float = 0.2
    control_dropout: float = 0.0

    def __post_init__(self) -> None:
        _need("loss.", self, log_sigma_std=NOT_NEGATIVE, uniform_fraction=SHARE, text_dropout=SHARE, control_dropout=SHARE)
        if not 0 < self.uniform_range[0] <= self.uniform_range[1]:
            raise ConfigError(f"loss.uniform_range={self.uniform_range} must be two ascending sigmas above 0")


@dataclass(frozen=True)
class DMD2Config:
    """Distribution matching with a GAN term (arXiv 2405.14867), as the 7B recipe sets it."""

    student_update_freq: int = 5
    """Iteration i trains the student where i % this == 0, else fake score and discriminator."""
    guidance: float = 5.0
    """cond + guidance * (cond - uncond); 5 is 6 in the Ho-Salimans form."""
    unconditional: Literal["negative_prompt", "empty"] = "negative_prompt"
    gan_weight: float = 1e-3
    ladd: bool = False
    """Adversarial only: no fake score, the student's loss is the GAN term (and reconstruction)."""
    reconstruction_weight: float = 0.0
    """Weight of mean((student - real latent)^2)."""
    reconstruction_warmup: int = 0
    """For this many iterations the student is trained on the reconstruction term alone."""
    critic_warmup: int = 0
    """For this many iterations only fake score and discriminator are trained."""
    feature_role: Literal["teacher", "fake_score"] = "teacher"
    fake_score_init: Literal["teacher", "student"] = "teacher"
    fake_score_space: Literal["eps", "network"] = "eps"
    """Space of the fake score's denoising error; network weights each sample by 1/c_out^2 of its x0 error."""
    r1_weight: float = 0.0
    """Weight of the approximate R1 penalty mean((D(real) - D(real + r1_sigma * noise))^2) (arXiv 2501.08316)."""
    r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        if self.student_update_freq < 2:
            raise ConfigError(
                f"dmd2.student_update_freq={self.student_update_freq} must be at least 2: at 1 no critic would ever be trained"
            )
        _need("dmd2.", self, guidance=FINITE)
        weights = ("gan_weight", "reconstruction_weight", "reconstruction_warmup", "critic_warmup", "r1_weight", "r1_sigma")
        _need("dmd2.", self, **dict.fromkeys(weights, NOT_NEGATIVE))
        if self.r1_weight > 0 and self.gan_weight == 0:
            raise ConfigError("dmd2.r1_weight needs a discriminator: give dmd2.gan_weight a value above 0")
        if self.ladd and self.gan_weight <= 0:
            raise ConfigError("dmd2.ladd trains by the GAN term alone: give dmd2.gan_weight a value above 0")
        if self.ladd and self.feature_role == "fake_score":
            raise ConfigError("dmd2.ladd has no fake score: set dmd2.feature_role to teacher")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    iterations: int = 10_000
    global_batch_size: int = 64
    micro_batch_size: int = 1
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep_last: int = 3
    picture_every: int = 500
    picture_samples: int = 2
    tensorboard: bool = True
    max_nonfinite: int = 3
    """Skipped iterations in a row (non-finite loss or gradient) after which the run stops."""
    recompute: Literal["none", "selective", "full"] = "full"
    """What is computed again in the backward pass of every transformer block: nothing, all but matrix products, attention and
    collectives, or everything."""
    async_save: bool = False
    """Write checkpoints beside the training; the state is copied to the CPU first."""

    def __post_init__(self) -> None:
        at_least_one = (lambda value: value >= 1, "at least 1")
        names = ("iterations", "global_batch_size", "micro_batch_size", "log_every", "save_every", "keep_last", "picture_samples")
        _need("train.", self, **dict.fromkeys((*names, "max_nonfinite"), at_least_one), picture_every=NOT_NEGATIVE, seed=NOT_NEGATIVE)
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} is no multiple of train.micro_batch_size={self.micro_batch_size}"
            )


@dataclass(frozen=True)
class ProfileConfig:
    """A window of iterations whose ranges are named, timed and seen by a profiler; outside it nothing is recorded."""

    kind: Literal["none", "nsight", "torch"] = "none"
    """nsight: NVTX ranges between cudaProfilerStart and -Stop, for examples/profile_nsight.sh; torch: a trace in the run's folder."""
    memory: bool = False
    """A snapshot of the GPU's memory and its history over the window, in the run's folder."""
    start: int = 10
    """First iteration of the window, 0-based."""
    stop: int = 15
    """The one after its last."""
    ranks: tuple[int, ...] = (0,)
    """Which processes are profiled. The first one's seconds per pass go into the log too."""

    @property
    def on(self) -> bool:
        return self.kind != "none" or self.memory

    def __post_init__(self) -> None:
        some = (lambda ranks: ranks and all(rank >= 0 for rank in ranks), "numbers of ranks, 0 or above")
        _need("profile.", self, start=NOT_NEGATIVE, ranks=some)
        if self.stop <= self.start:
            raise ConfigError(f"profile.stop={self.stop}, the first iteration after the window, must lie above profile.start={self.start}")


# --- Parallelism ---


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a training run share its networks and its samples. world = tp * cp * dp."""

    tp: int = 1
    """Tensor parallel: ranks that split every attention head group and MLP."""
    cp: int = 1
    """Context parallel: ranks that split a clip along its latent frames."""
    dp: int = 0
    """Data parallel: groups of ranks that see different samples; 0 = whatever the number of processes leaves."""
    cp_attention: Literal["ulysses", "ring", "ulysses_ring"] = "ulysses"
    """Self-attention over the ranks of cp: all-to-all of heads, keys and values passed round a ring, or, with Transformer Engine, the
    former among `cp_ulysses` neighbours and the latter between them."""
    cp_ulysses: int = 0
    """Neighbours that trade heads where cp_attention is ulysses_ring."""
    sequence_parallel: bool = False
    """Split what tensor parallelism leaves whole, norms and residuals, along the tokens over the ranks of tp."""
    shard: int = 0
    """Ranks that share one copy of parameters and optimizer state (FSDP); 0 = all of dp x cp, fewer = HSDP."""
    reduce: Literal["step", "micro_batch"] = "step"
    """When gradients are reduced: once per optimizer step, or after every micro-batch, which needs less memory without HSDP."""
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type in which networks compute; their masters and the reduction of gradients stay float32. auto = bfloat16 on a GPU."""
    reference_cp_scaling: int = 0
    """Reproduce what the published recipe did at this context-parallel size: generator GAN gradient / N, VSD norm per N-th of a clip."""
    timeout: float = 600.0
    """Seconds within which a rank that waits for another in vain has ended. The last of them, `grace`, go to asking who is lost."""

    def __post_init__(self) -> None:
        _need("parallel.", self, tp=POSITIVE, cp=POSITIVE, dp=NOT_NEGATIVE, shard=NOT_NEGATIVE, timeout=ENOUGH_TO_ASK)
        _need("parallel.", self, reference_cp_scaling=NOT_NEGATIVE)
        both = self.cp_attention == "ulysses_ring"
        if both and not (1 < self.cp_ulysses < self.cp and self.cp % self.cp_ulysses == 0):
            raise ConfigError(
                f"parallel.cp_attention=ulysses_ring: parallel.cp_ulysses={self.cp_ulysses} must divide parallel.cp={self.cp} and lie "
                "between 1 and it, both excluded"
            )
        if self.cp_ulysses and not both:
            raise ConfigError(f"parallel.cp_ulysses={self.cp_ulysses} is for parallel.cp_attention=ulysses_ring: set either")
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError("parallel.sequence_parallel splits over the ranks of tp: give parallel.tp at least 2, or leave it off")

    @property
    def grace(self) -> float:
        """Seconds of `timeout` between a collective that gave up and the end of its process."""
        return min(10.0, self.timeout / 2)

    @property
    def collective_timeout(self) -> timedelta:
        """How long a collective waits."""
        return timedelta(seconds=self.timeout - self.grace)


@dataclass(frozen=True)
class BackendConfig:
    """What the blocks of the networks are made of, and what their linears compute in."""

    kind: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linears, attention and norms of Transformer Engine (bfloat16, GPU) or our own; auto = the former where a run that trains finds it."""
    fp8: Literal["off", "native", "emulate"] = "off"
    """native = in FP8, by Transformer Engine. emulate = as if in FP8: operands and gradients are rounded to its values, by our own layers.
    It measures a recipe's accuracy and saves nothing."""
    recipe: FP8Recipe = "current"
    """Scales of FP8: one per tensor, taken from the tensor itself; one per 128 values (128 x 128 of a weight); natively also one per tensor
    by what earlier steps saw (delayed; its history is in no checkpoint, so that the first step after a resume scales by 1, as a run's
    first does), or one per 32 values (mxfp8, Blackwell)."""
    fp8_roles: tuple[Role, ...] = ("teacher",)
    """Roles in FP8. DMD2's student and fake score learn less per weight than FP8 rounds away: leave them out."""

    def __post_init__(self) -> None:
        if (self.kind, self.fp8) in (("local", "native"), ("transformer_engine", "emulate")):
            other, remedy = ("transformer_engine", "emulate") if self.fp8 == "native" else ("local", "native")
            raise ConfigError(
                f"backend.fp8={self.fp8} is what backend.kind={other} does: set backend.kind to it, or backend.fp8 to {remedy}"
            )
        if self.fp8 == "emulate" and self.recipe in ("delayed", "mxfp8"):
            raise ConfigError(f"backend.recipe={self.recipe} is not emulated: give current or block, or set backend.fp8 to native")

    def recipe_of(self, role: Role) -> FP8Recipe | None:
        """How a role's linears compute; None = as they are."""
        return self.recipe if self.fp8 != "off" and role in self.fp8_roles else None


# --- Stages ---


FP8_MULTIPLES: dict[FP8Recipe, int] = {"current": 16, "delayed": 16, "mxfp8": 32, "block": 128}
"""What the sides of a matrix must be multiples of in native FP8."""


def _need_native(run: Run, *trained: Role) -> None:
    """Refuse native FP8 where the stage's sizes, types or roles do not fit its recipe."""
    backend, parallel, train = run.backend, getattr(run, "parallel", ParallelConfig()), getattr(run, "train", None)
    if backend.fp8 != "native":
        return
    if parallel.compute == "float32":
        raise ConfigError("backend.fp8=native computes around its products in bfloat16: set parallel.compute to auto or bfloat16")
    _, frames, height, width = run.diffusion.latent_shape
    tp, shares = parallel.tp, parallel.tp if parallel.sequence_parallel else 1
    tokens = frames / parallel.cp * (height // 2) * (width // 2) / shares
    sides = {
        f"net.hidden={run.net.hidden} / parallel.tp={tp}": run.net.hidden / tp,
        f"net.mlp_hidden={run.net.mlp_hidden} / parallel.tp={tp}": run.net.mlp_hidden / tp,
        f"a rank's tokens, T x H/2 x W/2 of diffusion.latent_shape={run.diffusion.latent_shape} / parallel.cp={parallel.cp}"
        + f" / parallel.tp={tp}" * (shares > 1): tokens,
    }
    multiple = FP8_MULTIPLES[backend.recipe]
    for name, side in sides.items():
        if side % multiple:
            coarse = "set backend.recipe to current (16)" if multiple > 16 and side % 16 == 0 else "set backend.fp8 to off"
            raise ConfigError(
                f"backend.recipe={backend.recipe} needs multiples of {multiple}, and {name} = {side:g}: change it, or {coarse}"
            )
    if backend.recipe == "delayed":
        frozen = [role for role in backend.fp8_roles if role not in trained]
        if frozen:
            raise ConfigError(
                f"backend.recipe=delayed moves its scales only where gradients are kept, and the {frozen[0]} is frozen: "
                "leave it out of backend.fp8_roles, or set backend.recipe to current"
            )
        if len(backend.fp8_roles) > 1:
            raise ConfigError(
                f"backend.recipe=delayed keeps one history for all networks, and backend.fp8_roles has {', '.join(backend.fp8_roles)}: "
                "name one role, or set backend.recipe to current"
            )
        if train.recompute != "none":
            raise ConfigError(
                f"backend.recipe=delayed would move its scales between the two forwards of train.recompute={train.recompute}: "
                "set backend.recipe to current, or train.recompute to none"
            )


def _need_roles(backend: BackendConfig, *roles: Role) -> None:
    """Refuse FP8 for a role that the stage has not, or for none."""
    for role in backend.fp8_roles:
        if role not in roles:
            raise ConfigError(f"backend.fp8_roles: this stage has no {role}, only {', '.join(roles)}")
    if backend.fp8 != "off" and not backend.fp8_roles:
        raise ConfigError(f"backend.fp8={backend.fp8} with no role in backend.fp8_roles: name one of {', '.join(roles)}, or set it to off")


def _need_fit(net: NetConfig, diffusion: DiffusionConfig, text: TextConfig | None = None) -> None:
    """Refuse a latent or a text that the network does not take."""
    channels, *size = diffusion.latent_shape
    if channels != net.latent_channels:
        raise ConfigError(
            f"diffusion.latent_shape={diffusion.latent_shape} has {channels} channels, net.latent_channels={net.latent_channels}"
        )
    if any(side > limit for side, limit in zip(size, net.max_latent, strict=True)):
        raise ConfigError(f"diffusion.latent_shape={diffusion.latent_shape} exceeds net.max_latent={net.max_latent} (T, H, W)")
    if text is not None and text.dim != net.text_dim:
        raise ConfigError(f"text.dim={text.dim} is not the network's net.text_dim={net.text_dim}")


@dataclass(frozen=True)
class EncodeRun:
    """`python -m cosmos_mp encode`: a folder of captioned videos to latents, control latents and text embeddings."""

    videos: str = "datasets/dmd2"
    """Folder with videos/ and metas/."""
    index: str = ""
    """Folder with the clips.jsonl that `python -m cosmos_mp index` wrote; empty = the videos' folder."""
    out: str = "datasets/clips/train"
    seed: int = 0
    shard_size: int = 64
    limit: int = 0
    """Encode only this many clips; 0 = all."""
    split: Literal["all", "train", "holdout"] = "all"
    """Which clips: all, or one side of a fixed split by the hash of the clip's name."""
    holdout_share: float = 0.1
    """Share of the clips on the held-out side of that split."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        inside = (lambda value: 0 < value < 1, "between 0 and 1, both excluded")
        _need("", self, shard_size=POSITIVE, limit=NOT_NEGATIVE, holdout_share=inside)


@dataclass(frozen=True)
class TeacherRun:
    """`pretrain_teacher`: EDM denoising of clips, control on."""

    out: str = "runs/teacher"
    init: str = ""
    """Weights to start from (run folder, .pt, .safetensors); empty = random."""
    clips: str = "datasets/clips/train"
    """Encoded clips to train on: the output of `python -m cosmos_mp encode`."""
    holdout: str = "datasets/clips/holdout"
    """Encoded clips that are never trained on; pictures are drawn from them."""
    kernels: Kernels = "auto"
    """Fused Triton kernels or torch's own operators; auto = Triton on a GPU."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    net: NetConfig = field(default_factory=NetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: TeacherLossConfig = field(default_factory=TeacherLossConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim_teacher: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2**-14.3, betas=(0.9, 0.99), weight_decay=0.1, warmup=2500))
    ema: EMAConfig = field(default_factory=lambda: EMAConfig(0.9999))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        _need_roles(self.backend, "teacher")
        _need_fit(self.net, self.diffusion)
        _need_native(self, "teacher")


@dataclass(frozen=True)
class PairsRun:
    """`generate_pairs`: the teacher's answers to fixed noises."""

    out: str = "datasets/pairs/edge"
    count: int = 10_000
    teacher: str = TEACHER_7B
    """The teacher's weights: run folder, NVIDIA-named .pt, or .safetensors."""
    clips: str = "datasets/clips/train"
    """Encoded clips to answer: the output of `python -m cosmos_mp encode`."""
    seed: int = 0
    batch_size: int = 1
    shard_size: int = 32
    """Pairs per shard file; a finished shard is never made twice."""
    negative_prompt: str = ""
    """Text of the negative prompt; empty = the recipe's own."""
    kernels: Kernels = "auto"
    """Fused Triton kernels or torch's own operators; auto = Triton on a GPU."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    net: NetConfig = field(default_factory=NetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        _need_roles(self.backend, "teacher")
        _need("", self, count=POSITIVE, batch_size=POSITIVE, shard_size=POSITIVE)
        _need_fit(self.net, self.diffusion, self.text)
        _need_native(self)


@dataclass(frozen=True)
class KDRun:
    """`pretrain_kd`: 0.5 * MSE(student(noise), the teacher's answer)."""

    out: str = "runs/kd"
    teacher: str = TEACHER_7B
    """Initial weights of the student."""
    pairs: str = "datasets/pairs/edge"
    holdout: str = "datasets/clips/holdout"
    """Encoded clips that are never trained on; pictures are drawn from them."""
    kernels: Kernels = "auto"
    """Fused Triton kernels or torch's own operators; auto = Triton on a GPU."""
    backend: BackendConfig = field(default_factory=lambda: BackendConfig(fp8_roles=("teacher", "student")))
    net: NetConfig = field(default_factory=NetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim_student: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    ema: EMAConfig = field(default_factory=EMAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        _need_roles(self.backend, "teacher", "student")
        _need_fit(self.net, self.diffusion)
        _need_native(self, "student")


@dataclass(frozen=True)
class DMD2Run:
    """`pretrain_dmd2`: variational score distillation and a GAN on real clips."""

    out: str = "runs/dmd2"
    teacher: str = TEACHER_7B
    student: str = ""
    """Where the student starts: the KD run's folder; empty = the teacher's weights."""
    negative_prompt: str = ""
    """Text of the negative prompt; empty = the recipe's own."""
    clips: str = "datasets/clips/train"
    """Encoded clips to train on: the output of `python -m cosmos_mp encode`."""
    holdout: str = "datasets/clips/holdout"
    """Encoded clips that are never trained on; pictures are drawn from them."""
    kernels: Kernels = "auto"
    """Fused Triton kernels or torch's own operators; auto = Triton on a GPU."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    net: NetConfig = field(default_factory=NetConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    dmd2: DMD2Config = field(default_factory=DMD2Config)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim_student: OptimConfig = field(default_factory=OptimConfig)
    optim_fake_score: OptimConfig = field(default_factory=OptimConfig)
    optim_discriminator: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(iterations=24_000))
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        _need_roles(self.backend, "teacher", "student", "fake_score")
        _need_fit(self.net, self.diffusion, self.text)
        _need_native(self, "student", "fake_score")
        frames, first = self.diffusion.latent_shape[1], self.head.first_frame
        needed = 2 if self.head.kind in ("conv3d", "attention") else 1
        if frames - first < needed:
            raise ConfigError(
                f"head.first_frame={first} leaves too few of the {frames} latent frames: head.kind={self.head.kind} needs {needed}"
            )
        blocks = self.head.feature_blocks
        if not blocks or list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < self.net.blocks:
            raise ConfigError(f"head.feature_blocks={blocks} must be ascending block numbers in 0..{self.net.blocks - 1}")


@dataclass(frozen=True)
class EvaluateRun:
    """`python -m cosmos_mp evaluate`: teacher and students on held-out clips, as a table, results.json and a report page."""

    out: str = "runs/evaluation"
    teacher: str = TEACHER_7B
    students: tuple[str, ...] = ()
    """NAME=WEIGHTS of each student, such as KD=runs/edge_kd."""
    clips: str = "datasets/clips/edge/holdout"
    """Encoded clips that were never trained on."""
    videos: str = "datasets/dmd2"
    """The videos that these clips were encoded from."""
    index: str = ""
    """Folder with their clips.jsonl; empty = the videos' folder."""
    samples: int = 256
    batch_size: int = 1
    seed: int = 0
    negative_prompt: str = ""
    features: str = ""
    """A TorchScript network (N, 3, T, H, W) in [-1, 1] -> (N, D) for one more Fréchet distance."""
    diversity_clips: int = 16
    """Clips that are answered from `diversity_noises` noises each."""
    diversity_noises: int = 4
    timing_repeats: int = 10
    texture_period: float = 0.0
    """Report the energy of stripes of this period in pixels; 0 = leave it out."""
    checks: Literal["none", "calls", "recipe"] = "none"
    """What must hold for success: nothing; that students need one call; or all that the quickstart's recipe promises."""
    kernels: Kernels = "auto"
    """Fused Triton kernels or torch's own operators; auto = Triton on a GPU."""
    backend: BackendConfig = field(default_factory=lambda: BackendConfig(fp8_roles=("student",)))
    net: NetConfig = field(default_factory=NetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        _need_roles(self.backend, "teacher", "student")
        at_least_two = (lambda value: value >= 2, "at least 2")
        _need("", self, samples=at_least_two, diversity_noises=at_least_two, diversity_clips=at_least_two)
        _need("", self, batch_size=POSITIVE, timing_repeats=at_least_two, texture_period=NOT_NEGATIVE)
        _need_fit(self.net, self.diffusion, self.text)
        _need_native(self)


@dataclass(frozen=True)
class SampleRun:
    """`python -m cosmos_mp sample`: one clip from the student."""

    prompt: str = ""
    video: str = ""
    """A video to take the control from (edge, vis)."""
    control: str = ""
    """A ready control video, instead of `video`."""
    out: str = "sample.mp4"
    student: str = "runs/edge_dmd2"
    """Run folder, Hugging Face folder, or NVIDIA's released student file."""
    seed: int = 0
    control_weight: float = 1.0
    kernels: Kernels = "auto"
    """Fused Triton kernels or torch's own operators; auto = Triton on a GPU."""
    backend: BackendConfig = field(default_factory=lambda: BackendConfig(fp8_roles=("student",)))
    net: NetConfig = field(default_factory=NetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        _need_roles(self.backend, "student")
        _need("", self, control_weight=FINITE)
        _need_fit(self.net, self.diffusion, self.text)
        _need_native(self)


Run = EncodeRun | TeacherRun | PairsRun | KDRun | DMD2Run | EvaluateRun | SampleRun
STAGES: dict[str, type] = {
    "encode": EncodeRun,
    "teacher": TeacherRun,
    "pairs": PairsRun,
    "kd": KDRun,
    "dmd2": DMD2Run,
    "evaluate": EvaluateRun,
    "sample": SampleRun,
}
