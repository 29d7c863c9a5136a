"""Named ranges: nothing when off, a balanced tree when on."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from cosmos_mp import nvtx as module
from cosmos_mp.nvtx import nvtx, recording


class Ranges:
    """Pushes and pops in their order."""

    def __init__(self):
        self.seen: list[str] = []

    @contextmanager
    def __call__(self, name: str):
        self.seen.append(f"push {name}")
        try:
            yield
        finally:
            self.seen.append(f"pop {name}")


def test_off_it_is_the_same_empty_object_each_time():
    with nvtx("a") as inside:
        assert inside is None
    assert nvtx("a") is nvtx("b")
    with nvtx("a"), nvtx("a"):  # and may be inside itself
        pass


def test_ranges_nest_and_end_where_an_exception_passes():
    ranges = Ranges()
    with recording(ranges):
        with pytest.raises(ValueError), nvtx("a"):
            with nvtx("b"):
                pass
            with nvtx("c"):
                raise ValueError
        with nvtx("d"):
            pass
    assert ranges.seen == ["push a", "push b", "pop b", "push c", "pop c", "pop a", "push d", "pop d"]


def test_recording_ends_with_its_block_and_gives_back_who_recorded_before():
    outer, inner = Ranges(), Ranges()
    with recording(outer):
        with pytest.raises(ValueError), recording(inner):
            with nvtx("a"):
                raise ValueError
        with nvtx("b"):
            pass
    assert module._recorder is None
    with nvtx("c"):
        pass
    assert inner.seen == ["push a", "pop a"] and outer.seen == ["push b", "pop b"]


def test_a_range_ends_at_whom_it_began():
    first, second = Ranges(), Ranges()
    with recording(first):
        opened = nvtx("a")
        with opened, recording(second):
            pass
    assert first.seen == ["push a", "pop a"] and second.seen == []
