"""(a) FLOPs of one DMD2 cycle: counted on the operations that are run, and from the formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosmos_mp.bench.runs import OURS, Clips, Procedure, make_method, make_networks
from cosmos_mp.config import DMD2Run
from cosmos_mp.parallel.topology import Topology, single_process
from cosmos_mp.plan.cost import critic_step, student_step

STEPS = {"student": student_step, "critic": critic_step}


def measure(run: DMD2Run, cp: int, procedures: tuple[Procedure, ...] = ("reference", *OURS)) -> list[dict[str, Any]]:
    """A row per procedure: FLOPs per sample of each phase and of a cycle, with the formula's. For one process.

    The operations are run on the meta device, which knows shapes alone, so that networks of any size can be counted. The process holds
    whole clips and so stands for all `cp` ranks together: in the reference's procedure it runs the head once for each of them.
    """
    topology = dataclasses.replace(single_process(), device=torch.device("meta"))
    return [_row(run, topology, procedure, cp if procedure == "reference" else 1) for procedure in procedures]


def _row(run: DMD2Run, topology: Topology, procedure: Procedure, head_copies: int) -> dict[str, Any]:
    counted = count(run, topology, procedure, head_copies)
    recompute = procedure in ("reference", "full")
    formula = {name: step(run).flops(recompute=recompute, head_copies=head_copies) for name, step in STEPS.items()}
    row: dict[str, Any] = {"procedure": procedure, "head_copies": head_copies}
    for name, values in (("counted", counted), ("formula", formula)):
        row[name] = values | {"cycle": values["student"] + (run.dmd2.student_update_freq - 1) * values["critic"]}
    return row


def count(run: DMD2Run, topology: Topology, procedure: Procedure, head_copies: int = 1) -> dict[str, int]:
    """FLOPs of a student's and of a critics' iteration on one sample, or on this rank's part of it.

    Attention runs as its mathematics, matrix products that the counter knows; it sees nothing in the fused CPU kernel.
    """
    networks = make_networks(run, topology, procedure)
    method = make_method(run, topology, procedure, networks, head_copies)
    batch, cp = Clips(run).batch(0, 1), topology.cp_group
    batch = batch if cp.size() == 1 else batch.cut(cp.rank(), cp.size())
    batch = dataclasses.replace(batch.to(topology.device), position_B=batch.position_B)  # it is read: everything is drawn by it
    counted = {}
    for iteration, phase in ((0, "student"), (1, "critic")):
        for role, network in networks.items():
            network.requires_grad_(role in method.trained(iteration))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = method.step(batch, iteration)
            sum(term.weight * term.value for term in output.terms.values()).backward()
        counted[phase] = counter.get_total_flops()
        for network in networks.values():
            network.zero_grad()
    return counted
