# SPDX-License-Identifier: Apache-2.0
"""Every training test starts with an accelerate of its own."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps its state per process; a run of another precision is another process's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
