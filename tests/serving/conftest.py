# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, shared by all tests of serving."""

from __future__ import annotations

import pytest

from tests.serving.tiny import save_adapters


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder of adapters' folders, and logits and features by task."""
    root = tmp_path_factory.mktemp("served")
    return root, *save_adapters(root)
