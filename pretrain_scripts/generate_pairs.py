"""Let the teacher answer fixed noises: the pairs that KD learns from. Resumable; many processes share the shards by rank.

python pretrain_scripts/generate_pairs.py PRESET [--section.option value ...] [--dry-run]
torchrun --nproc_per_node 8 pretrain_scripts/generate_pairs.py PRESET ...
"""

from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cosmos_mp.cli import stage_main
from cosmos_mp.config import PairsRun
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.shards import ShardWriter
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import guidance_words
from cosmos_mp.distill.pairs import generate_pairs, pairs_header
from cosmos_mp.models.weights import fingerprint, named_weights
from cosmos_mp.options import save
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.roles import load_transfer_net, unconditional_text


def main(config: PairsRun) -> None:
    # --- Data ---
    expect = {"kind": "clips", "diffusion.latent_shape": config.diffusion.latent_shape, "text.dim": config.text.dim}
    clips = LatentDataset(Path(config.clips), config.seed, expect=expect | {"text.tokens": config.text.tokens})

    # --- Role: frozen, so that no graph is kept ---
    topology = replace(single_process(), backend=config.backend)
    fp8 = config.backend.recipe_of("teacher")
    teacher = load_transfer_net(config.net, topology, config.teacher, "teacher", fp8=fp8).requires_grad_(False)
    unconditional = unconditional_text(config.sampler.unconditional, config.negative_prompt, config.text, topology.device)

    # --- Pairs: the header holds the teacher's hash, so pairs of two teachers never mix ---
    writer = ShardWriter(Path(config.out), pairs_header(config, clips, fingerprint(named_weights(teacher)), unconditional))
    if topology.rank == 0:
        print(guidance_words(config.sampler.guidance))
        save(config, Path(config.out) / "config.json")
    with tqdm(desc="pairs", unit="pair") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        denoiser = Denoiser(teacher, config.diffusion)
        generate_pairs(config, denoiser, clips, unconditional, writer, rank=topology.rank, world=topology.world, progress=progress)
    complete = writer.finish()
    print(f"{config.out}: {'complete' if complete else 'this rank is done, others are not'}")


if __name__ == "__main__":
    stage_main(PairsRun, main)
