# SPDX-License-Identifier: Apache-2.0
"""Connections that do nothing: each has a time, and they take neither places nor all descriptors."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from smn_peft.serving import batching
from smn_peft.serving.app import make_server
from smn_peft.serving.limits import Limits
from tests.processes import context, leave_the_test
from tests.serving.running import post, running
from tests.serving.tiny import IMAGES, service


@pytest.fixture
def logged():
    """What uvicorn, asyncio and the server log."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio", "smn_peft")]
    for each in loggers:
        each.addHandler(handler)
    yield records
    for each in loggers:
        each.removeHandler(handler)


HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"


def opened(stack, port, sent=b""):
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
    connection.sendall(sent)
    return connection


def seconds_until_closed(connection, drip=b""):
    """How long a connection stays open while it goes on to send."""
    began = time.monotonic()
    connection.settimeout(0.2)
    while time.monotonic() - began < 20:
        try:
            connection.sendall(drip)
            if not connection.recv(1 << 16):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def test_connections_that_wait_are_closed(saved):
    refused = HEAD.replace(b"form-data; boundary=x", b"x") + b"Content-Length: 100000\r\n\r\n"
    cases = [
        (b"", b""),
        (b"POST /v1/predict HT", b""),
        (HEAD, b"X: y\r\n"),  # a header that never ends
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),  # idle after an answer
        (refused, b"x"),  # refused, and sent on
    ]
    with running(service(saved[0], limits=Limits(idle=1))) as port, ExitStack() as stack:
        connections = [opened(stack, port, sent) for sent, _ in cases]
        with ThreadPoolExecutor(len(cases)) as threads:
            drips = [drip for _, drip in cases]
            assert max(threads.map(seconds_until_closed, connections, drips)) < 10


def test_a_client_that_does_not_read_is_left(saved):
    with running(service(saved[0], limits=Limits(idle=1))) as port, ExitStack() as stack:
        connection = opened(stack, port)
        connection.settimeout(1)
        ask = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000  # some 40 MB of pages

        def send_until_closed() -> None:
            began = time.monotonic()
            while time.monotonic() - began < 20:
                with suppress(TimeoutError):
                    connection.sendall(ask)

        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            send_until_closed()


def test_half_sent_bodies_take_no_place_and_end(saved):
    served = service(saved[0], limits=Limits(queue=2, pause=1))
    with running(served) as port, ExitStack() as stack:
        post(port, "/v1/predict", IMAGES[0], "ships")
        slow = [opened(stack, port, HEAD + b"Content-Length: 1000\r\n\r\n--x") for _ in range(6)]
        time.sleep(0.3)
        assert served.places.held == 0
        assert post(port, "/v1/predict", IMAGES[0], "ships")[0] == 200
        assert slow[0].recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_goes_is_no_failure(saved, logged):
    served = service(saved[0])
    with running(served) as port:
        with ExitStack() as stack:
            opened(stack, port, HEAD + b"Content-Length: 5000\r\n\r\n--x\r\n")
            time.sleep(0.3)
        for _ in range(100):
            if b'status="499"' in served.metrics.text():
                break
            time.sleep(0.05)
        assert b'smn_requests_total{method="POST",route="/v1/predict",status="499"} 1.0' in served.metrics.text()
        assert b'status="500"' not in served.metrics.text()
    assert not [record for record in logged if record.levelno >= logging.ERROR]
    assert served.bodies.held == 0


_MANY = """
import socket, sys, time
port, held = int(sys.argv[1]), []
for _ in range(150):
    try:
        held.append(socket.create_connection(("127.0.0.1", port), timeout=1))
        held[-1].sendall(b"GET /healthz HT")
    except OSError:
        pass
print(len(held), flush=True)
sys.stdin.read()
"""


def test_many_connections_leave_descriptors_and_little_log(saved, logged):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 60, hard))
    try:
        with running(service(saved[0], limits=Limits(idle=1))) as port, ExitStack() as stack:
            command = [sys.executable, "-c", _MANY, str(port)]
            clients = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(clients.wait, 20)
            stack.enter_context(clients)
            stack.callback(clients.kill)
            assert int(clients.stdout.readline()) > 50
            with open(os.devnull), socket.socket():  # there is one left
                pass
            for _ in range(50):  # those that send nothing make room
                try:
                    if post(port, "/v1/predict", IMAGES[0], "ships")[0] == 200:
                        break
                except (OSError, ValueError):
                    time.sleep(0.2)
            else:
                pytest.fail("nobody is answered")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(len(record.getMessage()) + len(record.exc_text or "") for record in logged) < 100_000


def decode_for_long():
    leave_the_test()
    workers = batching.Workers(1, "test")

    async def main():
        task = asyncio.ensure_future(workers.run(time.sleep, 60))
        await asyncio.sleep(0.1)
        task.cancel()

    asyncio.run(main())
    workers.close()


def test_nobody_waits_for_a_thread_that_works_at_the_end():
    process = context().Process(target=decode_for_long)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_a_signal_waits_no_longer_than_it_may(saved, monkeypatch):
    """A forward that hangs is left; whoever waits for it is told so, and the server ends."""
    served, go = service(saved[0], limits=Limits(grace=1)), threading.Event()
    monkeypatch.setattr(served.bank, "forward", lambda *_: go.wait(30))
    server, answers = make_server(served, port=0, log_level="error"), []
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = threading.Thread(target=lambda: answers.append(post(port, "/v1/predict", IMAGES[0], "ships")))
    client.start()
    while served.places.held == 0:
        time.sleep(0.01)
    began = time.monotonic()
    server.handle_exit(signal.SIGTERM, None)
    thread.join(25)
    assert time.monotonic() - began < 10
    client.join(10)
    assert (answers[0][0], answers[0][2]["error"]) == (503, "The server is stopping.")
    go.set()
