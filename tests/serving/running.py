# SPDX-License-Identifier: Apache-2.0
"""A real uvicorn server in a thread, and requests to it without a client library."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from contextlib import closing, contextmanager

from smn_peft.serving.app import make_server


@contextmanager
def running(service, api_key=None):
    """The port of a server that answers while this lasts; the service is closed at the end."""
    server = make_server(service, port=0, api_key=api_key, log_level="error")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def form(data, tasks, **fields):
    """Body and headers of a multipart form."""
    parts = [("image", data, '; filename="x.png"'), *(("task", task.encode(), "") for task in tasks)]
    parts += [(key, str(value).encode(), "") for key, value in fields.items()]
    body = b"".join(
        f'--xyz\r\nContent-Disposition: form-data; name="{key}"{more}\r\n\r\n'.encode() + value + b"\r\n"
        for key, value, more in parts
    )
    return body + b"--xyz--\r\n", {"Content-Type": "multipart/form-data; boundary=xyz"}


def embedding_of(data, model):
    """Body and headers that ask for an image's features."""
    body = {"model": model, "input": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    return json.dumps(body), {"Content-Type": "application/json"}


def post(where, path, data, *tasks, **fields):
    """(status, headers, JSON) of an answer; over a connection, or over one of its own to a port."""
    if isinstance(where, int):
        with closing(connect(where)) as connection:
            return post(connection, path, data, *tasks, **fields)
    where.request("POST", path, *form(data, tasks, **fields))
    response = where.getresponse()
    return response.status, response.headers, json.loads(response.read())


def connect(port):
    return http.client.HTTPConnection("127.0.0.1", port, timeout=30)
