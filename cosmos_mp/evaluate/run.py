"""`python -m cosmos_mp evaluate`: teacher and students on held-out clips."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_mp.config import ClipConfig, ConfigError, EvaluateRun
from cosmos_mp.data.batch import Batch
from cosmos_mp.data.clips import load_index
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.encode import load_window
from cosmos_mp.data.video import write_video
from cosmos_mp.diffusion.edm import Condition, Denoiser, bcast
from cosmos_mp.diffusion.samplers import Answer, answer_in_one_step, sample_teacher
from cosmos_mp.distill.conditioning import condition_of_clips
from cosmos_mp.evaluate import metrics
from cosmos_mp.evaluate.checks import CHECKS, check_variants
from cosmos_mp.evaluate.features import Extractor, LatentPCA, NetworkFeatures, RandomConv, TorchScriptFeatures
from cosmos_mp.evaluate.generate import answer_all, cached, evaluation_noise
from cosmos_mp.evaluate.report import format_table, save_results, write_report
from cosmos_mp.evaluate.statistics import bootstrap, ratio_of_means
from cosmos_mp.models.weights import fingerprint, named_weights
from cosmos_mp.options import save
from cosmos_mp.parallel.topology import Topology, single_process
from cosmos_mp.revision import revision
from cosmos_mp.roles import load_transfer_net, unconditional_text
from cosmos_mp.text import build_text_encoder
from cosmos_mp.tokenizers import Tokenizer, build_tokenizer
from cosmos_mp.tokenizers.frames import frames_to_video, video_to_frames
from cosmos_mp.training.pictures import picture_grid, write_png

TEACHER, TEACHER_ONE_STEP = "teacher", "teacher 1-step"
PCA_AXES = 32
FEATURE_SIGMA = 0.1
"""Noise level at which the frozen teacher looks at a latent."""
TEACHER_TIMED = 5
"""Clips that the teacher is timed on."""
BOOTSTRAPS = 100
DECODER_BATCH = 32


@dataclass(frozen=True)
class Clips:
    """The held-out clips: encoded batch, and frames (N, F, H, W, 3) uint8 of clip and control as the files have them."""

    batch: Batch
    real: np.ndarray
    control: np.ndarray
    thresholds: list[tuple[int, int]] | None
    captions: list[str]
    sha256: str


def evaluate(config: EvaluateRun) -> dict[str, Any]:
    """Run the evaluation; writes results.json, report.html, comparison.png and clip.mp4 to `config.out`.

    Returns:
        The results, see `evaluate.report`.
    """
    topology, out = replace(single_process(), backend=config.backend), Path(config.out)
    # What would fail after hours of answering is asked for first.
    named = TorchScriptFeatures(config.features, topology.device) if config.features else None
    check_variants(config.checks, [TEACHER, TEACHER_ONE_STEP, *(entry.partition("=")[0] for entry in config.students)])
    save(config, out / "config.json")
    tokenizer = build_tokenizer(config.tokenizer, topology.device)
    clips = _load_clips(config)
    networks = _networks(config, topology)
    answers = _answers(config, topology, networks)

    latents: dict[str, Tensor] = {}
    for name, (answer, hashes) in answers.items():
        path = out / "latents" / f"{name.replace(' ', '_')}.safetensors"
        print(f"evaluate: {name} on {len(clips.batch)} clips", flush=True)
        key = _key(config, clips, hashes)
        latents[name] = cached(path, key, lambda a=answer: answer_all(a, clips.batch, config.seed, 0, config.batch_size, topology.device))
    videos = {name: _decode(tokenizer, latent, topology.device) for name, latent in latents.items()}

    real_videos = _decode(tokenizer, clips.batch.latent_BCTHW, topology.device)
    variants = _measure(config, topology, networks, answers, clips, latents, videos, real_videos, named)
    for name, costs in _costs(config, topology, networks, answers, tokenizer, clips).items():
        variants[name] |= costs
    described = [metric for metric in METRICS + _extra_metrics(config) if any(metric["key"] in values for values in variants.values())]
    results = {
        "run": _about(config, topology, networks, clips) | _ceiling(clips, real_videos),
        "metrics": described,
        "variants": variants,
        "checks": CHECKS[config.checks](variants),
        "timing": {"clips timed": {"teacher": TEACHER_TIMED, "one call": config.timing_repeats}},
    }
    save_results(out / "results.json", results)
    picture = _picture(out, clips, videos)
    clip = _clip(out, clips, videos)
    curves = {name: log for name, log in _logs(config).items() if log.is_file()}
    report = write_report(out, results, curves, [picture], clip)
    print(format_table(results))
    print(f"picture: {picture}\nreport:  {report}\nresults: {out / 'results.json'}")
    return results


# --- Inputs ---


def _load_clips(config: EvaluateRun) -> Clips:
    expect = {"kind": "clips", "diffusion.latent_shape": config.diffusion.latent_shape, "net.text_dim": config.net.text_dim}
    expect["text.tokens"] = config.text.tokens
    store = LatentDataset(Path(config.clips), config.seed, expect=expect)
    count = min(config.samples, len(store))
    if count < 2:
        raise ConfigError(f"{config.clips} holds {len(store)} clips; an evaluation needs at least 2")
    meta, root = store.reader.header.meta, Path(config.videos)
    clip = ClipConfig(**meta["clip"])
    records = {record.id: record for record in load_index(Path(config.index or config.videos) / "clips.jsonl")}
    infos = [store.info(index) for index in range(count)]
    unknown = [info["clip"] for info in infos if info["clip"] not in records]
    if unknown:
        raise ConfigError(f"{config.clips} was encoded from a clip {unknown[0]!r} that {root} does not list: give its folder as --videos")
    windows = [load_window(records[info["clip"]], info["window"], root, clip, meta["seed"]) for info in infos]
    return Clips(
        store.fixed(list(range(count))),
        np.stack([window.video_FHWC for window in windows]),
        np.stack([window.control_FHWC for window in windows]),
        [tuple(info["edge_thresholds"]) for info in infos] if clip.control == "edge" else None,
        [info["caption"] for info in infos],
        store.reader.sha256,
    )


def _networks(config: EvaluateRun, topology: Topology) -> dict[str, Denoiser]:
    """Teacher and students by name, frozen."""
    sources = {TEACHER: config.teacher}
    for entry in config.students:
        name, separator, source = entry.partition("=")
        if not separator or not source or name in (TEACHER, TEACHER_ONE_STEP) or name in sources:
            raise ConfigError(f"students: {entry!r} must be NAME=WEIGHTS with a name of its own")
        sources[name] = source
    networks = {}
    for name, source in sources.items():
        role = "teacher" if name == TEACHER else "student"
        network = load_transfer_net(config.net, topology, source, role, fp8=config.backend.recipe_of(role))
        networks[name] = Denoiser(network.requires_grad_(False), config.diffusion)
    return networks


def _answers(config: EvaluateRun, topology: Topology, networks: dict[str, Denoiser]) -> dict[str, tuple[Answer, str]]:
    """How each variant answers, and a hash of its weights."""
    teacher = networks[TEACHER]
    unconditional = unconditional_text(config.sampler.unconditional, config.negative_prompt, config.text, topology.device)

    def guided(epsilon: Tensor, condition: Condition) -> Tensor:
        return sample_teacher(teacher, epsilon, condition, unconditional.expand_as(condition.text_BLD), config.sampler)

    hashes = {name: fingerprint(named_weights(denoiser.network)) for name, denoiser in networks.items()}
    answers: dict[str, tuple[Answer, str]] = {
        TEACHER: (guided, hashes[TEACHER]),
        TEACHER_ONE_STEP: (answer_in_one_step(teacher), hashes[TEACHER]),
    }
    return answers | {name: (answer_in_one_step(network), hashes[name]) for name, network in networks.items() if name != TEACHER}


def _key(config: EvaluateRun, clips: Clips, weights: str) -> dict[str, Any]:
    """Everything that stored answers depend on."""
    return {
        "seed": config.seed,
        "weights": weights,
        "clips": [config.samples, clips.sha256],
        "net": dataclasses.asdict(config.net),
        "backend": [config.backend.kind, config.backend.fp8],
        "fp8": [config.backend.recipe_of(role) for role in ("teacher", "student")],
        "diffusion": dataclasses.asdict(config.diffusion),
        "sampler": dataclasses.asdict(config.sampler),
        "unconditional": [config.negative_prompt, dataclasses.asdict(config.text)],
    }


def _logs(config: EvaluateRun) -> dict[str, Path]:
    sources = {TEACHER: config.teacher} | dict(entry.split("=", 1) for entry in config.students)
    return {name: Path(source) / "log.jsonl" for name, source in sources.items()}


# --- Measurements ---

REAL = "to the real held-out clips"
METRICS: list[dict[str, Any]] = [
    {"key": "calls", "label": "network calls per clip", "unit": "", "better": "lower"},
    {"key": "network_ms", "label": "wall time, network", "unit": "ms", "better": "lower", "note": "median over clips, one at a time"},
    {"key": "end_to_end_ms", "label": "wall time, end to end", "unit": "ms", "better": "lower", "note": "text, control, network, decoder"},
    {"key": "mse", "label": "MSE to the teacher's answer", "unit": "", "better": "lower", "note": "same noise, latent space"},
    {"key": "frechet_teacher", "label": "Fréchet, teacher features", "unit": "", "better": "lower", "note": REAL},
    {"key": "frechet_latent_pca", "label": "Fréchet, latent PCA", "unit": "", "better": "lower", "note": REAL},
    {
        "key": "frechet_random_conv",
        "label": "Fréchet, random convolution",
        "unit": "",
        "better": "lower",
        "note": "to the real held-out clips",
    },
    {"key": "sharpness", "label": "sharpness / real", "unit": "", "better": "one", "note": "Laplacian energy"},
    {"key": "texture", "label": "texture / real", "unit": "", "better": "one", "note": "energy of the background's stripes"},
    {"key": "edge_f1", "label": "edge F1 against the control", "unit": "", "better": "higher", "note": "1 pixel tolerance"},
    {"key": "diversity", "label": "diversity", "unit": "", "better": None, "note": "RMS distance of answers to one control"},
]


def _extra_metrics(config: EvaluateRun) -> list[dict[str, Any]]:
    if not config.features:
        return []
    name = Path(config.features).stem
    return [{"key": f"frechet_{name}", "label": f"Fréchet, {name}", "unit": "", "better": "lower", "note": REAL}]


def _measure(
    config: EvaluateRun,
    topology: Topology,
    networks: dict[str, Denoiser],
    answers: dict[str, tuple[Answer, str]],
    clips: Clips,
    latents: dict[str, Tensor],
    videos: dict[str, np.ndarray],
    real_videos: np.ndarray,
    named: Extractor | None,
) -> dict[str, dict[str, Any]]:
    """Every metric of every variant. Real clips are taken as the tokenizer shows them, so that its losses count for nobody."""
    real = clips.batch.latent_BCTHW
    extractors: list[Extractor] = [
        NetworkFeatures(_teacher_features(config, topology, networks[TEACHER], clips.batch)),
        LatentPCA.fit(real, min(PCA_AXES, len(real) - 1)),
        RandomConv(channels=real.shape[1]),
        *([named] if named else []),
    ]
    real_features = {extractor.name: extractor(real, real_videos) for extractor in extractors}
    energies = {"sharpness": metrics.sharpness}
    if config.texture_period:
        energies["texture"] = lambda video: metrics.band_energy(video, config.texture_period)
    real_energies = {key: np.array([energy(video) for video in real_videos]) for key, energy in energies.items()}
    variants: dict[str, dict[str, Any]] = {}
    for name, (answer, _) in answers.items():
        values = variants[name] = {}
        if name != TEACHER:
            values["mse"] = bootstrap(np.mean, metrics.mse_to(latents[name], latents[TEACHER]), repeats=BOOTSTRAPS)
        for extractor in extractors:
            features = extractor(latents[name], videos[name])
            distance = bootstrap(metrics.frechet, features, real_features[extractor.name], repeats=BOOTSTRAPS)
            values[f"frechet_{extractor.name}"] = distance
        for key, energy in energies.items():
            own = np.array([energy(video) for video in videos[name]])
            values[key] = bootstrap(ratio_of_means, own, real_energies[key], repeats=BOOTSTRAPS)
        if clips.thresholds is not None:
            values["edge_f1"] = bootstrap(np.mean, _edge_f1(videos[name], clips), repeats=BOOTSTRAPS)
        values["diversity"] = _diversity(config, topology, answer, clips.batch)
    return variants


def _edge_f1(videos: np.ndarray, clips: Clips) -> np.ndarray:
    rows = zip(videos, clips.control, clips.thresholds, strict=True)
    return np.array([metrics.edge_f1(video, control, *thresholds)[2] for video, control, thresholds in rows])


def _teacher_features(config: EvaluateRun, topology: Topology, teacher: Denoiser, batch: Batch) -> Callable[[Tensor], Tensor]:
    """Output of the teacher's middle block at a small noise level, under each clip's own condition, averaged over T, H, W."""
    block = config.net.blocks // 2

    def features(latents: Tensor) -> Tensor:
        rows = []
        for index in torch.arange(len(latents)).split(config.batch_size):
            part = batch.rows(index).to(topology.device)
            latent = latents[index].to(topology.device)
            sigma = torch.full((len(index),), FEATURE_SIGMA, device=topology.device)
            epsilon = evaluation_noise(tuple(latent.shape[1:]), config.seed, -1, part.position_B).to(latent)
            noisy = latent + bcast(sigma) * epsilon
            rows.append(teacher(noisy, sigma, condition_of_clips(part), feature_blocks=(block,), tail="none").features[0].mean((1, 2, 3)))
        return torch.cat(rows)

    return features


def _diversity(config: EvaluateRun, topology: Topology, answer: Answer, batch: Batch) -> Any:
    """Mean pairwise distance of a clip's answers to different noises, over the first clips."""
    count = min(config.diversity_clips, len(batch))
    part = batch.rows(torch.arange(count))
    draws = [answer_all(answer, part, config.seed, draw, config.batch_size, topology.device) for draw in range(config.diversity_noises)]
    per_clip = np.array([metrics.diversity(answers) for answers in torch.stack(draws, dim=1)])
    return bootstrap(np.mean, per_clip, repeats=BOOTSTRAPS)


@torch.no_grad()
def _costs(
    config: EvaluateRun,
    topology: Topology,
    networks: dict[str, Denoiser],
    answers: dict[str, tuple[Answer, str]],
    tokenizer: Tokenizer,
    clips: Clips,
) -> dict[str, dict[str, Any]]:
    """Per variant: network calls for a clip, counted, and wall times, of the network alone and from caption and control to frames."""
    encoder, device = build_text_encoder(config.text, topology.device), topology.device

    def take(index: int) -> tuple[Batch, Tensor]:
        one = clips.batch.rows(torch.tensor([index])).to(device)
        return one, evaluation_noise(tuple(one.latent_BCTHW.shape[1:]), config.seed, 0, one.position_B).to(device)

    def alone(answer: Answer, index: int) -> None:
        one, epsilon = take(index)
        answer(epsilon, condition_of_clips(one))

    def end_to_end(answer: Answer, index: int) -> None:
        one, epsilon = take(index)
        text = encoder.encode(clips.captions[index : index + 1]).to(device)
        control = tokenizer.encode(frames_to_video(clips.control[index : index + 1]).to(device))
        tokenizer.decode(answer(epsilon, Condition(text, control, one.fps_B, one.padding_mask_BHW)))

    costs = {}
    for name, (answer, _) in answers.items():
        count = TEACHER_TIMED if name == TEACHER else config.timing_repeats
        costs[name] = {
            "calls": _count_calls(networks, lambda a=answer: alone(a, 0)),
            "network_ms": _time_ms(lambda index, a=answer: alone(a, index), count, len(clips.batch), device),
            "end_to_end_ms": _time_ms(lambda index, a=answer: end_to_end(a, index), count, len(clips.batch), device),
        }
    return costs


def _count_calls(networks: dict[str, Denoiser], call: Callable[[], Any]) -> int:
    """Forward passes of all networks together in one call."""
    passes: list[None] = []
    hooks = [denoiser.network.register_forward_hook(lambda *_: passes.append(None)) for denoiser in networks.values()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return len(passes)


def _time_ms(call: Callable[[int], Any], count: int, clips: int, device: torch.device) -> Any:
    """Median wall time over `count` clips after one call to warm up, with its interval."""
    times = []
    for number in range(count + 1):
        start = time.perf_counter()
        call(number % clips)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return bootstrap(np.median, np.array(times[1:]), repeats=BOOTSTRAPS)


# --- Outputs ---


@torch.no_grad()
def _decode(tokenizer: Tokenizer, latents: Tensor, device: torch.device) -> np.ndarray:
    """Latents (N, C, T, h, w) -> uint8 frames (N, F, H, W, 3)."""
    return np.concatenate([video_to_frames(tokenizer.decode(part.to(device))) for part in latents.split(DECODER_BATCH)])


def _rows(clips: Clips, videos: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    return {name: video[index] for name, video in videos.items()} | {"control": clips.control[index], "real": clips.real[index]}


def _picture(out: Path, clips: Clips, videos: dict[str, np.ndarray], count: int = 3) -> Path:
    """Rows variants, control and real; columns first, middle and last frame; a few clips side by side."""
    grids = [picture_grid(_rows(clips, videos, index)) for index in range(min(count, len(clips.real)))]
    path = out / "comparison.png"
    write_png(path, np.concatenate(grids, axis=1))
    return path


def _clip(out: Path, clips: Clips, videos: dict[str, np.ndarray], count: int = 4) -> Path:
    """A film: one row per clip, one column per variant, then control and real."""
    rows = []
    for index in range(min(count, len(clips.real))):
        rows.append(np.concatenate(list(_rows(clips, videos, index).values()), axis=2))
    film = np.concatenate(rows, axis=1)
    scale = max(1, 1280 // film.shape[2])
    film = film.repeat(scale, axis=1).repeat(scale, axis=2)
    path = out / "clip.mp4"
    write_video(path, film[:, : film.shape[1] // 2 * 2, : film.shape[2] // 2 * 2], float(clips.batch.fps_B[0]))
    return path


def _ceiling(clips: Clips, real_videos: np.ndarray) -> dict[str, Any]:
    """What the tokenizer alone leaves of the control's edges."""
    return (
        {} if clips.thresholds is None else {"edge F1 of the real clips through the tokenizer": float(_edge_f1(real_videos, clips).mean())}
    )


def _about(config: EvaluateRun, topology: Topology, networks: dict[str, Denoiser], clips: Clips) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": revision(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {topology.device.type}",
        "torch": torch.__version__,
        "clips": len(clips.batch),
        "seed": config.seed,
        "guidance": f"{config.sampler.guidance} (Ho-Salimans {config.sampler.guidance + 1})",
        "variants": [TEACHER, TEACHER_ONE_STEP, *[name for name in networks if name != TEACHER]],
        "parameters": sum(p.numel() for p in networks[TEACHER].network.parameters()),
    }
