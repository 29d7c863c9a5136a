import base64
import copy
import html.parser
import json
import re
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from cosmos_mp.evaluate import report
from cosmos_mp.evaluate.report import check, format_table, markdown_table, number, save_results, write_report
from cosmos_mp.evaluate.statistics import Interval

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def results():
    return {
        "run": {"preset": "tiny_dmd2", "commit": "0123abc", "model": {"width": 96, "betas": [0.0, 0.99]}},
        "metrics": [
            {"key": "mse", "label": "MSE to the teacher", "unit": "", "better": "lower", "note": "Same noise for all."},
            {"key": "f1", "label": "edge F1", "unit": "", "better": "higher"},
            {"key": "sharp", "label": "sharpness / real", "unit": "", "better": "one"},
            {"key": "time", "label": "time", "unit": "ms", "better": None},
        ],
        "variants": {
            "teacher": {"f1": 0.7, "sharp": 2.5, "time": 165.2},
            "KD": {"mse": {"value": 0.0137, "low": 0.0131, "high": 0.0144}, "f1": 0.8, "sharp": 0.2, "time": 3.4},
            "DMD2": {"mse": Interval(0.0159, 0.015, 0.017), "f1": 0.9, "sharp": 1.4, "time": 3.4},
        },
        "checks": [check("KD against one step", 0.31, "<", 0.5), check("texture", 0.7, ">", 0.75)],
        "timing": {"teacher": 155.0},
    }


@pytest.fixture
def files(tmp_path):
    """A log, a picture and a clip, really written."""
    lines = [
        {
            "iteration": i,
            "terms": {"vsd": 0.5} if i % 5 == 0 else {"fake_score": 0.1 * i},
            "grad_norms": {"student": 1.0, "fake_score": 2.0},
        }
        for i in range(20)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cv2.imwrite(str(tmp_path / "held_out.png"), np.full((8, 12, 3), 99, np.uint8))
    write_clip(tmp_path / "student.mp4", "libx264")
    return tmp_path


def write_clip(path, codec):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for value in (10, 200):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")))
        container.mux(stream.encode())


def page(results, files, **change):
    arguments = {
        "curves": {"dmd2": files / "log.jsonl"},
        "pictures": [files / "held_out.png"],
        "clip": files / "student.mp4",
        "out": files / "report",
    } | change
    path = write_report(results=results, **arguments)
    assert path == arguments["out"] / "report.html" and [path] == list(path.parent.iterdir())
    return path.read_text(encoding="utf-8")


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes; open tags are matched with their ends."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# --- check and results.json -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "relation", "bound", "passed"),
    [(1, "<", 1, False), (1, "<=", 1, True), (1, ">=", 1, True), (1, ">", 1, False), (0, "<", 1, True), (2, "<=", 1, False)],
)
def test_check_compares(value, relation, bound, passed):
    assert check("c", value, relation, bound)["passed"] is passed


def test_check_refuses_an_unknown_relation():
    with pytest.raises(ValueError, match="=="):
        check("c", 1, "==", 1)


def test_results_are_written_as_plain_data(tmp_path, results):
    results["timing"] = {"numpy": np.float32(0.5), "torch": torch.tensor(2), "path": Path("runs/kd"), "nothing": None, "yes": True}
    saved = json.loads(save_results(tmp_path / "new" / "results.json", results).read_text())
    assert saved["timing"] == {"numpy": 0.5, "torch": 2, "path": "runs/kd", "nothing": None, "yes": True}
    assert saved["variants"]["DMD2"]["mse"] == {"value": 0.0159, "low": 0.015, "high": 0.017}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def test_results_are_replaced_not_overwritten(tmp_path, results):
    path = save_results(tmp_path / "results.json", results)
    with path.open() as reader:  # holds the old file while the new one comes
        save_results(path, results | {"timing": {}})
        assert json.load(reader)["timing"] == {"teacher": 155.0}
    assert json.loads(path.read_text())["timing"] == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("nan"))])
def test_results_that_are_not_finite_are_refused_and_the_old_file_stays(tmp_path, results, bad):
    path = save_results(tmp_path / "results.json", results)
    before = path.read_bytes()
    broken = copy.deepcopy(results)
    broken["variants"]["KD"]["f1"] = bad
    with pytest.raises(ValueError, match=r"results\.variants\.KD\.f1 is (nan|inf)"):
        save_results(path, broken)
    assert path.read_bytes() == before
    for reader in (format_table, markdown_table):
        with pytest.raises(ValueError, match="KD.f1"):
            reader(broken)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, results, monkeypatch):
    path = save_results(tmp_path / "results.json", results)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_results(path, results | {"timing": {}})
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.pop("timing"), "lack timing"),
        (lambda r: r["metrics"][0].update(better="less"), "mse: better is 'less'"),
        (lambda r: r["metrics"][1].pop("label"), r"metrics\[1\] lacks label"),
        (lambda r: r["variants"]["KD"].update(psnr=1.0), r"KD\.psnr is not among"),
        (lambda r: r["variants"]["KD"].update(mse={"value": 1.0}), r"KD\.mse must be a number or hold"),
        (lambda r: r["checks"][1].update(passed=True), "'texture' says passed=True wrongly"),
        (lambda r: r["checks"][0].pop("bound"), r"checks\[0\] lacks bound"),
        (lambda r: r["run"].update(model=object()), r"results\.run\.model is a object"),
        (lambda r: r["run"].update(values=np.zeros(3)), r"results\.run\.values is a ndarray"),
    ],
)
def test_breaches_of_the_schema_are_named(tmp_path, results, spoil, message):
    spoil(results)
    with pytest.raises(ValueError, match=message):
        save_results(tmp_path / "results.json", results)
    assert not list(tmp_path.iterdir())


# --- tables -----------------------------------------------------------------------------------------------------------------------------


def test_markdown_marks_the_best_in_each_direction(results):
    assert markdown_table(results).splitlines() == [
        "|  | teacher | KD | DMD2 |",
        "| --- | ---: | ---: | ---: |",
        "| MSE to the teacher ↓ | – | **0.0137** (0.0131–0.0144) | 0.0159 (0.0150–0.0170) |",
        "| edge F1 ↑ | 0.700 | 0.800 | **0.900** |",
        "| sharpness / real →\N{NO-BREAK SPACE}1 | 2.50 | 0.200 | **1.40** |",
        "| time (ms) | 165 | 3.40 | 3.40 |",
    ]


def test_markdown_escapes_its_own_signs(results):
    results["variants"] = {"a|b<i>": results["variants"]["KD"]}
    assert r"a\|b\<i\>" in markdown_table(results).splitlines()[0]


def test_terminal_table_is_aligned_and_ends_with_the_checks(results):
    lines = format_table(results).splitlines()
    assert re.fullmatch(r"MSE to the teacher ↓ +– +0\.0137 ±0\.00065 \* +0\.0159 ±0\.0010", lines[2])
    assert len({len(line) for line in lines[2:3] + lines[:1]}) == 1
    assert lines[-2:] == ["holds  KD against one step: 0.310 < 0.500", "FAILS  texture: 0.700 > 0.750"]


def test_ties_are_all_best_and_a_lone_value_is_not(results):
    for values in results["variants"].values():
        values["f1"] = 0.5
    del results["variants"]["KD"]["mse"]
    text = markdown_table(results)
    assert text.count("**0.500**") == 3
    assert "**0.0159**" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (72, "72"),
        (10_000, "10,000"),
        (0.0, "0"),
        (0.5, "0.500"),
        (165.24, "165"),
        (1234.5, "1,234"),
        (0.000123, "0.000123"),
        (-0.25, "-0.250"),
    ]
    + [(5e-7, "5.00e-07"), ("text", "text"), (True, "True"), (None, "None"), (999.7, "1,000")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


# --- page -------------------------------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file(results, files):
    text = page(results, files)
    assert not re.search(r"https?:|url\((?!#)|@import|xmlns", text)
    parsed = Elements(text)
    assert not parsed.open, "every tag is closed"
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    links = [value for _, attrs in parsed.tags for key, value in attrs.items() if key in ("src", "href", "srcset", "xlink:href", "poster")]
    assert links and all(value.startswith(("data:", "#")) for value in links)


def test_the_page_holds_the_picture_and_a_clip_that_plays(results, files):
    tags = Elements(page(results, files)).tags
    video = next(attrs for tag, attrs in tags if tag == "video")
    image = next(attrs for tag, attrs in tags if tag == "img")
    assert {"controls", "loop", "autoplay", "muted"} <= set(video)
    assert (video["width"], video["height"], image["width"], image["height"]) == ("64", "64", "12", "8")
    assert video["src"] == "data:video/mp4;base64," + base64.b64encode((files / "student.mp4").read_bytes()).decode()
    assert image["src"] == "data:image/png;base64," + base64.b64encode((files / "held_out.png").read_bytes()).decode()


def test_the_page_tells_results_checks_and_run(results, files):
    text = page(results, files)
    assert "1 of 2 checks hold" in text and "✓ holds" in text and "✗ fails" in text
    assert re.search(r'class="best"><b>0\.0137</b><small>0\.0131 – 0\.0144</small>', text)
    assert text.count('class="best"') == 3
    for part in ("MSE to the teacher ↓", "&gt; 0.750", "Same noise for all.", "model · width", "0, 0.990", "0123abc", "155"):
        assert part in text, part


def test_the_page_draws_every_series_of_the_log(results, files):
    text = page(results, files)
    titles = re.findall(r"<figcaption>(\w[\w ]*?)(?:<span|</figcaption>)", text.split("<h3>dmd2</h3>")[1])
    assert titles == ["vsd", "fake_score", "gradient norm"]
    assert text.count("<svg") == 3
    assert re.search(r'series-1\)">student</span>.*series-2\)">fake_score</span>', text)
    assert "var(--series-2)" in text and "#0000f" not in text


def test_a_chart_shows_the_mean_and_the_range_of_the_finite_values():
    iterations, values = np.arange(602), np.array([*(float(i % 2) for i in range(600)), float("nan"), float("inf")])
    bins = report._binned(iterations, values)
    assert bins.shape == (60, 4)
    np.testing.assert_allclose(bins[0], [4.5, 0.5, 0.0, 1.0])
    assert len(report._binned(iterations[:7], values[:7])) == 7 and len(report._binned(iterations[:0], values[:0])) == 0


def test_weighted_sums_of_two_phases_are_two_charts(tmp_path):
    log = tmp_path / "log.jsonl"
    phases = [(["student"], {"vsd": 1.0, "total": 1.0}), (["fake_score", "discriminator"], {"fake_score": 2.0, "total": 5.0})]
    log.write_text("".join(json.dumps({"iteration": i, "roles": r, "terms": t}) + "\n" for i, (r, t) in enumerate(phases)))
    assert [chart["title"] for chart in report._charts(log)] == ["vsd", "fake_score", "total, student", "total, fake_score+discriminator"]


def test_charts_skip_what_a_log_lacks(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"iteration": 0, "terms": {"mse": 1.0}, "lrs": null}\n{"iteration": 1, "terms": {"mse": NaN, "gan": NaN}, "lrs": {}}\n')
    assert [chart["title"] for chart in report._charts(log)] == ["mse"]
    log.write_text(json.dumps({"iteration": 0, "metrics": {"accuracy": 0.5}, "lrs": {"student": 1e-4}, "samples_per_second": 9.0}) + "\n")
    charts = report._charts(log)
    assert [chart["title"] for chart in charts] == ["accuracy", "learning rate", "samples per second"]
    assert [chart["names"] for chart in charts] == [["accuracy"], ["student"], ["samples per second"]]


def test_all_text_is_escaped(results, files):
    hostile = json.loads(json.dumps(results, default=str).replace("KD", HOSTILE))
    for key in ("run", "timing"):
        hostile[key] = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    for metric in hostile["metrics"]:
        metric |= {"label": HOSTILE, "unit": HOSTILE, "note": HOSTILE}
    hostile["variants"]["DMD2"]["mse"] = 0.1
    (files / "log.jsonl").write_text(json.dumps({"iteration": 0, "terms": {HOSTILE: 1.0}, "grad_norms": {HOSTILE: 1.0}}) + "\n")
    picture = files / "<b>&.png"
    (files / "held_out.png").rename(picture)
    text = page(hostile, files, curves={HOSTILE: files / "log.jsonl"}, pictures=[picture])
    assert "<script" not in text and "<b>&." not in text and "&lt;b&gt;&amp;" in text
    assert text.count("&lt;script&gt;") > 10
    assert not Elements(text).open


def test_the_page_is_the_same_each_time(results, files):
    assert page(results, files) == page(results, files)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pictures": ["gone.png"]}, FileNotFoundError, r"gone\.png does not exist"),
        ({"pictures": ["log.jsonl"]}, ValueError, r"log\.jsonl cannot go into the report"),
        ({"pictures": ["fake.png"]}, ValueError, r"fake\.png cannot be decoded"),
        ({"clip": "gone.mp4"}, FileNotFoundError, r"gone\.mp4 does not exist"),
        ({"clip": "fake.mp4"}, ValueError, r"fake\.mp4 holds no readable video"),
        ({"clip": "old.mp4"}, ValueError, r"old\.mp4 is coded as mpeg4, which browsers do not play"),
        ({"curves": {"kd": "gone.jsonl"}}, FileNotFoundError, r"gone\.jsonl"),
    ],
)
def test_unusable_files_are_named_and_nothing_is_written(results, files, change, error, message):
    for name in ("fake.png", "fake.mp4"):
        (files / name).write_text("neither")
    write_clip(files / "old.mp4", "mpeg4")
    absolute = {
        key: [files / v for v in value] if key == "pictures" else files / value if key == "clip" else {"kd": files / value["kd"]}
        for key, value in change.items()
    }
    with pytest.raises(error, match=message):
        page(results, files, **absolute)
    assert not (files / "report").exists()
