# SPDX-License-Identifier: Apache-2.0
"""The application's factory and its settings; several processes on one port, which all see what is written."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient

from smn_peft.bank.store import DiskStore
from smn_peft.serving.app import create_app, run_workers
from smn_peft.serving.settings import Settings
from tests.processes import ROOT
from tests.serving.running import post
from tests.serving.test_server import close
from tests.serving.tiny import DENSITIES, IMAGES

BASE = """
from tests.serving.test_bank import headless

def build():
    model = headless()
    model.mean = model.std = (0.5, 0.5, 0.5)
    return model
"""


@pytest.fixture
def place(saved, tmp_path):
    """Names of a bank and of its base."""
    with DiskStore(tmp_path / "bank") as store:
        store.add_many((name, saved[0] / name) for name in DENSITIES)
    (tmp_path / "base.py").write_text(BASE)
    return str(tmp_path / "bank"), f"{tmp_path / 'base.py'}:build"


def test_settings_pass_through_the_environment():
    used = Settings("a b", "base", image_size=32, max_wait_ms=0.5, allowed_hosts=("x.example", "*.y"), ram_budget=3)
    assert Settings.from_environment(used.environment()) == used
    assert Settings.from_environment({"SMN_SERVE_BANK": "a", "SMN_SERVE_BASE": "b"}) == Settings("a", "b")
    given = {"SMN_SERVE_BANK": "a", "SMN_SERVE_BASE": "b"}
    for wrong, message in (
        ({}, "SMN_SERVE_BANK is not set"),
        ({"SMN_SERVE_BANK": "a"}, "SMN_SERVE_BASE is not set"),
        ({**given, "SMN_SERVE_QUEUE": "many"}, "SMN_SERVE_QUEUE must be int; got 'many'"),
        ({**given, "SMN_SERVE_QUEUE": "0"}, "queue must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings.from_environment(wrong)


def test_the_factory_serves_what_the_environment_names(place, saved, monkeypatch):
    for name, value in Settings(*place, allowed_hosts=("testserver",)).environment().items():
        monkeypatch.setenv(name, value)
    with TestClient(create_app()) as client:
        with DiskStore(place[0]) as other:
            other.add("late", saved[0] / "ships")
        body = {"image": data(0), "task": "late", "logits": True}
        (result,) = client.post("/v1/predict", json=body).json()["results"]
        assert close(result["logits"], saved[1]["ships"][0])
        assert client.post("/v1/models", json={"name": "x", "folder": "y"}).status_code == 403
    monkeypatch.setenv("SMN_SERVE_BANK", f"{place[0]}-not")
    with pytest.raises(SystemExit) as ended:
        create_app()
    assert ended.value.code == 3
    with pytest.raises(FileNotFoundError, match=r"There is no .*-not"):
        create_app(Settings(f"{place[0]}-not", place[1]))


def test_workers_do_not_take_changes_that_one_of_them_would_keep(place, saved, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k")
    with pytest.raises(ValueError, match="smn bank build"):
        run_workers(Settings(str(saved[0]), place[1], api_key_env="SOME_KEY"), 2, host="127.0.0.1", port=0)


def data(index):
    return base64.b64encode(IMAGES[index]).decode()


@contextmanager
def started(*command, **environment):
    """The port of a server in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, env=env) as server:
        try:
            lines = iter(server.stderr.readline, "")
            yield next(int(found[1]) for line in lines if (found := re.search(r"running on http://.*:(\d+)", line)))
        finally:
            server.terminate()
            said = server.stderr.read()
    assert server.returncode in (0, -15), said


def figures(port):
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()


@pytest.mark.slow
def test_two_workers_see_each_others_changes(place, saved):
    command = ("smn_peft.cli", "serve", place[0], "--base", place[1], "--workers", "2", "--port", "0")
    with started(*command, "--api-key-env", "SOME_KEY", SOME_KEY="k") as port:
        pids = set()
        while len(pids) < 2:
            try:
                pids |= set(re.findall(r'smn_bank_tasks\{pid="(\d+)"', figures(port)))
            except OSError:
                time.sleep(0.1)
        asked = 0
        for number in range(5):
            body = json.dumps({"name": f"new-{number}", "folder": str(saved[0] / "ships")}).encode()
            headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", body, headers)
            assert urllib.request.urlopen(request, timeout=60).status == 201
            for index in range(8):  # each over a connection of its own, which either may take
                status, _, answer = post(port, "/v1/predict", IMAGES[index % 4], f"new-{number}", logits="1")
                assert status == 200, answer
                assert close(answer["results"][0]["logits"], saved[1]["ships"][index % 4])
                asked += 1
        told = 'smn_requests_total{method="POST",route="/v1/predict",status="200"} '
        assert f"{told}{float(asked)}" in figures(port)  # of both


@pytest.mark.slow
def test_uvicorn_itself_serves_the_factory(place, saved):
    command = ("uvicorn", "--factory", "smn_peft.serving.app:create_app", "--port", "0")
    with started(*command, SMN_SERVE_BANK=place[0], SMN_SERVE_BASE=place[1]) as port:
        _, _, answer = post(port, "/v1/predict", IMAGES[0], "ships", logits="1")
        assert close(answer["results"][0]["logits"], saved[1]["ships"][0])
