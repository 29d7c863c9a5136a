"""NVIDIA's weight files: names, layouts, strictness."""

import io

import pytest
import torch
from safetensors.torch import save_file

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import NetConfig
from cosmos_mp.convert.nvidia import LayoutError, compact, from_nvidia, read_file, read_network, read_networks, to_nvidia, write_nvidia
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import build, load_weights, named_weights
from cosmos_mp.parallel.topology import single_process

NET = NetConfig(
    hidden=36, heads=3, blocks=3, control_blocks=2, mlp_hidden=72, adaln_lora_dim=4, text_dim=6, control_mlp=(5, 7), max_latent=(4, 6, 8)
)
PREFIXES = {
    "combined": ("base_model.net.", "net."),
    "training": ("base_model.net.", "net_ctrl."),
    "student": ("net.base_model.net.", "net.net_ctrl."),
}


def make_network():
    backend = LocalBackend(single_process().tp_group)
    return build(lambda: TransferNet(NET, backend), "cpu")


def random_weights(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=draw).to(dtype) for name, value in named_weights(make_network()).items()}


def prefixed(weights, layout):
    """NVIDIA's names under the prefixes of a layout, made from the combined ones by hand."""
    base, control = PREFIXES[layout]
    named = {}
    for name, value in to_nvidia(weights).items():
        inner = name.removeprefix("base_model.net.")
        named[base + inner if inner != name else control + name.removeprefix("net.")] = value
    return named


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_names_as_nvidia_writes_them():
    names = to_nvidia({name: name for name in random_weights()})
    expected = {
        "base_model.net.x_embedder.proj.1.weight": "base.patch_embed.weight",
        "base_model.net.extra_pos_embedder.pos_emb_w": "base.position.w",
        "base_model.net.t_embedder.1.linear_2.weight": "base.time.linear_2.weight",
        "base_model.net.affline_norm.weight": "base.time.norm.weight",
        "base_model.net.blocks.block2.blocks.0.block.attn.to_q.0.weight": "base.blocks.2.self_attn.q.weight",
        "base_model.net.blocks.block2.blocks.1.block.attn.to_k.1.weight": "base.blocks.2.cross_attn.k_norm.weight",
        "base_model.net.blocks.block1.blocks.1.block.attn.to_out.0.weight": "base.blocks.1.cross_attn.out.weight",
        "base_model.net.blocks.block0.blocks.2.block.layer1.weight": "base.blocks.0.mlp.up.weight",
        "base_model.net.blocks.block0.blocks.2.block.layer2.weight": "base.blocks.0.mlp.down.weight",
        "base_model.net.blocks.block0.blocks.1.adaLN_modulation.1.weight": "base.blocks.0.cross_mod.down.weight",
        "base_model.net.blocks.block0.blocks.2.adaLN_modulation.2.weight": "base.blocks.0.mlp_mod.up.weight",
        "base_model.net.final_layer.adaLN_modulation.2.weight": "base.final.mod.up.weight",
        "base_model.net.final_layer.linear.weight": "base.final.linear.weight",
        "net.x_embedder.proj.1.weight": "control.patch_embed.weight",
        "net.x_embedder2.proj.1.weight": "control.control_embed.weight",
        "net.input_hint_block.4.bias": "control.control_mlp.4.bias",
        "net.zero_blocks.block1.weight": "control.zero.1.weight",
        "net.final_layer.linear.weight": "control.final.linear.weight",
    }
    assert {name: names[name] for name in expected} == expected


@pytest.mark.parametrize("layout", PREFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_is_read_bitwise(tmp_path, layout, dtype):
    weights = random_weights(dtype)
    named = prefixed(weights, layout)
    decoys = {
        "base_model.net.blocks.block0.blocks.0.block.attn.to_q.0._extra_state": io.BytesIO(b"state"),
        "base_model.net.pos_embedder.seq": torch.arange(3),
        "net.pos_embedder.seq": torch.arange(3),
        "logvar.0.freqs": torch.ones(2),
        "conditioner.embedders.fps.weight": torch.ones(2),
        "trained_data_record": {"video": 3},
    }
    content = named | decoys
    torch.save({"model": content, "ema": None} if layout == "student" else content, tmp_path / "weights.pt")
    read = read_network(tmp_path / "weights.pt")
    assert same(read, weights)
    load_weights(make_network(), read, "the file")


@pytest.mark.parametrize("layout", PREFIXES)
def test_averaged_weights_write_dashes(layout):
    weights = random_weights()
    dashed = {name.replace(".", "-"): value for name, value in prefixed(weights, layout).items()}
    dashed |= {"net-blocks-block0-blocks-0-block-attn-_extra_state": torch.ones(1), "net-pos_embedder-seq": torch.ones(1)}
    assert same(from_nvidia(dashed, "ema"), weights)


def test_safetensors_are_read(tmp_path):
    weights = random_weights()
    save_file(to_nvidia(weights), tmp_path / "student.safetensors")
    assert same(read_network(tmp_path / "student.safetensors"), weights)


@pytest.mark.parametrize("layout", ["teacher", "student"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_files_come_back_bitwise(tmp_path, layout, dtype):
    weights = random_weights(dtype)
    write_nvidia(weights, tmp_path / "new" / "weights.pt", layout)
    content = torch.load(tmp_path / "new" / "weights.pt", weights_only=True)
    if layout == "student":
        assert content.keys() == {"model", "ema"} and content["ema"] is None
        content = content["model"]
    base, control = PREFIXES["student" if layout == "student" else "combined"]
    assert {name.startswith(base) or name.startswith(control) for name in content} == {True}
    # theirs -> ours -> theirs
    assert same(to_nvidia(from_nvidia(content, "file"), layout), content)
    assert same(read_network(tmp_path / "new" / "weights.pt"), weights)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.pt"]


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="weights.pt exists"):
        write_nvidia(random_weights(), path)
    assert path.read_bytes() == b"mine"


def test_a_view_does_not_take_its_storage_along(tmp_path):
    weights = random_weights()
    name = "base.blocks.0.mlp.up.weight"
    whole = torch.randn(100, *weights[name].shape)
    write_nvidia(weights | {name: whole[7]}, tmp_path / "weights.pt")
    assert torch.equal(read_network(tmp_path / "weights.pt")[name], whole[7])
    assert (tmp_path / "weights.pt").stat().st_size < whole.nbytes
    assert compact(whole[7]).untyped_storage().nbytes() == whole[7].nbytes
    assert compact(torch.arange(6.0).reshape(2, 3).T).is_contiguous()


def test_base_and_control_files_merge(tmp_path):
    weights = random_weights()
    named = to_nvidia(weights)
    base = {name: value for name, value in named.items() if name.startswith("base_model.")}
    control = {name: value for name, value in named.items() if name not in base}
    torch.save(base, tmp_path / "base_model.pt")
    torch.save(control, tmp_path / "edge_control.pt")
    assert same(read_networks([tmp_path / "base_model.pt", tmp_path / "edge_control.pt"]), weights)
    # One file alone is no network: strict loading says what is missing.
    with pytest.raises(ValueError, match="missing"):
        load_weights(make_network(), read_networks([tmp_path / "edge_control.pt"]), "edge_control.pt")
    with pytest.raises(LayoutError, match=r"base_model\.pt.*earlier file"):
        read_networks([tmp_path / "base_model.pt", tmp_path / "base_model.pt"])
    with pytest.raises(LayoutError, match="no weight file"):
        read_networks([])


@pytest.mark.parametrize(
    "name", ["net.surprise.weight", "x_embedder.proj.1.weight", "base_model.net.blocks.block0.blocks.3.adaLN_modulation.1.weight"]
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(LayoutError, match=name.replace(".", r"\.")):
        from_nvidia({**to_nvidia(random_weights()), name: torch.ones(1)}, "file")


def test_two_names_for_one_tensor_are_refused():
    named = to_nvidia(random_weights())
    with pytest.raises(LayoutError, match="both mean"):
        from_nvidia({**named, "net_ctrl.affline_norm.weight": torch.ones(36)}, "file")


@pytest.mark.parametrize("name", ["student.patch_embed.weight", "base.surprise", "control.blocks.0.mlp.bias"])
def test_a_foreign_name_is_not_written(tmp_path, name):
    with pytest.raises(LayoutError, match=name):
        write_nvidia({name: torch.ones(1)}, tmp_path / "weights.pt")
    assert not list(tmp_path.iterdir())


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        read_file(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match=r"text\.pt.*not a readable weight file"):
        read_file(tmp_path / "text.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt.*found list"):
        read_file(tmp_path / "list.pt")
    torch.save({"optimizer": {"lr": torch.ones(1)}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match=r"nested\.pt.*optimizer"):
        read_file(tmp_path / "nested.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"weights{suffix}: not a readable weight file"):
        read_file(path)
