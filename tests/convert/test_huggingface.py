"""The student as a Hugging Face folder: names, round trips, parity with diffusers' own classes, refusals."""

import hashlib
import json
import shutil
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCosmos, AutoModel, CosmosTransformer3DModel, DiffusionPipeline, EDMEulerScheduler
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file, save_file

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import DiffusionConfig, NetConfig
from cosmos_mp.convert import huggingface as hf
from cosmos_mp.convert.hf_files.cosmos_transfer1_controlnet import CosmosTransfer1ControlNetModel
from cosmos_mp.diffusion.edm import Condition, Denoiser
from cosmos_mp.diffusion.samplers import one_step
from cosmos_mp.models.dit import NetInput
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import WeightError, build, load_weights, named_weights
from cosmos_mp.parallel.topology import single_process

NET = NetConfig(
    hidden=72,
    heads=3,
    blocks=4,
    control_blocks=2,
    mlp_hidden=144,
    adaln_lora_dim=8,
    text_dim=20,
    control_channels=24,
    control_mlp=(6, 10),
    max_latent=(8, 16, 24),
)
DIFFUSION = DiffusionConfig()
FPS = 30.0


def empty_network(net=NET, device="cpu"):
    backend = LocalBackend(single_process().tp_group)
    return build(lambda: TransferNet(net, backend), device)


def random_weights(net=NET, dtype=torch.float32):
    """Normal values everywhere: norms are not 1, outgoing linears and modulations not 0, so that no part is silent."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: ((name.endswith("norm.weight")) + 0.3 * torch.randn(value.shape, generator=draw)).to(dtype)
        for name, value in named_weights(empty_network(net, "meta")).items()
    }


@pytest.fixture(autouse=True)
def resize_without_torchvision(monkeypatch):
    """diffusers' transformer resizes the padding mask with torchvision, which is not installed beside this torch."""

    def resize(image, size, interpolation):
        return F.interpolate(image, size=size, mode=interpolation)

    functional = types.SimpleNamespace(resize=resize)
    shim = types.SimpleNamespace(functional=functional, InterpolationMode=types.SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", shim, raising=False)


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def network(weights):
    network = empty_network()
    load_weights(network, weights, "random values")
    return network


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """A folder written once; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("export") / "student"
    hf.export_student(weights, NET, DIFFUSION, folder, provenance={"run": "kd", "iteration": 7}, shard_bytes=100_000)
    return folder


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def diffusers_models(weights, net=NET, eps=1e-6):
    """Stock transformer and control branch, filled without going through a folder."""
    models = []
    for (part, sizes), kind in zip(hf.configs(net).items(), (CosmosTransformer3DModel, CosmosTransfer1ControlNetModel), strict=True):
        model = kind(**sizes)
        model.load_state_dict(hf.to_huggingface(weights)[part], strict=True)
        models.append(model.eval())
    for block in models[0].transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = eps
    return models


def inputs():
    """B=2, three frames, not square, one given frame, zero-padded text, a padding mask that the batch shares."""
    draw = torch.Generator().manual_seed(2)
    x, control = (torch.randn(2, 16, 3, 8, 12, generator=draw) for _ in range(2))
    text = torch.randn(2, 9, NET.text_dim, generator=draw)
    text[:, 5:] = 0
    given = torch.zeros(2, 1, 3, 8, 12)
    given[:, :, 0] = 1
    padding = torch.zeros(1, 1, 64, 96)
    padding[..., 70:] = 1
    padding[..., 50:, :] = 1
    return {"x": x, "control": control, "text": text, "given": given, "padding": padding, "timestep": torch.tensor([1.1, -0.4])}


def ours(network, given, fps=FPS, control=True):
    padding = given["padding"][0].expand(2, -1, -1)
    call = NetInput(
        x_BCTHW=given["x"],
        timestep_B=given["timestep"],
        text_BLD=given["text"],
        control_BCTHW=given["control"] if control else None,
        condition_mask_B1THW=given["given"],
        padding_mask_BHW=padding,
        fps_B=torch.full((2,), fps),
    )
    return network(call).out


def theirs(models, given, fps=FPS, control=True, shift=0):
    transformer, controlnet = models
    shared = {
        "timestep": given["timestep"],
        "encoder_hidden_states": given["text"],
        "condition_mask": given["given"],
        "padding_mask": given["padding"],
        "fps": fps,
    }
    residuals = None
    if control:
        residuals = controlnet(controls_latents=given["control"], latents=given["x"], **shared).control_block_samples
        residuals = [None] * shift + residuals + [None] * (NET.blocks - len(residuals) - shift)
    return transformer(hidden_states=given["x"], block_controlnet_hidden_states=residuals, **shared).sample


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- Names, sizes, round trips ---


@pytest.mark.parametrize("net", [NetConfig(), NET])
def test_names_and_shapes_are_those_of_the_diffusers_classes(net):
    weights = named_weights(empty_network(net, "meta"))
    folders = hf.to_huggingface(weights)
    for (part, sizes), kind in zip(hf.configs(net).items(), (CosmosTransformer3DModel, CosmosTransfer1ControlNetModel), strict=True):
        with torch.device("meta"):
            expected = kind(**sizes).state_dict()
        assert {name: value.shape for name, value in folders[part].items()} == {name: value.shape for name, value in expected.items()}
    back = hf.from_huggingface(folders, "folders")
    assert back == {name: value for name, value in weights.items() if not name.startswith("control.final.")}
    assert sum(len(tensors) for tensors in folders.values()) == len(back)


def test_full_size_counts():
    weights = named_weights(empty_network(NetConfig(), "meta"))
    counts = {part: sum(value.numel() for value in tensors.values()) for part, tensors in hf.to_huggingface(weights).items()}
    assert counts == {"transformer": 7_236_208_640, "controlnet": 890_089_248}
    assert sum(value.numel() for value in weights.values()) == 8_129_705_760
    assert len(hf.to_huggingface(weights)["transformer"]) == 570


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [50_000, 5_000_000_000])
def test_round_trip_is_bitwise(tmp_path, dtype, shard_bytes):
    weights = random_weights(dtype=dtype)
    hf.export_student(weights, NET, DIFFUSION, tmp_path / "a", provenance={}, dtype=dtype, shard_bytes=shard_bytes)
    back, net = hf.import_huggingface(tmp_path / "a")
    assert net == NET and back.keys() == weights.keys()
    for name, value in back.items():
        expected = torch.zeros_like(weights[name]) if name.startswith("control.final.") else weights[name]
        assert value.dtype == dtype and torch.equal(value, expected), name
    files = sorted(path.name for path in (tmp_path / "a" / "transformer").iterdir())
    assert ("diffusion_pytorch_model.safetensors.index.json" in files) == (len(files) > 2) == (shard_bytes == 50_000)
    # Files are a function of the weights: the second export is the first, byte for byte.
    hf.export_student(back, net, DIFFUSION, tmp_path / "b", provenance={}, dtype=dtype, shard_bytes=shard_bytes)
    first, second = (
        {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert first == second


def test_every_size_survives(tmp_path):
    net = replace(
        NET, latent_channels=5, text_dim=7, control_mlp=(), control_rope_ratio=(1.5, 1.0, 2.0), rope_ratio=(2.0, 3.0, 1.0), mlp_hidden=72
    )
    weights = random_weights(net)
    hf.export_student(weights, net, DIFFUSION, tmp_path / "student", provenance={})
    assert hf.import_huggingface(tmp_path / "student")[1] == net
    assert hf.check_export(tmp_path / "student", weights, net, DIFFUSION) <= 1e-5


def test_views_of_one_buffer_are_written(weights, tmp_path):
    whole = torch.cat([value.flatten() for value in weights.values()])
    pieces = whole.split([value.numel() for value in weights.values()])
    views = {name: piece.view_as(weights[name]) for name, piece in zip(weights, pieces, strict=True)}
    views["base.final.linear.weight"] = weights["base.final.linear.weight"].T.contiguous().T
    hf.export_student(views, NET, DIFFUSION, tmp_path / "student", provenance={})
    back, _ = hf.import_huggingface(tmp_path / "student")
    assert all(torch.equal(value, weights[name]) for name, value in back.items() if not name.startswith("control.final."))


# --- Parity ---


@torch.no_grad()
@pytest.mark.parametrize("control", [False, True])
def test_forward_equals_diffusers(network, weights, control):
    expected = ours(network, inputs(), control=control)
    exact = difference(theirs(diffusers_models(weights), inputs(), control=control), expected)
    stock = difference(theirs(diffusers_models(weights, eps=1e-5), inputs(), control=control), expected)
    assert exact <= 3e-6 and stock <= 1e-5


@torch.no_grad()
def test_query_and_key_norms_have_the_networks_eps(weights, tmp_path):
    # With queries this small the eps of their norm decides.
    weights = {name: value * 1e-3 if "attn.q.weight" in name else value for name, value in weights.items()}
    network = empty_network()
    load_weights(network, weights, "small queries")
    expected = ours(network, inputs())
    assert difference(theirs(diffusers_models(weights), inputs()), expected) <= 1e-5
    assert difference(theirs(diffusers_models(weights, eps=1e-5), inputs()), expected) > 1e-4
    hf.export_student(weights, NET, DIFFUSION, tmp_path / "student", provenance={})
    assert hf.check_export(tmp_path / "student", weights, NET, DIFFUSION) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "mistake", ["fps", "fps_none", "control_rope", "condition_mask", "padding_mask", "residuals", "text_trimmed", "no_control", "order"]
)
def test_a_structural_mistake_shows(network, weights, mistake):
    given, net, options = inputs(), NET, {}
    if mistake == "fps":
        options["fps"] = 24.0
    elif mistake == "fps_none":
        options["fps"] = None
    elif mistake == "control_rope":
        net = replace(NET, control_rope_ratio=(2.0, 1.0, 1.0))
    elif mistake == "condition_mask":
        given["given"] = torch.zeros_like(given["given"])
    elif mistake == "padding_mask":
        given["padding"] = torch.zeros_like(given["padding"])
    elif mistake == "residuals":
        options["shift"] = 1
    elif mistake == "text_trimmed":
        given["text"] = given["text"][:, :5]
    elif mistake == "no_control":
        options["control"] = False
    elif mistake == "order":
        given["control"] = given["control"].flip(1)
    wrong = theirs(diffusers_models(weights, net), given, **options)
    assert difference(wrong, ours(network, inputs())) > 1e-4


def test_gradients_equal_diffusers(weights):
    network, models = empty_network(), diffusers_models(weights)
    load_weights(network, weights, "random values")
    ours(network, inputs()).sum().backward()
    theirs(models, inputs()).sum().backward()
    folders = {
        part: {name: p.grad for name, p in model.named_parameters()}
        for part, model in zip(("transformer", "controlnet"), models, strict=True)
    }
    expected = hf.from_huggingface(folders, "gradients")
    found = {name: p.grad for name, p in network.named_parameters()}
    assert {name for name, value in found.items() if value is None} == {name for name in found if name.startswith("control.final.")}
    for name, value in expected.items():
        assert difference(found[name], value) <= 1e-4, name


@torch.no_grad()
def test_one_step_of_the_shipped_scheduler_gives_x0(exported, network, weights):
    scheduler = EDMEulerScheduler.from_pretrained(exported / "scheduler")
    given = inputs()
    given["given"] = torch.zeros_like(given["given"])
    noise = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(3))
    condition = Condition(given["text"], given["control"], torch.full((2,), FPS), given["padding"][0].expand(2, -1, -1))
    expected = one_step(Denoiser(network, DIFFUSION), noise, condition).x0

    def loop():
        scheduler.set_timesteps(1)
        timestep, sample = scheduler.timesteps[0], 80.0 * noise
        given["x"], given["timestep"] = scheduler.scale_model_input(sample, timestep), timestep.expand(2)
        return scheduler.step(theirs(diffusers_models(weights), given), timestep, sample)

    step = loop()
    assert difference(step.pred_original_sample, expected) <= 1e-5
    # The generic loop ends at x0 too, through a cancellation between numbers of size 80 times the noise.
    assert (step.prev_sample - expected).abs().max() <= 1e-4
    scheduler.register_to_config(final_sigmas_type="sigma_min")
    assert difference(loop().prev_sample, expected) > 1


# --- The folder and diffusers' loaders ---


def test_check_needs_neither_home_nor_torchvision(exported, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "home"))
    monkeypatch.delattr(transformer_cosmos, "transforms")
    before = sorted(path.name for path in exported.rglob("*"))
    assert hf.check_export(exported, weights, NET, DIFFUSION) <= 1e-5
    assert not (tmp_path / "home").exists() and dynamic_modules_utils.HF_MODULES_CACHE == str(tmp_path / "home")
    assert sorted(path.name for path in exported.rglob("*")) == before


def test_check_compares_a_bf16_folder_after_rounding(weights, tmp_path):
    hf.export_student(weights, NET, DIFFUSION, tmp_path / "student", provenance={}, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "student" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert hf.check_export(tmp_path / "student", weights, NET, DIFFUSION) <= 1e-5


@pytest.mark.parametrize("part", ["base.blocks.3.cross_attn.v.weight", "control.zero.1.bias"])
def test_check_refuses_other_weights(exported, weights, part):
    with pytest.raises(hf.ExportError, match="differs from ours"):
        hf.check_export(exported, weights | {part: weights[part].flip(0)}, NET, DIFFUSION)


def test_a_changed_setting_is_caught(exported, weights, tmp_path):
    folder = copy_of(exported, tmp_path)
    path = folder / "controlnet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scale": [2.0, 1.0, 1.0]}))
    with pytest.raises(hf.ExportError, match="differs from ours"):
        hf.check_export(folder, weights, NET, DIFFUSION)


@pytest.fixture
def pipe(exported, tmp_path, monkeypatch):
    """The whole folder by its public entry; nothing of ours helps."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)


def test_the_pipeline_loads_whole(pipe, exported):
    assert pipe.config.is_distilled is True and list(pipe.config.distilled_sigmas) == [80.0]
    assert type(pipe.transformer) is CosmosTransformer3DModel and type(pipe.controlnet).__name__ == "CosmosTransfer1ControlNetModel"
    norms = [module for model in (pipe.transformer, pipe.controlnet) for name, module in model.named_modules() if "norm_q" in name]
    norms += [module for model in (pipe.transformer, pipe.controlnet) for name, module in model.named_modules() if "norm_k" in name]
    assert len(norms) == 4 * (NET.blocks + NET.control_blocks) and {module.eps for module in norms} == {1e-6}
    assert pipe.scheduler.config.final_sigmas_type == "zero"
    control = AutoModel.from_pretrained(str(exported / "controlnet"), trust_remote_code=True)
    assert type(control).__name__ == "CosmosTransfer1ControlNetModel"
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(exported)


def test_the_pipeline_draws_from_its_generator_and_follows_its_inputs(pipe):
    given = inputs()
    text, control = given["text"], given["control"]

    def run(seed=0, **options):
        return pipe(text, FPS, **{"control_latents": control, "generator": torch.Generator().manual_seed(seed)} | options).frames

    first = run()
    assert first.shape == control.shape and first.dtype == torch.float32 and torch.equal(first, run())
    assert difference(run(seed=1), first) > 1e-2
    assert difference(run(padding_mask=given["padding"]), first) > 1e-4
    assert difference(run(controlnet_conditioning_scale=0.5), first) > 1e-4
    assert torch.equal(run(noise=torch.randn(control.shape, generator=torch.Generator().manual_seed(0))), first)
    assert (
        difference(pipe.to(torch.bfloat16)(text, FPS, control_latents=control, generator=torch.Generator().manual_seed(0)).frames, first)
        < 0.2
    )


def test_the_pipeline_names_what_is_wrong(pipe):
    given = inputs()
    text, control = given["text"], given["control"]
    for match, options in {
        "one of them": {},
        "need a vae": {"control_video": torch.zeros(2, 3, 17, 64, 96)},
        "other than 'latent'": {"control_latents": control, "output_type": "np"},
        "2 prompts for 1": {"control_latents": control[:1]},
        "8 channels": {"control_latents": control[:, :8]},
        r"padding_mask is \(2, 1": {"control_latents": control, "padding_mask": given["padding"].expand(2, -1, -1, -1)},
        "noise is": {"control_latents": control, "noise": control[:, :, :1]},
    }.items():
        with pytest.raises(ValueError, match=match):
            pipe(text, FPS, **options)
    pipe.scheduler.register_to_config(sigma_max=70.0)
    with pytest.raises(ValueError, match="starts at sigma 70"):
        pipe(text, FPS, control_latents=control)
    with pytest.raises(ValueError, match="one-call"):
        type(pipe)(pipe.transformer, pipe.controlnet, pipe.scheduler, distilled_sigmas=[80.0, 1.0])


@torch.no_grad()
def test_a_vae_takes_and_returns_video(pipe):
    mean, std = torch.linspace(-1, 1, 16 * 4).tolist(), torch.linspace(0.5, 2, 16 * 4).tolist()
    torch.manual_seed(0)
    vae = AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 16, 16, 16), decode_block_out_channels=(8, 16, 16, 16), latents_mean=mean, latents_std=std
    )
    with_vae = type(pipe)(pipe.transformer, pipe.controlnet, pipe.scheduler, vae)
    video = torch.rand(1, 3, 17, 64, 96, generator=torch.Generator().manual_seed(4)) * 2 - 1
    encoded = vae.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, 16, 4, 1, 1)[:, :, :3] for values in (mean, std))
    control = (encoded - mean) / std * 0.5
    text = inputs()["text"][:1]
    noise = torch.randn(control.shape, generator=torch.Generator().manual_seed(5))
    latents = pipe(text, FPS, control_latents=control, noise=noise).frames
    expected = vae.decode(latents / 0.5 * std + mean).sample.clamp(-1, 1) / 2 + 0.5
    result = with_vae(text, FPS, control_video=video, noise=noise, output_type="pt").frames
    assert result.shape == (1, 17, 3, 64, 96)
    assert (result - expected.transpose(1, 2)).abs().max() <= 1e-4
    assert with_vae(text, FPS, control_video=video, noise=noise).frames.shape == (1, 17, 64, 96, 3)


# --- Refusals ---


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mlp_hidden": 100}, "net.mlp_hidden=100"),
        ({"rope_theta": 5000.0}, "net.rope_theta=5000"),
        ({"base_fps": 30.0}, "net.base_fps=30"),
    ],
)
def test_a_size_that_diffusers_cannot_say_is_refused(weights, tmp_path, change, match):
    with pytest.raises(hf.ExportError, match=match):
        hf.export_student(weights, replace(NET, **change), DIFFUSION, tmp_path / "student", provenance={})
    assert not list(tmp_path.iterdir())


def test_weights_must_be_the_whole_network(weights, tmp_path):
    out = tmp_path / "student"
    name = "control.zero.1.bias"
    missing = {key: value for key, value in weights.items() if key != name}
    for wrong in (missing, weights | {"base.more": torch.ones(1)}, weights | {name: torch.ones(3)}):
        with pytest.raises(WeightError, match="base.more" if "base.more" in wrong else name):
            hf.export_student(wrong, NET, DIFFUSION, out, provenance={})
    with pytest.raises(hf.ExportError, match="float16"):
        hf.export_student(weights, NET, DIFFUSION, out, provenance={}, dtype=torch.float16)
    with pytest.raises(hf.ExportError, match="JSON"):
        hf.export_student(weights, NET, DIFFUSION, out, provenance={"run": object()})
    with pytest.raises(hf.ExportError, match="heads.0.weight"):
        hf.to_huggingface({"heads.0.weight": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(weights, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for out in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(hf.ExportError, match="remove it or choose another name"):
            hf.export_student(weights, NET, DIFFUSION, out, provenance={})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.partial").mkdir()
    (tmp_path / "empty.partial" / "half.safetensors").write_text("left by a killed export")
    hf.export_student(weights, NET, DIFFUSION, tmp_path / "empty", provenance={})
    assert (tmp_path / "empty" / "model_index.json").is_file() and not (tmp_path / "empty" / "half.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_damaged_folder_is_refused(weights, tmp_path):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    hf.export_student(weights, NET, DIFFUSION, single, provenance={})
    hf.export_student(weights, NET, DIFFUSION, sharded, provenance={}, shard_bytes=100_000)
    control = single / "controlnet" / "diffusion_pytorch_model.safetensors"
    intact = control.read_bytes()

    rewrite(control, lambda tensors: tensors.pop("zero_blocks.1.weight"))
    with pytest.raises(WeightError, match="missing: control.zero.1.weight"):
        hf.import_huggingface(single)
    with pytest.raises(hf.ExportError, match="missing_keys.*zero_blocks.1.weight"):
        hf.load_pipeline(single)
    control.write_bytes(intact)
    rewrite(control, lambda tensors: tensors.update(surprise=torch.ones(1)))
    with pytest.raises(hf.ExportError, match="controlnet/surprise"):
        hf.import_huggingface(single)
    control.write_bytes(intact[:-10])
    with pytest.raises(hf.ExportError, match="damaged weight file"):
        hf.import_huggingface(single)
    control.unlink()
    with pytest.raises(FileNotFoundError, match=r"controlnet/diffusion_pytorch_model\.safetensors"):
        hf.import_huggingface(single)

    shard = sorted((sharded / "transformer").glob("*-00002-of-*.safetensors"))[0]
    rewrite(shard, lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(hf.ExportError, match="00002-of.*not where"):
        hf.import_huggingface(sharded)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00002-of"):
        hf.import_huggingface(sharded)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("transformer", {"concat_padding_mask": False}, "concat_padding_mask is False"),
        ("transformer", {"use_crossattn_projection": True}, "use_crossattn_projection is True"),
        ("transformer", {"in_channels": 16}, "in_channels is 16"),
        ("controlnet", {"text_embed_dim": 21}, "text_embed_dim is 21"),
        ("controlnet", {"new_option": 1}, "new_option is 1"),
        ("controlnet", {"hint_nf": None}, "hint_nf"),
    ],
)
def test_another_networks_config_is_refused(exported, tmp_path, part, change, match):
    folder = copy_of(exported, tmp_path)
    path = folder / part / "config.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if not (key == "hint_nf" and value is None)}))
    with pytest.raises(hf.ExportError, match=match):
        hf.import_huggingface(folder)


def test_the_record_and_the_card(exported, weights, tmp_path):
    record = json.loads((exported / "cosmos_mp_export.json").read_text())
    assert record["provenance"] == {"run": "kd", "iteration": 7} and record["dtype"] == "float32" and record["qk_norm_eps"] == 1e-6
    assert record["left_out"] == ["control.final.linear.weight", "control.final.mod.down.weight", "control.final.mod.up.weight"]
    assert json.loads((exported / "transformer" / "config.json").read_text())["in_channels"] == 17
    card = (exported / "README.md").read_text()
    for words in ("None run.", "sigma 80", "without classifier-free guidance", "torchvision", "nvidia/Cosmos-Transfer1-7B", "guardrails"):
        assert words in card
    assert "$" not in card
    own = hf.Card(control="vis", base_model="", vae="a small tokenizer", metrics={"Frechet distance": 12.5})
    hf.export_student(weights, NET, replace(DIFFUSION, sigma_max=70.0), tmp_path / "own", provenance={}, card=own)
    card = (tmp_path / "own" / "README.md").read_text()
    assert "| Frechet distance | 12.5 |" in card and "None run." not in card and "sigma 70" in card and "a small tokenizer" in card
    assert "nvidia" not in card.split("## Evaluation")[0].lower().replace("text encoder", "") and "## Terms" not in card
    assert json.loads((tmp_path / "own" / "model_index.json").read_text())["distilled_sigmas"] == [70.0]
    assert hf.check_export(tmp_path / "own", weights, NET, replace(DIFFUSION, sigma_max=70.0)) <= 1e-5
