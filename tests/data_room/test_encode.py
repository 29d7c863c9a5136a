"""Encoding real video files with a fitted tokenizer: what is stored is what the parts give when called directly."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cosmos_mp.config import ClipConfig, TextConfig, TokenizerConfig
from cosmos_mp.data import encode
from cosmos_mp.data.clips import ClipRecord, fit, index_clips, load_index, read_window, window_start
from cosmos_mp.data.controls import edge, edge_thresholds, read_control, vis
from cosmos_mp.data.encode import EncodeError, encode_clips, files_sha256
from cosmos_mp.data.shards import ShardReader, StoreError
from cosmos_mp.data.synthetic import synthesize
from cosmos_mp.data.video import write_video
from cosmos_mp.text import build_text_encoder
from cosmos_mp.text.cached import write_cache
from cosmos_mp.tokenizers.tiny import TinyTokenizer, fit_tiny

CLIP = ClipConfig(control="edge", frames=9, height=64, width=64, edge_preset="random")
TEXT = TextConfig("tiny", "", tokens=12, dim=8)
SEED = 3


class World(NamedTuple):
    root: Path
    index: list[ClipRecord]
    tokenizer: TokenizerConfig

    def encode(self, out: Path, clip: ClipConfig = CLIP, text: TextConfig = TEXT, **options: object) -> bool:
        options = {"seed": SEED, "shard_size": 3, "progress": False, **options}
        index = options.pop("index", self.index)
        return encode_clips(index, self.root, out, clip, self.tokenizer, text, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Seven clips of 13 frames: longer than the window, so that starts differ."""
    root = tmp_path_factory.mktemp("world")
    synthesize(root, 7, seed=0, frames=13)
    index_clips(root, min_frames=9)
    videos = np.stack([read_window(path, 0, 9) for path in sorted((root / "videos").glob("*.mp4"))])
    path = fit_tiny(videos, 0).save(root / "tokenizer")
    return World(root, load_index(root / "clips.jsonl"), TokenizerConfig("tiny", str(path)))


@pytest.fixture(scope="module")
def store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "clips"
    assert world.encode(out)
    return out


def latent_of(world: World, frames: np.ndarray) -> torch.Tensor:
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return TinyTokenizer.load(Path(world.tokenizer.path)).encode(video)[0]


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def test_stored_samples_are_what_the_parts_give(world: World, store: Path) -> None:
    reader, text = ShardReader(store), build_text_encoder(TEXT)
    assert len(reader) == len(world.index) == 7
    assert reader.header.fields["text"].dtype == torch.float32 and "padding_mask" not in reader.header.fields
    for number, record in enumerate(world.index):
        sample, info = reader.read(number), reader.info(number)
        assert (info["clip"], info["caption"], info["window"], info["fps"]) == (record.id, record.caption, 0, record.fps)
        assert info["start"] == window_start(record, 9, 1, seed=SEED, draw=0)
        frames = read_window(world.root / record.video, info["start"], 9)
        control = edge(frames, *info["edge_thresholds"])
        torch.testing.assert_close(sample["latent"], latent_of(world, frames), atol=1e-5, rtol=0)
        torch.testing.assert_close(sample["control"], latent_of(world, control), atol=1e-5, rtol=0)
        assert torch.equal(sample["text"], text.encode([record.caption])[0])
        assert sample["fps"] == np.float32(record.fps)
        assert tuple(info["edge_thresholds"]) == edge_thresholds("random", seed=SEED, clip_id=record.id, draw=0)
    assert len({tuple(reader.info(number)["edge_thresholds"]) for number in range(7)}) > 3
    assert len({reader.info(number)["start"] for number in range(7)}) > 1


def test_ranks_write_the_same_bytes(world: World, store: Path, tmp_path: Path) -> None:
    assert not world.encode(tmp_path, rank=1, world=2)
    assert world.encode(tmp_path, rank=0, world=2)
    assert contents(tmp_path) == contents(store)


def test_only_a_lost_shard_is_encoded_again(world: World, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    for kind in ("json", "safetensors"):
        (copy / f"shard_00001.{kind}").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in copy.glob("shard_*")}
    assert world.encode(copy) and contents(copy) == contents(store)
    assert all((copy / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_store_made_with_other_settings_is_not_continued(world: World, store: Path, tmp_path: Path) -> None:
    before = contents(store)
    other = fit_tiny(np.random.default_rng(0).integers(0, 256, (4, 9, 64, 64, 3), dtype=np.uint8), 0).save(tmp_path)
    renamed = [replace(world.index[0], caption="something else"), *world.index[1:]]
    for change, options in {
        "meta.seed: 3 -> 4": {"seed": 4},
        "meta.clip.edge_preset: 'random' -> 'low'": {"clip": replace(CLIP, edge_preset="low")},
        "meta.clips_sha256": {"index": renamed},
        "count: 7 -> 5": {"limit": 5},
        "fields.text.shape": {"text": replace(TEXT, tokens=4)},
    }.items():
        with pytest.raises(StoreError, match=change):
            world.encode(store, **options)
    with pytest.raises(StoreError, match=r"meta.tokenizer.sha256"):
        world._replace(tokenizer=TokenizerConfig("tiny", str(other))).encode(store)
    assert contents(store) == before


def test_the_tokenizer_may_move(world: World, store: Path, tmp_path: Path) -> None:
    moved = shutil.copy(world.tokenizer.path, tmp_path)
    assert world._replace(tokenizer=TokenizerConfig("tiny", str(moved))).encode(store)


def test_vis_control_is_drawn_per_window(world: World, tmp_path: Path) -> None:
    assert world.encode(tmp_path, replace(CLIP, control="vis", windows=2), limit=2)
    reader = ShardReader(tmp_path)
    for number in range(4):
        record, info = world.index[number // 2], reader.info(number)
        frames = read_window(world.root / record.video, info["start"], 9)
        expected = latent_of(world, vis(frames, seed=SEED, clip_id=record.id, draw=number % 2))
        torch.testing.assert_close(reader.read(number)["control"], expected, atol=1e-5, rtol=0)
        assert "edge_thresholds" not in info


def test_ready_made_control(world: World, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(world.root, root)
    depth = np.random.default_rng(0).integers(0, 256, (13, 64, 64, 3), dtype=np.uint8)
    for record in world.index[:2]:
        write_video(root / "depth" / f"{record.id}.mp4", depth, 8)
    here, clip = world._replace(root=root), replace(CLIP, control="depth")
    assert here.encode(tmp_path / "out", clip, limit=2)
    reader = ShardReader(tmp_path / "out")
    for number, record in enumerate(world.index[:2]):
        frames = read_control(root, "depth", record, reader.info(number)["start"], 9, 1)
        torch.testing.assert_close(reader.read(number)["control"], latent_of(world, frames), atol=1e-5, rtol=0)
    with pytest.raises(EncodeError, match=r"5 clips have no depth video, the first is .*depth/000002.mp4"):
        here.encode(tmp_path / "all", clip)
    assert not (tmp_path / "all").exists()


def test_windows_of_one_clip_draw_for_themselves(world: World, tmp_path: Path) -> None:
    clip = replace(CLIP, windows=4, frames=5, stride=2)
    assert world.encode(tmp_path, clip, limit=2)
    reader = ShardReader(tmp_path)
    assert [(reader.info(i)["clip"], reader.info(i)["window"]) for i in range(8)] == [(r.id, w) for r in world.index[:2] for w in range(4)]
    assert len({reader.info(i)["start"] for i in range(4)}) > 1
    assert len({tuple(reader.info(i)["edge_thresholds"]) for i in range(4)}) == 4
    for number in (2, 7):
        record, info = world.index[number // 4], reader.info(number)
        assert info["start"] == window_start(record, 5, 2, seed=SEED, draw=number % 4)
        assert reader.read(number)["fps"] == info["fps"] == record.fps / 2  # every second frame: half the rate
        frames = read_window(world.root / record.video, info["start"], 5, 2)
        torch.testing.assert_close(reader.read(number)["latent"], latent_of(world, frames), atol=1e-5, rtol=0)
        control = edge(frames, *info["edge_thresholds"])
        torch.testing.assert_close(reader.read(number)["control"], latent_of(world, control), atol=1e-5, rtol=0)


def test_padding_is_stored_where_a_clip_needs_it(world: World, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name, width in (("a", 64), ("b", 96)):
        write_video(root / "videos" / f"{name}.mp4", np.random.default_rng(0).integers(0, 256, (9, 64, width, 3), dtype=np.uint8), 8)
        (root / "metas").mkdir(exist_ok=True)
        (root / "metas" / f"{name}.txt").write_text(f"clip {name}")
    index_clips(root, min_frames=9)
    here = world._replace(root=root, index=load_index(root / "clips.jsonl"))
    assert here.encode(tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    assert not reader.read(0)["padding_mask"].any()
    frames, padding_mask = fit(read_window(root / "videos" / "b.mp4", 0, 9), 64, 64)
    sample = reader.read(1)
    assert padding_mask.any() and torch.equal(sample["padding_mask"], torch.from_numpy(padding_mask))
    torch.testing.assert_close(sample["latent"], latent_of(world, frames), atol=1e-5, rtol=0)
    control = edge(frames, *reader.info(1)["edge_thresholds"])
    torch.testing.assert_close(sample["control"], latent_of(world, control), atol=1e-5, rtol=0)


def test_cached_text_is_stored_in_half_precision_and_missing_captions_are_named_first(world: World, tmp_path: Path) -> None:
    tiny, text = build_text_encoder(TEXT), replace(TEXT, kind="cached", path=str(tmp_path / "cache"))
    write_cache(tmp_path / "cache", tiny, [record.caption for record in world.index[:3]])
    assert world.encode(tmp_path / "out", text=text, limit=3)
    stored = ShardReader(tmp_path / "out").read(2)["text"]
    assert stored.dtype == torch.float16 and torch.equal(stored, tiny.encode([world.index[2].caption])[0].half())
    with pytest.raises(Exception, match="cache-text"):
        world.encode(tmp_path / "all", text=text)
    assert not list((tmp_path / "all").glob("shard_*"))


def test_batches_do_not_change_what_is_stored(world: World, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_BATCH", 2)
    assert world.encode(tmp_path)
    one, other = ShardReader(tmp_path), ShardReader(store)
    for number in range(7):
        torch.testing.assert_close(one.read(number)["latent"], other.read(number)["latent"], atol=1e-5, rtol=0)
        assert one.info(number) == other.info(number)


def test_batch_size_fits_the_clip() -> None:
    assert encode._batch_size(CLIP) == 32
    assert encode._batch_size(ClipConfig()) == 1


def test_clips_that_cannot_be_encoded_are_named_first(world: World, tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match=r"7 clips .*000000.*13 frames.*spans 17"):
        world.encode(tmp_path, replace(CLIP, stride=2))
    with pytest.raises(EncodeError, match="nothing to encode.*0 clips"):
        world.encode(tmp_path, index=[])
    with pytest.raises(EncodeError, match="1 clips .*no frame rate.*000001"):
        world.encode(tmp_path, index=[world.index[0], replace(world.index[1], fps=0.0)])
    with pytest.raises(ValueError, match="clip.frames=8"):
        world.encode(tmp_path, replace(CLIP, frames=8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_clip_that_broke_since_it_was_indexed_is_named(world: World, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(world.root, root)
    video = root / world.index[4].video
    if damage == "gone":
        video.unlink()
    else:
        video.write_bytes(video.read_bytes()[:1000])
    with pytest.raises(EncodeError, match=rf"{video.name}.*cosmos_mp index"):
        world._replace(root=root).encode(tmp_path / "out")
    assert (tmp_path / "out" / "shard_00000.json").exists() and not (tmp_path / "out" / "COMPLETE.json").exists()
    shutil.copy(world.root / world.index[4].video, video)
    assert world._replace(root=root).encode(tmp_path / "out")


def test_tokenizer_hash_covers_its_files_alone(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "mean_std.pt").write_bytes(b"a")
    (tmp_path / "vae" / "config.json").write_bytes(b"b")
    first = files_sha256(tmp_path)
    (tmp_path / "README.md").write_bytes(b"words")
    assert files_sha256(tmp_path) == first
    (tmp_path / "vae" / "config.json").write_bytes(b"c")
    second = files_sha256(tmp_path)
    (tmp_path / "mean_std.pt").write_bytes(b"b")
    assert len({first, second, files_sha256(tmp_path)}) == 3
