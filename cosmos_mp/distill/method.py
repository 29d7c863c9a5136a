"""What the training loop asks of a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from cosmos_mp.data.batch import Batch


@dataclass(frozen=True)
class Term:
    """A scalar loss with its graph, and its weight in the sum that is differentiated."""

    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class StepOutput:
    """Named loss terms of one micro-batch, and detached scalars that are only logged."""

    terms: dict[str, Term]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """A way of training: which networks it holds, which of them an iteration trains, and how a micro-batch becomes losses."""

    networks: dict[str, nn.Module]
    """Every network by role, the frozen ones too."""

    def trained(self, iteration: int) -> tuple[str, ...]:
        """Roles whose weights this iteration changes. The loop lets exactly these require gradients before `step`."""
        ...

    def step(self, batch: Batch, iteration: int) -> StepOutput:
        """Loss terms of one micro-batch; the phase follows from the iteration alone."""
        ...
