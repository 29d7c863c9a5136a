"""Cosmos-Tokenize1-CV8x8x8 from NVIDIA's files: `encoder.jit`, `decoder.jit`, `mean_std.pt`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_mp.tokenizers import LATENT_CHANNELS, SIGMA_DATA, check_latent, check_video, frames_error, spatial_shape

CHUNK_LATENTS = 16
"""Latent frames for which mean and std are known; a longer clip is coded as a row of such chunks, each causal by itself."""
HUB = "nvidia/Cosmos-Tokenize1-CV8x8x8-720p"


class CosmosTokenizer(nn.Module):
    """An 8x8x8 causal autoencoder and the statistics of its latents. It runs on the device it is moved to.

    Args:
        encoder, decoder: raw video (B, 3, F, H, W) <-> raw latent (B, 16, T, h, w), fed in the dtype of their weights.
        mean, std: (16, 16), channel by latent frame. Frame 0 differs much from the rest, so no value is shared along time.
    """

    spatial_compression = 8
    temporal_compression = 8
    chunk_frames = (CHUNK_LATENTS - 1) * temporal_compression + 1
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder.eval(), decoder.eval()
        for parameter in self.parameters():  # TorchScript modules have no requires_grad_ of their own
            parameter.requires_grad_(False)
        self.register_buffer("mean", mean.float().view(1, LATENT_CHANNELS, CHUNK_LATENTS, 1, 1))
        self.register_buffer("std", std.float().view(1, LATENT_CHANNELS, CHUNK_LATENTS, 1, 1))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(16, T, h, w); up to 121 frames 8 k + 1 fit, beyond that multiples of 121."""
        h, w = spatial_shape(height, width, self.spatial_compression)
        factor, chunk = self.temporal_compression, self.chunk_frames
        if frames <= chunk:
            if frames < 1 or (frames - 1) % factor:
                below = (frames - 1) // factor * factor + 1
                raise frames_error(frames, f"{factor} k + 1 up to {chunk}, then multiples of {chunk}", below, max(1, below + factor))
            return LATENT_CHANNELS, (frames - 1) // factor + 1, h, w
        if frames % chunk:
            below = frames // chunk * chunk
            raise frames_error(frames, f"multiples of {chunk} beyond {chunk}", below, below + chunk)
        return LATENT_CHANNELS, frames // chunk * CHUNK_LATENTS, h, w

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Chunk by chunk; see `Tokenizer.encode`."""
        check_video(video_BCTHW)
        self.latent_shape(*video_BCTHW.shape[2:])
        chunks = video_BCTHW.to(self.mean.device).split(self.chunk_frames, dim=2)
        return torch.cat([self._normalise(_run(self.encoder, chunk)) for chunk in chunks], dim=2)

    @torch.no_grad()
    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Chunk by chunk; see `Tokenizer.decode`."""
        check_latent(latent_BCTHW)
        frames = latent_BCTHW.shape[2]
        if frames > CHUNK_LATENTS and frames % CHUNK_LATENTS:
            raise ValueError(f"latent has {frames} frames; beyond {CHUNK_LATENTS} only multiples of {CHUNK_LATENTS} can be decoded")
        chunks = latent_BCTHW.to(self.mean.device).split(CHUNK_LATENTS, dim=2)
        return torch.cat([_run(self.decoder, self._restore(chunk)) for chunk in chunks], dim=2).clamp(-1, 1)

    def _normalise(self, raw: Tensor) -> Tensor:
        frames = raw.shape[2]
        return (raw - self.mean[:, :, :frames]) / self.std[:, :, :frames] * SIGMA_DATA

    def _restore(self, latent: Tensor) -> Tensor:
        frames = latent.shape[2]
        return latent.float() / SIGMA_DATA * self.std[:, :, :frames] + self.mean[:, :, :frames]


def _run(network: nn.Module, value: Tensor) -> Tensor:
    """Apply a network in the dtype of its own weights; float32 comes back. NVIDIA's modules may return a tuple."""
    result = network(value.to(next((p.dtype for p in network.parameters()), torch.float32)))
    return (result[0] if isinstance(result, tuple | list) else result).float()


def statistics(values: Tensor, source: str) -> Tensor:
    """One row of NVIDIA's table, any shape, as (16, 16): viewed (16, -1), of which the first 16 latent frames count.

    Raises:
        ValueError: not 16 channels of at least 16 latent frames, or not finite.
    """
    if values.numel() % LATENT_CHANNELS or values.numel() < LATENT_CHANNELS * CHUNK_LATENTS:
        raise ValueError(
            f"{source}: {values.numel()} numbers do not make {LATENT_CHANNELS} channels of at least {CHUNK_LATENTS} latent frames; "
            f"take the file of {HUB}"
        )
    if not torch.isfinite(values).all():
        raise ValueError(f"{source}: holds numbers that are not finite; fetch {HUB} again")
    return values.reshape(LATENT_CHANNELS, -1)[:, :CHUNK_LATENTS].float()


def load(folder: Path) -> CosmosTokenizer:
    """Read NVIDIA's folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read or holds something else.
    """
    folder = Path(folder)
    missing = [name for name in ("encoder.jit", "decoder.jit", "mean_std.pt") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no {', '.join(missing)}; fetch {HUB} into this folder, or point tokenizer.path at the folder that has it"
        )
    mean, std = _mean_std(folder / "mean_std.pt")
    return CosmosTokenizer(_jit(folder / "encoder.jit"), _jit(folder / "decoder.jit"), mean, std)


def _jit(path: Path) -> nn.Module:
    try:
        return torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{path}: not a readable TorchScript file ({str(error).splitlines()[0]}); fetch {HUB} again") from error


def _mean_std(path: Path) -> tuple[Tensor, Tensor]:
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable file of tensors ({str(error).splitlines()[0]}); fetch {HUB} again") from error
    if not isinstance(table, tuple | list) or len(table) != 2 or not all(isinstance(row, Tensor) for row in table):
        raise ValueError(f"{path}: expected two tensors, mean and std; fetch {HUB} again")
    mean, std = (statistics(row, f"{path} ({name})") for row, name in zip(table, ("mean", "std"), strict=True))
    if not (std > 0).all():
        raise ValueError(f"{path}: std must be positive everywhere; fetch {HUB} again")
    return mean, std
