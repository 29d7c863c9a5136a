"""Canny against cv2, to the last pixel: compiled for the CPU, with torch alone, and the GPU's kernels, run here as plain loops."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cosmos_mp.kernels import canny as module
from cosmos_mp.kernels.canny import canny, canny_torch

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
GXX, NVCC = shutil.which("g++"), shutil.which("nvcc")
needs_sources = pytest.mark.skipif(not CSRC.is_dir() or GXX is None, reason="takes csrc/ and g++")
needs_nvcc = pytest.mark.skipif(not CSRC.is_dir() or NVCC is None, reason="takes csrc/ and nvcc")

KINDS = ["random", "levels", "flat", "ramp", "checkers", "smooth", "lines"]
SIZES = [(1, 1), (1, 2), (2, 1), (1, 37), (41, 1), (2, 2), (3, 3), (5, 31), (17, 32), (16, 33), (9, 65), (24, 40)]
THRESHOLDS = [(100, 200), (20, 50), (0, 0), (-5, 3), (-9, -2), (70, 70), (300, 90), (254, 255), (500, 1500), (0, 2039), (2040, 2040)]
HUGE = [(2040, 2041), (3, 2**31 - 1), (-(2**31), 100), (2**31 - 1, -(2**31)), (40_000, 70_000), (-40_000, 32_768)]


def draw(kind: str, rng: np.random.Generator, count: int, height: int, width: int, channels: int) -> np.ndarray:
    """uint8 frames (count, height, width, channels) of a kind of picture."""
    shape = (count, height, width, channels)
    y, x = np.mgrid[:height, :width][:, None, :, :, None]
    if kind == "random":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == "levels":  # few, so that gradients, channels and neighbours tie
        levels = rng.integers(0, 256, rng.integers(2, 5), dtype=np.uint8)
        return rng.choice(levels, shape)
    if kind == "flat":
        return np.broadcast_to(rng.integers(0, 256, (count, 1, 1, channels), dtype=np.uint8), shape).copy()
    if kind == "ramp":
        slopes = rng.integers(-40, 41, (2, count, 1, 1, channels))
        return (slopes[0] * x + slopes[1] * y).astype(np.uint8) & np.uint8(rng.choice([255, 224]))
    if kind == "checkers":
        return (((x // rng.integers(1, 6) + y // rng.integers(1, 6)) % 2) * rng.integers(0, 256, (count, 1, 1, channels))).astype(np.uint8)
    if kind == "smooth":
        small = rng.integers(0, 256, (count, height // 5 + 1, width // 5 + 1, channels), dtype=np.uint8)
        return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC).reshape(shape[1:]) for frame in small])
    frames = np.zeros(shape, np.uint8)  # long thin edges that meet, some of them faint
    for frame in frames:
        canvas = np.zeros((height, width, 3), np.uint8)
        for _ in range(12):
            a, b = (tuple(int(v) for v in rng.integers(0, (width, height))) for _ in range(2))
            cv2.line(canvas, a, b, [int(v) for v in rng.integers(0, 256, 3) // rng.integers(1, 5)], 1)
        frame[:] = canvas[:, :, :channels]
    return frames


def reference(frames: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.stack([cv2.Canny(frame, low, high) for frame in frames])


def cases(seed: int, repeats: int, count: int = 4, sizes: list[tuple[int, int]] = SIZES) -> Iterator[tuple[np.ndarray, int, int]]:
    """Frames and thresholds: every kind of picture with 1 and 3 channels, in turn through sizes and thresholds."""
    rng = np.random.default_rng(seed)
    for repeat in range(repeats):
        for number, (kind, channels) in enumerate((kind, channels) for kind in KINDS for channels in (1, 3)):
            low, high = THRESHOLDS[(7 * repeat + number) % len(THRESHOLDS)] if rng.random() < 0.5 else rng.integers(0, 700, 2).tolist()
            yield draw(kind, rng, count, *sizes[(repeat + 5 * number) % len(sizes)], channels), low, high


def assert_equal(edges: np.ndarray, frames: np.ndarray, low: int, high: int) -> None:
    expected = reference(frames, low, high)
    assert edges.dtype == np.uint8 and edges.shape == expected.shape
    assert np.array_equal(edges, expected), f"{np.count_nonzero(edges != expected)} pixels of {frames.shape} at {low}, {high}"


def build(target: Path, *words: str | Path) -> Path:
    done = subprocess.run([GXX, "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", *words, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory) -> Iterator[bool]:
    """`canny` as it is compiled from csrc/ now, where that can be; else as it is installed. Whether it is compiled."""
    if not CSRC.is_dir() or GXX is None:
        yield module.library("cpu") is not None
        return
    folder = tmp_path_factory.mktemp("library")
    build(folder / "libcanny_cpu.so", "-O3", "-fopenmp", "-shared", CSRC / "canny.cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "__file__", str(folder / "canny.py"))
        module.library.cache_clear()
        assert module.library("cpu") is not None
        yield True
    module.library.cache_clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- Equal to cv2 ---


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_cv2s_on_3000_pictures(seed):
    count = 0
    for frames, low, high in cases(seed, repeats=14):
        assert_equal(canny(torch.from_numpy(frames), low, high).numpy(), frames, low, high)
        count += len(frames)
    assert 4 * count >= 3000


def test_edges_are_cv2s_on_a_large_frame():
    rng = np.random.default_rng(0)
    frames = np.concatenate([draw(kind, rng, 1, 704, 1280, 3) for kind in ("random", "smooth", "lines")])
    assert_equal(canny(torch.from_numpy(frames), 100, 200).numpy(), frames, 100, 200)
    assert_equal(canny_torch(torch.from_numpy(frames[1:]), 20, 50).numpy(), frames[1:], 20, 50)


def snake() -> np.ndarray:
    """Two frames with one long band, bright at one end: at (30, 200) its weak edge hangs on few strong pixels far away."""
    frame = np.zeros((64, 120), np.uint8)
    for number, row in enumerate(range(4, 60, 10)):
        frame[row : row + 4, 4:-4] = 60
        if row + 14 < 64:
            frame[row : row + 14, (-8, 4)[number % 2] :][:, :4] = 60
    frame[4:8, 4:8] = 255
    return cv2.GaussianBlur(np.stack([frame, frame[::-1, ::-1]], axis=-1), (5, 5), 1).transpose(2, 0, 1)[..., None].copy()


def test_an_edge_is_followed_all_the_way():
    frames = snake()
    assert (reference(frames, 30, 200) > 0).sum() > 2000 and (reference(frames, 200, 200) > 0).sum() < 100
    for low, high in ((30, 200), (30, 300)):
        assert_equal(canny(torch.from_numpy(frames), low, high).numpy(), frames, low, high)
        assert_equal(canny_torch(torch.from_numpy(frames), low, high).numpy(), frames, low, high)


@pytest.mark.parametrize(("low", "high"), THRESHOLDS + HUGE)
def test_thresholds_are_cv2s_in_any_order_and_size(low, high):
    rng = np.random.default_rng(1)
    for channels in (1, 3):
        frames = np.concatenate([draw(kind, rng, 2, 23, 37, channels) for kind in KINDS])
        assert_equal(canny(torch.from_numpy(frames), low, high).numpy(), frames, low, high)
        assert_equal(canny_torch(torch.from_numpy(frames), low, high).numpy(), frames, low, high)


def test_a_threshold_that_no_integer_of_64_bits_holds_does_what_a_large_one_does():
    frames = torch.from_numpy(draw("random", np.random.default_rng(2), 2, 20, 20, 3))
    assert torch.equal(canny(frames, 100, 10**30), canny(frames, 100, 5000))
    assert torch.equal(canny(frames, -(10**30), 9), canny(frames, -1, 9))
    assert not canny(frames, 100, 10**30).any()


@pytest.mark.parametrize("function", [canny, canny_torch])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_each_frame_has_thresholds_of_its_own(function, dtype):
    rng = np.random.default_rng(3)
    frames = np.concatenate([draw(kind, rng, 3, 19, 45, 3) for kind in KINDS])
    low, high = rng.integers(0, 256, (2, len(frames))) if dtype == torch.uint8 else rng.integers(-20, 600, (2, len(frames)))
    edges = function(torch.from_numpy(frames), torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)).numpy()
    for number in range(len(frames)):
        one = slice(number, number + 1)
        assert_equal(edges[one], frames[one], int(low[number]), int(high[number]))
    mixed = function(torch.from_numpy(frames), 50, torch.tensor(high, dtype=dtype)[::2].repeat_interleave(2)[: len(frames)]).numpy()
    assert_equal(mixed[4:5], frames[4:5], 50, int(high[4]))


def test_the_torch_version_is_cv2s():
    for frames, low, high in cases(9, repeats=5, count=3):
        assert_equal(canny_torch(torch.from_numpy(frames), low, high).numpy(), frames, low, high)


def test_the_torch_version_works_on_some_frames_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_TORCH_PIXELS", 2 * 24 * 40)
    frames = draw("levels", np.random.default_rng(4), 5, 24, 40, 3)
    low = torch.tensor([0, 50, 100, 300, 400])
    edges = canny_torch(torch.from_numpy(frames), low, 350).numpy()
    for number in range(5):
        assert_equal(edges[number : number + 1], frames[number : number + 1], int(low[number]), 350)


def test_equal_channels_count_as_their_first():
    """With few levels channels often tie with gradients of different directions, and then their order decides."""
    frames = draw("levels", np.random.default_rng(5), 20, 24, 40, 3)
    backwards = frames[..., ::-1].copy()
    assert not np.array_equal(reference(frames, 10, 50), reference(backwards, 10, 50))
    for function in (canny, canny_torch):
        for order in (frames, backwards):
            assert_equal(function(torch.from_numpy(order), 10, 50).numpy(), order, 10, 50)


def test_frames_of_any_memory_layout():
    rng = np.random.default_rng(5)
    whole = draw("smooth", rng, 4, 30, 46, 3)
    tensor = torch.from_numpy(whole)
    for view in (
        tensor[:, :, 3:40],
        tensor[::2, 1:, ::2],
        tensor.flip(3),
        tensor.transpose(1, 2),
        tensor[..., 1:2],
        tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        tensor[:1].expand(3, -1, -1, -1),
    ):
        for function in (canny, canny_torch):
            assert_equal(function(view, 40, 90).numpy(), view.numpy().copy(), 40, 90)
    low, high = torch.arange(8)[::2] * 10, torch.tensor([80, 90]).repeat_interleave(2)
    assert torch.equal(canny(tensor, low, high), canny(tensor, low.contiguous(), high.contiguous()))
    assert np.array_equal(tensor.numpy(), whole)


# --- Threads and processes ---


def test_threads_change_nothing(compiled, threads):
    frames = np.concatenate([draw(kind, np.random.default_rng(6), 2, 180, 240, 3) for kind in KINDS])
    for number in (1, 2, 4, 64):
        threads(number)
        assert_equal(canny(torch.from_numpy(frames), 60, 150).numpy(), frames, 60, 150)
    threads(2)
    with ThreadPoolExecutor(4) as pool:  # and callers of their own
        for edges in pool.map(lambda _: canny(torch.from_numpy(frames), 60, 150), range(8)):
            assert_equal(edges.numpy(), frames, 60, 150)


def test_a_forked_process_does_not_wait_for_its_parents_threads(compiled):
    if not compiled:
        pytest.skip("torch's own threads would wait")
    script = f"""
import os, torch
from cosmos_mp.kernels import canny as module
module.__file__ = {module.__file__!r}
torch.set_num_threads(3)
frames = torch.arange(6 * 200 * 300 * 3).mul(37).to(torch.uint8).view(6, 200, 300, 3)
low = torch.full((6,), 50, dtype=torch.int32)
edges = module._canny(frames, low, low).numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(int(module._canny(frames, low, low).numpy().tobytes() != edges))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    try:
        assert process.wait(timeout=100) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


# --- The operator ---


def test_the_operator_is_registered_as_torch_wants_it():
    frames = torch.from_numpy(draw("smooth", np.random.default_rng(7), 3, 12, 17, 3))
    low, high = torch.tensor([10, 20, 30], dtype=torch.int32), torch.tensor([100, 60, 90], dtype=torch.int32)
    for arguments in ((frames, low, high), (frames[..., :1], low, high), (frames.transpose(1, 2), low, high[:1].expand(3))):
        torch.library.opcheck(torch.ops.cosmos_mp.canny.default, arguments)


def test_a_meta_tensor_tells_the_shape():
    edges = canny(torch.empty(5, 7, 9, 3, dtype=torch.uint8, device="meta"), 1, 2)
    assert edges.shape == (5, 7, 9) and edges.dtype == torch.uint8 and edges.device.type == "meta"
    with pytest.raises(ValueError, match="give"):
        canny(torch.empty(5, 7, 9, 4, dtype=torch.uint8, device="meta"), 1, 2)


def test_no_frames_have_no_edges():
    for function in (canny, canny_torch):
        edges = function(torch.empty(0, 7, 9, 3, dtype=torch.uint8), 1, torch.empty(0, dtype=torch.int64))
        assert edges.shape == (0, 7, 9) and edges.dtype == torch.uint8


@pytest.mark.parametrize("function", [canny, canny_torch])
@pytest.mark.parametrize(
    ("frames", "low", "high", "error", "words"),
    [
        (torch.zeros(1, 4, 4, 3), 1, 2, TypeError, "frames are torch.float32; give uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), 1, 2, ValueError, r"frames are \(4, 4, 3\); give \(F, H, W, C\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 1, 2, ValueError, r"\(1, 3, 4, 4\).*C 1 or 3"),
        (torch.zeros(1, 0, 4, 3, dtype=torch.uint8), 1, 2, ValueError, "at least one pixel"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 1.5, 2, TypeError, "low is 1.5; give a whole number"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 1, True, TypeError, "high is True; give a whole number"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 1, None, TypeError, "high is None"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1), 2, TypeError, "low is torch.float32; give whole numbers"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 1, torch.zeros(2, dtype=torch.int32), ValueError, r"high is \(2,\) for 1 frames"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.tensor(1), 2, ValueError, r"low is \(\) for 1 frames"),
    ],
)
def test_what_is_no_frame_or_threshold_is_refused(function, frames, low, high, error, words):
    with pytest.raises(error, match=words):
        function(frames, low, high)


def test_the_bare_operator_refuses_what_it_would_misread(compiled):
    frames, threshold = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    operator = torch.ops.cosmos_mp.canny
    if compiled:
        for wrong in (threshold.long(), threshold[:1], threshold[:, None]):
            with pytest.raises(ValueError, match="the operator takes int32"):
                operator(frames, threshold, wrong)
            with pytest.raises(ValueError, match="the operator takes int32"):
                operator(frames, wrong, threshold)
    with pytest.raises(TypeError, match="give uint8"):
        operator(frames.float(), threshold, threshold)
    with pytest.raises(ValueError, match="C 1 or 3"):
        operator(frames[..., :2], threshold, threshold)


# --- The library is found ---


def load_from(monkeypatch, package: Path, path: list[str]) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(module, "__file__", str(package / "canny.py"))
        patch.setattr(sys, "path", path)
        return module.library.__wrapped__("cpu")


def test_the_library_of_another_installation_is_found(compiled, monkeypatch, tmp_path):
    """A checkout in front of a container image's installation has no compiled library beside it."""
    if not compiled:
        pytest.skip("no library")
    folder = tmp_path / "site" / "cosmos_mp" / "kernels"
    folder.mkdir(parents=True)
    shutil.copy(Path(module.__file__).with_name("libcanny_cpu.so"), folder)
    assert load_from(monkeypatch, tmp_path, [str(tmp_path)]) is None
    assert load_from(monkeypatch, tmp_path, [str(tmp_path), str(tmp_path / "site")]) is not None
    assert load_from(monkeypatch, folder, []) is not None


@needs_sources
def test_a_library_that_does_not_fit_is_passed_over_with_a_warning(monkeypatch, tmp_path):
    (tmp_path / "libcanny_cpu.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="libcanny_cpu.so does not load.*install the package again"):
        assert load_from(monkeypatch, tmp_path, []) is None
    (tmp_path / "other").mkdir()
    (tmp_path / "empty.cpp").write_text('extern "C" int cosmos_mp_canny_cpu_0() { return 0; }\n')  # of another version
    build(tmp_path / "other" / "libcanny_cpu.so", "-shared", tmp_path / "empty.cpp")
    with pytest.warns(UserWarning, match="cosmos_mp_canny_cpu_1"):
        assert load_from(monkeypatch, tmp_path / "other", []) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_from(monkeypatch, tmp_path / "none", []) is None


# --- The sources ---


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Callable[..., np.ndarray]:
    """`twin(frames, low, high, together, order, depth, threads)`: the GPU's kernels on the CPU, see cuda_on_cpu.h."""
    words = ("-O2", "-shared", "-pthread", "-x", "c++", "-include", HERE / "cuda_on_cpu.h", CSRC / "canny.cu")
    library = ctypes.CDLL(str(build(tmp_path_factory.mktemp("twin") / "libtwin.so", *words)))

    def run(frames: np.ndarray, low, high, together: int = 3, order: int = 0, depth: int = 1, threads: int = 1) -> np.ndarray:
        count, height, width, _ = frames.shape
        pixels = min(together, count) * height * width
        low_F, high_F = (np.broadcast_to(np.asarray(threshold, np.int32), count).copy() for threshold in (low, high))
        edges, gradients, labels = np.full(frames.shape[:3], 7, np.uint8), np.full(pixels, 7, np.uint16), np.full(pixels, -7, np.int32)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (frames, low_F, high_F, edges, gradients, labels)]
        sizes = [ctypes.c_int64(size) for size in (*frames.shape, together)]
        library.cuda_on_cpu(order, depth, threads)
        assert library.cosmos_mp_canny_cuda_1(pointers[0], *sizes[:4], *pointers[1:4], sizes[4], *pointers[4:], 0, None) == 0
        return edges

    return run


@needs_sources
def test_the_gpus_kernels_are_cv2s(twin):
    count = 0
    for number, (frames, low, high) in enumerate(cases(11, repeats=30)):
        assert_equal(twin(frames, low, high, together=1 + number % 5, order=number % 3, depth=1 + number % 4), frames, low, high)
        count += len(frames)
    assert count >= 1500
    frames = draw("random", np.random.default_rng(12), 2, 23, 70, 3)
    for low, high in THRESHOLDS + HUGE:
        assert_equal(twin(frames, low, high), frames, low, high)
    frames = draw("random", np.random.default_rng(12), 5, 40, 70, 3)
    low, high = np.array([100, 700, 500, 900, 300]), np.array([900, 1000, 800, 1000, 600])
    edges = twin(frames, low, high, together=2)
    for number in range(5):
        assert_equal(edges[number : number + 1], frames[number : number + 1], int(low[number]), int(high[number]))


@needs_sources
@pytest.mark.parametrize(
    ("order", "depth", "threads"), [(0, 1, 1), (1, 1, 1), (2, 1, 1), (0, 2, 1), (0, 30, 1), (2, 9, 1), (1, 5, 4), (2, 1, 4)]
)
def test_the_order_of_the_gpus_threads_changes_nothing(twin, order, depth, threads):
    rng = np.random.default_rng(13)
    for kind in ("smooth", "lines", "levels", "random"):
        frames = draw(kind, rng, 3, 96, 130, 3)
        for low, high in ((10, 400), (60, 150)):
            assert_equal(twin(frames, low, high, order=order, depth=depth, threads=threads), frames, low, high)
    assert_equal(twin(snake(), 30, 200, order=order, depth=depth, threads=threads), snake(), 30, 200)


@needs_sources
@pytest.mark.parametrize(
    ("source", "checks"), [("canny.cpp", "address,undefined"), ("canny.cu", "address,undefined"), ("canny.cu", "thread")]
)
def test_sanitizers_find_nothing(source, checks, tmp_path):
    """Of the memory and the arithmetic; and of what the GPU's threads do to each other's memory."""
    options = ["-O1", "-g", "-fopenmp", f"-fsanitize={checks}", "-fno-sanitize-recover=all"]
    twin = ["-x", "c++", "-include", HERE / "cuda_on_cpu.h"] if source == "canny.cu" else []
    build(tmp_path / "canny.o", *options, "-c", *twin, CSRC / source)
    driver = build(tmp_path / "driver", *options, *(["-DTWIN"] if twin else []), tmp_path / "canny.o", HERE / "canny_driver.cpp")
    rng, expected = np.random.default_rng(14), []
    with (tmp_path / "cases").open("wb") as file:
        for number, size in enumerate([*SIZES, (64, 64), (7, 8), (8, 7), (1, 300), (300, 1), (180, 200)]):
            for channels in (1, 3):
                frames = draw(KINDS[(number + channels) % len(KINDS)], rng, 3, *size, channels)
                low, high = (THRESHOLDS + HUGE)[(2 * number + channels) % len(THRESHOLDS + HUGE)]
                file.write(np.array([*frames.shape, low, high], np.int64).tobytes() + frames.tobytes())
                expected.append(reference(frames, low, high).tobytes())
    done = subprocess.run([driver, tmp_path / "cases", tmp_path / "answers"], capture_output=True, text=True, timeout=100)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's memory layout is not for the thread sanitizer")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "answers").read_bytes() == b"".join(expected)


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_nvcc_compiles_the_gpus_kernels(target, tmp_path):
    cubin = tmp_path / "canny.cubin"
    words = [NVCC, "-std=c++17", "-O3", "-cubin", f"-arch={target}", "-Werror=all-warnings", "-o", cubin, CSRC / "canny.cu"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cubin.read_bytes()[:4] == b"\x7fELF"


# --- The installation ---


def checkout(folder: Path) -> Path:
    """What building takes, without anything built; of the package, just this module."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(CSRC, folder / "csrc")
    kernels = folder / "cosmos_mp" / "kernels"
    kernels.mkdir(parents=True)
    shutil.copy(ROOT / "cosmos_mp" / "kernels" / "canny.py", kernels)
    for package in (kernels, kernels.parent):
        (package / "__init__.py").touch()
    return folder


def set_up(folder: Path, *words: str, **environment: str) -> str:
    command = [sys.executable, "setup.py", "-q", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


PROBE = """
import cv2, numpy as np, torch
from cosmos_mp.kernels import canny
frames = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
edges = canny.canny(torch.from_numpy(frames), 100, 200).numpy()
assert np.array_equal(edges, np.stack([cv2.Canny(frame, 100, 200) for frame in frames]))
print(canny.__file__, "compiled" if canny.library("cpu") else "torch")
"""


def probe(folder: Path) -> str:
    """How a fresh Python in this folder makes edges, having found them equal to cv2's: "compiled" or "torch"."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    file, how = done.stdout.split()
    assert Path(file).is_relative_to(folder)
    return how


@needs_sources
def test_an_installation_compiles_the_library(tmp_path):
    folder = checkout(tmp_path.resolve())
    set_up(folder, "build_ext", "--inplace")
    assert (folder / "cosmos_mp" / "kernels" / "libcanny_cpu.so").is_file()
    assert probe(folder) == "compiled"
    set_up(folder, "bdist_wheel", "--dist-dir", "made", "sdist", "--dist-dir", "made")
    wheel, source = (next((folder / "made").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    shutil.unpack_archive(wheel, folder / "wheel", "zip")
    shutil.unpack_archive(source, folder / "source")
    assert (folder / "wheel" / "cosmos_mp" / "kernels" / "libcanny_cpu.so").is_file()
    assert {path.name for path in (folder / "source").glob("*/csrc/*")} >= {"canny.h", "canny.cpp", "canny.cu"}


@needs_sources
def test_without_a_compiler_an_installation_works_with_torch(tmp_path):
    folder = checkout(tmp_path.resolve())
    broken = dict(CC="no-such-compiler", CXX="no-such-compiler", PATH=str(folder))
    set_up(folder, "build_ext", "--inplace", "bdist_wheel", "--dist-dir", "made", **broken)
    assert len(list((folder / "made").glob("*.whl"))) == 1
    assert not list(folder.rglob("*.so"))
    assert probe(folder) == "torch"


@needs_nvcc
def test_beside_a_torch_with_cuda_the_gpus_library_is_built(tmp_path):
    folder = checkout(tmp_path.resolve())
    (folder / "torch.py").write_text("from types import SimpleNamespace\nversion = SimpleNamespace(cuda='13.0')\n")
    set_up(folder, "build_ext", "--inplace", PYTHONPATH=str(folder))
    library = ctypes.CDLL(str(folder / "cosmos_mp" / "kernels" / "libcanny_cuda.so"))
    if not torch.cuda.is_available():  # CUDA's error comes back
        assert library.cosmos_mp_canny_cuda_1(*[ctypes.c_int64(0)] * 13) != 0
    (folder / "torch.py").write_text("from types import SimpleNamespace\nversion = SimpleNamespace(cuda=None)\n")
    (folder / "cosmos_mp" / "kernels" / "libcanny_cuda.so").unlink()
    shutil.rmtree(folder / "build")
    set_up(folder, "build_ext", "--inplace", PYTHONPATH=str(folder))
    assert not (folder / "cosmos_mp" / "kernels" / "libcanny_cuda.so").exists()


@needs_sources
@pytest.mark.parametrize("blackwell", [True, False])
def test_the_gpus_library_is_for_what_the_compiler_knows(tmp_path, blackwell):
    folder = checkout(tmp_path.resolve())
    (folder / "torch.py").write_text("from types import SimpleNamespace\nversion = SimpleNamespace(cuda='12.6')\n")
    known = "sm_80 sm_90" + " sm_100" * blackwell
    (folder / "nvcc").write_text(f'#!/bin/sh\nif [ "$1" = --list-gpu-code ]; then echo {known}; else echo "$@" > {folder}/words; fi\n')
    (folder / "nvcc").chmod(0o755)
    set_up(folder, "build_ext", "--inplace", PYTHONPATH=str(folder), PATH=f"{folder}:{os.environ['PATH']}")
    words = (folder / "words").read_text().split()
    assert "-gencode=arch=compute_90,code=sm_90" in words and "-gencode=arch=compute_90,code=compute_90" in words
    assert ("-gencode=arch=compute_100,code=sm_100" in words) == blackwell
