"""Batches: some of their samples, and parts of their clips."""

from __future__ import annotations

import dataclasses

import pytest
import torch

LATENTS = ("latent_BCTHW", "control_BCTHW", "noise_BCTHW")


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_are_equal_cuts_along_the_frames(make_batch, parts, noise):
    batch = make_batch(range(3), noise=noise)
    cuts = [batch.cut(part, parts) for part in range(parts)]
    assert [(cut.part, cut.parts) for cut in cuts] == [(part, parts) for part in range(parts)]
    for f in dataclasses.fields(batch):
        values = [getattr(cut, f.name) for cut in cuts]
        if f.name in LATENTS and getattr(batch, f.name) is not None:
            assert {tuple(value.shape) for value in values} == {(3, 3, 4 // parts, 4, 6)}
            assert all(value.is_contiguous() for value in values)
            assert torch.equal(torch.cat(values, dim=2), getattr(batch, f.name)), f.name
        elif f.name not in ("part", "parts"):
            assert all(value is getattr(batch, f.name) for value in values), f.name


def test_a_cut_batch_keeps_its_place_under_rows_and_to(make_batch):
    cut = make_batch(range(3), noise=True).cut(1, 2)
    some = cut.rows(torch.tensor([2, 0]))
    assert (some.part, some.parts, len(some)) == (1, 2, 2)
    assert torch.equal(some.latent_BCTHW, cut.latent_BCTHW[[2, 0]]) and some.position_B.tolist() == [2, 0]
    moved = cut.to("cpu")
    assert (moved.part, moved.parts) == (1, 2) and torch.equal(moved.noise_BCTHW, cut.noise_BCTHW)
    assert make_batch().cut(0, 1).to("cpu").rows(torch.tensor([0])).noise_BCTHW is None


@pytest.mark.parametrize("parts", [3, 8])
def test_frames_that_do_not_divide_are_refused(make_batch, parts):
    with pytest.raises(ValueError, match=rf"4 latent frames \(part 0 of 1\) cannot be cut into {parts} equal parts"):
        make_batch().cut(0, parts)


def test_a_batch_is_cut_once(make_batch):
    with pytest.raises(ValueError, match=r"2 latent frames \(part 1 of 2\) cannot be cut into 2 equal parts"):
        make_batch().cut(1, 2).cut(0, 2)
