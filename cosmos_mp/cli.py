"""The command line: how every entry point turns words into a configuration and errors into one clear line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from cosmos_mp import kernels
from cosmos_mp.options import parse
from cosmos_mp.parallel.watch import LostRank

T = TypeVar("T")


def stage_main(kind: type[T], run: Callable[[T], int | None]) -> None:
    """Entry point of a stage: parse `PRESET [options]`, run, exit with its code. `--dry-run` prints what would run instead."""
    guarded(lambda: stage(kind, run, sys.argv[1:]))


def stage(kind: type[T], run: Callable[[T], int | None], argv: Sequence[str], prog: str | None = None) -> int | None:
    """Parse and run one stage; see `stage_main`."""
    config = parse(kind, [word for word in argv if word != "--dry-run"], prog=prog)
    if "--dry-run" in argv:
        from cosmos_mp.plan.dry_run import dry_run

        return dry_run(config)
    kernels.use(getattr(config, "kernels", "auto"))  # encoding has no network
    return run(config)


def guarded(run: Callable[[], int | None]) -> None:
    """Exit with the function's code. What a user can mend becomes one line on standard error and status 1.

    COSMOS_MP_TRACEBACK=1 shows the whole traceback instead.
    """
    try:
        code = run()
    except (ValueError, OSError) as error:
        if os.environ.get("COSMOS_MP_TRACEBACK"):
            traceback.print_exc()
        else:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        if isinstance(error, LostRank):  # threads that wait for the lost rank would hold this process until their timeouts
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        raise SystemExit(1) from None
    raise SystemExit(code or 0)
