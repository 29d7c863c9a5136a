"""`python -m cosmos_mp`: its list, its commands in a real folder, and its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_mp import __main__, commands, options
from cosmos_mp.config import ConfigError, TextConfig
from cosmos_mp.data.clips import load_index
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.shards import StoreError
from cosmos_mp.data.video import read_video
from cosmos_mp.presets import NEGATIVE_PROMPT
from cosmos_mp.roles import read_weights
from cosmos_mp.text import build_text_encoder

ROOT = Path(__file__).parents[1]
NAMES = ["synthesize", "index", "fit-tokenizer", "cache-text", "encode", "evaluate", "sample", "convert", "verify", "bench"]


@pytest.fixture
def main(monkeypatch, capsys):
    """`python -m cosmos_mp` in this process: (status, standard output, standard error)."""
    monkeypatch.delenv("COSMOS_MP_TRACEBACK", raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cosmos_mp", *words])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
        return stop.value.code, *capsys.readouterr()

    return run


# --- The list ---


def test_the_module_lists_every_command():
    done = subprocess.run([sys.executable, "-m", "cosmos_mp", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == NAMES == list(__main__.COMMANDS)


def test_without_a_command_the_list_ends_with_status_2(main):
    status, out, _ = main()
    assert status == 2
    assert all(f"  {name}" in out for name in NAMES)


def test_an_unknown_command_names_the_nearest(main):
    status, out, err = main("evalute", "tiny_evaluate")
    assert (status, out) == (1, "")
    assert err == "error: ConfigError: unknown command 'evalute'; did you mean 'evaluate'?\n"


def test_a_command_like_no_other_names_them_all():
    with pytest.raises(ConfigError, match="'zzz'; known: synthesize, index"):
        commands.dispatch(__main__.COMMANDS, "zzz", [])


def test_dispatch_hands_on_words_and_status():
    assert commands.dispatch({"a": lambda words: len(words)}, "a", ["x", "y"]) == 2


@pytest.mark.parametrize("words", [["index", "here", "--min-frame", "9"], ["synthesize", "there", "many"], ["verify"]])
def test_wrong_options_end_with_status_2(main, words):
    status, out, err = main(*words)
    assert status == 2
    assert err and "Traceback" not in err + out
    assert "--min-frames" in err or words[0] != "index"


# --- Clips ---


def test_synthesize_index_and_fit_tokenizer(main, tmp_path):
    videos = tmp_path / "videos"
    status, out, _ = main("synthesize", str(videos), "3", "--seed", "5", "--frames", "11", "--height", "48", "--width", "80")
    assert (status, out) == (0, f"{videos}: 3 clips\n")
    assert read_video(videos / "videos" / "000002.mp4")[0].shape == (11, 48, 80, 3)
    (videos / "videos" / "broken.mp4").write_bytes(b"not a video")
    (videos / "metas" / "broken.txt").write_text("a caption")
    status, out, _ = main("index", str(videos), "--min-frames", "9")
    assert status == 0
    assert "skipped videos/broken.mp4: " in out
    assert out.endswith("clips.jsonl: 3 clips, 1 skipped (rejected.jsonl has the reasons)\n")
    size = ["--height", "48", "--width", "80"]
    status, out, _ = main("fit-tokenizer", str(videos), str(tmp_path / "tokenizer"), "--clips", "2", *size)
    assert (status, out) == (0, f"{tmp_path / 'tokenizer'}: fitted on 2 clips\n")
    file = tmp_path / "tokenizer" / "tokenizer.safetensors"
    before = file.stat().st_mtime_ns
    status, out, _ = main("fit-tokenizer", str(videos), str(tmp_path / "tokenizer"), "--clips", "2", *size)
    assert (status, out) == (0, f"{tmp_path / 'tokenizer'}: there already, kept\n")
    for other in (["--clips", "3", *size], ["--clips", "2"], ["--clips", "2", *size, "--seed", "1"]):
        status, _, err = main("fit-tokenizer", str(videos), str(tmp_path / "tokenizer"), *other)
        assert status == 1 and "holds a tokenizer of other clips, sizes or seed" in err
    assert file.stat().st_mtime_ns == before


def test_a_folder_that_is_only_read_is_indexed_elsewhere(main, tiny_world, tmp_path):
    videos, index, tokenizer = tmp_path / "videos", tmp_path / "index", str(tmp_path / "tokenizer")
    for room in ("videos", "metas"):
        shutil.copytree(tiny_world.root / "videos" / room, videos / room)
    before = {path: path.stat().st_mtime_ns for path in [videos, *videos.rglob("*")]}
    where = ["--index", str(index)]
    status, out, _ = main("index", str(videos), "--min-frames", "9", "--out", str(index), "--no-decode")
    assert (status, out) == (0, f"{index / 'clips.jsonl'}: 48 clips\n")
    assert main("fit-tokenizer", str(videos), tokenizer, *where, "--clips", "20")[0] == 0
    assert main("cache-text", str(videos), str(tmp_path / "text"), *where, "--text.kind", "tiny")[0] == 0
    store = ["--out", str(tmp_path / "clips"), "--tokenizer.path", tokenizer, "--limit", "2"]
    assert main("encode", "tiny_encode", "--videos", str(videos), *where, *store)[0] == 0
    assert len(LatentDataset(tmp_path / "clips", 0, expect={})) == 2
    assert {path: path.stat().st_mtime_ns for path in [videos, *videos.rglob("*")]} == before
    status, _, err = main("encode", "tiny_encode", "--videos", str(videos), *store)
    assert status == 1 and f"{videos / 'clips.jsonl'}: no index of clips; make it with `python -m cosmos_mp index {videos}`" in err


def test_a_folder_without_usable_clips_is_an_error(main, tiny_world, tmp_path):
    shutil.copytree(tiny_world.root / "videos", tmp_path / "videos")
    status, out, err = main("index", str(tmp_path / "videos"), "--min-frames", "10")
    assert (status, out) == (1, "")
    assert "too few frames (48); see" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "videos" / "clips.jsonl").exists(), "an older index would be taken for this one"


def test_cached_captions_are_what_the_encoder_says(tiny_world, tmp_path, capsys):
    videos, words = tiny_world.root / "videos", ["--text.kind", "tiny", "--text.tokens", "7", "--text.dim", "6"]
    commands.cache_text([str(videos), str(tmp_path), *words])
    captions = {record.caption for record in load_index(videos / "clips.jsonl")}
    assert f"{len(captions) + 1} captions added" in capsys.readouterr().out
    cached = build_text_encoder(TextConfig("cached", str(tmp_path), 7, 6))
    asked = [*sorted(captions)[:3], NEGATIVE_PROMPT]
    # A cache holds float16.
    torch.testing.assert_close(cached.encode(asked), build_text_encoder(TextConfig("tiny", "", 7, 6)).encode(asked), rtol=1e-3, atol=1e-3)
    commands.cache_text([str(videos), str(tmp_path), *words])
    assert "0 captions added" in capsys.readouterr().out


def test_encode_splits_the_clips_and_goes_on_with_nothing_to_do(tiny_world, capsys):
    stores = {side: tiny_world.root / "clips" / side for side in ("train", "holdout")}
    clips = {
        side: [LatentDataset(path, 0, expect={}).info(i)["clip"] for i in range(n)]
        for (side, path), n in zip(stores.items(), (36, 12), strict=True)
    }
    assert not set(clips["train"]) & set(clips["holdout"])
    assert len(set(clips["train"]) | set(clips["holdout"])) == 48
    before = {path: path.stat().st_mtime_ns for path in stores["train"].glob("shard_*")}
    options = ["--videos", str(tiny_world.root / "videos"), "--out", str(stores["train"]), "--shard_size", "16"]
    options += ["--split", "train", "--holdout_share", "0.25", "--tokenizer.path", str(tiny_world.root / "tokenizer")]
    assert not commands.encode(["tiny_encode", *options])
    assert capsys.readouterr().out == f"{stores['train']}: complete\n"
    assert before == {path: path.stat().st_mtime_ns for path in stores["train"].glob("shard_*")}
    with pytest.raises(StoreError, match="meta.seed: 0 -> 3"):
        commands.encode(["tiny_encode", *options, "--seed", "3"])


def test_ranks_of_torchrun_encode_their_own_shards(tiny_world, tmp_path, monkeypatch, capsys):
    options = ["--videos", str(tiny_world.root / "videos"), "--out", str(tmp_path / "train"), "--shard_size", "16", "--split", "train"]
    options += ["--holdout_share", "0.25", "--tokenizer.path", str(tiny_world.root / "tokenizer")]
    for rank, (shards, ended) in enumerate([([0, 2], "this rank is done, others are not"), ([0, 1, 2], "complete")]):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        commands.encode(["tiny_encode", *options])
        assert capsys.readouterr().out.endswith(f": {ended}\n")
        assert sorted(path.name for path in (tmp_path / "train").glob("*.safetensors")) == [f"shard_{i:05d}.safetensors" for i in shards]
    for path in (tmp_path / "train").glob("*.safetensors"):
        assert path.read_bytes() == (tiny_world.root / "clips" / "train" / path.name).read_bytes()


# --- Weights ---


def sample_json(world, folder: Path) -> str:
    """The sizes of the small world's networks as a file that `convert` takes for its preset."""
    path = folder / "sample.json"
    options.save(world.config("sample", "x.mp4"), path)
    return str(path)


@pytest.mark.parametrize("layout", ["nvidia-teacher", "nvidia-student"])
def test_convert_to_an_nvidia_file_and_back(tiny_chain, tmp_path, layout):
    run = str(tiny_chain.root / "dmd2")
    commands.convert([sample_json(tiny_chain, tmp_path), run, str(tmp_path / "student.pt"), "--to", layout])
    same(read_weights(str(tmp_path / "student.pt"), "student"), read_weights(run, "student"))
    names = torch.load(tmp_path / "student.pt", weights_only=True)
    names = names["model"] if layout == "nvidia-student" else names
    assert all(name.startswith("net." if layout == "nvidia-student" else ("net.", "base_model.net.")) for name in names)


def test_convert_to_a_hugging_face_folder_and_back(tiny_chain, tmp_path, capsys):
    run, out = str(tiny_chain.root / "dmd2"), tmp_path / "student"
    commands.convert([sample_json(tiny_chain, tmp_path), run, str(out)])
    assert "loaded again with diffusers: largest difference" in capsys.readouterr().out
    found, expected = read_weights(str(out), "student"), read_weights(run, "student")
    unused = {name for name in expected if name.startswith("control.final.")}
    assert unused and all(found.pop(name).eq(0).all() for name in unused)
    same(found, {name: value for name, value in expected.items() if name not in unused})


def test_convert_of_another_size_is_refused(tiny_chain, tmp_path):
    with pytest.raises(ConfigError, match="dmd2 holds another network .net.hidden=48, here 96"):
        commands.convert(["tiny_sample", str(tiny_chain.root / "dmd2"), str(tmp_path / "student")])
    assert not (tmp_path / "student").exists()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- Golden cases ---


def test_verify_ends_with_0_where_every_quantity_agrees(main, golden):
    status, out, _ = main("verify", str(golden / "ops"))
    assert status == 0
    assert "FAIL" not in out


def test_verify_ends_with_1_beyond_the_tolerance(main, golden, tmp_path):
    case = tmp_path / "ops"
    shutil.copytree(golden / "ops", case)
    expected = load_file(case / "expected.safetensors")
    name = next(iter(expected))
    expected[name] = expected[name] * (1 + 1e-3)
    save_file(expected, case / "expected.safetensors")
    status, out, _ = main("verify", str(case))
    assert status == 1
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("  FAIL")] == [name]


def test_verify_of_a_folder_without_cases_is_an_error(main, tmp_path):
    status, _, err = main("verify", str(tmp_path))
    assert status == 1
    assert "no */config.json here" in err and len(err.splitlines()) == 1


# --- Stages among the commands ---


def test_evaluate_and_sample_show_what_they_would_run(main):
    for stage in ("evaluate", "sample", "encode"):
        status, out, _ = main(stage, f"tiny_{stage}", "--dry-run")
        assert status == 0
        assert json.loads(out[: out.rindex("\n}") + 2])["stage"] == stage


def test_sample_without_a_caption_is_one_line(main, tiny_world):
    status, out, err = main("sample", "tiny_sample")
    assert (status, out) == (1, "")
    assert err == "error: ConfigError: no caption: give --prompt\n"
