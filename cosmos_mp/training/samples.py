"""What the pictures of a run show: fixed held-out clips, answered from fixed noises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cosmos_mp.config import ConfigError, TokenizerConfig
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.diffusion.samplers import Answer
from cosmos_mp.distill.conditioning import condition_of_clips, unit_noise
from cosmos_mp.parallel.context import whole_clips
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.tokenizers import build_tokenizer
from cosmos_mp.tokenizers.frames import video_to_frames


class HeldOut:
    """`count` held-out clips with their noises and the decoder, ready to be answered and drawn.

    Raises:
        ConfigError: fewer clips than `count`.
    """

    def __init__(self, clips: LatentDataset, tokenizer: TokenizerConfig, count: int, topology: Topology):
        if count > len(clips):
            raise ConfigError(f"train.picture_samples={count} exceeds the {len(clips)} held-out clips")
        self.count, self.topology, self.decoder = count, topology, build_tokenizer(tokenizer, topology.device)
        self.batch = clips.fixed(list(range(count))).to(topology.device)

    def renderer(self, answers: dict[str, Answer]) -> Callable[[int], list[dict[str, np.ndarray]]]:
        """A function that draws the clips: one row per entry of `answers`, then control and ground truth.

        All ranks must call it; the first gets the pictures, the others an empty list.
        """
        topology = self.topology
        part = self.batch.cut(topology.cp_group.rank(), topology.cp_group.size())
        epsilon, condition = unit_noise(part, 0, "picture", 0), condition_of_clips(part)

        def render(iteration: int) -> list[dict[str, np.ndarray]]:
            latents = {name: whole_clips(answer(epsilon, condition), topology) for name, answer in answers.items()}
            if topology.rank > 0:
                return []
            latents |= {"control": self.batch.control_BCTHW, "ground truth": self.batch.latent_BCTHW}
            videos = {name: video_to_frames(self.decoder.decode(latent)) for name, latent in latents.items()}
            return [{name: video[index] for name, video in videos.items()} for index in range(self.count)]

        return render
