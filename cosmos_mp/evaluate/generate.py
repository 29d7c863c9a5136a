"""Answers of teacher and students to held-out clips, kept on disk so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos_mp.data.batch import Batch
from cosmos_mp.diffusion.samplers import Answer
from cosmos_mp.distill.conditioning import condition_of_clips
from cosmos_mp.files import whole
from cosmos_mp.parallel import noise


def evaluation_noise(shape: tuple[int, ...], seed: int, draw: int, clips: Tensor) -> Tensor:
    """The same noise for every variant; `draw` counts the noises of one clip."""
    return noise.normal(shape, seed, "evaluation", draw, clips)


@torch.no_grad()
def answer_all(answer: Answer, batch: Batch, seed: int, draw: int, batch_size: int, device: torch.device) -> Tensor:
    """Latents (N, C, T, H, W) for every clip of `batch`."""
    answers = []
    for rows in torch.arange(len(batch)).split(batch_size):
        part = batch.rows(rows).to(device)
        epsilon = evaluation_noise(tuple(part.latent_BCTHW.shape[1:]), seed, draw, part.position_B)
        answers.append(answer(epsilon.to(device), condition_of_clips(part)).float().cpu())
    return torch.cat(answers)


def cached(path: Path, key: dict, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what an earlier run stored at `path` under the same key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") == digest:
                    return stored.get_tensor("latent")
        except SafetensorError as error:
            print(f"{path} is damaged ({error}) and made anew")
    value = make()
    with whole(path) as partial:
        save_file({"latent": value.contiguous()}, partial, metadata={"key": digest})
    return value
