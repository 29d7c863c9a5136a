"""Embeddings made once and kept: `index.json` tells for a caption's SHA-256 the safetensors file and key of its (n, dim) rows."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos_mp.files import whole, write_text
from cosmos_mp.text import TextEncoder, check_captions, pad

INDEX = "index.json"
FORMAT = "cosmos_mp text cache 1"
_DTYPES = (torch.float16, torch.float32)


class CachedText:
    """Reads a cache written by `write_cache`; only the files that a batch needs are opened.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: a damaged index, or embeddings of another width.
    """

    def __init__(self, folder: Path, tokens: int, dim: int) -> None:
        self.folder, self.tokens, self.dim = Path(folder), tokens, dim
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{self.folder}: no cached text here ({INDEX} is missing); make it with `python -m cosmos_mp cache-text`"
            )
        index = _read_index(self.folder)
        if index["dim"] != dim:
            raise ValueError(f"{self.folder}: embeddings are {index['dim']} wide, but text.dim={dim}; use the cache of the right encoder")
        self._entries: dict[str, dict[str, str]] = index["entries"]
        self._files: dict[str, Any] = {}

    def encode(self, captions: Sequence[str]) -> Tensor:
        """float32 (B, tokens, dim).

        Raises:
            CaptionError: a caption is not in the cache.
            ValueError: a file is damaged, or an entry is longer than `tokens`.
        """
        check_captions(captions)
        return pad([self._row(caption) for caption in captions], self.tokens, self.dim)

    def null(self, batch: int) -> Tensor:
        """Zeros (B, tokens, dim)."""
        return torch.zeros(batch, self.tokens, self.dim)

    def _row(self, caption: str) -> Tensor:
        entry = self._entries.get(caption_key(caption))
        if entry is None:
            raise CaptionError(
                f"{self.folder}: no embedding of the caption {caption!r}; add it with `python -m cosmos_mp cache-text` for this folder"
            )
        row = self._tensor(entry)
        if row.dim() != 2 or row.shape[1] != self.dim or len(row) > self.tokens:
            raise ValueError(
                f"{self.folder / entry['file']}: {entry['key']} is {tuple(row.shape)}, expected at most "
                f"({self.tokens}, {self.dim}); set text.tokens to what the cache was made with"
            )
        return row.float()

    def _tensor(self, entry: Mapping[str, str]) -> Tensor:
        path = self.folder / entry["file"]
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            return self._files[path].get_tensor(entry["key"])
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: cannot be read ({error}); delete {self.folder} and make it again with `python -m cosmos_mp cache-text`"
            ) from error


class CaptionError(ValueError):
    """A caption that the cache does not hold; the message names caption, folder and command."""


def caption_key(caption: str) -> str:
    """SHA-256 of the caption, exactly as it is written."""
    return hashlib.sha256(caption.encode()).hexdigest()


# --- Writing ---


def write_cache(
    folder: Path, encoder: TextEncoder, captions: Sequence[str], *, dtype: torch.dtype = torch.float16, batch_size: int = 64
) -> int:
    """Add the captions that the cache does not hold yet; returns how many were encoded.

    Every batch becomes one file and then one new index, each visible at once and whole: an interrupted run goes on where it stopped.
    Trailing zeros are not stored.

    Raises:
        ValueError: a cache of another width is there, or an embedding does not fit `dtype`.
    """
    folder = Path(folder)
    index = _open_index(folder, encoder.dim)
    todo = [caption for caption in dict.fromkeys(captions) if caption_key(caption) not in index["entries"]]
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        rows = [_trim(row) for row in encoder.encode(batch)]
        _append(folder, index, dict(zip(batch, rows, strict=True)), dtype)
    return len(todo)


def import_nvidia(folder: Path, dataset: Path, *, dim: int = 1024) -> int:
    """Add the embeddings of a dataset in NVIDIA's layout: `t5_xxl/NAME.pickle` for the caption in `metas/NAME.txt`; returns how many.

    Raises:
        FileNotFoundError: no pickles, or no caption for one of them.
        ValueError: a pickle holds anything but one embedding of width `dim`.
    """
    folder, dataset = Path(folder), Path(dataset)
    paths = sorted((dataset / "t5_xxl").glob("*.pickle"))
    if not paths:
        raise FileNotFoundError(f"{dataset / 't5_xxl'}: no .pickle files; expected NVIDIA's layout, t5_xxl/NAME.pickle and metas/NAME.txt")
    index, rows = _open_index(folder, dim), {}
    for path in paths:
        meta = dataset / "metas" / f"{path.stem}.txt"
        if not meta.is_file():
            raise FileNotFoundError(f"{meta}: no caption for {path}; add it or remove the pickle")
        caption = meta.read_text().strip()
        if caption_key(caption) not in index["entries"] and caption not in rows:
            rows[caption] = read_nvidia_pickle(path, dim)
    if rows:
        _append(folder, index, rows, torch.float16)
    return len(rows)


def _trim(row_LD: Tensor) -> Tensor:
    used = row_LD.ne(0).any(dim=1).nonzero()
    return row_LD[: int(used[-1]) + 1 if len(used) else 0]


def _open_index(folder: Path, dim: int) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        return {"format": FORMAT, "dim": dim, "entries": {}}
    index = _read_index(folder)
    if index["dim"] != dim:
        raise ValueError(f"{folder}: holds embeddings of width {index['dim']}, the encoder gives {dim}; write to another folder")
    return index


def _append(folder: Path, index: dict[str, Any], rows: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """One file of embeddings, then the index that names it. A file that no index names is harmless: it is written again."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} of a text cache: take float16 or float32")
    tensors = {}
    for caption, row in rows.items():
        tensors[caption_key(caption)] = row.to(dtype).contiguous()
        if not torch.isfinite(tensors[caption_key(caption)]).all():
            raise ValueError(f"the embedding of {caption!r} does not fit {dtype}; give write_cache dtype=torch.float32")
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("".join(tensors).encode()).hexdigest()[:16] + ".safetensors"
    with whole(folder / name) as partial:
        save_file(tensors, partial)
    index["entries"].update({key: {"file": name, "key": key} for key in tensors})
    write_text(folder / INDEX, json.dumps(index, indent=0, sort_keys=True) + "\n")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); delete {folder} and make it again with `python -m cosmos_mp cache-text`"
        ) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT or set(index) != {"format", "dim", "entries"}:
        raise ValueError(f"{path}: not the index of a text cache ({FORMAT!r}); point text.path at the right folder")
    return index


# --- NVIDIA's pickles ---


class _ArraysOnly(pickle.Unpickler):
    """Admits what a numpy array in a list is made of. Anything else that a pickle may call is refused before it is called."""

    _ADMITTED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_nvidia_pickle(path: Path, dim: int = 1024) -> Tensor:
    """Rows (n, dim) of one of NVIDIA's `t5_xxl/NAME.pickle`: a float array, or a list with one, of shape (n, dim).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds or calls anything but numpy arrays and lists, or has another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such embedding; make it with `python -m cosmos_mp cache-text`")
    try:
        with open(path, "rb") as file:
            value = _ArraysOnly(file).load()
    except Exception as error:
        raise ValueError(f"{path}: refused, not a pickle of numpy arrays alone ({error}); do not use this file") from error
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != 2 or value.shape[1] != dim:
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{path}: holds {found}, expected one float array (tokens, {dim}); is it a T5 embedding of this width?")
    return torch.from_numpy(value.astype(np.float32))
