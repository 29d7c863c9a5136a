"""A linear tokenizer fitted in seconds: PCA of 8x8-pixel blocks, frame 0 alone, then groups of 4 frames.

Each coefficient is divided by the square root of its standard deviation: whitening would give block noise the weight of the picture, no
scaling would leave the finer channels below the diffusion noise. The decoder is the ridge regression of a block on the 3x3 latents around.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cosmos_mp.files import whole
from cosmos_mp.tokenizers import LATENT_CHANNELS, SIGMA_DATA, check_latent, check_video, frames_error, spatial_shape

FILE = "tokenizer.safetensors"
FORMAT = "cosmos_mp tiny tokenizer 1"
BLOCK, GROUP = 8, 4
FIT_CLIPS = 512
"""More clips than this do not sharpen the fit; the seed draws that many."""
RIDGE = 0.1
"""Ridge of the decoder as a share of the latents' variance: it costs a clean latent 1 dB and keeps the edges of one that is a little off,
as every generated latent is."""
_BATCH = 32
_LENGTHS = {"first": 1, "group": GROUP}
SHAPES: dict[str, tuple[int, ...]] = {}
for _kind, _frames in _LENGTHS.items():
    _pixels = 3 * _frames * BLOCK * BLOCK
    SHAPES[f"{_kind}.encoder"] = (LATENT_CHANNELS, 3, _frames, BLOCK, BLOCK)
    SHAPES[f"{_kind}.encoder_bias"] = (LATENT_CHANNELS,)
    SHAPES[f"{_kind}.decoder"] = (_pixels, LATENT_CHANNELS, 1, 3, 3)
    SHAPES[f"{_kind}.decoder_bias"] = (_pixels,)
"""Tensors of the file: convolutions from a block to 16 channels, and from 3x3 latents to a block."""


class TinyTokenizer(nn.Module):
    """Causal linear transform, latent (16, 1 + (F - 1) / 4, H / 8, W / 8)."""

    spatial_compression = BLOCK
    temporal_compression = GROUP

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name in SHAPES:
            self.register_buffer(name.replace(".", "_"), tensors[name].float())

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(16, T, h, w); 4 k + 1 frames fit."""
        h, w = spatial_shape(height, width, BLOCK)
        if frames < 1 or (frames - 1) % GROUP:
            below = (frames - 1) // GROUP * GROUP + 1
            raise frames_error(frames, f"{GROUP} k + 1", below, max(1, below + GROUP))
        return LATENT_CHANNELS, (frames - 1) // GROUP + 1, h, w

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """See `Tokenizer.encode`."""
        check_video(video_BCTHW)
        self.latent_shape(*video_BCTHW.shape[2:])
        video = video_BCTHW.to(self.first_encoder)
        return torch.cat([self._transform(kind, "encoder", part, _stride(kind)) for kind, part in _split(video)], dim=2)

    @torch.no_grad()
    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """See `Tokenizer.decode`."""
        check_latent(latent_BCTHW)
        latent = latent_BCTHW.to(self.first_encoder)
        parts = [_assemble(self._transform(kind, "decoder", part, padding=(0, 1, 1)), _LENGTHS[kind]) for kind, part in _split(latent)]
        return torch.cat(parts, dim=2).clamp(-1, 1)

    def _transform(
        self, kind: str, way: str, value: Tensor, stride: Sequence[int] = (1, 1, 1), padding: Sequence[int] = (0, 0, 0)
    ) -> Tensor:
        weight, bias = getattr(self, f"{kind}_{way}"), getattr(self, f"{kind}_{way}_bias")
        return F.conv3d(value, weight, bias, stride=tuple(stride), padding=tuple(padding))

    def save(self, folder: Path, fitted_on: str = "") -> Path:
        """Write `folder/tokenizer.safetensors`, visible at once and whole; `fitted_on` names the clips, see `fitted_on`."""
        path = Path(folder) / FILE
        with whole(path) as partial:
            tensors = {name: getattr(self, name.replace(".", "_")).contiguous() for name in SHAPES}
            # One entry: safetensors writes several in any order, and the file's checksum stands for the tokenizer.
            save_file(tensors, partial, metadata={"format": f"{FORMAT}; {fitted_on}"})
        return path

    @classmethod
    def load(cls, path: Path) -> TinyTokenizer:
        """Read a folder written by `save`, or the file itself.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a tokenizer's file, or one with other tensors.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        remedy = "fit it again with `python -m cosmos_mp fit-tokenizer` or correct tokenizer.path"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer; {remedy}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); {remedy}") from error
        if metadata.get("format", "").partition("; ")[0] != FORMAT:
            raise ValueError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}; {remedy}")
        wrong = [
            f"{name} is {tuple(tensors[name].shape) if name in tensors else 'missing'}, expected {SHAPES.get(name, 'no such tensor')}"
            for name in sorted(SHAPES.keys() | tensors.keys())
            if name not in tensors or tuple(tensors[name].shape) != SHAPES.get(name)
        ]
        if wrong:
            raise ValueError(f"{path}: {'; '.join(wrong)}; {remedy}")
        return cls(tensors)


def fitted_on(folder: Path) -> str:
    """What `save` was told about the clips of a tokenizer. Raises as `TinyTokenizer.load`."""
    TinyTokenizer.load(folder)
    with safe_open(Path(folder) / FILE, framework="pt") as file:
        return file.metadata()["format"].partition("; ")[2]


# --- Blocks ---


def _stride(kind: str) -> tuple[int, int, int]:
    return _LENGTHS[kind], BLOCK, BLOCK


def _split(value_BCTHW: Tensor) -> list[tuple[str, Tensor]]:
    """The first frame, and the rest where there is one."""
    parts = [("first", value_BCTHW[:, :, :1])]
    return parts + [("group", value_BCTHW[:, :, 1:])] if value_BCTHW.shape[2] > 1 else parts


def _blocks(part_BCTHW: Tensor, frames: int) -> Tensor:
    """(B, 3, F, H, W) to (B, T, h, w, 3 * frames * 64): blocks laid out as a convolution's kernel."""
    b, _, f, height, width = part_BCTHW.shape
    cut = part_BCTHW.reshape(b, 3, f // frames, frames, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _assemble(blocks_BNThw: Tensor, frames: int) -> Tensor:
    """The inverse of `_blocks` with the pixels in dimension 1: (B, 3 * frames * 64, T, h, w) to (B, 3, F, H, W)."""
    b, _, t, h, w = blocks_BNThw.shape
    cut = blocks_BNThw.reshape(b, 3, frames, BLOCK, BLOCK, t, h, w)
    return cut.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, 3, t * frames, h * BLOCK, w * BLOCK)


# --- Fit ---


def fit_tiny(videos: Iterable[np.ndarray], seed: int) -> TinyTokenizer:
    """Fit bases, scales and decoder to clips, exactly and in float64.

    Args:
        videos: uint8 (F, H, W, 3) clips of one size, as an array (N, F, H, W, 3) or any sequence or iterable of them.
        seed: draws the clips that are used where there are more than `FIT_CLIPS`.

    Raises:
        ValueError: no clips, clips of another kind or size, no frames after the first, or fewer than 16 directions of variation.
    """
    clips = videos if isinstance(videos, Sequence | np.ndarray) else list(videos)
    if len(clips) == 0:
        raise ValueError("no clips to fit the tokenizer to; give it at least a few")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(clips))[:FIT_CLIPS])
    shape = np.shape(clips[0])
    if len(shape) != 4 or shape[3] != 3 or shape[0] < 1 + GROUP or (shape[0] - 1) % GROUP or shape[1] % BLOCK or shape[2] % BLOCK:
        rule = f"F = {GROUP} k + 1 of at least {1 + GROUP} and sides that divide by {BLOCK}"
        raise ValueError(f"clip is {shape}, expected (F, H, W, 3) with {rule}; cut or resize the clips first")
    tensors: dict[str, Tensor] = {}
    for kind in _LENGTHS:
        encoder, encoder_bias, mean = _fit_encoder(kind, clips, chosen)
        decoder = _fit_decoder(kind, clips, chosen, encoder, encoder_bias, mean)
        fitted = {"encoder": encoder.T, "encoder_bias": encoder_bias, "decoder": decoder.T, "decoder_bias": mean}
        for name, value in fitted.items():
            tensors[f"{kind}.{name}"] = value.reshape(SHAPES[f"{kind}.{name}"]).float().contiguous()
    return TinyTokenizer(tensors)


def _batches(kind: str, clips: Sequence[np.ndarray] | np.ndarray, chosen: np.ndarray) -> Iterator[Tensor]:
    """Blocks of the chosen clips in [-1, 1], float64 (B, T, h, w, pixels)."""
    shape = np.shape(clips[0])
    for start in range(0, len(chosen), _BATCH):
        batch = [np.asarray(clips[i]) for i in chosen[start : start + _BATCH]]
        for index, clip in zip(chosen[start : start + _BATCH], batch, strict=True):
            if clip.dtype != np.uint8 or clip.shape != shape:
                raise ValueError(f"clip {index} is {clip.dtype} {clip.shape}, expected uint8 {shape} like the first")
        part = dict(_split(torch.from_numpy(np.stack(batch)).permute(0, 4, 1, 2, 3)))[kind]
        yield _blocks(part, _LENGTHS[kind]).double() / 127.5 - 1


def _fit_encoder(kind: str, clips: Sequence[np.ndarray] | np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels, 16) projection, its bias (16,) and the mean block: the 16 leading eigenvectors of the blocks' covariance, scaled."""
    count, total, moment = 0, 0.0, 0.0
    for blocks in _batches(kind, clips, chosen):
        rows = blocks.flatten(0, 3)
        count, total, moment = count + len(rows), total + rows.sum(0), moment + rows.T @ rows
    mean = total / count
    values, vectors = torch.linalg.eigh(moment / count - torch.outer(mean, mean))
    values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    if values[-1] <= 1e-9 * values[0]:
        raise ValueError(f"the clips vary in fewer than {LATENT_CHANNELS} directions; fit the tokenizer to more, or less uniform, clips")
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    largest = vectors.abs().argmax(0)
    vectors = vectors * vectors.gather(0, largest[None]).sign()
    # Dividing by sd^0.5 leaves each channel the variance sd; one factor then brings their mean variance to 0.25.
    deviation = values.sqrt()
    encoder = vectors / deviation.sqrt() * (SIGMA_DATA / deviation.mean().sqrt())
    return encoder, -(mean @ encoder), mean


def _fit_decoder(
    kind: str, clips: Sequence[np.ndarray] | np.ndarray, chosen: np.ndarray, encoder: Tensor, bias: Tensor, mean: Tensor
) -> Tensor:
    """(16 * 9, pixels) weights that give a block less its mean from the 3x3 latents around it, zeros outside the picture."""
    gram, cross, count = 0.0, 0.0, 0
    for blocks in _batches(kind, clips, chosen):
        blocks = blocks.flatten(0, 1)
        latent = (blocks @ encoder + bias).permute(0, 3, 1, 2)
        near = F.unfold(latent, 3, padding=1).transpose(1, 2).flatten(0, 1)
        rows = blocks.flatten(0, 2) - mean
        gram, cross, count = gram + near.T @ near, cross + near.T @ rows, count + len(rows)
    ridge = RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram / count + ridge * SIGMA_DATA**2, cross / count)
