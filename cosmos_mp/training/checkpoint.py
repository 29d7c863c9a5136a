"""Checkpoints of a run: whose folder it is, which checkpoint is the newest good one, and what comes out of it. `saver` writes them.

A checkpoint is a flat table of tensors, stored by torch.distributed.checkpoint:

    model/<role>/<parameter>            trained networks; `<role>_ema` is the average of one
    optim/<role>/<parameter>/<state>    AdamW's state
    counters/...                        iteration, steps per role, and the like (int64)

The folder `checkpoints/iter_<N>` holds what was true after N iterations, the run's config.json, and COMPLETE.json with size and SHA-256 of
every file. Each rank writes a file with its parts of the tensors, and any other layout reads from them what it needs.

Functions that take a topology are called by all its ranks together; without one, a process works for itself.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum, EnumType
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from cosmos_mp.files import file_sha256, write_json
from cosmos_mp.parallel.topology import Topology

T = TypeVar("T")

MARKER = "COMPLETE.json"
CONFIG = "config.json"
MAY_CHANGE = {
    "out",
    "kernels",
    *(
        f"train.{name}"
        for name in ("iterations", "log_every", "save_every", "keep_last", "picture_every", "picture_samples", "tensorboard")
        + ("recompute", "async_save", "micro_batch_size", "max_nonfinite")
    ),
    *(f"profile.{name}" for name in ("kind", "memory", "start", "stop", "ranks")),
    *(f"parallel.{name}" for name in ("tp", "cp", "dp", "shard", "sequence_parallel", "cp_attention", "cp_ulysses", "reduce", "timeout")),
}
"""Options that a resumed run may set anew, the layout among them; every other one would make it another run."""

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A run folder or checkpoint that cannot be used; the message names the path and the remedy."""


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; the ones before it are intact."""


class RankError(CheckpointError):
    """Work of all ranks that some could not do; raised on all of them, and it says which and why."""

    @classmethod
    def of(cls, failures: Mapping[int, str], world: int) -> RankError:
        ranks: dict[str, list[int]] = {}
        for rank, reason in failures.items():
            ranks.setdefault(reason, []).append(rank)
        if len(failures) == world and len(ranks) == 1:  # nothing to tell apart, as in a single process
            return cls(*ranks)
        return cls("; ".join(f"rank {', '.join(map(str, who))}: {reason}" for reason, who in ranks.items()))


# --- All ranks together ---


def place(topology: Topology | None) -> tuple[int, int]:
    """Rank and number of the processes that share the work.

    A single one uses no collectives, not even with itself: gloo's thread would open a second OpenMP team, and with more threads than cores
    the training's own team stops spinning at its barriers; every later iteration took twice as long (measured on two cores).
    """
    return (0, 1) if topology is None or topology.mesh is None else (topology.rank, topology.world)


def together(work: Callable[[], T], topology: Topology | None, group: dist.ProcessGroup | None = None) -> list[T]:
    """Let every rank do something; every rank gets the results of all.

    Args:
        group: of all ranks, instead of the default one.

    Raises:
        RankError: a rank failed. All raise it: nobody goes on and waits for one that did not.
    """
    value, problem = None, None
    try:
        value = work()
    except (Exception, CheckpointException) as error:
        problem = error
    _, world = place(topology)
    outcomes = [(value, None if problem is None else reason(problem))]  # in words: not every error can be sent
    if world > 1:
        own, outcomes = outcomes[0], [None] * world
        dist.all_gather_object(outcomes, own, group=group)
    failures = {rank: words for rank, (_, words) in enumerate(outcomes) if words is not None}
    if failures:
        raise RankError.of(failures, world) from problem
    return [value for value, _ in outcomes]


def reason(error: BaseException) -> str:
    """An error in words."""
    if isinstance(error, CheckpointException):
        return "; ".join(reason(cause) for cause, _ in error.failures.values())
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _on_first(work: Callable[[], T], topology: Topology | None) -> T:
    return work() if topology is None else topology.on_first(work)


# --- Run folder ---


def open_run(run_dir: Path, settings: Mapping[str, Any], topology: Topology | None = None) -> None:
    """Make the run folder and write its config.json; `settings` is what `options.to_dict` gives.

    Raises:
        CheckpointError: the folder holds a run with other settings, or its config.json cannot be read.
    """
    _on_first(lambda: _open_run(Path(run_dir), settings), topology)


def _open_run(run_dir: Path, settings: Mapping[str, Any]) -> None:
    path = run_dir / CONFIG
    if path.exists() and published(run_dir / "checkpoints"):  # a run that saved nothing has nothing to lose
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); restore it or choose another folder (option out)") from None
        try:
            check_same_run(old, dict(settings))
        except CheckpointError as error:
            raise CheckpointError(f"{run_dir}: {error}") from None
    write_json(path, dict(settings))


@contextmanager
def exclusive(run_dir: Path, topology: Topology | None = None) -> Iterator[None]:
    """Keep a run folder to these ranks; a lock that dies with the first one, however it dies.

    Raises:
        CheckpointError: another process trains into the folder; the message has its number.
    """
    with ExitStack() as held:

        def lock() -> None:
            held.enter_context(_lock(run_dir))

        _on_first(lock, topology)
        yield


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    path = Path(run_dir) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(
                f"{run_dir}: process {file.read().strip()} trains here; wait for it, or stop it and start again"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_same_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compare two configurations as JSON values, but for the options in `MAY_CHANGE`.

    Raises:
        CheckpointError: they differ; the message lists each option, old -> new, and the remedy.
    """
    before, after = (dict(_flat(json.loads(json.dumps(config)))) for config in (old, new))
    keys = sorted((before.keys() | after.keys()) - MAY_CHANGE)
    values = [(key, *(json.dumps(config[key]) if key in config else "absent" for config in (before, after))) for key in keys]
    changed = [f"{key}: {old_value} -> {new_value}" for key, old_value, new_value in values if old_value != new_value]
    if changed:
        raise CheckpointError(f"another run is here ({'; '.join(changed)}); set these options back, or choose another folder (option out)")


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- Choosing ---


def published(folder: Path) -> list[Path]:
    """Visible checkpoints, newest first."""
    found = (path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name))
    return sorted(found, key=lambda path: path.name, reverse=True)


def damage(path: Path, *, hashes: bool = True, topology: Topology | None = None) -> str | None:
    """What is wrong with a checkpoint folder, or None: marker, sizes, and with `hashes` every byte, each rank reading some of the files."""
    found, files = _on_first(lambda: _listed(path), topology)
    if found or not hashes:
        return found
    rank, world = place(topology)
    own = sorted(files, key=lambda name: files[name][0], reverse=True)[rank::world]
    reports = together(lambda: {name: found for name in own if (found := _changed(path / name, files[name][1]))}, topology)
    harmed = {name: found for report in reports for name, found in report.items()}
    return next((f"{name} {harmed[name]}" for name in files if name in harmed), None)


def _listed(path: Path) -> tuple[str | None, dict[str, tuple[int, str]]]:
    """What is wrong without a look into the files, and size and checksum that each should have."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {MARKER}: it was not finished", {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__}: {error})", {}
    if ".metadata" not in listed:
        return f"{MARKER} does not list .metadata", {}
    for name, (size, _) in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}", {}
    return None, listed


def _changed(file: Path, digest: str) -> str | None:
    try:
        return None if file_sha256(file) == digest else f"has another checksum than {MARKER} says"
    except OSError as error:
        return f"cannot be read ({error})"


def latest(run_dir: Path, topology: Topology | None = None) -> Path | None:
    """The newest complete and undamaged checkpoint; None where the run has not saved one yet.

    Raises:
        CheckpointError: there are checkpoints and none is usable; the message gives each one's reason.
    """
    folder = Path(run_dir) / "checkpoints"
    rank, _ = place(topology)
    if rank == 0:
        for partial in sorted(folder.glob("*.partial")):
            log.warning("%s skipped: a save that did not finish", partial)
    reasons = []
    for path in _on_first(lambda: published(folder), topology):
        found = damage(path, topology=topology)
        if found is None:
            return path
        if rank == 0:
            log.warning("%s skipped: %s", path, found)
        reasons.append(f"{path.name}: {found}")
    if reasons:
        raise CheckpointError(f"{folder}: no usable checkpoint ({'; '.join(reasons)}); restore one, or delete the folder to start anew")
    return None


# --- Loading ---


def load(path: Path, tensors: Mapping[str, Tensor], topology: Topology | None = None) -> None:
    """Fill `tensors` in place from a checkpoint that holds exactly these; of a DTensor, the part that is here.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or dtype; nothing has been filled then.
    """
    _fill(_Reader(path), tensors, "", topology, dtypes=True, advice="resume with the code and options it had")


def load_role(path: Path, role: str, tensors: Mapping[str, Tensor], *, prefer_ema: bool = True, topology: Topology | None = None) -> None:
    """Fill a role's parameters, given by name, in place for hand-over to another run; of a DTensor, only what is here is read.

    Args:
        path, prefer_ema: as in `load_weights_of`.
        topology: ranks that share out the search for damage; without one, each call reads all bytes for it.

    Raises:
        FileNotFoundError, CheckpointError: as `load_weights_of`; also for a parameter that is missing, unexpected or of another shape,
            and nothing has been filled then.
    """
    reader = _Reader(_chosen(path, topology))
    prefix = _on_first(lambda: reader.prefix(role, prefer_ema), topology)
    _fill(reader, tensors, prefix, topology, dtypes=False, advice="check the net.* options")


def load_weights_of(path: Path, role: str, *, prefer_ema: bool = True) -> dict[str, Tensor]:
    """A role's parameters by name, on the CPU, for hand-over to another run.

    Args:
        path: a run folder (its newest good checkpoint is taken) or a checkpoint folder.
        prefer_ema: take `<role>_ema` where the run keeps that average.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        CheckpointError: the checkpoint is damaged, or has no such role; the message lists the roles that are there.
    """
    reader = _Reader(_chosen(path, None))
    prefix = reader.prefix(role, prefer_ema)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in reader.stored(prefix).items()}
    _fill(reader, tensors, prefix, None, dtypes=True, advice="")
    return tensors


def _chosen(path: Path, topology: Topology | None) -> Path:
    path = Path(path)

    def is_checkpoint() -> bool:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such run folder or checkpoint folder")
        return path.name.startswith("iter_") and not (path / "checkpoints").is_dir()

    if _on_first(is_checkpoint, topology):
        found = damage(path, topology=topology)
        if found is not None:
            raise CheckpointError(f"{path}: {found}; give another checkpoint, or the run folder to take its newest good one")
        return path
    newest = latest(path, topology)
    if newest is None:
        raise FileNotFoundError(f"{path}: no checkpoint in it; let that run save one first (train.save_every)")
    return newest


def _fill(reader: _Reader, tensors: Mapping[str, Tensor], prefix: str, topology: Topology | None, *, dtypes: bool, advice: str) -> None:
    try:
        misfits = [words for words in dict.fromkeys(together(lambda: _misfit(reader.stored(prefix), tensors, dtypes), topology)) if words]
        if not misfits:
            together(lambda: reader.read(tensors, prefix), topology)
    except RankError as error:
        raise CheckpointError(f"{reader.path} cannot be read ({error}); restore it, or take another one") from error
    if misfits:
        raise CheckpointError(f"{reader.path} does not fit this run: {'; '.join(misfits)}; {advice}")


def _misfit(stored: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor], dtypes: bool) -> str:
    complaints = [f"{name} is missing" for name in sorted(tensors.keys() - stored.keys())]
    complaints += [f"{name} is unexpected" for name in sorted(stored.keys() - tensors.keys())]
    for name in sorted(stored.keys() & tensors.keys()):
        found, wanted = stored[name], tensors[name]
        if found.size != wanted.shape or dtypes and found.properties.dtype != wanted.dtype:
            expected = f"{tuple(wanted.shape)} {wanted.dtype}"
            complaints.append(f"{name} is {tuple(found.size)} {found.properties.dtype}, expected {expected}")
    return "; ".join(complaints[:8]) + (f" and {len(complaints) - 8} more" if len(complaints) > 8 else "")


def no_dist_is_meant() -> None:
    """Silence what torch says whenever one process reads or writes a checkpoint by itself."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _Reader(dcp.FileSystemReader):
    """The files of one checkpoint. torch pickles the table of contents; only the names it is made of are let in."""

    def stored(self, prefix: str) -> dict[str, TensorStorageMetadata]:
        """Entries whose names begin so, by the rest of the name."""
        entries = self.contents.state_dict_metadata
        return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}

    def prefix(self, role: str, prefer_ema: bool) -> str:
        """What the names of a role's parameters begin with."""
        roles = sorted({name.split("/")[1] for name in self.stored("") if name.startswith("model/")})
        if role not in roles:
            raise CheckpointError(f"{self.path}: no role {role!r}; it holds {', '.join(roles)}")
        return f"model/{role}_ema/" if prefer_ema and f"{role}_ema" in roles else f"model/{role}/"

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Fill tensors, given by their names without the prefix, with what belongs to this rank."""
        no_dist_is_meant()
        dcp.load({prefix + name: value for name, value in tensors.items()}, storage_reader=self, no_dist=True)

    @cached_property
    def contents(self) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _Contents(file).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.contents.storage_meta.load_id = self.load_id
        return self.contents


def _member(kind: type[Enum], name: str) -> Enum:
    """A member of an enumeration, which Python up to 3.11.3 writes down as getattr(kind, name)."""
    if not isinstance(kind, EnumType) or name not in kind.__members__:
        raise CheckpointError(f".metadata of a checkpoint refers to {name} of {kind!r}: it was not written by this package")
    return kind[name]


class _Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        allowed = {
            "torch.distributed.checkpoint.metadata": (
                "Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING ChunkStorageMetadata MetadataIndex StorageMeta"
            ),
            "torch.distributed.checkpoint.filesystem": "_StorageInfo",
            "torch.serialization": "_get_layout",
            "torch": "Size float16 bfloat16 float32 float64 int32 int64",
            "pathlib": "PosixPath",
        }
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in allowed.get(module, "").split():
            raise CheckpointError(f".metadata of a checkpoint refers to {module}.{name}: it was not written by this package")
        return super().find_class(module, name)
