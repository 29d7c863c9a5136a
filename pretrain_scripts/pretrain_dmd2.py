"""DMD2: score distillation and a GAN on real clips; four critic iterations for each of the student.

python pretrain_scripts/pretrain_dmd2.py PRESET [--section.option value ...] [--dry-run]
"""

from cosmos_mp.cli import stage_main
from cosmos_mp.config import DMD2Run
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import answer_in_one_step, guidance_words
from cosmos_mp.distill.dmd2 import DMD2
from cosmos_mp.parallel.context import frame_sums
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.roles import load_transfer_net, new_discriminator, unconditional_text
from cosmos_mp.training.stage import on_all_ranks, open_held_out, open_store, train


@on_all_ranks
def main(config: DMD2Run, topology: Topology) -> int:
    # --- Data: opened before any network, so that a wrong path costs seconds ---
    clips, held_out = open_store(config.clips, "clips", config), open_held_out(config, topology)

    # --- Roles: after KD the student is no longer the teacher; the fake score starts as either ---
    net, options, again, fp8 = config.net, config.dmd2, config.train.recompute, config.backend.recipe_of
    starts = {
        "teacher": (config.teacher, "teacher"),
        "student": (config.student, "student") if config.student else (config.teacher, "teacher"),
    }
    networks = {
        "student": load_transfer_net(net, topology, *starts["student"], again, fp8("student")),
        "teacher": load_transfer_net(net, topology, *starts["teacher"], again, fp8("teacher")).requires_grad_(False),
    }
    optim = {"student": config.optim_student}
    if not options.ladd:
        networks["fake_score"] = load_transfer_net(net, topology, *starts[options.fake_score_init], again, fp8("fake_score"))
        optim["fake_score"] = config.optim_fake_score
    if options.gan_weight > 0:
        networks["discriminator"] = new_discriminator(net, config.head, topology, config.train.seed)
        optim["discriminator"] = config.optim_discriminator
    unconditional = unconditional_text(options.unconditional, config.negative_prompt, config.text, topology.device)

    # --- Method and loop ---
    published = config.parallel.reference_cp_scaling
    if topology.rank == 0:
        print(guidance_words(options.guidance))
        if published:
            print(f"as published at CP {published}: generator GAN gradient / {published}, VSD normalised per 1/{published} of a clip")
    across = frame_sums(topology)
    method = DMD2(networks, config.diffusion, options, config.head, unconditional, config.train.seed, across, published)
    rows = {
        "student 1-step": Denoiser(networks["student"], config.diffusion),
        "teacher 1-step": Denoiser(networks["teacher"], config.diffusion),
    }
    answers = {name: answer_in_one_step(denoiser) for name, denoiser in rows.items()}
    return train(config, topology, method, clips, held_out, optim, answers)


if __name__ == "__main__":
    stage_main(DMD2Run, main)
