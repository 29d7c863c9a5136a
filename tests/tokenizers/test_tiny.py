"""The linear tokenizer, fitted to small moving clips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos_mp.config import TokenizerConfig
from cosmos_mp.data.synthetic import render
from cosmos_mp.tokenizers import build_tokenizer
from cosmos_mp.tokenizers.tiny import FIT_CLIPS, FORMAT, TinyTokenizer, fit_tiny

FIT, HELD = 96, 24


def clips(start: int, count: int) -> np.ndarray:
    return np.stack([render(0, index)[0] for index in range(start, start + count)])


def to_video(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1


@pytest.fixture(scope="module")
def training() -> np.ndarray:
    return clips(0, FIT)


@pytest.fixture(scope="module")
def tokenizer(training: np.ndarray) -> TinyTokenizer:
    return fit_tiny(training, seed=0)


@pytest.fixture(scope="module")
def held() -> Tensor:
    return to_video(clips(FIT, HELD))


def test_reconstructs_held_out_clips(tokenizer: TinyTokenizer, held: Tensor) -> None:
    decoded = tokenizer.decode(tokenizer.encode(held))
    assert decoded.shape == held.shape
    mse = (decoded - held).square().mean(dim=(0, 1, 3, 4))
    psnr = 10 * torch.log10(4 / mse)
    assert 10 * torch.log10(4 / mse.mean()) > 29
    assert psnr.min() > 27, psnr  # no frame of a group is left behind


def test_edges_survive_a_latent_that_is_a_little_off(tokenizer: TinyTokenizer, held: Tensor) -> None:
    latent = tokenizer.encode(held)
    noisy = latent + 0.1 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    assert 10 * torch.log10(4 / (tokenizer.decode(noisy) - held).square().mean()) > 27.5


def test_latent_statistics(tokenizer: TinyTokenizer, training: np.ndarray) -> None:
    latent = tokenizer.encode(to_video(training))
    assert latent.dtype == torch.float32
    assert tuple(latent.shape[1:]) == tokenizer.latent_shape(9, 64, 64) == (16, 3, 8, 8)
    for frames in (latent[:, :, :1], latent[:, :, 1:]):
        channels = frames.transpose(0, 1).flatten(1).double()
        assert channels.mean(dim=1).abs().max() < 1e-4  # per channel and kind of frame
        assert abs(channels.var(dim=1, correction=0).mean().sqrt() - 0.5) < 1e-4
        # PCA: channels are uncorrelated, in descending order; a channel's variance is the root of its coefficient's.
        covariance = channels @ channels.T / channels.shape[1]
        variance = covariance.diagonal()
        assert (covariance - torch.diag(variance)).abs().max() < 1e-4
        assert (variance.diff() < 1e-6).all()


@pytest.mark.parametrize("kind, frames", [("first", 1), ("group", 4)])
def test_scale_is_the_root_of_the_standard_deviation(tokenizer: TinyTokenizer, training: np.ndarray, kind: str, frames: int) -> None:
    basis = getattr(tokenizer, f"{kind}_encoder").flatten(1).double()
    scale = basis.norm(dim=1)  # an orthonormal direction times its scale
    directions = basis / scale[:, None]
    torch.testing.assert_close(directions @ directions.T, torch.eye(16, dtype=torch.float64), atol=1e-5, rtol=0)
    latent = tokenizer.encode(to_video(training))
    part = latent[:, :, :1] if frames == 1 else latent[:, :, 1:]
    deviation = part.double().std(dim=(0, 2, 3, 4), correction=0) / scale  # of the plain coefficient
    torch.testing.assert_close(scale * deviation.sqrt(), (scale * deviation.sqrt()).mean().expand(16), atol=1e-3, rtol=1e-3)


def test_decoder_is_the_ridge_regression(tokenizer: TinyTokenizer, training: np.ndarray) -> None:
    """The gradient of the penalised least-squares error vanishes, border included, with the ridge 0.1 of the latent variance."""
    video = to_video(training).double()
    blocks = video[:, :, 0].unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 1, 4, 5, 2, 3).reshape(FIT, 192, 64)
    latent = tokenizer.encode(video)[:, :, 0].double()
    near = torch.nn.functional.unfold(latent, 3, padding=1)
    weight = tokenizer.first_decoder.flatten(1).double()
    residual = blocks - (weight @ near + tokenizer.first_decoder_bias.double()[:, None])
    gradient = (residual @ near.transpose(1, 2)).sum(0) / (FIT * 64) - 0.1 * 0.25 * weight
    assert gradient.abs().max() < 1e-5
    torch.testing.assert_close(tokenizer.first_decoder_bias.double(), blocks.mean(dim=(0, 2)), atol=1e-6, rtol=0)


def test_is_causal(tokenizer: TinyTokenizer, held: Tensor) -> None:
    changed = held.clone()
    changed[:, :, 5:] = -changed[:, :, 5:]
    before, after = tokenizer.encode(held), tokenizer.encode(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2], after[:, :, 2])
    assert torch.equal(tokenizer.decode(before)[:, :, :5], tokenizer.decode(after)[:, :, :5])
    assert torch.equal(tokenizer.encode(held[:, :, :1]), before[:, :, :1])


def test_does_not_depend_on_the_batch(tokenizer: TinyTokenizer, held: Tensor) -> None:
    torch.testing.assert_close(tokenizer.encode(held[3:4]), tokenizer.encode(held)[3:4], atol=1e-6, rtol=0)


def test_other_sizes_fit(tokenizer: TinyTokenizer) -> None:
    video = torch.zeros(1, 3, 5, 16, 40)
    latent = tokenizer.encode(video)
    assert tuple(latent.shape[1:]) == tokenizer.latent_shape(5, 16, 40) == (16, 2, 2, 5)
    assert tokenizer.decode(latent).shape == video.shape


def test_blocks_land_where_they_came_from(tokenizer: TinyTokenizer) -> None:
    video = -torch.ones(1, 3, 9, 32, 48)
    video[:, :, 5:, 8:16, 24:32] = 1.0
    decoded = tokenizer.decode(tokenizer.encode(video)).mean(dim=1)
    assert decoded[0, 5:, 8:16, 24:32].min() > 0
    assert decoded[0, :5].max() < 0 and decoded[0, 5:, 20:].max() < 0


def test_decode_clamps(tokenizer: TinyTokenizer) -> None:
    decoded = tokenizer.decode(torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 50)
    assert decoded.min() == -1 and decoded.max() == 1


# --- Fit ---


def test_fit_is_deterministic_and_draws_by_seed(training: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FIT_CLIPS >= FIT
    monkeypatch.setattr("cosmos_mp.tokenizers.tiny.FIT_CLIPS", 12)
    first, again, other = (fit_tiny(training, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["group_encoder"], other["group_encoder"])
    as_iterator = fit_tiny(iter(training), seed=1).state_dict()
    assert all(torch.equal(first[name], as_iterator[name]) for name in first)
    for kind in ("first", "group"):
        basis = first[f"{kind}_encoder"].flatten(1)
        assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: [], "no clips"),
        (lambda: np.zeros((2, 9, 64, 60, 3), np.uint8), "sides that divide by 8"),
        (lambda: np.zeros((2, 8, 64, 64, 3), np.uint8), "4 k . 1"),
        (lambda: np.zeros((2, 1, 64, 64, 3), np.uint8), "at least 5"),
        (lambda: np.zeros((2, 9, 64, 64, 3), np.float32), "clip 0 is float32"),
        (lambda: [np.zeros((9, 64, 64, 3), np.uint8), np.zeros((9, 32, 64, 3), np.uint8)], "clip 1 is"),
        (lambda: np.full((2, 9, 64, 64, 3), 7, np.uint8), "fewer than 16 directions"),
    ],
)
def test_clips_that_cannot_be_fitted(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_tiny(make(), seed=0)


# --- Size and file ---


def test_sizes_that_do_not_fit_name_the_nearest(tokenizer: TinyTokenizer) -> None:
    for frames, near in ((8, "5 or 9"), (0, "1"), (-3, "1")):
        with pytest.raises(ValueError, match=f"clip.frames={frames} .*nearest: {near}$"):
            tokenizer.latent_shape(frames, 64, 64)
    with pytest.raises(ValueError, match="clip.height=60 .*56 or 64"):
        tokenizer.encode(torch.zeros(1, 3, 9, 60, 64))
    with pytest.raises(ValueError, match="127.5"):
        tokenizer.encode(torch.full((1, 3, 9, 64, 64), 128.0))
    with pytest.raises(ValueError, match="16, T, h, w"):
        tokenizer.decode(torch.zeros(1, 3, 9, 8, 8))


def test_file_round_trip_is_exact(tokenizer: TinyTokenizer, held: Tensor, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path / "tiny")
    assert path == tmp_path / "tiny" / "tokenizer.safetensors" and list(path.parent.iterdir()) == [path]
    content = path.read_bytes()
    for source in (path, path.parent):
        loaded = TinyTokenizer.load(source)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), tokenizer.state_dict().values(), strict=True))
    assert torch.equal(build_tokenizer(TokenizerConfig("tiny", str(path.parent))).encode(held), tokenizer.encode(held))
    assert loaded.save(tmp_path / "tiny").read_bytes() == content


def test_wrong_files_are_named(tokenizer: TinyTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer.path"):
        TinyTokenizer.load(tmp_path / "nowhere")
    path = tokenizer.save(tmp_path)
    tensors = load_file(path)
    broken = {
        "format None": (tensors, None),
        "format 'another'": (tensors, {"format": "another"}),
        "first.decoder_bias is missing": ({k: v for k, v in tensors.items() if k != "first.decoder_bias"}, {"format": FORMAT}),
        "stray is .*no such tensor": ({**tensors, "stray": torch.zeros(1)}, {"format": FORMAT}),
        "group.encoder is .16, 3, 4, 8.": ({**tensors, "group.encoder": torch.zeros(16, 3, 4, 8)}, {"format": FORMAT}),
    }
    for message, (content, metadata) in broken.items():
        save_file(content, path, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            TinyTokenizer.load(tmp_path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        TinyTokenizer.load(tmp_path)
