"""Caption -> embedding. One protocol, three encoders: T5, its cached answers, and a tiny one of hashed words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cosmos_mp.config import TextConfig


class TextEncoder(Protocol):
    """Embeddings of captions, all of one shape (tokens, dim)."""

    tokens: int
    dim: int

    def encode(self, captions: Sequence[str]) -> Tensor:
        """float32 (B, tokens, dim), zeros beyond each caption's length. T5 gives an empty caption its end token; `null` is all zeros."""
        ...

    def null(self, batch: int) -> Tensor:
        """The unconditional embedding: float32 zeros (B, tokens, dim)."""
        ...


def build_text_encoder(config: TextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder of a configuration, read from its local folder (the tiny one has no files). T5 runs on `device`.

    Raises:
        FileNotFoundError, ValueError: a missing, damaged or foreign file, or one of another width; the message names it and the remedy.
    """
    if config.tokens < 1 or config.dim < 1:
        raise ValueError(f"text.tokens={config.tokens} and text.dim={config.dim} must be at least 1")
    if config.kind == "t5":
        from cosmos_mp.text.t5 import T5Text

        return T5Text(Path(config.path), config.tokens, config.dim, getattr(torch, config.dtype)).to(device)
    if config.kind == "cached":
        from cosmos_mp.text.cached import CachedText

        return CachedText(Path(config.path), config.tokens, config.dim)
    if config.kind == "tiny":
        from cosmos_mp.text.tiny import TinyText

        return TinyText(config.tokens, config.dim)
    raise ValueError(f"text.kind={config.kind!r} is none of t5, cached, tiny")


def check_captions(captions: Sequence[str]) -> None:
    """Refuse one bare string, which would be read letter by letter, and an empty batch."""
    if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be a non-empty list of strings, got {captions!r:.80}")


def pad(rows: Sequence[Tensor], tokens: int, dim: int) -> Tensor:
    """Stack embeddings (n, dim), n <= tokens, to float32 (B, tokens, dim) with zeros behind."""
    text_BLD = torch.zeros(len(rows), tokens, dim)
    for target, row in zip(text_BLD, rows, strict=True):
        target[: len(row)] = row
    return text_BLD
