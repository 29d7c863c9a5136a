"""Puts the tests' outcome beside the benchmark's numbers: outcome.py DIR STATUS, where STATUS is what pytest ended with.

DIR/tests.xml goes into DIR/gpu.json. Ends with 1 if a test failed or pytest did not come to its end.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as tree
from pathlib import Path

KINDS = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def outcome(junit: Path, status: int) -> dict:
    """Names of the tests that passed, and of those that failed or were skipped with the reason."""
    found: dict = {"passed": [], "failed": {}, "skipped": {}}
    try:
        cases = list(tree.parse(junit).iter("testcase"))
    except (FileNotFoundError, tree.ParseError):  # pytest did not begin to write, or was killed while it wrote
        cases = None
    for case in cases or ():
        if not case.get("name"):  # it was running when time ran out
            continue
        name = f"{case.get('classname')}::{case.get('name')}"
        reasons = {KINDS[child.tag]: (child.get("message") or "").split("\n")[0] for child in case if child.tag in KINDS}
        if not reasons:
            found["passed"].append(name)
        for kind, reason in reasons.items():
            found[kind][name] = reason
    if status not in (0, 1):
        found["failed"]["pytest"] = f"ended with {status} before its end, at the time limit or by a signal: see tests.log"
    elif cases is None:
        found["failed"]["pytest"] = "wrote no results that can be read: see tests.log"
    return found


def main(folder: Path, status: int) -> int:
    file = folder / "gpu.json"
    tests = outcome(folder / "tests.xml", status)
    numbers = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(numbers | {"tests": tests}, indent=1))
    words = [f"{len(tests['passed'])} tests passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped"]
    words += [f"{kind}: {reason}" for kind in ("failed", "skipped") for reason in dict.fromkeys(tests[kind].values())]
    print("\n" + "; ".join([*words, str(file)]))
    return int(bool(tests["failed"]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
