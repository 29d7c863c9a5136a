"""diffusers' AutoencoderKLCosmos with small random weights, from a folder."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCosmos
from safetensors.torch import load_file, save_file

from cosmos_mp.config import TokenizerConfig
from cosmos_mp.tokenizers import build_tokenizer, kl


def small(**changes: object) -> AutoencoderKLCosmos:
    sizes = {"encoder_block_out_channels": (8, 16, 16, 16), "decode_block_out_channels": (8, 16, 16, 16), "num_layers": 1, "resolution": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLCosmos(**{**sizes, **changes}).eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, AutoencoderKLCosmos]:
    model = small()
    model.save_pretrained(tmp_path / "vae")
    return tmp_path, model


@torch.no_grad()
def test_matches_diffusers_own_convention(saved: tuple[Path, AutoencoderKLCosmos]) -> None:
    folder, model = saved
    video = torch.rand(1, 3, 9, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = torch.tensor(model.config.latents_mean).view(1, 16, -1, 1, 1)[:, :, :2]
    std = torch.tensor(model.config.latents_std).view(1, 16, -1, 1, 1)[:, :, :2]
    assert not torch.equal(std[:, :, 0], std[:, :, 1])
    for path in (folder, folder / "vae"):
        tokenizer = build_tokenizer(TokenizerConfig("diffusers", str(path)))
        latent = tokenizer.encode(video)
        assert tuple(latent.shape[1:]) == tokenizer.latent_shape(9, 32, 16) == (16, 2, 4, 2)
        torch.testing.assert_close(latent, (model.encode(video).latent_dist.mode() - mean) / std * 0.5)
        expected = model.decode(latent / 0.5 * std + mean).sample
        torch.testing.assert_close(tokenizer.decode(latent), expected.clamp(-1, 1))
        assert tokenizer.decode(latent).shape == video.shape


def test_missing_folder_and_weights_are_named(saved: tuple[Path, AutoencoderKLCosmos], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.*tokenizer.path"):
        kl.load(tmp_path / "nowhere")
    (saved[0] / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        kl.load(saved[0])


def test_a_dropped_or_foreign_tensor_is_an_error(saved: tuple[Path, AutoencoderKLCosmos]) -> None:
    path = saved[0] / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "quant_conv.weight"}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys: quant_conv.weight"):
        kl.load(saved[0])
    save_file({**weights, "stray.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected keys: stray.weight"):
        kl.load(saved[0])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        kl.load(saved[0])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("latents_mean", None, "latents_mean is null"),
        ("latents_std", [1.0] * 16, "at least 16 latent frames"),
        ("latents_std", [0.0] * 256, "positive"),
        ("_class_name", "AutoencoderKLWan", "expected AutoencoderKLCosmos"),
    ],
)
def test_configuration_is_checked(saved: tuple[Path, AutoencoderKLCosmos], key: str, value: object, message: str) -> None:
    path = saved[0] / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        kl.load(saved[0])


def test_another_compression_is_refused(tmp_path: Path) -> None:
    small(temporal_compression_ratio=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not the 8x8x8"):
        kl.load(tmp_path)
