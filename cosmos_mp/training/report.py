"""What one iteration was, as all ranks agree on it: losses, gradient norms, whether the step holds, whether the run ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_mp.distill.method import StepOutput
from cosmos_mp.parallel.pieces import agree
from cosmos_mp.parallel.topology import Topology


class Sums:
    """Sums of named scalars over the micro-batches, kept on their device until read once."""

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, output: StepOutput) -> None:
        self.weights = {name: term.weight for name, term in output.terms.items()}
        for sums, values in ((self.terms, {name: term.value for name, term in output.terms.items()}), (self.metrics, output.metrics)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()


@dataclass(frozen=True)
class Report:
    """One iteration as every rank knows it: means over all ranks, gradient norms per role, and each rank's own numbers."""

    terms: dict[str, float]
    metrics: dict[str, float]
    norms: dict[str, float]
    terms_by_rank: dict[str, list[float]]
    squares_by_rank: dict[str, list[float]]
    stopping: bool

    def trouble(self, roles: Sequence[str], iteration: int) -> str | None:
        """The first loss term or gradient that is not finite, with its role and iteration, and the rank that computed the loss.

        Gradients have been summed over the ranks by then: of one that is not finite, the part is named in which it shows.
        """
        named = {(f"loss term {name!r} of {'+'.join(roles)}", "on rank"): values for name, values in self.terms_by_rank.items()}
        named |= {(f"gradient norm of {role}", "in the part of rank"): values for role, values in self.squares_by_rank.items()}
        for (what, whose), values in named.items():
            for rank, value in enumerate(values):
                if not math.isfinite(value):
                    where = f"at iteration {iteration}" + (f" {whose} {rank}" if len(values) > 1 else "")
                    return f"{what} is {value} {where}"
        return None


def report(sums: Sums, accumulation: int, squares: Mapping[str, Tensor], stop: bool, topology: Topology) -> Report:
    """What every rank says of the iteration, by one collective."""
    mine = [*(value / accumulation for value in (*sums.terms.values(), *sums.metrics.values())), *squares.values()]
    mine.append(torch.tensor(float(stop)))
    columns = iter(agree(mine, topology).T.tolist())
    by_term, by_metric, by_role = ({name: next(columns) for name in names} for names in (sums.terms, sums.metrics, squares))
    terms = {name: sum(column) / len(column) for name, column in by_term.items()}
    terms["total"] = sum(sums.weights[name] * value for name, value in terms.items())
    metrics = {name: sum(column) / len(column) for name, column in by_metric.items()}
    norms = {role: math.sqrt(sum(column)) for role, column in by_role.items()}
    return Report(terms, metrics, norms, by_term, by_role, any(next(columns)))
