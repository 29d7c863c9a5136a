"""Real video files of a small made-up world, with captions: a shape moves over a background.

Kind, colour, direction, background hue and stripe kind stand in the caption; where the shape is stands in its edges. The stripes' phase and
the exact hue stand in neither: a generator must invent them, and a blurred answer shows it. The stripes lie below Canny's (100, 200).
"""

from __future__ import annotations

import colorsys
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cosmos_mp.data.video import write_video
from cosmos_mp.files import write_text
from cosmos_mp.parallel.noise import generator

KINDS = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.88, 0.10, 0.10),
    "green": (0.10, 0.78, 0.15),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.96, 0.90, 0.10),
    "white": (0.97, 0.97, 0.97),
    "black": (0.03, 0.03, 0.03),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y), y downwards."""
BACKGROUNDS = {"rust": 0.05, "moss": 0.30, "teal": 0.50, "plum": 0.83}
"""Mean hue, in turns; a clip's own hue lies within `_HUE_SPREAD` of it."""
STRIPES = ("no", "horizontal", "vertical")

STRIPE_PERIOD = 21.3  # pixels
STRIPE_AMPLITUDE = 0.09  # of full range
_HUE_SPREAD, _SATURATION, _VALUE = 0.04, 0.45, 0.50
_GRADIENT = 0.06  # lighter at the top by this much of full range, darker at the bottom
_RADIUS = (0.14, 0.18)  # of the smaller side
_SPEED = (0.4, 0.9)  # pixels per frame
_EDGE = 1.5  # pixels over which the shape fades out
_REACH = 1.24  # farthest point of any shape, in radii: the triangle's corners


def _distance(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to a shape's outline, negative inside; unit slope across every side."""
    if kind == "circle":
        return np.hypot(x, y) - radius
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    slanted = np.abs(x) * math.cos(math.pi / 6) - y * math.sin(math.pi / 6)
    return np.maximum(slanted, y) - 0.62 * radius


def _check_size(frames: int, height: int, width: int) -> None:
    if frames < 1:
        raise ValueError(f"synthetic clips need at least 1 frame, got frames={frames}")
    room = 2 * (_REACH * _RADIUS[1] * min(height, width) + _EDGE) + _SPEED[1] * (frames - 1)
    if min(height, width) < max(room, STRIPE_PERIOD):
        raise ValueError(f"a shape cannot stay inside {width}x{height} for {frames} frames; make the frame larger or the clip shorter")


def render(seed: int, index: int, *, frames: int = 9, height: int = 64, width: int = 64) -> tuple[np.ndarray, str]:
    """Clip `index`: uint8 RGB frames (F, H, W, 3) and its caption of 12 words; depends on the arguments alone.

    Raises ValueError if the shape could leave the picture.
    """
    _check_size(frames, height, width)
    draws = iter(torch.rand(11, generator=generator(seed, "synthetic", 0, index), dtype=torch.float64).tolist())

    def choose(options: tuple[str, ...]) -> str:
        return options[int(next(draws) * len(options))]

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(draws)

    kind, colour, direction = choose(KINDS), choose(tuple(COLOURS)), choose(tuple(DIRECTIONS))
    background, stripes = choose(tuple(BACKGROUNDS)), choose(STRIPES)
    hue = BACKGROUNDS[background] + between(-_HUE_SPREAD, _HUE_SPREAD)
    phase = between(0, 2 * math.pi)
    radius = between(*_RADIUS) * min(height, width)
    speed = between(*_SPEED)

    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float64)
    luminance_HW = _GRADIENT * (1 - 2 * y_HW / (height - 1))
    if stripes != "no":
        along_HW = y_HW if stripes == "horizontal" else x_HW
        luminance_HW += STRIPE_AMPLITUDE * np.sin(2 * math.pi * along_HW / STRIPE_PERIOD + phase)
    scene_HWC = np.array(colorsys.hsv_to_rgb(hue % 1, _SATURATION, _VALUE)) + luminance_HW[..., None]

    margin, step, time_F = _REACH * radius + _EDGE, DIRECTIONS[direction], np.arange(frames)

    def path(side: int, sign: int) -> np.ndarray:
        """Centre of the shape along one axis, all of the way inside the picture."""
        travel = sign * speed * (frames - 1)
        return between(margin - min(travel, 0), side - 1 - margin - max(travel, 0)) + sign * speed * time_F

    centre_x_F, centre_y_F = path(width, step[0]), path(height, step[1])
    distance_FHW = _distance(kind, x_HW - centre_x_F[:, None, None], y_HW - centre_y_F[:, None, None], radius)
    cover_FHWC = np.clip(0.5 - distance_FHW / _EDGE, 0, 1)[..., None]
    video_FHWC = scene_HWC + cover_FHWC * (np.array(COLOURS[colour]) - scene_HWC)
    caption = f"a {colour} {kind} moving {direction} over a {background} background with {stripes} stripes"
    return np.rint(video_FHWC * 255).astype(np.uint8), caption


def synthesize(
    out: Path, count: int, *, seed: int, frames: int = 9, height: int = 64, width: int = 64, fps: float = 8.0, start: int = 0
) -> None:
    """Writes clips `start` .. `start + count - 1` as `out/videos/000000.mp4` and `out/metas/000000.txt`; those already there are kept.

    Raises ValueError on sizes that do not work, or if `out` holds clips made with other settings.
    """
    _check_size(frames, height, width)
    if count < 1 or start < 0:
        raise ValueError(f"{out}: nothing to make from count={count}, start={start}; ask for at least one clip, from 0 on")
    settings = {"seed": seed, "frames": frames, "height": height, "width": width, "fps": float(fps)}
    note = out / "synthetic.json"
    if note.exists() and (found := json.loads(note.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{out}: holds clips of {found}, now asked for {settings}; use another folder or remove this one")
    for room in ("videos", "metas"):
        (out / room).mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(settings) + "\n")
    for index in tqdm(range(start, start + count), desc="synthetic clips", unit="clip", disable=None):
        video, caption = out / "videos" / f"{index:06d}.mp4", out / "metas" / f"{index:06d}.txt"
        if video.exists() and caption.exists():
            continue
        pictures, words = render(seed, index, frames=frames, height=height, width=width)
        write_video(video, pictures, fps)
        write_text(caption, words + "\n", sync=False)  # thousands of files that a second run would make again
