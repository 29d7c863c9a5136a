"""Words as fixed random vectors."""

import subprocess
import sys

import pytest
import torch

from cosmos_mp.config import TextConfig
from cosmos_mp.text import build_text_encoder
from cosmos_mp.text.tiny import TinyText


@pytest.fixture
def encoder() -> TinyText:
    return build_text_encoder(TextConfig("tiny", "", tokens=12, dim=64))


def test_one_fixed_vector_per_word(encoder: TinyText) -> None:
    text = encoder.encode(["A red circle moves, LEFT!", "left a circle"])
    assert text.dtype == torch.float32 and text.shape == (2, 12, 64)
    assert torch.equal(text[0, 4], text[1, 0]) and torch.equal(text[0, 0], text[1, 1]) and torch.equal(text[0, 2], text[1, 2])
    assert not torch.equal(text[0, 0], text[0, 1])
    assert text[0, :5].ne(0).all() and text[0, 5:].eq(0).all() and text[1, 3:].eq(0).all()
    assert torch.equal(TinyText(12, 64).encode(["left"])[0, 0], text[0, 4])


def test_vectors_have_unit_variance_and_are_unrelated() -> None:
    words = TinyText(200, 64).encode([" ".join(f"word{i}" for i in range(200))])[0]
    assert abs(words.var() - 1) < 0.05 and abs(words.mean()) < 0.03
    similarity = (words @ words.T / 64).fill_diagonal_(0)
    assert similarity.abs().max() < 0.7


def test_same_vector_in_another_process(encoder: TinyText) -> None:
    code = "from cosmos_mp.text.tiny import TinyText; print(TinyText(1, 4).encode(['circle'])[0, 0].tolist())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(TinyText(1, 4).encode(["circle"])[0, 0].tolist())


def test_empty_and_null_are_zeros(encoder: TinyText) -> None:
    assert torch.equal(encoder.encode(["", " ,. "]), torch.zeros(2, 12, 64))
    assert torch.equal(encoder.null(3), torch.zeros(3, 12, 64))


def test_words_beyond_the_limit_are_cut(encoder: TinyText) -> None:
    words = [f"w{i}" for i in range(20)]
    assert torch.equal(encoder.encode([" ".join(words)]), encoder.encode([" ".join(words[:12])]))


def test_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    TinyText(2, 8).encode(["some words"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_input_is_refused(encoder: TinyText) -> None:
    for captions in ("a bare string", [], [b"bytes"]):
        with pytest.raises(ValueError, match="non-empty list of strings"):
            encoder.encode(captions)
    with pytest.raises(ValueError, match="text.tokens=0"):
        build_text_encoder(TextConfig("tiny", "", tokens=0))
