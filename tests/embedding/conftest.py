# SPDX-License-Identifier: Apache-2.0
"""A finished run, with its base and its dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import finished_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """Folder of the base (``model.py``), the dataset (``set.npz``) and the run (``out``)."""
    return finished_run(tmp_path_factory.mktemp("embedding"), mask={"batch_norm": "adapt"}, max_steps=3)
