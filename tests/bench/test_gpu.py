"""The GPU benchmark without one: what is compared, at small sizes and with interpreted kernels; arithmetic, table and script."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmos_mp import commands, kernels
from cosmos_mp.bench import gpu, gpu_rows
from cosmos_mp.bench.gpu_rows import Missing, Row, Side
from cosmos_mp.bench.static import shipped
from cosmos_mp.config import ConfigError, NetConfig
from cosmos_mp.kernels import adaln as adaln_module

ROOT = Path(__file__).parents[2]
SMALL = gpu_rows.Sizes(
    net=NetConfig(hidden=48, heads=2, mlp_hidden=96, adaln_lora_dim=8, text_dim=16),
    grid=(2, 4, 6),
    text_tokens=5,
    latent=(3, 2, 4, 6),
    features=(2, 16, 1, 6, 4),
    frames=(2, 24, 40, 3),
    copied=1000,
    matrix=16,
)
LIMITS = {"copy": {"gb_per_s": 3000.0}, "product": {"tflops": 700.0}}
KERNELS = ["adaln, forward", "adaln, backward", "qk_norm_rope, forward", "qk_norm_rope, backward", "dmd2_loss, both", "gan_head, both"]
CANNY, BLOCK = "canny, 2 frames", "one block, forward and backward"


def timer(run, milliseconds):
    """Stands in for the GPU's clock."""
    run()
    return [3.0, 1.0, 2.0]


def compiler(function):
    return torch.compile(function, backend="aot_eager", dynamic=False)


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.name: row for row in gpu_rows.rows("cpu", SMALL, compiler)}


def measure(*rows: Row, in_graph=lambda make, least_bytes, milliseconds: [0.5], **options) -> dict:
    return gpu.measure(rows, LIMITS, timer, in_graph, 1.0, **options)


# --- What is compared ---


def test_every_side_of_every_row_computes_the_same(rows):
    found = measure(*rows.values())
    assert list(found["rows"]) == [*KERNELS, CANNY, BLOCK] and found["mistakes"] == []
    for name in KERNELS:
        sides = found["rows"][name]["sides"]
        assert list(sides) == ["ours", "eager", "torch.compile"]
        assert all(0 < side["error"] < 2e-2 and side["median_us"] == 2000 and side["repetitions"] == 3 for side in sides.values()), name
        assert all(side["graph"]["median_us"] == 500 for side in sides.values()), name
        assert sides["ours"]["error"] != sides["eager"]["error"], f"{name}: two versions that err alike are one"
    sides = found["rows"][BLOCK]["sides"]
    assert all(0 < sides[name]["error"] < 0.1 for name in ("ours", "eager", "torch.compile"))
    assert all("not installed" in sides[name]["missing"] for name in ("Transformer Engine", "Transformer Engine, FP8"))
    sides = found["rows"][CANNY]["sides"]
    assert {side["error"] for side in sides.values()} == {0.0}
    assert "share_of_copy" in sides["ours"] and "share_of_copy" not in sides["cv2 on the CPU"]


def test_values_and_gradients_are_what_is_compared(rows):
    tokens, net = math.prod(SMALL.grid), SMALL.net
    stream, vector = (tokens, 1, net.hidden), (1, net.hidden)
    heads = (tokens, 1, net.heads, net.head_dim)
    features, channels = SMALL.features, (SMALL.features[1],)
    expected = {
        "adaln, forward": [stream, stream],
        "adaln, backward": [stream, stream, vector, vector, vector],
        "qk_norm_rope, forward": [heads],
        "qk_norm_rope, backward": [heads, (net.head_dim,)],
        "dmd2_loss, both": [(), (1, *SMALL.latent)],
        "gan_head, both": [(), features, channels, channels, channels, (1,)],
        CANNY: [SMALL.frames[:3]],
    }
    for name, shapes in expected.items():
        assert [tuple(x.shape) for x in rows[name].exact()] == shapes, name
    exact = rows[BLOCK].exact()
    assert exact[0].dtype == torch.float64 and [tuple(x.shape) for x in exact[:2]] == [stream, stream]
    assert len(exact) == 2 + 20 and all(x.abs().max() > 0 for x in exact)  # out, at the input, and of 20 weights


def test_the_least_bytes_are_those_of_the_launches_at_the_7bs_size():
    sizes, launches = gpu_rows.Sizes(), {launch.name: launch.least_bytes for launch in shipped()}
    again = 7040 * 3 * 4096 * 2  # the launch reads shift, scale and gate for every token, of which a cache has all but the first
    adaln_least = (launches["adaln gated forward"] - again, launches["adaln gated backward"])
    turned = (launches["qk_norm_rope rotated forward"], launches["qk_norm_rope rotated backward"])
    loss = launches["dmd2_loss guided forward"] + launches["dmd2_loss backward"]
    head = sum(launches[f"gan_head {name}"] for name in ("statistics", "sums", "gradient"))
    passes = [
        *gpu_rows._adaln(meta, sizes),
        *gpu_rows._qk_norm_rope(meta, sizes),
        gpu_rows._dmd2_loss(meta, sizes),
        gpu_rows._gan_head(meta, sizes),
    ]
    for kernel, launched in zip(passes, (*adaln_least, *turned, loss, head), strict=True):
        # Launches add what passes between them: of the smallest, the discriminator's head, a tenth.
        assert 0.9 < kernel.least_bytes / launched <= 1, kernel.name


def meta(*shape, seed, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_head_has_no_value_at_the_kink():
    kernel = gpu_rows._gan_head(
        lambda *shape, **options: gpu_rows._draw(*shape, device="cpu", **options), replace(SMALL, features=(2, 64, 1, 22, 40))
    )
    x, weight, bias, *_ = (value.detach().double() for value in kernel.inputs)
    assert torch.nn.functional.group_norm(x, 8, weight, bias, gpu_rows.EPS).abs().min() > 1e-4


def test_calls_have_inputs_of_their_own_and_can_be_repeated(rows):
    for name in KERNELS:
        for side in rows[name].sides.values():
            with kernels.using(side.kernels):
                first, second = side.make(), side.make()
                results = [[x.detach().clone() for x in run()] for run in (first, first, second)]
            assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)), name


# --- What goes wrong ---


def made_up(sides: dict[str, Side], **options) -> Row:
    return Row("made up", sides, lambda: [torch.tensor([2.0, 4.0]).double()], 1e-2, **options)


def gives(*values: float) -> Side:
    return Side(lambda: lambda: [torch.tensor(values)])


def test_a_wrong_kernel_is_noticed(monkeypatch):
    right = adaln_module._AdaLN.forward

    def wrong(ctx, *arguments):
        r, x = right(ctx, *arguments)
        x[-1] = 0  # the last token, as a mask that is wrong by one would leave it
        return r, x

    monkeypatch.setattr(adaln_module._AdaLN, "forward", staticmethod(wrong))
    rows = gpu_rows.rows("cpu", SMALL, compiler)
    found = measure(rows[0])
    (mistake,) = found["mistakes"]
    assert mistake.startswith("adaln, forward, ours: error")
    assert found["rows"]["adaln, forward"]["sides"]["eager"]["error"] < 2e-2


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.9])
def test_what_is_wrong_is_a_mistake_on_any_side(value):
    found = measure(made_up({"ours": gives(2, 4), "eager": gives(2, value)}))
    assert [mistake[:15] for mistake in found["mistakes"]] == ["made up, eager:"]
    assert found["rows"]["made up"]["sides"]["eager"]["median_us"] == 2000


def test_what_is_compared_with_is_of_plain_torch_and_computed_once():
    seen = []

    def exact():
        seen.append(kernels._choice)
        return [torch.tensor([2.0, 4.0])]

    with kernels.using("triton"):
        measure(Row("made up", {"ours": gives(2, 4), "eager": gives(2, 4)}, exact, 1e-2))
    assert seen == ["torch"]


def test_each_side_is_made_and_timed_with_its_kernels():
    seen = {}

    def side(name: str, choice: str) -> Side:
        return Side(lambda: lambda: seen.setdefault(name, set()).add(kernels._choice) or [torch.tensor([2.0, 4.0])], choice)

    in_graph = lambda make, *_: [1.0 for _ in make()()]  # noqa: E731
    measure(made_up({"ours": side("ours", "triton"), "eager": side("eager", "torch")}, least_bytes=1, graphs=True), in_graph=in_graph)
    assert seen == {"ours": {"triton"}, "eager": {"torch"}}


def test_errors_are_relative_to_the_largest_element_and_some_sides_may_err_more():
    assert gpu.error([torch.tensor([2.1, 4.0])], [torch.tensor([2.0, 4.0])]) == pytest.approx(0.025)
    assert gpu.error([torch.ones(2), torch.tensor([3.0])], [torch.ones(2), torch.tensor([2.0])]) == 0.5
    sides = {"ours": gives(2, 4), "rough": gives(2.1, 4)}
    assert len(measure(made_up(sides))["mistakes"]) == 1
    assert measure(made_up(sides, loose={"rough": 0.1}))["mistakes"] == []


def raises(error: Exception, own: bool = False, calls: int = 0) -> Side:
    """A side that computes what is right so often, and then fails; in the beginning, it cannot be made."""
    left = iter(range(calls))

    def run():
        if next(left, None) is None:
            raise error
        return [torch.tensor([2.0, 4.0])]

    return Side((lambda: run) if calls else run, own=own)


def test_a_side_that_fails_is_recorded_and_the_others_go_on():
    sides = {"a": raises(RuntimeError("no compiler\nat all")), "b": raises(Missing("not installed")), "eager": gives(2, 4)}
    found = measure(made_up(sides))
    told = found["rows"]["made up"]["sides"]
    assert told["a"] == {"failed": "RuntimeError: no compiler"} and told["b"] == {"missing": "not installed"}
    assert told["eager"]["median_us"] == 2000 and found["mistakes"] == []
    for calls in (0, 1):  # made, and timed
        sides = {"eager": raises(RuntimeError("launch"), calls=calls), "any": raises(RuntimeError("launch"), own=True, calls=calls)}
        assert measure(made_up(sides))["mistakes"] == ["made up, any: RuntimeError: launch"]
    assert measure(made_up({"ours": raises(Missing("no nvcc"), own=True)}))["mistakes"] == []


def test_our_own_sides_are_ours_and_transformer_engines(rows):
    for row in rows.values():
        own = ["ours", "Transformer Engine", "Transformer Engine, FP8"] if row.name == BLOCK else ["ours"]
        assert [name for name, side in row.sides.items() if side.own] == own, row.name


def test_a_transformer_engine_that_is_there_and_fails_is_a_mistake(rows, monkeypatch):
    sides = {name: side for name, side in rows[BLOCK].sides.items() if name.startswith("Transformer Engine")}
    row = replace(rows[BLOCK], sides=sides)
    monkeypatch.setattr(gpu_rows.choice, "found", lambda: (None, "it is not installed"))
    assert measure(row)["mistakes"] == []

    def broken():
        raise AttributeError("no such layer")

    monkeypatch.setattr(gpu_rows.choice, "found", broken)
    assert measure(row)["mistakes"] == [f"{BLOCK}, {name}: AttributeError: no such layer" for name in sides]


def test_a_block_is_called_once_before_the_call_that_is_compared(rows, monkeypatch):
    calls, forward = [], gpu_rows.Block.forward
    monkeypatch.setattr(gpu_rows.Block, "forward", lambda *given: calls.append(1) or forward(*given))
    rows[BLOCK].sides["eager"].make()
    assert len(calls) == 1


def test_what_cannot_be_captured_in_a_graph_has_been_timed_alone():
    def in_graph(make, least_bytes, milliseconds):
        make()()
        if least_bytes == 7:
            raise RuntimeError("not permitted when stream is capturing")
        return [0.5]

    for least_bytes, graph in ((6e6, 500), (7, "RuntimeError: not permitted when stream is capturing")):
        found = measure(made_up({"ours": gives(2, 4)}, least_bytes=least_bytes, graphs=True), in_graph=in_graph)
        side = found["rows"]["made up"]["sides"]["ours"]
        assert found["mistakes"] == [] and side["median_us"] == 2000
        assert side["graph"].get("median_us", side["graph"].get("failed")) == graph


def test_what_comes_after_the_deadline_is_left_out():
    found = measure(made_up({"ours": gives(2, 4)}), deadline=0.0)
    assert found["rows"]["made up"]["sides"]["ours"] == {"missing": "left out: the time is over"} and found["mistakes"] == []


def test_an_interrupt_keeps_what_was_found():
    def interrupted(make, least_bytes, milliseconds):
        raise KeyboardInterrupt

    first, second = (
        made_up({"ours": gives(2, 4)}, least_bytes=1),
        replace(made_up({"ours": gives(2, 4)}, least_bytes=1, graphs=True), name="second"),
    )
    found = measure(first, second, replace(first, name="third"), in_graph=interrupted)
    assert found["mistakes"] == ["second: interrupted, and nothing after it was measured"] and list(found["rows"]) == ["made up", "second"]
    assert found["rows"]["made up"]["sides"]["ours"]["median_us"] == found["rows"]["second"]["sides"]["ours"]["median_us"] == 2000
    assert gpu.table(found | {"gpu": "none", "ceilings": LIMITS})


# --- Numbers ---


def test_quantiles_and_rates_are_of_the_measured_times():
    times = [float(value) for value in range(10, 0, -1)] + [100.0]
    row = Row("row", {}, list, 0.0, least_bytes=6e9, flops=3e12)
    told = gpu.summary(times, row, LIMITS)
    assert (told["p20_us"], told["median_us"], told["p80_us"], told["repetitions"]) == (3000, 6000, 9000, 11)
    assert told["gb_per_s"] == pytest.approx(1000) and told["share_of_copy"] == pytest.approx(1 / 3)
    assert told["tflops"] == pytest.approx(500) and told["share_of_product"] == pytest.approx(5 / 7)
    assert gpu.summary([2.0], Row("row", {}, list, 0.0), LIMITS) == {"median_us": 2000, "p20_us": 2000, "p80_us": 2000, "repetitions": 1}


def test_ceilings_count_bytes_read_and_written_and_two_operations_per_product():
    found = gpu.ceilings("cpu", SMALL, timer, 1.0)
    assert found["copy"]["gb_per_s"] == pytest.approx(2 * 1000 / 2e-3 / 1e9)
    assert found["product"]["tflops"] == pytest.approx(2 * 16**3 / 2e-3 / 1e12)
    assert not any(key.startswith("share") for row in found.values() for key in row)


def test_the_hosts_clock_repeats_at_least_thrice():
    calls = []
    times = gpu.host_clock(lambda: calls.append(1), 0.0)
    assert len(times) == 3 and len(calls) == 4 and all(time >= 0 for time in times)


def test_calls_in_a_graph_take_turns_on_copies_that_fill_three_caches(monkeypatch):
    """With stand-ins for CUDA's streams, graphs and events: a replay lasts 80 ms."""
    made, captured, capturing = [], [], []

    def make():
        number = len(made)
        made.append(number)
        return lambda: captured.append(number) if capturing else None

    @contextmanager
    def capture(graph, stream):
        capturing.append(1)
        yield
        capturing.pop()

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 80.0)
    stand_ins = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50e6),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": capture,
        "Event": lambda enable_timing: event,
        "synchronize": lambda: None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert gpu.graph_times(make, 40e6, 600.0) == [5.0] * 8  # of four rounds over four copies
    assert made == [0, 1, 2, 3] and captured == made * 4
    made.clear()
    assert gpu.graph_times(make, 1e9, 0.0) == [10.0] * 5 and made == [0, 1]


def test_the_table_shows_numbers_shares_and_reasons():
    sides = {
        "ours": {
            "error": 1e-3,
            "median_us": 100.04,
            "p20_us": 99,
            "p80_us": 110,
            "repetitions": 9,
            "gb_per_s": 2310.6,
            "share_of_copy": 0.77,
        },
        "eager": {"failed": "RuntimeError: no"},
    }
    sides["ours"]["graph"] = {"median_us": 90, "p20_us": 89, "p80_us": 91, "repetitions": 9, "gb_per_s": 2567, "share_of_copy": 0.8557}
    block = {"error": 0.02, "median_us": 25e3, "p20_us": 24e3, "p80_us": 26e3, "repetitions": 7, "tflops": 495.5, "share_of_product": 0.708}
    found = {"gpu": "NVIDIA X", "ceilings": LIMITS, "mistakes": ["adaln, eager: error nan"]}
    found["rows"] = {"adaln": {"sides": sides}, "block": {"sides": {"ours": block}}}
    lines = gpu.table(found).splitlines()
    assert lines[0].startswith("| on one NVIDIA X: copy 3000 GB/s, bf16 product 700 TFLOP/s |")
    assert lines[2:] == [
        "| adaln | ours | 100.0 | 99.0 | 110.0 | 2311 | 0.77 | 90.0 | 2567 | 0.86 | 1.0e-03 |",
        "| adaln | eager |  |  |  |  |  |  |  |  |  |",
        "| block | ours | 25000.0 | 24000.0 | 26000.0 | 496 | 0.71 |  |  |  | 2.0e-02 |",
        "",
        "- adaln, eager: RuntimeError: no",
        "- WRONG: adaln, eager: error nan",
    ]


# --- Command and script ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="needs a GPU, and torch sees none"):
        commands.bench(["gpu", "--json", str(tmp_path / "new" / "gpu.json")])
    assert not (tmp_path / "new").exists()


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set: unset it"):
        gpu.check_gpu()


def test_a_mistake_is_written_down_and_ends_with_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "check_gpu", lambda: None)
    monkeypatch.setattr(gpu, "bench_gpu", lambda fast, limit: {"fast": fast, "limit": limit, "mistakes": ["adaln, ours: error nan"]})
    with pytest.raises(ValueError, match="wrong on this GPU: adaln, ours: error nan"):
        commands.bench(["gpu", "--fast", "--limit", "7", "--json", str(tmp_path / "gpu.json")])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert (written["fast"], written["limit"]) == (True, 7)
    monkeypatch.setattr(gpu, "bench_gpu", lambda fast, limit: {"mistakes": []})
    commands.bench(["gpu"])


@pytest.fixture
def script(tmp_path):
    """Run the script where nvcc is not; `sees` makes its look for a GPU succeed."""

    def run(*words: str, sees: bool = False) -> subprocess.CompletedProcess:
        stand_in = f'case "$*" in *is_available*) exit {0 if sees else 1} ;; esac\nexec {sys.executable} "$@"\n'
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / "python").write_text(f"#!/bin/sh\n{stand_in}")
        (tmp_path / "bin" / "python").chmod(0o755)
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
        command = ["bash", "tests/gpu/run.sh", *words]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)

    return run


def test_the_script_refuses_at_once_where_there_is_no_gpu(script, tmp_path):
    done = script("--out", str(tmp_path / "out"))
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch sees no GPU: run this where nvidia-smi shows one")


@pytest.mark.parametrize("words", [["--fast"], ["--out"]])
def test_the_script_says_how_it_is_called(script, words):
    done = script(*words)
    assert done.returncode == 2 and "bash tests/gpu/run.sh [--out DIR]" in done.stdout


def test_the_script_ends_with_the_tests_outcome_and_both_in_one_file(script, tmp_path):
    done = script("--out", str(tmp_path / "out"), sees=True)
    assert done.returncode == 1 and "bench gpu needs a GPU" in done.stderr  # what it asks before was told otherwise
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["tests"]
    assert found["passed"] == [] and found["failed"] == {} and "needs a CUDA device" in found["skipped"].values()
    skipped = {name.split("::")[0].rpartition(".")[2] for name in found["skipped"]}
    assert {"test_kernels", "test_backend", "test_nccl", "test_steps", "test_optim"} <= skipped
    line = next(line for line in done.stdout.splitlines() if " tests passed, " in line)
    assert line.startswith(f"0 tests passed, 0 failed, {len(found['skipped'])} skipped; skipped: ") and "needs a CUDA device" in line
    assert (tmp_path / "out" / "tests.log").is_file()


@pytest.mark.parametrize(
    ("status", "failed"),
    [
        (0, {}),
        (1, {}),
        (2, {"pytest": "ended with 2 before its end, at the time limit or by a signal: see tests.log"}),
        (124, {"pytest": "ended with 124 before its end, at the time limit or by a signal: see tests.log"}),
    ],
)
def test_a_test_that_time_cuts_off_has_not_passed(tmp_path, status, failed):
    """As pytest writes it: the one that ran has no name."""
    cases = '<testcase classname="tests.gpu.a" name="b"/><testcase time="3"/>'
    cases += '<testcase classname="tests.gpu.a" name="c"><failure message="off by 1&#10;more"/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    (tmp_path / "gpu.json").write_text('{"rows": {}}')
    command = [sys.executable, "tests/gpu/outcome.py", tmp_path, str(status)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 1 and found["rows"] == {}, done.stderr
    assert found["tests"] == {"passed": ["tests.gpu.a::b"], "failed": {"tests.gpu.a::c": "off by 1"} | failed, "skipped": {}}
    assert f"1 tests passed, {1 + len(failed)} failed, 0 skipped; failed: off by 1" in done.stdout


@pytest.mark.parametrize("written", [None, "", "<testsuites><testsuite><testcase classname="])
def test_pytest_without_results_is_a_failure(tmp_path, written):
    """Also where it was killed while it wrote them."""
    if written is not None:
        (tmp_path / "tests.xml").write_text(written)
    done = subprocess.run([sys.executable, "tests/gpu/outcome.py", tmp_path, "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "0 tests passed, 1 failed, 0 skipped; failed: wrote no results that can be read" in done.stdout, (
        done.stderr
    )


STAND_IN = """#!/bin/sh
case "$*" in
  *is_available*) exit 0 ;;
  *tests/gpu/outcome.py*) echo outcome >>{root}/begun; exec {python} "$@" ;;
  *"setup.py -q build_ext"*) moment=build ;;
  *"-m pytest"*) moment=tests; echo '<testsuite><testcase classname="a" name="b"/></testsuite>' >{root}/out/tests.xml ;;
  *) moment=benchmarks; echo '{{"rows": {{"adaln": 1}}}}' >{root}/out/gpu.json ;;
esac
echo $moment >>{root}/begun
[ $moment = {moment} ] || exit 0
trap 'exit 1' INT # as Python does: it ends by itself
touch {root}/ready
sleep 200
"""


@pytest.mark.parametrize("moment", ["build", "tests", "benchmarks"])
def test_ctrl_c_ends_the_script_with_what_it_runs_and_keeps_what_was_found(tmp_path, moment):
    bin, folder = tmp_path / "bin", tmp_path / "tests" / "gpu"
    bin.mkdir()
    folder.mkdir(parents=True)
    for name in ("run.sh", "outcome.py"):  # where no library has been built
        (folder / name).write_text((ROOT / "tests" / "gpu" / name).read_text())
    (bin / "python").write_text(STAND_IN.format(root=tmp_path, python=sys.executable, moment=moment))
    (bin / "nvcc").write_text("#!/bin/sh\n")
    for file in bin.iterdir():
        file.chmod(0o755)
    # In the background, the tests themselves have SIGINT ignored, and a shell that inherits that cannot trap it.
    command = ["env", "--default-signal", "bash", str(folder / "run.sh"), "--out", str(tmp_path / "out")]
    env = os.environ | {"PATH": f"{bin}:/usr/bin:/bin"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    moments = ["build", "tests", "benchmarks"]
    assert (tmp_path / "begun").read_text().split() == [*moments[: moments.index(moment) + 1], "outcome"]
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["tests"]["passed"] == ([] if moment == "build" else ["a::b"])
    # Tests that came to their end before it have not failed.
    assert list(found["tests"]["failed"]) == ([] if moment == "benchmarks" else ["pytest"])
    assert ("rows" in found) == (moment == "benchmarks")


def test_what_the_gpus_tests_say_is_rehearsed_on_a_cpu(tmp_path):
    files = [f"tests/gpu/test_{name}.py" for name in ("kernels", "nccl", "steps")]
    env = os.environ | {"COSMOS_MP_REHEARSE": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *files,
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        "--junitxml",
        str(tmp_path / "tests.xml"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]
    found = runpy.run_path(str(ROOT / "tests" / "gpu" / "outcome.py"))["outcome"](tmp_path / "tests.xml", done.returncode)
    assert len(found["passed"]) >= 21 and not found["failed"]
    assert found["skipped"] and all("canny" in name for name in found["skipped"]), found["skipped"]
