"""Largest relative differences of every layout from one process, in float64, as JSON: python tests/distributed/measure_layouts.py FILE"""

from __future__ import annotations

import json
import sys
from datetime import date
from importlib import import_module
from pathlib import Path

from cosmos_mp.revision import revision

sys.path.insert(0, str(Path(__file__).parent))
ranks, runs = import_module("ranks"), import_module("runs")


def main(path: Path) -> None:
    reference = {batch: runs.all_kinds(ranks.run, 1, None, batch, batch) for batch in (4, 6)}
    rows = {}
    for name, (world, layout, batch, micro_batch) in runs.LAYOUTS.items():
        results = runs.all_kinds(ranks.run, world, layout, batch, micro_batch)
        found = [runs.largest_difference(results[kind], reference[batch][kind]) for kind in runs.KINDS]
        last = max(each.pop("last") for each in found)
        first = max(each.pop("first") for each in found)
        gradients = max(value for each in found for value in each.values())
        rows[name] = {"ranks": world, "gradients": gradients, "first losses": first, "losses after 20 iterations": last}
        print(name, rows[name], flush=True)
    path.write_text(json.dumps({"date": str(date.today()), "commit": revision(), "layouts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
