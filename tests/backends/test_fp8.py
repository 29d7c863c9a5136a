"""FP8 as arithmetic: its rounding against a slow loop over the types' values, the three products, and where it acts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_mp import config, roles
from cosmos_mp.backends import fp8
from cosmos_mp.backends.fp8 import E4M3, E5M2, emulate, quantise
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import BackendConfig, ConfigError
from cosmos_mp.data.shards import Header
from cosmos_mp.distill.pairs import pairs_header
from cosmos_mp.evaluate import run as evaluation
from cosmos_mp.models.block import Block
from cosmos_mp.models.weights import build
from cosmos_mp.parallel.recompute import recompute
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.sample import sample

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
OPERANDS = {"current": (E5M2, None, None, None), "block": (E4M3, (1, 128), (128, 1), (128, 128))}
"""By recipe: the type of gradients; tiles along rows, along columns, and of a weight."""


def values(kind: torch.dtype) -> np.ndarray:
    """All finite values from 0 upwards, in the order of their codes, from the definition of the format."""
    bits, bias = {E4M3: (3, 7), E5M2: (2, 15)}[kind]
    count = {E4M3: 0x7F, E5M2: 0x7C}[kind]  # then come NaN, or infinity and NaN
    found = []
    for code in range(count):
        exponent, mantissa = code >> bits, code & ((1 << bits) - 1)
        found.append(
            mantissa / (1 << bits) * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / (1 << bits)) * 2.0 ** (exponent - bias)
        )
    return np.array(found)


def nearest(x: np.float32, table: np.ndarray) -> np.float32:
    """The nearest value; of two as near, the one with the even code."""
    distance = np.abs(table - abs(float(x)))
    codes = np.flatnonzero(distance == distance.min())
    return np.float32(np.copysign(table[codes[codes % 2 == 0][0] if len(codes) > 1 else codes[0]], x))


def slow(x: Tensor, kind: torch.dtype, tile: tuple[int, int] | None) -> Tensor:
    """`quantise`, value by value."""
    source, table = x.detach().float().numpy(), values(kind)
    out, (rows, columns) = np.empty_like(source), source.shape
    a, b = tile or source.shape
    for top in range(0, rows, a):
        for left in range(0, columns, b):
            block = source[top : top + a, left : left + b]
            amax = np.abs(block).max()
            scale = np.float32(1)
            if amax > 0:
                with np.errstate(over="ignore"):
                    scale = min(np.float32(LARGEST[kind]) / amax, np.finfo(np.float32).max)
            if tile:
                scale = np.float32(2.0 ** (np.frexp(scale)[1] - 1))
            for i, j in np.ndindex(block.shape):
                out[top + i, left + j] = nearest(block[i, j] * scale, table) * (np.float32(1) / scale)
    return torch.from_numpy(out)


# --- Rounding ---


def test_the_types_are_what_they_are_called():
    for kind, largest in LARGEST.items():
        table = torch.from_numpy(values(kind)).float()
        assert table[-1] == largest and (table.diff() > 0).all()
        assert torch.equal(table.to(kind).float(), table)


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("tile", [None, (1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 128), (131, 7), (5, 260)])
def test_rounding_follows_the_slow_loop(kind, tile, shape):
    draw = torch.Generator().manual_seed(0)
    # Sizes over eight decades, so that blocks differ and the smallest values fall below the type's range.
    x = torch.randn(shape, generator=draw) * 10 ** (8 * torch.rand(shape, generator=draw) - 4)
    found = quantise(x, kind, tile)
    assert found.dtype == torch.float32 and found.shape == x.shape
    assert torch.equal(found, slow(x, kind, tile))


def test_a_tie_goes_to_the_even_code():
    # With 448 in it, the scale is 1; E4M3 has steps of 2 above 16 and of 4 above 32.
    found = quantise(torch.tensor([[448.0, 17.0, 19.0, 34.0, -38.0]]), E4M3, None)
    assert found.tolist() == [[448.0, 16.0, 20.0, 32.0, -40.0]]


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("tile", [None, (1, 128), (128, 128)])
def test_zeros_the_smallest_and_the_largest_numbers_stay_finite(kind, tile):
    assert torch.equal(quantise(torch.zeros(3, 130), kind, tile), torch.zeros(3, 130))
    for amax in (2.0**-149, 1e-40, 1e-30, 1e30, 3e38):
        found = quantise(torch.full((2, 3), amax), kind, tile)
        assert found.isfinite().all() and (found >= 0).all()
        if amax > 1e-42:  # below, the largest scale that float32 has leaves them under the type's smallest value
            torch.testing.assert_close(found, torch.full((2, 3), amax), rtol=0.13, atol=0)


@pytest.mark.parametrize("tile", [None, (1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_a_matrix_without_values_stays(tile, shape):
    found = quantise(torch.empty(shape, dtype=torch.bfloat16), E4M3, tile)
    assert found.shape == shape and found.dtype == torch.float32


def test_the_scale_is_the_types_largest_value_over_the_tensors():
    amax = torch.tensor([448.0, 1.0, 3.0, 1e-40, 0.0, torch.inf, torch.nan])
    largest = torch.finfo(torch.float32).max
    expected = torch.tensor(np.array([1, 448, np.float32(448) / np.float32(3), largest, 1, 1, 1], np.float32))
    assert torch.equal(fp8._scale(amax, E4M3), expected)


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_infinity_becomes_the_largest_value_and_nan_stays(kind):
    found = quantise(torch.tensor([[torch.inf, -torch.inf, 1.0]]), kind, None)
    assert found.tolist() == [[LARGEST[kind], -LARGEST[kind], 1.0]]  # as the hardware's conversion, which saturates
    found = quantise(torch.tensor([[torch.nan, 1.0]]), kind, None)
    assert found[0, 0].isnan() and found[0, 1] == 1.0
    found = quantise(torch.tensor([[torch.nan] * 128 + [3.3]]), kind, (1, 128))
    assert found[:, :128].isnan().all() and found[0, 128] == (3.25 if kind == E4M3 else 3.5)


def test_blocks_keep_what_one_scale_for_all_loses():
    x = torch.ones(2, 256)
    x[:, 128:] = 1e6
    assert (quantise(x, E4M3, None)[:, :128] == 0).all()
    assert torch.equal(quantise(x, E4M3, (1, 128))[:, :128], torch.ones(2, 128))


def test_scales_of_blocks_are_powers_of_two_and_the_others_are_not():
    # 448 / 1.9 = 235.8 is 128 when rounded down: 1.9 * 128 = 243.2 -> 240 -> 1.875. Scaled to 448 exactly, it stays what it is.
    x = torch.tensor([[1.9]])
    assert quantise(x, E4M3, (1, 128)) == 1.875
    torch.testing.assert_close(quantise(x, E4M3, None), x, rtol=1e-6, atol=0)


# --- The three products ---


def exact(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of 1 to 1.75 and either sign, largest 1.75: every scale is a power of two, and every product of rounded ones is exact."""
    draw = torch.Generator().manual_seed(seed)
    x = (1 + 0.75 * torch.rand(shape, generator=draw)) * (2 * torch.randint(0, 2, shape, generator=draw) - 1)
    x.view(-1)[0] = 1.75
    return x


@pytest.mark.parametrize("recipe", OPERANDS)
def test_a_layer_without_tokens_gives_none_and_no_gradient(recipe):
    layer = build(lambda: LocalBackend(single_process().tp_group).column_linear(6, 4), "cpu", torch.float32)
    torch.nn.init.ones_(layer.weight)
    emulate(layer, recipe)
    x = torch.empty(0, 2, 6, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == (0, 2, 4) and x.grad.shape == x.shape and torch.equal(layer.weight.grad, torch.zeros(4, 6))


@pytest.mark.parametrize("kind", ["column_linear", "row_linear"])
@pytest.mark.parametrize("recipe", OPERANDS)
def test_output_and_gradients_are_the_products_of_rounded_operands(kind, recipe):
    gradient, rows, columns, tile = OPERANDS[recipe]
    tokens, batch, inputs, outputs = 67, 2, 130, 150  # a block and a rest in every direction
    layer = build(lambda: getattr(LocalBackend(single_process().tp_group), kind)(inputs, outputs), "cpu", torch.float32)
    x, w, g = exact((tokens, batch, inputs), 0), exact((outputs, inputs), 1), exact((tokens, batch, outputs), 2)
    if recipe == "block":  # one scale would lose nothing of these, but blocks of another shape would have other scales
        x[:, :, :128], w[128:], g[64:] = 4 * x[:, :, :128], 16 * w[128:], 2 * g[64:]
    with torch.no_grad():
        layer.weight.copy_(w)
    emulate(layer, recipe)
    given = x.clone().requires_grad_()
    out = layer(given)
    out.backward(g)
    flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)
    rounded = {"x": slow(flat_x, E4M3, rows), "w": slow(w, E4M3, tile), "g": slow(flat_g, gradient, rows)}
    of_weight = slow(flat_g, gradient, columns).double().t() @ slow(flat_x, E4M3, columns).double()
    of_x = (rounded["g"].double() @ rounded["w"].double()).view(x.shape)
    assert all(not torch.equal(rounded[name], value) for name, value in (("x", flat_x), ("w", w), ("g", flat_g)))
    assert torch.equal(out.double(), (rounded["x"].double() @ rounded["w"].double().t()).view(tokens, batch, outputs))
    assert torch.equal(given.grad.double(), of_x)
    assert torch.equal(layer.weight.grad.double(), of_weight)


@pytest.mark.parametrize("recipe", OPERANDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ordinary_values_of_many_sizes_in_every_type(recipe, dtype):
    gradient, rows, columns, tile = OPERANDS[recipe]
    draw = torch.Generator().manual_seed(0)
    layer = build(lambda: LocalBackend(single_process().tp_group).column_linear(140, 9), "cpu", dtype)
    x, w, g = (torch.randn(shape, generator=draw) for shape in ((33, 4, 140), (9, 140), (33, 4, 9)))
    # Beside a large value the small ones of its block are lost, and count all the same: what they meet is large.
    x[7], g[7] = 1e-6 * x[7], 1e6 * g[7]
    x[..., 5], w[:, 5] = 1e6 * x[..., 5], 1e-6 * w[:, 5]
    w[3], g[..., 3] = 1e-6 * w[3], 1e6 * g[..., 3]
    x, w, g = (value.to(dtype) for value in (x, w, g))
    with torch.no_grad():
        layer.weight.copy_(w)
    emulate(layer, recipe)
    given = x.clone().requires_grad_()
    out = layer(given)
    out.backward(g)
    flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)
    products = [
        (out, slow(flat_x, E4M3, rows), slow(w, E4M3, tile).t()),
        (given.grad, slow(flat_g, gradient, rows), slow(w, E4M3, tile)),
        (layer.weight.grad, slow(flat_g, gradient, columns).t(), slow(flat_x, E4M3, columns)),
    ]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for found, a, b in products:
        assert found.dtype == dtype
        error = found.detach().double().flatten(0, -2) - a.double() @ b.double()
        assert (error.abs() <= tolerance * (a.abs().double() @ b.abs().double())).all()


def test_a_frozen_weight_gets_no_gradient_and_a_second_derivative_is_refused(make_network):
    network = make_network()
    emulate(network, "current")
    up = network.base.blocks[0].mlp.up
    up.weight.requires_grad_(False)
    x = torch.randn(3, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(up(x).pow(2).sum(), x, create_graph=True)
    assert up.weight.grad is None and gradient.abs().max() > 0
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


# --- Where it acts ---

LINEARS = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "cross_attn.q", "cross_attn.out", "mlp.up", "mlp.down"}


def test_the_linears_of_all_blocks_but_the_keys_and_values_of_the_text(make_network, make_input):
    network = make_network()
    blocks = [*(f"base.blocks.{i}" for i in range(3)), *(f"control.blocks.{i}" for i in range(2))]
    expected = {f"{block}.{name}" for block in blocks for name in LINEARS}
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    emulate(network, "block")
    assert {name for name, module in network.named_modules() if vars(module) != before[name]} == expected
    # What really is rounded: every product of matrices that is not of these layers has operands as they come.
    seen = {}
    for name, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 2 and ".position" not in name:
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], m.weight, m, out)}))
    with torch.no_grad():
        network(make_input())
    plain = {name for name, (x, w, m, out) in seen.items() if torch.equal(out, nn.functional.linear(x, w, getattr(m, "bias", None)))}
    assert set(seen) - plain == expected and {"base.patch_embed", "base.blocks.0.cross_attn.k", "control.zero.1"} < plain


@pytest.mark.parametrize("recipe", OPERANDS)
def test_it_rounds_and_stays_near(make_network, make_input, recipe):
    plain, rounded = make_network(), make_network()
    emulate(rounded, recipe)
    expected, found = (network(make_input()).out for network in (plain, rounded))
    assert 1e-3 < (found - expected).norm() / expected.norm() < 0.1


def test_names_and_values_of_the_weights_stay(make_network):
    network = make_network()
    before = {name: value.clone() for name, value in network.state_dict().items() if value is not None}
    emulate(network, "current")
    after = {name: value for name, value in network.state_dict().items() if value is not None}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Products(TorchDispatchMode):
    """Counts products of matrices that really run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", OPERANDS)
def test_recomputed_blocks_give_the_same_bits(make_network, make_input, recipe):
    found: dict[str, tuple] = {}
    for mode in ("none", "selective", "full"):
        network = make_network()
        emulate(network, recipe)
        recompute(network, Block, mode)
        out = network(make_input()).out
        with Products() as products:
            out.pow(2).mean().backward()
        with torch.no_grad():
            assert torch.equal(network(make_input()).out, out)
        found[mode] = (out.detach(), {name: p.grad for name, p in network.named_parameters()}, products.count)
    for mode in ("selective", "full"):
        assert torch.equal(found[mode][0], found["none"][0])
        for name, gradient in found["none"][1].items():
            assert gradient is None or torch.equal(gradient, found[mode][1][name]), name
    assert found["selective"][2] == found["none"][2] < found["full"][2]


# --- Configuration ---

STAGES = {
    "teacher": {"teacher": "current"},
    "pairs": {"teacher": "current"},
    "kd": {"teacher": "current", "student": "current"},
    "dmd2": {"teacher": "current", "student": None, "fake_score": None},
    "evaluate": {"teacher": None, "student": "current"},
    "sample": {"student": "current"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_off_by_default_and_on_for_the_roles_that_bear_it(stage):
    backend = config.STAGES[stage]().backend
    assert {backend.recipe_of(role) for role in get_args(config.Role)} == {None}
    on = BackendConfig(fp8="emulate", fp8_roles=backend.fp8_roles)
    assert {role: on.recipe_of(role) for role in STAGES[stage]} == STAGES[stage]
    assert BackendConfig(fp8="emulate", recipe="block", fp8_roles=("fake_score",)).recipe_of("fake_score") == "block"


@pytest.mark.parametrize(
    ("stage", "backend", "message"),
    [
        ("teacher", BackendConfig(fp8_roles=("student",)), "backend.fp8_roles: this stage has no student, only teacher"),
        ("kd", BackendConfig(fp8_roles=("fake_score",)), "no fake_score, only teacher, student"),
        ("sample", BackendConfig(), "no teacher, only student"),
        (
            "dmd2",
            BackendConfig(fp8="emulate", fp8_roles=()),
            "backend.fp8=emulate with no role in backend.fp8_roles: name one of teacher, stu",
        ),
    ],
)
def test_roles_that_a_stage_has_not_are_refused(stage, backend, message):
    with pytest.raises(ConfigError, match=message):
        config.STAGES[stage](backend=backend)


def test_pairs_of_another_precision_are_other_pairs():
    header = Header("clips", 1, 1, {}, {})
    clips = SimpleNamespace(reader=SimpleNamespace(header=header, sha256="ab"))
    metas = []
    for backend in (
        BackendConfig(),
        BackendConfig(fp8="emulate"),
        BackendConfig(fp8="emulate", recipe="block"),
        BackendConfig(recipe="block"),
    ):
        metas.append(pairs_header(config.PairsRun(backend=backend), clips, "cd", torch.zeros(2, 3)).meta)
    assert [meta["fp8"] for meta in metas] == [None, "current", "block", None] and metas[0] == metas[3]


def test_answers_of_another_recipe_are_other_answers():
    keys = []
    for backend in ({}, {"fp8": "emulate"}, {"fp8": "emulate", "recipe": "block"}, {"fp8": "emulate", "fp8_roles": ("teacher", "student")}):
        run = config.EvaluateRun(backend=BackendConfig(**{"fp8_roles": ("student",)} | backend))
        keys.append(str(evaluation._key(run, SimpleNamespace(sha256="ab"), "cd")))
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        ("teacher", [], ["current"]),
        ("pairs", [], ["current"]),
        ("kd", ["--train.picture_every", 1, "--backend.recipe", "block"], ["block", "block"]),
        ("kd", ["--train.picture_every", 1, "--backend.fp8_roles", "student"], ["current", None]),
        ("dmd2", [], [None, "current", None]),
        ("dmd2", ["--backend.fp8_roles", "student", "fake_score"], ["current", None, "current"]),
    ],
)
def test_a_stage_runs_with_its_roles_in_fp8(monkeypatch, tiny_chain, tmp_path, stage, options, expected):
    seen = recipes(monkeypatch)
    short = [] if stage == "pairs" else ["--train.iterations", 2]
    tiny_chain.run(stage, str(tmp_path / "run"), "--backend.fp8", "emulate", *short, *options)
    assert seen == expected


def test_evaluation_and_sampling_answer_in_fp8(monkeypatch, tiny_chain, tmp_path):
    seen = recipes(monkeypatch)
    evaluation._networks(tiny_chain.config("evaluate", "unused", "--backend.fp8", "emulate"), single_process())
    assert seen == [None, "current", "current"]  # the teacher is the yardstick
    seen.clear()
    video = next((tiny_chain.root / "videos" / "videos").glob("*.mp4"))
    out = tmp_path / "sample.mp4"
    words = ["--prompt", "a circle", "--video", video, "--backend.fp8", "emulate", "--backend.recipe", "block"]
    assert sample(tiny_chain.config("sample", str(out), *words)) == out and seen == ["block"]


def recipes(monkeypatch) -> list[str | None]:
    """Recipes of the networks that are made from now on, in their order."""
    seen, made = [], roles.transfer_net

    def transfer_net(*args, fp8=None, **options):
        seen.append(fp8)
        network = made(*args, fp8=fp8, **options)
        assert ("_forward_impl" in vars(network.base.blocks[0].mlp.up)) == (fp8 is not None)
        return network

    monkeypatch.setattr(roles, "transfer_net", transfer_net)
    return seen
