"""Control videos: edges and blur computed from the clip; depth, keypoints and segmentation read from ready-made videos."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import torch

from cosmos_mp.config import Control
from cosmos_mp.data.clips import ClipRecord, fit, resize
from cosmos_mp.data.video import check_frames, decode, to_rgb
from cosmos_mp.kernels.canny import canny
from cosmos_mp.parallel import noise

EDGE_PRESETS = {
    "none": (20, 50),
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}
"""Canny thresholds (low, high) of the reference."""


def edge_thresholds(preset: str, *, seed: int, clip_id: str, draw: int) -> tuple[int, int]:
    """Canny thresholds of a preset; "random" draws low from 20..99 and high 50..149 above it, at most 255, once per clip.

    Raises ValueError on an unknown preset.
    """
    if preset == "random":
        g = noise.generator(seed, f"edge/{clip_id}", draw, 0)
        low = _integer(20, 99, g)
        return low, min(255, low + _integer(50, 149, g))
    if preset not in EDGE_PRESETS:
        raise ValueError(f"unknown edge preset {preset!r}; use random, {', '.join(EDGE_PRESETS)}")
    return EDGE_PRESETS[preset]


def edge(frames: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny edges of RGB frames (F, H, W, 3), 0 or 255, in three equal channels.

    On the colours, not on gray: each pixel takes its strongest channel, as the reference does. Gray gives other edges.
    """
    check_frames("edge", frames)
    edges_FHW = canny(torch.from_numpy(np.require(frames, requirements="CW")), low, high).numpy()
    return np.repeat(edges_FHW[..., None], 3, axis=-1)


def vis(frames: np.ndarray, *, seed: int, clip_id: str, draw: int) -> np.ndarray:
    """Blurred frames (F, H, W, 3): bilateral (half of the clips), Gaussian (0.3) or both (0.2), then 4 to 17 times down and up.

    The filters may work on frames reduced 1 to 4 times. Ranges are the reference's; all is drawn once per clip.
    """
    check_frames("vis", frames)
    g = noise.generator(seed, f"vis/{clip_id}", draw, 0)
    filters = torch.rand((), generator=g, dtype=torch.float64).item()  # < 0.5 bilateral, < 0.8 Gaussian, else both
    reduction = _integer(1, 4, g)
    diameter, sigma_colour, sigma_space, repeats = (_integer(*span, g) for span in ((15, 49), (100, 299), (50, 149), (1, 3)))
    kernel = _integer(21, 29, g) | 1  # cv2 takes odd sizes only: even ones go up by one
    sigma = 10.5 + 4.0 * torch.rand((), generator=g, dtype=torch.float64).item()
    scale = _integer(4, 17, g)

    height, width = frames.shape[1:3]
    blurred = []
    for frame in frames:
        x = np.ascontiguousarray(frame)
        if reduction > 1:
            x = cv2.resize(x, (max(1, width // reduction), max(1, height // reduction)), interpolation=cv2.INTER_AREA)
        if filters < 0.5 or filters >= 0.8:
            for _ in range(repeats):
                x = cv2.bilateralFilter(x, diameter, sigma_colour, sigma_space)
        if filters >= 0.5:
            x = cv2.GaussianBlur(x, (kernel, kernel), sigma)
        blurred.append(cv2.resize(x, (width, height), interpolation=cv2.INTER_LINEAR))
    return resize(resize(np.stack(blurred), max(1, height // scale), max(1, width // scale)), height, width)


def read_control(root: Path, kind: str, record: ClipRecord, start: int, frames: int, stride: int = 1) -> np.ndarray:
    """The same window of the clip's ready-made control, `root/<kind>/<clip id>.mp4`: uint8 RGB (F, H, W, 3).

    Raises:
        FileNotFoundError: there is no such video.
        ValueError: it has another number or size of frames than the clip, or the window lies outside it.
    """
    path = root / kind / f"{record.id}.mp4"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no {kind} control of clip {record.id}; make it, or train with control edge or vis")
    if start < 0 or frames < 1 or stride < 1 or start + (frames - 1) * stride >= record.num_frames:
        raise ValueError(f"{path}: no window of {frames} frames from {start} at stride {stride} in {record.num_frames} frames")
    wanted = range(start, start + frames * stride, stride)
    window, size, count = [], (0, 0), 0
    for count, frame in enumerate(decode(path), start=1):  # to its end: a control of another length belongs to another clip
        size = (frame.width, frame.height)
        if count - 1 in wanted:
            window.append(to_rgb(frame))
    if (count, *size) != (record.num_frames, record.width, record.height):
        raise ValueError(
            f"{path}: {count} frames of {size[0]}x{size[1]}, but the clip has {record.num_frames} of {record.width}x{record.height}; "
            "make the control again from this clip"
        )
    return np.stack(window)


def make_control(
    kind: str, frames: np.ndarray, record: ClipRecord, root: Path, start: int, stride: int = 1, *, preset: str, seed: int, draw: int
) -> np.ndarray:
    """The control video of a window: uint8 RGB of the shape of `frames` (F, H, W, 3), the window after `fit`.

    Args:
        kind: edge, vis, depth, keypoint or seg.
        root: the clips' folder, where ready-made controls lie.
        start, stride: the window, in frames of the clip.
        preset: Canny thresholds, see `edge_thresholds`.
        seed, draw: key what is random, with the clip's id.

    Raises ValueError on an unknown kind or preset, and what `read_control` raises.
    """
    check_frames("make_control", frames)
    # Made after the fit: training, pairs and inference then share one path, and a student never meets edges of another resolution.
    if kind == "edge":
        return edge(frames, *edge_thresholds(preset, seed=seed, clip_id=record.id, draw=draw))
    if kind == "vis":
        return vis(frames, seed=seed, clip_id=record.id, draw=draw)
    if kind not in get_args(Control):
        raise ValueError(f"unknown control {kind!r}; use {', '.join(get_args(Control))}")
    height, width = frames.shape[1:3]
    return fit(read_control(root, kind, record, start, len(frames), stride), height, width)[0]


def _integer(low: int, high: int, g: torch.Generator) -> int:
    """A whole number from low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))
