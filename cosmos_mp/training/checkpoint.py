"""Checkpoints of a run: written aside, sealed by checksums, made visible by one rename; and the choice of the newest good one.

A checkpoint is a flat table of tensors, stored by torch.distributed.checkpoint:

    model/<role>/<parameter>            trained networks; `<role>_ema` is the average of one
    optim/<role>/<parameter>/<state>    AdamW's state
    counters/...                        iteration, steps per role, and the like (int64)

The folder `checkpoints/iter_<N>` holds what was true after N iterations, the run's config.json, and COMPLETE.json with size and SHA-256 of
every file.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from cosmos_mp.files import file_sha256, sync_folder, write_json

MARKER = "COMPLETE.json"
CONFIG = "config.json"
MAY_CHANGE = {
    "out",
    *(
        f"train.{name}"
        for name in ("iterations", "log_every", "save_every", "keep_last", "picture_every", "picture_samples", "tensorboard")
    ),
}
"""Options that a resumed run may set anew; every other one would make it another run."""

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A run folder or checkpoint that cannot be used; the message names the path and the remedy."""


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; the ones before it are intact."""


# --- Run folder ---


def open_run(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Make the run folder and write its config.json; `settings` is what `options.to_dict` gives.

    Raises:
        CheckpointError: the folder holds a run with other settings, or its config.json cannot be read.
    """
    path = Path(run_dir) / CONFIG
    if path.exists() and _published(Path(run_dir) / "checkpoints"):  # a run that saved nothing has nothing to lose
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
def exclusive(run_dir: Path) -> Iterator[None]:
    """Keep a run folder to this process; a lock that dies with its process, however it dies.

    Raises:
        CheckpointError: another process trains into the folder; the message has its number.
    """
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


def _json(values: Any) -> str:
    return json.dumps(values, indent=1) + "\n"


# --- Saving ---


def save(run_dir: Path, iteration: int, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], keep_last: int) -> Path:
    """Write `checkpoints/iter_<iteration>` whole or not at all, then delete all but the newest `keep_last`.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointWriteError: the files could not be written (disk full); earlier checkpoints are untouched.
    """
    folder = Path(run_dir) / "checkpoints"
    target = folder / f"iter_{iteration:08d}"
    partial = target.with_suffix(".partial")
    try:
        for leftover in folder.glob("*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        with _single_process():
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(partial), no_dist=_alone())
        _write(partial / CONFIG, _json(settings))
        _write(partial / MARKER, _json({"iteration": iteration, "files": _listing(partial)}))
        sync_folder(partial)
        _publish(partial, target)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointWriteError(_complaint(target, error)) from error
    _prune(target, keep_last)
    return target


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())}


def _publish(partial: Path, target: Path) -> None:
    if target.exists():  # a damaged one, or the run would have gone on from it
        target.rename(target.with_name(f"{target.name}.replaced.partial"))
    partial.rename(target)
    sync_folder(target.parent)


def _complaint(target: Path, error: BaseException) -> str:
    causes = [pair[0] for pair in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    reason = "; ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    before = _published(target.parent)
    kept = f"{before[0].name} is intact" if before else "there is no earlier checkpoint"
    free = shutil.disk_usage(target.parent if target.parent.exists() else ".").free / 1e6
    return f"{target} could not be written ({reason}); {free:.0f} MB are free; {kept}: make room and start the same command again"


def _prune(saved: Path, keep_last: int) -> None:
    # Newer ones than the one just saved are damaged: the run went on from before them. They neither count nor go.
    kept = 0
    for path in _published(saved.parent):
        if path.name > saved.name:
            continue
        if kept < keep_last:
            kept += damage(path, hashes=False) is None
        else:
            gone = path.with_name(f"{path.name}.partial")  # out of sight first: a kill never leaves half a checkpoint
            path.rename(gone)
            shutil.rmtree(gone)
    for replaced in saved.parent.glob("*.replaced.partial"):
        shutil.rmtree(replaced)


# --- Choosing ---


def _published(folder: Path) -> list[Path]:
    """Visible checkpoints, newest first."""
    return sorted((path for path in folder.glob("iter_*") if path.suffix != ".partial"), key=lambda path: path.name, reverse=True)


def damage(path: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None: marker, sizes, and with `hashes` every byte."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {MARKER}: it was not finished"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__}: {error})"
    if ".metadata" not in listed:
        return f"{MARKER} does not list .metadata"
    for name, (size, digest) in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        if hashes and file_sha256(file) != digest:
            return f"{name} has another checksum than {MARKER} says"
    return None


def latest(run_dir: Path) -> Path | None:
    """The newest complete and undamaged checkpoint; None where the run has not saved one yet.

    Raises:
        CheckpointError: there are checkpoints and none is usable; the message gives each one's reason.
    """
    folder = Path(run_dir) / "checkpoints"
    for partial in sorted(folder.glob("*.partial")):
        log.warning("%s skipped: a save that did not finish", partial)
    reasons = []
    for path in _published(folder):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("%s skipped: %s", path, reason)
        reasons.append(f"{path.name}: {reason}")
    if reasons:
        raise CheckpointError(f"{folder}: no usable checkpoint ({'; '.join(reasons)}); restore one, or delete the folder to start anew")
    return None


# --- Loading ---


def load(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint that holds exactly these.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or dtype; nothing has been filled then.
    """
    stored = _stored(path)
    complaints = [f"{name} is missing" for name in sorted(tensors.keys() - stored.keys())]
    complaints += [f"{name} is unexpected" for name in sorted(stored.keys() - tensors.keys())]
    for name in sorted(stored.keys() & tensors.keys()):
        found, wanted = (stored[name].size, stored[name].properties.dtype), (tensors[name].shape, tensors[name].dtype)
        if found != wanted:
            complaints.append(f"{name} is {tuple(found[0])} {found[1]}, expected {tuple(wanted[0])} {wanted[1]}")
    if complaints:
        more = f" and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise CheckpointError(f"{path} does not fit this run: {'; '.join(complaints[:8])}{more}; resume with the code and options it had")
    _read(path, tensors, no_dist=_alone())


def load_weights_of(path: Path, role: str, *, prefer_ema: bool = True) -> dict[str, Tensor]:
    """A role's parameters by name, on the CPU, for hand-over to another run.

    Args:
        path: a run folder (its newest good checkpoint is taken) or a checkpoint folder.
        prefer_ema: take `<role>_ema` where the run keeps that average.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        CheckpointError: the checkpoint is damaged, or has no such role; the message lists the roles that are there.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run folder or checkpoint folder")
    if path.name.startswith("iter_") and not (path / "checkpoints").is_dir():
        chosen, reason = path, damage(path)
        if reason is not None:
            raise CheckpointError(f"{path}: {reason}; give another checkpoint, or the run folder to take its newest good one")
    else:
        chosen = latest(path)
        if chosen is None:
            raise FileNotFoundError(f"{path}: no checkpoint in it; let that run save one first (train.save_every)")
    stored = _stored(chosen)
    roles = sorted({name.split("/")[1] for name in stored if name.startswith("model/")})
    if role not in roles:
        raise CheckpointError(f"{chosen}: no role {role!r}; it holds {', '.join(roles)}")
    prefix = f"model/{role}_ema/" if prefer_ema and f"{role}_ema" in roles else f"model/{role}/"
    entries = {name: entry for name, entry in stored.items() if name.startswith(prefix)}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    _read(chosen, tensors, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _read(path: Path, tensors: Mapping[str, Tensor], *, no_dist: bool) -> None:
    with _single_process():
        dcp.load(dict(tensors), storage_reader=_Reader(path), no_dist=no_dist)


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    return _Reader(path).read_metadata().state_dict_metadata


def _alone() -> bool:
    """Whether one process makes the whole checkpoint.

    Then no collective runs, not even with itself: gloo's thread would open a second OpenMP team, and with more threads than cores the
    training's own team stops spinning at its barriers; every later iteration took twice as long (measured on two cores).
    """
    return not dist.is_initialized() or dist.get_world_size() == 1


@contextmanager
def _single_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(dcp.FileSystemReader):
    """torch pickles the table of contents; only the names it is made of are let in."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Contents(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
        if name not in allowed.get(module, "").split():
            raise CheckpointError(f".metadata of a checkpoint refers to {module}.{name}: it was not written by this package")
        return super().find_class(module, name)
