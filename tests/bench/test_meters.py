"""Meters of memory against allocations of known size."""

from __future__ import annotations

import subprocess
import sys

import torch

from cosmos_mp.bench.meters import TensorMemory

MB = 2**20


def test_the_peak_of_tensors_counts_what_is_there_at_once():
    before = torch.zeros(MB)
    with TensorMemory() as meter:
        first = torch.zeros(3 * MB, dtype=torch.uint8)
        del first
        second = torch.zeros(2 * MB, dtype=torch.uint8)
        third = torch.zeros(2 * MB, dtype=torch.uint8)
        del second, third
        torch.zeros(MB, dtype=torch.uint8)
    assert before.numel() == MB
    assert 4 * MB <= meter.peak < 4.1 * MB


def test_the_peak_of_a_process_is_that_since_the_start():
    # In a process of its own, that gives freed memory back.
    code = """
import numpy
from cosmos_mp.bench.meters import ProcessMemory
numpy.ones(200 * 2**20, numpy.uint8)
meter = ProcessMemory()
kept = numpy.ones(20 * 2**20, numpy.uint8)
numpy.ones(30 * 2**20, numpy.uint8)
print(meter.read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert 49 * MB < int(done.stdout) < 60 * MB
