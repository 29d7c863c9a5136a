"""Video files <-> RGB frames, frame by frame and the same on every machine.

Colours follow the matrix that the file names, BT.709 or else BT.601. BT.601 frames equal the GPU decoder's (DALI) to the last bit; for
BT.709 that decoder needs a colour correction, so the index of clips records the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from cosmos_mp.files import whole

# Bilinear, full chroma, exact rounding: equal to DALI's decoder to the last bit. PyAV's default takes a chroma shortcut.
_EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
_SMPTE170M = 6  # BT.601, by the numbers of ISO/IEC 23091-2, as below
_BT709 = 1
_LIMITED = 1
_MATRICES = {0: "rgb", 1: "bt709", 2: "unspecified", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020nc", 10: "bt2020c"}


class VideoError(ValueError):
    """A video that cannot be read; the message names the file."""


@dataclass(frozen=True)
class VideoFacts:
    """What a file holds. `num_frames` is counted, never the header's word; `fps` is the average rate."""

    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    pix_fmt: str
    color_space: str


@contextmanager
def _stream(path: Path) -> Iterator[av.VideoStream]:
    """The file's first video stream. Whatever FFmpeg cannot open or decode becomes a VideoError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file; check the folder or index the clips again")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: no video stream; give a file with pictures in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # clips are short: parallelism is over clips, not inside one
            yield stream
    except av.FFmpegError as error:
        raise VideoError(f"{path}: unreadable ({error.strerror}); replace or remove the file") from error


def _checked(stream: av.VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    size = None
    for number, frame in enumerate(stream.container.decode(stream)):
        if frame.is_corrupt:
            raise VideoError(f"{path}: corrupt frame {number}; replace or remove the file")
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise VideoError(
                f"{path}: frame {number} is {frame.width}x{frame.height}, those before are {size[0]}x{size[1]}; encode it at one size"
            )
        yield frame


def _fps(stream: av.VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)


def decode(path: Path) -> Iterator[av.VideoFrame]:
    """Decoded frames in display order, from the first.

    Raises FileNotFoundError, or VideoError if the file cannot be decoded or a frame is corrupt or of another size.
    """
    with _stream(path) as stream:
        yield from _checked(stream, path)


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """One decoded frame as uint8 RGB (H, W, 3); honours its colour matrix and range."""
    # swscale would follow the chroma position that H.264 files carry and DALI ignores. PyAV cannot unset it: the planes go to a new frame.
    bare = av.VideoFrame(frame.width, frame.height, frame.format.name)
    for source, target in zip(frame.planes, bare.planes, strict=True):
        rows = np.frombuffer(target, np.uint8).reshape(target.height, target.line_size)
        line = min(source.line_size, target.line_size)  # lines are padded, each frame in its own way
        rows[:, :line] = np.frombuffer(source, np.uint8).reshape(source.height, source.line_size)[:, :line]
    bare.color_range = frame.color_range
    matrix = Colorspace.ITU709 if int(frame.colorspace) == _BT709 else Colorspace.ITU601
    return bare.reformat(format="rgb24", src_colorspace=matrix, interpolation=_EXACT, threads=1).to_ndarray()


def probe(path: Path, decode: bool = True) -> VideoFacts:
    """Facts of a file by decoding all of it; `decode=False` only counts its packets, which leaves damage inside them unseen.

    Raises FileNotFoundError or VideoError as `decode` does.
    """
    with _stream(path) as stream:
        context = stream.codec_context
        count = sum(1 for _ in _checked(stream, path)) if decode else sum(packet.size > 0 for packet in stream.container.demux(stream))
        return VideoFacts(
            num_frames=count,
            fps=_fps(stream),
            width=context.width,
            height=context.height,
            codec=context.name if stream.codec is None else stream.codec.canonical_name,
            pix_fmt=context.pix_fmt or "unknown",
            color_space=_MATRICES.get(int(context.colorspace), f"matrix {int(context.colorspace)}"),
        )


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """All frames as uint8 RGB (F, H, W, 3), and the frames per second. Raises FileNotFoundError or VideoError."""
    with _stream(path) as stream:
        frames = [to_rgb(frame) for frame in _checked(stream, path)]
        if not frames:
            raise VideoError(f"{path}: no frames; replace or remove the file")
        return np.stack(frames), _fps(stream)


def check_frames(what: str, frames: np.ndarray) -> None:
    """Raises ValueError unless `frames` are uint8 RGB (F, H, W, 3) with at least one frame and pixel."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        got = f"{frames.dtype} {tuple(frames.shape)}" if hasattr(frames, "shape") else type(frames).__name__
        raise ValueError(f"{what}: frames must be a uint8 array (F, H, W, 3) of RGB, got {got}")


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Writes uint8 RGB frames (F, H, W, 3) as near-lossless H.264, 8-bit 4:2:0, BT.601, that browsers and GPU decoders read.

    The file appears whole or not at all; folders are made. Raises ValueError on wrong frames, odd sizes or fps <= 0.
    """
    check_frames(str(path), frames)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: 4:2:0 video needs even sizes, got {width}x{height}; crop or pad the frames by one pixel")
    if not fps > 0:
        raise ValueError(f"{path}: fps must be above 0, got {fps}")
    with (
        whole(path, sync=False) as unfinished,
        av.open(str(unfinished), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000), options={"crf": "10", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # the bytes then depend on the frames alone
        context.colorspace, context.color_range = _SMPTE170M, _LIMITED
        for rgb in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601, interpolation=_EXACT, threads=1)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
