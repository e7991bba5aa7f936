# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile stores, and full disks: an error that names the task, the others served, nothing lost."""

from __future__ import annotations

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

from smn_peft.bank.store import DiskStore, StoreBusyError
from smn_peft.storage import AdapterFileError
from tests.bank.kill_writer import fork
from tests.bank.stores import adapter, number_of

EXPECTED = (AdapterFileError, ValueError, OSError, StoreBusyError, KeyError)


def build(path: Path, count: int) -> Path:
    with DiskStore.open(path) as store:
        store.add_many((f"t{number}", adapter(number)) for number in range(count))
    return path


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("five") / "bank", 5)


@pytest.fixture
def copy(five, tmp_path) -> Path:
    return Path(shutil.copytree(five, tmp_path / "copy"))


def shard(path: Path) -> Path:
    (file,) = (path / "shards").iterdir()
    return file


def edit(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path / "index.sqlite")) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(statement, values)


def flip(file: Path, position: int, bit: int = 1) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ bit]))


def where_is(path: Path, name: str) -> tuple[str, int, int]:
    query = "SELECT file, start, task.size FROM task JOIN shard ON shard.id = shard WHERE name = ?"
    with closing(sqlite3.connect(path / "index.sqlite")) as connection:
        found: tuple[str, int, int] = connection.execute(query, (name,)).fetchone()
        return found


def test_one_damaged_task_among_a_thousand(tmp_path):
    path = build(tmp_path / "few", 20)
    with DiskStore.open(path) as few, DiskStore.open(tmp_path / "bank") as store:
        coded = [few.read(f"t{number}") for number in range(20)]
        store.add_many((f"t{number}", coded[number % 20]) for number in range(1000))
    path = tmp_path / "bank"
    file, start, size = where_is(path, "t417")
    flip(path / "shards" / file, start + size // 2)
    with DiskStore.open(path) as store:
        for _ in range(2):
            with pytest.raises(AdapterFileError, match=rf"Task 't417' in .*{file} is damaged: .*checksum"):
                store.read("t417")
        for number in range(0, 1000, 9):
            assert number_of(store.read(f"t{number}")) == number % 20
        bad = [check for check in store.verify() if check.error]
        assert [check.name for check in bad] == ["t417"]
        store.remove("t0")
        store.remove("t999")
        found = store.compact()
        assert found.damaged == ("t417",)
        assert found.moved == 997
        assert number_of(store.read("t416")) == 16
        with pytest.raises(AdapterFileError, match="t417"):
            store.read("t417")
        store.add("t417", adapter(417), replace=True)
        assert number_of(store.read("t417")) == 417


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 1), "bytes, the index says"),
        (lambda file: os.truncate(file, 0), "has 0 bytes, the index says"),
        (lambda file: file.unlink(), "its shard is missing"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is no plain file"),
        (lambda file: (file.unlink(), file.mkdir()), "is no plain file"),
    ],
    ids=["cut", "empty", "gone", "pipe", "folder"],
)
def test_a_damaged_shard(copy, change, message):
    change(shard(copy))
    with DiskStore.open(copy) as store:
        with pytest.raises(AdapterFileError, match=f"Task 't2' in .* is damaged: .*{message}"):
            store.read("t2")
        assert all(message in str(check.error) for check in store.verify())
        store.add("fine", adapter(9))
        assert number_of(store.read("fine")) == 9


def test_a_damaged_header_is_found_though_reading_does_without(copy):
    flip(shard(copy), 20)
    with DiskStore.open(copy) as store:
        assert {check.error for check in store.verify()} == {"its shard's header is damaged"}
        assert number_of(store.read("t1")) == 1


def bomb(size: int) -> bytes:
    return zlib.compress(b"[" * size, 9)


def table(*rows: object) -> bytes:
    return zlib.compress(repr(list(rows)).replace("'", '"').encode())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("start", 1 << 40),
        ("start", -8),
        ("size", 1 << 62),
        ("size", "many"),
        ("checksum", "text"),
        ("tensors", bomb(1 << 28)),
        ("tensors", b"x"),
        ("tensors", "text"),
        ("tensors", table(["k", "U8", [1 << 40], 0, 8])),
        ("tensors", table(["k", "U8", [0, 1 << 47], 0, 0], ["k", "U8", [0], 0, 0])),
        ("tensors", table(["k", "F32", [1], 1, 5])),
        ("tensors", table(["k", "U8", [-1], 8, 7])),
        ("tensors", table(["k", "NaN", [1], 0, 1])),
        ("tensors", table([["k"], "U8", [1], 0, 1])),
        ("tensors", table(["k", "U8", [1] * 99, 0, 1])),
        ("tensors", table(1)),
        ("config", b"[1]"),
        ("config", b"{" * 100_000),
        ("config", b'{"format_version": 77}'),
        ("config", b'{"trainable_fraction": "abc"}'),
    ],
)
def test_a_hostile_row(copy, column, value):
    """Even where the checksum was made to fit."""
    edit(copy, f"UPDATE task SET {column} = ? WHERE name = 't3'", value)
    with closing(sqlite3.connect(copy / "index.sqlite")) as connection, connection:
        if column in ("tensors", "config") and isinstance(value, bytes):
            start, size, tensors, config = connection.execute(
                "SELECT start, size, tensors, config FROM task WHERE name = 't3'"
            ).fetchone()
            data = shard(copy).read_bytes()[start : start + size]
            checksum = zlib.crc32(data, zlib.crc32(tensors, zlib.crc32(config)))
            connection.execute("UPDATE task SET checksum = ? WHERE name = 't3'", (checksum,))
    before = time.monotonic()
    with DiskStore.open(copy) as store:
        with pytest.raises(ValueError, match=r"t3' in .* is damaged|format version 77") as caught:
            store.read("t3")
        assert "sum" not in str(caught.value) or column == "checksum"
        (bad,) = [check for check in store.verify() if check.error]
        assert bad.name == "t3"
        assert number_of(store.read("t2")) == 2
        store.compact()
    assert time.monotonic() - before < 10


@pytest.mark.parametrize("file", ["../../secret.safetensors", "/dev/zero", "", "x" * 32 + ".safetensors", b"\xff"])
def test_an_index_that_names_other_files(copy, file):
    edit(copy, "UPDATE shard SET file = ?", file)
    with DiskStore.open(copy) as store:
        with pytest.raises(AdapterFileError, match="its row in the index is wrong"):
            store.read("t0")
        store.add("fine", adapter(9))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE task SET name = x'ff41' WHERE id = 1",
        "UPDATE task SET name = CAST(x'ff41' AS TEXT) WHERE id = 1",
        "UPDATE task SET shard = 'x' WHERE id = 1",
        "UPDATE task SET size = '9e999' WHERE id = 1",
        "UPDATE task SET weights = x'00' WHERE id = 1",
        "UPDATE task SET added = 1 << 49 WHERE id = 1",
        "UPDATE shard SET size = '9e999'",
        "UPDATE shard SET header_size = x'00', header = 'x'",
        "UPDATE sqlite_sequence SET seq = 'x' WHERE name = 'task'",
        "UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'task'",
    ],
)
def test_values_of_other_kinds_are_errors_that_are_foreseen(copy, statement):
    edit(copy, statement)
    with DiskStore.open(copy) as store:
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
        if "shard SET size" not in statement:
            assert number_of(store.read("t2")) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n",
        "CREATE TRIGGER t AFTER INSERT ON task BEGIN DELETE FROM task; END",
        "UPDATE sqlite_master SET sql = replace(sql, 'added INTEGER', 'added BLOB') WHERE name = 'task'",
        "ALTER TABLE task ADD COLUMN more TEXT",
    ],
)
def test_tables_that_are_not_a_banks(copy, statement):
    edit(copy, statement)
    with pytest.raises(AdapterFileError, match="does not hold a bank's tables"):
        DiskStore.open(copy)


def test_other_files_and_later_versions(copy):
    edit(copy, "PRAGMA user_version = 2")
    with pytest.raises(ValueError, match=r"has layout 2.*pip install -U smn_peft"):
        DiskStore.open(copy)
    edit(copy, "PRAGMA application_id = 7")
    with pytest.raises(ValueError, match="is no index of a bank"):
        DiskStore.open(copy)
    (copy / "index.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(AdapterFileError, match=r"index.sqlite is damaged .*fetch the bank again"):
        DiskStore.open(copy)


def test_a_writer_removes_no_file_that_is_not_its_own(copy, tmp_path):
    foreign = [copy / "shards" / name for name in ("train-0.tar", ".hidden", "0" * 32 + ".safetensors.bak")]
    secret = tmp_path / "secret.safetensors"
    left = [copy / "shards" / name for name in ("0" * 32 + ".safetensors", "." + "0" * 32 + ".safetensors.ab_d123e")]
    for path in [*foreign, secret, *left]:
        path.write_bytes(b"content")
    with DiskStore.open(copy) as store:
        store.add("more", adapter(9))
    assert all(path.exists() for path in foreign)
    assert not any(path.exists() for path in left)
    edit(copy, "UPDATE shard SET file = '../../secret.safetensors' WHERE id = 1")
    with DiskStore.open(copy) as store:
        store.remove_many([name for name in store.names() if name != "more"])
    assert secret.exists()


def test_a_lost_index_costs_no_shard(copy):
    held = {path: path.read_bytes() for path in (copy / "shards").iterdir()}
    (copy / "index.sqlite").write_bytes(b"")
    for read_only in (False, True):
        with pytest.raises(AdapterFileError, match=r"shards holds 1 files .*index.sqlite is lost or empty"):
            DiskStore.open(copy, read_only=read_only)
    (copy / "index.sqlite").unlink()
    with pytest.raises(AdapterFileError, match="lost or empty"):
        DiskStore.open(copy)
    assert not (copy / "index.sqlite").exists()
    assert {path: path.read_bytes() for path in (copy / "shards").iterdir()} == held


def test_an_index_beside_other_shards_costs_none_of_them(copy):
    (file,) = (copy / "shards").iterdir()
    other = file.with_name("0" * 32 + ".safetensors")
    file.rename(other)
    with DiskStore.open(copy) as store:
        store.add("more", adapter(9))
    assert other.exists()


def test_a_linked_folder_of_shards_is_not_written_to(copy, tmp_path):
    (copy / "shards").rename(tmp_path / "elsewhere")
    (copy / "shards").symlink_to(tmp_path / "elsewhere")
    unknown = tmp_path / "elsewhere" / ("0" * 32 + ".safetensors")
    unknown.write_bytes(b"another bank's")
    with DiskStore.open(copy) as store:
        assert number_of(store.read("t1")) == 1
        with pytest.raises(ValueError, match="shards is a link, and a bank writes only to a folder of its own"):
            store.add("more", adapter(9))
        assert len(store) == 5
    assert unknown.exists()


def test_a_damaged_index_gives_the_right_tasks_or_an_error(five, tmp_path):
    """Bits flipped and ends cut off at random: no crash, no hang, no other content."""
    generator, refused = random.Random(0), 0
    original = (five / "index.sqlite").read_bytes()
    path = Path(shutil.copytree(five, tmp_path / "copy"))
    for attempt in range(60):
        content = bytearray(original)
        if attempt % 5 == 0:
            del content[generator.randrange(1, len(content)) :]
        else:
            for _ in range(generator.choice([1, 3, 100])):
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (path / "index.sqlite").write_bytes(content)
        try:
            with DiskStore.open(path) as store:
                store.infos()
                names = store.names()
                for name in [f"t{number}" for number in range(5)]:
                    try:
                        assert name == f"t{number_of(store.read(name))}"
                    except EXPECTED:
                        refused += 1
                    else:
                        assert name in names
                list(store.verify())
        except EXPECTED:
            refused += 1
    assert refused > 30


def test_a_full_disk_at_any_byte(tmp_path):
    """A limit on the size of files stands in for the disk's end: in the shard, in the journal, in the index."""
    path = tmp_path / "bank"
    build(path, 3)
    size = (path / "index.sqlite").stat().st_size

    def work() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        store, messages = DiskStore.open(path), []
        # From nothing to the first limit that the index fits in; the adapters are larger than the index.
        for limit in [*range(0, size, 3001), *range(size, size + 40_000, 4003)]:
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
        assert all("Cannot write" in message for message in messages), messages
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        failed: list[str] = []
        changes: list[Callable[[], object]] = [
            lambda: store.remove("t0"),
            lambda: store.rename("t0", "x"),
            lambda: store.compact(),
        ]
        for change in changes:
            try:
                change()
            except OSError as error:
                failed.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert len(failed) >= 2, failed
        assert store.names() == ["t0", "t1", "t2"]
        store.add("last", adapter(4))
        assert len(os.listdir(path / "shards")) == store.summary().shards, "something was left lying"

    assert os.waitpid(fork(work), 0)[1] == 0
    with DiskStore.open(path) as store:
        assert [number_of(store.read(name)) for name in ("t0", "t1", "t2", "last")] == [0, 1, 2, 4]
