"""`python -m cosmos_mp verify DIR`: run golden cases of the reference networks, losses and sampler, and compare number by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cosmos_mp.backends.local import LocalBackend
from cosmos_mp.config import DiffusionConfig, DMD2Config, HeadConfig, NetConfig, SamplerConfig
from cosmos_mp.convert.nvidia import read_network, to_nvidia
from cosmos_mp.diffusion.edm import Condition, Denoiser, Given, bcast, scalings
from cosmos_mp.diffusion.samplers import first_step, guide, one_step, sample_teacher, second_order_step
from cosmos_mp.diffusion.schedules import edm_ramp
from cosmos_mp.distill.conditioning import first_frames
from cosmos_mp.distill.dmd2 import DMD2, Draws
from cosmos_mp.distill.losses import kd_loss, vsd_weight
from cosmos_mp.distill.method import StepOutput
from cosmos_mp.kernels import adaln, qk_norm_rope
from cosmos_mp.kernels.adaln import modulate
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss
from cosmos_mp.kernels.qk_norm_rope import rotate
from cosmos_mp.models import embeddings
from cosmos_mp.models.discriminator import GROUPS, SLOPE, Discriminator
from cosmos_mp.models.dit import NetInput
from cosmos_mp.models.transfer import TransferNet
from cosmos_mp.models.weights import build, load_weights
from cosmos_mp.parallel.topology import single_process

Values = dict[str, Any]
FIXED_HEAD = {
    "type": "conv3d",
    "kernel": [2, 4, 4],
    "stride": [2, 2, 2],
    "padding": [0, 1, 1],
    "groupnorm_groups": GROUPS,
    "groupnorm_eps": 1e-5,
    "leaky_slope": SLOPE,
}


class CaseError(ValueError):
    """A golden case that cannot be run: a missing file, an unknown kind, or a setting that the package does not have."""


@dataclass(frozen=True)
class Difference:
    """One compared quantity: largest absolute difference over the largest expected value, and its limit."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # false for NaN


@dataclass(frozen=True)
class Case:
    """A golden case in memory; tensors are in the dtype that it is run in."""

    folder: Path
    config: dict[str, Any]
    io: dict[str, Tensor]

    @property
    def net(self) -> NetConfig:
        return net_config(self.config, str(self.folder / "config.json"))

    @property
    def diffusion(self) -> DiffusionConfig:
        return DiffusionConfig(
            sigma_data=self.config["sigma_data"],
            sigma_max=self.config["sigma_max"],
            sigma_min=self.config.get("sigma_min", DiffusionConfig.sigma_min),
            condition_frames=0,
            condition_sigma=self.config.get("condition_sigma", DiffusionConfig.condition_sigma),
        )

    def condition(self) -> Condition:
        """Text, control and given frames of the case."""
        given, count = None, self.config["condition_frames"]
        if count:
            x0 = self.io["x0"]
            mask = first_frames(torch.full((len(x0),), count), x0.shape[2]).to(x0)
            given = Given(x0, mask, self.io["condition_noise"])
        return Condition(self.io["crossattn_emb"], self.io["hint"], self.io["fps"], self.io["padding_mask"], given)

    def network(self, role: str) -> TransferNet:
        """A role's network with its weights, loaded strictly."""
        backend = LocalBackend(single_process().tp_group)
        return self._load(role, lambda: TransferNet(self.net, backend))

    def discriminator(self) -> Discriminator:
        head = self.config["head"]
        for name, value in FIXED_HEAD.items():
            if head.get(name, value) != value:
                raise CaseError(f"{self.folder}: head.{name} is {head[name]!r}; this head has {value!r}")
        hidden, blocks = head["hidden"], tuple(self.config["feature_blocks"])
        return self._load("discriminator", lambda: Discriminator(self.net.hidden, HeadConfig(head["type"], hidden, blocks)))

    def denoiser(self, role: str) -> Denoiser:
        network = self.network(role).requires_grad_(False)
        return Denoiser(network, self.diffusion, self.config["net"]["control_weight"])

    def _load(self, role: str, make: Callable[[], Any]) -> Any:
        network = build(make, "cpu", next(value.dtype for value in self.io.values() if value.is_floating_point()))
        path = self.folder / self.config["weights"][role]
        load_weights(network, read_network(path), str(path))
        return network


def net_config(config: dict[str, Any], source: str) -> NetConfig:
    """The network's sizes; a case that wants another graph than ours is an error, not a wrong result."""
    net = config["net"]
    fixed = {
        "patch": [1, 2, 2],
        "gelu": "erf",
        "padding_mask_channel": True,
        "in_channels": net["out_channels"] + 1,
        "head_dim": net["hidden"] // net["heads"],
        "hint_added_after_control_block": 0,
        "qk_norm_eps": qk_norm_rope.EPS,
        "layernorm_eps": adaln.EPS,
        **{name: embeddings.EPS for name in ("affline_norm_eps", "pos_emb_eps")},
    }
    for name, value in fixed.items():
        if net.get(name, value) != value:
            raise CaseError(f"{source}: net.{name} is {net[name]!r}; these networks have {value!r}")
    ratios = (net["rope_h_ratio"], net["rope_w_ratio"])
    return NetConfig(
        hidden=net["hidden"],
        heads=net["heads"],
        blocks=net["blocks"],
        control_blocks=net["control_blocks"],
        mlp_hidden=net["mlp_hidden"],
        adaln_lora_dim=net["adaln_lora_dim"],
        text_dim=net["text_dim"],
        latent_channels=net["out_channels"],
        control_channels=net["control_channels"],
        control_mlp=tuple(net["hint_mlp"]),
        max_latent=tuple(net["max_latent"]),
        rope_theta=net["rope_theta"],
        rope_ratio=(net["rope_t_ratio_base"], *ratios),
        control_rope_ratio=(net["rope_t_ratio_control"], *ratios),
        base_fps=net["base_fps"],
    )


# --- Kinds ---


@torch.no_grad()
def run_forward(case: Case) -> Values:
    io = case.io
    network, blocks = case.network("teacher"), case.config["feature_blocks"]
    masks = (io["condition_video_input_mask"], io["padding_mask"], io["fps"])
    output = network(
        NetInput(io["x"], io["timesteps"], io["crossattn_emb"], io["hint"], *masks),
        control_weight=case.config["net"]["control_weight"],
        feature_blocks=blocks,
    )
    base = network(NetInput(io["x"], io["timesteps"], io["crossattn_emb"], None, *masks))
    features = {f"feature{index}": feature for index, feature in enumerate(output.features)}
    return {"out": output.out, "out_base": base.out, **features}


@torch.no_grad()
def run_one_step(case: Case) -> Values:
    student = case.denoiser("student")
    sigma = torch.tensor([student.config.sigma_max], dtype=case.io["epsilon"].dtype)
    return {
        "x_T": student.config.sigma_max * case.io["epsilon"],
        "x0_gen": one_step(student, case.io["epsilon"], case.condition()).x0,
        "c_noise_student": scalings(sigma, student.config.sigma_data).c_noise.item(),
    }


@torch.no_grad()
def run_teacher_sample(case: Case) -> Values:
    teacher, noise = case.denoiser("teacher"), case.io["noise"]
    values: Values = {"xT": teacher.config.sigma_max * noise}
    for steps in case.config["num_steps"]:
        sampler = SamplerConfig(steps=steps, guidance=case.config["guidance"])
        values[f"sigmas_N{steps}"] = edm_ramp(teacher.config.sigma_max, teacher.config.sigma_min, steps).tolist()
        values[f"x0_N{steps}"] = sample_teacher(teacher, noise, case.condition(), case.io["neg_crossattn_emb"], sampler)
    return values


def run_dmd2_step(case: Case) -> Values:
    io, config = case.io, case.config
    networks = {role: case.network(role) for role in ("student", "teacher", "fake_score")}
    networks["discriminator"] = case.discriminator()
    weight = config["net"]["control_weight"]
    head = HeadConfig(config["head"]["type"], config["head"]["hidden"], tuple(config["feature_blocks"]))
    options = DMD2Config(guidance=config["guidance"], gan_weight=config["gan_weight"])
    method = DMD2(networks, case.diffusion, options, head, io["neg_crossattn_emb"], seed=0)
    for denoiser in (method.student, method.teacher, method.fake_score):
        denoiser.control_weight = weight
    draws, condition = Draws(io["epsilon"], io["eps"], io["eps_real"], io["sigma"]), case.condition()
    values: Values = {"x_T": case.diffusion.sigma_max * io["epsilon"]}

    _train_only(networks, "student")
    output, scores = method.student_step(io["x0"], draws, condition)
    vsd, gan = output.terms["vsd"], output.terms["gan"]
    grads = {"vsd": _gradients(networks["student"], vsd.value), "gan": _gradients(networks["student"], gan.value)}
    grads["total"] = {name: value + gan.weight * grads["gan"][name] for name, value in grads["vsd"].items()}
    values |= {
        "x0_gen": scores.y,
        "teacher_eps_cond": scores.teacher.eps,
        "teacher_eps_guided": guide(scores.teacher.eps, scores.unconditional.eps, config["guidance"]),
        "fake_score_eps": scores.fake_score.eps,
        "student_vsd_loss": vsd.value,
        "student_gan_loss": gan.value,
        "student_total": _total(output),
        "vsd_weight": vsd_weight(io["sigma"], scores.scale[:, 0]),
        "student_grad_norm": _norm(grads["total"]),
        "student_grad_norm_vsd": _norm(grads["vsd"]),
        "student_grad_norm_gan": _norm(grads["gan"]),
        "student_grad_norm_base": _norm(grads["total"], "base."),
        "student_grad_norm_control": _norm(grads["total"], "control."),
        "student_fake_logits": scores.fake_logits.flatten(),
    }
    for term, gradient in grads.items():
        values |= {f"grad_{term}.{name}": value for name, value in to_nvidia(gradient).items()}

    loss = kd_loss(one_step(method.student, io["epsilon"], condition).x0, io["x0"])
    values |= {"kd_loss": loss, "kd_grad_norm": _norm(_gradients(networks["student"], loss))}

    _train_only(networks, "fake_score", "discriminator")
    output, logits = method.critic_step(io["x0"], draws, condition)
    fake, disc = output.terms["fake_score"].value, output.terms["discriminator"].value
    fake_gradient = _gradients(networks["fake_score"], fake)
    disc_gradient = _gradients(networks["discriminator"], disc)
    values |= {
        "disc_loss": disc,
        "critic_fake_logits": logits.fake.flatten(),
        "critic_real_logits": logits.real.flatten(),
        "fake_score_loss": fake,
        "critic_total": _total(output),
        "fake_score_grad_norm": _norm(fake_gradient),
        "disc_grad_norm": _norm(disc_gradient),
        **{f"grad_fake_score.{name}": value for name, value in to_nvidia(fake_gradient).items()},
        **{f"grad_disc.{name}": value for name, value in to_nvidia(disc_gradient).items()},
    }
    return values


def run_ops(case: Case) -> Values:
    io, sizes = case.io, case.config["ops"]
    rope, shape = sizes["rope"], sizes["unpatchify"]
    fps = torch.full((1,), float(rope["fps"]), dtype=io["gelu.x"].dtype)

    def angles(ratio_t: float) -> Tensor:
        grid = (rope["T"], rope["H"], rope["W"], rope["head_dim"])
        return embeddings.rope_angles(*grid, fps_B=fps, ratio=(ratio_t, 1.0, 1.0), theta=10000.0, base_fps=24.0)[:, 0]

    position = embeddings.LearnedPosition(1, 1, 1, 1)
    position.t, position.h, position.w = (nn.Parameter(io[f"pos_emb.{axis}"], requires_grad=False) for axis in "thw")
    sizes_thw = tuple(io[f"pos_emb.{axis}"].shape[0] for axis in "thw")
    dim = sizes["timestep_embedding"]["dim"]
    time = embeddings.timestep_embedding(io["timestep_embedding.t"], dim)
    edm = scalings(io["edm.sigma"], 0.5)
    sigma = io["vsd.sigma"]
    y = io["vsd.gen"].clone().requires_grad_()
    yt = y.detach() + bcast(sigma) * io["vsd.eps"]
    noises = Outputs(io["vsd.teacher_eps"], None, io["vsd.fake_eps"])  # x0 = x_t - sigma eps
    vsd, _ = dmd2_loss(y, yt, noises, torch.ones_like(sigma), -sigma, 0.0, lambda error_BT: error_BT.mean(dim=1, keepdim=True))
    group = F.group_norm(io["groupnorm.x"], GROUPS, io["groupnorm.weight"], io["groupnorm.bias"])
    levels = io["ab2.sigmas"]
    tokens = io["unpatchify.tokens"].transpose(0, 1)
    return {
        "gelu": F.gelu(io["gelu.x"]),
        "silu": F.silu(io["gelu.x"]),
        "rmsnorm": F.rms_norm(io["rmsnorm.x"], io["rmsnorm.weight"].shape, io["rmsnorm.weight"], qk_norm_rope.EPS),
        "layernorm_modulate": modulate(
            io["layernorm_modulate.x"].transpose(0, 1), io["layernorm_modulate.shift"], io["layernorm_modulate.scale"]
        ).transpose(0, 1),
        "rope_angles_base": angles(2.0),
        "rope_angles_control": angles(1.0),
        "rope_apply_base": rotate(io["rope_apply.x"][:, None, None], *embeddings.rotation(angles(2.0)[:, None]))[:, 0, 0],
        "pos_emb": position(*sizes_thw).reshape(*sizes_thw, -1),
        "timestep_embedding": time,
        "timestep_conditioning": F.rms_norm(time, (dim,), io["timestep_conditioning.affline_norm"], embeddings.EPS),
        "patchify": embeddings.patchify(io["patchify.x"]).transpose(0, 1),
        "unpatchify": embeddings.unpatchify(tokens, shape["T"], 2 * shape["H"], 2 * shape["W"]),
        "padding_mask": embeddings.latent_padding_mask(io["padding_mask.x"], 1, *sizes["padding_mask"]["latent"])[:, :, 0],
        "edm_c_skip": edm.c_skip,
        "edm_c_out": edm.c_out,
        "edm_c_in": edm.c_in,
        "edm_c_noise": edm.c_noise,
        "groupnorm_leaky": F.leaky_relu(group, SLOPE),
        "vsd_loss": vsd,
        "vsd_grad": torch.autograd.grad(vsd, y)[0],
        "ab2_first": first_step(io["ab2.x"], io["ab2.x0"], levels[1], levels[2]),
        "ab2_step": second_order_step(io["ab2.x"], io["ab2.x0"], io["ab2.x0_prev"], levels[1], levels[2], levels[0]),
    }


KINDS: dict[str, Callable[[Case], Values]] = {
    "forward": run_forward,
    "one_step": run_one_step,
    "teacher_sample": run_teacher_sample,
    "dmd2_step": run_dmd2_step,
    "ops": run_ops,
}


# --- Running and comparing ---


def _train_only(networks: dict[str, nn.Module], *roles: str) -> None:
    for role, network in networks.items():
        network.requires_grad_(role in roles)


def _total(output: StepOutput) -> Tensor:
    return sum(term.weight * term.value for term in output.terms.values())


def _gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def _norm(gradients: dict[str, Tensor], prefix: str = "") -> Tensor:
    return sum(value.double().pow(2).sum() for name, value in gradients.items() if name.startswith(prefix)).sqrt()


def _difference(name: str, got: Any, expected: Any, limit: float) -> Difference:
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, expected))
    if b.dim() == 1 and a.dim() == 0:
        a = a[None]
    if a.shape != b.shape:
        raise CaseError(f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    scale = b.abs().max().item()
    difference = (a - b).abs().max().item()
    return Difference(name, difference / scale if scale else difference, limit)


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CaseError(f"{path}: cannot be read ({error}); fetch the case again") from error


def run_case(folder: Path, dtype: torch.dtype = torch.float32) -> list[Difference]:
    """Run one case; every expected entry is compared.

    Raises:
        CaseError: a file or entry is missing, the kind is unknown, or an expected entry has no counterpart or another shape.
    """
    config = _read(folder / "config.json", lambda path: json.loads(path.read_text()))
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise CaseError(f"{folder / 'config.json'}: kind {kind!r} is none of {', '.join(KINDS)}")
    for name in ("io.safetensors", "expected.safetensors"):
        if not (folder / name).is_file():
            raise CaseError(f"{folder / name}: missing file of a {kind} case")
    io = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in _read(folder / "io.safetensors", load_file).items()
    }
    try:
        limits = {"tensors": config["tolerance"]["tensors"], "numbers": config["tolerance"]["numbers"], **config["tolerance"]}
        values = KINDS[kind](Case(folder, config, io))
    except KeyError as error:
        raise CaseError(f"{folder}: config.json or io.safetensors has no entry {error}, which a {kind} case needs") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise CaseError(f"{folder}: an entry of config.json is of the wrong kind ({error}); fetch the case again") from error
    tensors = _read(folder / "expected.safetensors", load_file)
    numbers_file = folder / "expected.json"
    numbers = _read(numbers_file, lambda path: json.loads(path.read_text())) if numbers_file.is_file() else {}
    unwritten = {**config.get("expected_shapes", {}), **config.get("expected_numbers", {})}.keys() - tensors.keys() - numbers.keys()
    if unwritten:
        raise CaseError(f"{folder}: config.json promises {', '.join(sorted(unwritten))}, which no expected file holds")
    differences = []
    for expected, limit in ((tensors, limits["tensors"]), (numbers, limits["numbers"])):
        for name, value in expected.items():
            if name not in values:
                raise CaseError(f"{folder}: expected entry {name!r} is not computed for kind {kind!r}")
            differences.append(_difference(name, values[name], value, limits.get(name, limit)))
    return differences


def find_cases(folder: Path) -> Iterator[Path]:
    """Case folders of a set, sorted; `folder` may be one case itself."""
    if (folder / "config.json").is_file():
        yield folder
        return
    yield from sorted(path.parent for path in folder.glob("*/config.json"))


def verify(folder: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Run every case of a set, print each quantity's difference and tolerance; True if all are within."""
    cases, passed = list(find_cases(folder)), True
    if not cases:
        raise CaseError(f"{folder}: no */config.json here; give the folder of a golden set")
    for case in cases:
        differences = run_case(case, dtype)
        good = all(difference.passed for difference in differences)
        passed &= good
        print(f"{case.name}: {len(differences)} quantities, {'ok' if good else 'FAILED'}")
        for d in differences:
            print(f"  {'ok  ' if d.passed else 'FAIL'} {d.value:.2e} <= {d.limit:.0e}  {d.name}")
    return passed
