"""Controls: edges equal to cv2's on the colours, keyed draws, and ready-made videos that must belong to their clip."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from cosmos_mp.data import controls
from cosmos_mp.data.clips import ClipRecord, fit
from cosmos_mp.data.controls import EDGE_PRESETS, edge, edge_thresholds, make_control, read_control, vis
from cosmos_mp.data.synthetic import render
from cosmos_mp.data.video import read_video, write_video
from cosmos_mp.evaluate.metrics import sharpness

KEYS = dict(seed=0, clip_id="a", draw=0)


def _record(**changes) -> ClipRecord:
    return ClipRecord(
        **{
            **dict(id="a", video="videos/a.mp4", num_frames=9, fps=8.0, width=64, height=64, codec="h264", pix_fmt="yuv420p"),
            **dict(color_space="smpte170m", caption="a caption", sha256="0" * 64),
            **changes,
        }
    )


def _isoluminant() -> np.ndarray:
    """Colours of nearly equal gray side by side: an edge that only colour shows."""
    frames = np.empty((2, 32, 32, 3), np.uint8)
    frames[:, :, :16], frames[:, :, 16:] = (200, 50, 50), (30, 137, 50)
    return frames


# --- Edges ---


@pytest.mark.parametrize("thresholds", [(20, 50), (100, 200), (300, 400)])
def test_edges_are_cv2s_on_the_colours(thresholds):
    frames = np.concatenate([render(0, 1)[0], np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)])
    edges = edge(frames, *thresholds)
    assert edges.shape == frames.shape and edges.dtype == np.uint8 and set(np.unique(edges)) == {0, 255}
    for frame, result in zip(frames, edges, strict=True):
        assert np.array_equal(result, np.repeat(cv2.Canny(frame, *thresholds)[..., None], 3, axis=-1))


def test_edges_are_not_those_of_gray():
    frames = _isoluminant()
    assert not cv2.Canny(cv2.cvtColor(frames[0], cv2.COLOR_RGB2GRAY), 100, 200).any()
    assert (edge(frames, 100, 200)[:, 2:-2] == 255).any(axis=(2, 3)).all()


def test_edges_take_frames_of_any_memory_layout():
    frames = render(0, 1)[0]
    assert np.array_equal(edge(frames[:, :, ::-1], 100, 200), edge(frames[:, :, ::-1].copy(), 100, 200))


def test_presets_are_the_references():
    assert EDGE_PRESETS == {
        "none": (20, 50),
        "very_low": (20, 50),
        "low": (50, 100),
        "medium": (100, 200),
        "high": (200, 300),
        "very_high": (300, 400),
    }
    assert edge_thresholds("high", **KEYS) == (200, 300)
    with pytest.raises(ValueError, match="unknown edge preset 'strong'; use random, none, very_low"):
        edge_thresholds("strong", **KEYS)


def test_random_thresholds_cover_their_ranges():
    drawn = [edge_thresholds("random", seed=0, clip_id="a", draw=draw) for draw in range(6000)]
    lows, highs = np.array(drawn).T
    assert lows.min() == 20 and lows.max() == 99 and len(set(lows.tolist())) == 80
    gaps = (highs - lows)[highs < 255]  # not clipped at 255
    assert gaps.min() == 50 and gaps.max() == 149 and highs.max() <= 248 + 7
    assert abs(lows.mean() - 59.5) < 1 and abs((highs - lows).mean() - 99.5) < 1.2


def test_random_thresholds_are_keyed():
    def drawn(seed: int = 0, clip_id: str = "a", first: int = 0) -> list:
        return [edge_thresholds("random", seed=seed, clip_id=clip_id, draw=first + draw) for draw in range(20)]

    assert drawn() == drawn()
    assert len({tuple(drawn(*key)) for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 20))}) == 4


# --- Blur ---


def test_vis_is_keyed_and_blurs():
    frames = render(0, 0)[0]
    results = [vis(frames, seed=0, clip_id="a", draw=draw) for draw in range(8)]
    for draw, blurred in enumerate(results):
        assert blurred.shape == frames.shape and blurred.dtype == np.uint8
        assert sharpness(blurred) < 0.1 * sharpness(frames)
        assert abs(blurred.mean() - frames.mean()) < 8 and blurred.std() > 1  # blurred, not blank
        assert np.array_equal(blurred, vis(frames, seed=0, clip_id="a", draw=draw))
    assert len({result.tobytes() for result in results}) == 8
    assert not np.array_equal(results[0], vis(frames, seed=1, clip_id="a", draw=0))
    assert not np.array_equal(results[0], vis(frames, seed=0, clip_id="b", draw=0))


def test_vis_draws_once_per_clip():
    frames = np.repeat(render(0, 0)[0][:1], 4, axis=0)
    blurred = vis(frames, **KEYS)
    assert (blurred == blurred[:1]).all()


def test_vis_draws_from_the_references_ranges(monkeypatch):
    """Listens to the library's own calls; the pictures stay real."""
    calls = []
    for name in ("bilateralFilter", "GaussianBlur", "resize"):
        original = getattr(cv2, name)
        monkeypatch.setattr(controls.cv2, name, lambda *a, _f=original, _n=name, **k: calls.append((_n, *a[1:])) or _f(*a, **k))
    sizes = []
    monkeypatch.setattr(controls, "resize", lambda x, h, w, _f=controls.resize: sizes.append((h, w)) or _f(x, h, w))
    frame = np.random.default_rng(0).integers(0, 256, (1, 36, 36, 3), dtype=np.uint8)
    filters, reductions, scales = Counter(), Counter(), Counter()
    for draw in range(300):
        del calls[:], sizes[:]
        vis(frame, seed=0, clip_id="a", draw=draw)
        bilateral = [call for call in calls if call[0] == "bilateralFilter"]
        gaussian = [call for call in calls if call[0] == "GaussianBlur"]
        filters[bool(bilateral), bool(gaussian)] += 1
        assert len(bilateral) <= 3 and len(gaussian) <= 1
        for _, diameter, sigma_colour, sigma_space in bilateral:
            assert 15 <= diameter <= 49 and 100 <= sigma_colour <= 299 and 50 <= sigma_space <= 149
        for _, (kernel, _), sigma in gaussian:
            assert kernel in (21, 23, 25, 27, 29) and 10.5 <= sigma <= 14.5
        reduced = [call[1] for call in calls if call[0] == "resize"]
        reductions[36 // reduced[0][0] if len(reduced) == 2 else 1] += 1
        assert reduced[-1] == (36, 36)
        assert sizes[1] == (36, 36)
        scales[sizes[0]] += 1
    shares = {kind: count / 300 for kind, count in filters.items()}
    assert shares == pytest.approx({(True, False): 0.5, (False, True): 0.3, (True, True): 0.2}, abs=0.06)
    assert set(reductions) == {1, 2, 3, 4} and min(reductions.values()) > 50
    assert set(scales) == {(36 // scale, 36 // scale) for scale in range(4, 18)}


def test_vis_takes_small_frames():
    assert vis(np.full((1, 2, 6, 3), 9, np.uint8), **KEYS).shape == (1, 2, 6, 3)


# --- Ready-made controls ---


def _depth(root: Path, frames: int = 9, size: int = 64, clip_id: str = "a") -> np.ndarray:
    ramp = np.linspace(0, 200, frames)[:, None, None, None] + np.arange(size)[None, None, :, None] * 0.5
    write_video(root / "depth" / f"{clip_id}.mp4", np.broadcast_to(ramp, (frames, size, size, 3)).astype(np.uint8), 8)
    return read_video(root / "depth" / f"{clip_id}.mp4")[0]


def test_a_ready_made_control_is_read_at_the_clips_window(tmp_path):
    depth = _depth(tmp_path)
    assert np.array_equal(read_control(tmp_path, "depth", _record(), 1, 3, 2), depth[1:6:2])
    assert np.array_equal(read_control(tmp_path, "depth", _record(), 0, 9), depth)
    assert np.array_equal(read_control(tmp_path, "depth", _record(), 8, 1, 4), depth[8:])
    nested = _depth(tmp_path, clip_id="train/x/b")
    assert np.array_equal(read_control(tmp_path, "depth", _record(id="train/x/b"), 0, 9), nested)


def test_a_control_of_another_clip_is_refused(tmp_path):
    _depth(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"seg/a.mp4: no seg control of clip a; make it"):
        read_control(tmp_path, "seg", _record(), 0, 3)
    for other in (_record(num_frames=8), _record(num_frames=10), _record(width=32), _record(height=32)):
        with pytest.raises(ValueError, match=r"depth/a.mp4: 9 frames of 64x64, but the clip has .*; make the control again"):
            read_control(tmp_path, "depth", other, 0, 3)
    for window in ((0, 10, 1), (7, 3, 1), (3, 4, 2), (-1, 2, 1), (0, 0, 1), (0, 2, 0)):
        with pytest.raises(ValueError, match="depth/a.mp4: no window"):
            read_control(tmp_path, "depth", _record(), *window)


# --- The one entry ---


def test_one_entry_makes_every_kind(tmp_path):
    frames = render(0, 0)[0][1:6:2]
    common = dict(seed=3, draw=2)

    def make(kind: str, preset: str = "random") -> np.ndarray:
        return make_control(kind, frames, _record(), tmp_path, 1, 2, preset=preset, **common)

    assert np.array_equal(make("edge"), edge(frames, *edge_thresholds("random", clip_id="a", **common)))
    assert np.array_equal(make("edge", "very_low"), edge(frames, 20, 50))
    assert np.array_equal(make("vis"), vis(frames, clip_id="a", **common))
    depth = _depth(tmp_path)
    for kind in ("depth", "keypoint", "seg"):
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / "a.mp4").write_bytes((tmp_path / "depth" / "a.mp4").read_bytes())
        assert np.array_equal(make(kind), depth[1:6:2])


def test_a_ready_made_control_takes_the_fit_of_its_clip(tmp_path):
    depth = _depth(tmp_path)
    frames, _ = fit(render(0, 0)[0], 32, 56)
    made = make_control("depth", frames, _record(), tmp_path, 0, preset="random", seed=0, draw=0)
    assert made.shape == frames.shape and np.array_equal(made, fit(depth, 32, 56)[0])


def test_unknown_kinds_and_wrong_frames_are_refused(tmp_path):
    frames = render(0, 0)[0]
    with pytest.raises(ValueError, match="unknown control 'hint'; use edge, vis, depth, keypoint, seg"):
        make_control("hint", frames, _record(), tmp_path, 0, preset="random", seed=0, draw=0)
    for make in (lambda x: edge(x, 100, 200), lambda x: vis(x, **KEYS)):
        with pytest.raises(ValueError, match="uint8 array"):
            make(frames.astype(np.float32))
