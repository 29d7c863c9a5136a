"""What an evaluation must show to count as a success."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cosmos_mp.config import ConfigError
from cosmos_mp.evaluate.report import check

Variants = dict[str, dict[str, Any]]


def _value(variants: Variants, name: str, key: str) -> float:
    try:
        value = variants[name][key]
    except KeyError:
        raise ConfigError(f"these checks need {key} of a variant named {name!r}; there are {', '.join(variants)}") from None
    return float(getattr(value, "value", value))


def check_variants(checks: str, names: list[str]) -> None:
    """Refuse checks about variants that are not evaluated, before anything is evaluated.

    Raises:
        ConfigError: a variant is missing; the message names it.
    """
    needed = {"none": [], "calls": [], "recipe": ["KD", "DMD2"]}[checks]
    missing = [name for name in needed if name not in names]
    if missing or (checks == "calls" and len(names) < 3):
        what = f"a student named {missing[0]}" if missing else "a student"
        raise ConfigError(f"checks={checks} needs {what}: give --students NAME=WEIGHTS ...")


def call_checks(variants: Variants) -> list[dict[str, Any]]:
    """Every student needs one network call."""
    students = [name for name in variants if name not in ("teacher", "teacher 1-step")]
    if not students:
        raise ConfigError("these checks are about students: give --students NAME=WEIGHTS")
    return [check(f"{name}, network calls", _value(variants, name, "calls"), "<=", 1) for name in students]


def recipe_checks(variants: Variants) -> list[dict[str, Any]]:
    """What the tiny recipe promises: KD follows the teacher, DMD2 improves on KD, texture comes back, one call is fast."""

    def ratio(key: str, of: str, to: str) -> float:
        return _value(variants, of, key) / _value(variants, to, key)

    one_step, f1 = "teacher 1-step", "edge_f1"
    return [
        check("KD / one-step teacher, MSE to the teacher's answer", ratio("mse", "KD", one_step), "<", 0.5),
        check("KD / one-step teacher, Fréchet by latent PCA", ratio("frechet_latent_pca", "KD", one_step), "<", 0.6),
        check("KD / one-step teacher, Fréchet by random convolution", ratio("frechet_random_conv", "KD", one_step), "<", 0.6),
        check("DMD2 / KD, Fréchet by latent PCA", ratio("frechet_latent_pca", "DMD2", "KD"), "<=", 1.0),
        check("DMD2 - KD, edge F1", _value(variants, "DMD2", f1) - _value(variants, "KD", f1), ">=", 0.0),
        check("DMD2 - teacher, edge F1", _value(variants, "DMD2", f1) - _value(variants, "teacher", f1), ">=", 0.0),
        check("one-step teacher, texture / real", _value(variants, one_step, "texture"), "<", 0.5),
        check("KD, texture / real", _value(variants, "KD", "texture"), ">", 0.75),
        check("DMD2, texture / real", _value(variants, "DMD2", "texture"), ">", 0.75),
        check("DMD2 / teacher, wall time of the network", ratio("network_ms", "DMD2", "teacher"), "<=", 1 / 30),
        *call_checks(variants),
    ]


CHECKS: dict[str, Callable[[Variants], list[dict[str, Any]]]] = {
    "none": lambda variants: [],
    "calls": call_checks,
    "recipe": recipe_checks,
}
