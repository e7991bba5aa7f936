# SPDX-License-Identifier: Apache-2.0
"""A server over a bank on disk: lookups are counted once, and another process's writing is said, not a failure."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from smn_peft.bank.bank import MaskBank
from smn_peft.bank.store import StoreBusyError
from smn_peft.serving.app import build_app
from smn_peft.serving.service import Service
from tests.serving.running import form
from tests.serving.tiny import DENSITIES, IMAGES, KEY, URL, backbone

BEARER = {"Authorization": f"Bearer {KEY}".encode()}


@pytest.fixture
def stored(saved, tmp_path):
    """The path of a bank, and makes a service over it."""
    path = tmp_path / "bank"
    with MaskBank.open(path, backbone().model) as bank:
        for name in DENSITIES:
            bank.add(name, saved[0] / name)

    def make(**options):
        served = backbone()
        return Service(MaskBank.open(path, served.model, exclusive=True, **options), served, max_wait=0)

    return path, make


def listed(client):
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def predict(client, *tasks):
    body, headers = form(IMAGES[0], tasks)
    response = client.post("/v1/predict", content=body, headers=headers)
    assert response.status_code == 200, response.text


def test_a_lookup_is_counted_once(stored):
    service = stored[1]()
    with TestClient(build_app(service), URL) as client:
        predict(client, "birds")
        assert (service.bank.stats.misses, service.bank.stats.hits) == (1, 0)
        for _ in range(3):
            predict(client, "birds")
        predict(client, "ships")
        assert (service.bank.stats.misses, service.bank.stats.hits) == (2, 3)


def test_without_a_budget_a_task_is_decoded_once_per_batch(stored):
    service = stored[1](ram_budget=0)
    with TestClient(build_app(service), URL) as client:
        for _ in range(3):
            predict(client, "birds")
        assert (service.bank.stats.misses, service.bank.stats.evictions) == (3, 3)


def test_while_another_writes_changes_are_put_off(stored, saved, monkeypatch):
    service = stored[1]()

    def busy(*_, **__):
        raise StoreBusyError("locked")

    new = {"name": "new", "folder": str(saved[0] / "birds")}
    with TestClient(build_app(service, api_key=KEY), URL) as client:
        with monkeypatch.context() as patched:
            patched.setattr(service.bank, "add", busy)
            patched.setattr(service.bank, "remove", busy)
            for answer in (
                client.post("/v1/models", json=new, headers=BEARER),
                client.delete("/v1/models/birds", headers=BEARER),
            ):
                assert answer.status_code == 503, answer.text
                assert answer.json() == {
                    "error": "Another process writes to the bank.",
                    "fix": "Nothing was changed: try again when it is done.",
                }
                assert int(answer.headers["retry-after"]) > 0
            predict(client, "birds")
        assert listed(client) == sorted(DENSITIES)
        assert client.post("/v1/models", json=new, headers=BEARER).status_code == 201
        assert client.delete("/v1/models/birds", headers=BEARER).status_code == 200
        assert listed(client) == ["new", "ships", "weather"]
