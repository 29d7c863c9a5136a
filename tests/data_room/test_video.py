"""Video files: exact colours and frames, whole files or none, clear errors."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cosmos_mp.data.video import VideoError, decode, probe, read_video, to_rgb, write_video

COLOURS = np.array([[200, 30, 40], [20, 180, 60], [30, 50, 220], [240, 240, 240], [8, 8, 8], [128, 128, 128]], np.uint8)


def _flat(size: int = 32) -> np.ndarray:
    """One plain frame per colour."""
    return np.broadcast_to(COLOURS[:, None, None], (len(COLOURS), size, size, 3)).copy()


def _encode(path: Path, frames: np.ndarray, *, codec: str = "libx264", matrix: int = 6, full: bool = False) -> None:
    """A near-lossless file whose tags really say `matrix` and range, with pixels to match."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=1 if matrix == 1 else 5, dst_color_range=2 if full else 1)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def test_written_frames_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "a.mp4"
    write_video(path, _flat(), 12.5)
    frames, fps = read_video(path)
    assert frames.dtype == np.uint8 and frames.shape == (6, 32, 32, 3) and fps == 12.5
    assert np.abs(frames.astype(int) - _flat()).max() <= 4
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]  # nothing temporary stays


def test_the_file_suits_browsers_and_gpu_decoders(tmp_path):
    write_video(tmp_path / "a.mp4", _flat(), 24)
    facts = probe(tmp_path / "a.mp4")
    assert (facts.codec, facts.pix_fmt, facts.color_space) == ("h264", "yuv420p", "smpte170m")
    assert (facts.num_frames, facts.fps, facts.width, facts.height) == (6, 24.0, 32, 32)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is whole


def test_same_frames_same_bytes(tmp_path):
    for name in "ab":
        write_video(tmp_path / name, _flat(), 24)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("matrix", "name"), [(6, "smpte170m"), (1, "bt709"), (2, "unspecified")])
def test_the_colour_matrix_that_the_file_names_is_honoured(tmp_path, matrix, name):
    _encode(tmp_path / "a.mp4", _flat(), matrix=matrix)
    assert probe(tmp_path / "a.mp4").color_space == name
    assert np.abs(read_video(tmp_path / "a.mp4")[0].astype(int) - _flat()).max() <= 4


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])  # H.264 says it in the pixel format, VP9 beside it
def test_full_range_is_honoured(tmp_path, codec):
    _encode(tmp_path / "full.mp4", _flat(), codec=codec, full=True)
    assert np.abs(read_video(tmp_path / "full.mp4")[0].astype(int) - _flat()).max() <= 4


@pytest.mark.parametrize("size", [(32, 48), (54, 70)])
def test_conversion_equals_that_of_bare_planes(tmp_path, size):
    """The definition: flags 0x2 | 0x2000 | 0x40000 on a frame that carries no metadata."""
    noise = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, 24)
    shortcut = 0
    for frame in decode(tmp_path / "a.mp4"):
        bare = av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")
        expected = bare.reformat(format="rgb24", interpolation=0x2 | 0x2000 | 0x40000).to_ndarray()
        assert np.array_equal(to_rgb(frame), expected)
        shortcut = max(shortcut, np.abs(frame.to_ndarray(format="rgb24").astype(int) - expected).max())
    assert shortcut > 10  # PyAV's default is another picture: the flags matter


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, _flat(), 24)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_video(path, _flat()[:2], 24)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 31, 32, 3), np.uint8), 24, "even sizes, got 32x31"),
        (np.zeros((2, 32, 31, 3), np.uint8), 24, "even sizes, got 31x32"),
        (np.zeros((2, 32, 32, 3), np.float32), 24, "float32"),
        (np.zeros((0, 32, 32, 3), np.uint8), 24, r"\(0, 32, 32, 3\)"),
        (np.zeros((32, 32, 3), np.uint8), 24, r"\(F, H, W, 3\)"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "fps must be above 0"),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        read_video(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    with pytest.raises(VideoError, match="text.mp4: unreadable"):
        read_video(tmp_path / "text.mp4")


def test_damage_inside_a_frame_is_seen(tmp_path):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "a.mp4", rng.integers(0, 256, (30, 64, 64, 3), dtype=np.uint8), 24)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    for place in rng.integers(len(data) // 2, len(data) - 10, 400):
        data[place] ^= 0xFF
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=r"a.mp4: corrupt frame \d+"):
        probe(tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4", decode=False).num_frames == 30


def test_frames_of_two_sizes_are_refused(tmp_path):
    path = tmp_path / "mixed.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        other = av.CodecContext.create("mjpeg", "w")
        other.width, other.height, other.pix_fmt, other.time_base = 48, 32, "yuvj420p", Fraction(1, 24)
        for number, (context, width) in enumerate(((stream, 32), (other, 48))):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, width, 3), np.uint8), format="rgb24").reformat(format="yuvj420p")
            picture.pts = number
            for packet in context.encode(picture):
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(VideoError, match=r"mixed.avi: frame 1 is 48x32, those before are 32x32"):
        probe(path)
