"""Breaks the package on purpose, one line at a time, and shows that a test notices each time.

    python tests/mutations.py [--only NAME] [--list]

The mistakes are in mutations.toml. Each is made in a copy of the package, and its test runs in a process of its own, forked from one that
has imported the libraries but nothing of the package. The exit code is 1 unless the tests pass without a mistake and fail with each.
"""

from __future__ import annotations

import argparse
import compileall
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("mutations.toml")
ROOT = Path(__file__).parents[1]
COPIED = ("cosmos_mp", "csrc", "tests", "pretrain_scripts", "pyproject.toml", "setup.py")
LIBRARIES = ["pytest", "torch.utils.tensorboard", "megatron.core.tensor_parallel", "diffusers", "cv2", "av", "tyro"]
"""Imported once for all; together they take longer than most tests."""
LIMIT_S = 120.0
PASSED, FAILED, LASTED_TOO_LONG = 0, 1, -1
"""Exit codes of pytest; any other means that no test has judged. The last one is ours."""


class Mutation(NamedTuple):
    """One mistake: `old` becomes `new` in a file of cosmos_mp; a test of tests/ must then fail."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, package: Path) -> str:
        """The file's text with the mistake in it.

        Raises:
            ValueError: the old text does not occur exactly once, or the new one is the same.
        """
        text = (package / self.file).read_text()
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"{TABLE.name}, {self.name}: the old text occurs {text.count(self.old)} times in {self.file}; "
                "it must occur once and differ from the new one: adapt the entry to the code"
            )
        return text.replace(self.old, self.new)


def read_table() -> list[Mutation]:
    """All mutations, in the order of the file."""
    return [Mutation(name, **entry) for name, entry in tomllib.loads(TABLE.read_text()).items()]


def _run_pytest(root: Path, tests: list[str], log: Path) -> None:
    """In a process of its own: run tests of the copy at `root`, write to `log`, and exit with pytest's code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(root)
    os.environ |= {"PYTHONPATH": str(root), "COLUMNS": "400"}  # for what the tests start; for whole reasons in the summary
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True  # two texts of one size within one second would share it
    import pytest

    import cosmos_mp

    assert Path(cosmos_mp.__file__).is_relative_to(root), f"{cosmos_mp.__file__} is not the copy in {root}"
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *(f"tests/{test}" for test in tests)])))


class Bench:
    """A copy of package and tests in a temporary folder."""

    def __init__(self, folder: Path):
        self.root, self.log = folder / "copy", folder / "log"
        self.root.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, self.root / name)
        compileall.compile_dir(self.root / "cosmos_mp", quiet=1)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LIBRARIES)

    def run(self, tests: Iterable[str], limit_s: float = LIMIT_S) -> int:
        """Exit code of pytest over these tests."""
        process = self._context.Process(target=_run_pytest, args=(self.root, list(tests), self.log))
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
            return LASTED_TOO_LONG
        return process.exitcode

    def run_with(self, mutation: Mutation) -> int:
        """Exit code of the mutation's test with the mistake made; the copy is whole again afterwards."""
        path = self.root / "cosmos_mp" / mutation.file
        text = path.read_text()
        path.write_text(mutation.apply(self.root / "cosmos_mp"))
        try:
            return self.run([mutation.test])
        finally:
            path.write_text(text)

    def failure(self) -> str:
        """The first test that failed and why, as pytest's summary has it."""
        found = re.search(r"^(?:FAILED|ERROR) tests/(.*)$", self.log.read_text(), re.MULTILINE)
        return found.group(1) if found else "no summary"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="make this mistake alone")
    parser.add_argument("--list", action="store_true", help="print names, files and tests, and stop")
    options = parser.parse_args()
    mutations = [mutation for mutation in read_table() if options.only in (None, mutation.name)]
    if not mutations:
        parser.error(f"no mutation {options.only!r}; --list shows their names")
    if options.list:
        for mutation in mutations:
            print(f"{mutation.name:55} {mutation.file:25} {mutation.test}")
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::UserWarning"}
    began, missed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder).resolve())
        if bench.run(dict.fromkeys(mutation.test for mutation in mutations), 10 * LIMIT_S) != PASSED:
            print(f"{bench.log.read_text()}\nthe tests fail without any mistake")
            return 1
        print(f"the tests pass without a mistake ({time.monotonic() - began:.0f} s)", flush=True)
        for mutation in mutations:
            code = bench.run_with(mutation)
            words = {PASSED: "SURVIVED", FAILED: "caught", LASTED_TOO_LONG: f"STOPPED after {LIMIT_S:.0f} s"}
            word = words.get(code, f"NOT JUDGED (pytest's code {code})")
            if code != FAILED:
                missed.append(mutation.name)
            print(f"{word:9} {mutation.name}{f'  by {bench.failure()}' if code == FAILED else f'  {mutation.test}'}"[:240], flush=True)
    print(f"{len(mutations) - len(missed)} of {len(mutations)} mistakes caught in {time.monotonic() - began:.0f} s")
    if missed:
        print(f"not caught: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
