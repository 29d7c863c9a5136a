"""Pairs: noise per pair, the teacher's own answer stored exactly, the same bytes however they are made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cosmos_mp.config import PairsRun
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.shards import ShardReader, ShardWriter, StoreError, read_header
from cosmos_mp.diffusion.edm import Condition, Denoiser
from cosmos_mp.diffusion.samplers import sample_teacher
from cosmos_mp.distill.pairs import generate_pairs, pair_noise, pairs_header
from cosmos_mp.models.weights import fingerprint, named_weights
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.presets import NEGATIVE_PROMPT
from cosmos_mp.roles import load_transfer_net
from cosmos_mp.text import build_text_encoder


@pytest.fixture(scope="session")
def teacher(tiny_chain) -> Denoiser:
    run = tiny_chain.config("pairs", "pairs")
    return Denoiser(load_transfer_net(run.net, single_process(), run.teacher, "teacher").requires_grad_(False), run.diffusion)


@pytest.fixture
def short(tiny_chain) -> PairsRun:
    """Eight pairs in three shards, with few sampler steps."""
    run = tiny_chain.config("pairs", "unused")
    return dataclasses.replace(run, sampler=dataclasses.replace(run.sampler, steps=2))


@pytest.fixture
def make(short, teacher, tmp_path):
    """Make a store in this process."""

    def make(name: str, config: PairsRun = short, unconditional=None, **options) -> Path:
        clips = LatentDataset(Path(config.clips), config.seed, expect={})
        unconditional = torch.zeros(config.text.tokens, config.text.dim) if unconditional is None else unconditional
        header = pairs_header(config, clips, fingerprint(named_weights(teacher.network)), unconditional)
        writer = ShardWriter(tmp_path / name, header)
        generate_pairs(config, teacher, clips, unconditional, writer, **options)
        writer.finish()
        return tmp_path / name

    return make


def stored(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "config.json"}  # it names its own folder


# --- Contents ---


def test_noise_is_a_function_of_seed_and_pair_and_never_shared():
    shape = (2, 3, 4, 5)
    noise = pair_noise(shape, 0, list(range(200)))
    assert noise.shape == (200, *shape)
    assert torch.equal(pair_noise(shape, 0, [7, 3]), noise[[7, 3]])
    distances = torch.cdist(noise.flatten(1), noise.flatten(1)).fill_diagonal_(torch.inf)
    assert distances.min() > 1
    assert not torch.isclose(pair_noise(shape, 1, list(range(200))), noise).all(dim=(1, 2, 3, 4)).any()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_the_store_holds_noise_control_and_text_as_the_teacher_saw_them(tiny_chain):
    run = tiny_chain.config("pairs", "pairs")
    pairs, clips = ShardReader(run.out), ShardReader(run.clips)
    assert len(pairs) == 8
    for index in range(8):
        pair, clip = pairs.read(index), clips.read(index)
        assert torch.equal(pair["noise"], pair_noise(run.diffusion.latent_shape, run.seed, [index])[0])
        assert all(torch.equal(pair[name], clip[name]) for name in ("control", "text", "fps"))
        assert not torch.equal(pair["latent"], clip["latent"])
        info = pairs.info(index)
        assert (info["caption"], info["clip"]) == (clips.info(index)["caption"], clips.info(index)["clip"])
        assert (info["noise_seed"], info["clip_sample"]) == ([run.seed, index], index)


def test_the_stored_latent_is_the_samplers_answer(tiny_chain, teacher):
    run = tiny_chain.config("pairs", "pairs")
    pairs = LatentDataset(Path(run.out), 0, expect={"kind": "pairs"})
    for rows in ([0, 1], [2], [5]):  # as they were batched: two at a time inside shards of three
        batch = pairs.fixed(rows)
        condition = Condition(batch.text_BLD, batch.control_BCTHW, batch.fps_B, batch.padding_mask_BHW)
        empty = torch.zeros_like(batch.text_BLD)
        answer = sample_teacher(teacher, batch.noise_BCTHW, condition, empty, run.sampler)
        assert torch.equal(batch.latent_BCTHW, answer)
        swapped = sample_teacher(teacher, batch.noise_BCTHW, condition.with_text(empty), batch.text_BLD, run.sampler)
        assert not torch.allclose(batch.latent_BCTHW, swapped)


def test_the_negative_prompt_is_used_where_asked(tiny_chain, teacher):
    out = tiny_chain.run("pairs", "negative", "--count", 2, "--sampler.steps", 2, "--sampler.unconditional", "negative_prompt")
    run = tiny_chain.config("pairs", "negative", "--sampler.steps", 2)
    batch = LatentDataset(out, 0, expect={}).fixed([0, 1])
    condition = Condition(batch.text_BLD, batch.control_BCTHW, batch.fps_B, batch.padding_mask_BHW)
    negative = build_text_encoder(run.text).encode([NEGATIVE_PROMPT]).expand_as(batch.text_BLD)
    assert torch.equal(batch.latent_BCTHW, sample_teacher(teacher, batch.noise_BCTHW, condition, negative, run.sampler))


def test_the_header_tells_how_the_pairs_were_made(tiny_chain, teacher):
    run = tiny_chain.config("pairs", "pairs")
    header = read_header(Path(run.out))
    assert (header.kind, header.count, header.shard_size, set(header.fields)) == (
        ("pairs", 8, 3, {"latent", "control", "text", "fps", "noise"})
    )
    assert header.meta["sampler"] == {"steps": 35, "guidance": 0.5, "unconditional": "empty"}
    assert header.meta["teacher"] == fingerprint(named_weights(teacher.network))
    assert header.meta["clips"] == ShardReader(run.clips).sha256
    assert header.meta["seed"] == 0
    assert header.meta["diffusion"]["sigma_max"] == 80.0


def test_more_pairs_than_clips_go_round_with_new_noise(make, short):
    reader = ShardReader(make("round", dataclasses.replace(short, count=40, shard_size=20, batch_size=20)))
    assert [reader.info(i)["clip_sample"] for i in (0, 35, 36, 39)] == [0, 35, 0, 3]
    assert [reader.info(i)["id"] for i in (0, 35, 36, 39)] == [0, 35, 36, 39]
    first, again = reader.read(0), reader.read(36)
    assert torch.equal(first["control"], again["control"]) and torch.equal(first["text"], again["text"])
    assert not torch.isclose(first["noise"], again["noise"]).all()
    assert not torch.isclose(first["latent"], again["latent"]).all()
    noise = torch.stack([reader.read(i)["noise"].flatten() for i in range(40)])
    assert len(noise.unique(dim=0)) == 40


# --- Many processes, interruptions ---


def test_two_ranks_make_the_same_bytes_as_one(tiny_chain, monkeypatch, capsys):
    options = ("--sampler.steps", 2)
    alone = stored(tiny_chain.run("pairs", "alone", *options))
    capsys.readouterr()
    for rank, ended in ((1, "this rank is done, others are not"), (0, "complete")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        shared = tiny_chain.run("pairs", "shared", *options)
        said = capsys.readouterr().out
        assert said.endswith(f"{shared}: {ended}\n") and ("Ho-Salimans" in said) == (rank == 0)
        assert (shared / "shard_00001.safetensors").exists()
        assert (shared / "shard_00000.safetensors").exists() == (rank == 0)
    assert stored(shared) == alone


def test_killed_and_started_again_gives_the_same(make, tmp_path):
    whole = stored(make("whole"))

    def kill(done: int, total: int) -> None:
        assert total == 8
        if done == 6:  # the second shard is computed, and not yet written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("killed", progress=kill)
    store = tmp_path / "killed"
    assert (store / "shard_00000.json").exists() and not (store / "COMPLETE.json").exists()
    with pytest.raises(StoreError, match="is not complete: 2 of 3 shards are missing.*generate_pairs"):
        ShardReader(store)
    (store / "shard_00000.json").unlink()  # killed between a shard's tensors and its index
    assert stored(make("killed")) == whole


def test_finished_shards_are_kept_and_progress_counts_the_rest(make):
    store = make("kept")
    before = (store / "shard_00000.safetensors").stat().st_mtime_ns
    (store / "shard_00001.safetensors").unlink()
    seen = []
    make("kept", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    assert (store / "shard_00000.safetensors").stat().st_mtime_ns == before


def test_a_damaged_shard_is_named_and_only_it_is_made_anew(make):
    store = make("damaged")
    whole = stored(store)
    path = store / "shard_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="shard_00001.safetensors is damaged.*delete it"):
        LatentDataset(store, 0, expect={})
    path.unlink()
    path.with_suffix(".json").unlink()
    assert stored(make("damaged")) == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--teacher", "{kd}"), "no role 'teacher'"),
        (("--seed", 1), "made with other settings.*meta.seed: 0 -> 1"),
        (("--sampler.guidance", 2), "meta.sampler.guidance: 0.5 -> 2.0"),
        (("--count", 9), "count: 8 -> 9"),
    ],
)
def test_other_settings_never_mix_with_a_store(tiny_chain, options, said):
    options = [str(option).format(kd=tiny_chain.root / "kd") for option in options]
    before = stored(tiny_chain.root / "pairs")
    with pytest.raises(ValueError, match=said):
        tiny_chain.run("pairs", "pairs", *options)
    assert stored(tiny_chain.root / "pairs") == before


def test_pairs_of_two_teachers_never_mix(tiny_chain, tmp_path):
    tiny_chain.run("teacher", "other_teacher", "--train.iterations", 1)
    before = stored(tiny_chain.root / "pairs")
    with pytest.raises(StoreError, match="made with other settings .meta.teacher: '[0-9a-f]{64}' -> '[0-9a-f]{64}'.*another output folder"):
        tiny_chain.run("pairs", "pairs", "--teacher", tiny_chain.root / "other_teacher")
    assert stored(tiny_chain.root / "pairs") == before


def test_clips_that_do_not_fit_are_refused_before_the_teacher_is_read(tiny_chain, tmp_path):
    with pytest.raises(StoreError, match="text.tokens=12, this run expects 9"):
        tiny_chain.run("pairs", "new", "--text.tokens", 9, "--teacher", "absent")
    with pytest.raises(StoreError, match="kind=pairs, this run expects clips"):
        tiny_chain.run("pairs", "new", "--clips", tiny_chain.root / "pairs", "--teacher", "absent")
    with pytest.raises(FileNotFoundError, match="header.json does not exist"):
        tiny_chain.run("pairs", "new", "--clips", tmp_path, "--teacher", "absent")
    assert not (tiny_chain.root / "new").exists()
