"""Canny edges of uint8 frames, equal to cv2.Canny (aperture 3, L1 norm) to the last pixel, on CPU and GPU.

Compiled from csrc/ when the package is installed; where that could not be, `canny_torch` does the same more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_MAGNITUDE = 2040
_TAN_22 = 13573  # tan 22.5 degrees in units of 2^-15, as cv2 rounds it
_GPU_PIXELS = 1 << 24  # worked on together on a GPU, with 6 bytes of scratch each
_TORCH_PIXELS = 1 << 20


def canny(frames_FHWC: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Edges (F, H, W) of uint8 frames with 1 or 3 channels: 255 on an edge, else 0.

    A pixel takes its strongest channel. `low` and `high` are whole numbers for all frames or one per frame, (F,); the lower counts as low.
    A gradient |dx| + |dy|, at most 2040, must exceed them. On a CPU as many threads work as torch has, each on frames of its own.

    Raises:
        TypeError: frames are not uint8, or thresholds are no whole numbers.
        ValueError: another shape.
    """
    _check_frames(frames_FHWC)
    return torch.ops.cosmos_mp.canny(frames_FHWC, _per_frame("low", low, frames_FHWC), _per_frame("high", high, frames_FHWC))


def canny_torch(frames_FHWC: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """`canny` written with torch alone, on any device. It synchronises with a GPU."""
    _check_frames(frames_FHWC)
    low_F, high_F = _per_frame("low", low, frames_FHWC), _per_frame("high", high, frames_FHWC)
    low_F, high_F = torch.minimum(low_F, high_F), torch.maximum(low_F, high_F)
    count, height, width, _ = frames_FHWC.shape
    some = max(1, _TORCH_PIXELS // (height * width))  # frames at a time: it takes a hundred bytes per pixel
    edges = [_edges(*(x[first : first + some] for x in (frames_FHWC, low_F, high_F))) for first in range(0, count, some)]
    return torch.cat(edges) if edges else frames_FHWC.new_empty((0, height, width))


def _edges(frames_FHWC: Tensor, low_F: Tensor, high_F: Tensor) -> Tensor:
    pixels = F.pad(frames_FHWC.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="replicate").to(torch.int32)  # float: it pads no uint8
    up, at, down = pixels[..., :-2, :], pixels[..., 1:-1, :], pixels[..., 2:, :]
    across, along = up + 2 * at + down, down - up
    dx = across[..., 2:] - across[..., :-2]
    dy = along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:]
    magnitude = dx.abs() + dy.abs()
    m = magnitude[:, 0]
    dx_FHW, dy_FHW = dx[:, 0], dy[:, 0]
    for channel in range(1, magnitude.shape[1]):  # the first of equal channels stays
        stronger = magnitude[:, channel] > m
        dx_FHW = torch.where(stronger, dx[:, channel], dx_FHW)
        dy_FHW = torch.where(stronger, dy[:, channel], dy_FHW)
        m = torch.where(stronger, magnitude[:, channel], m)

    padded = F.pad(m, (1, 1, 1, 1))

    def beside(x: int, y: int) -> Tensor:
        return padded[:, 1 + y : 1 + y + m.shape[1], 1 + x : 1 + x + m.shape[2]]

    slope, steepness = dx_FHW.abs() * _TAN_22, dy_FHW.abs() << 15
    horizontal = (m > beside(-1, 0)) & (m >= beside(1, 0))
    vertical = (m > beside(0, -1)) & (m >= beside(0, 1))
    falling = (m > beside(-1, -1)) & (m > beside(1, 1))
    rising = (m > beside(1, -1)) & (m > beside(-1, 1))
    diagonal = torch.where((dx_FHW ^ dy_FHW) < 0, rising, falling)
    steep = torch.where(steepness > slope + (dx_FHW.abs() << 16), vertical, diagonal)
    kept = torch.where(steepness < slope, horizontal, steep) & (m > low_F[:, None, None])
    return _connected(kept & (m > high_F[:, None, None]), kept).to(torch.uint8) * 255


def _connected(strong_FHW: Tensor, kept_FHW: Tensor) -> Tensor:
    """Kept pixels that a chain of kept neighbours, eight around each, connects with a strong one."""
    reached = strong_FHW
    while True:
        before = reached
        for _ in range(8):  # steps between two looks, each of which waits for a GPU
            rows = F.pad(reached, (0, 0, 1, 1))
            rows = F.pad(rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:], (1, 1))
            reached = (rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]) & kept_FHW
        if torch.equal(before, reached):
            return reached


def _check_frames(frames_FHWC: Tensor) -> None:
    if frames_FHWC.dtype != torch.uint8:
        raise TypeError(f"canny: frames are {frames_FHWC.dtype}; give uint8, 0 to 255")
    if frames_FHWC.dim() != 4 or frames_FHWC.shape[3] not in (1, 3) or 0 in frames_FHWC.shape[1:]:
        raise ValueError(f"canny: frames are {tuple(frames_FHWC.shape)}; give (F, H, W, C) with C 1 or 3 and at least one pixel")


def _per_frame(name: str, threshold: int | Tensor, frames: Tensor) -> Tensor:
    """The threshold as int32 (F,) where the frames are. What lies outside all gradients becomes -1 or 2040, which does the same."""
    if isinstance(threshold, Tensor):
        if threshold.dtype.is_floating_point or threshold.dtype.is_complex or threshold.dtype == torch.bool:
            raise TypeError(f"canny: {name} is {threshold.dtype}; give whole numbers")
        if threshold.shape != frames.shape[:1]:
            raise ValueError(f"canny: {name} is {tuple(threshold.shape)} for {frames.shape[0]} frames; give a number or one per frame")
        return threshold.to(torch.int64).clamp(-1, _MAX_MAGNITUDE).to(frames.device, torch.int32)
    if isinstance(threshold, bool) or not hasattr(threshold, "__index__"):
        raise TypeError(f"canny: {name} is {threshold!r}; give a whole number or a tensor of them")
    value = max(-1, min(threshold.__index__(), _MAX_MAGNITUDE))
    return torch.full(frames.shape[:1], value, dtype=torch.int32, device=frames.device)


# --- The compiled libraries and torch's operator ---


@functools.cache
def library(device: str) -> Callable[..., int] | None:
    """The function of libcanny_<device>.so, or None where it was not built."""
    # Beside this file, or else in any other installation of the package that Python sees: where a checkout's package hides the one of a
    # container image, through PYTHONPATH, the image's library is the compiled one.
    folders = dict.fromkeys([Path(__file__).parent, *(Path(entry, "cosmos_mp", "kernels") for entry in sys.path)])
    for path in (folder / f"libcanny_{device}.so" for folder in folders):
        if path.is_file():
            try:
                return getattr(ctypes.CDLL(str(path)), f"cosmos_mp_canny_{device}_1")
            except (OSError, AttributeError) as error:
                warnings.warn(f"{path} does not load ({error}); install the package again to build it for this machine", stacklevel=2)
    return None


@torch.library.custom_op("cosmos_mp::canny", mutates_args=(), device_types="cpu")
def _canny(frames: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Operator behind `canny`: low and high are int32 (F,)."""
    function = library("cpu")
    if function is None:
        return canny_torch(frames, low, high)
    frames, low, high = _checked(frames, low, high)
    edges = frames.new_empty(frames.shape[:3])
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (frames, low, high, edges)]
    sizes = [ctypes.c_int64(size) for size in frames.shape]
    if function(pointers[0], *sizes, *pointers[1:], torch.get_num_threads()):
        raise MemoryError(f"canny: no memory for a frame of {frames.shape[1]}x{frames.shape[2]}; give smaller ones or fewer threads")
    return edges


@_canny.register_kernel("cuda")
def _(frames: Tensor, low: Tensor, high: Tensor) -> Tensor:
    _check_frames(frames)
    function = library("cuda")
    _, height, width, _ = frames.shape
    if function is None or height * width >= 1 << 31:  # pixels have 32-bit numbers
        return canny_torch(frames, low, high)
    frames, low, high = _checked(frames, low, high)
    edges = frames.new_empty(frames.shape[:3])
    together = max(1, min(frames.shape[0], _GPU_PIXELS // (height * width)))
    gradients = torch.empty(together * height * width, dtype=torch.int16, device=frames.device)
    labels = torch.empty(together * height * width, dtype=torch.int32, device=frames.device)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (frames, low, high, edges, gradients, labels)]
    sizes = [ctypes.c_int64(size) for size in (*frames.shape, together)]
    with torch.cuda.device(frames.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = function(pointers[0], *sizes[:4], *pointers[1:4], sizes[4], *pointers[4:], frames.device.index, stream)
    if error:
        raise RuntimeError(f"canny: CUDA error {error}")
    return edges


@_canny.register_fake
def _(frames: Tensor, low: Tensor, high: Tensor) -> Tensor:
    _check_frames(frames)
    return frames.new_empty(frames.shape[:3])


def _checked(frames: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
    """All contiguous. Raises ValueError or TypeError on what the compiled functions would misread."""
    _check_frames(frames)
    for name, threshold in (("low", low), ("high", high)):
        if threshold.dtype != torch.int32 or threshold.shape != frames.shape[:1] or threshold.device != frames.device:
            raise ValueError(
                f"canny: {name} is {threshold.dtype} {tuple(threshold.shape)} on {threshold.device}; "
                f"the operator takes int32 ({frames.shape[0]},) on {frames.device}"
            )
    return [x.contiguous() for x in (frames, low, high)]
