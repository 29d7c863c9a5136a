"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world, function, *args, timeout=60)`: the results of `function(rank, *args)` on gloo ranks, in order."""
    if torch.cuda.is_available():
        pytest.skip('ranks are forked, and a process that has used a GPU cannot be: hide it with CUDA_VISIBLE_DEVICES=""')
    return _beside("ranks").run


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """Small runs of KD and DMD2 on any layout: the module `runs` beside this file."""
    return _beside("runs")


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
