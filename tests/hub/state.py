# SPDX-License-Identifier: Apache-2.0
"""What the local Hub holds: repositories with branches and whole trees, uploaded objects, and faults to come."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OTHER_TOKEN", "OWNER", "TOKEN", "USERS", "Fault", "LocalHub", "Refused", "Repository", "blob_oid"]

OWNER, TOKEN, OTHER_TOKEN = "user", "hf_owner", "hf_other"
USERS = {TOKEN: OWNER, OTHER_TOKEN: "other"}


def blob_oid(content: bytes) -> str:
    """What git calls the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Branches point to commits, commits hold whole trees: path -> content."""

    name: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    lfs_paths: set[str] = field(default_factory=set)

    def commit(self, ref: str, tree: dict[str, bytes], message: str) -> str:
        seed = f"{self.name}{len(self.trees)}{message}"
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.trees[sha], self.messages[sha], self.refs[ref] = tree, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.trees else None)


@dataclass
class Fault:
    """What goes wrong with requests of a method and path, `times` times.

    Attributes:
        status: Answer this, with `headers`; 0: cut the connection.
        after: Bytes of the request's body to read, or of the answer's to send, before the cut.
    """

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    times: int = 1


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class LocalHub:
    """The server's state; `endpoint` is its address, `requests` what it was asked, `ranges` what for in part."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.part_size: int | None = None
        self.endpoint = self.cdn = ""  # one server, two hosts: the client trusts a CDN less than the Hub

    def fail(self, *args: Any, **kwargs: Any) -> None:
        self.faults.append(Fault(*args, **kwargs))

    def asked(self, method: str, path: str) -> int:
        return sum(method == m and re.search(path, p) is not None for m, p in self.requests)

    def tree(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.trees[repository.refs.get(revision, revision)]
