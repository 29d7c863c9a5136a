"""Feature extractors for the Fréchet distance: latents and videos of N clips become features (N, D).

D stays at or below 64 where we choose it, so that a few hundred clips give a well-conditioned covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mp.evaluate.metrics import as_float64

_BATCH = 16


class Extractor(Protocol):
    """Features of clips: `latents_NCTHW` and `videos_NFHWC` (uint8 RGB) of the same N clips to float64 (N, D)."""

    name: str

    def __call__(self, latents_NCTHW: Tensor, videos_NFHWC: Sequence[np.ndarray] | np.ndarray) -> np.ndarray: ...


class LatentPCA:
    """The latents' coordinates along the main axes of the real ones, not whitened; made by `fit`."""

    name = "latent_pca"

    def __init__(self, mean_P: np.ndarray, axes_PD: np.ndarray):
        self.mean_P, self.axes_PD = mean_P, axes_PD

    @classmethod
    def fit(cls, real_latents_NCTHW: Tensor, dim: int = 32) -> LatentPCA:
        """Exact axes by a float64 eigendecomposition, of the Gram matrix where there are fewer samples than numbers in a latent.

        Raises ValueError if the data span fewer than `dim` axes.
        """
        x = as_float64(real_latents_NCTHW).reshape(len(real_latents_NCTHW), -1)
        samples, numbers = x.shape
        mean = x.mean(axis=0)
        centred = x - mean
        small = samples < numbers
        values, vectors = np.linalg.eigh(centred @ centred.T if small else centred.T @ centred)
        values, vectors = values[::-1], vectors[:, ::-1]  # largest first
        rank = int((values > values[0] * 1e-12).sum()) if values[0] > 0 else 0
        if not 1 <= dim <= rank:
            raise ValueError(
                f"LatentPCA: {samples} latents of {numbers} numbers span {rank} axes, but dim={dim}; fit on more clips or lower dim"
            )
        axes = vectors[:, :dim]
        if small:
            axes = centred.T @ (axes / np.sqrt(values[:dim]))
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dim)])  # an eigenvector's sign is free: fix it
        return cls(mean, axes)

    def __call__(self, latents_NCTHW: Tensor, videos_NFHWC: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        x = as_float64(latents_NCTHW).reshape(len(latents_NCTHW), -1)
        if x.shape[1] != len(self.mean_P):
            raise ValueError(f"LatentPCA: fitted on latents of {len(self.mean_P)} numbers, got {x.shape[1]}; fit it on this latent size")
        return (x - self.mean_P) @ self.axes_PD


class RandomConv:
    """Mean and standard deviation over T, H, W of a fixed random two-layer 3-D convolution network: 64 features.

    A function of the seed and the number of latent channels alone; nothing is trained, so nothing can be trained against it.
    """

    name = "random_conv"

    def __init__(self, seed: int = 0, channels: int = 16):
        generator = torch.Generator().manual_seed(seed)
        self.weights = [_he_normal(32, channels, generator), _he_normal(32, 32, generator)]

    def __call__(self, latents_NCTHW: Tensor, videos_NFHWC: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        channels = self.weights[0].shape[1]
        if latents_NCTHW.ndim != 5 or latents_NCTHW.shape[1] != channels:
            raise ValueError(f"RandomConv: made for latents (N, {channels}, T, H, W), got {tuple(latents_NCTHW.shape)}; set channels")
        return np.concatenate([self._features(x) for x in latents_NCTHW.detach().cpu().split(_BATCH)])

    def _features(self, x: Tensor) -> np.ndarray:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for weight in self.weights:
            x = F.leaky_relu(F.conv3d(x, weight.to(x.dtype), padding=1), 0.2)
        x = x.double().flatten(2)
        return torch.cat([x.mean(-1), x.std(-1, correction=0)], dim=1).numpy()


class NetworkFeatures:
    """A callable's features, latents (N, C, T, H, W) to (N, D).

    By default the frozen teacher's: a block's output at a small sigma, averaged over T, H, W.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], name: str = "teacher"):
        self.network, self.name = network, name

    @torch.no_grad()
    def __call__(self, latents_NCTHW: Tensor, videos_NFHWC: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        return _checked(self.network(latents_NCTHW), len(latents_NCTHW), f"NetworkFeatures({self.name})")


class TorchScriptFeatures:
    """Any TorchScript network by path: float32 video (N, 3, T, H, W) in [-1, 1] to (N, D).

    Raises FileNotFoundError for a missing file and ValueError for one that TorchScript cannot read or whose output has another shape.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        self.path, self.device = Path(path), device
        self.name = self.path.stem
        if not self.path.is_file():
            raise FileNotFoundError(f"feature network {self.path} does not exist; give the path of a file saved with torch.jit.save")
        try:
            self.network = torch.jit.load(str(self.path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"feature network {self.path} is not TorchScript; save it with torch.jit.save") from error

    @torch.no_grad()
    def __call__(self, latents_NCTHW: Tensor, videos_NFHWC: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        shapes = {(video.dtype, video.shape) for video in map(np.asarray, videos_NFHWC)}
        if len(shapes) != 1 or next(iter(shapes))[0] != np.uint8:
            raise ValueError(f"{self.name}: needs uint8 videos (F, H, W, 3) of one shape, got {sorted(map(str, shapes))}")
        batches = [np.stack(videos_NFHWC[i : i + _BATCH]) for i in range(0, len(videos_NFHWC), _BATCH)]
        return np.concatenate([self._features(batch) for batch in batches])

    def _features(self, videos_NFHWC: np.ndarray) -> np.ndarray:
        video_NCTHW = torch.from_numpy(videos_NFHWC).permute(0, 4, 1, 2, 3).to(self.device).float() / 127.5 - 1
        return _checked(self.network(video_NCTHW.contiguous()), len(videos_NFHWC), f"feature network {self.path}")


def _he_normal(out_channels: int, in_channels: int, generator: torch.Generator) -> Tensor:
    shape = (out_channels, in_channels, 3, 3, 3)
    return torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))


def _checked(features: object, samples: int, what: str) -> np.ndarray:
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != samples:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{what} must return a tensor ({samples}, D), got {got}; pool its output to one vector per clip")
    return as_float64(features)
