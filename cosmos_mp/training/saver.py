"""Writing checkpoints: by all ranks of a run together, at once or beside the training; whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from cosmos_mp.files import file_sha256, sync_folder
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.training.checkpoint import (
    CONFIG,
    MARKER,
    CheckpointWriteError,
    RankError,
    damage,
    no_dist_is_meant,
    place,
    published,
    reason,
    together,
)

T = TypeVar("T")

log = logging.getLogger(__name__)


class Saver:
    """Writes `checkpoints/iter_<N>` of one run, each whole or not at all, and deletes all but the newest `keep_last`.

    All ranks of the run make one and call `save`, `wait` and `close` at the same points.

    Args:
        settings: what goes into each checkpoint's config.json.
        topology: the ranks that hold the run's tensors; this process alone if not given.
        asynchronous: write in a thread of its own, from a copy of the tensors in the CPU's memory.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Mapping[str, Any],
        keep_last: int,
        topology: Topology | None = None,
        asynchronous: bool = False,
    ):
        self.folder, self.settings, self.keep_last, self.topology = Path(run_dir) / "checkpoints", dict(settings), keep_last, topology
        self.rank, self.world = place(topology)
        self._group: dist.ProcessGroup | None = None
        if self.world > 1:
            # Its own, so that its collectives and those of the training never meet; gloo, since all of them are about files.
            self._group = dist.new_group(backend="gloo", timeout=topology.options.collective_timeout, group_desc="CHECKPOINT")
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._under_way: Future[None] | None = None
        self._new: deque[Path] = deque()
        no_dist_is_meant()

    def save(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint of the tensors as they are now. Asynchronous: once the one before is through, and without waiting for this.

        Raises:
            CheckpointWriteError: this one, or an asynchronous one before it, could not be written by some rank; earlier ones are
                untouched. All ranks raise it.
        """
        self.wait()
        if self._thread is None:
            self._write(iteration, lambda: tensors)
        else:
            copied = _tried(lambda: {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()})
            self._under_way = self._thread.submit(self._write, iteration, copied)

    def finished(self) -> list[Path]:
        """Checkpoints that have become visible since the last call, oldest first.

        It waits for nobody, so ranks may hear of a checkpoint at different iterations; for the same reason errors are left to `save` and
        `wait`, where all ranks are.
        """
        return [self._new.popleft() for _ in range(len(self._new))]

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            CheckpointWriteError: as `save`.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Let a save that is under way end, well or not; what went wrong has been logged."""
        # The group is left as it is: others may still be receiving what this rank has sent.
        if self._thread is not None:
            self._thread.shutdown()

    # --- One checkpoint ---

    def _write(self, iteration: int, given: Callable[[], Mapping[str, Tensor]]) -> None:
        target = self.folder / f"iter_{iteration:08d}"
        partial = target.with_suffix(".partial")
        try:
            problem, cause = self._attempt(target, partial, given)
        except Exception as error:  # a collective failed: nothing can be agreed on any more, and others may still be writing
            problem = f"{self._complaint(target, f'a rank is gone or silent: {error}')}: start the same command again"
            cause = error
        if cause is None:
            self._new.append(target)
            return
        if self._thread is not None and (self.rank == 0 or not isinstance(cause, RankError)):  # rank 0 may be the one that is gone
            log.error("%s", problem)  # it is raised only where the ranks meet next
        raise CheckpointWriteError(problem) from cause

    def _attempt(self, target: Path, partial: Path, given: Callable[[], Mapping[str, Tensor]]) -> tuple[str, RankError | None]:
        """What went wrong, the same on all ranks; raises only where a rank does not answer."""
        try:
            self._each(lambda: self._prepare(partial, given))
            self._store(partial, given())
            files = {name: entry for own in self._each(lambda: self._own_files(partial)) for name, entry in own.items()}
            self._first(lambda: self._seal(target, partial, files))
        except RankError as error:
            cause, why = error, str(error)
            return self._first(lambda: self._undo(target, partial, why)), cause
        return "", None

    def _each(self, work: Callable[[], T]) -> list[T]:
        return together(work, self.topology, self._group)

    def _first(self, work: Callable[[], T]) -> T:
        return self._each(lambda: work() if self.rank == 0 else None)[0]

    def _prepare(self, partial: Path, given: Callable[[], Mapping[str, Tensor]]) -> None:
        given()  # where copying failed, this raises it before anybody writes
        if self.rank == 0:
            for leftover in self.folder.glob("*.partial"):
                _delete(leftover)
            partial.mkdir(parents=True)

    def _store(self, partial: Path, tensors: Mapping[str, Tensor]) -> None:
        # A copy in flight would be to the thread's current GPU, and that is the first one on every rank.
        writer = dcp.FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            raise RankError.of({rank: reason(cause) for rank, (cause, _) in error.failures.items()}, self.world) from error

    def _own_files(self, partial: Path) -> dict[str, dict[str, Any]]:
        files = list(partial.glob(f"__{self.rank}_*.distcp")) + [partial / ".metadata"] * (self.rank == 0)
        return {file.name: _entry(file) for file in files}

    def _seal(self, target: Path, partial: Path, files: dict[str, dict[str, Any]]) -> None:
        for name, entry in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != entry["bytes"]:
                raise OSError(f"{name} of another rank is not in {partial} as rank 0 sees it: put the run folder where all nodes share it")
        _write_text(partial / CONFIG, self.settings)
        files = dict(sorted((files | {CONFIG: _entry(partial / CONFIG)}).items()))
        _write_text(partial / MARKER, {"iteration": int(target.name.removeprefix("iter_")), "files": files})
        sync_folder(partial)
        if target.exists():  # a damaged one, or the run would have gone on from it
            target.rename(target.with_name(f"{target.name}.replaced.partial"))
        partial.rename(target)
        sync_folder(target.parent)
        try:
            self._prune(target)
        except OSError as error:  # the checkpoint is there, and the next save tries again
            log.warning("%s is saved; an older one could not be removed (%s)", target, error)

    def _prune(self, saved: Path) -> None:
        # Newer ones than the one just saved are damaged: the run went on from before them. They neither count nor go.
        kept = 0
        for path in published(self.folder):
            if path.name > saved.name:
                continue
            if kept < self.keep_last:
                kept += damage(path, hashes=False) is None
            else:
                gone = path.with_name(f"{path.name}.partial")  # out of sight first: a kill never leaves half a checkpoint
                path.rename(gone)
                _delete(gone)
        for replaced in self.folder.glob("*.replaced.partial"):
            _delete(replaced)

    def _undo(self, target: Path, partial: Path, why: str) -> str:
        complaint = self._complaint(target, why)
        shutil.rmtree(partial, ignore_errors=True)
        return f"{complaint}: make room and start the same command again"

    def _complaint(self, target: Path, reason: str) -> str:
        before = next((path.name for path in published(self.folder) if damage(path, hashes=False) is None), None)
        kept = f"{before} is intact" if before else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.folder if self.folder.exists() else ".").free / 1e6
        return f"{target} could not be written ({reason}); {free:.0f} MB are free; {kept}"


def _tried(work: Callable[[], T]) -> Callable[[], T]:
    """Do something now; its result is returned, or its error raised, when that is asked for."""
    outcome: Future[T] = Future()
    try:
        outcome.set_result(work())
    except Exception as error:
        outcome.set_exception(error)
    return outcome.result


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _write_text(path: Path, values: Any) -> None:
    with path.open("w") as file:
        file.write(json.dumps(values, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # what was to be written is; the next save tries again
        log.warning("%s could not be deleted (%s)", folder, error)
