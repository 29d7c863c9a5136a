"""Knowledge distillation: one call from the stored noise must land on the teacher's stored answer.

python pretrain_scripts/pretrain_kd.py PRESET [--section.option value ...] [--dry-run]
"""

from cosmos_mp.cli import stage_main
from cosmos_mp.config import KDRun
from cosmos_mp.diffusion.edm import Denoiser
from cosmos_mp.diffusion.samplers import answer_in_one_step
from cosmos_mp.distill.kd import KD
from cosmos_mp.models.weights import fingerprint
from cosmos_mp.parallel.pieces import Pieces, Wholes
from cosmos_mp.parallel.topology import Topology
from cosmos_mp.roles import load_transfer_net
from cosmos_mp.training.stage import on_all_ranks, open_held_out, open_store, train


@on_all_ranks
def main(config: KDRun, topology: Topology) -> int:
    # --- Data: opened before any network, so that a wrong path costs seconds ---
    pairs, held_out = open_store(config.pairs, "pairs", config), open_held_out(config, topology)

    # --- Roles: the student starts as the teacher; a frozen teacher is needed for the pictures alone ---
    again, fp8 = config.train.recompute, config.backend.recipe_of
    student = load_transfer_net(config.net, topology, config.teacher, "teacher", again, fp8("student"))
    found = fingerprint(Wholes(Pieces(student, topology)))
    if pairs.reader.header.meta.get("teacher") != found and topology.rank == 0:
        print(f"note: the pairs of {config.pairs} are another teacher's than {config.teacher}, where the student starts")
    answering = {"student 1-step": Denoiser(student, config.diffusion)}
    if held_out is not None:
        teacher = load_transfer_net(config.net, topology, config.teacher, "teacher", fp8=fp8("teacher")).requires_grad_(False)
        answering["teacher 1-step"] = Denoiser(teacher, config.diffusion)

    # --- Method and loop ---
    method = KD(student, config.diffusion, config.train.seed)
    answers = {name: answer_in_one_step(denoiser) for name, denoiser in answering.items()}
    return train(config, topology, method, pairs, held_out, {"student": config.optim_student}, answers)


if __name__ == "__main__":
    stage_main(KDRun, main)
