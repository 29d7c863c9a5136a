"""T5's encoder with small random weights and a tokenizer trained on a few lines, from a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5TokenizerFast

from cosmos_mp.config import TextConfig
from cosmos_mp.text import build_text_encoder
from cosmos_mp.text.t5 import T5Text

TOKENS, DIM = 16, 32
LONG = "the quick brown fox jumps over the lazy dog and a red circle moves left"


@pytest.fixture(scope="module")
def folder(save_t5, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"), d_model=DIM)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "t5"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> T5Text:
    return build_text_encoder(TextConfig("t5", str(folder), TOKENS, DIM))


@torch.no_grad()
def test_equals_t5_padded_to_full_length(encoder: T5Text, folder: Path) -> None:
    captions = ["a red fox", LONG, "", "a green circle"]
    text = encoder.encode(captions)
    assert text.dtype == torch.float32 and text.shape == (4, TOKENS, DIM)
    tokenizer, model = T5TokenizerFast.from_pretrained(folder), T5EncoderModel.from_pretrained(folder).eval()
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    lengths = batch.attention_mask.sum(dim=1).tolist()
    assert lengths[1] == TOKENS and lengths[2] == 1 and len(set(lengths)) > 2
    hidden = model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    for row, expected, length in zip(text, hidden, lengths, strict=True):
        torch.testing.assert_close(row[:length], expected[:length], atol=1e-5, rtol=1e-5)
        assert row[:length].ne(0).any(dim=1).all() and row[length:].eq(0).all()


def test_truncation_keeps_the_end_token(encoder: T5Text) -> None:
    assert encoder.tokenizer(LONG, truncation=True, max_length=TOKENS).input_ids[-1] == 1
    assert len(encoder.tokenizer(LONG).input_ids) > TOKENS


def test_a_caption_does_not_depend_on_its_batch(encoder: T5Text) -> None:
    alone = encoder.encode(["a red fox"])
    torch.testing.assert_close(encoder.encode([LONG, "a red fox"])[1:], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder.encode(["a red fox"]), alone)  # no dropout


def test_empty_caption_is_t5s_own_answer_and_null_is_zeros(encoder: T5Text) -> None:
    empty = encoder.encode([""])
    assert empty[0, 0].ne(0).any() and empty[0, 1:].eq(0).all()
    assert torch.equal(encoder.null(2), torch.zeros(2, TOKENS, DIM))


def test_bfloat16_gives_float32_nearby(encoder: T5Text, folder: Path) -> None:
    half = build_text_encoder(TextConfig("t5", str(folder), TOKENS, DIM, "bfloat16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    text = half.encode(["a red fox"])
    assert text.dtype == torch.float32 and not torch.equal(text, encoder.encode(["a red fox"]))
    torch.testing.assert_close(text, encoder.encode(["a red fox"]), atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="float16"):
        T5Text(folder, TOKENS, DIM, torch.float16)


def test_sentencepiece_file_alone_is_enough(copy: Path, encoder: T5Text) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    assert torch.equal(T5Text(copy, TOKENS, DIM).encode([LONG, ""]), encoder.encode([LONG, ""]))


@pytest.mark.parametrize(
    "names, what",
    [(["config.json"], "configuration"), (["model.safetensors"], "weights"), (["tokenizer.json", "spiece.model"], "tokenizer")],
)
def test_missing_files_are_named(copy: Path, names: list[str], what: str) -> None:
    for name in names:
        (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {what} of T5 .*{names[0]}.*text.path"):
        T5Text(copy, TOKENS, DIM)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder.*text.kind=cached"):
        build_text_encoder(TextConfig("t5", str(tmp_path / "nowhere")))


def test_another_width_or_model_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match="d_model=32, but text.dim=1024"):
        T5Text(copy, TOKENS, 1024)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type 'bert'"):
        T5Text(copy, TOKENS, DIM)


def test_weights_load_strictly(copy: Path) -> None:
    path = copy / "model.safetensors"
    weights = load_file(path)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing keys: {name}"):
        T5Text(copy, TOKENS, DIM)
    save_file({**weights, "encoder.stray": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected keys: encoder.stray"):
        T5Text(copy, TOKENS, DIM)
    save_file({**weights, name: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="t5"):
        T5Text(copy, TOKENS, DIM)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be loaded"):
        T5Text(copy, TOKENS, DIM)


def test_tokenizer_without_end_token_is_refused(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["eos_token"] = "<unk>"
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    (copy / "config.json").write_text(json.dumps({**json.loads((copy / "config.json").read_text()), "eos_token_id": 5}))
    with pytest.raises(ValueError, match="end token"):
        T5Text(copy, TOKENS, DIM)
