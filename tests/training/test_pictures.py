"""The grid: order of rows and columns, whole-factor enlargement, labels, and files that appear whole."""

import numpy as np
import pytest
from PIL import Image

from cosmos_mp.training.pictures import HEADER, MARGIN, picture_grid, stack, write_png


def video(value: int, frames: int = 5, height: int = 48, width: int = 80) -> np.ndarray:
    """Frame f is filled with value + f; its top left pixel is 255."""
    made = np.stack([np.full((height, width, 3), value + f, np.uint8) for f in range(frames)])
    made[:, 0, 0] = 255
    return made


def tiles(grid: np.ndarray, rows: int, height: int, width: int) -> list[list[np.ndarray]]:
    left = grid.shape[1] - 3 * (width + MARGIN)
    corner = lambda r, c: (HEADER + r * (height + MARGIN), left + c * (width + MARGIN))  # noqa: E731
    return [[grid[y : y + height, x : x + width] for y, x in (corner(r, c) for c in range(3))] for r in range(rows)]


def test_rows_keep_their_order_and_columns_are_first_middle_last():
    rows = {"student 1-step": video(10), "teacher 1-step": video(40), "control": video(70, frames=3), "ground truth": video(100)}
    grid = picture_grid(rows)
    assert grid.dtype == np.uint8 and grid.ndim == 3 and grid.shape[2] == 3
    values = [[int(tile[-1, -1, 0]) for tile in row] for row in tiles(grid, 4, 4 * 48, 4 * 80)]
    assert values == [[10, 12, 14], [40, 42, 44], [70, 71, 72], [100, 102, 104]]
    assert grid.shape[0] == HEADER + 4 * (4 * 48 + MARGIN)


def test_tiny_frames_grow_by_a_whole_factor_without_smoothing():
    frame = tiles(picture_grid({"a": video(10)}), 1, 192, 320)[0][0]  # 80 -> 320: the first multiple of at least 256
    assert (frame[:4, :4] == 255).all() and (frame[4:] == 10).all() and (frame[:4, 4:] == 10).all()


def test_large_frames_stay_as_they_are():
    grid = picture_grid({"a": video(10, height=200, width=300)})
    assert grid.shape[0] == HEADER + 200 + MARGIN


def test_rows_are_labelled():
    left = [picture_grid({label: video(10)})[HEADER:, :60] for label in ("iiii", "HHHH")]
    assert all((strip < 128).any() for strip in left)
    assert left[0].shape != left[1].shape or not np.array_equal(*left)


@pytest.mark.parametrize(
    "bad",
    [video(10).astype(np.float32), video(10)[0], video(10, width=40), video(10)[:0], video(10)[..., :1]],
    ids=["float", "3d", "size", "empty", "grey"],
)
def test_a_video_that_does_not_fit_is_named(bad):
    with pytest.raises(ValueError, match="'control'"):
        picture_grid({"student": video(10), "control": bad})
    with pytest.raises(ValueError, match="no rows"):
        picture_grid({})


def test_samples_are_stacked_and_padded_white():
    grids = [np.zeros((4, 6, 3), np.uint8), np.full((2, 8, 3), 7, np.uint8)]
    both = stack(grids)
    assert both.shape == (6, 8, 3) and (both[:4, 6:] == 255).all() and (both[:4, :6] == 0).all() and (both[4:] == 7).all()


def test_png_is_written_whole(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "pictures" / "iter_00000001.png"
    write_png(path, image)
    assert np.array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
