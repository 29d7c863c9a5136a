"""What the pictures of a run show: fixed held-out clips, answered from fixed noises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cosmos_mp.config import ConfigError, TokenizerConfig
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.diffusion.samplers import Answer
from cosmos_mp.distill.conditioning import condition_of_clips
from cosmos_mp.parallel import noise
from cosmos_mp.tokenizers import build_tokenizer
from cosmos_mp.tokenizers.frames import video_to_frames


def renderer(
    answers: dict[str, Answer], holdout: LatentDataset, tokenizer: TokenizerConfig, count: int, device: torch.device
) -> Callable[[int], list[dict[str, np.ndarray]]]:
    """A function that draws `count` clips: one row per entry of `answers`, then control and ground truth."""
    if count > len(holdout):
        raise ConfigError(f"train.picture_samples={count} exceeds the {len(holdout)} held-out clips")
    decoder = build_tokenizer(tokenizer, device)
    batch = holdout.fixed(list(range(count))).to(device)
    epsilon = noise.normal(batch.latent_BCTHW.shape[1:], 0, "picture", 0, batch.position_B).to(device)
    condition = condition_of_clips(batch)

    def render(iteration: int) -> list[dict[str, np.ndarray]]:
        latents = {name: answer(epsilon, condition) for name, answer in answers.items()}
        latents |= {"control": batch.control_BCTHW, "ground truth": batch.latent_BCTHW}
        videos = {name: video_to_frames(decoder.decode(latent)) for name, latent in latents.items()}
        return [{name: video[index] for name, video in videos.items()} for index in range(count)]

    return render
