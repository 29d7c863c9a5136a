"""The commands of `python -m cosmos_mp`: each reads its words and calls one function of the package."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from cosmos_mp.cli import stage
from cosmos_mp.config import ClipConfig, ConfigError, EncodeRun, EvaluateRun, SampleRun, TextConfig
from cosmos_mp.options import parse, save
from cosmos_mp.parallel.topology import rank_and_world, single_process

Command = Callable[[list[str]], int | None]
T5 = TextConfig()


def dispatch(table: Mapping[str, Command], name: str, words: list[str]) -> int | None:
    """Run a command by name.

    Raises:
        ConfigError: no such command; the nearest one is named.
    """
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        raise ConfigError(f"unknown command {name!r}; {f'did you mean {close[0]!r}?' if close else 'known: ' + ', '.join(table)}")
    return table[name](words)


def _call(function: Callable, words: list[str], name: str = "") -> None:
    name = name or function.__name__.strip("_").replace("_", "-")
    tyro.cli(function, args=words, prog=f"python -m cosmos_mp {name}", use_underscores=False)


def synthesize(words: list[str]) -> None:
    """Write small synthetic, captioned video files."""

    def _synthesize(out: Path, count: int, /, seed: int = 0, frames: int = 9, height: int = 64, width: int = 64) -> None:
        """Write `count` clips to OUT/videos and OUT/metas; clips that are there are kept."""
        from cosmos_mp.data.synthetic import synthesize

        synthesize(out, count, seed=seed, frames=frames, height=height, width=width)
        print(f"{out}: {count} clips")

    _call(_synthesize, words)


def index(words: list[str]) -> None:
    """List a folder's usable clips, with the reason for each other."""

    def _index(videos: Path, /, min_frames: int = 121, out: Path | None = None, decode: bool = True) -> None:
        """Decode every video of VIDEOS and write clips.jsonl and rejected.jsonl.

        Args:
            out: where to write them, such as when VIDEOS is read-only; VIDEOS if not given.
            decode: count frames by decoding; without, packets are counted: faster, but blind to damage inside a file.
        """
        from cosmos_mp.data.clips import index_clips

        found = index_clips(videos, min_frames=min_frames, out=out, decode=decode)
        for rejected in found.rejected[:20]:
            print(f"skipped {rejected.video}: {rejected.reason}")
        more = f", {len(found.rejected)} skipped (rejected.jsonl has the reasons)" if found.rejected else ""
        print(f"{found.path}: {len(found.clips)} clips{more}")

    _call(_index, words)


def fit_tokenizer(words: list[str]) -> None:
    """Fit the tiny tokenizer, which needs no download, to indexed clips."""

    def _fit_tokenizer(
        videos: Path,
        out: Path,
        /,
        clips: int = 1024,
        frames: int = 9,
        height: int = 64,
        width: int = 64,
        seed: int = 0,
        index: Path | None = None,
    ) -> None:
        """Fit on the first CLIPS clips of VIDEOS and write the folder OUT.

        Args:
            index: folder of their index; VIDEOS if not given.
        """
        from cosmos_mp.data.clips import fit, load_index, read_window
        from cosmos_mp.tokenizers.tiny import FILE, fit_tiny, fitted_on

        records = load_index((index or videos) / "clips.jsonl")[:clips]
        origin = hashlib.sha256(repr((frames, height, width, seed, [record.sha256 for record in records])).encode()).hexdigest()
        if (out / FILE).is_file():
            if fitted_on(out) != origin:
                raise ConfigError(f"{out} holds a tokenizer of other clips, sizes or seed; remove it or name another folder")
            print(f"{out}: there already, kept")
            return
        fit_tiny([fit(read_window(videos / r.video, 0, frames), height, width)[0] for r in records], seed).save(out, origin)
        print(f"{out}: fitted on {len(records)} clips")

    _call(_fit_tokenizer, words)


def cache_text(words: list[str]) -> None:
    """Encode captions once, so that training needs no text encoder."""

    def _cache_text(
        videos: Path,
        out: Path,
        /,
        negative_prompt: bool = True,
        text: TextConfig = T5,
        from_nvidia: bool = False,
        index: Path | None = None,
    ) -> None:
        """Encode the captions of VIDEOS' clips into the folder OUT; captions that are there are kept.

        Args:
            index: folder of the clips' index; VIDEOS if not given.
            negative_prompt: add the recipe's negative prompt.
            from_nvidia: take VIDEOS/t5_xxl/*.pickle instead of running an encoder.
        """
        from cosmos_mp.data.clips import load_index
        from cosmos_mp.presets import NEGATIVE_PROMPT
        from cosmos_mp.text import build_text_encoder
        from cosmos_mp.text.cached import import_nvidia, write_cache

        if from_nvidia:
            print(f"{out}: {import_nvidia(out, videos, dim=text.dim)} embeddings added")
            return
        captions = [record.caption for record in load_index((index or videos) / "clips.jsonl")]
        added = write_cache(out, build_text_encoder(text), captions + ([NEGATIVE_PROMPT] if negative_prompt else []))
        print(f"{out}: {added} captions added")

    _call(_cache_text, words)


def encode(words: list[str]) -> int | None:
    """Encode indexed clips to latents, control latents and text embeddings."""

    def run(config: EncodeRun) -> None:
        from cosmos_mp.data.clips import load_index
        from cosmos_mp.data.encode import encode_clips
        from cosmos_mp.data.split import split_clips

        rank, world = rank_and_world()
        root = Path(config.videos)
        if rank == 0:
            save(config, Path(config.out) / "config.json")
        complete = encode_clips(
            split_clips(load_index(Path(config.index or config.videos) / "clips.jsonl"), config.split, config.holdout_share),
            root,
            Path(config.out),
            config.clip,
            config.tokenizer,
            config.text,
            seed=config.seed,
            shard_size=config.shard_size,
            rank=rank,
            world=world,
            limit=config.limit,
            device=single_process().device,
        )
        print(f"{config.out}: {'complete' if complete else 'this rank is done, others are not'}")

    return stage(EncodeRun, run, words, prog="python -m cosmos_mp encode")


def evaluate(words: list[str]) -> int | None:
    """Measure teacher and students on held-out clips; table, results.json and report page."""

    def run(config: EvaluateRun) -> int:
        from cosmos_mp.evaluate.run import evaluate

        return 0 if all(check["passed"] for check in evaluate(config)["checks"]) else 1

    return stage(EvaluateRun, run, words, prog="python -m cosmos_mp evaluate")


def sample(words: list[str]) -> int | None:
    """Make one clip with the student: caption and control (or video) to mp4."""

    def run(config: SampleRun) -> None:
        from cosmos_mp.sample import sample

        print(sample(config))

    return stage(SampleRun, run, words, prog="python -m cosmos_mp sample")


def convert(words: list[str]) -> None:
    """Write a student as a Hugging Face folder or an NVIDIA-named file."""

    def _convert(
        preset: str,
        weights: str,
        out: Path,
        /,
        to: Literal["hf", "nvidia-teacher", "nvidia-student"] = "hf",
        dtype: Literal["float32", "bfloat16"] = "float32",
        check: bool = True,
    ) -> None:
        """Convert WEIGHTS (a run folder, a weight file, or a Hugging Face folder) to OUT.

        Args:
            preset: a `..._sample` preset, which knows the network's sizes.
            check: load a float32 Hugging Face folder again with diffusers and compare one call.
        """
        import torch

        from cosmos_mp.convert.huggingface import Card, check_export, export_student
        from cosmos_mp.convert.nvidia import write_nvidia
        from cosmos_mp.models.weights import fingerprint
        from cosmos_mp.roles import check_sizes, read_weights

        config = parse(SampleRun, [preset], prog="python -m cosmos_mp convert")
        check_sizes(weights, config.net)
        values = read_weights(weights, "student")
        if to != "hf":
            write_nvidia(values, out, to.removeprefix("nvidia-"))
        else:
            tiny = config.tokenizer.kind == "tiny"
            card = _card(Card, config.clip, tiny, config.text)
            provenance = {"source": weights, "sha256": fingerprint(values), "preset": preset}
            export_student(values, config.net, config.diffusion, out, provenance=provenance, card=card, dtype=getattr(torch, dtype))
            if check and dtype == "float32":
                print(f"loaded again with diffusers: largest difference {check_export(out, values, config.net, config.diffusion):.1e}")
        print(out)

    _call(_convert, words)


def _card(kind: type, clip: ClipConfig, tiny: bool, text: TextConfig):
    words = f"{clip.frames} frames of {clip.height} x {clip.width}"
    if tiny:
        own = {"base_model": "", "vae": "the tiny tokenizer of cosmos_mp", "text_encoder": "the tiny text encoder of cosmos_mp", "fps": 8.0}
        return kind(control=clip.control, clip=words, text_tokens=text.tokens, **own)
    return kind(control=clip.control, clip=words + " at 24 frames per second", text_tokens=text.tokens)


def verify(words: list[str]) -> int:
    """Run golden cases of the reference networks, losses and sampler; status 1 beyond tolerance."""

    def _verify(folder: Path, /, dtype: Literal["float32", "float64"] = "float32") -> int:
        """Run every case in FOLDER and print each quantity's difference."""
        import torch

        from cosmos_mp.verify import verify

        return 0 if verify(folder, getattr(torch, dtype)) else 1

    return tyro.cli(_verify, args=words, prog="python -m cosmos_mp verify")


def bench(words: list[str]) -> None:
    """Measure: `cpu` beside other libraries, `fp8` accuracy, `gpu` kernels, `parallel` layouts on processes, `static` compiled kernels."""

    def _measured(measure: Callable[[], dict[str, Any]], json: Path | None) -> dict[str, Any]:
        from cosmos_mp.files import write_json

        if json is not None:  # before the minutes that it takes
            json.parent.mkdir(parents=True, exist_ok=True)
        found = measure()
        if json is not None:
            write_json(json, found)
        return found

    def _parallel(json: Path | None = None, fast: bool = False) -> None:
        """FLOPs, time, memory and bytes sent, printed as tables.

        Args:
            json: file to write the numbers to.
            fast: small networks, for a look.
        """
        from cosmos_mp.bench.parallel import bench_parallel

        _measured(lambda: bench_parallel(fast), json)

    def _static(json: Path | None = None) -> None:
        """Registers, spills and traffic of every Triton kernel, compiled for sm_90 and sm_100 without a GPU.

        Args:
            json: file to write the numbers to.
        """
        from cosmos_mp.bench.static import bench_static

        _measured(bench_static, json)

    def _cpu(json: Path | None = None, fast: bool = False) -> None:
        """Ours beside diffusers, cv2 and eager torch on this CPU, printed as a table of ratios.

        Args:
            json: file to write the numbers to.
            fast: small sizes, for a look.
        """
        from cosmos_mp.bench.cpu import bench_cpu

        _measured(lambda: bench_cpu(fast), json)

    def _fp8(json: Path | None = None, fast: bool = False) -> None:
        """Accuracy of FP8's recipes beside bfloat16's on a small teacher and its student, printed as tables.

        Args:
            json: file to write the numbers to.
            fast: hardly trained, for a look.
        """
        from cosmos_mp.bench.fp8 import bench_fp8

        _measured(lambda: bench_fp8(fast), json)

    def _gpu(json: Path | None = None, fast: bool = False, limit: float = 600.0) -> None:
        """Kernels and one block on a GPU beside eager and compiled torch, printed as a table. Not run on a GPU yet.

        Args:
            json: file to write the numbers to; also where something was wrong, which ends with status 1.
            fast: each time measured for a fifth as long.
            limit: seconds after which nothing more is begun.
        """
        from cosmos_mp.bench.gpu import bench_gpu, check_gpu

        check_gpu()  # before a file's folder is made
        found = _measured(lambda: bench_gpu(fast, limit), json)
        if found["mistakes"]:
            raise ValueError(f"wrong on this GPU: {'; '.join(found['mistakes'])}")

    known = {"cpu": _cpu, "fp8": _fp8, "gpu": _gpu, "parallel": _parallel, "static": _static}
    if not words:
        raise ConfigError(f"bench what? known: {', '.join(known)}")
    commands = {name: partial(_call, function, name=f"bench {name}") for name, function in known.items()}
    dispatch(commands, words[0], words[1:])
