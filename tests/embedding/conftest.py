# SPDX-License-Identifier: Apache-2.0
"""A finished run, with its base and its dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from smn_peft.training import run
from tests.training.tiny import tiny_arguments


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """Folder of the base (``model.py``), the dataset (``set.npz``) and the run (``out``)."""
    folder = tmp_path_factory.mktemp("embedding")
    run(tiny_arguments(folder, mask={"batch_norm": "adapt"}, max_steps=3))
    AcceleratorState._reset_state(reset_partial_state=True)
    model = folder / "model.py"  # for an adapter without run.json, which has the seed
    model.write_text(model.read_text().replace("# Unseeded", "import torch; torch.manual_seed(0)  #", 1))
    return folder
