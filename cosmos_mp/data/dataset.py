"""Training batches from a store, as a pure function of the place in the training order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_mp.data.batch import Batch
from cosmos_mp.data.order import index_at
from cosmos_mp.data.shards import Header, ShardReader, StoreError

IN_MEMORY_BYTES = 2 * 2**30
"""Stores up to this size are held in memory, and compared with their checksums when opened; of larger ones only the sizes are."""
SPATIAL_COMPRESSION = 8
"""Pixels per latent cell; every tokenizer here has this factor."""

SETTINGS: dict[str, Callable[[Header], Any]] = {
    "kind": lambda header: header.kind,
    "diffusion.latent_shape": lambda header: header.fields["latent"].shape,
    "net.text_dim": lambda header: header.fields["text"].shape[1],
    "text.dim": lambda header: header.fields["text"].shape[1],
    "text.tokens": lambda header: header.fields["text"].shape[0],
}
"""What a run can ask of a store, by the run's option: kind is "clips" or "pairs"."""


class LatentDataset:
    """Encoded clips or teacher pairs, batch by batch.

    Args:
        store: folder of a complete store; pairs have `noise` besides.
        seed: key of the training order.
        expect: values that the store must have, by option name (see SETTINGS): {"diffusion.latent_shape": (16, 3, 8, 8), ...}.

    Raises:
        FileNotFoundError: no store at this path.
        StoreError: the store is incomplete or damaged, or differs from `expect`; the message names option and store.
    """

    def __init__(self, store: Path, seed: int, *, expect: Mapping[str, Any]) -> None:
        self.reader = ShardReader(store, verify=False)
        self.seed = seed
        self._check(expect)
        self._held: dict[str, Tensor] = {}
        if self.reader.bytes <= IN_MEMORY_BYTES:
            self.reader.verify()
            self._held = self._read(range(len(self)))

    def __len__(self) -> int:
        return len(self.reader)

    def info(self, index: int) -> dict[str, Any]:
        """What is known about a sample beside its tensors: caption, clip, window start."""
        return self.reader.info(index)

    def batch(self, position: int, size: int) -> Batch:
        """The samples at places position .. position + size - 1 of the training order."""
        positions = range(position, position + size)
        return self._collate(positions, [index_at(p, len(self), self.seed) for p in positions])

    def fixed(self, indices: Sequence[int]) -> Batch:
        """Samples by index, for evaluation and pictures; their positions are the indices."""
        return self._collate(indices, indices)

    def _collate(self, positions: Sequence[int], indices: Sequence[int]) -> Batch:
        for index in indices:
            self.reader.info(index)  # an index that is not there is named
        fields = {name: value[list(indices)] for name, value in self._held.items()} if self._held else self._read(indices)
        latent = fields["latent"].float()
        height, width = (side * SPATIAL_COMPRESSION for side in latent.shape[-2:])
        padding_mask = fields.get("padding_mask")
        return Batch(
            position_B=torch.tensor(list(positions), dtype=torch.int64),
            latent_BCTHW=latent,
            control_BCTHW=fields["control"].float(),
            text_BLD=fields["text"].float(),
            fps_B=fields["fps"],
            padding_mask_BHW=torch.zeros(len(latent), height, width) if padding_mask is None else padding_mask.float(),
            noise_BCTHW=fields["noise"].float() if "noise" in fields else None,
        )

    def _read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        samples = [self.reader.read(index) for index in indices]
        return {name: torch.stack([sample[name] for sample in samples]) for name in self.reader.header.fields}

    def _check(self, expect: Mapping[str, Any]) -> None:
        header, store = self.reader.header, self.reader.store
        needed = {"latent", "control", "text", "fps"} | ({"noise"} if header.kind == "pairs" else set())
        if missing := needed - header.fields.keys():
            raise StoreError(f"{store} has no field {', '.join(sorted(missing))}; make it anew with `{header.command}`")
        for option, value in expect.items():
            if option not in SETTINGS:
                raise ValueError(f"{option!r} is nothing that a store knows; expected one of {', '.join(SETTINGS)}")
            value = tuple(value) if isinstance(value, list) else value
            if (found := SETTINGS[option](header)) != value:
                raise StoreError(
                    f"{store}: the store has {option}={found}, this run expects {value}; "
                    f"give the option the store's value, or name a store made for this run with `{header.command}`"
                )
