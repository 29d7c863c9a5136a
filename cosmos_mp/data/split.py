"""A fixed split of clips into training and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from cosmos_mp.data.clips import ClipRecord


def split_clips(records: Sequence[ClipRecord], side: Literal["all", "train", "holdout"], holdout_share: float) -> list[ClipRecord]:
    """One side of the split. A clip's side depends on its id alone, so clips that are added later move none of the others.

    Raises:
        ValueError: the share is not inside 0..1, or the side is empty.
    """
    if side == "all":
        return list(records)
    if not 0 < holdout_share < 1:
        raise ValueError(f"holdout_share={holdout_share} must lie between 0 and 1")
    chosen = [record for record in records if (_fraction(record.id) < holdout_share) == (side == "holdout")]
    if not chosen:
        raise ValueError(f"split={side}: none of the {len(records)} clips falls on this side; give more clips or another holdout_share")
    return chosen


def _fraction(clip_id: str) -> float:
    return int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big") / 2**64
