"""NVIDIA's TorchScript tokenizer: small random TorchScript modules in real files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cosmos_mp.config import TokenizerConfig
from cosmos_mp.tokenizers import build_tokenizer, nvidia


class Encoder(nn.Module):
    """Causal and 8x8x8 like the real one: frame 0 is repeated to fill a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 16, 8, stride=8)

    def forward(self, video: Tensor) -> Tensor:
        first = video[:, :, :1].expand(-1, -1, 8, -1, -1)
        return self.conv(torch.cat([first, video[:, :, 1:]], dim=2))


class TupleEncoder(Encoder):
    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        first = video[:, :, :1].expand(-1, -1, 8, -1, -1)
        latent = self.conv(torch.cat([first, video[:, :, 1:]], dim=2))
        return latent, torch.zeros(1)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(16, 3, 8, stride=8)

    def forward(self, latent: Tensor) -> Tensor:
        return self.conv(latent)[:, :, 7:]


def seeded(make: type[nn.Module], gain: float = 1.0) -> nn.Module:
    network, generator = make(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * gain / value[0].numel() ** 0.5)
    return network


def write(folder: Path, encoder: nn.Module, decoder: nn.Module, columns: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(16, columns, generator=generator), torch.rand(16, columns, generator=generator) + 0.3
    torch.jit.script(encoder).save(folder / "encoder.jit")
    torch.jit.script(decoder).save(folder / "decoder.jit")
    torch.save((mean.flatten(), std.flatten()), folder / "mean_std.pt")
    return mean, std


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, seeded(Encoder), seeded(Decoder, 0.05))
    return tmp_path


def video(frames: int, batch: int = 2, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.rand(batch, 3, frames, *size, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@torch.no_grad()
def test_encode_normalises_per_channel_and_latent_frame(tmp_path: Path) -> None:
    encoder = seeded(Encoder)
    mean, std = write(tmp_path, encoder, seeded(Decoder), columns=20)  # only the first 16 of 20 columns count
    tokenizer = build_tokenizer(TokenizerConfig("nvidia", str(tmp_path)))
    clip = video(17)
    latent = tokenizer.encode(clip)
    assert latent.dtype == torch.float32 and tuple(latent.shape) == (2, *tokenizer.latent_shape(17, 16, 24))
    raw = encoder(clip)
    for t in range(3):
        for c in range(16):
            torch.testing.assert_close(latent[:, c, t], (raw[:, c, t] - mean[c, t]) / std[c, t] * 0.5)


@torch.no_grad()
def test_decode_restores_what_encode_normalised(tmp_path: Path) -> None:
    decoder = seeded(Decoder, 0.05)
    mean, std = write(tmp_path, seeded(Encoder), decoder)
    latent = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(5))
    expected = decoder(latent / 0.5 * std.view(1, 16, 16, 1, 1)[:, :, :2] + mean.view(1, 16, 16, 1, 1)[:, :, :2])
    assert expected.abs().max() < 1
    torch.testing.assert_close(nvidia.load(tmp_path).decode(latent), expected)


@torch.no_grad()
def test_decode_clamps(tmp_path: Path) -> None:
    write(tmp_path, seeded(Encoder), seeded(Decoder, 50.0))
    decoded = nvidia.load(tmp_path).decode(torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert decoded.min() == -1 and decoded.max() == 1


def test_long_clips_go_chunk_by_chunk(folder: Path) -> None:
    tokenizer = nvidia.load(folder)
    clip = video(242, batch=1, size=(8, 8))
    latent = tokenizer.encode(clip)
    assert tuple(latent.shape[1:]) == tokenizer.latent_shape(242, 8, 8) == (16, 32, 1, 1)
    assert torch.equal(latent[:, :, 16:], tokenizer.encode(clip[:, :, 121:]))
    decoded = tokenizer.decode(latent)
    assert decoded.shape == clip.shape
    assert torch.equal(decoded[:, :, 121:], tokenizer.decode(latent[:, :, 16:]))


def test_bf16_networks_get_bf16_and_give_float32(tmp_path: Path) -> None:
    encoder = seeded(Encoder)
    mean, std = write(tmp_path, seeded(Encoder).bfloat16(), seeded(Decoder, 0.05).bfloat16())
    tokenizer = nvidia.load(tmp_path)
    clip = video(9)
    latent = tokenizer.encode(clip)
    assert latent.dtype == torch.float32 and tokenizer.decode(latent).dtype == torch.float32
    # Normalising in bf16 would round the latent itself to bf16.
    assert not torch.equal(latent, latent.bfloat16().float())
    with torch.no_grad():
        expected = (encoder(clip) - mean.view(1, 16, 16, 1, 1)[:, :, :2]) / std.view(1, 16, 16, 1, 1)[:, :, :2] * 0.5
    torch.testing.assert_close(latent, expected, atol=0.05, rtol=0.05)


def test_encoder_may_return_a_tuple(tmp_path: Path, folder: Path) -> None:
    expected = nvidia.load(folder).encode(video(9))
    torch.jit.script(seeded(TupleEncoder)).save(folder / "encoder.jit")
    assert torch.equal(nvidia.load(folder).encode(video(9)), expected)


@pytest.mark.parametrize("frames, near", [(0, "1"), (10, "9 or 17"), (120, "113 or 121"), (122, "121 or 242"), (250, "242 or 363")])
def test_frames_that_do_not_fit_name_the_nearest(folder: Path, frames: int, near: str) -> None:
    with pytest.raises(ValueError, match=f"clip.frames={frames} .*nearest: {near}$"):
        nvidia.load(folder).latent_shape(frames, 16, 16)


def test_sizes(folder: Path) -> None:
    tokenizer = nvidia.load(folder)
    assert tokenizer.latent_shape(121, 704, 1280) == (16, 16, 88, 160)
    assert tokenizer.latent_shape(1, 8, 8) == (16, 1, 1, 1)
    with pytest.raises(ValueError, match="clip.width=30 .*24 or 32"):
        tokenizer.latent_shape(9, 16, 30)
    with pytest.raises(ValueError, match="clip.height=5 .*nearest: 8$"):
        tokenizer.latent_shape(9, 5, 16)
    with pytest.raises(ValueError, match="clip.frames=10"):
        tokenizer.encode(video(10))
    with pytest.raises(ValueError, match="17 frames"):
        tokenizer.decode(torch.zeros(1, 16, 17, 1, 1))
    with pytest.raises(ValueError, match="expected .B, 16, T, h, w"):
        tokenizer.decode(torch.zeros(1, 8, 2, 1, 1))


@pytest.mark.parametrize(
    "clip, message",
    [
        (torch.zeros(1, 3, 9, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 9, 16, 16), 255.0), "127.5"),
        (torch.full((1, 3, 9, 16, 16), float("nan")), "127.5"),
        (torch.zeros(1, 9, 16, 16, 3), "expected .B, 3, F, H, W"),
        (torch.zeros(3, 9, 16, 16), "expected .B, 3, F, H, W"),
    ],
)
def test_what_is_no_video_is_refused(folder: Path, clip: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nvidia.load(folder).encode(clip)


@pytest.mark.parametrize("name", ["encoder.jit", "decoder.jit", "mean_std.pt"])
def test_missing_or_broken_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"not a network")
    with pytest.raises(ValueError, match=f"{name}: not a readable"):
        nvidia.load(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}; fetch"):
        nvidia.load(folder)


@pytest.mark.parametrize(
    "table, message",
    [
        ((torch.zeros(16), torch.ones(16)), "at least 16 latent frames"),
        ((torch.zeros(250), torch.ones(250)), "16 channels"),
        ((torch.zeros(256), torch.zeros(256)), "positive"),
        ((torch.full((256,), float("inf")), torch.ones(256)), "not finite"),
        (torch.zeros(256), "expected two tensors"),
        ({"mean": torch.zeros(256), "std": torch.ones(256)}, "expected two tensors"),
    ],
)
def test_statistics_are_checked(folder: Path, table: object, message: str) -> None:
    torch.save(table, folder / "mean_std.pt")
    with pytest.raises(ValueError, match=message):
        nvidia.load(folder)


def test_encoding_keeps_no_graph(folder: Path) -> None:
    latent = nvidia.load(folder).encode(video(9).requires_grad_())
    assert not latent.requires_grad and not latent.is_inference()
