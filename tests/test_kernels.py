"""Which version of a kernel runs, and that networks and losses give the same numbers with either."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cosmos_mp import kernels
from cosmos_mp.cli import stage
from cosmos_mp.config import KDRun
from cosmos_mp.kernels import KernelError, fused, use, using
from cosmos_mp.kernels.adaln import adaln
from cosmos_mp.kernels.dmd2_loss import Outputs, dmd2_loss
from cosmos_mp.kernels.gan_head import gan_loss, head_logits
from cosmos_mp.kernels.qk_norm_rope import qk_norm_rope
from cosmos_mp.verify import verify


@pytest.fixture(autouse=True)
def as_before():
    with using("auto"):
        yield


@dataclass
class Anywhere:
    """What `fused` looks at."""

    is_cuda: bool
    dtype: torch.dtype


@pytest.mark.parametrize(
    ("choice", "is_cuda", "dtype", "expected"),
    [
        ("auto", False, torch.float32, False),
        ("auto", True, torch.float32, True),
        ("auto", True, torch.bfloat16, True),
        ("auto", True, torch.float64, False),
        ("torch", True, torch.bfloat16, False),
        ("triton", False, torch.float64, True),
    ],
)
def test_the_version_follows_the_choice_and_the_device(choice, is_cuda, dtype, expected):
    with using(choice):
        assert fused(Anywhere(is_cuda, dtype)) is expected


def test_using_ends_with_its_block_also_by_an_error():
    with pytest.raises(RuntimeError), using("triton"):
        raise RuntimeError
    assert not fused(torch.zeros(1))


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    with pytest.raises(KernelError, match="kernels=triton needs a GPU, or TRITON_INTERPRET=1"):
        use("triton")
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(KernelError, match="Triton is not installed: pip install triton"):
        use("triton")
    use("torch")
    use("auto")
    assert not fused(Anywhere(True, torch.float32))  # without Triton torch's operators run


def test_a_stage_takes_the_kernels_of_its_configuration():
    seen = []
    for words, expected in ((["--kernels", "triton"], True), (["--kernels", "torch"], False), ([], False)):
        stage(KDRun, lambda config: seen.append(fused(torch.zeros(1))), ["tiny_kd", *words])
        assert seen.pop() is expected


@pytest.mark.parametrize("case", ["forward", "one_step", "dmd2_step", "dmd2_step_given", "ops"])
def test_golden_cases_hold_with_triton_too(golden, tmp_path, monkeypatch, capsys, case):
    for name in (case, "weights"):
        (tmp_path / name).symlink_to(golden / name)
    launched = []
    for name in ("adaln", "dmd2_loss", "gan_head", "qk_norm_rope"):
        module = __import__(f"cosmos_mp.kernels.{name}", fromlist=["fused"])
        monkeypatch.setattr(module, "fused", lambda x, name=name: launched.append(name) or fused(x))
    with using("triton"):
        assert verify(tmp_path, torch.float32), capsys.readouterr().out
    network = {"adaln", "qk_norm_rope"}
    assert set(launched) == {"forward": network, "one_step": network, "ops": {"dmd2_loss"}}.get(case, network | {"dmd2_loss", "gan_head"})


# --- Second derivatives: silently wrong if a backward pass of Triton were differentiated ---


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def score_difference(y: Tensor) -> Tensor:
    xt, *outputs = draw(4, *y.shape)
    return dmd2_loss(y, xt, Outputs(*outputs), torch.ones(1), torch.ones(1), 5.0, lambda error_BT: error_BT)[0]


CALLS = {
    "adaln": ((3, 2, 4), lambda h: adaln(h, draw(3, 2, 4), *draw(3, 2, 4))[1]),
    "dmd2_loss": ((1, 2, 1, 3, 4), score_difference),
    "head_logits": ((1, 8, 1, 2, 3), lambda x: head_logits(x, *draw(3, 8), draw(1))),
    "gan_loss": ((4,), lambda logits: gan_loss(logits, 2)),
    "qk_norm_rope": ((3, 1, 2, 4), lambda x: qk_norm_rope(x, draw(4))),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name):
    size, call = CALLS[name]
    x = draw(*size).requires_grad_()
    with using("triton"):
        (gradient,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
    assert gradient.abs().max() > 0
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
