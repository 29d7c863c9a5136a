"""Cached embeddings and the import of NVIDIA's pickles."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_mp.config import TextConfig
from cosmos_mp.text import build_text_encoder
from cosmos_mp.text.cached import CachedText, CaptionError, caption_key, import_nvidia, read_nvidia_pickle, write_cache
from cosmos_mp.text.tiny import TinyText

TOKENS, DIM = 12, 8
CAPTIONS = ["a red circle", "a green square moves up", "", "one", "two words"]


class Recorder(TinyText):
    """The tiny encoder, remembering what it was asked; it may fail at a given caption."""

    def __init__(self, fail_at: str | None = None) -> None:
        super().__init__(TOKENS, DIM)
        self.asked: list[str] = []
        self.fail_at = fail_at

    def encode(self, captions: Sequence[str]) -> Tensor:
        if self.fail_at in captions:
            raise KeyboardInterrupt
        self.asked += captions
        return super().encode(captions)


def read(folder: Path, tokens: int = TOKENS, dim: int = DIM) -> CachedText:
    return build_text_encoder(TextConfig("cached", str(folder), tokens, dim))


def test_float32_round_trip_is_exact_and_trimmed(tmp_path: Path) -> None:
    encoder = Recorder()
    assert write_cache(tmp_path, encoder, CAPTIONS, dtype=torch.float32, batch_size=2) == 5
    cached = read(tmp_path)
    order = [CAPTIONS[i] for i in (3, 0, 2, 4, 1, 3)]
    text = cached.encode(order)
    assert text.dtype == torch.float32 and torch.equal(text, encoder.encode(order))
    assert torch.equal(cached.null(2), torch.zeros(2, TOKENS, DIM))
    entry = json.loads((tmp_path / "index.json").read_text())["entries"][caption_key("two words")]
    assert cached._tensor(entry).shape == (2, DIM)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and not list(tmp_path.glob("*.partial"))


def test_float16_is_the_default(tmp_path: Path) -> None:
    write_cache(tmp_path, Recorder(), CAPTIONS)
    assert torch.equal(read(tmp_path).encode(CAPTIONS), Recorder().encode(CAPTIONS).half().float())


def test_zero_rows_inside_a_caption_survive(tmp_path: Path) -> None:
    class Gap(TinyText):
        def encode(self, captions: Sequence[str]) -> Tensor:
            text = super().encode(captions)
            text[:, 1] = 0
            return text

    write_cache(tmp_path, Gap(TOKENS, DIM), ["a b c"], dtype=torch.float32)
    assert torch.equal(read(tmp_path).encode(["a b c"]), Gap(TOKENS, DIM).encode(["a b c"]))


def test_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, Recorder(fail_at="one"), CAPTIONS, batch_size=2)
    assert torch.equal(read(tmp_path).encode(CAPTIONS[:2]), Recorder().encode(CAPTIONS[:2]).half().float())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    encoder = Recorder()
    assert write_cache(tmp_path, encoder, [*CAPTIONS, *CAPTIONS], batch_size=2) == 3
    assert encoder.asked == CAPTIONS[2:]
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}.items()
    assert write_cache(tmp_path, encoder, CAPTIONS) == 0
    read(tmp_path).encode(CAPTIONS)


def test_failed_write_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path, Recorder(), CAPTIONS[:2])
    content = (tmp_path / "index.json").read_bytes()

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("cosmos_mp.text.cached.save_file", full)
        write_cache(tmp_path, Recorder(), CAPTIONS)
    assert (tmp_path / "index.json").read_bytes() == content
    assert write_cache(tmp_path, Recorder(), CAPTIONS) == 3
    assert torch.equal(read(tmp_path).encode(CAPTIONS), Recorder().encode(CAPTIONS).half().float())
    assert not list(tmp_path.glob("*.partial"))


def test_half_written_index_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path, Recorder(), CAPTIONS[:2])
    write_text = Path.write_text

    def killed(path: Path, text: str, **_: str) -> None:
        write_text(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        write_cache(tmp_path, Recorder(), CAPTIONS)
    read(tmp_path).encode(CAPTIONS[:2])
    assert write_cache(tmp_path, Recorder(), CAPTIONS) == 3


def test_unknown_caption_names_caption_folder_and_command(tmp_path: Path) -> None:
    write_cache(tmp_path, Recorder(), CAPTIONS)
    with pytest.raises(CaptionError) as caught:
        read(tmp_path).encode(["one", "A red circle"])
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "'A red circle'" in message and "python -m cosmos_mp cache-text" in message


def test_wrong_folders_and_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="index.json.*cache-text"):
        read(tmp_path)
    write_cache(tmp_path, Recorder(), CAPTIONS)
    with pytest.raises(ValueError, match="8 wide, but text.dim=1024"):
        read(tmp_path, dim=1024)
    with pytest.raises(ValueError, match=r"\(5, 8\), expected at most \(4, 8\); set text.tokens"):
        read(tmp_path, tokens=4).encode(["a green square moves up"])
    with pytest.raises(ValueError, match="width 8, the encoder gives 16"):
        write_cache(tmp_path, TinyText(TOKENS, 16), CAPTIONS)
    (tmp_path / "index.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="not the index of a text cache"):
        read(tmp_path)
    (tmp_path / "index.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    write_cache(tmp_path, Recorder(), CAPTIONS)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
        read(tmp_path).encode(["one"])
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
        read(tmp_path).encode(["one"])


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Loud(TinyText):
        def encode(self, captions: Sequence[str]) -> Tensor:
            return super().encode(captions) * 1e6

    with pytest.raises(ValueError, match="dtype=torch.float32"):
        write_cache(tmp_path, Loud(TOKENS, DIM), ["one"])
    assert not (tmp_path / "index.json").exists()
    write_cache(tmp_path, Loud(TOKENS, DIM), ["one"], dtype=torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        write_cache(tmp_path, Recorder(), ["two"], dtype=torch.bfloat16)


# --- NVIDIA's pickles ---


def dump(path: Path, value: object, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def embedding(seed: int, length: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, DIM)).astype(np.float16)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_reads_a_list_of_one_array_and_an_array(tmp_path: Path, protocol: int) -> None:
    for value in ([embedding(0)], embedding(0)):
        rows = read_nvidia_pickle(dump(tmp_path / "a.pickle", value, protocol), DIM)
        assert rows.dtype == torch.float32 and torch.equal(rows, torch.from_numpy(embedding(0)).float())


@pytest.mark.filterwarnings("error")
def test_reads_the_module_names_of_numpy_1(tmp_path: Path) -> None:
    content = pickle.dumps([embedding(0)], protocol=3)  # spells the names out, without their length
    assert b"cnumpy._core.multiarray\n" in content
    (tmp_path / "old.pickle").write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert torch.equal(read_nvidia_pickle(tmp_path / "old.pickle", DIM), torch.from_numpy(embedding(0)).float())


class Malicious:
    def __init__(self, call: object, *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.args


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "bad.pickle"
    for name, evil in {
        "Path.touch": Malicious(Path.touch, mark),
        "exec": Malicious(exec, f"open({str(mark)!r}, 'w')"),
        "eval": [embedding(0), Malicious(eval, f"open({str(mark)!r}, 'w')")],
        "object array": np.array([Malicious(exec, f"open({str(mark)!r}, 'w')")], dtype=object),
        "numpy.load": Malicious(np.load, "x.npy"),
    }.items():
        dump(path, evil)
        if name in ("exec", "Path.touch"):
            pickle.loads(path.read_bytes())  # it does run where nothing stops it
            assert mark.exists(), name
            mark.unlink()
        with pytest.raises(ValueError, match="bad.pickle: refused, .*it asks for"):
            read_nvidia_pickle(path, DIM)
        assert not mark.exists(), name


@pytest.mark.parametrize(
    "value",
    [
        [embedding(0), embedding(1)],
        [],
        embedding(0)[:, :4],
        embedding(0)[None],
        embedding(0).astype(np.int64),
        "text",
        {"t5_text_embeddings": embedding(0)},
        np.array([None, embedding(0)], dtype=object),
    ],
)
def test_other_content_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="a.pickle: holds .*expected one float array"):
        read_nvidia_pickle(dump(tmp_path / "a.pickle", value), DIM)


def test_missing_and_truncated_pickles_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a.pickle"):
        read_nvidia_pickle(tmp_path / "a.pickle", DIM)
    path = dump(tmp_path / "a.pickle", [embedding(0)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.pickle: refused"):
        read_nvidia_pickle(path, DIM)


def test_import_of_a_dataset(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    (data / "metas").mkdir(parents=True)
    for index, caption in enumerate(["first caption", "second caption"]):
        dump(data / "t5_xxl" / f"{index}.pickle", [embedding(index, 4 + index)])
        (data / "metas" / f"{index}.txt").write_text(caption + "\n")
    assert import_nvidia(cache, data, dim=DIM) == 2
    text = read(cache).encode(["second caption", "first caption"])
    assert torch.equal(text[0, :5], torch.from_numpy(embedding(1)).float()) and text[0, 5:].eq(0).all()
    assert torch.equal(text[1, :4], torch.from_numpy(embedding(0, 4)).float()) and text[1, 4:].eq(0).all()
    assert import_nvidia(cache, data, dim=DIM) == 0
    (data / "metas" / "1.txt").unlink()
    with pytest.raises(FileNotFoundError, match="1.txt: no caption"):
        import_nvidia(cache, data, dim=DIM)
    with pytest.raises(FileNotFoundError, match="t5_xxl"):
        import_nvidia(cache, tmp_path / "nowhere", dim=DIM)
