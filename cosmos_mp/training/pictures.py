"""A grid of frames: one row per video, columns first, middle and last frame, with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cosmos_mp.files import whole

SMALLEST = 256
"""Smaller frames are enlarged by a whole factor until their longer side has this many pixels."""
MARGIN = 6
HEADER = 22
FONT_SIZE = 14


def picture_grid(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draw the grid.

    Args:
        rows: label -> video (F, H, W, 3) uint8, drawn from top to bottom; frame counts may differ, sizes may not.

    Returns:
        RGB image (height, width, 3) uint8.

    Raises:
        ValueError: no rows, or a video of another layout, dtype or size; the message names the row.
    """
    _check(rows)
    height, width = next(iter(rows.values())).shape[1:3]
    scale = max(1, -(-SMALLEST // max(height, width)))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(size=FONT_SIZE)
    label_width = 2 * MARGIN + max(int(font.getlength(label)) + 1 for label in rows)
    size = (label_width + 3 * (width + MARGIN), HEADER + len(rows) * (height + MARGIN))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for column, title in enumerate(("first", "middle", "last")):
        draw.text((label_width + column * (width + MARGIN), 3), title, fill="black", font=font)
    for row, (label, video) in enumerate(rows.items()):
        top = HEADER + row * (height + MARGIN)
        draw.text((MARGIN, top + height // 2), label, fill="black", font=font, anchor="lm")
        for column, frame in enumerate((0, len(video) // 2, len(video) - 1)):
            tile = Image.fromarray(np.ascontiguousarray(video[frame])).resize((width, height), Image.Resampling.NEAREST)
            image.paste(tile, (label_width + column * (width + MARGIN), top))
    return np.asarray(image)


def _check(rows: Mapping[str, np.ndarray]) -> None:
    if not rows:
        raise ValueError("picture_grid: no rows; give at least one video")
    size = next(iter(rows.values())).shape[1:3]
    for label, video in rows.items():
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) == 0 or video.shape[1:3] != size:
            raise ValueError(
                f"row {label!r} is {video.dtype} {video.shape}, expected uint8 (frames, {size[0]}, {size[1]}, 3) as the first row"
            )


def stack(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Grids of several samples one under the other, white to the right of narrower ones."""
    width = max(grid.shape[1] for grid in grids)
    return np.concatenate([np.pad(grid, ((0, 0), (0, width - grid.shape[1]), (0, 0)), constant_values=255) for grid in grids])


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image (height, width, 3) uint8, visible at once and whole."""
    with whole(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")
