"""Batches from a store: the training order, exact contents, and settings that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos_mp.data import dataset
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.order import index_at
from cosmos_mp.data.shards import Field, Header, Sample, ShardWriter, StoreError

COUNT = 7
EXPECT = {"kind": "clips", "diffusion.latent_shape": (16, 2, 2, 3), "net.text_dim": 4, "text.dim": 4, "text.tokens": 5}


def make(store: Path, kind: str = "clips", padding: bool = False, without: str = "") -> Path:
    fields = {
        "latent": Field((16, 2, 2, 3), torch.float32),
        "control": Field((16, 2, 2, 3), torch.float32),
        "text": Field((5, 4), torch.float16),
        "fps": Field((), torch.float32),
    }
    if kind == "pairs":
        fields["noise"] = Field((16, 2, 2, 3), torch.bfloat16)
    if padding:
        fields["padding_mask"] = Field((16, 24), torch.uint8)
    fields.pop(without, None)
    writer = ShardWriter(store, Header(kind, COUNT, 3, fields, {}))
    for shard in writer.missing_shards():
        writer.write(
            shard,
            [
                Sample({name: value(name, i, fields[name]) for name in fields}, {"caption": f"clip {i}"})
                for i in writer.header.samples(shard)
            ],
        )
    assert writer.finish()
    return store


def value(name: str, index: int, field: Field) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * index + len(name))
    number = torch.randn(field.shape, generator=generator)
    return (number > 0).to(torch.uint8) if name == "padding_mask" else number.to(field.dtype)


@pytest.fixture(params=["in memory", "from disk"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "from disk":
        monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    return request.param


def test_batches_follow_the_training_order(tmp_path: Path, memory: str) -> None:
    data = LatentDataset(make(tmp_path), 11, expect=EXPECT)
    assert len(data) == COUNT and bool(data._held) == (memory == "in memory")
    batch = data.batch(5, 4)  # over the end of the first epoch
    assert batch.position_B.dtype == torch.int64 and batch.position_B.tolist() == [5, 6, 7, 8]
    reader = data.reader.header.fields
    indices = [index_at(position, COUNT, 11) for position in range(5, 9)]
    for row, index in enumerate(indices):
        assert torch.equal(batch.latent_BCTHW[row], value("latent", index, reader["latent"]))
        assert torch.equal(batch.control_BCTHW[row], value("control", index, reader["control"]))
        assert torch.equal(batch.text_BLD[row], value("text", index, reader["text"]).float())
        assert batch.fps_B[row] == value("fps", index, reader["fps"])
    assert batch.latent_BCTHW.shape == (4, 16, 2, 2, 3) and batch.text_BLD.dtype == torch.float32
    assert torch.equal(batch.padding_mask_BHW, torch.zeros(4, 16, 24)) and batch.noise_BCTHW is None


def test_micro_batches_are_slices_of_the_batch(tmp_path: Path, memory: str) -> None:
    data = LatentDataset(make(tmp_path), 0, expect={})
    whole, parts = data.batch(3, 6), [data.batch(position, 2) for position in (3, 5, 7)]
    assert torch.equal(whole.latent_BCTHW, torch.cat([part.latent_BCTHW for part in parts]))
    assert torch.equal(whole.position_B, torch.cat([part.position_B for part in parts]))


def test_the_order_depends_on_the_seed(tmp_path: Path) -> None:
    store = make(tmp_path)
    first, second = (LatentDataset(store, seed, expect={}).batch(0, COUNT).fps_B for seed in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


def test_fixed_samples_by_index(tmp_path: Path, memory: str) -> None:
    data = LatentDataset(make(tmp_path), 0, expect={})
    batch = data.fixed([6, 0, 6])
    assert batch.position_B.tolist() == [6, 0, 6]
    assert batch.fps_B.tolist() == [value("fps", index, Field((), torch.float32)).item() for index in (6, 0, 6)]
    assert data.info(6) == {"id": 6, "caption": "clip 6"}
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=r"samples 0\.\.6"):
            data.fixed([0, index])


def test_a_changed_batch_does_not_change_the_store(tmp_path: Path, memory: str) -> None:
    data = LatentDataset(make(tmp_path), 0, expect={})
    first = data.fixed([2])
    expected = first.latent_BCTHW.clone()
    first.latent_BCTHW.zero_()
    assert torch.equal(data.fixed([2]).latent_BCTHW, expected)


def test_pairs_carry_their_noise_and_padding_is_kept(tmp_path: Path, memory: str) -> None:
    data = LatentDataset(make(tmp_path, kind="pairs", padding=True), 0, expect={"kind": "pairs"})
    batch, fields = data.fixed([4, 1]), data.reader.header.fields
    for row, index in enumerate((4, 1)):
        assert torch.equal(batch.noise_BCTHW[row], value("noise", index, fields["noise"]).float())
        assert torch.equal(batch.padding_mask_BHW[row], value("padding_mask", index, fields["padding_mask"]).float())
    assert batch.noise_BCTHW.dtype == batch.padding_mask_BHW.dtype == torch.float32


@pytest.mark.parametrize(
    ("option", "wanted", "found"),
    [
        ("kind", "pairs", "clips"),
        ("diffusion.latent_shape", (16, 3, 2, 3), r"\(16, 2, 2, 3\)"),
        ("net.text_dim", 8, "4"),
        ("text.dim", 8, "4"),
        ("text.tokens", 12, "5"),
    ],
)
def test_a_store_for_another_run_is_named(tmp_path: Path, option: str, wanted: object, found: str) -> None:
    store = make(tmp_path / "clips_of_another_run")
    with pytest.raises(StoreError, match=rf"clips_of_another_run.*{option}={found}.*expects .*{str(wanted)[1:-1]}.*cosmos_mp encode"):
        LatentDataset(store, 0, expect={**EXPECT, option: wanted})


def test_shapes_read_from_json_fit_too(tmp_path: Path) -> None:
    LatentDataset(make(tmp_path), 0, expect={"diffusion.latent_shape": [16, 2, 2, 3]})


def test_a_misspelt_option_is_no_silent_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diffusion.latent_shapes.*expected one of .*diffusion.latent_shape"):
        LatentDataset(make(tmp_path), 0, expect={"diffusion.latent_shapes": (1,)})


@pytest.mark.parametrize(("kind", "field"), [("clips", "control"), ("pairs", "noise")])
def test_a_store_without_a_needed_field_is_named(tmp_path: Path, kind: str, field: str) -> None:
    with pytest.raises(StoreError, match=f"no field {field}"):
        LatentDataset(make(tmp_path, kind=kind, without=field), 0, expect={})


def test_a_small_store_is_checked_when_opened(tmp_path: Path) -> None:
    path = make(tmp_path) / "shard_00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match="shard_00001.safetensors is damaged"):
        LatentDataset(tmp_path, 0, expect={})
