"""What a run's pictures show: fixed clips and noises, rows in their order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cosmos_mp.config import ConfigError
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.parallel import noise
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.tokenizers import build_tokenizer
from cosmos_mp.tokenizers.frames import video_to_frames
from cosmos_mp.training.samples import HeldOut


@pytest.fixture
def holdout(tiny_world) -> LatentDataset:
    return LatentDataset(tiny_world.root / "clips" / "holdout", 5, expect={})


@pytest.fixture
def tokenizer(tiny_world):
    return tiny_world.config("teacher", "unused").tokenizer


def test_rows_are_the_answers_then_control_and_ground_truth(holdout, tokenizer):
    asked = []

    def answer(epsilon, condition):
        asked.append((epsilon, condition))
        return epsilon

    answers = {"student 1-step": answer, "teacher 1-step": lambda epsilon, condition: 0.5 * epsilon}
    render = HeldOut(holdout, tokenizer, 2, single_process()).renderer(answers)
    samples = render(7)
    assert [list(rows) for rows in samples] == [["student 1-step", "teacher 1-step", "control", "ground truth"]] * 2
    decoder, batch = build_tokenizer(tokenizer), holdout.fixed([0, 1])
    epsilon, condition = asked[0]
    assert torch.equal(epsilon, noise.normal((16, 3, 8, 8), 0, "picture", 0, [0, 1]))
    assert torch.equal(condition.text_BLD, batch.text_BLD) and torch.equal(condition.control_BCTHW, batch.control_BCTHW)
    assert condition.given is None
    for index, rows in enumerate(samples):
        for name, latent in {
            "student 1-step": epsilon,
            "teacher 1-step": 0.5 * epsilon,
            "control": batch.control_BCTHW,
            "ground truth": batch.latent_BCTHW,
        }.items():
            assert rows[name].shape == (9, 64, 64, 3) and rows[name].dtype == np.uint8
            assert np.array_equal(rows[name], video_to_frames(decoder.decode(latent))[index]), name


def test_every_picture_shows_the_same_clips_and_noise(holdout, tokenizer):
    render = HeldOut(holdout, tokenizer, 3, single_process()).renderer({"student": lambda epsilon, condition: epsilon})
    first, later = render(1), render(500)
    assert len(first) == 3
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(first, later, strict=True) for name in a)
    assert not np.array_equal(first[0]["student"], first[1]["student"])


def test_more_pictures_than_held_out_clips_are_refused(holdout, tokenizer):
    with pytest.raises(ConfigError, match="train.picture_samples=13 exceeds the 12 held-out clips"):
        HeldOut(holdout, tokenizer, 13, single_process())


def test_other_ranks_answer_along_and_draw_nothing(holdout, tokenizer):
    asked = []

    def answer(epsilon, condition):
        asked.append(tuple(epsilon.shape))
        return epsilon

    second = replace(single_process(), rank=1)
    assert HeldOut(holdout, tokenizer, 2, second).renderer({"student": answer, "teacher": answer})(7) == []
    assert asked == [(2, 16, 3, 8, 8)] * 2  # where clips are cut, every rank must answer its part
