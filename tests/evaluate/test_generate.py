"""Answers to held-out clips: the same noise for every variant, batch size without effect, kept on disk by what made them."""

from __future__ import annotations

import pytest
import torch

from cosmos_mp.evaluate.generate import answer_all, cached, condition_of_clips, evaluation_noise


def echo(epsilon, condition):
    """An answer that depends on noise, control and text of each clip."""
    return epsilon + 10 * condition.control_BCTHW + condition.text_BLD.mean(dim=(1, 2))[:, None, None, None, None]


def test_every_clip_gets_its_own_noise_and_condition_whatever_the_batch(make_batch):
    batch = make_batch(range(5), torch.float32)
    answers = [answer_all(echo, batch, 3, 0, size, torch.device("cpu")) for size in (1, 2, 5, 64)]
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    epsilon = evaluation_noise(tuple(batch.latent_BCTHW.shape[1:]), 3, 0, batch.position_B)
    assert torch.equal(answers[0], echo(epsilon, condition_of_clips(batch)))


def test_noise_is_a_function_of_seed_draw_and_clip():
    shape, clips = (2, 3, 4, 4), torch.arange(4)
    noise = evaluation_noise(shape, 0, 0, clips)
    assert torch.equal(evaluation_noise(shape, 0, 0, clips[2:]), noise[2:])
    assert len({tuple(clip.flatten().tolist()) for clip in noise}) == 4  # no two clips share it
    for seed, draw in ((1, 0), (0, 1), (0, -1)):
        assert not torch.isclose(evaluation_noise(shape, seed, draw, clips), noise).all(dim=(1, 2, 3, 4)).any()


def test_no_frame_is_given_and_no_graph_is_kept(make_batch):
    batch, weight = make_batch(range(2), torch.float32), torch.ones((), requires_grad=True)
    assert condition_of_clips(batch).given is None
    answers = answer_all(lambda epsilon, condition: weight * epsilon.double(), batch, 0, 0, 1, torch.device("cpu"))
    assert answers.dtype == torch.float32 and not answers.requires_grad


@pytest.fixture
def store(tmp_path):
    made = []

    def get(key: dict, value: float = 1.0) -> torch.Tensor:
        def make() -> torch.Tensor:
            made.append(value)
            return torch.full((2, 3), value)

        return cached(tmp_path / "latents" / "a.safetensors", key, make)

    get.made, get.folder = made, tmp_path / "latents"
    return get


def test_the_same_key_is_answered_from_disk(store):
    first = store({"seed": 0, "weights": "ab"})
    again = store({"weights": "ab", "seed": 0}, value=2.0)
    assert torch.equal(first, again) and store.made == [1.0]
    assert [path.name for path in store.folder.iterdir()] == ["a.safetensors"]


def test_another_key_is_made_anew_and_replaces_the_old(store):
    store({"seed": 0})
    assert store({"seed": 1}, value=2.0).eq(2).all()
    assert store({"seed": 1}, value=3.0).eq(2).all()
    assert store({"seed": 0}, value=4.0).eq(4).all()
    assert store.made == [1.0, 2.0, 4.0]


def test_a_damaged_file_is_made_anew(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"junk")
    assert torch.equal(cached(path, {"key": 1}, lambda: torch.ones(2)), torch.ones(2))
    assert f"{path} is damaged" in capsys.readouterr().out
    assert torch.equal(cached(path, {"key": 1}, lambda: torch.zeros(2)), torch.ones(2))


def test_what_a_kill_left_is_not_taken_for_an_answer(store):
    store.folder.mkdir()
    (store.folder / ".a.safetensors.host.1.partial").write_bytes(b"half")
    assert store({"seed": 0}, value=3.0).eq(3).all()
    assert (store.folder / "a.safetensors").is_file()


def test_a_failed_answer_leaves_the_old_one(store, tmp_path):
    store({"seed": 0})

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached(store.folder / "a.safetensors", {"seed": 1}, fail)
    assert store({"seed": 0}, value=5.0).eq(1).all()
