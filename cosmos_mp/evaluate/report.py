"""Results of an evaluation as results.json, as tables and as one self-contained HTML page.

`results` is a dictionary of plain data (numpy and torch scalars, `statistics.Interval` and paths are turned into it):

    run       {name: value}: what was run (configuration, machine, date, commit, seed, clips); may be nested, is shown as it stands
    metrics   [{"key", "label", "unit", "better", "note"}]: "better" is "lower", "higher", "one" (best at 1) or None; "unit" (may be "") and
              "note" (how it was measured, optional) are text
    variants  {variant: {metric key: number | {"value", "low", "high"}}}: a variant leaves out what does not apply, such as the teacher's
              distance to itself; the best variant of each metric is marked
    checks    [{"name", "value", "bound", "relation", "passed"}]: made by `check`
    timing    {name: value}: wall times and other costs, may be nested
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cosmos_mp.files import write_text
from cosmos_mp.training import logs

RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
BETTER = {"lower": "↓", "higher": "↑", "one": "→\N{NO-BREAK SPACE}1", None: ""}
_PLAYABLE = ("h264", "vp8", "vp9", "av1")
_BINS = 60  # points of a curve

# --- Results ----------------------------------------------------------------------------------------------------------------------------


def check(name: str, value: float, relation: str, bound: float) -> dict[str, Any]:
    """One entry of results["checks"]: whether `value relation bound` holds; relation is one of <, <=, >, >=."""
    if relation not in RELATIONS:
        raise ValueError(f"check {name!r}: unknown relation {relation!r}; use one of {', '.join(RELATIONS)}")
    return {"name": name, "value": value, "bound": bound, "relation": relation, "passed": bool(RELATIONS[relation](value, bound))}


def save_results(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write results.json at once or not at all. Raises ValueError, naming the entry, for NaN, infinity or a breach of the schema."""
    write_text(path, json.dumps(_checked(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return Path(path)


def _checked(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results as plain data that keep to the schema."""
    results = _plain(results, "results")
    missing = [key for key in ("run", "metrics", "variants", "checks", "timing") if key not in results]
    if missing:
        raise ValueError(f"results lack {', '.join(missing)}; an empty entry is allowed, a missing one is not")
    for entry, needed in (("metrics", {"key", "label", "better"}), ("checks", {"name", "value", "bound", "relation", "passed"})):
        for i, item in enumerate(results[entry]):
            if needed - set(item):
                raise ValueError(f"results.{entry}[{i}] lacks {', '.join(sorted(needed - set(item)))}; see the schema in this module")
    keys = [metric["key"] for metric in results["metrics"]]
    for metric in results["metrics"]:
        if metric["better"] not in BETTER:
            raise ValueError(f"results.metrics {metric['key']}: better is {metric['better']!r}; use 'lower', 'higher', 'one' or None")
    for variant, values in results["variants"].items():
        for key, value in values.items():
            if key not in keys:
                raise ValueError(f"results.variants.{variant}.{key} is not among results.metrics; describe it there")
            if isinstance(value, dict) and set(value) != {"value", "low", "high"}:
                raise ValueError(f"results.variants.{variant}.{key} must be a number or hold value, low, high; it holds {sorted(value)}")
    for item in results["checks"]:
        if item != check(item["name"], item["value"], item["relation"], item["bound"]):
            raise ValueError(f"results.checks {item['name']!r} says passed={item['passed']} wrongly; make it with check()")
    return results


def _plain(value: Any, where: str) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; results hold finite numbers only: leave the entry out, or find where it comes from")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    raise ValueError(f"{where} is a {type(value).__name__}; results hold numbers, text, lists and dictionaries")


# --- Tables -----------------------------------------------------------------------------------------------------------------------------


def format_table(results: Mapping[str, Any]) -> str:
    """The table for a terminal: a row per metric, a column per variant, `*` at the best, ± half the interval; then the checks."""
    results = _checked(results)
    rows = [["", *results["variants"]]]
    for label, cells in _rows(results):
        rows.append([label, *(f"{c['text']}{' ±' + c['half'] if c['half'] else ''}{' *' if c['best'] else ''}" for c in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    for item in results["checks"]:
        verdict = "holds" if item["passed"] else "FAILS"
        lines.append(f"{verdict}  {item['name']}: {number(item['value'])} {item['relation']} {number(item['bound'])}")
    return "\n".join(lines) + "\n"


def markdown_table(results: Mapping[str, Any]) -> str:
    """The table for a README: a row per metric, a column per variant, the best in bold, intervals in brackets."""
    results = _checked(results)
    lines = [["", *map(_markdown, results["variants"])], ["---", *["---:"] * len(results["variants"])]]
    for label, cells in _rows(results):
        shown = [f"**{c['text']}**" if c["best"] else c["text"] for c in cells]
        ranges = [f" ({c['low']}–{c['high']})" if c["half"] else "" for c in cells]
        lines.append([_markdown(label), *(text + interval for text, interval in zip(shown, ranges, strict=True))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits, or any other value as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or value == 0 or abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.{digits - 1}e}" if abs(value) < 1e-4 else f"{value:#.{digits}g}".rstrip(".")


def _markdown(text: str) -> str:
    return re.sub(r"([|*_<>`\\\[\]])", r"\\\1", text).replace("\n", " ")


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each metric's label with one cell per variant: text, low, high, half (of the interval's width; "" without interval), best."""
    for metric in results["metrics"]:
        found = [values.get(metric["key"]) for values in results["variants"].values()]
        best = _best([value["value"] if isinstance(value, dict) else value for value in found], metric["better"])
        unit, mark = metric.get("unit"), BETTER[metric["better"]]
        yield f"{metric['label']}{f' ({unit})' if unit else ''} {mark}".rstrip(), [_cell(value, i in best) for i, value in enumerate(found)]


def _cell(value: Any, best: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"text": "–" if value is None else number(value), "low": "", "high": "", "half": "", "best": best}
    low, high = value["low"], value["high"]
    return {
        "text": number(value["value"]),
        "low": number(low),
        "high": number(high),
        "half": number((high - low) / 2, digits=2),
        "best": best,
    }


def _best(values: Sequence[float | None], better: str | None) -> set[int]:
    cost = {"lower": lambda v: v, "higher": lambda v: -v, "one": lambda v: abs(v - 1)}.get(better)
    costs = {i: cost(v) for i, v in enumerate(values) if v is not None} if cost else {}
    return {i for i, c in costs.items() if c == min(costs.values())} if len(costs) > 1 else set()


# --- Curves -----------------------------------------------------------------------------------------------------------------------------


def _charts(path: Path) -> list[dict[str, Any]]:
    """A chart per loss term, weighted sum and metric, then the gradient norms, learning rates and speed, of all that the log holds."""
    log = logs.read_log(path)

    def named(group: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {name.removeprefix(group): log[name] for name in log if name.startswith(group)}

    speed = {"samples per second": log["samples_per_second"]} if "samples_per_second" in log else {}
    charts = [(name, {name: points}) for group in ("terms/", "metrics/") for name, points in named(group).items()]
    charts += [(f"total, {roles}", {roles: points}) for roles, points in named("total/").items()]
    charts += [
        ("gradient norm", named("grad_norms/")),
        ("learning rate", named("lrs/")),
        ("samples per second", speed),
    ]
    drawn = ((title, {name: _binned(*points) for name, points in series.items()}) for title, series in charts)
    drawn = ((title, {name: bins for name, bins in series.items() if len(bins)}) for title, series in drawn)
    return [{"title": title, "names": list(series), "svg": _svg(title, list(series.values()))} for title, series in drawn if series]


def _binned(iterations: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Iteration, mean, least and greatest value of at most _BINS equal runs of the finite points, (bins, 4)."""
    xy = np.stack([iterations, values], axis=1)[np.isfinite(values)].astype(np.float64)
    size = -(-len(xy) // _BINS)
    bins = [xy[i : i + size] for i in range(0, len(xy), size or 1)]
    return np.array([(*b.mean(axis=0), b[:, 1].min(), b[:, 1].max()) for b in bins]).reshape(-1, 4)


def _svg(title: str, series: Sequence[np.ndarray]) -> Markup:
    """A line chart whose colours are the page's CSS variables, so that it follows light and dark."""
    # matplotlib takes no CSS: it draws in colours that stand for the variables
    ink, grid, *colours = stand_ins = [f"#0000f{i}" for i in range(6)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 8}):
        figure = Figure(figsize=(3.4, 2.0), layout="constrained")
        axes = figure.add_subplot()
        for i, bins in enumerate(series):
            x, mean, least, greatest = bins.T
            colour = colours[i % len(colours)]
            if len(series) == 1:
                axes.fill_between(x, least, greatest, color=colour, alpha=0.25, linewidth=0)
            axes.plot(x, mean, color=colour, linewidth=1.4, marker="o" if len(x) == 1 else None, markersize=3)
        values = np.concatenate([bins[:, 2:] for bins in series])
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        axes.spines[:].set_visible(False)
        axes.grid(axis="y", color=grid, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(which="both", colors=ink, length=0)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])  # HTML needs neither these nor the XML header
    for stand_in, variable in zip(stand_ins, ("ink-soft", "line", "series-1", "series-2", "series-3", "series-4"), strict=True):
        svg = svg.replace(stand_in, f"var(--{variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(title)} by iteration"', 1))


# --- Page -------------------------------------------------------------------------------------------------------------------------------


def write_report(out: Path, results: Mapping[str, Any], curves: Mapping[str, Path], pictures: Sequence[Path], clip: Path) -> Path:
    """Write the report page `report.html` into the folder `out` and return its path.

    `curves` names each run's log.jsonl, `pictures` are PNG or JPEG files, `clip` is an mp4 file in a codec that browsers play (H.264, VP9,
    AV1). Everything is inlined: the page can be mailed. Raises FileNotFoundError or ValueError for a file that is missing or unusable,
    before anything is written.
    """
    results = _checked(results)
    page = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(page).render(
        run=list(_flat(results["run"])),
        timing=list(_flat(results["timing"])),
        variants=list(results["variants"]),
        rows=list(_rows(results)),
        notes=[(metric["label"], metric["note"]) for metric in results["metrics"] if metric.get("note")],
        checks=results["checks"],
        curves={name: _charts(Path(path)) for name, path in curves.items()},
        pictures=[_picture(Path(path)) for path in pictures],
        clip=_clip(Path(clip)),
        number=number,
    )
    page = Path(out) / "report.html"
    write_text(page, text)
    return page


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield f"{prefix}{key}", ", ".join(map(number, value)) if isinstance(value, list) else number(value)


def _picture(path: Path) -> dict[str, Any]:
    data = _inline(path, {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"})
    pixels = cv2.imread(str(path))
    if pixels is None:
        raise ValueError(f"picture {path} cannot be decoded; make it again")
    height, width = pixels.shape[:2]
    return {"data": data, "caption": path.stem.replace("_", " "), "width": width, "height": height}


def _clip(path: Path) -> dict[str, Any]:
    data = _inline(path, {".mp4": "video/mp4"})
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            codec, width, height = stream.codec_context.name, stream.width, stream.height
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"clip {path} holds no readable video ({error}); make it again") from error
    if not any(name in codec for name in _PLAYABLE):
        raise ValueError(f"clip {path} is coded as {codec}, which browsers do not play; encode it as {', '.join(_PLAYABLE)}")
    return {"data": data, "caption": path.stem.replace("_", " "), "width": width, "height": height}


def _inline(path: Path, kinds: Mapping[str, str]) -> str:
    """The file as a data URI."""
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} cannot go into the report: its name must end with {', '.join(kinds)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so the report cannot show it; give the path of a file that was written")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
