"""The Transformer Engine backend, against a stand-in with the arguments of the published versions (`fake_te.py`, where it says why).

What it shows: names, shapes and keywords, where FP8 and communication are turned on, choice and errors. What it cannot: that a GPU computes
the same. The `gpu` tests at the end compare that, and have not been run on a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_mp import kernels
from cosmos_mp.backends import choice, weights_changed
from cosmos_mp.backends.choice import Choice, choose
from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import (
    BackendConfig,
    ConfigError,
    DiffusionConfig,
    DMD2Run,
    KDRun,
    NetConfig,
    PairsRun,
    ParallelConfig,
    TeacherRun,
    TrainConfig,
)
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import WeightError, load_weights, named_weights
from cosmos_mp.parallel.apply import parallelize
from cosmos_mp.parallel.context import context_parallel
from cosmos_mp.parallel.tensor import split_dims, tensor_parallel
from cosmos_mp.parallel.topology import join, single_process
from cosmos_mp.roles import transfer_net
from cosmos_mp.training.stage import on_all_ranks

_spec = importlib.util.spec_from_file_location("fake_te", Path(__file__).with_name("fake_te.py"))
fake_te = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_te)

TEXT = (".cross_attn.k", ".cross_attn.v")
FP8_LAYERS = [f"{a}.{b}" for a in ("self_attn", "cross_attn") for b in ("q", "k", "v", "out")] + ["mlp.up", "mlp.down"]
FP8_LAYERS = [name for name in FP8_LAYERS if not name.startswith(("cross_attn.k", "cross_attn.v"))]


class Group:
    """What a tensor-parallel group of two says of itself."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


@pytest.fixture(params=sorted(fake_te.SIGNATURES))
def te(request, monkeypatch):
    """The backend's module on the stand-in of every version in the fixture."""
    fake_te.install(monkeypatch, request.param)
    fake_te.autocast.regions.clear()
    from cosmos_mp.backends import transformer_engine

    assert transformer_engine.te.Linear.__init__ is not fake_te.Linear.__init__
    return transformer_engine


@pytest.fixture
def build(te, tiny_net):
    """A tiny network of the backend on the CPU, without values, in float64."""

    def make(group=None, **options) -> TransferNet:
        topology = single_process()
        backend = te.TransformerEngineBackend(tiny_net(), group or topology.tp_group, **options)
        with torch.device("meta"):
            network = TransferNet(tiny_net(), backend)
        return network if group else parallelize(network, topology, dtype=torch.float64)

    return make


def linears(network: TransferNet) -> dict[str, fake_te.Linear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, fake_te.Linear)}


# --- The same network ---


def test_the_fixture_holds_the_versions_that_we_name():
    assert {version.rpartition(".")[0] for version in fake_te.SIGNATURES} == {"2.16", "2.19", "2.20"}


def test_the_stand_in_refuses_a_keyword_that_the_real_one_has_not(te):
    with pytest.raises(TypeError, match="in_features"):
        te.te.Linear(in_size=3, out_features=2)
    with pytest.raises(TypeError, match="in_size"):
        te.te.Linear(in_features=3, in_size=3, out_features=2)
    assert not hasattr(te.te, "Linears")


def test_none_of_our_attributes_is_transformer_engines_own(te):
    """It would overwrite them in its next forward, or we its."""
    signatures = fake_te.SIGNATURES[sys.modules["transformer_engine"].__version__]
    for name, classes in (
        ("Linear", (te._Linear, te._Column, te._Row)),
        ("RMSNorm", (te._HeadNorm,)),
        ("DotProductAttention", (te._Attention,)),
    ):
        own = {key for kind in classes for key in vars(kind) if not key.startswith("__")} - {"forward"}
        theirs = set(signatures[f"pytorch.{name}.members"].split())
        assert "forward" in theirs and not own & theirs, name
    assert "fp8" in signatures["pytorch.Linear.members"].split()


def test_names_shapes_and_split_dimensions_are_the_local_backends(build, make_network):
    ours, local = build(), make_network()
    assert {name: value.shape for name, value in named_weights(ours).items()} == {
        name: value.shape for name, value in named_weights(local).items()
    }
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in local.named_parameters()]
    assert split_dims(ours) == split_dims(local)
    assert any(name.endswith("_extra_state") for name in ours.state_dict())  # tensors, as the real ones', which are no weights


def test_weights_move_both_ways_by_name_and_strictly_and_give_the_same_result(build, make_network, make_input):
    ours, local, back = build(), make_network(), make_network(seed=1)
    load_weights(ours, named_weights(local), "local")
    load_weights(back, named_weights(ours), "ours")
    with torch.no_grad():
        expected = local(make_input()).out
        assert torch.equal(back(make_input()).out, expected)
        torch.testing.assert_close(ours(make_input()).out, expected, rtol=1e-12, atol=1e-12)
    for source, into in ((ours, local), (local, ours)):
        weights = named_weights(source)
        weights.pop("base.blocks.0.self_attn.q.weight")
        with pytest.raises(WeightError, match=r"1 missing: base\.blocks\.0\.self_attn\.q\.weight"):
            load_weights(into, weights, "one less")


def test_the_norms_are_its_own_where_our_fused_kernel_does_not_run(build, make_network, make_input, monkeypatch):
    network, local = build(), make_network()
    load_weights(network, named_weights(local), "local")
    norms = [module for module in network.modules() if isinstance(module, fake_te.RMSNorm)]
    network(make_input())
    assert len(norms) == 4 * 5 and all(norm.calls == 1 for norm in norms)
    assert all(norm.eps == 1e-6 for norm in norms)
    with kernels.using("triton"):
        network.to(torch.float32)(make_input(dtype=torch.float32))
    assert all(norm.calls == 1 for norm in norms)


# --- Tensor and context parallelism are its own ---


@pytest.mark.parametrize("sequence", [False, True])
def test_its_linears_get_the_tensor_parallel_group_and_no_hooks_of_ours(build, sequence):
    group = Group()
    network = build(group, sequence_parallel=sequence)
    whole = build()
    for name, dim in split_dims(whole).items():
        full, part = whole.get_parameter(name).shape, network.get_parameter(name).shape
        assert part[dim] * 2 == full[dim] and part[1 - dim] == full[1 - dim]
    topology = replace(single_process(), tp_group=group, options=ParallelConfig(tp=2, sequence_parallel=sequence))
    tensor_parallel(network, topology)
    for name, module in linears(network).items():
        assert module.given["tp_group"] is group and module.given["parallel_mode"] == ("row" if module.split_dim else "column")
        # The text is whole on every rank: a sequence-parallel linear would gather it twice.
        assert module.sequence_parallel is (sequence and not name.endswith(TEXT)), name
    hooked = [name for name, module in network.named_modules() if module._forward_pre_hooks or module._forward_hooks]
    assert hooked == []
    for trunk in (network.base, network.control):
        assert (trunk.spread(torch.ones(4, 1)).shape[0] == 2) is sequence


@pytest.mark.parametrize("sequence", [False, True])
def test_attention_is_told_of_all_heads_and_of_the_group_that_splits_them_and_drops_nothing(build, tiny_net, sequence):
    group, net = Group(), tiny_net()
    cores = [module for module in build(group, sequence_parallel=sequence).modules() if isinstance(module, fake_te.DotProductAttention)]
    assert len(cores) == 2 * 5
    expected = {
        "num_attention_heads": net.heads,
        "num_gqa_groups": net.heads,
        "kv_channels": net.head_dim,
        "attention_dropout": 0.0,
        "attn_mask_type": "no_mask",
        "attention_type": "self",
        "sequence_parallel": sequence,
        "tp_size": 2,
        "tp_group": group,
        "softmax_scale": None,  # 1 / sqrt(kv_channels)
    }
    for core in cores:
        # Neither what divides tokens, which comes later, nor another window, softmax or format.
        assert {name: value for name, value in core.given.items() if name not in ("layer_number", "get_rng_state_tracker")} == expected


@pytest.mark.parametrize(("way", "words"), [("ulysses", "a2a"), ("ring", "p2p"), ("ulysses_ring", "a2a+p2p")])
def test_self_attention_alone_gets_the_context_parallel_group(te, build, monkeypatch, way, words):
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream")
    monkeypatch.setattr(te.dist, "get_process_group_ranks", lambda group: [4, 5, 6, 7])
    network, cp = build(), type("Cp", (), {"size": lambda self: 4, "rank": lambda self: 2})()
    inner, outer = object(), object()
    both = way == "ulysses_ring"
    options = ParallelConfig(cp=4, cp_attention=way, cp_ulysses=2 if both else 0)
    context_parallel(network, replace(single_process(), cp_group=cp, options=options, cp_levels=(inner, outer) if both else ()))
    for trunk in (network.base, network.control):
        assert trunk.part == 2
        for block in trunk.blocks:
            group, ranks, stream, communication = block.self_attn.attend.context_parallel
            assert group == [inner, outer] if both else group is cp
            assert (ranks, stream, communication) == ([4, 5, 6, 7], "a stream", words)
            assert block.cross_attn.attend.context_parallel is None
    odd = torch.ones(3, 1, 2, 12, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"halves a rank's tokens, here 3 = .*parallel\.cp.*local"):
        network.base.blocks[0].self_attn.attend(odd, odd, odd)
    network.base.blocks[0].cross_attn.attend(odd, odd, odd)


def test_the_kernels_of_attention_are_told_once(te, build, make_network, make_input, capsys):
    network = build()
    load_weights(network, named_weights(make_network()), "local")
    for _ in range(2):
        network(make_input())
    assert capsys.readouterr().out == "attention: Transformer Engine's fused kernels\n"


# --- FP8 ---


def regions(network: TransferNet, call) -> dict[str, list]:
    """The recipe in which every linear of the network ran."""
    for module in linears(network).values():
        module.calls.clear()
    network(call)
    return {name: [recipe and type(recipe).__name__ for _, recipe in module.calls] for name, module in linears(network).items()}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("current", "Float8CurrentScaling"), ("block", "Float8BlockScaling"), ("mxfp8", "MXFP8BlockScaling"), ("delayed", "DelayedScaling")],
)
def test_the_linears_of_the_blocks_run_in_the_recipe_and_those_of_the_text_do_not(te, build, make_network, make_input, recipe, kind):
    network = build()
    load_weights(network, named_weights(make_network()), "local")
    assert all(found == [None] for found in regions(network, make_input()).values())
    te.use_fp8(network, recipe)
    for found in (regions(network, make_input()), regions(network, make_input())):  # Transformer Engine keeps state between them
        assert all(ran == ([None] if name.endswith(TEXT) else [kind]) for name, ran in found.items())
        assert sum(ran == [kind] for ran in found.values()) == len(FP8_LAYERS) * 5
    assert fake_te.autocast.regions == []


def test_stateless_recipes_leave_attention_alone_and_hold_in_recomputation(te, tiny_net, make_network, make_input):
    topology = single_process()
    with torch.device("meta"):
        network = TransferNet(tiny_net(), te.TransformerEngineBackend(tiny_net(), topology.tp_group))
    te.use_fp8(network, "current")
    network = parallelize(network, topology, recompute_mode="full", dtype=torch.float64)
    load_weights(network, named_weights(make_network()), "local")
    seen = []
    core = network.base.blocks[0].self_attn.attend
    core.register_forward_pre_hook(lambda *_: seen.append(list(fake_te.autocast.regions)))
    network(make_input()).out.sum().backward()
    assert seen == [[], []]
    for name, module in linears(network).items():
        kinds = [recipe and type(recipe).__name__ for _, recipe in module.calls]
        assert kinds == [None if name.endswith(TEXT) else "Float8CurrentScaling"] * 2, name


@pytest.mark.parametrize(("kind", "recipes"), [("fp8", ["current", "delayed"]), ("fp8_block_scaling", ["block"]), ("mxfp8", ["mxfp8"])])
def test_a_recipe_that_the_gpu_lacks_is_refused_in_its_words(monkeypatch, kind, recipes):
    fake_te.install(monkeypatch, "2.16.0", has={kind: False})
    from cosmos_mp.backends import transformer_engine

    for recipe in ("current", "delayed", "block", "mxfp8"):
        if recipe in recipes:
            with pytest.raises(ConfigError, match=rf"backend\.recipe={recipe} does not run on this GPU: no {kind} here; give another"):
                transformer_engine.use_fp8(torch.nn.Module(), recipe)
        else:
            transformer_engine.use_fp8(torch.nn.Module(), recipe)


def test_quantised_weights_are_made_anew_once_after_every_change(build, make_network, make_input):
    network = build()
    load_weights(network, named_weights(make_network()), "local")

    def firsts() -> set[bool]:
        for module in linears(network).values():
            module.calls.clear()
        network(make_input())
        return {first for module in linears(network).values() for first, _ in module.calls}

    assert [firsts(), firsts()] == [{True}, {False}]
    weights_changed(network)
    assert [firsts(), firsts()] == [{True}, {False}]


# --- The choice ---


@pytest.fixture
def place(monkeypatch):
    """`place(version, device, fsdp, kind=..., **parallel)`: a topology where this Transformer Engine, or none, is found."""

    def make(version: str | None, device: str = "cuda", fsdp: bool = True, parallel: ParallelConfig | None = None, **options):
        if version is None:
            monkeypatch.setitem(sys.modules, "transformer_engine", None)
        else:
            fake_te.install(monkeypatch, version)
        mesh = object() if fsdp else None
        backend = BackendConfig(**options)
        return replace(single_process(), device=torch.device(device), mesh=mesh, options=parallel or ParallelConfig(), backend=backend)

    return make


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (("2.16.0",), {}, Choice("transformer_engine", "2.16.0")),
        (("2.20.2",), {"kind": "transformer_engine"}, Choice("transformer_engine", "2.20.2")),
        (("2.16.0",), {"fp8": "native"}, Choice("transformer_engine", "2.16.0, FP8 (current) for teacher")),
        (("2.16.0",), {"kind": "local"}, Choice("local", "as asked for")),
        (("2.16.0",), {"fp8": "emulate"}, Choice("local", "backend.fp8=emulate")),
        (("2.16.0", "cpu"), {}, Choice("local", "no GPU")),
        (("2.16.0", "cuda", False), {}, Choice("local", "networks compute in float32")),
        (("2.16.0", "cuda", False), {"kind": "transformer_engine"}, Choice("transformer_engine", "2.16.0")),
        (("2.11.0", "cuda", False), {"kind": "transformer_engine"}, Choice("transformer_engine", "2.11.0")),
        (("2.16.0", "cuda", True, ParallelConfig(compute="float32")), {}, Choice("local", "networks compute in float32")),
    ],
)
def test_which_backend_is_chosen(place, arguments, options, expected):
    assert choose(place(*arguments, **options)) == expected


def test_without_it_auto_is_local_and_says_why(place):
    kind, words = choose(place(None))
    assert kind == "local" and words.startswith("Transformer Engine is not installed (")


@pytest.mark.parametrize(
    ("arguments", "options", "recompute", "words"),
    [
        ((None,), {"kind": "transformer_engine"}, "none", r"backend\.kind=transformer_engine: .*not installed.*pip install.*container"),
        ((None,), {"fp8": "native"}, "none", r"backend\.fp8=native: .*not installed.*pip install"),
        (("2.16.0", "cpu"), {"kind": "transformer_engine"}, "none", r"needs a GPU: set backend\.kind to local"),
        (("2.15.0",), {}, "none", r"FSDP2, Transformer Engine 2\.15\.0 leaks FP8 weights.*2\.16 mended both"),
        (("2.11.0",), {"kind": "transformer_engine"}, "none", r"FSDP2, Transformer Engine 2\.11\.0"),
        (("2.16.0", "cuda", True, ParallelConfig(compute="float32")), {"kind": "transformer_engine"}, "none", r"parallel\.compute to bf"),
        (("2.16.0",), {}, "selective", r"train\.recompute=selective.*full or none"),
        (("2.16.0", "cpu", True, ParallelConfig(cp=4, cp_attention="ulysses_ring", cp_ulysses=2)), {}, "none", r"ulysses_ring.*no GPU"),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(place, arguments, options, recompute, words):
    with pytest.raises(ConfigError, match=words.replace("to bf", "to bfloat16")):
        choose(place(*arguments, **options), recompute)


def test_a_build_that_does_not_load_is_no_missing_package(place, monkeypatch):
    topology = place("2.16.0", kind="transformer_engine")

    def broken(name):
        raise OSError("libnvte.so: undefined symbol")

    monkeypatch.setattr(choice.importlib, "import_module", broken)
    with pytest.raises(ConfigError, match=r"is there but does not load \(libnvte\.so: undefined symbol\)"):
        choose(topology)


@pytest.mark.parametrize("fsdp", [False, True])
def test_networks_are_made_of_the_choice_and_compute_in_bfloat16(te, monkeypatch, tiny_net, fsdp):
    monkeypatch.setattr(choice, "choose", lambda *_: Choice("transformer_engine", ""))
    topology = join(ParallelConfig(compute="bfloat16")) if fsdp else single_process()
    network = transfer_net(tiny_net(), topology, fp8="current")
    assert len(linears(network)) == 10 * 5
    # FSDP's masters stay float32 and are gathered in bfloat16.
    assert {p.dtype for p in network.parameters()} == {torch.float32 if fsdp else torch.bfloat16}
    assert all((module.region is None) == name.endswith(TEXT) for name, module in linears(network).items())


@pytest.mark.parametrize("sequence", [False, True])
def test_a_sequence_parallel_layout_reaches_the_linears(te, tiny_net, sequence):
    options = ParallelConfig(tp=2, sequence_parallel=sequence)
    backend = choice.make(Choice("transformer_engine", ""), tiny_net(), replace(single_process(), tp_group=Group(), options=options))
    assert backend.column_linear(6, 4).sequence_parallel is backend.row_linear(6, 4).sequence_parallel is sequence


def test_a_run_says_at_its_start_what_it_found_and_refuses_what_cannot_run(capsys):
    run = on_all_ranks(lambda config, topology: print(topology.backend.kind))
    run(KDRun(backend=BackendConfig(kind="local")))
    assert capsys.readouterr().out == "backend: local (as asked for); optimizer: torch AdamW\nlocal\n"
    with pytest.raises(ConfigError, match=r"backend\.kind=transformer_engine"):
        run(KDRun(backend=BackendConfig(kind="transformer_engine")))
    assert capsys.readouterr().out == ""


# --- Configurations ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "local", "fp8": "native"}, r"backend\.fp8=native is what backend\.kind=transformer_engine does"),
        ({"kind": "transformer_engine", "fp8": "emulate"}, r"backend\.fp8=emulate is what backend\.kind=local does"),
        ({"fp8": "emulate", "recipe": "delayed"}, r"backend\.recipe=delayed is not emulated"),
        ({"fp8": "emulate", "recipe": "mxfp8"}, r"backend\.recipe=mxfp8 is not emulated"),
    ],
)
def test_options_that_contradict_one_another(options, words):
    with pytest.raises(ConfigError, match=words):
        BackendConfig(**options)


def native(recipe="current", roles=("teacher",)):
    return BackendConfig(fp8="native", recipe=recipe, fp8_roles=roles)


@pytest.mark.parametrize(
    ("recipe", "net", "shape", "parallel", "words"),
    [
        ("current", {"mlp_hidden": 16392}, (16, 16, 88, 160), {}, r"multiples of 16, and net\.mlp_hidden=16392 / .*= 16392.*fp8 to off"),
        ("mxfp8", {"hidden": 4112, "heads": 257}, (16, 16, 88, 160), {}, r"multiples of 32, and net\.hidden=4112 .*recipe to current"),
        ("block", {}, (16, 16, 88, 160), {"cp": 16}, r"multiples of 128, and a rank's tokens, .*/ parallel\.cp=16 = 3520.*current"),
        ("block", {}, (16, 16, 88, 160), {"cp": 8, "tp": 2, "sequence_parallel": True}, r"cp=8 / parallel\.tp=2 = 3520"),
        ("current", {}, (16, 3, 6, 6), {}, r"multiples of 16, and a rank's tokens, .*= 27"),
    ],
)
def test_a_side_that_fp8_does_not_take_is_named_with_the_option(recipe, net, shape, parallel, words):
    run = {"net": NetConfig(**net), "diffusion": DiffusionConfig(latent_shape=shape), "parallel": ParallelConfig(**parallel)}
    with pytest.raises(ConfigError, match=words):
        TeacherRun(backend=native(recipe), **run)
    TeacherRun(**run)  # not a word where nothing is in FP8


def test_the_recipe_sizes_take_every_recipe():
    for recipe in ("current", "block", "mxfp8"):
        for parallel in (ParallelConfig(cp=8), ParallelConfig(tp=2, cp=4)):
            DMD2Run(backend=native(recipe), parallel=parallel)
    PairsRun(backend=native("block"))


def test_delayed_scaling_is_for_roles_that_are_trained_and_not_recomputed():
    once = TrainConfig(recompute="none")
    TeacherRun(backend=native("delayed"), train=once)
    KDRun(backend=native("delayed", ("student",)), train=once)
    for make, role in ((lambda: PairsRun(backend=native("delayed")), "teacher"), (lambda: KDRun(backend=native("delayed")), "teacher")):
        with pytest.raises(ConfigError, match=f"the {role} is frozen: leave it out of backend.fp8_roles"):
            make()
    DMD2Run(backend=native("delayed", ("student",)), train=once)
    with pytest.raises(ConfigError, match=r"one history for all networks, and backend\.fp8_roles has student, fake_score: name one"):
        DMD2Run(backend=native("delayed", ("student", "fake_score")), train=once)
    with pytest.raises(ConfigError, match=r"the two forwards of train\.recompute=full"):
        TeacherRun(backend=native("delayed"))
    with pytest.raises(ConfigError, match=r"parallel\.compute"):
        TeacherRun(backend=native(), parallel=ParallelConfig(compute="float32"))


def test_the_default_keeps_fp8_off_the_trained_networks_of_dmd2():
    roles = ("teacher", "student", "fake_score")
    assert [native(roles=DMD2Run().backend.fp8_roles).recipe_of(role) for role in roles] == ["current", None, None]
    assert [native(roles=KDRun().backend.fp8_roles).recipe_of(role) for role in roles[:2]] == ["current", "current"]


@pytest.mark.parametrize("given", [{"cp_attention": "ulysses_ring", "cp": 4}, {"cp_attention": "ulysses_ring", "cp": 4, "cp_ulysses": 3}])
def test_the_two_levels_of_context_parallelism_must_divide(given):
    with pytest.raises(ConfigError, match=r"must divide parallel\.cp=4"):
        ParallelConfig(**given)
    with pytest.raises(ConfigError, match=r"parallel\.cp_ulysses=2 is for"):
        ParallelConfig(cp=4, cp_ulysses=2)


# --- On a GPU. These have not been run on one ---


@pytest.mark.gpu
@pytest.mark.parametrize(("recipe", "bound"), [(None, 2e-2), ("current", 1.5e-1)])
def test_on_a_gpu_it_computes_what_the_local_backend_computes(recipe, bound):
    pytest.importorskip("transformer_engine.pytorch")
    from cosmos_mp.backends.transformer_engine import TransformerEngineBackend, use_fp8

    net, topology = NetConfig(hidden=256, heads=4, mlp_hidden=512, text_dim=64), single_process()
    block, inputs = [], torch.randn(64, 2, 256, device="cuda", dtype=torch.bfloat16)
    from cosmos_mp.models.block import MLP, Attention

    for backend in (LocalBackend(topology.tp_group), TransformerEngineBackend(net, topology.tp_group)):
        with torch.device("meta"):
            layers = torch.nn.ModuleDict({"attn": Attention(net, net.hidden, backend), "mlp": MLP(net, backend)})
        if block and recipe:
            use_fp8(layers, recipe)
        layers = layers.to(torch.bfloat16).to_empty(device="cuda")
        if block:
            load_weights(layers, named_weights(block[0]), "local")
        else:
            for p in layers.parameters():
                torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.06)
        block.append(layers)
    results = []
    for layers in block:
        x = inputs.clone().requires_grad_()
        layers["mlp"](layers["attn"](x, x))  # what Transformer Engine keeps from one forward must serve the next
        out = layers["mlp"](layers["attn"](x, x))
        out.float().pow(2).sum().backward()
        results.append([out, x.grad, *(p.grad for p in layers.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs.float()).norm() <= bound * ours.float().norm()
