"""The run's log as JSON lines: one line per iteration, each iteration once, read back as arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_mp.files import write_text

GROUPS = ("terms", "metrics", "grad_norms", "lrs")
BY_PHASE = ("speed", "passes")
"""Groups whose numbers compare within iterations that train the same roles alone."""


class LogError(ValueError):
    """A log line that cannot be read; the message names file and line."""


def to_line(record: dict[str, Any]) -> str:
    """One strict JSON line; a number that is not finite becomes null."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a log as text and record. A last line without its end is what a kill leaves: it is passed over.

    Raises:
        LogError: any other line is no JSON record with an iteration.
    """
    with Path(path).open() as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                return
            try:
                record = json.loads(text)
                record["iteration"]
            except (ValueError, KeyError, TypeError):
                raise LogError(
                    f"{path}, line {number}: not a line of a training log; take that line out or start in another folder"
                ) from None
            yield text, record


def drop_from(path: Path, iteration: int) -> None:
    """Remove the lines of `iteration` and later: a resumed run writes them again. The file is replaced whole."""
    path = Path(path)
    if not path.exists():
        return
    kept = [text for text, record in lines(path) if record["iteration"] < iteration]
    write_text(path, "".join(kept))


def read_log(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every logged quantity as (iterations int64, values float64); null reads as NaN.

    Names are `terms/<term>`, `metrics/<metric>`, `grad_norms/<role>`, `lrs/<role>`, `seconds`, `samples_per_second`, and
    `total/<role+role>` for the weighted sum, apart by the roles trained since the phases' sums do not compare; so too
    `speed/<quantity>/<role+role>` and `passes/<name>/<role+role>`.

    Raises:
        FileNotFoundError: no such log.
        LogError: a line cannot be read.
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    for _, record in lines(path):
        for name, value in _quantities(record):
            iterations, values = series.setdefault(name, ([], []))
            iterations.append(record["iteration"])
            values.append(math.nan if value is None else value)
    return {
        name: (np.array(iterations, dtype=np.int64), np.array(values, dtype=np.float64)) for name, (iterations, values) in series.items()
    }


def _quantities(record: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    for group in GROUPS:
        for name, value in (record.get(group) or {}).items():
            yield (f"total/{'+'.join(record['roles'])}" if (group, name) == ("terms", "total") else f"{group}/{name}"), value
    for group in BY_PHASE:
        for name, value in (record.get(group) or {}).items():
            yield f"{group}/{name}/{'+'.join(record['roles'])}", value
    for name in ("seconds", "samples_per_second"):
        if name in record:
            yield name, record[name]
