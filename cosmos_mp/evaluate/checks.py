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


def speed_checks(variants: Variants) -> list[dict[str, Any]]:
    """One call against the teacher's 72, network alone."""
    last = [name for name in variants if name not in ("teacher", "teacher 1-step", "real")]
    if not last:
        raise ConfigError("the speed check needs a student: give --students NAME=WEIGHTS")
    ratio = _value(variants, last[-1], "network_ms") / _value(variants, "teacher", "network_ms")
    calls = _value(variants, last[-1], "calls")
    return [
        check("network calls of the student", calls, "<=", 1),
        check("wall time of one call / the teacher's calls", ratio, "<=", 1 / 30),
    ]


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
        *speed_checks({name: variants[name] for name in ("teacher", "DMD2")}),
    ]


CHECKS: dict[str, Callable[[Variants], list[dict[str, Any]]]] = {
    "none": lambda variants: [],
    "speed": speed_checks,
    "recipe": recipe_checks,
}
