"""The table of mutations fits the code: it cannot rot unseen. Making them is `python tests/mutations.py`."""

from __future__ import annotations

import runpy
from pathlib import Path

TESTS = Path(__file__).parent
MUTATIONS = runpy.run_path(str(TESTS / "mutations.py"))["read_table"]()


def test_every_old_text_occurs_exactly_once_and_the_result_is_python():
    for mutation in MUTATIONS:
        compile(mutation.apply(TESTS.parent / "cosmos_mp"), mutation.file, "exec")


def test_every_test_exists():
    for mutation in MUTATIONS:
        file, _, name = mutation.test.partition("::")
        assert f"def {name.partition('[')[0]}" in (TESTS / file).read_text(), mutation.name


def test_the_table_is_broad():
    assert len(MUTATIONS) >= 50
    rooms = {"models", "diffusion", "distill", "parallel", "training", "data", "convert", "evaluate"}
    assert {mutation.file.partition("/")[0] for mutation in MUTATIONS} >= rooms
    # The same mistake under two names would count twice.
    assert len({mutation[1:4] for mutation in MUTATIONS}) == len(MUTATIONS)
