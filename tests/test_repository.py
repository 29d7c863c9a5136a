"""The repository itself: what lies at its top, which room knows which, and that it speaks of nobody's machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = {"setup.py", "csrc", "cosmos_mp", "pretrain_scripts", "examples", "tests", "README.md", "pyproject.toml", "LICENSE"}
# Rooms that a room must not know.
FORBIDDEN = {
    "models": {"distill", "training", "data", "evaluate", "convert", "diffusion"},
    "backends": {"models", "diffusion", "distill", "training", "data", "evaluate", "convert"},
    "diffusion": {"distill", "training", "data", "evaluate", "convert"},
    "distill": {"training", "evaluate", "convert"},
    "data": {"distill", "training", "evaluate", "convert", "models"},
    "tokenizers": {"distill", "training", "data", "evaluate", "convert", "diffusion"},
    "text": {"distill", "training", "models", "evaluate", "convert", "diffusion"},
    "parallel": {"distill", "training", "data", "evaluate", "convert", "diffusion"},
    "training": {"evaluate", "convert"},
    "kernels": None,
}


def tracked() -> list[Path]:
    """Files under version control, and new ones that would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this copy is no git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def imported_rooms(source: str) -> set[str]:
    """Rooms of this package that a file imports anywhere; files at the package's top count by their name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("cosmos_mp.")}


def test_imports_are_seen_in_every_form():
    source = (
        "import cosmos_mp.data.clips\nfrom cosmos_mp import training\ndef f():\n    from cosmos_mp.distill.dmd2 import DMD2\nimport torch"
    )
    assert imported_rooms(source) == {"data", "training", "distill"}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_knows_only_those_below_it(room):
    files = list((ROOT / "cosmos_mp" / room).rglob("*.py"))
    if room == "kernels" and not files:
        return
    assert files
    for path in files:
        known = imported_rooms(path.read_text()) - {room}
        forbidden = known if FORBIDDEN[room] is None else known & FORBIDDEN[room]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"


def test_the_top_level_holds_the_known_names_alone():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP
    assert {"setup.py", "cosmos_mp", "pretrain_scripts", "examples", "tests", "README.md", "pyproject.toml"} <= names


def test_the_readme_names_both_commands_early():
    readme = (ROOT / "README.md").read_text()
    first = next(number for number, line in enumerate(readme.splitlines()) if line.startswith("bash "))
    assert readme.splitlines()[first].startswith("bash examples/quickstart.sh")
    assert "\nbash tests/run.sh" in readme
    assert first <= 7


def test_what_the_readme_names_is_there():
    readme = (ROOT / "README.md").read_text()
    for script in set(re.findall(r"(?:pretrain_scripts|examples|tests)/\w+\.(?:py|sh)", readme)):
        assert (ROOT / script).is_file(), script
    names = readme.split("`python -m cosmos_mp`: `")[1].split("`")[0].split()
    from cosmos_mp.__main__ import COMMANDS

    assert names == list(COMMANDS)


def test_no_path_of_anybodys_machine_is_in_a_file():
    # Split, so that this file does not name them.
    machine = re.compile(r"(?<![\w.~-])/(?:" + "|".join(("work", "tmp", "root", "home", "Users")) + r")/\w")
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if machine.search(line)]
    assert not found, "\n".join(found)


def test_tests_mirror_the_package():
    """In a room of tests, each file stands where the file that it tests stands."""
    rooms = {"data_room": "data"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        parts = path.relative_to(ROOT / "tests").parts
        name = path.stem.removeprefix("test_")
        if len(parts) == 1 or parts[0] in ("pretrain_scripts", "examples", "distributed", "gpu"):
            continue
        folder = ROOT.joinpath("cosmos_mp", *(rooms.get(part, part) for part in parts[:-1]))
        tested = (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
        assert tested, f"{path.relative_to(ROOT)} mirrors nothing"


def test_weights_are_read_without_pickle():
    for path in (ROOT / "cosmos_mp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path.relative_to(ROOT)}:{node.lineno}"
