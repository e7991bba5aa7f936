# SPDX-License-Identifier: Apache-2.0
"""A file is replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from smn_peft.storage.files import atomic_write


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    return path


def assert_old(path: Path) -> None:
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_the_new_file_replaces_the_old_one(path):
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_first_file(tmp_path):
    with atomic_write(str(tmp_path / "file")) as file:
        file.write(b"x")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_an_exception_in_the_block_comes_out_as_it_is(path, error):
    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert_old(path)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_a_full_disk(path, monkeypatch, function):
    monkeypatch.setattr(os, function, no_space)
    with pytest.raises(OSError, match=rf"Cannot write {path}: No space left on device.*untouched") as caught:
        with atomic_write(path) as file:
            file.write(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert_old(path)


def test_a_disk_that_is_full_while_writing(path):
    with pytest.raises(OSError, match=f"Cannot write {path}: No space left on device") as caught, atomic_write(path):
        no_space()
    assert caught.value.errno == errno.ENOSPC
    assert_old(path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written(path, monkeypatch, code):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("smn_peft.storage.files.open", refuse, raising=False)
    with pytest.raises(OSError, match=f"Cannot write {path}: {os.strerror(code)}.*choose another folder") as caught:
        with atomic_write(path):
            pytest.fail("the block must not run")
    assert caught.value.errno == code
    assert_old(path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="Cannot write"), atomic_write(tmp_path / "none" / "file"):
        pytest.fail("the block must not run")


def test_the_bytes_are_on_the_disk_before_the_name(path, monkeypatch):
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _o=original: calls.append(_n) or _o(*a))
    with atomic_write(path) as file:
        file.write(b"new")
    assert calls == ["fsync", "replace"]


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(path):
    path.chmod(0o640)
    with atomic_write(path) as file:
        file.write(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    fresh, plain = path.parent / "fresh", path.parent / "plain"
    with atomic_write(fresh) as file:
        file.write(b"new")
    plain.write_bytes(b"")
    assert stat.S_IMODE(fresh.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_process_s_umask_is_never_another_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("other threads would make files that anybody can read"))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"x")


def test_a_private_file_stays_private_while_it_is_written(path):
    path.chmod(0o600)
    with atomic_write(path):
        assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}
