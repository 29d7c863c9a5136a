"""Files appear at once and whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from cosmos_mp import files


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with files.whole(path) as partial:
        partial.write_bytes(b"12")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_bytes() == b"12" and names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_raises_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(error), files.whole(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("sync", "calls"), [(True, ["file", "rename", "folder"]), (False, ["rename"])])
def test_the_disk_has_the_file_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch, sync, calls):
    seen = []
    fsync, replace = os.fsync, type(tmp_path).replace

    def flush(descriptor: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def rename(self, target):
        seen.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(type(tmp_path), "replace", rename)
    files.write_text(tmp_path / "a.txt", "text", sync=sync)
    assert seen == calls


def test_json_is_read_back_and_the_checksum_is_the_files(tmp_path):
    path, values = tmp_path / "a.json", {"é": [1, 2.5, None]}
    files.write_json(path, values)
    assert json.loads(path.read_text(encoding="utf-8")) == values and "é" in path.read_text(encoding="utf-8")
    assert files.file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
