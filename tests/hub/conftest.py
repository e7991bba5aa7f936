# SPDX-License-Identifier: Apache-2.0
"""A local Hub per test that the real client talks to, and small adapters to push."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

from smn_peft.hub import push
from tests.hub.server import serving
from tests.hub.state import TOKEN, LocalHub


@pytest.fixture
def waits() -> list[float]:
    """Seconds that the client, or the package, would have slept."""
    return []


@pytest.fixture
def hub(waits, monkeypatch, tmp_path) -> Iterator[LocalHub]:
    """An empty Hub; the client in this process takes it for the real one, logged in as its user "user".

    The client reads its environment on import, so its constants are set here, as HF_ENDPOINT, HF_HOME,
    HF_HUB_OFFLINE=0 and HF_HUB_DISABLE_XET=1 would set them.
    """
    with serving() as local:
        for name, value in {
            "ENDPOINT": local.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": local.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", local.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        clock = types.SimpleNamespace(sleep=waits.append)
        for module in (_http, file_download, push):
            monkeypatch.setattr(module, "time", clock)
        _http.close_session()
        yield local
        _http.close_session()
