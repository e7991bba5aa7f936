# SPDX-License-Identifier: Apache-2.0
"""A real server: 32 clients get their own tasks' answers, a full queue says so, and SIGTERM loses nothing."""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

from smn_peft.serving.limits import Limits
from tests.processes import context, leave_the_test
from tests.serving.running import connect, embedding_of, post, running
from tests.serving.tiny import DENSITIES, IMAGES, service


def close(actual, expected):
    return torch.allclose(torch.tensor(actual), expected, rtol=1e-4, atol=1e-4)


def in_threads(count, work):
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads


def joined(threads):
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def held(saved, monkeypatch):
    """Makes a service whose forward waits until it is let go, as on a slow model."""
    go = threading.Event()

    def make(**limits):
        served = service(saved[0], limits=Limits(**limits), max_batch=4, max_wait=0)
        forward = served.bank.forward
        monkeypatch.setattr(served.bank, "forward", lambda *args: (go.wait(20), forward(*args))[1])
        return served

    yield make, go
    go.set()


def test_clients_get_their_own_tasks_answers(saved):
    root, logits, features = saved
    right, wrong = [], []

    def client(seed):
        pick, connection = random.Random(seed), connect(port)
        for _ in range(4):
            index, tasks = pick.randrange(4), pick.sample(sorted(DENSITIES), pick.choice((1, 1, 2)))
            if pick.randrange(2):
                connection.request("POST", "/v1/embeddings", *embedding_of(IMAGES[index], tasks[0]))
                (result,) = json.loads(connection.getresponse().read())["data"]
                own = close(result["embedding"], features[tasks[0]][index])
                (right if own else wrong).append(0)
                continue
            status, _, answer = post(connection, "/v1/predict", IMAGES[index], *tasks, logits="true")
            assert status == 200, answer
            for task, result in zip(tasks, answer["results"], strict=True):
                own = close(result["logits"], logits[task][index])
                (right if own and result["task"] == task else wrong).append(result["batch"])
        connection.close()

    with running(service(root)) as port:
        joined(in_threads(32, client))
    assert wrong == []
    assert len(right) >= 32 * 4
    assert max(right) > 4  # so they were answered together


def test_a_full_queue_answers_429_and_the_queued_are_served(held, saved):
    make, go = held
    statuses, retry = [], []

    def client(_):
        status, headers, _ = post(port, "/v1/predict", IMAGES[0], "ships")
        statuses.append(status)
        retry.append(headers["Retry-After"])

    served = make(queue=6)
    with running(served) as port:
        threads = in_threads(12, client)
        while len(statuses) < 6:
            time.sleep(0.01)
        assert statuses == [429] * 6
        assert all(int(seconds) >= 1 for seconds in retry)
        status, _, answer = post(port, "/v1/predict", IMAGES[0], *DENSITIES)
        assert (status, "6 of 6 places" in answer["error"]) == (429, True)
        go.set()
        joined(threads)
        assert sorted(statuses) == [200] * 6 + [429] * 6
        assert served.places.held == 0
        assert post(port, "/v1/predict", IMAGES[0], *DENSITIES)[0] == 200


def test_what_takes_too_long_is_answered_504_and_not_computed(held):
    make, go = held
    served = make(timeout=0.3)
    with running(served) as port:
        for _ in range(2):  # the first occupies the model, the second waits
            status, _, answer = post(port, "/v1/predict", IMAGES[0], "ships")
            assert (status, "within 0.3 s" in answer["error"]) == (504, True)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            )
            slow.sendall(b"Content-Length: 1000\r\n\r\n--x")
            assert slow.recv(100).startswith(b"HTTP/1.1 504")
        assert served.places.held == 0
        go.set()
    assert served.bank.stats.misses == 1  # what timed out while it waited was never started


_SLOW = """
import time
from tests.serving.test_bank import headless

def build():
    model = headless()
    model.mean = model.std = (0.5, 0.5, 0.5)
    features = model.forward_features
    model.forward_features = lambda x: (time.sleep(0.25), features(x))[1]
    return model
"""


def smn(*arguments):
    """`smn ARGUMENTS` in a process of its own."""
    leave_the_test()
    sys.argv = ["smn", *map(str, arguments)]
    runpy.run_module("smn_peft.cli", run_name="__main__")


def test_sigterm_finishes_what_is_queued_and_refuses_what_is_new(saved, tmp_path):
    root, logits, _ = saved
    (tmp_path / "base.py").write_text(_SLOW)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve", root, "--base", f"{tmp_path / 'base.py'}:build", "--port", port]
    process = context().Process(target=smn, args=(*command, "--max-batch", 1, "--max-wait-ms", 0))
    process.start()
    try:
        answers, late = [], connect(port)
        deadline = time.monotonic() + 60
        while late.sock is None:
            with suppress(ConnectionRefusedError):
                late.connect()
            assert process.is_alive()
            assert time.monotonic() < deadline

        def client(index):
            answers.append((index, *post(port, "/v1/predict", IMAGES[index % 4], "ships", logits="1")))

        threads = in_threads(6, client)
        while len(answers) < 1:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        status, _, refusal = post(late, "/v1/predict", IMAGES[0], "ships")
        assert (status, refusal["error"]) == (503, "The server is stopping.")
        late.close()
        joined(threads)
        assert [status for _, status, _, _ in answers] == [200] * 6
        for index, _, _, answer in answers:
            assert close(answer["results"][0]["logits"], logits["ships"][index % 4])
        process.join(20)
        assert process.exitcode in (0, -signal.SIGTERM)  # uvicorn raises the signal anew at its end
    finally:
        process.kill()
        process.join()
