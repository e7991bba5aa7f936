# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, shared by all tests of serving, which are skipped without the extra ``serve``."""

from __future__ import annotations

import pytest

for needed in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(needed, reason="needs the extra serve")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder of adapters' folders, and logits and features by task."""
    from tests.serving.tiny import save_adapters

    root = tmp_path_factory.mktemp("served")
    return root, *save_adapters(root)
