"""A text encoder without weights: every word is a fixed random vector, drawn from a generator keyed by the word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_mp.text import check_captions, pad


class TinyText:
    """One token per word, lower-cased, punctuation dropped. Words beyond `tokens` are cut off, as T5 cuts."""

    def __init__(self, tokens: int, dim: int) -> None:
        self.tokens, self.dim = tokens, dim
        self._vectors: dict[str, Tensor] = {}

    def encode(self, captions: Sequence[str]) -> Tensor:
        """float32 (B, tokens, dim); an empty caption is all zeros."""
        check_captions(captions)
        words = [re.findall(r"\w+", caption.lower())[: self.tokens] for caption in captions]
        return pad(
            [torch.stack([self._vector(w) for w in row]) if row else torch.zeros(0, self.dim) for row in words], self.tokens, self.dim
        )

    def null(self, batch: int) -> Tensor:
        """Zeros (B, tokens, dim)."""
        return torch.zeros(batch, self.tokens, self.dim)

    def _vector(self, word: str) -> Tensor:
        """Standard normal numbers (dim,) seeded by the word's SHA-256."""
        if word not in self._vectors:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") >> 1
            self._vectors[word] = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
        return self._vectors[word]
