# SPDX-License-Identifier: Apache-2.0
"""The routes: every answer is the task's own, and every refusal has its status, a reason and a remedy."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import pickle
import re
import shlex
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import Match

from smn_peft.bank.bank import MaskBank
from smn_peft.bank.source import MemorySource
from smn_peft.serving.app import build_app, key_from
from smn_peft.serving.limits import Limits
from smn_peft.storage.adapter_config import CONFIG_NAME
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from smn_peft.storage.files import AdapterFileError
from tests.serving.tiny import DENSITIES, IMAGES, KEY, NAMES, URL, image, service

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(body_bytes=200_000, pixels=1_000_000, samples=3, timeout=20)
BEARER = {"Authorization": f"Bearer {KEY}".encode()}


def as_documented(app):
    """A hook that holds every answer against what the OpenAPI schema says of its route and status."""

    def check(response):
        scope = {"type": "http", "path": response.request.url.path, "method": response.request.method}
        for route in app.routes:
            if isinstance(route, APIRoute) and route.matches(scope)[0] is Match.FULL and route.include_in_schema:
                good = response.status_code == route.status_code or response.status_code == 200
                model = route.response_model if good else route.responses[response.status_code]["model"]
                response.read()
                if model is not None:
                    model.model_validate_json(response.content)

    return check


def listed(client, query=""):
    return [model["id"] for model in client.get(f"/v1/models{query}").json()["data"]]


@contextmanager
def connected(saved, **options):
    app = build_app(service(saved[0], limits=LIMITS), **options)
    with TestClient(app, URL) as client:
        client.event_hooks = {"response": [as_documented(app)]}
        yield client


@pytest.fixture(scope="module")
def client(saved):
    """A client; a test that changes the tasks changes them back."""
    with connected(saved, api_key=KEY) as client:
        yield client
        assert listed(client) == sorted(DENSITIES)


def test_the_schema_says_what_every_route_takes_and_answers(client):
    schema = client.get("/openapi.json").json()
    routes = {(path, method): route for path, found in schema["paths"].items() for method, route in found.items()}
    assert sorted(f"{method} {path}" for path, method in routes) == [
        "delete /v1/models/{name}",
        "get /healthz",
        "get /metrics",
        "get /v1/models",
        "get /v1/models/{name}",
        "post /v1/embeddings",
        "post /v1/models",
        "post /v1/predict",
    ]
    for (path, method), route in routes.items():
        assert route["summary"]
        assert route["description"]
        for status, answer in route["responses"].items():
            ((kind, content),) = answer["content"].items()
            if path != "/metrics" or status != "200":
                name = content["schema"]["$ref"].rpartition("/")[2]
                assert kind == "application/json"
                assert (name == "Error") == (status >= "400" and (path, status) != ("/healthz", "503"))
        assert {"403", "500", "503", "504"} <= set(route["responses"])
        assert (
            ("401" in route["responses"]) == ("security" in route) == (path[:10] == "/v1/models" and method != "get")
        )
        if method == "post":
            assert {"400", "413", "415", "422"} <= set(route["responses"])
            for kind in ("multipart/form-data", "application/json"):
                body = route["requestBody"]["content"][kind]["schema"]
                required = {"/v1/models": ["name"], "/v1/embeddings": ["model", "input"]}
                assert body["required"] == required.get(path, ["image", "task"])
    assert set(schema["components"]["securitySchemes"]) == {"APIKeyHeader", "HTTPBearer"}
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert client.get("/docs").status_code == 200


def files(data, *tasks, **fields):
    parts = [("image", ("x.png", data))] + [("task", (None, task)) for task in tasks]
    return {"files": parts + [(key, (None, str(value))) for key, value in fields.items()]}


def refused(response, status, error, fix=""):
    body = response.json()
    assert (response.status_code, sorted(body)) == (status, ["error", "fix"]), response.text
    assert error in body["error"], body
    assert body["fix"]
    assert fix in body["fix"], body


def close(actual, expected):
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=1e-4, atol=1e-4)


def test_predict_gives_each_task_its_own_logits_and_names(client, saved):
    _, logits, _ = saved
    for index, data in enumerate(IMAGES):
        answer = client.post("/v1/predict", **files(data, *DENSITIES, logits="true", top=3)).json()
        assert [result["task"] for result in answer["results"]] == list(DENSITIES)
        for result in answer["results"]:
            expected = logits[result["task"]][index]
            close(result["logits"], expected)
            best = expected.softmax(0).topk(3)
            assert [entry["index"] for entry in result["top"]] == best.indices.tolist()
            close([entry["probability"] for entry in result["top"]], best.values)
            names = NAMES[result["task"]] or ["0", "1", "2", "3"]
            assert [entry["label"] for entry in result["top"]] == [names[i] for i in best.indices]
            assert result["latency_ms"]["model"] > 0
    for text in (base64.b64encode(data).decode(), "data:image/png;base64," + base64.b64encode(data).decode()):
        for tasks in ({"task": "ships"}, {"tasks": ["ships"]}):
            (result,) = client.post("/v1/predict", json={"image": text, "logits": True, **tasks}).json()["results"]
            close(result["logits"], logits["ships"][3])


def data_url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("model", "task"),
    [("ships", "ships"), ("tiny ViT:ships", "ships"), ("tiny ViT", "__base__"), ("__base__", "__base__")],
)
def test_embeddings_are_the_features_of_a_task_or_of_the_base(client, saved, model, task):
    features = saved[2][task]
    asked = {"model": model, "input": [data_url(data) for data in IMAGES[:3]]}
    answer = client.post("/v1/embeddings", json=asked).json()
    assert (answer["object"], answer["model"], answer["usage"]["total_tokens"]) == ("list", model, 0)
    assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    close([each["embedding"] for each in answer["data"]], features[:3])
    (coded,) = client.post(
        "/v1/embeddings", json={"model": model, "input": data_url(IMAGES[3]), "encoding_format": "base64"}
    ).json()["data"]
    close(np.frombuffer(base64.b64decode(coded["embedding"]), "<f4").tolist(), features[3])
    form = {"files": {"input": ("x.png", IMAGES[1]), "model": (None, model)}}
    close(client.post("/v1/embeddings", **form).json()["data"][0]["embedding"], features[1])


def test_embeddings_that_cannot_be_given(client):
    one = data_url(IMAGES[0])
    for asked, status, error, fix in (
        ({"model": "bird", "input": one}, 404, "no task 'bird'", "birds"),
        ({"model": "tiny ViT:bird", "input": one}, 404, "no task 'bird'", "birds"),
        ({"input": one}, 422, "'model' is missing", "base:task"),
        ({"model": "birds", "input": "a photo of a bird"}, 422, "base64", "data URLs"),
        ({"model": "birds", "input": []}, 422, "'input'", "data URLs"),
        ({"model": "birds", "input": [one] * 4}, 422, "4 images", "3 at a time"),
        ({"model": "birds", "input": [one, data_url(IMAGES[0][:-2000])]}, 422, "cannot be read", ""),
        ({"model": "birds", "input": one, "dimensions": 8}, 422, "'dimensions'", "whole"),
    ):
        refused(client.post("/v1/embeddings", json=asked), status, error, fix)


def test_predicting_without_a_head_names_embed(client):
    refused(client.post("/v1/predict", **files(IMAGES[0], "__base__")), 422, "no classes", "/v1/embeddings")
    mixed = client.post("/v1/predict", **files(IMAGES[0], "__base__", "ships")).json()["results"]
    assert mixed[0]["status"] == 422
    assert "top" in mixed[1]


def test_other_formats_are_read(client):
    for kind in ("JPEG", "WEBP", "GIF", "BMP"):
        assert client.post("/v1/predict", **files(image(0, kind=kind), "ships")).status_code == 200


def test_questions_that_cannot_be_answered(client):
    refused(client.post("/v1/predict", **files(IMAGES[0], "bird")), 404, "no task 'bird'", "birds")
    refused(
        client.post("/v1/predict", **files(b"GIF89a, or not", "birds")),
        415,
        "known format (JPEG,",
        "Send an image",
    )
    refused(
        client.post("/v1/predict", **files(image(0, kind="TIFF"), "birds")),
        415,
        "format (JPEG, PNG, WEBP, GIF, BMP)",
    )
    refused(client.post("/v1/predict", **files(IMAGES[0][:-2000], "birds")), 422, "cannot be read")
    refused(client.post("/v1/predict", **files(IMAGES[0])), 422, "'task' is missing", "GET /v1/models")
    refused(client.post("/v1/predict", files={"task": (None, "birds")}), 422, "'image' is missing", "base64")
    refused(client.post("/v1/predict", **files(IMAGES[0], "a", "b", "c", "d")), 422, "4 tasks", "3 at a time")
    refused(client.post("/v1/predict", **files(IMAGES[0], "birds", top="many")), 422, "'top'")
    refused(client.post("/v1/predict", json={"image": "???", "task": "birds"}), 422, "base64")
    refused(client.post("/v1/predict", json=[]), 422, "object")
    half = {"image": base64.b64encode(IMAGES[0]).decode(), "task": "\ud800"}
    half = {"content": json.dumps(half), "headers": {"Content-Type": "application/json"}}
    refused(client.post("/v1/predict", **half), 422, "The body holds half a character")
    broken = {"content": "[" * 100_000, "headers": {"Content-Type": "application/json"}}
    refused(client.post("/v1/predict", **broken), 422, "more than 10000 parts")
    broken["content"] = "[" * 1000
    refused(client.post("/v1/predict", **broken), 400, "no JSON")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(client.post("/v1/predict", content="no boundary", headers=form), 400, "broken")
    form = {"Content-Type": "multipart/form-data"}
    refused(client.post("/v1/predict", content="no boundary", headers=form), 400, "broken")
    refused(client.post("/v1/predict", content=IMAGES[0]), 415, "not said")
    refused(client.get("/v1/predict"), 405, "Not Allowed")
    refused(client.get("/v2"), 404, "Not Found")
    refused(client.get("/v1/models?limit=x"), 422, "limit")


def test_what_is_too_large_is_refused_before_it_is_read_or_decoded(client):
    noise = image(0, (500, 400))
    assert len(noise) > LIMITS.body_bytes
    refused(client.post("/v1/predict", **files(noise, "birds")), 413, "larger than 200000")
    chunks = (noise[start : start + 1000] for start in range(0, len(noise), 1000))  # without a length
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(client.post("/v1/predict", content=chunks, headers=form), 413, "larger than 200000")
    refused(client.post("/v1/predict", **files(bomb(40_000, 40_000), "birds")), 413, "pixels")
    refused(client.post("/v1/predict", **files(bomb(1200, 900), "birds")), 413, "900 pixels are more than 1000000")
    refused(client.post("/v1/predict", **files(bomb(100_000, 4), "birds")), 422, "strip of 100000 × 4")
    assert client.post("/v1/predict", **files(image(0, (200, 10)), "birds")).status_code == 200
    refused(client.post("/v1/predict", **files(image(0, (201, 10)), "birds")), 422, "strip")


def test_a_body_of_many_small_pieces_is_bounded_as_a_whole(client):
    """Over ASGI itself: the test client sends one piece, whatever it is given."""
    start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
    pieces, answer = iter([start] + [bytes(1000)] * 1000), []

    async def receive():
        return {"type": "http.request", "body": next(pieces), "more_body": True}

    async def send(message):
        answer.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "headers": headers}
    scope |= {"http_version": "1.1", "scheme": "http", "root_path": "", "server": ("localhost", 80)}
    asyncio.run(client.app(scope, receive, send))
    assert answer[0]["status"] == 413
    assert len(list(pieces)) == 1000 - LIMITS.body_bytes // 1000  # the rest was not read


def bomb(width, height):
    """A PNG of a few hundred bytes that says it is large; decoding it would fail."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_tasks_are_listed_searched_and_described(client, saved):
    answer = client.get("/v1/models").json()
    facts = {key: answer[key] for key in ("object", "has_more", "total", "base", "image_size")}
    assert facts == {"object": "list", "has_more": False, "total": 3, "base": "tiny ViT", "image_size": 32}
    assert {model["object"] for model in answer["data"]} == {"model"}
    assert {model["parent"] for model in answer["data"]} == {"tiny ViT"}
    assert listed(client) == sorted(DENSITIES)
    assert listed(client, "?q=HIP") == ["ships"]
    assert (listed(client, "?after=birds&limit=1"), listed(client, "?after=weather")) == (["ships"], [])
    assert client.get("/v1/models?limit=2").json()["has_more"] is True
    client.post("/v1/predict", **files(IMAGES[0], "weather"))
    assert "weather" in listed(client, "?resident=true")
    assert listed(client, "?resident=true&q=HIPS") in ([], ["ships"])
    facts = client.get("/v1/models/birds").json()
    assert facts["id"] == "birds"
    assert facts["labels"] == NAMES["birds"]
    assert facts["classes"] == 4
    assert facts["density"] == pytest.approx(0.999, abs=0.002)
    refused(client.get("/v1/models/shops"), 404, "no task 'shops'", "ships")


def test_writing_takes_the_key(client, saved):
    folder = {"name": "new", "folder": str(saved[0] / "ships")}
    refused(client.post("/v1/models", json=folder), 401, "No API key")
    refused(client.post("/v1/models", json=folder, headers={"X-API-Key": "sesame"}), 401, "another")
    wrong = client.delete("/v1/models/ships", headers={"Authorization": "Bearer open"})
    refused(wrong, 401, "another", "Bearer")
    assert wrong.headers["www-authenticate"] == "Bearer"
    refused(client.delete("/v1/models/ships", headers={"Authorization": f"Basic {KEY}".encode()}), 401, "No API key")
    with connected(saved) as closed:
        refused(closed.post("/v1/models", json=folder, headers=BEARER), 403, "takes no changes", "--api-key-env")
        refused(closed.delete("/v1/models/ships", headers=BEARER), 403, "takes no changes")
    assert client.get("/v1/models").json()["total"] == 3


def test_tasks_come_from_a_folder_and_go(client, saved):
    root, logits, _ = saved
    new = {"name": "a/b c", "folder": str(root / "birds")}
    added = client.post("/v1/models", json=new, headers={"X-API-Key": KEY.encode()})
    assert (added.status_code, added.json()) == (201, {"name": "a/b c", "replaced": False, "total": 4})
    (result,) = client.post("/v1/predict", **files(IMAGES[0], "a/b c", logits="1")).json()["results"]
    close(result["logits"], logits["birds"][0])
    assert result["top"][0]["label"] in NAMES["birds"]
    refused(client.post("/v1/models", json=new, headers=BEARER), 409, "already", "replace=true")
    ships = {**new, "folder": str(root / "ships"), "replace": True, "classes": ["a", "b", "c", "d"]}
    assert client.post("/v1/models", json=ships, headers=BEARER).json()["replaced"] is True
    (result,) = client.post("/v1/predict", **files(IMAGES[0], "a/b c", logits="1")).json()["results"]
    close(result["logits"], logits["ships"][0])
    assert result["top"][0]["label"] in "abcd"
    assert client.delete("/v1/models/a/b c", headers=BEARER).json() == {"name": "a/b c", "total": 3}
    refused(client.delete("/v1/models/a/b c", headers=BEARER), 404, "no task")
    refused(client.post("/v1/predict", **files(IMAGES[0], "a/b c")), 404, "no task")


def upload(client, config, weights, **fields):
    parts = {"config": ("c", config), "weights": ("w", weights), "name": (None, "sent")}
    parts |= {key: (None, value) for key, value in fields.items()}
    return client.post("/v1/models", files=parts, headers=BEARER)


def test_an_uploaded_adapter_is_served(client, saved):
    root, logits, _ = saved
    config, weights = ((root / "weather" / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))
    assert upload(client, config, weights, classes=json.dumps(["sun", "rain"])).status_code == 201
    (result,) = client.post("/v1/predict", **files(IMAGES[2], "sent", logits="true")).json()["results"]
    assert client.delete("/v1/models/sent", headers=BEARER).status_code == 200
    close(result["logits"], logits["weather"][2])
    names = {entry["index"]: entry["label"] for entry in result["top"]}
    assert names == {0: "sun", 1: "rain", 2: "2", 3: "3"}


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_adapters_that_are_not_added(client, saved, tmp_path):
    root, _, _ = saved
    config, weights = ((root / "weather" / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))
    refused(upload(client, config, pickle.dumps(_Trap())), 422, "not added")
    refused(upload(client, config, weights[:-100]), 422, "not added")
    refused(upload(client, b"{", weights), 422, "damaged")
    other = {**json.loads(config), "base_fingerprint": "float32:00000000"}
    refused(upload(client, json.dumps(other).encode(), weights), 422, "not added")
    refused(upload(client, config, weights, folder="/tmp"), 422, "not said where")
    refused(upload(client, config, weights, classes="["), 400, "no JSON")
    for body, error in [
        ({"name": "x"}, "not said where"),
        ({"folder": str(root / "ships")}, "'name' is missing"),
        ({"name": "__base__", "folder": str(root / "ships")}, "names the base"),
        ({"name": "x", "folder": str(tmp_path)}, "no adapter"),
        ({"name": "x", "hub_id": "../etc"}, "'hub_id': String should match"),
        ({"name": "x", "folder": str(root / "ships"), "replace": "maybe"}, "'replace'"),
    ]:
        refused(client.post("/v1/models", json=body, headers=BEARER), 422, error)
    for body in ({"name": "\ud800"}, {"name": "x", "classes": ["a", "\udfff"]}, {"name": "x", "hub_id": "a/\udc00"}):
        body = json.dumps({"folder": str(root / "ships"), **body})
        if "hub_id" in body:
            body = body.replace("folder", "nowhere")
        headers = {**BEARER, "Content-Type": "application/json"}
        refused(client.post("/v1/models", content=body, headers=headers), 422, "holds half a character")
    offline = client.post("/v1/models", json={"name": "x", "hub_id": "no/such"}, headers=BEARER)
    assert offline.status_code in (422, 502, 503)
    assert client.get("/v1/models").json()["total"] == 3


def test_the_key_comes_from_a_variable(monkeypatch):
    assert key_from(None) is None
    monkeypatch.setenv("SOME_KEY", " secret\n")
    assert key_from("SOME_KEY") == "secret"
    monkeypatch.setenv("SOME_KEY", " ")
    with pytest.raises(ValueError, match="SOME_KEY holds no API key"):
        key_from("SOME_KEY")
    with pytest.raises(ValueError, match="queue must be above 0"):
        Limits(queue=0)


def test_a_damaged_task_is_named_and_the_others_are_served(saved, monkeypatch):
    served, logits = service(saved[0]), saved[1]
    read = served.bank.task

    def damaged(name):
        if name == "birds":
            raise AdapterFileError("its checksum is wrong")
        return read(name)

    monkeypatch.setattr(served.bank, "task", damaged)
    with TestClient(build_app(served), URL) as client:
        for _ in range(2):
            refused(client.post("/v1/predict", **files(IMAGES[0], "birds")), 500, "Task 'birds' is damaged", "bank")
        results = client.post("/v1/predict", **files(IMAGES[0], "birds", "ships", logits="true")).json()["results"]
        assert (results[0]["status"], "damaged" in results[0]["error"]) == (500, True)
        close(results[1]["logits"], logits["ships"][0])
        assert client.get("/healthz").status_code == 200


def test_metrics_count_requests_batches_and_the_bank(saved):
    with connected(saved) as client:
        check_metrics(client)


def check_metrics(client):
    for _ in range(2):
        client.post("/v1/predict", **files(IMAGES[0], "ships", "birds"))
    client.post("/v1/predict", **files(IMAGES[0], "shops"))
    client.get("/nowhere/else")
    for number in range(3):
        client.request(f"M{number}", "/")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    figures = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert figures['smn_requests_total{method="POST",route="/v1/predict",status="200"}'] == "2.0"
    assert figures['smn_requests_total{method="POST",route="/v1/predict",status="404"}'] == "1.0"
    assert figures['smn_requests_total{method="GET",route="other",status="404"}'] == "1.0"
    assert {key: value for key, value in figures.items() if 'method="other"' in key and "_total" in key} == {
        'smn_requests_total{method="other",route="/",status="405"}': "3.0"
    }
    assert figures['smn_request_seconds_count{route="/v1/predict"}'] == "3.0"
    assert figures["smn_batch_samples_sum"] == "4.0"
    assert figures["smn_bank_tasks"] == "3.0"
    assert figures["smn_bank_resident_tasks"] == "2.0"
    assert float(figures["smn_bank_misses_total"]) == 2
    assert figures["smn_places_taken"] == "0.0"
    assert float(figures["process_resident_memory_bytes"]) > 1e6


def test_draining_refuses_what_is_new(saved):
    served = service(saved[0])
    with TestClient(build_app(served), URL) as client:
        assert client.get("/healthz").json() == {"status": "ok", "tasks": 3}
        served.draining = True
        response = client.post("/v1/predict", **files(IMAGES[0], "ships"))
        refused(response, 503, "stopping", "another server")
        assert response.headers["connection"] == "close"
        assert (client.get("/healthz").status_code, client.get("/metrics").status_code) == (503, 200)


def test_the_documented_requests_work(saved):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [page.read_text("utf-8").replace("\\\n", " ") for page in pages]
    lines = [line for text in texts for line in re.findall(r"^(?:\$ )?curl (.*)$", text, re.MULTILINE)]
    assert lines
    with TestClient(build_app(service(saved[0]), api_key="k"), URL) as client:
        for line in lines:
            folder = f"folder={saved[0] / 'birds'}"
            words = shlex.split(re.sub(r"folder=\S+", folder, line.replace("$SMN_KEY", "k")))
            fields = [word.partition("=") for flag, word in itertools.pairwise(words) if flag == "-F"]
            parts = [
                (key, ("x.png", IMAGES[0]) if value.startswith("@") else (None, value)) for key, _, value in fields
            ]
            headers = {"Authorization": "Bearer k"} if "-H" in words else {}
            method = "DELETE" if "DELETE" in words else "POST" if parts else "GET"
            path = words[-1].removeprefix("http://127.0.0.1:8000")
            response = client.request(method, path, files=parts or None, headers=headers)
            assert response.status_code in (200, 201), (line, response.text)


def test_an_unknown_task_among_many_costs_little(saved, monkeypatch):
    names = [f"customer-{number:05d}-birds-of-the-region" for number in range(10_000)]
    source = MemorySource({name: None for name in names})
    monkeypatch.setattr(MaskBank, "near", lambda self, name, count: source.near(name, count))
    with TestClient(build_app(service(saved[0])), URL) as client:
        began = time.process_time()
        for _ in range(3):
            answer = client.post("/v1/predict", **files(IMAGES[0], "customer-0417-birds-of-the-region"))
            refused(answer, 404, "0417", "Did you mean customer-04")
        assert time.process_time() - began < 1.0  # it took a second each
