"""Metrics of generated clips: pure functions over latents, features and uint8 RGB videos; every sum is taken in float64.

Sharpness and texture are energies of one clip. Only their ratio to the real clips' mean says something: see `statistics.ratio_of_means`.
"""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cosmos_mp.kernels.canny import canny

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def as_float64(x: Tensor | ArrayLike) -> np.ndarray:
    """A tensor on any device and of any dtype, or an array, as a float64 array."""
    return x.detach().cpu().double().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)


def mse_to(a_NCTHW: Tensor | np.ndarray, b_NCTHW: Tensor | np.ndarray) -> np.ndarray:
    """Mean squared difference of each sample, (N,). Raises ValueError if the shapes differ."""
    a, b = as_float64(a_NCTHW), as_float64(b_NCTHW)
    if a.shape != b.shape:
        raise ValueError(f"mse_to: shapes {a.shape} and {b.shape} differ; compare samples of the same conditions, in the same order")
    return np.square(a - b).reshape(len(a), -1).mean(axis=1)


def frechet(x_ND: Tensor | np.ndarray, y_MD: Tensor | np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

    ||mx - my||² + tr(Sx + Sy - 2 (Sx^½ Sy Sx^½)^½), with unbiased covariances. It is biased upwards for few samples, so compare values of
    equal N and M only. Raises ValueError unless both are finite, two-dimensional, equally wide and at least two samples long.
    """
    x, y = as_float64(x_ND), as_float64(y_MD)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"frechet: needs (N, D) and (M, D) of one extractor, got {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"frechet: a covariance needs at least 2 samples, got {len(x)} and {len(y)}; evaluate more clips")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("frechet: features hold NaN or infinity; look at the samples they came from")
    cov_x, cov_y = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y))
    values, vectors = np.linalg.eigh(cov_x)
    root_x = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root_x @ cov_y @ root_x
    trace_root = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    distance = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * trace_root
    return float(max(distance, 0.0))  # rounding alone can make it negative


def edge_f1(video_FHWC: np.ndarray, control_FHWC: np.ndarray, low: float, high: float, tolerance: int = 1) -> tuple[float, float, float]:
    """How well a video's Canny edges keep to its edge control: (precision, recall, F1) over all frames.

    `low` and `high` are the thresholds of Canny on RGB frames, those the control was made with; a control pixel is an edge above 127.
    An edge counts as found if the other side has one within `tolerance` pixels (square neighbourhood). No edge on either side is 1; edges
    on one side only are 0. Raises ValueError for anything but two uint8 (F, H, W, 3) arrays of equal shape.
    """
    _check_video("edge_f1: video", video_FHWC)
    _check_video("edge_f1: control", control_FHWC)
    if video_FHWC.shape != control_FHWC.shape:
        raise ValueError(f"edge_f1: video {video_FHWC.shape} and control {control_FHWC.shape} differ; use the control of this very clip")
    kernel = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    drawn_count = asked_count = drawn_found = asked_found = 0
    edges_FHW = canny(torch.from_numpy(np.require(video_FHWC, requirements="CW")), math.floor(low), math.floor(high)).numpy()
    for edges, control in zip(edges_FHW, control_FHWC, strict=True):
        drawn = (edges > 0).astype(np.uint8)
        asked = (control.max(axis=-1) > 127).astype(np.uint8)
        drawn_count += int(drawn.sum())
        asked_count += int(asked.sum())
        drawn_found += int((drawn & cv2.dilate(asked, kernel)).sum())
        asked_found += int((asked & cv2.dilate(drawn, kernel)).sum())
    if drawn_count == 0 and asked_count == 0:
        return 1.0, 1.0, 1.0
    if drawn_found == 0 or asked_found == 0:
        return 0.0, 0.0, 0.0
    precision, recall = drawn_found / drawn_count, asked_found / asked_count
    return precision, recall, 2 * precision * recall / (precision + recall)


def sharpness(video_FHWC: np.ndarray) -> float:
    """Laplacian energy: mean square of the 3×3 (four-neighbour) Laplacian of luma in [0, 1], away from the border."""
    y = _luma("sharpness", video_FHWC)
    if min(y.shape[1:]) < 3:
        raise ValueError(f"sharpness: frames of {y.shape[1]}×{y.shape[2]} pixels have no inside; it takes at least 3×3")
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return float(np.square(around - 4 * y[:, 1:-1, 1:-1]).mean())


def band_energy(video_FHWC: np.ndarray, period: float = 21.3) -> float:
    """Texture: energy of stripes of `period` pixels, across x plus across y, mean over frames, in units of luma² with luma in [0, 1].

    Stripes of amplitude A give A² / 2. Each frame is reduced to its median over the other axis, so that an object that covers less than
    half of it does not count, and the profile is projected on {1, x, cos, sin} together, so that a linear gradient does not count either.
    Raises ValueError if `period` is not above 2 pixels and at most the frame's smaller side.
    """
    y = _luma("band_energy", video_FHWC)
    if not 2 < period <= min(y.shape[1:]):
        raise ValueError(f"band_energy: period {period} must be above 2 and at most the frame's smaller side, here {min(y.shape[1:])}")
    energy = 0.0
    for profiles in (np.median(y, axis=1), np.median(y, axis=2)):
        position = np.arange(profiles.shape[1], dtype=np.float64)
        phase = 2 * np.pi * position / period
        basis = np.stack([np.ones_like(position), position, np.cos(phase), np.sin(phase)], axis=1)
        cos_sin = np.linalg.lstsq(basis, profiles.T, rcond=None)[0][2:]
        energy += float(np.square(cos_sin).sum(axis=0).mean()) / 2
    return energy


def diversity(latents_K: Tensor | np.ndarray) -> float:
    """Mean over pairs of the RMS distance between K answers (K, ...) to one condition from different noises. Needs K >= 2."""
    x = as_float64(latents_K)
    if len(x) < 2:
        raise ValueError(f"diversity: needs at least 2 answers to one condition, got {len(x)}; draw more noises")
    return float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in itertools.combinations(x, 2)]))


def _check_video(what: str, video: np.ndarray) -> None:
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.size == 0:
        got = f"{video.dtype} {tuple(video.shape)}" if hasattr(video, "shape") else type(video).__name__
        raise ValueError(f"{what} must be a uint8 numpy array (F, H, W, 3) of RGB frames, got {got}")


def _luma(what: str, video_FHWC: np.ndarray) -> np.ndarray:
    _check_video(f"{what}: video", video_FHWC)
    return video_FHWC @ (_LUMA / 255)
