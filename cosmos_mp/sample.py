"""`python -m cosmos_mp sample`: a caption and a control (or a video to take it from) to an mp4, in one network call per chunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cosmos_mp.config import ConfigError, SampleRun
from cosmos_mp.data.clips import fit
from cosmos_mp.data.controls import edge, edge_thresholds, vis
from cosmos_mp.data.video import read_video, write_video
from cosmos_mp.diffusion.edm import Condition, Denoiser, Given
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.distill.conditioning import first_frames
from cosmos_mp.parallel import noise
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.roles import load_transfer_net
from cosmos_mp.text import build_text_encoder
from cosmos_mp.tokenizers import Tokenizer, build_tokenizer
from cosmos_mp.tokenizers.frames import frames_to_video, video_to_frames


@torch.no_grad()
def sample(config: SampleRun) -> Path:
    """Write the student's clip to `config.out` and return its path.

    A control longer than one clip is answered chunk by chunk: each chunk after the first is given the last frame of the one before.
    A student that was trained without given frames (diffusion.condition_frames = 0) answers the first clip's length alone, and says so.

    Raises:
        ConfigError: no or two sources of control, no caption, or a control shorter than a clip.
    """
    if not config.prompt:
        raise ConfigError("no caption: give --prompt")
    if Path(config.out).is_dir():
        raise ConfigError(f"{config.out} is a folder: name the mp4 file to write as --out")
    if bool(config.video) == bool(config.control):
        raise ConfigError("give one of --video (the control is computed from it) and --control (a ready control video)")
    topology = replace(single_process(), backend=config.backend)
    control, padding_mask, fps = _control(config)
    starts = chunk_starts(len(control), config.clip.frames, config.diffusion.condition_frames > 0)
    if (made := starts[-1] + config.clip.frames) < len(control):
        print(f"note: {made} of the control's {len(control)} frames are answered: this student continues no clip (condition_frames=0)")
    tokenizer = build_tokenizer(config.tokenizer, topology.device)
    network = load_transfer_net(config.net, topology, config.student, "student", fp8=config.backend.recipe_of("student"))
    student = Denoiser(network.requires_grad_(False), config.diffusion, config.control_weight)
    text = build_text_encoder(config.text, topology.device).encode([config.prompt]).to(topology.device)
    mask = torch.from_numpy(padding_mask)[None].float().to(topology.device)
    chunks: list[np.ndarray] = []
    for number, start in enumerate(starts):
        control_latent = tokenizer.encode(frames_to_video(_window(control, start, config.clip.frames)[None]).to(topology.device))
        shape = tuple(control_latent.shape[1:])
        given = _given(chunks[-1][-1:], shape, tokenizer, config.seed, number, topology.device) if chunks else None
        condition = Condition(text, control_latent, torch.tensor([fps], device=topology.device), mask, given)
        epsilon = noise.normal(shape, config.seed, "sample", 0, [number]).to(topology.device)
        chunks.append(video_to_frames(tokenizer.decode(one_step(student, epsilon, condition).x0))[0])
    joined = np.concatenate([chunk[min(number, 1) :] for number, chunk in enumerate(chunks)])[: len(control)]
    out = Path(config.out)
    write_video(out, joined, fps)
    return out


def chunk_starts(frames: int, clip_frames: int, chained: bool) -> list[int]:
    """First control frame of each chunk; neighbours share one frame. A student without given frames makes one chunk.

    Raises:
        ConfigError: fewer frames than a clip has.
    """
    if frames < clip_frames:
        raise ConfigError(f"the control has {frames} frames, a clip needs {clip_frames}: give a longer one")
    if not chained:
        return [0]
    return list(range(0, max(1, frames - 1), clip_frames - 1))


def _control(config: SampleRun) -> tuple[np.ndarray, np.ndarray, float]:
    """Control frames and padding mask at the clip's size, and the frame rate. As in training, the control is taken after resizing."""
    frames, fps = read_video(Path(config.control or config.video))
    frames, fps = frames[:: config.clip.stride], fps / config.clip.stride
    fitted, padding_mask = fit(frames, config.clip.height, config.clip.width)
    if config.control:
        return fitted, padding_mask, fps
    if config.clip.control == "edge":
        low, high = edge_thresholds(config.clip.edge_preset, seed=config.seed, clip_id=config.video, draw=0)
        return edge(fitted, low, high), padding_mask, fps
    if config.clip.control == "vis":
        return vis(fitted, seed=config.seed, clip_id=config.video, draw=0), padding_mask, fps
    raise ConfigError(f"a {config.clip.control} control is not computed here: make it with a tool of its own and give it as --control")


def _window(control: np.ndarray, start: int, frames: int) -> np.ndarray:
    """Control frames of a chunk; the last one is filled up by repeating its end."""
    window = control[start : start + frames]
    return np.concatenate([window, np.repeat(window[-1:], frames - len(window), axis=0)])


def _given(frame: np.ndarray, shape: tuple[int, ...], tokenizer: Tokenizer, seed: int, chunk: int, device: torch.device) -> Given:
    """The previous chunk's last frame as the first latent frame of this one."""
    first = tokenizer.encode(frames_to_video(frame[None]).to(device))
    latent = torch.zeros(1, *shape, device=device)
    latent[:, :, :1] = first
    mask = first_frames(torch.ones(1, device=device), shape[1])
    return Given(latent, mask, noise.normal(shape, seed, "condition_noise", 0, [chunk]).to(device))
