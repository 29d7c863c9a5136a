"""A store of named tensors per sample, in safetensors shards: resumable, checked, written by many processes at once.

    STORE/header.json             what every sample holds, how many there are, and the settings they were made with
    STORE/shard_00000.safetensors tensors, keys `{sample:08d}.{field}`
    STORE/shard_00000.json        its samples' captions and seeds, size and SHA-256 of the tensors; written last: the shard is finished
    STORE/COMPLETE.json           every shard is there

Each file appears at once and whole: written beside its name, flushed to disk, renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos_mp.files import file_sha256, whole

VERSION = 1
COMMANDS = {"clips": "python -m cosmos_mp encode", "pairs": "python pretrain_scripts/generate_pairs.py"}
"""What makes a store of each kind."""


class StoreError(ValueError):
    """A store that cannot be used or continued; the message names file and remedy."""


class Field(NamedTuple):
    """Shape and type of one tensor of a sample."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Sample(NamedTuple):
    """One sample: its tensors by field name, and what is known about it as JSON values (caption, seed, ...)."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]


@dataclass(frozen=True)
class Header:
    """What a store holds. `meta` are the settings that made it, as JSON values: a store made with others is not continued."""

    kind: str
    count: int
    shard_size: int
    fields: Mapping[str, Field]
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in COMMANDS:
            raise StoreError(f"kind of store is {self.kind!r}, expected one of {', '.join(COMMANDS)}")
        if self.count < 1 or self.shard_size < 1:
            raise StoreError(f"a store needs at least one sample and one per shard, not count={self.count}, shard_size={self.shard_size}")

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    @property
    def command(self) -> str:
        return COMMANDS[self.kind]

    def samples(self, shard: int) -> range:
        """Ids of the samples in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def to_json(self) -> dict[str, Any]:
        fields = {
            name: {"shape": list(field.shape), "dtype": str(field.dtype).removeprefix("torch.")} for name, field in self.fields.items()
        }
        values = {"version": VERSION, "kind": self.kind, "count": self.count, "shard_size": self.shard_size, "fields": fields}
        return json.loads(json.dumps({**values, "meta": dict(self.meta)}))


# --- Files ---


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, that becomes `path` once it is on disk."""
    try:
        with whole(path) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}); free the disk and run the same command again: finished shards stay"
        ) from error


def _write_json(path: Path, value: Any) -> None:
    with _whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); {remedy}") from None


def _tensors_path(store: Path, shard: int) -> Path:
    return store / f"shard_{shard:05d}.safetensors"


def _index_path(store: Path, shard: int) -> Path:
    return store / f"shard_{shard:05d}.json"


def _read_index(store: Path, header: Header, shard: int) -> dict[str, Any] | None:
    """Index of a shard, or None if the shard was never finished."""
    path, tensors = _index_path(store, shard), _tensors_path(store, shard)
    if not path.exists() or not tensors.exists():
        return None
    remedy = f"delete it and {tensors.name}, then run `{header.command}` again: only this shard is made anew"
    index = _read_json(path, remedy)
    try:
        fits = [sample["id"] for sample in index["samples"]] == list(header.samples(shard)) and {"bytes", "sha256"} <= index.keys()
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise StoreError(f"{path} does not list samples {header.samples(shard)} with bytes and sha256; {remedy}")
    return index


def _completion(header: Header, indices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    digest = hashlib.sha256("".join(index["sha256"] for index in indices).encode()).hexdigest()
    return {"samples": header.count, "shards": header.shards, "sha256": digest}


def read_header(store: Path) -> Header:
    """Header of a store.

    Raises:
        FileNotFoundError: no store at this path.
        StoreError: a damaged header, or one of another format version.
    """
    path = Path(store) / "header.json"
    if not path.exists():
        commands = " or ".join(f"`{command}`" for command in COMMANDS.values())
        raise FileNotFoundError(f"{path} does not exist: no encoded clips or pairs here; make them with {commands}")
    values = _read_json(path, "make the store anew in another folder")
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise StoreError(f"{path} is no store of format version {VERSION}; make the store anew in another folder")
    try:
        fields = {name: Field(tuple(item["shape"]), getattr(torch, item["dtype"])) for name, item in values["fields"].items()}
        return Header(values["kind"], values["count"], values["shard_size"], fields, dict(values["meta"].items()))
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); make the store anew in another folder") from None


# --- Writing ---


class ShardWriter:
    """Makes a store, or goes on with one that has the same header.

    Raises:
        StoreError: the folder holds a store made with other settings.
    """

    def __init__(self, store: Path, header: Header) -> None:
        self.store, self.header = Path(store), header
        self.store.mkdir(parents=True, exist_ok=True)
        path = self.store / "header.json"
        if not path.exists():
            _write_json(path, header.to_json())
        old, new = _flat(read_header(self.store).to_json()), _flat(header.to_json())
        changed = [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)]
        if changed:
            raise StoreError(
                f"{self.store} was made with other settings ({'; '.join(changed)}); give another output folder, "
                "go back to the old settings, or delete this store"
            )

    def missing_shards(self, rank: int = 0, world: int = 1) -> list[int]:
        """Shards that are still to be made by one of `world` processes: those with shard % world == rank."""
        return [shard for shard in range(rank, self.header.shards, world) if not self._finished(shard)]

    def write(self, shard: int, samples: Sequence[Sample]) -> None:
        """Write one shard whole; a finished shard is left as it is.

        Args:
            shard: number of the shard.
            samples: its samples, in the order of `header.samples(shard)`.

        Raises:
            ValueError: another number of samples, or a tensor that is missing, unexpected, of another shape or type, or not finite.
            OSError: the disk refuses; shards that were finished stay.
        """
        if self._finished(shard):
            return
        ids = self.header.samples(shard)
        if len(samples) != len(ids):
            raise ValueError(f"{self.store}: shard {shard} holds {len(ids)} samples, got {len(samples)}")
        tensors = {}
        for number, sample in zip(ids, samples, strict=True):
            self._check(number, sample.tensors)
            tensors |= {f"{number:08d}.{name}": value.detach().contiguous() for name, value in sample.tensors.items()}
        path = _tensors_path(self.store, shard)
        _index_path(self.store, shard).unlink(missing_ok=True)  # an old mark must not stand beside new tensors
        with _whole(path) as partial:
            save_file(tensors, partial)
            index = {"shard": shard, "bytes": partial.stat().st_size, "sha256": file_sha256(partial)}
        index["samples"] = [{**sample.info, "id": number} for number, sample in zip(ids, samples, strict=True)]
        _write_json(_index_path(self.store, shard), index)

    def finish(self) -> bool:
        """Mark the store complete if every shard is there. True if it is."""
        indices = [_read_index(self.store, self.header, shard) for shard in range(self.header.shards) if self._finished(shard)]
        if len(indices) < self.header.shards:
            return False
        _write_json(self.store / "COMPLETE.json", _completion(self.header, indices))
        for left_over in self.store.glob(".shard_*.partial"):  # of a process that was killed: nobody writes shards any more
            left_over.unlink(missing_ok=True)
        return True

    def _finished(self, shard: int) -> bool:
        index = _read_index(self.store, self.header, shard)
        return index is not None and _tensors_path(self.store, shard).stat().st_size == index["bytes"]

    def _check(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        if tensors.keys() != self.header.fields.keys():
            raise ValueError(f"{self.store}: sample {number} has fields {sorted(tensors)}, expected {sorted(self.header.fields)}")
        for name, (shape, dtype) in self.header.fields.items():
            value = tensors[name]
            if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
                raise ValueError(
                    f"{self.store}: {name} of sample {number} is {value.dtype} {tuple(value.shape)}, expected {dtype} {tuple(shape)}"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{self.store}: {name} of sample {number} is not finite; a store of such samples would spoil the training")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- Reading ---


class ShardReader:
    """Reads a complete store by sample id; files are mapped into memory, not loaded.

    Args:
        store: the folder.
        verify: compare every shard with its SHA-256 now; sizes are compared always.

    Raises:
        FileNotFoundError: no store at this path.
        StoreError: shards are missing, or one is damaged.
    """

    def __init__(self, store: Path, verify: bool = True) -> None:
        self.store = Path(store)
        self.header = read_header(self.store)
        command = self.header.command
        indices = [_read_index(self.store, self.header, shard) for shard in range(self.header.shards)]
        missing = [shard for shard, index in enumerate(indices) if index is None]
        path = self.store / "COMPLETE.json"
        if missing or not path.exists():
            first = f" (the first is {_tensors_path(self.store, missing[0]).name})" if missing else ""
            raise StoreError(
                f"{self.store} is not complete: {len(missing)} of {len(indices)} shards are missing{first}; finish it with `{command}`"
            )
        self._indices: list[dict[str, Any]] = indices
        for shard, index in enumerate(indices):
            size = _tensors_path(self.store, shard).stat().st_size
            self._compare(shard, f"{index['bytes']} bytes", f"{size} bytes")
        complete = _completion(self.header, indices)
        if _read_json(path, f"delete it and run `{command}` again") != complete:
            raise StoreError(f"{path} does not belong to the shards beside it; run `{command}` again: it is written anew")
        self.sha256: str = complete["sha256"]
        """Checksum over all tensors of the store."""
        self.bytes: int = sum(index["bytes"] for index in indices)
        self._info: list[dict[str, Any]] = [sample for index in indices for sample in index["samples"]]
        self._files: dict[int, Any] = {}
        if verify:
            self.verify()

    def verify(self) -> None:
        """Compare every shard with its SHA-256; a StoreError names the first that differs."""
        for shard, index in enumerate(self._indices):
            self._compare(shard, f"sha256 {index['sha256']}", f"sha256 {file_sha256(_tensors_path(self.store, shard))}")

    def __len__(self) -> int:
        return self.header.count

    def info(self, index: int) -> dict[str, Any]:
        """What is known about a sample beside its tensors: id, caption, clip id, seeds."""
        return self._info[self._valid(index)]

    def read(self, index: int) -> dict[str, Tensor]:
        """Tensors of one sample by field name."""
        shard = self._valid(index) // self.header.shard_size
        if shard not in self._files:
            self._files[shard] = safe_open(_tensors_path(self.store, shard), framework="pt")
        return {name: self._files[shard].get_tensor(f"{index:08d}.{name}") for name in self.header.fields}

    def _valid(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.store} holds samples 0..{len(self) - 1}, not {index}")
        return index

    def _compare(self, shard: int, expected: str, found: str) -> None:
        if found != expected:
            raise StoreError(
                f"{_tensors_path(self.store, shard)} is damaged: expected {expected}, found {found}; delete it and "
                f"{_index_path(self.store, shard).name}, then run `{self.header.command}` again with the same settings: "
                "only this shard is made anew"
            )
