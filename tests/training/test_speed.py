"""What the log says of speed: the formula at the 7B's size, and the peak by the device's name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosmos_mp.config import DMD2Config, DMD2Run, KDRun, TeacherRun
from cosmos_mp.training.speed import Speed, device_name

H100, CRITICS = "NVIDIA H100 80GB HBM3", ("fake_score", "discriminator")


@pytest.mark.parametrize(
    ("config", "roles", "petaflop"),
    [
        (KDRun(), ("student",), 7.36),
        (TeacherRun(), ("teacher",), 7.36),
        (DMD2Run(), ("student",), 17.08),
        (DMD2Run(), CRITICS, 12.66),
        (DMD2Run(dmd2=DMD2Config(reconstruction_warmup=9)), ("student",), 7.36),
    ],
)
def test_the_7b_on_128_h100(config, roles, petaflop):
    """At 40 % of the peak: 9.3 s for KD, 21.6 s for a student and 16.0 s for a critic iteration of 64 clips."""
    seconds = {7.36: 9.3, 17.08: 21.6, 12.66: 16.0}[petaflop]
    speed = Speed(config, 512, 128, H100)
    found = speed.of(5, roles, seconds)
    assert found["tokens_per_second"] == pytest.approx(64 * 56_320 / seconds)
    assert found["tflops"] == pytest.approx(64 * petaflop * 1e3 / seconds / 128, rel=2e-3)
    assert found["mfu"] == pytest.approx(0.40, abs=0.002) and found["mfu"] == found["tflops"] / 989
    assert speed.peak == "989 TFLOP/s, NVIDIA H100 80GB HBM3, dense bfloat16"


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        (H100, 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-80GB", None),
        ("cpu", None),
    ],
)
def test_a_peak_goes_by_the_devices_name(device, peak):
    speed = Speed(KDRun(), 512, 1, device)
    assert speed.peak_tflops == peak
    found = speed.of(0, ("student",), 1.0)
    assert ("mfu" in found) is (peak is not None) and {"tokens_per_second", "tflops"} <= set(found)
    if peak is None:
        assert speed.peak == f"no peak known for {device}"


def test_warmed_up_students_pay_for_their_scores():
    config = DMD2Run(dmd2=DMD2Config(reconstruction_warmup=9))
    speed = Speed(config, 512, 128, H100)
    assert speed.of(8, ("student",), 1.0)["tflops"] < 0.5 * speed.of(10, ("student",), 1.0)["tflops"]
    assert speed.of(10, ("student",), 1.0) == replace(speed, config=DMD2Run()).of(0, ("student",), 1.0)


def test_a_cpu_is_named_so():
    assert device_name(torch.device("cpu")) == "cpu"
