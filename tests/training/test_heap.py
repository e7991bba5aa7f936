# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays while training, counted in page faults of a process of its own, and is given back after."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from smn_peft.training.heap import held_heap

SCRIPT = """
import json, resource, sys
import torch
from smn_peft.training.heap import held_heap

torch.set_num_threads(1)

def step():
    blocks = [torch.ones(10 * 2**20) for _ in range(2)]
    del blocks

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

with held_heap(sys.argv[1] == "held"):
    faults(3)
    counted, kept = faults(5), resident()
print(json.dumps({"faults": counted, "kept": kept, "after": resident(), "later": faults(5)}))
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")


def measured(how: str) -> dict[str, float]:
    command = [sys.executable, "-c", SCRIPT, how]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@glibc
def test_a_step_faults_no_page_in_again_and_the_memory_is_given_back():
    plain, held = measured("plain"), measured("held")
    pages = 2 * 10 * 2**20 * 4 / 4096
    assert plain["faults"] > pages / 2  # else there is nothing to hold
    assert held["faults"] < pages / 100
    assert held["kept"] - held["after"] > 0.9 * pages * 4096
    assert held["later"] <= 1.1 * plain["faults"]  # as before it


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr("smn_peft.training.heap._glibc", lambda: None)
    with held_heap():
        assert sum(range(4)) == 6
