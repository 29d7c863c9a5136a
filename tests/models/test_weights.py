"""Construction, strict loading, first values and fingerprints."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import HeadConfig
from cosmos_mp.models.discriminator import Discriminator
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import WeightError, build, fingerprint, initialize, load_weights, named_weights
from cosmos_mp.parallel.topology import single_process


@pytest.fixture
def make_new(tiny_net):
    """A network with first values."""

    def make(seed: int = 0, **changes) -> TransferNet:
        network = build(lambda: TransferNet(tiny_net(**changes), LocalBackend(single_process().tp_group)), "cpu")
        initialize(network, seed)
        return network

    return make


def copies(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in named_weights(network).items()}


def test_build_leaves_nothing_on_meta_and_takes_the_dtype(make_network):
    network = make_network(dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("cpu", torch.float64)}


def test_named_weights_are_the_parameters_without_extra_state(make_network):
    network = make_network()
    assert named_weights(network).keys() == dict(network.named_parameters()).keys()


def test_loading_copies_every_tensor(make_network, make_input):
    source, target = make_network(seed=1), make_network(seed=2)
    load_weights(target, copies(source), "source")
    assert torch.equal(target(make_input()).out, source(make_input()).out)
    assert all(torch.equal(a, b) for a, b in zip(copies(source).values(), copies(target).values(), strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("base.time.norm.weight"), "1 missing: base.time.norm.weight"),
        (lambda w: w.update(stranger=torch.zeros(2)), "1 unexpected: stranger"),
        (
            lambda w: w.update({"control.zero.1.bias": torch.zeros(23)}),
            r"1 of another shape: control.zero.1.bias is \(23,\), expected \(24,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_copied(make_network, spoil, message):
    target = make_network(seed=2)
    before, weights = copies(target), copies(make_network(seed=1))
    spoil(weights)
    with pytest.raises(WeightError, match=rf"some/file.*{message}"):
        load_weights(target, weights, "some/file")
    assert all(torch.equal(before[name], value) for name, value in copies(target).items())


def test_all_complaints_come_at_once(make_network):
    weights = copies(make_network())
    del weights["base.time.norm.weight"]
    weights |= {"stranger": torch.zeros(2), "control.zero.1.bias": torch.zeros(1)}
    with pytest.raises(WeightError, match="missing.*unexpected.*another shape"):
        load_weights(make_network(), weights, "file")


def test_first_values_depend_on_the_seed_and_the_name_alone(make_new):
    first, again, other = copies(make_new(3)), copies(make_new(3)), copies(make_new(4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["base.patch_embed.weight"], other["base.patch_embed.weight"])
    assert not torch.equal(first["base.patch_embed.weight"], first["control.patch_embed.weight"])
    deeper = copies(make_new(3, blocks=4))
    assert all(torch.equal(value, deeper[name]) for name, value in first.items())


def test_blocks_start_as_the_identity_and_the_control_is_silent(make_new, make_input):
    network, call, seen = make_new(), make_input(dtype=torch.float32), []
    for block in (*network.base.blocks, *network.control.blocks):
        block.register_forward_hook(lambda _, args, out: seen.append(torch.equal(out, args[0] + args[1])))
    residuals = network.control(call)
    assert all(not residual.any() for residual in residuals)
    out = network(call).out
    assert seen and all(seen)
    assert out.std() > 0.05
    assert not network.control.control_tokens(call).any()


def test_first_values_of_every_kind_of_weight(make_new):
    weights = copies(make_new())
    for name, value in weights.items():
        if name.endswith("bias") or "_mod.up." in name or ".mod.up." in name or ".zero." in name or "time.linear_2" in name:
            assert not value.any(), name
        elif value.dim() == 1:
            assert (value == 1).all(), name
        elif ".position." in name:
            assert 0.014 < value.std() < 0.026, name
        elif name != "control.control_mlp.4.weight":
            rows, columns = value.shape
            bound = (6 / (rows + columns)) ** 0.5
            assert 0.7 * bound < value.abs().max() <= bound, name
            assert value.min() < 0 < value.max(), name
    assert not weights["control.control_mlp.4.weight"].any()


def test_only_the_last_layer_of_the_control_mlp_is_zero_whatever_its_widths(make_new):
    weights = copies(make_new(control_mlp=(24, 24)))
    assert [bool(weights[f"control.control_mlp.{index}.weight"].any()) for index in (0, 2, 4)] == [True, True, False]


@pytest.mark.parametrize("kind", ["conv3d", "conv2d", "attention", "spatial_temporal"])
def test_first_values_of_the_heads(kind):
    discriminator = build(lambda: Discriminator(24, HeadConfig(kind, 16, (0, 1))), "cpu")
    initialize(discriminator, 0)
    for name, value in copies(discriminator).items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif value.dim() == 1:
            assert (value == 1).all(), name
        else:
            # Xavier: each side counts the positions of the kernel.
            size = value[0, 0].numel()
            bound = (6 / (size * (value.shape[0] + value.shape[1]))) ** 0.5
            assert 0.5 * bound < value.abs().max() <= bound, name


def test_fingerprint_tells_networks_apart(make_network):
    weights = copies(make_network(dtype=torch.float32))
    reference = fingerprint(weights)
    assert reference == fingerprint(dict(reversed(weights.items()))) == fingerprint(copies(make_network(dtype=torch.float32)))
    name = "control.zero.1.bias"
    nudged = weights[name].clone()
    nudged[0] = nudged[0].nextafter(torch.tensor(9.0))
    variants = (
        {**weights, name: nudged},
        {**weights, name: weights[name].reshape(4, 6)},
        {**{k: v for k, v in weights.items() if k != name}, "renamed": weights[name]},
        {k: v for k, v in weights.items() if k != name},
    )
    assert len({reference, *(fingerprint(variant) for variant in variants)}) == 5


def test_fingerprint_is_of_the_values_in_whatever_type_they_are_stored(make_network):
    weights = copies(make_network(dtype=torch.float32))
    half = {name: value.bfloat16() for name, value in weights.items()}
    reference = fingerprint(half)
    assert reference == fingerprint({name: value.float() for name, value in half.items()})
    assert reference == fingerprint({name: value.double() for name, value in half.items()})
    assert reference != fingerprint(weights)  # rounding changed the values
    transposed = {name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in weights.items()}
    assert fingerprint(transposed) == fingerprint(weights)  # of the numbers, not of their order in memory


# --- Of what a rank holds ---


@dataclass(frozen=True)
class Cut:
    """A rank's rectangle of a weight: rows from `first` on."""

    shape: torch.Size
    parameter: torch.nn.Parameter
    first: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.first : self.first + len(self.parameter)]


def cuts(weights: dict[str, torch.Tensor], part: int) -> dict[str, Cut]:
    """One of two parts of everything, the second one shorter where the rows are odd, and empty where there is one."""
    made = {}
    for name, value in weights.items():
        rows = -(-len(value) // 2)
        first, count = part * rows, (rows, len(value) - rows)[part]
        made[name] = Cut(value.shape, torch.nn.Parameter(torch.full((count, *value.shape[1:]), 9.0)), first)
    return made


@pytest.mark.parametrize("part", [0, 1])
def test_a_rank_starts_with_its_part_of_the_first_values(make_new, part):
    whole = copies(make_new(3))
    held = cuts(whole, part)
    initialize(held, 3)
    for name, piece in held.items():
        assert torch.equal(piece.parameter, piece.of(whole[name])), name


@pytest.mark.parametrize("part", [0, 1])
def test_a_rank_loads_its_part_and_compares_whole_shapes(make_network, part):
    weights = copies(make_network(dtype=torch.float32))
    held = cuts(weights, part)
    load_weights(held, weights, "file")
    assert all(torch.equal(piece.parameter, piece.of(weights[name])) for name, piece in held.items())
    name = "control.zero.1.weight"
    with pytest.raises(WeightError, match=rf"1 of another shape: {name} is \(12, 24\), expected \(24, 24\)"):
        load_weights(held, weights | {name: weights[name][:12]}, "file")
