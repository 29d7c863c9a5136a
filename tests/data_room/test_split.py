"""The fixed split: by the clip's name alone, disjoint, complete, near the asked share."""

from __future__ import annotations

import hashlib
import random

import pytest

from cosmos_mp.data.clips import ClipRecord
from cosmos_mp.data.split import split_clips


def records(names) -> list[ClipRecord]:
    return [ClipRecord(str(n), f"videos/{n}.mp4", 9, 8.0, 64, 64, "h264", "yuv420p", "bt601", "a clip", "0" * 64) for n in names]


def test_the_sides_are_disjoint_complete_and_in_order():
    clips = records(range(400))
    train, holdout = split_clips(clips, "train", 0.1), split_clips(clips, "holdout", 0.1)
    assert not {r.id for r in train} & {r.id for r in holdout}
    assert sorted(train + holdout, key=lambda r: int(r.id)) == clips
    assert train == [r for r in clips if r in train]
    assert 20 <= len(holdout) <= 60


def test_a_side_follows_from_the_hash_of_the_name():
    def fraction(record: ClipRecord) -> float:
        return int(hashlib.sha256(record.id.encode()).hexdigest()[:16], 16) / 2**64

    clips = records(range(100))
    assert split_clips(clips, "holdout", 0.3) == [r for r in clips if fraction(r) < 0.3]


def test_clips_added_later_move_none_of_the_others():
    few, many = records(range(60)), records(range(300))
    random.Random(0).shuffle(many)
    before = {r.id for r in split_clips(few, "holdout", 0.2)}
    after = {r.id for r in split_clips(many, "holdout", 0.2)}
    assert before == after & {r.id for r in few}


def test_a_larger_share_keeps_what_was_held_out():
    clips = records(range(200))
    small, large = ({r.id for r in split_clips(clips, "holdout", share)} for share in (0.1, 0.3))
    assert small < large


def test_all_takes_everything_whatever_the_share():
    clips = records(range(5))
    taken = split_clips(clips, "all", 7.0)
    assert taken == clips and taken is not clips


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=f"holdout_share={share} must lie between 0 and 1"):
        split_clips(records(range(9)), "train", share)


def test_an_empty_side_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="split=holdout: none of the 2 clips.*another holdout_share"):
        split_clips(records(range(2)), "holdout", 1e-9)
