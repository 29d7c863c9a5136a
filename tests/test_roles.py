"""Weights by role from everything that may hold them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from cosmos_mp import config
from cosmos_mp.config import ConfigError, TextConfig
from cosmos_mp.convert.huggingface import Card, export_student
from cosmos_mp.convert.nvidia import write_nvidia
from cosmos_mp.models.weights import WeightError, fingerprint, named_weights
from cosmos_mp.parallel.topology import single_process
from cosmos_mp.presets import NEGATIVE_PROMPT
from cosmos_mp.roles import check_sizes, load_transfer_net, new_discriminator, new_transfer_net, read_weights, unconditional_text
from cosmos_mp.text import build_text_encoder
from cosmos_mp.training.checkpoint import CheckpointError, latest, load_weights_of


@pytest.fixture
def weights(make_network) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in named_weights(make_network(dtype=torch.float32)).items()}


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


# --- Our runs ---


def test_a_run_gives_its_average(tiny_chain):
    run = tiny_chain.root / "teacher"
    average, plain = load_weights_of(run, "teacher"), load_weights_of(run, "teacher", prefer_ema=False)
    found = read_weights(str(run), "teacher")
    assert same(found, average)
    assert not same(found, plain)


def test_a_checkpoint_folder_gives_that_checkpoint(tiny_chain):
    checkpoints = tiny_chain.root / "dmd2" / "checkpoints"
    assert same(read_weights(str(checkpoints / "iter_00000010"), "student"), read_weights(str(checkpoints.parent), "student"))
    early, late = (read_weights(str(checkpoints / name), "fake_score") for name in ("iter_00000007", "iter_00000010"))
    assert not same(early, late)


def test_a_role_that_the_run_has_not_is_named(tiny_chain):
    with pytest.raises(CheckpointError, match="no role 'student'; it holds teacher"):
        read_weights(str(tiny_chain.root / "teacher"), "student")


# --- Others' files ---


def test_a_combined_file_and_two_files(tmp_path, weights):
    write_nvidia(weights, tmp_path / "both.pt")
    assert same(read_weights(str(tmp_path / "both.pt"), "teacher"), weights)
    for part in ("base", "control"):
        write_nvidia({name: value for name, value in weights.items() if name.startswith(part)}, tmp_path / f"{part}.pt")
    assert same(read_weights(f"{tmp_path / 'base.pt'},{tmp_path / 'control.pt'}", "teacher"), weights)
    write_nvidia(weights, tmp_path / "student.pt", "student")
    assert same(read_weights(str(tmp_path / "student.pt"), "student"), weights)


def test_a_hugging_face_folder(tmp_path, make_network, tiny_net):
    weights = {name: value.detach() for name, value in named_weights(make_network(dtype=torch.float32, mlp_hidden=48)).items()}
    diffusion = config.DiffusionConfig(latent_shape=(3, 4, 4, 6))
    export_student(weights, tiny_net(mlp_hidden=48), diffusion, tmp_path / "hf", provenance={}, card=Card())
    found = read_weights(str(tmp_path / "hf"), "student")
    used = {name for name in weights if not name.startswith("control.final.")}
    assert found.keys() == weights.keys() and len(used) < len(weights)
    assert all(torch.equal(found[name], weights[name]) for name in used)


def test_what_is_not_there_is_named(tmp_path, weights):
    with pytest.raises(ConfigError, match="no weights given for the student: name a run folder or a weight file"):
        read_weights("", "student")
    with pytest.raises(FileNotFoundError, match="absent.pt: no such weight file"):
        read_weights(str(tmp_path / "absent.pt"), "teacher")
    write_nvidia(weights, tmp_path / "both.pt")
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        read_weights(f"{tmp_path / 'both.pt'},{tmp_path / 'gone.pt'}", "teacher")
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in it"):
        read_weights(str(tmp_path / "run"), "teacher")


def test_a_damaged_checkpoint_is_named(tiny_chain, tmp_path):
    shutil.copytree(tiny_chain.root / "kd", tmp_path / "kd")
    file = tmp_path / "kd" / "checkpoints" / "iter_00000004" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="no usable checkpoint.*__0_0.distcp has another checksum"):
        read_weights(str(tmp_path / "kd"), "student")


# --- Networks ---


def test_a_loaded_network_has_the_files_weights(tmp_path, weights, tiny_net):
    write_nvidia(weights, tmp_path / "both.pt")
    network = load_transfer_net(tiny_net(), single_process(), str(tmp_path / "both.pt"), "teacher")
    assert same({name: value.detach() for name, value in named_weights(network).items()}, weights)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in network.parameters())


def test_weights_of_another_size_are_refused_by_name(tmp_path, weights, tiny_net):
    write_nvidia(weights, tmp_path / "both.pt")
    with pytest.raises(WeightError, match=r"both.pt does not fit.*base.blocks.0.mlp.down.weight is \(24, 40\), expected \(24, 48\)"):
        load_transfer_net(tiny_net(mlp_hidden=48), single_process(), str(tmp_path / "both.pt"), "teacher")
    write_nvidia({name: value for name, value in weights.items() if name.startswith("base")}, tmp_path / "base.pt")
    with pytest.raises(WeightError, match="missing: control"):
        load_transfer_net(tiny_net(), single_process(), str(tmp_path / "base.pt"), "teacher")


def test_a_folder_of_another_network_is_refused_though_its_weights_fit(tiny_chain, tmp_path, make_network, tiny_net):
    """The rotary ratios shape no tensor: only what the folder records tells two such networks apart."""
    net, run = tiny_chain.config("sample", "unused").net, tiny_chain.root / "kd"
    for source in (run, latest(run)):
        assert load_transfer_net(net, single_process(), str(source), "student")
        with pytest.raises(ConfigError, match=r"kd.* holds another network \(net.rope_ratio=\[2.0, 1.0, 1.0\], here \[1.0, 1.0, 1.0\]\)"):
            load_transfer_net(replace(net, rope_ratio=(1.0, 1.0, 1.0)), single_process(), str(source), "student")
    sizes = tiny_net(mlp_hidden=48)
    weights = named_weights(make_network(dtype=torch.float32, mlp_hidden=48))
    export_student(weights, sizes, config.DiffusionConfig(latent_shape=(3, 4, 4, 6)), tmp_path / "hf", provenance={}, card=Card())
    check_sizes(str(tmp_path / "hf"), sizes)
    with pytest.raises(ConfigError, match="hf holds another network .net.control_rope_ratio="):
        check_sizes(str(tmp_path / "hf"), replace(sizes, control_rope_ratio=(3.0, 1.0, 1.0)))


@pytest.mark.parametrize("text", ["{", "[]", '{"stage": "kd"}', '{"net": 3}'])
def test_a_folder_that_is_no_run_is_named(tmp_path, tiny_net, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json is not a run's .*name a run folder"):
        check_sizes(str(tmp_path), tiny_net())


def test_new_networks_follow_from_the_seed(tiny_net):
    def of(make, *arguments):
        return [fingerprint(named_weights(make(*arguments, single_process(), seed))) for seed in (0, 0, 1)]

    for hashes in (of(new_transfer_net, tiny_net()), of(new_discriminator, tiny_net(), config.HeadConfig(hidden=8, feature_blocks=(1,)))):
        assert hashes[0] == hashes[1] != hashes[2]


# --- The unconditional branch ---


def test_text_of_the_unconditional_branch():
    text, cpu = TextConfig("tiny", "", tokens=90, dim=6), torch.device("cpu")
    encoder = build_text_encoder(text)
    assert torch.equal(unconditional_text("empty", "a prompt", text, cpu), torch.zeros(90, 6))
    assert torch.equal(unconditional_text("negative_prompt", "", text, cpu), encoder.encode([NEGATIVE_PROMPT])[0])
    assert torch.equal(unconditional_text("negative_prompt", "a blurred frame", text, cpu), encoder.encode(["a blurred frame"])[0])
    assert unconditional_text("negative_prompt", "", text, cpu).abs().sum() > 0
