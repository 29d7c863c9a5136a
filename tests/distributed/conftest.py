"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world, function, *args, timeout=60)`: the results of `function(rank, *args)` on gloo ranks, in order."""
    if torch.cuda.is_available():
        pytest.skip('ranks are forked, and a process that has used a GPU cannot be: hide it with CUDA_VISIBLE_DEVICES=""')
    spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run
