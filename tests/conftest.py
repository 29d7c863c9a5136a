"""Fixtures of all tests: one thread, the golden set, factories of tiny networks, inputs and batches, and a small real world of files."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

# Read when a kernel is defined: the interpreter runs them on the CPU. tests/gpu wants 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

from cosmos_mp import commands, config
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import HeadConfig, NetConfig
from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.edm import Condition, Given
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.dit import NetInput
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import build
from cosmos_mp.options import parse
from cosmos_mp.parallel import noise
from cosmos_mp.parallel.topology import single_process

torch.set_num_threads(1)

# Sizes that differ from one another, so that no two axes can be confused.
TINY = NetConfig(
    hidden=24,
    heads=2,
    blocks=3,
    control_blocks=2,
    mlp_hidden=40,
    adaln_lora_dim=5,
    text_dim=7,
    latent_channels=3,
    control_channels=5,
    control_mlp=(6, 10),
    max_latent=(6, 8, 12),
)
LATENT = (3, 4, 4, 6)
"""(C, T, H, W) of the tiny latents."""
TOKENS = 5


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden cases."""
    return Path(__file__).parent / "data" / "golden"


@torch.no_grad()
def randomize(network: nn.Module, seed: int) -> None:
    """Normal values everywhere, also where training starts from zero, scaled so that the output stays near unit size."""
    for name, value in network.named_parameters():
        draw = torch.randn(value.shape, generator=noise.generator(seed, "test/" + name, 0, 0), dtype=torch.float64)
        if value.dim() > 1:
            value.copy_(draw if ".position." in name else draw / value[0].numel() ** 0.5)
        else:
            value.copy_(0.1 * draw + (0.0 if name.endswith("bias") else 1.0))


@pytest.fixture
def tiny_net() -> Callable[..., NetConfig]:
    """Sizes of the tiny network, with changes."""
    return lambda **changes: dataclasses.replace(TINY, **changes)


@pytest.fixture
def make_network() -> Callable[..., TransferNet]:
    """A tiny network with random values in every weight."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> TransferNet:
        net, backend = dataclasses.replace(TINY, **changes), LocalBackend(single_process().tp_group)
        network = build(lambda: TransferNet(net, backend), "cpu", dtype)
        randomize(network, seed)
        return network

    return make


@pytest.fixture
def make_discriminator() -> Callable[..., Discriminator]:
    """A discriminator with random values in every weight."""

    def make(head: HeadConfig, channels: int = TINY.hidden, seed: int = 0, dtype: torch.dtype = torch.float64) -> Discriminator:
        discriminator = build(lambda: Discriminator(channels, head), "cpu", dtype)
        randomize(discriminator, seed)
        return discriminator

    return make


def _normal(purpose: str, shape: tuple[int, ...], positions: range | list[int], dtype: torch.dtype) -> Tensor:
    return noise.normal(shape, 0, "test/" + purpose, 0, list(positions)).to(dtype)


def _padding(batch: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(batch, 8 * LATENT[2], 8 * LATENT[3], dtype=dtype)
    mask[:, -8:] = 1.0
    return mask


@pytest.fixture
def make_input() -> Callable[..., NetInput]:
    """A network call with random tensors; every sample is a function of its position."""

    def make(positions: range | list[int] = range(2), dtype: torch.dtype = torch.float64, **changes) -> NetInput:
        flags = torch.zeros(len(positions), 1, *LATENT[1:], dtype=dtype)
        flags[:, :, :1] = 1.0
        call = NetInput(
            x_BCTHW=_normal("x", LATENT, positions, dtype),
            timestep_B=0.5 * _normal("timestep", (), positions, dtype),
            text_BLD=_normal("text", (TOKENS, TINY.text_dim), positions, dtype),
            control_BCTHW=_normal("control", LATENT, positions, dtype),
            condition_mask_B1THW=flags,
            padding_mask_BHW=_padding(len(positions), dtype),
            fps_B=torch.full((len(positions),), 24.0, dtype=dtype),
        )
        return dataclasses.replace(call, **changes)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """A micro-batch with random tensors; every sample is a function of its position."""

    def make(positions: range | list[int] = range(2), dtype: torch.dtype = torch.float64, *, noise: bool = False) -> Batch:
        return Batch(
            position_B=torch.tensor(list(positions)),
            latent_BCTHW=0.5 * _normal("latent", LATENT, positions, dtype),
            control_BCTHW=_normal("control", LATENT, positions, dtype),
            text_BLD=_normal("text", (TOKENS, TINY.text_dim), positions, dtype),
            fps_B=torch.full((len(positions),), 24.0, dtype=dtype),
            padding_mask_BHW=_padding(len(positions), dtype),
            noise_BCTHW=_normal("noise", LATENT, positions, dtype) if noise else None,
        )

    return make


@pytest.fixture
def make_condition(make_batch) -> Callable[..., Condition]:
    """What a denoiser is told, with the first `given` latent frames given."""

    def make(positions: range | list[int] = range(2), dtype: torch.dtype = torch.float64, *, given: int = 0) -> Condition:
        batch, frames = make_batch(positions, dtype), None
        if given:
            mask = (torch.arange(LATENT[1]) < given).to(dtype).expand(len(positions), -1)
            frames = Given(batch.latent_BCTHW, mask, _normal("condition_noise", LATENT, positions, dtype))
        return Condition(batch.text_BLD, batch.control_BCTHW, batch.fps_B, batch.padding_mask_BHW, frames)

    return make


@pytest.fixture
def unconditional() -> Tensor:
    """Text embedding (L, D) of the unconditional branch."""
    return _normal("unconditional", (TOKENS, TINY.text_dim), [0], torch.float64)[0]


# --- A small real world: video files, a tokenizer, stores and runs, made by the real commands ---

ROOT = Path(__file__).parents[1]
SMALL_NET = "hidden=48 heads=4 blocks=3 control_blocks=2 mlp_hidden=96 adaln_lora_dim=8 control_mlp=48"
SIZES = [word for item in SMALL_NET.split() for word in (f"--net.{item.partition('=')[0]}", item.partition("=")[2])]
BATCH = ["--train.global_batch_size", "4", "--train.micro_batch_size", "2"]
SCRIPTS = {"teacher": "pretrain_teacher", "pairs": "generate_pairs", "kd": "pretrain_kd", "dmd2": "pretrain_dmd2"}


def load_script(name: str) -> ModuleType:
    """A stage's script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "pretrain_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class World:
    """A folder with videos/, tokenizer/ and clips/{train,holdout}, and the command lines of stages in it."""

    root: Path

    def words(self, stage: str, out: str, *options: object) -> list[str]:
        """PRESET and options of a stage at the small size; `out` is a folder of the world, later options win."""
        where = {name: str(self.root / name) for name in ("teacher", "pairs", "kd", "dmd2", "videos", "tokenizer")}
        train, holdout = str(self.root / "clips" / "train"), str(self.root / "clips" / "holdout")
        tokenizer = ["--tokenizer.path", where["tokenizer"]]
        trained = ["--holdout", holdout, *tokenizer, *SIZES, *BATCH, "--train.picture_every", "0", "--train.no-tensorboard"]
        table = {
            "teacher": ["--clips", train, *trained, "--train.iterations", "6"],
            "pairs": ["--clips", train, "--teacher", where["teacher"], *SIZES, "--count", "8", "--shard_size", "3", "--batch_size", "2"],
            "kd": ["--pairs", where["pairs"], "--teacher", where["teacher"], *trained, "--train.iterations", "4"],
            "dmd2": ["--clips", train, "--teacher", where["teacher"], "--student", where["kd"], *trained, "--train.iterations", "10"]
            + ["--head.hidden", "16", "--head.feature_blocks", "1"],
            "evaluate": ["--clips", holdout, "--videos", where["videos"], "--teacher", where["teacher"], *tokenizer, *SIZES]
            + ["--students", f"KD={where['kd']}", f"DMD2={where['dmd2']}"],
            "sample": ["--student", where["dmd2"], *tokenizer, *SIZES],
        }
        return [f"tiny_{stage}", "--out", str(self.root / out), *table[stage], *map(str, options)]

    def config(self, stage: str, out: str, *options: object) -> config.Run:
        """The configuration that these words mean."""
        return parse(config.STAGES[stage], self.words(stage, out, *options))

    def run(self, stage: str, out: str, *options: object) -> Path:
        """Run a training stage to its end, in this process; returns its folder."""
        assert not load_script(SCRIPTS[stage]).main(self.config(stage, out, *options))
        return self.root / out


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> World:
    """48 synthetic clips, the tokenizer fitted to them, and both sides of the split encoded."""
    world = World(tmp_path_factory.mktemp("world"))
    videos, tokenizer = str(world.root / "videos"), str(world.root / "tokenizer")
    commands.synthesize([videos, "48"])
    commands.index([videos, "--min-frames", "9"])
    commands.fit_tokenizer([videos, tokenizer])
    for split in ("train", "holdout"):
        out = ["--out", str(world.root / "clips" / split), "--split", split, "--holdout_share", "0.25"]
        commands.encode(["tiny_encode", "--videos", videos, *out, "--shard_size", "16", "--tokenizer.path", tokenizer])
    return world


@pytest.fixture(scope="session")
def tiny_chain(tiny_world) -> World:
    """The same world after teacher, pairs, KD and DMD2; the teacher and KD draw pictures."""
    for stage, options in {
        "teacher": ["--train.picture_every", "6"],
        "pairs": [],
        "kd": ["--train.picture_every", "3", "--train.tensorboard"],
        "dmd2": ["--train.picture_every", "10", "--train.save_every", "7"],
    }.items():
        tiny_world.run(stage, stage, *options)
    return tiny_world


@pytest.fixture(scope="session")
def save_t5() -> Callable[..., Path]:
    """`save_t5(folder, d_model=32)`: the layout of google-t5/t5-11b with small random weights and a tokenizer trained on a few lines."""
    lines = ["a red circle moves left over a blue background", "a green square moves up", "the quick brown fox jumps over the lazy dog"]

    def save(folder: Path, d_model: int = 32) -> Path:
        import sentencepiece
        from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

        folder.mkdir(parents=True, exist_ok=True)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 10), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        )  # fmt: skip
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
        T5TokenizerFast(vocab=vocab, extra_ids=0).save_pretrained(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = T5Config(vocab_size=64, d_model=d_model, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.5)
            T5ForConditionalGeneration(sizes).save_pretrained(folder)
        (folder / "spiece.model").write_bytes(model.getvalue())
        return folder

    return save
