"""Train a teacher: EDM denoising of encoded clips with text dropout, control on.

python pretrain_scripts/pretrain_teacher.py PRESET [--section.option value ...] [--dry-run]
"""

from cosmos_mp.cli import stage_main
from cosmos_mp.config import TeacherRun
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import answer_in_one_step
from cosmos_mp.distill.teacher import TeacherPretraining
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.roles import load_transfer_net, new_transfer_net
from cosmos_mp.training.stage import on_all_ranks, open_held_out, open_store, train


@on_all_ranks
def main(config: TeacherRun, topology: Topology) -> int:
    # --- Data: opened before any network, so that a wrong path costs seconds ---
    clips, held_out = open_store(config.clips, "clips", config), open_held_out(config, topology)

    # --- Role ---
    again, fp8 = config.train.recompute, config.backend.recipe_of("teacher")
    if config.init:
        teacher = load_transfer_net(config.net, topology, config.init, "teacher", again, fp8)
    else:
        teacher = new_transfer_net(config.net, topology, config.train.seed, again, fp8)

    # --- Method and loop ---
    method = TeacherPretraining(teacher, config.diffusion, config.loss, config.train.seed)
    denoiser = Denoiser(teacher, config.diffusion)
    answers = {"teacher 1-step": answer_in_one_step(denoiser)}
    return train(config, topology, method, clips, held_out, {"teacher": config.optim_teacher}, answers, ema_role="teacher")


if __name__ == "__main__":
    stage_main(TeacherRun, main)
