# SPDX-License-Identifier: Apache-2.0
"""A Hub on a local socket: as much of the Hugging Face Hub's HTTP API as its real client needs, and faults on demand.

Commits, branches, pull requests, private repositories, LFS in one part or several, redirects to a CDN path, ranges.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.state import USERS, Fault, LocalHub, Refused, Repository, blob_oid

_LFS_ABOVE = 1 << 20


@contextmanager
def serving() -> Iterator[LocalHub]:
    """A hub that answers until the block ends."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint, hub.cdn = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):
            self.close_connection = True

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        self.quoted = split.path
        self.hub.requests.append((self.command, self.route))
        fault = self._fault()
        if fault is not None and not fault.status and self.command in ("PUT", "POST"):
            self.rfile.read(fault.after)
            return self._cut()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault is not None and fault.status:
            return self._send(fault.status, b'{"error": "as ordered"}', fault.headers)
        self.cut_after = fault.after if fault is not None else None
        try:
            self._answer(body)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, b"{}", {name: value for name, value in headers.items() if value})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _fault(self) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.route):
                fault.times -= 1
                return fault
        return None

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if getattr(self, "cut_after", None) is not None:
                self.wfile.write(content[: self.cut_after])
                self.wfile.flush()
                return self._cut()
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, body: bytes) -> None:
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, self.quoted)
            if found and self.command in method.split():
                return answer(self, body, *(unquote(group) for group in found.groups() if group is not None))
        raise Refused(404, message=f"no route {self.command} {self.route}")

    # --- who asks, and for what --------------------------------------------------------------------------------------

    def _user(self, required: bool = False) -> str | None:
        header = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if (header and header not in USERS) or (required and not header):
            raise Refused(401, message="Invalid credentials in Authorization header")
        return USERS.get(header)

    def _repository(self, name: str, write: bool = False, pull_request: bool = False) -> Repository:
        user, repository = self._user(required=write), self.hub.repositories.get(name)
        owner = name.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner and not pull_request:
            raise Refused(403, message="you have no rights to write here")
        return repository

    def _tree(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self._repository(name)
        sha = repository.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, sha, repository.trees[sha]

    # --- the API -----------------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        self._json({"name": self._user(required=True), "type": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        wanted, user = json.loads(body), self._user(required=True)
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if owner != user:
            raise Refused(403, message=f"you have no rights to create under {owner}")
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._json(url, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = repository = Repository(name, private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json(url)

    def validate(self, body: bytes) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        errors = [] if front and isinstance(yaml.safe_load(front[1]), dict) else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, write=True, pull_request="create_pr" in self.query)
        sha = repository.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > _LFS_ABOVE
            old = repository.trees[sha].get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else blob_oid(old)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size, answer = wanted["oid"], wanted["size"], {"oid": wanted["oid"], "size": wanted["size"]}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.endpoint}/lfs/{oid}"}
                if self.hub.part_size is not None:
                    parts = range(1, -(-size // self.hub.part_size) + 1)
                    urls = {str(part): f"{self.hub.endpoint}/lfs/{oid}/{part}" for part in parts}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **urls}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="the content is not what was announced")
        self.hub.objects[oid] = body
        self._send(200, b"")

    def upload_part(self, body: bytes, oid: str, part: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(part)] = body
        self._send(200, b"", {"ETag": hashlib.md5(body).hexdigest()})

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self.upload(b"".join(parts[entry["partNumber"]] for entry in json.loads(body)["parts"]), oid)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        repository = self._repository(name, write=True, pull_request=create_pr)
        header, *lines = (json.loads(line) for line in body.splitlines())
        head = repository.resolve(revision)
        if head is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        parent = header["value"].get("parentCommit", head)
        if parent != head and not create_pr:
            raise Refused(412, message="A commit has happened since.")
        tree = dict(repository.trees[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                repository.lfs_paths.add(value["path"])
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        sha = repository.commit(f"refs/pr/{number}" if create_pr else revision, tree, header["value"]["summary"])
        answer = {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        self._json({"success": True, **answer})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        repository, sha, tree = self._tree(name, revision)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.refs:
            raise Refused(409, message="Reference already exists")
        repository.refs[branch] = repository.refs[json.loads(body or b"{}").get("startingPoint", "main")]
        self._json({}, 201)

    def file(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository, sha, tree = self._tree(name, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in tree:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, b"", headers)
        content = tree[path]
        if path not in repository.lfs_paths:
            return self._content(content, {**headers, "ETag": f'"{blob_oid(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{oid}"})

    def cdn(self, body: bytes, oid: str) -> None:
        self._content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            return self._send(200, content, headers)
        self.hub.ranges.append(start[0])
        first = int(start[1])
        span = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(206, content[first:], {**headers, "Content-Range": span})


_REPO = r"([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", _Handler.branch),
    ("GET", rf"/api/models/{_REPO}(?:/revision/([^/]+))?", _Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]+)", _Handler.upload),
    ("POST", r"/lfs/([0-9a-f]+)", _Handler.complete),
    ("PUT", r"/lfs/([0-9a-f]+)/(\d+)", _Handler.upload_part),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
    ("GET HEAD", r"/cdn/([0-9a-f]+)", _Handler.cdn),
)
