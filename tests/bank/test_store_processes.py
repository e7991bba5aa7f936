# SPDX-License-Identifier: Apache-2.0
"""Several processes and threads on one store: kills, a second writer, readers beside writers."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from smn_peft.bank.source import StoredAdapter
from smn_peft.bank.store import DiskStore, StoreBusyError
from tests.bank import kill_writer
from tests.bank.kill_writer import fork
from tests.bank.stores import adapter, number_of


def check_kills(path, kills, seed):
    outcome = kill_writer.run(path, kills, seed)
    assert outcome.kills == kills
    assert outcome.committed > kills // 4
    assert outcome.reads > kills
    assert (outcome.lost, outcome.corrupt) == (0, 0), outcome
    return outcome


def test_killed_writers_leave_the_last_good_state(tmp_path):
    check_kills(tmp_path / "bank", 8, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_killed_writers(tmp_path):
    outcome = check_kills(tmp_path / "bank", 200, seed=2)
    assert outcome.during.keys() >= {"add", "remove", "rename", "compact"}
    assert outcome.leftovers > 0  # some were killed between shard and index; the next writer removed it


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    with DiskStore.open(tmp_path) as store:
        store.add("a", adapter(0))
    for name in (f".{'1' * 32}.safetensors.abcd_123", f"{'0' * 32}.safetensors"):
        (tmp_path / "shards" / name).write_bytes(b"half")
    with DiskStore.open(tmp_path) as store:
        assert number_of(store.read("a")) == 0
        assert len(os.listdir(tmp_path / "shards")) == 3
        store.add("b", adapter(1))
        assert len(os.listdir(tmp_path / "shards")) == 2


def test_a_second_writer_is_told_at_once_and_a_dead_one_leaves_no_lock(tmp_path):
    with DiskStore.open(tmp_path) as store:
        store.add("a", adapter(0))
    (ready, report), (_, never) = os.pipe(), os.pipe()

    def hold() -> None:
        with DiskStore.open(tmp_path) as other:
            other.add_many([("b", adapter(1)), ("c", adapter(2))], progress=lambda: stop())

    def stop() -> None:
        os.write(report, b"x")
        time.sleep(60)

    child = fork(hold)
    assert os.read(ready, 1) == b"x"
    try:
        with DiskStore.open(tmp_path) as store:
            before = time.monotonic()
            with pytest.raises(StoreBusyError, match=f"process {child} is writing to .*{tmp_path}.*try again"):
                store.add("d", adapter(3))
            assert time.monotonic() - before < 5
            for change in (lambda: store.remove("a"), lambda: store.rename("a", "b")):
                with pytest.raises(StoreBusyError, match="Nothing was changed"):
                    change()
            assert number_of(store.read("a")) == 0
            assert store.names() == ["a"]
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            store.add("d", adapter(3))
            assert store.names() == ["a", "d"]
            assert {number_of(store.read(name)) for name in "ad"} == {0, 3}
    finally:
        for handle in (ready, report, never):
            os.close(handle)


def test_two_writers_in_one_process(tmp_path):
    """Threads of one store take turns; a second `DiskStore` is refused as another process is."""
    with DiskStore.open(tmp_path) as store, DiskStore.open(tmp_path) as other:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: store.add(f"t{number}", adapter(number)), range(16)))
        assert [number_of(store.read(f"t{number}")) for number in range(16)] == list(range(16))
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} is writing"):
            store.add_many([("a", adapter(0))], progress=lambda: other.add("b", adapter(1)))
        assert len(store) == 16


def test_sixty_four_threads_read_while_another_process_changes_and_compacts(tmp_path):
    names = [f"t{number}" for number in range(40)]
    with DiskStore.open(tmp_path) as store:
        store.add_many((name, adapter(number, head=300)) for number, name in enumerate(names))
    (ready, report) = os.pipe()

    def change() -> None:
        generator = random.Random(0)
        with DiskStore.open(tmp_path) as other:
            for step in range(1 << 30):
                name = generator.choice(names)
                # 40 more is the same task's next content
                other.add(name, adapter(names.index(name) + 40 * step, head=300), replace=True)
                if step % 3 == 0:
                    other.compact()
                os.write(report, b".")

    child = fork(change)
    stop, errors, reads = threading.Event(), [], []

    def read(seed: int) -> None:
        generator, count = random.Random(seed), 0
        while not stop.is_set():
            number = generator.randrange(40)
            try:
                assert number_of(store.read(names[number])) % 40 == number
                count += 1
            except BaseException as error:
                errors.append(error)
                return
        reads.append(count)

    with DiskStore.open(tmp_path) as store:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(64)]
        for thread in threads:
            thread.start()
        for _ in range(15):
            os.read(ready, 1)
        stop.set()
        for thread in threads:
            thread.join()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not errors, errors[0]
        assert sum(reads) > 100
        assert not any(check.error for check in store.verify())
    os.close(ready)
    os.close(report)


def test_a_forked_child_reads_on_its_own(tmp_path):
    with DiskStore.open(tmp_path) as store:
        store.add_many((f"t{number}", adapter(number)) for number in range(4))
        held = store.read("t0")
        inside, leave = threading.Event(), threading.Event()

        def sit_on_the_locks() -> None:
            with store._shards._lock, store._index._reader.lock:
                inside.set()
                leave.wait()

        def work() -> None:
            assert number_of(held) == 0
            signal.alarm(20)
            assert [number_of(store.read(f"t{number}")) for number in range(4)] == [0, 1, 2, 3]

        # Forked in the middle of a change: the child must neither see it nor undo it.
        codes = []

        def fork_now() -> None:
            thread = threading.Thread(target=sit_on_the_locks)
            thread.start()
            inside.wait()
            codes.append(os.waitpid(fork(work), 0)[1])
            leave.set()
            thread.join()

        store.add_many([("new", adapter(9))], progress=fork_now)
        assert codes == [0]
        assert number_of(store.read("new")) == 9


def test_bytes_reach_the_disk_before_the_row_that_names_them(tmp_path, monkeypatch):
    events: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _o=original: events.append(_n) or _o(*a))
    connect = sqlite3.connect

    def traced(*args: object, **kwargs: object) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(lambda text: events.append(text.split()[0]))
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    with DiskStore.open(tmp_path) as store:
        events.clear()
        store.add("a", adapter(0))
        wanted = [event for event in events if event in ("fsync", "replace", "INSERT", "BEGIN", "COMMIT")]
        assert wanted == ["BEGIN", "fsync", "replace", "fsync", "INSERT", "INSERT", "COMMIT"]
        (level,) = store._index._reader.connection.execute("PRAGMA synchronous").fetchone()
        assert level == 3


def test_readers_go_on_beside_a_change_of_any_size(tmp_path, monkeypatch):
    """Rows of more bytes than SQLite keeps in memory by itself."""
    monkeypatch.setattr("smn_peft.bank.store.index._PATIENCE", 0.5)
    few, reads = adapter(1), []
    wide = StoredAdapter({**few.config, "target_modules": ["layer" * 1000]}, few.tensors)
    with DiskStore.open(tmp_path) as store, DiskStore.open(tmp_path) as reader:
        store.add("first", few)

        def read():
            if len(reads) in (0, 599):
                assert number_of(reader.read("first")) == 1
            reads.append(len(reader) if len(reads) > 595 else 1)

        store.add_many(((f"t{number}", wide) for number in range(600)), progress=read)
        assert set(reads) == {1}
        with pytest.raises(KeyError, match="no task 'none'; it has 601"):
            store.remove_many([*store.names(), "none"])
        with pytest.raises(KeyError, match="no task 'none'; it has 601"):
            store.rename("none", "other")
        assert len(reader) == 601
