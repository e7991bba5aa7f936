# SPDX-License-Identifier: Apache-2.0
"""Several processes and threads on one store: kills, a second writer, readers beside writers."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smn_peft.bank import store as database
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
    assert outcome.logs > 100


def test_a_second_writer_waits_a_little_and_a_dead_one_leaves_no_lock(tmp_path):
    with DiskStore(tmp_path) as store:
        store.add("a", adapter(0))
    (ready, report), (_, never) = os.pipe(), os.pipe()

    def hold() -> None:
        with DiskStore(tmp_path) as other:
            other.add_many([("b", adapter(1)), ("c", adapter(2))], progress=lambda: stop())

    def stop() -> None:
        os.write(report, b"x")
        time.sleep(60)

    child = fork(hold)
    assert os.read(ready, 1) == b"x"
    try:
        with DiskStore(tmp_path, timeout=0.15) as store:
            before = time.monotonic()
            with pytest.raises(StoreBusyError, match=f"Another process is writing to {tmp_path}.*try again"):
                store.add("d", adapter(3))
            assert 0.15 <= time.monotonic() - before < 5
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
    """Threads of one store take turns; a second `DiskStore` waits, and is refused, as another process is."""
    with DiskStore(tmp_path) as store, DiskStore(tmp_path, timeout=0.1) as other:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: store.add(f"t{number}", adapter(number)), range(16)))
        assert [number_of(store.read(f"t{number}")) for number in range(16)] == list(range(16))
        with pytest.raises(StoreBusyError, match="Another process is writing"):
            store.add_many([("a", adapter(0))], progress=lambda: other.add("b", adapter(1)))
        assert len(store) == 16


def test_sixty_four_threads_read_while_another_process_changes_and_compacts(tmp_path):
    names = [f"t{number}" for number in range(40)]
    with DiskStore(tmp_path) as store:
        store.add_many((name, adapter(number, head=300)) for number, name in enumerate(names))
    (ready, report) = os.pipe()

    def change() -> None:
        generator = random.Random(0)
        with DiskStore(tmp_path) as other:
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

    with DiskStore(tmp_path) as store:
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


def test_a_forked_child_reads_and_writes_on_its_own(tmp_path):
    """Forked while other threads read and write: no lock and no connection crosses."""
    with DiskStore(tmp_path) as store:
        store.add_many((f"t{number}", adapter(number)) for number in range(4))
        held, stop = store.read("t0"), threading.Event()

        def read() -> None:
            while not stop.is_set():
                number_of(store.read("t1"))

        def work() -> None:
            signal.alarm(60)
            assert number_of(held) == 0
            assert [number_of(store.read(f"t{number}")) for number in range(4)] == [0, 1, 2, 3]
            store.add("t1", adapter(1), replace=True)
            store.close()

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            assert [os.waitpid(fork(work), 0)[1] for _ in range(5)] == [0] * 5
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert store.version("t1")[1] > 8


def test_a_child_that_is_forked_in_the_middle_of_a_change_neither_sees_nor_undoes_it(tmp_path):
    with DiskStore(tmp_path) as store:
        store.add("old", adapter(1))

        def leave() -> None:
            assert store.names() == ["old"]
            assert number_of(store.read("old")) == 1

        def fork_now() -> None:
            child = os.fork()
            if child == 0:
                leave()
                raise SystemExit(0)  # out through the change, whose end is the parent's alone
            codes.append(os.waitpid(child, 0)[1])

        codes: list[int] = []
        parent = os.getpid()
        try:
            store.add_many([("new", adapter(9)), ("other", adapter(8))], progress=fork_now)
        finally:
            if os.getpid() != parent:
                os._exit(0 if sys.exc_info()[0] is SystemExit else 1)
        assert codes == [0, 0]
        assert store.names() == ["new", "old", "other"]
        assert not any(check.error for check in store.verify())


def test_commits_are_on_the_disk(tmp_path, monkeypatch):
    connect, found = sqlite3.connect, []

    class Traced(sqlite3.Connection):
        def close(self) -> None:
            found.append(
                self.execute("PRAGMA synchronous").fetchone() + self.execute("PRAGMA journal_mode").fetchone()
            )
            super().close()

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Traced, **k))
    with DiskStore(tmp_path) as store:
        found.clear()
        store.add("a", adapter(0))
        assert found == [(3, "wal")]  # EXTRA: each commit is synced, in either mode


@pytest.mark.parametrize("network", [False, True])
def test_readers_go_on_beside_a_change_of_any_size(tmp_path, monkeypatch, network):
    """Rows of more bytes than SQLite keeps in memory by itself; on a network disk, as many as it does."""
    monkeypatch.setattr(database, "_PATIENCE", 0.5)
    monkeypatch.setattr(database, "_is_on_network", lambda path: network)
    few, reads, count = adapter(1), [], 50 if network else 600
    wide = StoredAdapter({**few.config, "target_modules": ["layer" * 1000]}, few.tensors)
    with DiskStore(tmp_path) as store, DiskStore(tmp_path) as reader:
        store.add("first", few)

        def read():
            if len(reads) in (0, count - 1):
                assert number_of(reader.read("first")) == 1
            reads.append(len(reader) if len(reads) > count - 5 else 1)

        store.add_many(((f"t{number}", wide) for number in range(count)), progress=read)
        assert set(reads) == {1}
        with pytest.raises(KeyError, match=f"no task 'none'; it has {count + 1}"):
            store.remove_many([*store.names(), "none"])
        with pytest.raises(KeyError, match=f"no task 'none'; it has {count + 1}"):
            store.rename("none", "other")
        assert len(reader) == count + 1
        assert Path(f"{store.path}-wal").exists() is not network


def test_the_kind_of_disk(tmp_path, monkeypatch):
    mounts = f"/dev/sda / ext4 rw 0 0\nhost:/share {tmp_path} nfs4 rw 0 0\n/dev/sdb {tmp_path}/local xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: mounts)
    assert not database._is_on_network(Path("/home/bank.sqlite"))
    assert database._is_on_network(tmp_path / "bank.sqlite")
    assert not database._is_on_network(tmp_path / "local" / "bank.sqlite")
