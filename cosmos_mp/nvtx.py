"""Named ranges of a run, which a profiler shows as a tree: step, pass, part of a block. Off unless switched on, and then one `if` each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Recorder = Callable[[str], AbstractContextManager[object]]
"""From a name to a range that is open inside `with`: `torch.cuda.nvtx.range`, `torch.profiler.record_function`, or a test's list."""

_recorder: Recorder | None = None
_nothing = nullcontext()


def nvtx(name: str) -> AbstractContextManager[object]:
    """A range around what `with` holds; it ends there too where an exception passes."""
    if _recorder is None:
        return _nothing
    return _recorder(name)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let every range of this process that begins inside go to the recorder."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before
