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


class HeldOut:
    """`count` held-out clips with their noises and the decoder, ready to be answered and drawn.

    Raises:
        ConfigError: fewer clips than `count`.
    """

    def __init__(self, clips: LatentDataset, tokenizer: TokenizerConfig, count: int, device: torch.device):
        if count > len(clips):
            raise ConfigError(f"train.picture_samples={count} exceeds the {len(clips)} held-out clips")
        self.count, self.decoder = count, build_tokenizer(tokenizer, device)
        self.batch = clips.fixed(list(range(count))).to(device)
        self.epsilon = noise.normal(self.batch.latent_BCTHW.shape[1:], 0, "picture", 0, self.batch.position_B).to(device)

    def renderer(self, answers: dict[str, Answer]) -> Callable[[int], list[dict[str, np.ndarray]]]:
        """A function that draws the clips: one row per entry of `answers`, then control and ground truth."""
        condition = condition_of_clips(self.batch)

        def render(iteration: int) -> list[dict[str, np.ndarray]]:
            latents = {name: answer(self.epsilon, condition) for name, answer in answers.items()}
            latents |= {"control": self.batch.control_BCTHW, "ground truth": self.batch.latent_BCTHW}
            videos = {name: video_to_frames(self.decoder.decode(latent)) for name, latent in latents.items()}
            return [{name: video[index] for name, video in videos.items()} for index in range(self.count)]

        return render
