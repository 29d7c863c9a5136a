"""Clips -> encoded samples: what a training step reads, computed once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cosmos_mp.config import ClipConfig, TextConfig, TokenizerConfig
from cosmos_mp.data.clips import ClipRecord, fit, read_window, window_start
from cosmos_mp.data.controls import edge_thresholds, make_control
from cosmos_mp.data.shards import Field, Header, Sample, ShardWriter
from cosmos_mp.files import file_sha256
from cosmos_mp.text import TextEncoder, build_text_encoder
from cosmos_mp.tokenizers import Tokenizer, build_tokenizer
from cosmos_mp.tokenizers.frames import frames_to_video

MAX_BATCH = 32
MAX_BATCH_VALUES = 2**24
"""Largest batch for the tokenizer, in clips and in colour values; set by the clip's size alone: any rank writes the same bytes."""

TOKENIZER_FILES = (".jit", ".json", ".pt", ".safetensors")

COMPUTED_CONTROLS = ("edge", "vis")
"""Made from the clip itself; the other controls come as videos."""


class EncodeError(ValueError):
    """Clips that cannot be encoded as asked; the message names file and remedy."""


class Window(NamedTuple):
    """One window of one clip, ready for the tokenizer."""

    video_FHWC: np.ndarray
    control_FHWC: np.ndarray
    padding_mask_HW: np.ndarray
    info: dict[str, Any]


def encode_clips(
    index: Sequence[ClipRecord],
    root: Path,
    out: Path,
    clip: ClipConfig,
    tokenizer_config: TokenizerConfig,
    text_config: TextConfig,
    *,
    seed: int,
    shard_size: int = 256,
    rank: int = 0,
    world: int = 1,
    limit: int = 0,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> bool:
    """Encode clips into a store of kind "clips"; finished shards are kept, so the same call resumes.

    Sample `i` is window `i % clip.windows` of clip `i // clip.windows`. Fields: latent and control float32 (16, T, h, w);
    text (tokens, dim), float16 of T5 and float32 of the tiny encoder; fps float32 (); padding_mask uint8 (height, width) if any
    clip of the store needs padding.

    Args:
        index: the clips, in the order of their samples.
        root: folder that the videos' paths start from; it also holds ready-made controls.
        out: the store.
        seed: with clip id and window number it keys window starts and control draws.
        rank: this process encodes shards with shard % world == rank.
        limit: encode only this many clips; 0 = all.
        device: where tokenizer and text encoder run.

    Returns:
        True if the store is complete now; with several processes the last one to finish sees True.

    Raises:
        EncodeError: no clips, one that is too short or has no frame rate or control video, or one that can no longer be read.
        StoreError: `out` was made with other settings.
    """
    records = list(index[:limit] if limit else index)
    span = (clip.frames - 1) * clip.stride + 1
    short = [record for record in records if record.num_frames < span]
    if not records:
        raise EncodeError(f"nothing to encode in {root}: 0 clips; give a folder that `python -m cosmos_mp index` finds clips in")
    if short:
        raise EncodeError(
            f"{len(short)} clips of {root} are too short, the first is {short[0].video} with {short[0].num_frames} frames: clip.frames="
            f"{clip.frames} at clip.stride={clip.stride} spans {span}; lower them, or index with --min-frames {span}"
        )
    if still := [record.video for record in records if not record.fps > 0]:
        raise EncodeError(
            f"{len(still)} clips of {root} have no frame rate, the first is {still[0]}; remux them with one, then index again"
        )
    if clip.control not in COMPUTED_CONTROLS:
        made = Path(root) / clip.control
        if lacking := [record.id for record in records if not (made / f"{record.id}.mp4").is_file()]:
            raise EncodeError(f"{len(lacking)} clips have no {clip.control} video, the first is {made / lacking[0]}.mp4; make them first")
    tokenizer, text = build_tokenizer(tokenizer_config, device), build_text_encoder(text_config, device)
    padded = any(_needs_padding(*size, clip) for size in {(record.height, record.width) for record in records})
    header = Header(
        kind="clips",
        count=len(records) * clip.windows,
        shard_size=shard_size,
        fields=_fields(clip, tokenizer, text_config, padded),
        meta={
            "clip": dataclasses.asdict(clip),
            # The tokenizer is known by its files: the folder may move.
            "tokenizer": {"kind": tokenizer_config.kind, "sha256": files_sha256(Path(tokenizer_config.path))},
            "text": dataclasses.asdict(text_config),
            "seed": seed,
            "clips_sha256": _clips_sha256(records),
        },
    )
    writer = ShardWriter(out, header)
    missing = writer.missing_shards(rank, world)
    if text_config.kind == "cached":  # a caption that is not there is named now, not hours later
        for record in records if missing else []:
            text.encode([record.caption])
    total = sum(len(header.samples(shard)) for shard in missing)
    with tqdm(
        total=total, desc="encode", unit="clip", mininterval=2 if sys.stderr.isatty() else 15, disable=not progress or not missing
    ) as bar:
        for shard in missing:
            samples: list[Sample] = []
            ids, size = header.samples(shard), _batch_size(clip)
            for numbers in (ids[i : i + size] for i in range(0, len(ids), size)):
                windows = [load_window(records[i // clip.windows], i % clip.windows, root, clip, seed) for i in numbers]
                samples += _encode(windows, tokenizer, text, header, device)
                bar.update(len(numbers))
            writer.write(shard, samples)
    return writer.finish()


def files_sha256(path: Path) -> str:
    """SHA-256 of a tokenizer: over a file, or over those of a folder (and of its vae/) that hold weights and settings."""
    path = Path(path)
    files = (
        [path] if path.is_file() else sorted(f for folder in (path, path / "vae") for f in folder.glob("*") if f.suffix in TOKENIZER_FILES)
    )
    return hashlib.sha256(json.dumps([(file.name, file_sha256(file)) for file in files]).encode()).hexdigest()


def _clips_sha256(records: Sequence[ClipRecord]) -> str:
    """Identity of the clips: a store must not go on with other files, captions or another order."""
    listing = [(record.id, record.sha256, record.caption) for record in records]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _needs_padding(height: int, width: int, clip: ClipConfig) -> bool:
    return bool(fit(np.zeros((1, height, width, 3), np.uint8), clip.height, clip.width)[1].any())


def _batch_size(clip: ClipConfig) -> int:
    return max(1, min(MAX_BATCH, MAX_BATCH_VALUES // (clip.frames * clip.height * clip.width * 3)))


def _fields(clip: ClipConfig, tokenizer: Tokenizer, text: TextConfig, padded: bool) -> dict[str, Field]:
    latent = Field(tokenizer.latent_shape(clip.frames, clip.height, clip.width), torch.float32)
    # T5's answers lose nothing that bf16 training would see; the tiny encoder's random vectors are stored exactly.
    text_type = torch.float32 if text.kind == "tiny" else torch.float16
    fields = {
        "latent": latent,
        "control": latent,
        "text": Field((text.tokens, text.dim), text_type),
        "fps": Field((), torch.float32),
    }
    return fields | ({"padding_mask": Field((clip.height, clip.width), torch.uint8)} if padded else {})


def load_window(record: ClipRecord, draw: int, root: Path, clip: ClipConfig, seed: int) -> Window:
    """Read a window of a clip at its final size, and make its control."""
    start = window_start(record, clip.frames, clip.stride, seed=seed, draw=draw)
    try:
        frames = read_window(Path(root) / record.video, start, clip.frames, clip.stride)
    except (OSError, ValueError) as error:
        raise EncodeError(f"{error}; the clip was readable when indexed: run `python -m cosmos_mp index {root}` again") from error
    video, padding_mask = fit(frames, clip.height, clip.width)
    control = make_control(clip.control, video, record, root, start, clip.stride, preset=clip.edge_preset, seed=seed, draw=draw)
    info = {"caption": record.caption, "clip": record.id, "window": draw, "start": start}
    if clip.control == "edge":
        info["edge_thresholds"] = list(edge_thresholds(clip.edge_preset, seed=seed, clip_id=record.id, draw=draw))
    return Window(video, control, padding_mask, info | {"fps": record.fps / clip.stride})


def _encode(windows: Sequence[Window], tokenizer: Tokenizer, text: TextEncoder, header: Header, device: torch.device | str) -> list[Sample]:
    """Tokenize a batch of windows."""
    fields: dict[str, Tensor] = {
        "latent": tokenizer.encode(frames_to_video(np.stack([window.video_FHWC for window in windows])).to(device)).cpu(),
        "control": tokenizer.encode(frames_to_video(np.stack([window.control_FHWC for window in windows])).to(device)).cpu(),
        "text": text.encode([window.info["caption"] for window in windows]).cpu().to(header.fields["text"].dtype),
        "fps": torch.tensor([window.info["fps"] for window in windows], dtype=torch.float32),
    }
    if "padding_mask" in header.fields:
        fields["padding_mask"] = torch.from_numpy(np.stack([window.padding_mask_HW for window in windows]))
    # Copies: a slice would keep the whole batch in memory.
    return [Sample({name: value[i].clone() for name, value in fields.items()}, window.info) for i, window in enumerate(windows)]
