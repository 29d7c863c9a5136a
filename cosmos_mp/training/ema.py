"""Exponential moving average of one role's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Averages of named parameters, in float32 or wider; they start as the parameters are.

    The decay of update n (0-based) is min(decay, (1 + n) / (10 + n)), so that the start is forgotten quickly.

    Args:
        written: called when the parameters' values have been replaced.

    Raises:
        ValueError: `decay` outside (0, 1).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float, written: Callable[[], None] = lambda: None):
        if not 0 < decay < 1:
            raise ValueError(f"ema.decay={decay} must lie between 0 and 1, as 0.9999; 0 keeps no average")
        self.parameters, self.decay, self.updates, self._written = parameters, decay, 0, written
        self.averages: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * parameter."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            average = self.averages[name]
            average.lerp_(parameter.to(average.dtype), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters carry the averages inside the block, and their own values again after it."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self._written()
