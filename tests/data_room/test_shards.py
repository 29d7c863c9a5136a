"""The shard store: exact, resumable, shared by many writers, and quick to notice damage."""

from __future__ import annotations

import errno
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_mp.data import shards
from cosmos_mp.data.shards import Field, Header, Sample, ShardReader, ShardWriter, StoreError

HEADER = Header(
    kind="pairs",
    count=10,
    shard_size=4,
    fields={
        "latent": Field((2, 3), torch.float32),
        "text": Field((5,), torch.float16),
        "wide": Field((2,), torch.bfloat16),
        "mask": Field((3,), torch.uint8),
        "fps": Field((), torch.float32),
    },
    meta={"seed": 1, "sampler": {"steps": 35, "guidance": 7.0}, "shape": (16, 3)},
)


def sample(number: int) -> Sample:
    generator = torch.Generator().manual_seed(number)
    tensors = {
        "latent": torch.randn(3, 2, generator=generator).T,
        "text": torch.randn(5, generator=generator).half(),
        "wide": torch.randn(2, generator=generator).bfloat16(),
        "mask": torch.randint(0, 2, (3,), generator=generator, dtype=torch.uint8),
        "fps": torch.tensor(24.0 + number),
    }
    return Sample(tensors, {"caption": f"clip {number} \u2013 \u00e9", "seed": number})


def fill(store: Path, rank: int = 0, world: int = 1, header: Header = HEADER) -> bool:
    writer = ShardWriter(store, header)
    for shard in writer.missing_shards(rank, world):
        writer.write(shard, [sample(number) for number in header.samples(shard)])
    return writer.finish()


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def stamps(store: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.iterdir() if path.name != "COMPLETE.json"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    assert fill(tmp_path / "store")
    return tmp_path / "store"


def test_what_goes_in_comes_out(store: Path) -> None:
    reader = ShardReader(store)
    assert len(reader) == 10 and reader.header.to_json() == HEADER.to_json()
    for number in (9, 0, 4, 3, 8):
        expected = sample(number)
        read = reader.read(number)
        assert read.keys() == expected.tensors.keys()
        for name, value in expected.tensors.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value)
        assert reader.info(number) == {"id": number, **expected.info}
    for number in (-1, 10):
        with pytest.raises(IndexError, match=r"samples 0\.\.9"):
            reader.read(number)


def test_layout_on_disk(store: Path) -> None:
    names = [f"shard_0000{i}.{kind}" for i in range(3) for kind in ("json", "safetensors")]
    assert sorted(contents(store)) == sorted(["COMPLETE.json", "header.json", *names])
    index = json.loads((store / "shard_00002.json").read_text())
    assert [item["id"] for item in index["samples"]] == [8, 9]
    assert index["sha256"] == shards.file_sha256(store / "shard_00002.safetensors")
    assert json.loads((store / "COMPLETE.json").read_text())["samples"] == 10


@pytest.mark.parametrize("lost", [["shard_00001.safetensors", "shard_00001.json"], ["shard_00001.json"], ["shard_00001.safetensors"]])
def test_only_a_lost_shard_is_made_anew(store: Path, lost: list[str]) -> None:
    before, times = contents(store), stamps(store)
    for name in lost:
        (store / name).unlink()
    with pytest.raises(StoreError, match=r"1 of 3 shards are missing .*shard_00001.*generate_pairs"):
        ShardReader(store)
    writer = ShardWriter(store, HEADER)
    assert writer.missing_shards() == [1] and not writer.finish()
    assert fill(store) and contents(store) == before
    assert {name for name, time in stamps(store).items() if time != times[name]} == {"shard_00001.safetensors", "shard_00001.json"}


def test_a_finished_shard_is_never_made_twice(store: Path) -> None:
    before = contents(store)
    ShardWriter(store, HEADER).write(1, [sample(number + 50) for number in range(4)])
    assert contents(store) == before


def test_unfinished_store_says_what_is_missing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert not fill(store, rank=0, world=2)
    assert not (store / "COMPLETE.json").exists()
    with pytest.raises(StoreError, match=r"1 of 3 shards .*finish it with `python pretrain_scripts/generate_pairs.py`"):
        ShardReader(store)
    assert fill(store, rank=1, world=2)
    (store / "COMPLETE.json").unlink()
    with pytest.raises(StoreError, match="not complete: 0 of 3"):
        ShardReader(store)


def test_ranks_share_the_shards_and_write_the_same_bytes(store: Path, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "empty", HEADER)
    assert [writer.missing_shards(rank, 2) for rank in (0, 1)] == [[0, 2], [1]]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path / "two", rank, 2)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(tmp_path / "two") == contents(store)


def test_truncated_shard_is_named_and_made_anew(store: Path) -> None:
    path, before = store / "shard_00000.safetensors", contents(store)
    path.write_bytes(before[path.name][:-7])
    with pytest.raises(StoreError, match=rf"shard_00000.safetensors .*expected {len(before[path.name])} bytes, found \d+.*only this shard"):
        ShardReader(store, verify=False)
    assert fill(store) and contents(store) == before


def test_flipped_bit_is_named_and_the_remedy_works(store: Path) -> None:
    path, before = store / "shard_00002.safetensors", contents(store)
    damaged = bytearray(before[path.name])
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    good, bad = json.loads(before["shard_00002.json"])["sha256"], shards.file_sha256(path)
    with pytest.raises(StoreError, match=rf"shard_00002.safetensors .*{good}.*{bad}.*delete it and shard_00002.json.*only this shard"):
        ShardReader(store)
    ShardReader(store, verify=False)
    path.unlink()
    (store / "shard_00002.json").unlink()
    assert fill(store) and contents(store) == before


def test_another_shard_in_place_of_the_counted_one_is_noticed(store: Path) -> None:
    for kind in ("safetensors", "json"):
        (store / f"shard_00001.{kind}").unlink()
    writer = ShardWriter(store, HEADER)
    writer.write(1, [sample(number + 50) for number in range(4)])
    with pytest.raises(StoreError, match=r"COMPLETE.json does not belong .*generate_pairs"):
        ShardReader(store)
    assert writer.finish()
    assert torch.equal(ShardReader(store).read(4)["latent"], sample(50).tensors["latent"])


@pytest.mark.parametrize("text", ["{", "[]", '{"samples": []}', '{"samples": [{"id": 4}], "bytes": 1, "sha256": ""}'])
def test_damaged_index_is_named(store: Path, text: str) -> None:
    (store / "shard_00001.json").write_text(text)
    with pytest.raises(StoreError, match=r"shard_00001.json .*delete it and shard_00001.safetensors"):
        ShardReader(store)
    with pytest.raises(StoreError, match=r"shard_00001.json"):
        fill(store)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 2}', '{"version": 1, "kind": "pairs"}'])
def test_damaged_header_is_named(store: Path, text: str) -> None:
    (store / "header.json").write_text(text)
    for opened in (lambda: ShardReader(store), lambda: ShardWriter(store, HEADER)):
        with pytest.raises(StoreError, match=r"header.json .*another folder"):
            opened()


def test_no_store_names_the_commands(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"header.json .*cosmos_mp encode.*generate_pairs"):
        ShardReader(tmp_path)


def test_a_store_is_not_continued_with_other_settings(store: Path) -> None:
    before = contents(store)
    fields = dict(HEADER.fields, latent=Field((2, 4), torch.float32))
    meta = {**HEADER.meta, "seed": 2, "sampler": {"steps": 35, "guidance": 6.0}, "teacher": "abc"}
    with pytest.raises(StoreError) as error:
        ShardWriter(store, replace(HEADER, shard_size=5, fields=fields, meta=meta))
    message = str(error.value)
    for change in (
        "shard_size: 4 -> 5",
        "fields.latent.shape: [2, 3] -> [2, 4]",
        "meta.seed: 1 -> 2",
        "meta.sampler.guidance: 7.0 -> 6.0",
        "meta.teacher: None -> 'abc'",
        "another output folder",
    ):
        assert change in message
    assert "steps" not in message and contents(store) == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"latent": torch.zeros(3, 2)}, r"latent of sample 5 is torch.float32 \(3, 2\), expected torch.float32 \(2, 3\)"),
        ({"text": torch.zeros(5)}, r"text of sample 5 is torch.float32"),
        ({"latent": torch.full((2, 3), torch.nan)}, "latent of sample 5 is not finite"),
        ({"extra": torch.zeros(1)}, "extra"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, change: dict, complaint: str) -> None:
    writer = ShardWriter(tmp_path, HEADER)
    samples = [sample(number) for number in range(4, 8)]
    samples[1].tensors.update(change)
    with pytest.raises(ValueError, match=complaint):
        writer.write(1, samples)
    with pytest.raises(ValueError, match="shard 1 holds 4 samples, got 3"):
        writer.write(1, samples[:3])
    assert sorted(contents(tmp_path)) == ["header.json"]


def test_a_missing_field_is_refused(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(4)]
    del samples[2].tensors["fps"]
    with pytest.raises(ValueError, match="sample 2 has fields .*expected"):
        ShardWriter(tmp_path, HEADER).write(0, samples)


def test_disk_full_keeps_what_is_there(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("safetensors", "json"):
        (store / f"shard_00001.{kind}").unlink()
    before = contents(store)

    def full(_tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", full)
        with pytest.raises(OSError, match=r"shard_00001.safetensors could not be written.*No space.*finished shards stay"):
            fill(store)
    assert contents(store) == before
    assert fill(store)


def test_a_killed_writer_leaves_no_finished_shard_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the tensors and their index: the shard does not count, and the next run clears up."""
    store = tmp_path / "store"

    def killed(path: Path, value: object) -> None:
        if path.name == "shard_00000.json":
            raise KeyboardInterrupt
        write_json(path, value)

    write_json = shards._write_json
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(store)
    assert (store / "shard_00000.safetensors").exists()
    (store / ".shard_00001.safetensors.host.1.partial").write_bytes(b"half")
    assert ShardWriter(store, HEADER).missing_shards() == [0, 1, 2]
    assert fill(store) and not list(store.glob(".*"))


def test_an_old_mark_never_stands_beside_new_tensors(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    def killed(_tensors: object, _path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(store)
    assert not (store / "shard_00001.json").exists()


@pytest.mark.parametrize("change", [{"count": 0}, {"shard_size": 0}, {"kind": "videos"}])
def test_headers_that_make_no_sense(change: dict) -> None:
    with pytest.raises(StoreError, match=str(next(iter(change.values())))):
        replace(HEADER, **change)
