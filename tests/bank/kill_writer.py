# SPDX-License-Identifier: Apache-2.0
"""Kill -9 a store's writer at random points, again and again, and look at what is left.

`python -m tests.bank.kill_writer 200` prints what was found. Half of the writers are killed after a random time, half
before a random line of the store's own code; another process reads all the while. A change that a writer has reported
as done must be there; the one that it was in the middle of must be there as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from smn_peft import bank as package
from smn_peft.bank import store as database
from smn_peft.bank.store import FILE_NAME, DiskStore
from tests.bank.stores import adapter, number_of

_CODE = str(Path(package.__file__).parent)
_NAMES = [f"task {letter}" for letter in "abcdefgh"]
State = dict[str, int]


@dataclass
class Outcome:
    """What became of the store under all kills.

    Attributes:
        kills: Writers that were killed.
        during: Changes in whose middle they were, by kind; "none" between two.
        done: How many of these were there as a whole.
        committed: Changes that writers had reported as done.
        lost: How many of those were not there.
        corrupt: Reads that gave something else than what was put in, or an error, here or in the reader beside.
        reads: Reads by the reader beside.
        logs: Kills after which a write-ahead log was left.
    """

    kills: int = 0
    during: Counter[str] = field(default_factory=Counter)
    done: int = 0
    committed: int = 0
    lost: int = 0
    corrupt: int = 0
    reads: int = 0
    logs: int = 0


def apply(state: State, change: list[Any]) -> State:
    """The tasks after a change."""
    kind, *rest = change
    after = dict(state)
    if kind == "add":
        after.update({name: number for name, number in rest[0]})
    elif kind == "remove":
        del after[rest[0]]
    elif kind == "rename":
        after[rest[1]] = after.pop(rest[0])
    return after


def choose(state: State, generator: random.Random) -> list[Any]:
    """A change that the state allows."""
    free = [name for name in _NAMES if name not in state]
    kind = generator.choice(["add", "add", "remove", "rename", "compact"])
    if kind == "remove" and state:
        return ["remove", generator.choice(sorted(state))]
    if kind == "rename" and state and free:
        return ["rename", generator.choice(sorted(state)), generator.choice(free)]
    if kind == "compact":
        return ["compact"]
    names = generator.sample(_NAMES, generator.choice([1, 1, 4]))
    return ["add", [[name, generator.randrange(1 << 20)] for name in names]]


def write_for_ever(path: Path, state: State, seed: int, pipe: int, lines: int | None) -> None:
    """Change the store at random and say so, before and after; die before a given line of the store's code."""
    generator, left = random.Random(seed), lines or 0

    def count(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(_CODE):
            return None
        left -= event == "line"
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    store = DiskStore(path)
    if lines is not None:
        sys.settrace(count)
    while True:
        change = choose(state, generator)
        os.write(pipe, json.dumps(change).encode() + b"\n")
        if change[0] == "add":
            items = ((name, adapter(number, head=3 * (number % 20_000 + 1))) for name, number in change[1])
            store.add_many(items, replace=True)
        elif change[0] == "compact":
            store.compact()
        else:
            getattr(store, change[0])(*change[1:])
        state = apply(state, change)
        os.write(pipe, b"done\n")


def read_for_ever(path: Path, pipe: int, stop: int) -> None:
    """Read tasks at random until told to stop; report reads and errors."""
    store, reads, errors, generator = DiskStore(path), 0, 0, random.Random(0)
    while not select.select([stop], [], [], 0)[0]:
        try:
            number_of(store.read(generator.choice(_NAMES)))
            reads += 1
        except KeyError:
            continue
        except Exception as error:  # whatever it is, it is counted
            print(f"reader: {type(error).__name__}: {error}", file=sys.stderr)
            errors += 1
    os.write(pipe, json.dumps([reads, errors]).encode())


def fork(function: Any, *arguments: Any) -> int:
    """Run a function in a child that ends with it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            function(*arguments)
            code = 0
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    return child


def killed_writer(path: Path, state: State, generator: random.Random) -> tuple[list[list[Any]], list[Any] | None]:
    """Start a writer, kill it; what it reported as done, and what it was doing."""
    read, write = os.pipe()
    lines = generator.randrange(2500) if generator.random() < 0.5 else None
    child = fork(write_for_ever, path, state, generator.randrange(1 << 30), write, lines)
    os.close(write)
    chunks = [os.read(read, 1 << 16)]  # it has begun
    if lines is None:
        time.sleep(generator.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
    while chunks[-1]:
        chunks.append(os.read(read, 1 << 16))
    os.close(read)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    done: list[list[Any]] = []
    doing: list[Any] | None = None
    for line in b"".join(chunks).decode().splitlines():
        if line == "done":
            assert doing is not None
            done.append(doing)
            doing = None
        else:
            doing = json.loads(line)
    return done, doing


def look(path: Path, state: State, doing: list[Any] | None, outcome: Outcome) -> State:
    """Compare the store with what it must hold."""
    expected = [state] if doing is None else [state, apply(state, doing)]
    outcome.logs += Path(f"{path / FILE_NAME}-wal").exists()
    with DiskStore(path) as store:
        found: State = {}
        for name in store.names():
            try:
                found[name] = number_of(store.read(name))
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                outcome.corrupt += 1
        outcome.corrupt += sum(check.error is not None for check in store.verify())  # and the file, or it raises
        outcome.lost += found not in expected
        outcome.done += doing is not None and found == expected[-1] != state
    return found


def run(path: Path, kills: int, seed: int = 0) -> Outcome:
    """Kill writers of a store in an empty folder."""
    outcome, generator = Outcome(), random.Random(seed)
    limit, database._MAX_LOG = database._MAX_LOG, 100_000  # checkpoints too are killed
    DiskStore(path).close()
    (results, report), (stopped, stop) = os.pipe(), os.pipe()
    reader = fork(read_for_ever, path, report, stopped)
    state: State = {}
    try:
        for _ in range(kills):
            done, doing = killed_writer(path, state, generator)
            for change in done:
                state = apply(state, change)
            outcome.kills += 1
            outcome.committed += len(done)
            outcome.during["none" if doing is None else doing[0]] += 1
            state = look(path, state, doing, outcome)
    finally:
        database._MAX_LOG = limit
        os.write(stop, b"x")
        os.waitpid(reader, 0)
        os.close(report)
        reads, errors = json.loads(os.read(results, 1 << 16) or b"[0, 1]")
        for handle in (results, stopped, stop):
            os.close(handle)
    outcome.reads = reads
    outcome.corrupt += errors
    return outcome


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder) / "bank", int(sys.argv[1]) if len(sys.argv) > 1 else 200))
