"""Indexing folders of clips, exact windows out of them, and their geometry."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cosmos_mp.data import clips, video
from cosmos_mp.data.clips import ClipRecord, fit, index_clips, load_index, read_window, window_start
from cosmos_mp.data.video import VideoError, read_video, write_video

SIZE = (32, 128)  # height, width: eight blocks of the barcode, 16 pixels each


def _barcodes(count: int) -> np.ndarray:
    """Frames that show their own number in binary."""
    bits = np.arange(count)[:, None] >> np.arange(8) & 1
    return np.broadcast_to((200 * bits + 28).repeat(16, axis=1)[:, None, :, None], (count, *SIZE, 3)).astype(np.uint8)


def _numbers(frames: np.ndarray) -> list[int]:
    bits = frames.reshape(len(frames), SIZE[0], 8, 16, 3).mean(axis=(1, 3, 4)) > 128
    return (bits * 2 ** np.arange(8)).sum(axis=1).tolist()


def _encode(path: Path, codec: str, options: dict, frames: int = 40, pix_fmt: str = "yuv420p", pts=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, pix_fmt
        for number, frame in enumerate(_barcodes(frames)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number if pts is None else pts(number)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def _clip(root: Path, name: str = "a", frames: int = 10, caption: str | None = "a caption") -> Path:
    """A clip in the main layout."""
    path = root / "videos" / f"{name}.mp4"
    write_video(path, _barcodes(frames), 24)
    if caption is not None:
        (root / "metas").mkdir(exist_ok=True)
        (root / "metas" / f"{name}.txt").write_text(caption)
    return path


def _record(**changes) -> ClipRecord:
    return ClipRecord(
        **{
            **dict(id="a", video="videos/a.mp4", num_frames=40, fps=24.0, width=128, height=32, codec="h264", pix_fmt="yuv420p"),
            **dict(color_space="smpte170m", caption="a caption", sha256="0" * 64),
            **changes,
        }
    )


# --- The index ---


def test_an_index_tells_what_is_in_the_file(tmp_path):
    path = _clip(tmp_path, caption="  a caption\n")
    index = index_clips(tmp_path, min_frames=10)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert index.clips == [_record(num_frames=10, sha256=sha256)] and index.rejected == []
    assert index.path == tmp_path / "clips.jsonl" and load_index(index.path) == index.clips
    assert (tmp_path / "rejected.jsonl").read_text() == ""
    assert not list(tmp_path.rglob("*.tmp"))


def test_all_layouts_are_read(tmp_path):
    for name in ("b", "c", "d"):
        _clip(tmp_path, name, caption=None)
    _clip(tmp_path, "a", caption="from metas txt")
    (tmp_path / "metas" / "b.json").write_text('{"caption": "from metas json"}')
    (tmp_path / "metas" / "c.json").write_text('{"prompt": "from a prompt"}')
    (tmp_path / "videos" / "d.txt").write_text("beside the video")
    write_video(tmp_path / "e.mp4", _barcodes(5), 24)
    (tmp_path / "e.txt").write_text("in the root")
    write_video(tmp_path / "train" / "x" / "f.mp4", _barcodes(5), 24)
    write_video(tmp_path / "train" / "g.mp4", _barcodes(5), 24)
    write_video(tmp_path / "h.MP4", _barcodes(5), 24)
    lines = [
        {"file_name": "train/x/f.mp4", "caption": "listed"},
        {"file_name": "train/g.mp4", "text": "listed as text"},
        {"file_name": "h.MP4", "prompt": "listed as prompt", "extra": 1},
        {"file_name": "videos/a.mp4", "caption": "the list wins"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    index = index_clips(tmp_path, min_frames=1)
    assert {clip.id: clip.caption for clip in index.clips} == {
        "a": "the list wins",
        "b": "from metas json",
        "c": "from a prompt",
        "d": "beside the video",
        "e": "in the root",
        "h": "listed as prompt",
        "train/g": "listed as text",
        "train/x/f": "listed",
    }
    assert [clip.id for clip in index.clips] == sorted(clip.id for clip in index.clips)
    assert not index.rejected
    assert all((tmp_path / clip.video).is_file() for clip in index.clips)


def test_every_container_is_found(tmp_path):
    names = ("a.mp4", "b.mov", "c.mkv", "d.avi", "e.webm")
    for name in names:
        codec = ("libvpx", {"deadline": "realtime"}) if name == "e.webm" else ("libx264", {"bf": "0"})
        _encode(tmp_path / "videos" / name, *codec, frames=6)
        (tmp_path / "videos" / name).with_suffix(".txt").write_text(name)
    (tmp_path / "videos" / "notes.pdf").write_text("no video")
    found = index_clips(tmp_path, min_frames=6).clips
    assert [(clip.caption, clip.num_frames) for clip in found] == [(name, 6) for name in names]
    assert [clip.codec for clip in found] == ["h264"] * 4 + ["vp8"]


def test_unusable_files_are_reported_and_left_out(tmp_path):
    good = _clip(tmp_path, "good", 20).read_bytes()
    broken = {
        "empty": b"",
        "garbage": np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes(),
        "truncated": good[: len(good) * 6 // 10],
        "cut_header": good[:300],
        "no_header": good[:32] + good[good.index(b"mdat") - 4 :],
        "text": b"only words\n" * 100,
    }
    for name, data in broken.items():
        _clip(tmp_path, name).write_bytes(data)
    with av.open(str(_clip(tmp_path, "sound")), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    _clip(tmp_path, "short", 4)
    _clip(tmp_path, "mute", caption=None)
    _clip(tmp_path, "blank", caption=" \n")
    _clip(tmp_path, "bad_json", caption=None)
    (tmp_path / "metas" / "bad_json.json").write_text("{")
    _clip(tmp_path, "no_key", caption=None)
    (tmp_path / "metas" / "no_key.json").write_text('{"title": "x"}')
    _clip(tmp_path, "latin")
    (tmp_path / "metas" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "videos/gone.mp4", "caption": "x"}\n{"file_name": "../outside.mp4", "caption": "x"}\n'
    )
    with av.open(str(tmp_path / "videos" / "odd.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 33, 32, "yuv444p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 33, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    (tmp_path / "metas" / "odd.txt").write_text("odd")
    _encode(tmp_path / "videos" / "good.webm", "libvpx", {"deadline": "realtime"}, frames=8)

    index = index_clips(tmp_path, min_frames=8)
    assert [clip.video for clip in index.clips] == ["videos/good.mp4"]
    reasons = {entry.video.removeprefix("videos/").removesuffix(".mp4"): entry.reason for entry in index.rejected}
    expected = {
        "empty": "empty file",
        "garbage": "unreadable (",
        "truncated": "unreadable (",
        "cut_header": "no video stream",
        "no_header": "unreadable (",
        "text": "unreadable (",
        "sound": "no video stream",
        "short": "too few frames: 4 of 8",
        "mute": "no caption: neither metas/mute.txt",
        "blank": "empty caption",
        "bad_json": "unreadable caption: metas/bad_json.json",
        "no_key": "no caption: metas/no_key.json has none of caption, prompt, text",
        "latin": "unreadable caption: metas/latin.txt",
        "gone": "missing file",
        "../outside": "outside the folder",
        "odd.mkv": "odd or zero size: 33x32",
        "good.webm": "same name as another clip: videos/good.mp4",
    }
    assert reasons.keys() == expected.keys()
    for name, start in expected.items():
        assert reasons[name].startswith(start), name
    written = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert written == [asdict(entry) for entry in index.rejected]


def test_a_cut_webm_counts_what_it_holds(tmp_path):
    path = _encode(tmp_path / "a.webm", "libvpx", {"deadline": "realtime", "g": "8"}, frames=60)
    path.with_suffix(".txt").write_text("cut")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    (clip,) = index_clips(tmp_path, min_frames=5).clips
    assert 5 <= clip.num_frames < 60 and len(read_video(path)[0]) == clip.num_frames


def test_nothing_usable_is_an_error_that_counts_reasons(tmp_path):
    with pytest.raises(ValueError, match="no usable clip: no video files; put .mp4"):
        index_clips(tmp_path, min_frames=5)
    for name in "ab":
        _clip(tmp_path, name, 3)
    _clip(tmp_path, "c", caption="")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no usable clip: too few frames \(2\), empty caption \(1\); see .*rejected.jsonl"):
        index_clips(tmp_path, min_frames=5)
    assert not (tmp_path / "clips.jsonl").exists() and len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 3


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        index_clips(tmp_path / "nowhere", min_frames=1)
    with pytest.raises(ValueError, match="min_frames must be at least 1"):
        index_clips(tmp_path, min_frames=0)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"caption": "x"}',
        '{"file_name": "videos/b.mp4"}',
        '{"file_name": "a", "caption": 3}',
        '{"file_name": "ok.mp4", "text": "b"}',
    ],
)
def test_a_malformed_list_is_named_with_its_line(tmp_path, line):
    _clip(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "ok.mp4", "text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
        index_clips(tmp_path, min_frames=1)


def test_only_new_and_changed_files_are_decoded_again(tmp_path, monkeypatch):
    paths = [_clip(tmp_path, name) for name in "abc"]
    decoded = []
    probe = video.probe
    monkeypatch.setattr(video, "probe", lambda path, decode: decoded.append(path.stem) or probe(path, decode))
    first = index_clips(tmp_path, min_frames=5)
    assert decoded == ["a", "b", "c"]
    assert index_clips(tmp_path, min_frames=5) == first and decoded == ["a", "b", "c"]

    stat = paths[1].stat()
    write_video(paths[1], _barcodes(7), 24)  # another size at the same time
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    stat = paths[2].stat()
    os.utime(paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    (tmp_path / "metas" / "a.txt").write_text("a new caption")
    _clip(tmp_path, "d")
    del decoded[:]
    again = {clip.id: clip for clip in index_clips(tmp_path, min_frames=5).clips}
    assert decoded == ["b", "c", "d"]
    assert again["b"].num_frames == 7 and again["a"].caption == "a new caption"
    assert again["b"].sha256 == hashlib.sha256(paths[1].read_bytes()).hexdigest()
    # A count of packets must not stand in for a decode, nor a threshold of another run.
    del decoded[:]
    index_clips(tmp_path, min_frames=5, decode=False)
    assert decoded == ["a", "b", "c", "d"]
    assert [entry.video for entry in index_clips(tmp_path, min_frames=8).rejected] == ["videos/b.mp4"]


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    for name in "abc":
        _clip(tmp_path, name)
    probe, decoded, cache = video.probe, [], tmp_path / "clips.cache.jsonl"

    def stop_at_c(path, decode):
        if path.stem == "c":
            assert len(cache.read_text().splitlines()) == 2  # already on disk: a kill would lose nothing
            raise KeyboardInterrupt
        return probe(path, decode)

    monkeypatch.setattr(video, "probe", stop_at_c)
    with pytest.raises(KeyboardInterrupt):
        index_clips(tmp_path, min_frames=5)
    assert not (tmp_path / "clips.jsonl").exists()
    cache.write_text(cache.read_text() + '{"key": ["videos/c.mp4", 1')  # killed in the middle of a line
    monkeypatch.setattr(video, "probe", lambda path, decode: decoded.append(path.stem) or probe(path, decode))
    assert len(index_clips(tmp_path, min_frames=5).clips) == 3 and decoded == ["c"]
    assert all(json.loads(line) for line in cache.read_text().splitlines())


def test_the_index_can_lie_elsewhere(tmp_path):
    root, out = tmp_path / "clips", tmp_path / "index" / "here"
    _clip(root)
    before = sorted(root.rglob("*"))
    index = index_clips(root, min_frames=5, out=out)
    assert sorted(root.rglob("*")) == before
    assert index.path == out / "clips.jsonl" and load_index(index.path)[0].video == "videos/a.mp4"


def test_counting_packets_agrees_with_decoding(tmp_path):
    _encode(tmp_path / "a.mp4", "libx264", {"bf": "3"}, frames=17)
    (tmp_path / "a.txt").write_text("a")
    assert [index_clips(tmp_path, min_frames=1, decode=decode).clips[0].num_frames for decode in (True, False)] == [17, 17]


def test_loading_is_strict(tmp_path):
    path = tmp_path / "clips.jsonl"
    good = asdict(_record())
    with pytest.raises(FileNotFoundError, match="make it with `python -m cosmos_mp index"):
        load_index(path)
    path.write_text(json.dumps(good | {"fps": 24}) + "\n")
    assert load_index(path)[0].fps == 24
    for change, message in (
        ({**good, "id": "b", "license": "x"}, "line 2: missing or unknown keys license"),
        ({key: value for key, value in good.items() if key != "sha256"}, "line 2: missing or unknown keys sha256"),
        ({**good, "id": "b", "num_frames": "40"}, "line 2: wrong type of num_frames"),
        ({**good, "id": "b", "width": True}, "line 2: wrong type of width"),
        (good, "line 2: id 'a' appears twice"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(change) + "\n")
        with pytest.raises(ValueError, match=f"clips.jsonl, {message}"):
            load_index(path)
    path.write_text(json.dumps(good)[:-5] + "\n")
    with pytest.raises(ValueError, match="clips.jsonl, line 1: not JSON"):
        load_index(path)


# --- Windows ---


CODECS = {
    "h264_b_frames.mp4": ("libx264", {"bf": "4", "b-pyramid": "normal", "g": "12"}),
    "h264_open_gop.mkv": ("libx264", {"bf": "2", "x264-params": "open-gop=1:keyint=10"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "16"}),
    "vp9_hidden_frames.mp4": ("libvpx-vp9", {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "mjpeg.avi": ("mjpeg", {"q:v": "2"}),
}


@pytest.mark.parametrize("name", CODECS)
def test_windows_are_exact_in_every_codec(tmp_path, name):
    path = _encode(tmp_path / name, *CODECS[name], pix_fmt="yuvj420p" if name.startswith("mjpeg") else "yuv420p")
    for start, frames, stride in ((0, 40, 1), (7, 9, 1), (13, 1, 1), (1, 13, 3), (39, 1, 5), (5, 7, 5)):
        window = read_window(path, start, frames, stride)
        assert window.shape == (frames, *SIZE, 3) and window.dtype == np.uint8
        assert _numbers(window) == list(range(start, start + frames * stride, stride))
    assert np.array_equal(read_window(path, 3, 5, 2), read_video(path)[0][3:12:2])


def test_windows_go_by_number_not_by_time(tmp_path):
    path = _encode(tmp_path / "a.mkv", "libx264", {"bf": "2"}, pts=lambda number: number * (number + 3))  # an ever slower rate
    assert _numbers(read_window(path, 11, 6, 4)) == [11, 15, 19, 23, 27, 31]


@pytest.mark.parametrize("window", [(32, 9, 1), (0, 14, 3 + 1), (40, 1, 1), (0, 41, 1)])
def test_a_window_beyond_the_end_names_file_and_numbers(tmp_path, window):
    path = _encode(tmp_path / "a.mp4", "libx264", {})
    with pytest.raises(ValueError, match=rf"a.mp4: frames {window[0]}..\d+ at stride {window[2]} asked for, the file has 40"):
        read_window(path, *window)


@pytest.mark.parametrize("window", [(-1, 2, 1), (0, 0, 1), (0, 2, 0)])
def test_a_senseless_window_is_refused(tmp_path, window):
    path = _encode(tmp_path / "a.mp4", "libx264", {})
    with pytest.raises(ValueError, match="a.mp4: a window needs"):
        read_window(path, *window)
    with pytest.raises(ValueError, match="a window needs"):
        window_start(_record(), 0, 1, seed=0, draw=0)


def test_a_window_of_a_broken_file_names_it(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="a.mp4: unreadable"):
        read_window(tmp_path / "a.mp4", 0, 1)
    with pytest.raises(FileNotFoundError, match="b.mp4"):
        read_window(tmp_path / "b.mp4", 0, 1)


def test_window_starts_are_uniform_and_keyed():
    starts = [window_start(_record(), 9, 4, seed=0, draw=draw) for draw in range(400)]  # 33 frames of 40: 0..7
    assert set(starts) == set(range(8)) and np.bincount(starts).min() > 25
    assert starts == [window_start(_record(), 9, 4, seed=0, draw=draw) for draw in range(400)]
    for other in (dict(seed=1), dict(seed=0, record=_record(id="b"))):
        record = other.pop("record", _record())
        assert starts != [window_start(record, 9, 4, **other, draw=draw) for draw in range(400)]
    assert window_start(_record(num_frames=33), 9, 4, seed=0, draw=0) == 0
    with pytest.raises(ValueError, match="32 frames hold no window of 9 at stride 4"):
        window_start(_record(num_frames=32), 9, 4, seed=0, draw=0)


# --- Geometry ---


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_equal_sizes_change_nothing():
    frames = _noise(2, 24, 40, 3)
    fitted, mask = fit(frames, 24, 40)
    assert np.array_equal(fitted, frames) and mask.dtype == np.uint8 and mask.shape == (24, 40) and not mask.any()


def test_a_resize_is_bicubic_with_antialiasing():
    frames = _noise(3, 36, 64, 3)
    fitted, mask = fit(frames, 18, 32)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.interpolate(x, (18, 32), mode="bicubic", antialias=True).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert not mask.any() and np.abs(fitted - expected).max() < 0.51


@pytest.mark.parametrize(
    ("size", "target", "kept"),
    [
        ((20, 40), (26, 40), (slice(3, 23), slice(0, 40))),
        ((20, 40), (25, 40), (slice(2, 22), slice(0, 40))),  # the odd row goes below
        ((40, 20), (40, 27), (slice(0, 40), slice(3, 23))),  # the odd column goes right
        ((40, 60), (16, 30), (slice(0, 16), slice(3, 27))),  # smaller
        ((1080, 1920), (704, 1280), (slice(0, 704), slice(14, 1266))),  # int(1920 * 704 / 1080 + .5) = 1252
        ((1920, 1080), (1280, 704), (slice(14, 1266), slice(0, 704))),
        ((8, 10), (33, 30), (slice(4, 28), slice(0, 30))),  # larger
    ],
)
def test_the_picture_sits_in_the_middle_and_is_mirrored(size, target, kept):
    frames = _noise(1, *size, 3)
    fitted, mask = fit(frames, *target)
    expected_mask = np.ones(target, np.uint8)
    expected_mask[kept] = 0
    assert fitted.shape == (1, *target, 3) and fitted.dtype == np.uint8 and np.array_equal(mask, expected_mask)
    picture = fitted[(slice(None), *kept)]
    if picture.shape[1:3] == size:
        assert np.array_equal(picture, frames)
    top, left = kept[0].start, kept[1].start
    bottom, right = target[0] - kept[0].stop, target[1] - kept[1].stop
    mirrored = torch.nn.functional.pad(torch.from_numpy(picture).permute(0, 3, 1, 2).float(), (left, right, top, bottom), mode="reflect")
    assert np.array_equal(fitted, mirrored.permute(0, 2, 3, 1).byte().numpy())


def test_wide_padding_repeats_the_edge():
    frames = _noise(1, 4, 20, 3)
    fitted, mask = fit(frames, 14, 20)  # 5 rows on each side of 4
    assert np.array_equal(fitted[0, :5], np.broadcast_to(frames[0, :1], (5, 20, 3))) and np.array_equal(fitted[0, 5:9], frames[0])
    assert np.array_equal(fitted[0, 9:], np.broadcast_to(frames[0, -1:], (5, 20, 3))) and mask.sum() == 200
    for height in (11, 12):  # 4 rows of padding below are enough
        assert np.array_equal(fit(frames, height, 20)[0][0, -4:], np.broadcast_to(frames[0, -1:], (4, 20, 3)))
    three, _ = fit(frames, 10, 20)  # 3 rows: still a mirror
    assert np.array_equal(three[0, :3], frames[0, [3, 2, 1]])


def test_wrong_frames_are_refused():
    with pytest.raises(ValueError, match="fit: frames must be"):
        fit(np.zeros((2, 3, 8, 8), np.uint8), 8, 8)
    with pytest.raises(ValueError, match="0x8"):
        fit(_noise(1, 8, 8, 3), 8, 0)
    assert np.array_equal(clips.resize(_noise(1, 8, 8, 3), 8, 8), _noise(1, 8, 8, 3))
