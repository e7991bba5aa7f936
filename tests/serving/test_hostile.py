# SPDX-License-Identifier: Apache-2.0
"""Requests made to stop the server: each is refused in little time, and says why."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from dataclasses import replace

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors import safe_open
from safetensors.torch import save_file

from smn_peft.serving.app import build_app
from smn_peft.serving.batching import Workers
from smn_peft.serving.limits import Budget, Limits, limited
from smn_peft.storage.adapter_config import CONFIG_NAME
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from tests.data.test_decoding import POSTSCRIPT, scanned
from tests.serving.running import form
from tests.serving.test_app import BEARER, bomb, close, files, refused
from tests.serving.tiny import IMAGES, KEY, URL, image, service

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def served(saved):
    return service(saved[0], limits=Limits(timeout=20, classes=1000))


@pytest.fixture(scope="module")
def client(served):
    with TestClient(build_app(served, api_key=KEY), URL) as client:
        client.post("/v1/predict", **files(IMAGES[0], "ships"))
        yield client


@pytest.fixture
def quickly():
    began = time.process_time()
    yield
    assert time.process_time() - began < 2.0


def test_no_text_but_utf_8(client, quickly):
    body = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\na-' + b"b" * 1_000_000 + b"\r\n--x--\r\n"
    for charset in ("punycode", "IDNA", '"punycode"', "utf-7", "utf-16", "unicode_escape", "hex"):
        for kind in ("multipart/form-data; boundary=x", "application/json"):
            answer = client.post("/v1/predict", content=body, headers={"Content-Type": f"{kind}; charset={charset}"})
            refused(answer, 415, "charset", "UTF-8")


def test_utf_8_may_be_named(client):
    body, headers = form(IMAGES[0], ["ships"])
    for charset in ("utf-8", '"UTF-8"', "utf8"):
        headers = {"Content-Type": f"multipart/form-data; boundary=xyz; charset={charset}"}
        assert client.post("/v1/predict", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"[" * 10_000_000, 422, "more than 10000 parts"),
        (b'{"image":"x","x":[' + b"[]," * 3_000_000 + b"1]}", 422, "more than 10000 parts"),
        (b'{"image":"x","task":[' + b'"a",' * 2_000_000 + b'"a"]}', 422, "more than 10000 parts"),
        (b"{" + b'"a":{' * 5_000, 400, "no JSON"),
        (b'{"image":"x","top":' + b"9" * 9_000_000 + b"}", 400, "no JSON"),
    ],
)
def test_json_made_to_take_long(client, quickly, body, status, error):
    refused(client.post("/v1/predict", content=body, headers=JSON), status, error)


def test_top_is_a_number_of_classes(client):
    for top in ("Infinity", "-Infinity", "NaN", "1e400", "0", "1001", "1.5", '"x"', "[]", "null"):
        body = f'{{"image": "{base64.b64encode(IMAGES[0]).decode()}", "task": "ships", "top": {top}}}'
        answer = client.post("/v1/predict", content=body, headers=JSON)
        assert answer.status_code in (400, 422), (top, answer.text)
        assert answer.json()["fix"]


def test_what_is_too_long_or_half_a_character_is_no_failure_of_the_server(client, saved):
    picture = base64.b64encode(IMAGES[0]).decode()
    for body in ('"task": "\\ud800"', '"task": ["ships", "\\udfff"]', '"task": "ships", "x": "\\ud800"'):
        answer = client.post("/v1/predict", content=f'{{"image": "{picture}", {body}}}', headers=JSON)
        refused(answer, 422, "half a character")
    refused(client.post("/v1/predict", json={"image": picture, "task": "a" * 5000}), 422, "1000 characters")
    refused(client.get("/v1/models/" + "a" * 5000), 422, "name")
    refused(client.get("/v1/models?q=" + "a" * 5000), 422, "q")
    for body in (
        {"hub_id": "a/" + "b" * 5000},
        {"hub_id": "a/b", "revision": "c" * 5000},
        {"folder": "/" + "d" * 3000},
        {"folder": "e/" * 3000},
        {"folder": "/dev/null/x"},
        {"folder": "a\0b"},
        {"folder": str(saved[0] / "ships"), "classes": ["f" * 5000]},
        {"config": "no file", "weights": "no file"},
    ):
        answer = client.post("/v1/models", json={"name": "x", **body}, headers=BEARER)
        assert answer.status_code == 422, (body, answer.text)
    assert client.get("/v1/models").json()["total"] == 3


def test_other_sites_pages_may_not_ask(saved):
    app = build_app(service(saved[0]), allowed_hosts=["models.example", "*.lan.example", ""])
    for headers, passes in (
        ({"Host": "localhost:8000"}, True),
        ({"Host": "127.0.0.1:8000"}, True),
        ({"Host": "192.168.0.7"}, True),
        ({"Host": "[::1]:8000"}, True),
        ({"Host": "models.example"}, True),
        ({"Host": "a.lan.example:80"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "localhost.evil.example"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Host": "lan.example.evil"}, False),
        ({"Host": "[::1"}, False),
        ({"Host": ""}, False),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, True),
        ({"Host": "10.0.0.1", "Origin": "https://models.example"}, True),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, False),
        ({"Host": "localhost:8000", "Origin": "http://evil.example"}, False),
        ({"Host": "localhost:8000", "Origin": "null"}, False),
        ({"Host": "localhost:8000", "Origin": "http://evil.example#models.example"}, False),
    ):
        client = TestClient(app, URL)
        answer = client.post("/v1/predict", **files(IMAGES[0], "ships"), headers=headers)
        if passes:
            assert answer.status_code == 200, answer.text
        else:
            refused(answer, 403, "page of" if "Origin" in headers else "not called", "--allowed-hosts")
        assert client.get("/healthz", headers=headers).status_code == 200


def test_the_check_of_hosts_can_be_turned_off(saved):
    with TestClient(build_app(service(saved[0]), allowed_hosts=["*"]), "http://evil.example") as client:
        answer = client.post("/v1/predict", **files(IMAGES[0], "ships"), headers={"Origin": "http://other.example"})
        assert answer.status_code == 200


def test_answers_grow_with_no_number_of_classes(client, served, monkeypatch):
    names = {str(index): "n" * 100_000 if index == 3 else f"class {index}" for index in range(500_000)}
    task = served.bank.task("ships")
    many = replace(task, info={**task.info, "id2label": names})
    monkeypatch.setattr(served.bank, "task", lambda name: many)
    began = time.process_time()
    for _ in range(3):
        found = client.post("/v1/predict", **files(IMAGES[0], "ships")).json()["results"][0]["top"]
        assert [entry["label"] for entry in found if entry["index"] == 2] == ["class 2"]
        facts = client.get("/v1/models/ships").json()
    assert time.process_time() - began < 1.0
    assert [len(name) for name in facts["labels"]] == [7, 7, 7, 1000]


def test_logits_of_many_classes_are_not_given(saved):
    with TestClient(build_app(service(saved[0], limits=Limits(classes=3))), URL) as client:
        refused(client.post("/v1/predict", **files(IMAGES[0], "ships", logits="1")), 422, "has 4 classes", "'top'")
        assert client.post("/v1/predict", **files(IMAGES[0], "ships")).status_code == 200


def test_a_large_image_keeps_only_large_ones_waiting(client, served, saved, monkeypatch):
    """While the thread for large images is busy, small ones are answered and tasks are listed."""
    go, busy = threading.Event(), threading.Event()
    monkeypatch.setattr(served, "_large", Workers(1, "test"))
    large = image(0, (2100, 2000), "JPEG", quality=5)
    answers = []
    asyncio.run(_put(served._large, lambda: (busy.set(), go.wait(20))))
    assert busy.wait(10)
    asking = threading.Thread(target=lambda: answers.append(client.post("/v1/predict", **files(large, "ships"))))
    asking.start()
    try:
        for _ in range(3):
            assert client.post("/v1/predict", **files(IMAGES[0], "ships")).status_code == 200
            assert client.get("/v1/models").status_code == 200
        assert answers == []
    finally:
        go.set()
        asking.join(20)
    assert answers[0].status_code == 200


async def _put(workers, function):
    task = asyncio.ensure_future(workers.run(function))
    await asyncio.sleep(0.1)
    task.cancel()


def test_hostile_images_are_refused(client, quickly):
    refused(client.post("/v1/predict", **files(scanned(2000, 3000), "ships")), 422, "scans")
    refused(client.post("/v1/predict", **files(POSTSCRIPT, "ships")), 415, "known format")
    refused(client.post("/v1/predict", **files(image(0, kind="TIFF"), "ships")), 415, "known format")
    refused(client.post("/v1/predict", **files(bomb(5001, 5000), "ships")), 413, "more than 25000000")


def test_bodies_are_bounded_together():
    class Half:
        headers, scope = {}, {"type": "http"}

        async def receive(self):
            return {"type": "http.request", "body": bytes(60), "more_body": True}

    bodies = Budget(100)
    with limited(Half(), 1000, 1, bodies) as first:
        asyncio.run(first.receive())
        with pytest.raises(Exception, match="Too many requests"), limited(Half(), 1000, 1, bodies) as second:
            asyncio.run(second.receive())
        assert bodies.held == 60
    assert bodies.held == 0


def test_an_adapter_that_masks_and_brings_a_weight_is_refused(client, saved, tmp_path):
    config, weights = (saved[0] / "ships" / name for name in (CONFIG_NAME, WEIGHTS_NAME))
    with safe_open(weights, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    masked = next(key for key in tensors if "blocks.0.attn.qkv" in key)
    whole = {masked.rpartition(".")[0] + ".weight": torch.zeros(96, 32)}
    save_file(tensors | whole, tmp_path / "weights", metadata=metadata)
    parts = {"config": ("c", config.read_bytes()), "weights": ("w", (tmp_path / "weights").read_bytes())}
    answer = client.post("/v1/models", files={**parts, "name": (None, "both")}, headers=BEARER)
    refused(answer, 422, "not added")
    assert "qkv" in answer.json()["error"]
    for task in ("ships", "birds"):
        (result,) = client.post("/v1/predict", **files(IMAGES[0], task, logits="1")).json()["results"]
        close(result["logits"], saved[1][task][0])
