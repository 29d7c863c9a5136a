"""`python -m cosmos_mp COMMAND`: everything that is not a training stage."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cosmos_mp import commands
from cosmos_mp.cli import guarded

COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "synthesize": commands.synthesize,
    "index": commands.index,
    "fit-tokenizer": commands.fit_tokenizer,
    "cache-text": commands.cache_text,
    "encode": commands.encode,
    "evaluate": commands.evaluate,
    "sample": commands.sample,
    "convert": commands.convert,
    "verify": commands.verify,
    "bench": commands.bench,
}


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:14} {function.__doc__.splitlines()[0]}" for name, function in COMMANDS.items()]
        print("usage: python -m cosmos_mp COMMAND ...\n\n" + "\n".join(lines) + "\n\nTraining stages are in pretrain_scripts/.")
        raise SystemExit(0 if words else 2)
    guarded(lambda: commands.dispatch(COMMANDS, words[0], words[1:]))


if __name__ == "__main__":
    main()
