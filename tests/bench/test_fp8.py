"""What the FP8 benchmark counts, and a whole one that is hardly trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from cosmos_mp import commands
from cosmos_mp.backends.fp8 import RECIPES, emulate
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.bench import fp8
from cosmos_mp.models.weights import build
from cosmos_mp.parallel.topology import single_process


@pytest.fixture(scope="module")
def found() -> dict:
    return fp8.bench_fp8(fast=True)


def test_decibels():
    exact = torch.tensor([3.0, 4.0])
    assert fp8.decibels(exact, exact + torch.tensor([0.3, 0.4])) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_noise_of_the_products_is_what_an_emulated_layer_makes(recipe):
    draw = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, generator=draw) for shape in ((200, 150), (140, 150), (200, 140)))
    # A token whose sizes meet: in blocks along the tokens it takes the others' gradients with it, and the product shows that.
    x[7], g[7] = 1e-6 * x[7], 1e6 * g[7]
    layer = build(lambda: LocalBackend(single_process().tp_group).column_linear(150, 140), "cpu", torch.float32)
    with torch.no_grad():
        layer.weight.copy_(w)
    emulate(layer, recipe)
    given = x.clone().requires_grad_()
    out = layer(given)
    out.backward(g)
    noise = fp8._noise((x, w, g), recipe)
    assert noise["output"] == pytest.approx(fp8.decibels(x @ w.t(), out.detach()), abs=0.01)
    assert noise["gradient of the activation"] == pytest.approx(fp8.decibels(g @ w, given.grad), abs=0.01)
    assert noise["gradient of the weight"] == pytest.approx(fp8.decibels(g.t() @ x, layer.weight.grad), abs=0.01)


def test_drift_compares_ends_with_bfloat16s_of_the_same_seed():
    kd = {"bfloat16": [[9.0] * 5 + [2.0] * fp8.LAST, [4.0] * 30], "FP8 block": [[1.0] * 5 + [3.0] * fp8.LAST, [2.0] * 30]}
    assert fp8.drift(kd, "FP8 block") == [0.5, -0.5] and fp8.drift(kd, "bfloat16") == [0, 0]


def test_every_layer_is_measured_and_fp8_is_noisier_than_bfloat16(found):
    net = fp8.NET
    assert len(found["layers"]) == 8 * (net.blocks + net.control_blocks)
    assert "control.blocks.1.cross_attn.q" in found["layers"] and "base.blocks.0.cross_attn.k" not in found["layers"]
    for row in found["layers"].values():
        assert list(row) == ["bfloat16", "FP8 current", "FP8 block"]
        for quantity in ("activation", "weight"):  # four bits of mantissa fewer are 24 dB
            assert 20 < row["bfloat16"][quantity] - row["FP8 current"][quantity] < 28
        assert row["FP8 block"]["gradient"] > row["FP8 current"]["gradient"] + 3  # a bit of mantissa more


def test_the_teachers_error(found):
    exact, rows = found["teacher"]["bfloat16"], found["teacher"]
    assert set(rows) == {"bfloat16", "FP8 current", "FP8 block"} and set(exact) == {"0.1", "1.0", "10.0"}
    assert all(0 < value < 1 for row in rows.values() for value in row.values())
    # Of a teacher that is hardly trained, what is not rounded counts most: which errs more is chance.
    assert rows["FP8 current"] != rows["FP8 block"] and exact not in (rows["FP8 current"], rows["FP8 block"])


def test_the_teachers_error_is_that_at_latents_with_noise_of_the_level(monkeypatch):
    latents = torch.full((fp8.BATCH, *fp8.DIFFUSION.latent_shape), 2.0)
    world = SimpleNamespace(teacher={}, holdout=SimpleNamespace(fixed=lambda indices: SimpleNamespace(latent_BCTHW=latents)))
    wrong = {("float32", None): 0, ("bfloat16", None): 1, ("bfloat16", "current"): 2, ("bfloat16", "block"): 3}
    monkeypatch.setattr(fp8, "_topology", lambda compute: compute)
    monkeypatch.setattr(fp8, "_network", lambda weights, *precision: wrong[precision])
    monkeypatch.setattr(fp8, "condition_of_clips", lambda batch: None)

    def teacher(network, diffusion):
        """Its eps is what it is given, and wrong by so many noise levels."""
        return lambda x, sigma, condition: SimpleNamespace(eps=x + network * sigma.view(-1, 1, 1, 1, 1))

    monkeypatch.setattr(fp8, "Denoiser", teacher)
    for errors, row in zip((1, 2, 3), fp8.teacher_error(world).values(), strict=True):
        expected = [errors * sigma / (4 + sigma**2) ** 0.5 for sigma in fp8.SIGMAS]
        assert list(row.values()) == pytest.approx(expected, rel=0.05)


def test_students_start_alike_and_part(found):
    assert set(found["kd"]) == set(fp8.PRECISIONS)
    (exact,) = found["kd"]["float32"]
    assert len(exact) == fp8.FAST.kd
    for name in ("bfloat16", "FP8 current", "FP8 block"):
        (losses,) = found["kd"][name]
        assert losses[0] == pytest.approx(exact[0], rel=0.02) and losses != exact


def test_the_change_of_the_weights(found):
    dmd2 = found["dmd2"]
    assert 0 < dmd2["change"] <= 1.1 * dmd2["updates"] * dmd2["lr"] and dmd2["lr"] == 5e-7
    share = {name: value / dmd2["weights"] for name, value in dmd2["rounding"].items()}
    assert share["bfloat16"] == pytest.approx(0.0017, rel=0.1) and share["FP8 current"] == pytest.approx(0.027, rel=0.1)


def test_every_number_is_in_a_table(found):
    tables = fp8.tables(found)
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    worst = min(row["FP8 block"]["output"] for name, row in found["layers"].items() if name.endswith("mlp.up"))
    line = next(line for line in tables[0].splitlines() if line.startswith("| mlp.up |"))
    assert line.split("|")[5].split(" / ")[2].strip() == f"{worst:.1f}"
    ratio = max(found["teacher"]["FP8 block"][sigma] / value for sigma, value in found["teacher"]["bfloat16"].items())
    assert f"| {ratio:.1f} | < 16: {'holds' if ratio < 16 else 'fails'} |" in tables[1].splitlines()[-1]
    assert tables[2].splitlines()[3].endswith("| +0.00 % |")
    assert f"| {found['dmd2']['rounding']['FP8 block'] / (4800 * 5e-7):.3g} |" in tables[3].splitlines()[-1]


def test_the_command_writes_its_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(fp8, "bench_fp8", lambda fast: {"fast": fast})
    commands.bench(["fp8", "--json", str(tmp_path / "numbers.json"), "--fast"])
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"fast": True}
