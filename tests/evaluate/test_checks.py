"""What an evaluation must show: each promise at its bound, on either side of it."""

from __future__ import annotations

import copy
from typing import get_args, get_type_hints

import pytest

from cosmos_mp.config import ConfigError, EvaluateRun
from cosmos_mp.evaluate.checks import CHECKS, call_checks, recipe_checks
from cosmos_mp.evaluate.statistics import Interval

# Every value stands exactly on its bound; where that does not pass (< and >), a step inside it does.
AT_THE_BOUND = {
    "teacher": {"calls": 72, "edge_f1": 0.75, "network_ms": 300.0},
    "teacher 1-step": {"calls": 1, "mse": 2.0, "frechet_latent_pca": 10.0, "frechet_random_conv": 100.0, "texture": 0.5},
    "KD": {"calls": 1, "mse": 1.0, "frechet_latent_pca": 6.0, "frechet_random_conv": 60.0, "edge_f1": 0.75, "texture": 0.75},
    "DMD2": {"calls": 1, "frechet_latent_pca": 6.0, "edge_f1": 0.75, "texture": 0.75, "network_ms": 10.0},
}
# (variant, key, step that worsens it, check, whether the bound itself passes)
PROMISES = [
    ("KD", "mse", 1e-6, "KD / one-step teacher, MSE to the teacher's answer", False),
    ("KD", "frechet_latent_pca", 1e-6, "KD / one-step teacher, Fréchet by latent PCA", False),
    ("KD", "frechet_random_conv", 1e-6, "KD / one-step teacher, Fréchet by random convolution", False),
    ("DMD2", "frechet_latent_pca", 1e-6, "DMD2 / KD, Fréchet by latent PCA", True),
    ("KD", "edge_f1", 1e-6, "DMD2 - KD, edge F1", True),
    ("teacher", "edge_f1", 1e-6, "DMD2 - teacher, edge F1", True),
    ("teacher 1-step", "texture", 1e-6, "one-step teacher, texture / real", False),
    ("KD", "texture", -1e-6, "KD, texture / real", False),
    ("DMD2", "texture", -1e-6, "DMD2, texture / real", False),
    ("DMD2", "network_ms", 1e-6, "DMD2 / teacher, wall time of the network", True),
    ("KD", "calls", 1, "KD, network calls", True),
    ("DMD2", "calls", 1, "DMD2, network calls", True),
]


def verdicts(change: tuple[str, str, float] | None = None) -> dict[str, bool]:
    variants = copy.deepcopy(AT_THE_BOUND)
    if change:
        variant, key, step = change
        variants[variant][key] += step
    return {item["name"]: item["passed"] for item in recipe_checks(variants)}


def test_every_promise_is_named_once():
    assert list(verdicts()) == [name for *_, name, _ in PROMISES]


@pytest.mark.parametrize(("variant", "key", "worse", "name", "bound_passes"), PROMISES, ids=[p[3] for p in PROMISES])
def test_a_promise_holds_up_to_its_bound_and_breaks_beyond(variant, key, worse, name, bound_passes):
    assert verdicts()[name] is bound_passes
    assert verdicts((variant, key, worse))[name] is False
    assert verdicts((variant, key, -worse))[name] is True


def test_what_dmd2_promises_it_promises_of_itself():
    better = verdicts(("DMD2", "edge_f1", 1e-3))
    worse = verdicts(("DMD2", "edge_f1", -1e-3))
    for name in ("DMD2 - KD, edge F1", "DMD2 - teacher, edge F1"):
        assert better[name] and not worse[name]
    assert not verdicts(("DMD2", "frechet_latent_pca", 0.1))["DMD2 / KD, Fréchet by latent PCA"]
    assert verdicts(("teacher", "network_ms", 1.0))["DMD2 / teacher, wall time of the network"]


def test_intervals_count_by_their_value():
    variants = copy.deepcopy(AT_THE_BOUND)
    variants["KD"]["mse"] = Interval(0.9, 0.0, 99.0)
    found = {item["name"]: item for item in recipe_checks(variants)}["KD / one-step teacher, MSE to the teacher's answer"]
    assert (found["value"], found["relation"], found["bound"], found["passed"]) == (0.45, "<", 0.5, True)


def test_call_checks_are_about_students_alone():
    variants = {"teacher": {"calls": 72}, "teacher 1-step": {"calls": 1}, "mine": {"calls": 1}, "slow": {"calls": 2}}
    assert {item["name"]: item["passed"] for item in call_checks(variants)} == {"mine, network calls": True, "slow, network calls": False}
    with pytest.raises(ConfigError, match="--students NAME=WEIGHTS"):
        call_checks({"teacher": {"calls": 72}, "teacher 1-step": {"calls": 1}})


@pytest.mark.parametrize(("variant", "key"), [("KD", None), ("DMD2", "texture"), ("teacher 1-step", "mse")])
def test_a_variant_or_metric_that_is_not_there_is_named(variant, key):
    variants = copy.deepcopy(AT_THE_BOUND)
    if key is None:
        del variants[variant]
    else:
        del variants[variant][key]
    with pytest.raises(ConfigError, match=f"need {key or 'mse'} of a variant named '{variant}'; there are "):
        recipe_checks(variants)


def test_the_option_names_the_checks():
    assert CHECKS["none"]({}) == []
    assert (CHECKS["calls"], CHECKS["recipe"]) == (call_checks, recipe_checks)
    assert set(CHECKS) == set(get_args(get_type_hints(EvaluateRun)["checks"]))
