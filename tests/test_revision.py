"""The commit that results name."""

from __future__ import annotations

import re
import subprocess

from cosmos_mp.revision import revision


def test_it_is_the_checkouts_wherever_it_is_asked(tmp_path, monkeypatch):
    here = revision()
    monkeypatch.chdir(tmp_path)
    assert revision() == here and re.fullmatch("unknown|[0-9a-f]{7,}", here)


def test_without_a_checkout_it_is_unknown(monkeypatch):
    failed = subprocess.CompletedProcess([], 128, stdout="", stderr="fatal: not a git repository")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    assert revision() == "unknown"
