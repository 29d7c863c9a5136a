"""A folder of captioned videos: its index, windows of frames out of it, and their fit into the training size.

Layouts read, also mixed: `videos/a.mp4` with `metas/a.txt` or `metas/a.json`; `a.mp4` with `a.txt` or `a.json` beside it; and a
`metadata.jsonl` of `file_name` and `caption`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cosmos_mp.data import video
from cosmos_mp.data.video import VideoError, VideoFacts, check_frames
from cosmos_mp.files import file_sha256, write_text
from cosmos_mp.parallel import noise

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")
CAPTION_KEYS = ("caption", "prompt", "text")


# --- The index ---


@dataclass(frozen=True)
class ClipRecord:
    """One usable clip. `video` is relative to the clips' folder; `id` is that path without `videos/` and suffix."""

    id: str
    video: str
    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    pix_fmt: str
    color_space: str
    caption: str
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """A video that cannot be used, and why."""

    video: str
    reason: str


@dataclass(frozen=True)
class Index:
    """What `index_clips` found; `path` is the file that `load_index` reads."""

    path: Path
    clips: list[ClipRecord]
    rejected: list[Rejected]


class _Unusable(Exception):
    """The reason to leave one video out: a kind, and the particulars after a colon."""


def index_clips(root: Path, *, min_frames: int, decode: bool = True, out: Path | None = None) -> Index:
    """Finds the clips of `root` and writes `clips.jsonl` and `rejected.jsonl` there, or into `out` where `root` is read-only.

    Every file is decoded whole to count its frames; `decode=False` counts packets only, faster but blind to damage inside them.
    A cut-off webm or mkv, which has no table of frames, counts as the frames it still holds; a cut-off mp4 is rejected.
    A second run decodes only files whose size or modification time changed (`clips.cache.jsonl` remembers the rest).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: `min_frames` below 1, a malformed `metadata.jsonl`, or no usable clip; the message counts the reasons.
    """
    if min_frames < 1:
        raise ValueError(f"min_frames must be at least 1, got {min_frames}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of clips; give one that holds videos/ and metas/")
    out = root if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    listed = _read_metadata(root / "metadata.jsonl")
    here = (path.relative_to(root).as_posix() for folder in (root, root / "videos") if folder.is_dir() for path in folder.iterdir())
    names = sorted(listed.keys() | {name for name in here if name.lower().endswith(SUFFIXES)})
    clips: dict[str, ClipRecord] = {}
    rejected = []
    with _Cache(out / "clips.cache.jsonl", counted_by="frames" if decode else "packets") as cache:
        for name in tqdm(names, desc=f"indexing {root.name}", unit="clip", disable=None):
            try:
                clip = _inspect(root, name, listed.get(name), cache, min_frames)
                if clip.id in clips:
                    raise _Unusable(f"same name as another clip: {clips[clip.id].video}")
                clips[clip.id] = clip
            except _Unusable as reason:
                rejected.append(Rejected(name, str(reason)))
    _write_jsonl(out / "rejected.jsonl", map(asdict, rejected))
    if not clips:
        (out / "clips.jsonl").unlink(missing_ok=True)  # of an earlier run, about files that are no longer usable
        counts = Counter(entry.reason.split(":")[0] for entry in rejected)
        found = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common())
        remedy = f"see {out / 'rejected.jsonl'}" if rejected else f"put {', '.join(SUFFIXES)} files into {root / 'videos'}"
        raise ValueError(f"{root}: no usable clip: {found or 'no video files'}; {remedy}")
    index = Index(out / "clips.jsonl", [clips[key] for key in sorted(clips)], rejected)
    _write_jsonl(index.path, map(asdict, index.clips))
    return index


def load_index(path: Path) -> list[ClipRecord]:
    """The clips of a `clips.jsonl`, in its order.

    Raises FileNotFoundError, or ValueError naming file and line on a missing, unknown or mistyped key or a repeated id.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no index of clips; make it with `python -m cosmos_mp index {path.parent}`")
    records: list[ClipRecord] = []
    seen = set()
    for number, entry in _read_jsonl(path):
        where = f"{path}, line {number}"
        expected = {field.name: {"str": str, "int": int, "float": (int, float)}[str(field.type)] for field in fields(ClipRecord)}
        if wrong := sorted(expected.keys() ^ entry.keys()):
            raise ValueError(f"{where}: missing or unknown keys {', '.join(wrong)}; index the clips again")
        if wrong := [key for key, kind in expected.items() if not isinstance(entry[key], kind) or isinstance(entry[key], bool)]:
            raise ValueError(f"{where}: wrong type of {', '.join(wrong)}; index the clips again")
        if entry["id"] in seen:
            raise ValueError(f"{where}: id {entry['id']!r} appears twice; index the clips again")
        seen.add(entry["id"])
        records.append(ClipRecord(**entry))
    return records


def _inspect(root: Path, name: str, caption: str | None, cache: _Cache, min_frames: int) -> ClipRecord:
    """The record of one video, or _Unusable."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise _Unusable("outside the folder: list files by their path inside it")
    path = root / relative
    if not path.is_file():
        raise _Unusable("missing file: metadata.jsonl lists it")
    caption = (_find_caption(root, relative) if caption is None else caption).strip()
    if not caption:
        raise _Unusable("empty caption")
    if path.stat().st_size == 0:
        raise _Unusable("empty file")
    facts, sha256 = cache.look_up(name, path)
    if facts.width < 2 or facts.height < 2 or facts.width % 2 or facts.height % 2:
        raise _Unusable(f"odd or zero size: {facts.width}x{facts.height}")
    if facts.num_frames < min_frames:
        raise _Unusable(f"too few frames: {facts.num_frames} of {min_frames}")
    inside = relative.relative_to("videos") if relative.parts[0] == "videos" else relative
    return ClipRecord(id=inside.with_suffix("").as_posix(), video=name, caption=caption, sha256=sha256, **asdict(facts))


def _find_caption(root: Path, video: PurePosixPath) -> str:
    metas = root / "metas" / video.name
    for path in (
        metas.with_suffix(".txt"),
        metas.with_suffix(".json"),
        root / video.with_suffix(".txt"),
        root / video.with_suffix(".json"),
    ):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            caption = _caption_of(json.loads(text)) if path.suffix == ".json" else text
        except ValueError as error:  # not UTF-8, or not JSON
            raise _Unusable(f"unreadable caption: {path.relative_to(root)} ({error})") from error
        if caption is None:
            raise _Unusable(f"no caption: {path.relative_to(root)} has none of {', '.join(CAPTION_KEYS)} as a text")
        return caption
    raise _Unusable(f"no caption: neither metas/{video.stem}.txt nor .json, none beside the video, none in metadata.jsonl")


def _caption_of(entry: Any) -> str | None:
    texts = [entry[key] for key in CAPTION_KEYS if key in entry] if isinstance(entry, dict) else []
    return texts[0] if texts and isinstance(texts[0], str) else None


def _read_metadata(path: Path) -> dict[str, str]:
    """File name to caption; empty if there is no such file."""
    captions: dict[str, str] = {}
    for number, entry in _read_jsonl(path) if path.is_file() else ():
        name, caption = entry.get("file_name"), _caption_of(entry)
        if not isinstance(name, str) or not name or caption is None:
            raise ValueError(f"{path}, line {number}: needs file_name and one of {', '.join(CAPTION_KEYS)}, both texts; correct the line")
        if captions.setdefault(PurePosixPath(name).as_posix(), caption) != caption:
            raise ValueError(f"{path}, line {number}: {name} is listed twice with different captions; keep one")
    return captions


class _Cache:
    """What decoding found out, by file name, size and modification time. Appended to file by file, so that a stopped run loses nothing.

    Failures are not kept: they may have passed by the next run, and are few.
    """

    def __init__(self, path: Path, counted_by: str):
        self._path, self._counted_by = path, counted_by
        self._known: dict[tuple, dict] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[tuple(entry["key"])] = entry
                except (ValueError, KeyError, TypeError):  # half a line of a run that was stopped: that file is decoded again
                    continue

    def __enter__(self) -> _Cache:
        _write_jsonl(self._path, self._known.values())
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def look_up(self, name: str, path: Path) -> tuple[VideoFacts, str]:
        stat = path.stat()
        key = (name, stat.st_size, stat.st_mtime_ns, self._counted_by)
        if key not in self._known:
            try:
                facts = video.probe(path, decode=self._counted_by == "frames")
            except VideoError as error:
                raise _Unusable(str(error).removeprefix(f"{path}: ")) from error
            sha256 = file_sha256(path)
            self._known[key] = {"key": key, "facts": asdict(facts), "sha256": sha256}
            self._file.write(json.dumps(self._known[key]) + "\n")
            self._file.flush()
        return VideoFacts(**self._known[key]["facts"]), self._known[key]["sha256"]


def _read_jsonl(path: Path) -> list[tuple[int, dict]]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); correct the line or make the file again") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: needs a JSON object; correct the line or make the file again")
        entries.append((number, entry))
    return entries


def _write_jsonl(path: Path, entries: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


# --- Windows of frames ---


def window_start(record: ClipRecord, frames: int, stride: int = 1, *, seed: int, draw: int) -> int:
    """First frame of a window of `frames` frames, `stride` apart, uniform over all that fit; a function of (seed, clip id, draw) alone.

    Raises ValueError if the clip is too short.
    """
    last = record.num_frames - _span(record.video, 0, frames, stride)
    if last < 0:
        raise ValueError(f"{record.video}: {record.num_frames} frames hold no window of {frames} at stride {stride}; index with min_frames")
    return int(noise.integers(0, last, seed, f"window/{record.id}", draw, [0])[0])


def read_window(path: Path, start: int, frames: int, stride: int = 1) -> np.ndarray:
    """Frames `start`, `start + stride`, ... of a video, counted in display order: uint8 RGB (F, H, W, 3).

    Raises FileNotFoundError, VideoError if the file cannot be decoded, or ValueError if it ends before the window does.
    """
    end = start + _span(path, start, frames, stride)
    window, count = [], 0
    # From the first frame on: a seek lands by timestamp, which files get wrong, and clips are short.
    for count, frame in enumerate(video.decode(path), start=1):
        if count > start and (count - 1 - start) % stride == 0:
            window.append(video.to_rgb(frame))
        if count == end:
            return np.stack(window)
    raise ValueError(f"{path}: frames {start}..{end - 1} at stride {stride} asked for, the file has {count}; index the clips again")


def _span(what: object, start: int, frames: int, stride: int) -> int:
    if start < 0 or frames < 1 or stride < 1:
        raise ValueError(f"{what}: a window needs start >= 0, frames >= 1, stride >= 1, got {start}, {frames}, {stride}")
    return (frames - 1) * stride + 1


# --- Geometry ---


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic resize with antialiasing of uint8 frames (F, H, W, 3) to (F, height, width, 3)."""
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for source, target in zip(frames, resized, strict=True):  # frame by frame: a long clip in float32 fills the memory
        x_BCHW = torch.from_numpy(np.ascontiguousarray(source)).permute(2, 0, 1)[None].float()
        y_BCHW = F.interpolate(x_BCHW, (height, width), mode="bicubic", antialias=True, align_corners=False)
        target[:] = y_BCHW[0].round_().clamp_(0, 255).permute(1, 2, 0).numpy()
    return resized


def fit(frames: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture, aspect kept, as large as fits and centred in height x width; the rest mirrors it.

    As the reference does it: sides are `int(scale * side + 0.5)`, an odd pixel of padding goes right or below, and padding as wide as the
    picture repeats its edge instead. Returns uint8 frames (F, height, width, 3) and a uint8 mask (height, width), 1 where padded.
    """
    check_frames("fit", frames)
    if height < 1 or width < 1:
        raise ValueError(f"fit: cannot fit frames into {width}x{height}; give sizes of at least 1")
    old_height, old_width = frames.shape[1:3]
    scale = min(height / old_height, width / old_width)
    new_height, new_width = max(1, int(scale * old_height + 0.5)), max(1, int(scale * old_width + 0.5))
    if (new_height, new_width) != (old_height, old_width):
        frames = resize(frames, new_height, new_width)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    bottom, right = height - new_height - top, width - new_width - left
    mode = "edge" if bottom >= new_height or right >= new_width else "reflect"
    mask = np.ones((height, width), np.uint8)
    mask[top : top + new_height, left : left + new_width] = 0
    if top or bottom or left or right:
        frames = np.pad(frames, ((0, 0), (top, bottom), (left, right), (0, 0)), mode=mode)
    return frames, mask
