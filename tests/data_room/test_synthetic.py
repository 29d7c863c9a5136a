"""The made-up world: what the caption tells is what is seen, and nothing more."""

import json
import re

import cv2
import numpy as np
import pytest

from cosmos_mp.data.synthetic import BACKGROUNDS, COLOURS, DIRECTIONS, KINDS, STRIPES, render, synthesize
from cosmos_mp.data.video import probe, read_video

CAPTION = re.compile(r"a (\w+) (\w+) moving (\w+) over a (\w+) background with (\w+) stripes")


def _shape_mask(frames: np.ndarray, caption: str) -> np.ndarray:
    """Where the shape is (F, H, W), by its colour."""
    colour = 255 * np.array(COLOURS[CAPTION.fullmatch(caption)[1]])
    return np.abs(frames - colour).max(axis=-1) < 40


def _with(word: str) -> tuple[np.ndarray, str]:
    """The first clip whose caption holds the word."""
    return next(clip for index in range(200) for clip in [render(0, index)] if f" {word} " in clip[1])


def test_a_clip_depends_on_seed_and_index_alone():
    frames, caption = render(3, 5)
    render(3, 6)
    again, same_caption = render(3, 5)
    assert frames.shape == (9, 64, 64, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, again) and caption == same_caption
    assert not np.array_equal(frames, render(3, 6)[0]) and not np.array_equal(frames, render(4, 5)[0])


def test_captions_use_every_attribute():
    words = [CAPTION.fullmatch(render(0, index)[1]).groups() for index in range(120)]
    for seen, known in zip(zip(*words, strict=True), (COLOURS, KINDS, DIRECTIONS, BACKGROUNDS, STRIPES), strict=True):
        assert set(seen) == set(known)
    assert len(KINDS) == 3 and len(COLOURS) == 6 and len(DIRECTIONS) == 4 and len(BACKGROUNDS) == 4


@pytest.mark.parametrize(("direction", "axis", "sign"), [("left", 2, -1), ("right", 2, 1), ("up", 1, -1), ("down", 1, 1)])
def test_the_shape_moves_as_told_and_stays_inside(direction, axis, sign):
    frames, caption = _with(direction)
    mask = _shape_mask(frames, caption)
    centres = np.array([[np.nonzero(frame)[0].mean(), np.nonzero(frame)[1].mean()] for frame in mask])
    steps = (centres[-1] - centres[0]) / (len(frames) - 1)
    assert 0.35 <= sign * steps[axis - 1] <= 0.95 and abs(steps[2 - axis]) < 0.05
    assert not mask[:, [0, -1]].any() and not mask[:, :, [0, -1]].any()
    assert mask.any(axis=(1, 2)).all()


def test_long_ways_stay_inside_too():
    for index in range(40):
        frames, caption = render(0, index, frames=34)
        mask = _shape_mask(frames, caption)
        assert mask.any(axis=(1, 2)).all() and not mask[:, [0, -1]].any() and not mask[:, :, [0, -1]].any(), caption


def test_kinds_have_their_shapes():
    """Share of the bounding box that is filled: circle pi/4, square 1, triangle 1/2."""
    for kind, share in (("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)):
        frames, caption = _with(kind)
        rows, columns = np.nonzero(_shape_mask(frames, caption)[0])
        assert len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1) == pytest.approx(share, abs=0.12), kind


def test_the_edge_fades_over_a_pixel_and_a_half():
    counts = []
    for index in range(150):
        frames, caption = render(0, index)
        colour, kind, _, _, stripes = CAPTION.fullmatch(caption).groups()
        if kind != "square" or stripes == "vertical":
            continue
        row = frames[0, int(np.nonzero(_shape_mask(frames, caption)[0])[0].mean())].astype(float)  # through the square: plain, edge, plain
        mixed = (np.abs(row - row[0]).max(axis=-1) > 2) & (np.abs(row - 255 * np.array(COLOURS[colour])).max(axis=-1) > 2)
        counts.append(mixed.sum() / 2)
    assert len(counts) > 20 and np.mean(counts) == pytest.approx(1.5, abs=0.2)


def test_stripes_and_hue_vary_unseen_by_the_caption():
    backgrounds = {}
    for index in range(400):
        frames, caption = render(0, index)
        _, _, _, background, stripes = CAPTION.fullmatch(caption).groups()
        backgrounds.setdefault((background, stripes), []).append(frames[0, :, 0] if stripes == "horizontal" else frames[0, 0])
    for (background, stripes), lines in backgrounds.items():
        lines = np.array(lines, float)
        luma = lines.mean(axis=-1)
        detrended = luma - luma.mean(axis=1, keepdims=True)
        hue = (lines - luma[..., None])[:, 32]
        assert hue.std(axis=0).max() > 1.5, background
        if stripes == "vertical":  # a row: no gradient along it, a full stripe of +-.09
            assert np.abs(detrended).max(axis=1) == pytest.approx(np.full(len(luma), 23), abs=4)
            assert detrended[:, 32].std() > 8  # the phase
        if stripes == "no":
            assert np.abs(detrended).max() < 1


@pytest.mark.parametrize("start", [0, 4096])
def test_stripes_stay_below_canny_and_shapes_above(tmp_path, start):
    synthesize(tmp_path, 40, seed=0, start=start)
    for index in range(start, start + 40):
        frames, _ = read_video(tmp_path / "videos" / f"{index:06d}.mp4")
        caption = (tmp_path / "metas" / f"{index:06d}.txt").read_text().strip()
        near = np.array([cv2.dilate(mask.astype(np.uint8), np.ones((13, 13))) for mask in _shape_mask(frames, caption)])
        edges = np.array([cv2.Canny(frame, 100, 200) for frame in frames]) > 0
        assert near.mean() < 0.5
        assert not (edges & (near == 0)).any(), f"clip {index}: background edges ({caption})"
        assert (edges & (near == 1)).sum(axis=(1, 2)).min() > 20, f"clip {index}: no outline ({caption})"


def test_files_show_what_render_draws(tmp_path):
    synthesize(tmp_path, 6, seed=1)
    errors = [np.square(read_video(tmp_path / "videos" / f"{i:06d}.mp4")[0] - render(1, i)[0].astype(float)).mean() for i in range(6)]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 33
    facts = probe(tmp_path / "videos" / "000000.mp4")
    assert (facts.num_frames, facts.fps, facts.width, facts.height, facts.pix_fmt) == (9, 8.0, 64, 64, "yuv420p")


def test_only_what_is_missing_is_written(tmp_path):
    synthesize(tmp_path, 3, seed=1)
    files = sorted((tmp_path / "videos").iterdir()) + sorted((tmp_path / "metas").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.{suffix}" for suffix in ("mp4", "txt") for i in range(3)]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    files[1].unlink()
    files[5].unlink()
    synthesize(tmp_path, 4, seed=1)
    assert (tmp_path / "videos" / "000003.mp4").exists()
    for number, file in enumerate(files):
        assert file.read_bytes() == before[file][1]
        if number in (0, 3):
            assert file.stat().st_mtime_ns == before[file][0]


def test_other_settings_do_not_mix_into_a_folder(tmp_path):
    synthesize(tmp_path, 1, seed=1)
    with pytest.raises(ValueError, match="use another folder"):
        synthesize(tmp_path, 2, seed=2)
    assert json.loads((tmp_path / "synthetic.json").read_text())["seed"] == 1
    assert len(list((tmp_path / "videos").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"start": -1}, "start=-1"),
        ({"frames": 0}, "frames=0"),
        ({"frames": 90}, "64x64 for 90 frames"),
        ({"height": 20}, "64x20"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "out", **({"count": 1, "seed": 0} | options))
    assert not (tmp_path / "out").exists()


def test_other_sizes_hold_the_shape_too():
    frames, caption = render(0, 0, frames=5, height=144, width=256)
    assert frames.shape == (5, 144, 256, 3) and _shape_mask(frames, caption).any(axis=(1, 2)).all()
