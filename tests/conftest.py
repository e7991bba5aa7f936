# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: no network, fixed seeds, a fair share of the cores, and the folder of real weights."""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when the libraries are imported, so set before any of them is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, min(4, (os.cpu_count() or 1) // _WORKERS))
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
if os.environ.get("SMN_ASSETS"):  # examples run from other folders
    os.environ["SMN_ASSETS"] = os.path.abspath(os.path.expanduser(os.environ["SMN_ASSETS"]))

import jinja2
import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the `assets` fixture, so that `-m assets` and `-m "not assets"` pick it."""
    for item in items:
        if "assets" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.assets)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state per process; a run of another precision is another process's."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _no_waste() -> Iterator[None]:
    """Spare what libraries do thousands of times here: together a sixth of all the time.

    huggingface_hub compiles the template of PEFT's card at every save, and torch keeps the call stack of every seeding
    for each kind of accelerator that is not there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.cache(jinja2.Environment.compile))
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and images named by SMN_ASSETS; without the variable the test is skipped."""
    name = os.environ.get("SMN_ASSETS")
    if not name:
        pytest.skip("SMN_ASSETS is unset: it names the folder of real weights and images that this test reads")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"SMN_ASSETS names {folder}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def run_make() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call make in the project's root, free of what a make around the tests hands down."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environ = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *args], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)

    return run
