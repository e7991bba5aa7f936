# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files, full disks and other limits: an error that says what it is, and nothing lost."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from smn_peft.bank.source import StoredAdapter
from smn_peft.bank.store import DiskStore, StoreBusyError
from smn_peft.storage.files import AdapterFileError
from tests.bank.kill_writer import fork
from tests.bank.stores import adapter, number_of

EXPECTED = (AdapterFileError, ValueError, OSError, StoreBusyError, KeyError)


def build(path: Path, count: int) -> Path:
    with DiskStore(path) as store:
        store.add_many((f"t{number}", adapter(number)) for number in range(count))
    return path


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("five") / "bank.sqlite", 5)


@pytest.fixture
def copy(five, tmp_path) -> Path:
    return Path(shutil.copy(five, tmp_path / "copy.sqlite"))


def edit(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(statement, values)


def flip(file: Path, needle: bytes) -> None:
    """Change a bit in the middle of some bytes of the file."""
    content = bytearray(file.read_bytes())
    content[content.index(needle) + len(needle) // 2] ^= 1
    file.write_bytes(content)


def blob_of(path: Path, name: str) -> bytes:
    with closing(sqlite3.connect(path)) as connection:
        blob: bytes = connection.execute("SELECT blob FROM task WHERE name = ?", (name,)).fetchone()[0]
        return blob


def test_one_damaged_task_among_many(tmp_path):
    with DiskStore(build(tmp_path / "few", 20)) as few, DiskStore(tmp_path / "bank") as store:
        coded = [few.read(f"t{number}") for number in range(20)]
        tasks = [(f"t{number}", coded[number % 20]) for number in range(400)]
        store.add_many([*tasks[:217], ("t217", adapter(217)), *tasks[218:]])
    path = store.path
    flip(path, blob_of(path, "t217")[-40:])
    with DiskStore(path) as store:
        for _ in range(2):
            with pytest.raises(AdapterFileError, match=rf"Task 't217' in {path} is damaged: .*checksum"):
                store.read("t217")
        for number in range(0, 400, 9):
            assert number_of(store.read(f"t{number}")) == number % 20
        assert [check.name for check in store.verify() if check.error] == ["t217"]
        store.remove_many(["t0", "t399"])
        store.compact()
        assert number_of(store.read("t216")) == 16
        with pytest.raises(AdapterFileError, match="t217"):
            store.read("t217")
        store.add("t217", adapter(217), replace=True)
        assert number_of(store.read("t217")) == 217
        assert not any(check.error for check in store.verify())


def facts(**changes: object) -> str:
    sizes = {"mask": 1, "head": 1, "statistics": 1, "scores": 0, "total": 3}
    numbers = {"weights": 8, "density": 0.5, "checksum": 7, "sizes": sizes}
    return json.dumps({"base": None, "fingerprint": None, "codec": "bits", "added": "", **numbers, **changes})


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("facts", b"x"),
        ("facts", "text"),
        ("facts", "[1]"),
        ("facts", "{}"),
        ("facts", "[" * 9_000),
        ("facts", " " * 20_000 + facts()),
        ("facts", facts(weights="many")),
        ("facts", facts(weights=-1)),
        ("facts", facts(checksum=1 << 60)),
        ("facts", facts(checksum=True)),
        ("facts", facts(density=None)),
        ("facts", facts(base=[1])),
        ("facts", facts(sizes={"mask": 1})),
        ("facts", facts(more=1)),
        ("facts", facts(checksum=7)),
        ("blob", b""),
        ("blob", "text"),
        ("blob", b"\xff" * 8),
        ("blob", b"\x10" + b"\0" * 7 + b'{"a":{"dtype":1}'),
        ("config", b"[1]"),
        ("config", b"{" * 100_000),
        ("config", b'{"format_version": 77}'),
        ("config", b'{"trainable_fraction": "abc"}'),
        ("config", b"{}" + b" " * (1 << 25)),
    ],
)
def test_a_hostile_row(copy, column, value):
    """Even where the checksum was made to fit."""
    edit(copy, f"UPDATE task SET {column} = ? WHERE name = 't3'", value)
    if column != "facts" and isinstance(value, bytes):
        with closing(sqlite3.connect(copy)) as connection, connection:
            query = "SELECT facts, config, blob FROM task WHERE name = 't3'"
            text, config, blob = connection.execute(query).fetchone()
            text = json.dumps({**json.loads(text), "checksum": zlib.crc32(blob, zlib.crc32(config))})
            connection.execute("UPDATE task SET facts = ? WHERE name = 't3'", (text,))
    before = time.monotonic()
    with DiskStore(copy) as store:
        with pytest.raises(ValueError, match=r"t3' in .* is damaged|format version 77") as caught:
            store.read("t3")
        assert "its checksum is" not in str(caught.value) or value == facts(checksum=7)
        (bad,) = [check for check in store.verify() if check.error]
        assert bad.name == "t3"
        assert number_of(store.read("t2")) == 2
        store.compact()
        store.remove("t3")
        assert len(store.infos()) == 4
    assert time.monotonic() - before < 10


def test_facts_that_do_not_fit_are_found(copy):
    with DiskStore(copy) as store:
        weights = store.info("t3").weights
    edit(copy, "UPDATE task SET facts = replace(facts, ?, '99') WHERE name = 't3'", str(weights))
    with DiskStore(copy) as store:
        assert store.info("t3").weights == 99
        assert [check.name for check in store.verify() if check.error] == ["t3"]


def test_a_large_row_takes_no_more_memory_than_it_has(tmp_path, five):
    """Rows of 60 MB, where a bank's configs have 16 MB at most, and a blob that is none."""
    path = Path(shutil.copy(five, tmp_path / "copy.sqlite"))
    edit(path, "UPDATE task SET config = zeroblob(60000000) WHERE name = 't3'")
    edit(path, "UPDATE task SET blob = zeroblob(60000000) WHERE name = 't4'")

    def work() -> None:
        with DiskStore(path) as store:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(AdapterFileError, match=r"Task 't3' in .* too large"):
                store.read("t3")
            assert len(store.infos()) == 5
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 30_000
            with pytest.raises(AdapterFileError, match=r"Task 't4' in .* is damaged"):
                store.read("t4")
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 190_000

    assert os.waitpid(fork(work), 0)[1] == 0


@pytest.mark.parametrize("name", ["a\nb", "__base__", "", "x" * 300, b"\xff41"])
def test_a_row_whose_name_is_not_allowed(copy, name):
    kind = "CAST(? AS TEXT)" if isinstance(name, bytes) else "?"
    edit(copy, f"UPDATE task SET name = {kind} WHERE id = 2", name)
    with DiskStore(copy) as store:
        for call in (store.names, store.infos):
            with pytest.raises(AdapterFileError, match="a task whose name is not allowed"):
                call()
        assert len([check for check in store.verify() if check.error]) == 1
        assert number_of(store.read("t2")) == 2
        if name and isinstance(name, str):
            with pytest.raises(AdapterFileError, match="not allowed"):
                store.read(name)
            store.remove(name)
            assert store.names() == ["t0", "t2", "t3", "t4"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE task SET name = x'ff41' WHERE id = 1",
        "UPDATE task SET facts = x'00' WHERE id = 1",
        "UPDATE sqlite_sequence SET seq = 'x' WHERE name = 'task'",
        "UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'task'",
        "UPDATE sqlite_master SET rootpage = 2 WHERE name = 'sqlite_autoindex_task_1'",
        "UPDATE sqlite_master SET rootpage = 1 WHERE name = 'task'",
    ],
)
def test_values_of_other_kinds_are_errors_that_are_foreseen(copy, statement):
    edit(copy, statement)
    with suppress(*EXPECTED), DiskStore(copy) as store:
        for work in (
            store.names,
            store.infos,
            store.summary,
            lambda: store.read("t0"),
            lambda: list(store.verify()),
            store.compact,
            lambda: store.add("more", adapter(8)),
            lambda: store.rename("t1", "t9"),
            lambda: store.remove("t0"),
        ):
            with suppress(*EXPECTED):
                work()
        if "rootpage" not in statement:
            assert number_of(store.read("t2")) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n",
        "CREATE TRIGGER t AFTER INSERT ON task BEGIN DELETE FROM task; END",
        "UPDATE sqlite_master SET sql = replace(sql, 'facts TEXT', 'facts BLOB') WHERE name = 'task'",
        "ALTER TABLE task ADD COLUMN more TEXT",
    ],
)
def test_tables_that_are_not_a_banks(copy, statement):
    edit(copy, statement)
    with pytest.raises(AdapterFileError, match="does not hold a bank's table"):
        DiskStore(copy)


def test_other_files_and_other_versions(copy):
    for version in (2, 0):
        edit(copy, f"PRAGMA user_version = {version}")
        with pytest.raises(ValueError, match=rf"has version {version}; .*pip install -U smn_peft"):
            DiskStore(copy)
    edit(copy, "PRAGMA application_id = 7")
    with pytest.raises(ValueError, match="is a database and no bank"):
        DiskStore(copy)
    copy.write_bytes(b"no database" * 100)
    with pytest.raises(AdapterFileError, match=r"copy.sqlite is damaged .*fetch the bank again"):
        DiskStore(copy)
    copy.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="holds no bank"):
        DiskStore(copy, read_only=True)


def test_an_older_copy_that_is_put_back_costs_nothing(tmp_path):
    """With and without the log that a killed writer left beside the newer one."""
    path = build(tmp_path / "bank.sqlite", 5)
    older = path.read_bytes()

    def work() -> None:
        store = DiskStore(path)
        store.add("new", adapter(9))
        assert len(store) == 6
        store.add_many((f"new{number}", adapter(number, head=3000)) for number in range(9))
        os._exit(0)  # without closing

    assert os.waitpid(fork(work), 0)[1] == 0
    log = Path(f"{path}-wal")
    assert log.stat().st_size
    path.write_bytes(older)
    for _ in range(2):
        with pytest.raises(AdapterFileError, match=r"sqlite-wal belongs to another copy .*move it away"):
            DiskStore(path)
    assert path.read_bytes() == older
    log.rename(tmp_path / "kept")
    with DiskStore(path) as store:
        store.add("more", adapter(7))
        assert store.names() == ["more", "t0", "t1", "t2", "t3", "t4"]
        assert not any(check.error for check in store.verify())


def test_what_a_killed_writer_left_is_taken_up(tmp_path):
    path = build(tmp_path / "bank.sqlite", 2)

    def work() -> None:
        store = DiskStore(path)
        store.add("more", adapter(6))
        assert len(store) == 3
        store.add("new", adapter(7))
        os._exit(0)  # without closing

    assert os.waitpid(fork(work), 0)[1] == 0
    assert Path(f"{path}-wal").stat().st_size
    with DiskStore(path, read_only=True) as store:
        assert number_of(store.read("new")) == 7
    with DiskStore(path) as store:
        assert len(store) == 4
    assert os.listdir(tmp_path) == ["bank.sqlite"]
    assert path.read_bytes()[18:20] == b"\1\1"


def test_a_damaged_file_gives_the_right_tasks_or_an_error(five, tmp_path):
    """Bits flipped and ends cut off at random: no crash, no hang, no other content."""
    generator, refused = random.Random(0), 0
    original, path = five.read_bytes(), tmp_path / "copy.sqlite"
    for attempt in range(60):
        content = bytearray(original)
        if attempt % 5 == 0:
            del content[generator.randrange(1, len(content)) :]
        else:
            for _ in range(generator.choice([1, 3, 100])):
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        for name in ("-wal", "-shm", "-journal"):
            Path(f"{path}{name}").unlink(missing_ok=True)
        try:
            with DiskStore(path) as store:
                for name in [f"t{number}" for number in range(5)]:
                    try:
                        assert name == f"t{number_of(store.read(name))}"
                    except EXPECTED:
                        refused += 1
                store.infos()
                store.names()
                refused += any(check.error for check in store.verify())
        except EXPECTED:
            refused += 1
    assert refused > 30


def test_a_full_disk_at_any_byte(tmp_path):
    """A limit on the size of files stands in for the disk's end: in the log, and in the file."""
    path = build(tmp_path / "bank.sqlite", 3)
    size = path.stat().st_size

    def work() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        store, messages = DiskStore(path), []
        # From nothing to the first limit that the log of a change fits in
        for limit in [*range(0, size, 3001), *range(size, size + 70_000, 8003)]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                store.add_many(((f"n{limit} {k}", adapter(k, head=3000)) for k in range(4)), replace=True)
            except OSError as error:
                messages.append(str(error))
                added = 0
            else:
                added = 4
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            names = store.names()
            assert len([name for name in names if name.startswith(f"n{limit} ")]) == added
            assert not any(check.error for check in store.verify())
            if added:
                store.remove_many([f"n{limit} {k}" for k in range(4)])
        assert len(messages) >= 10, messages
        assert all("write" in message and "space" in message for message in messages), messages
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        changes: list[Callable[[], object]] = [
            lambda: store.remove("t0"),
            lambda: store.rename("t0", "x"),
            lambda: store.compact(),
        ]
        for change in changes:
            with pytest.raises(OSError, match="space"):
                change()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert store.names() == ["t0", "t1", "t2"]
        store.add("last", adapter(4))
        store.close()

    assert os.waitpid(fork(work), 0)[1] == 0
    with DiskStore(path) as store:
        assert [number_of(store.read(name)) for name in ("t0", "t1", "t2", "last")] == [0, 1, 2, 4]
    assert os.listdir(tmp_path) == ["bank.sqlite"], "something was left lying"


def test_limits_that_are_not_damage(tmp_path):
    """Too many open files, a large config, a large adapter: each is said, and what to do."""
    path = build(tmp_path / "bank.sqlite", 1)

    def work() -> None:
        gc.collect()  # what earlier tests left would give descriptors back meanwhile
        store = DiskStore(path)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(OSError, match=r"Too many open files.*ulimit -n") as caught:
            DiskStore(path, read_only=True)
        assert not isinstance(caught.value, PermissionError)
        with pytest.raises(OSError, match="Too many open files"):
            store.add("a", adapter(1))
        for handle in held:
            os.close(handle)
        store.add("a", adapter(1))

    assert os.waitpid(fork(work), 0)[1] == 0
    given = adapter(2)
    large = StoredAdapter({**given.config, "target_modules": ["x" * 70_000_000]}, given.tensors)
    with DiskStore(path) as store:
        with pytest.raises(ValueError, match=r"'b' cannot be taken: its config has 70,0.* bytes") as caught:
            store.add("b", large)
        assert not isinstance(caught.value, AdapterFileError)
        assert store.names() == ["a", "t0"]


def test_a_file_that_is_gone(copy):
    with DiskStore(copy) as store:
        copy.unlink()
        with pytest.raises(FileNotFoundError, match=r"copy\.sqlite is gone"):
            store.add("a", adapter(1))
        assert not copy.exists()


def test_an_adapter_that_is_larger_than_a_row(copy, monkeypatch):
    monkeypatch.setattr("smn_peft.bank.source.MAX_BLOB", 1000)
    with DiskStore(copy) as store:
        with pytest.raises(ValueError, match=r"a bank takes up to 1,000: save it without scores"):
            store.add("b", adapter(1, head=3000))
        store.add("b", adapter(1))
