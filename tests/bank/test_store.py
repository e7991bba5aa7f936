# SPDX-License-Identifier: Apache-2.0
"""The store's contract: what goes in comes out, names, versions, one file, compaction, and PEFT at both ends."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import tempfile
import time
from contextlib import closing, nullcontext, suppress
from datetime import datetime
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load

from smn_peft import MaskConfig
from smn_peft.bank.remote import RemoteFile
from smn_peft.bank.source import StoredAdapter, TaskInfo
from smn_peft.bank.store import DiskStore
from smn_peft.storage.adapter_config import CONFIG_NAME
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from tests.bank.kill_writer import fork
from tests.bank.stores import PREFIX, adapter, assert_is, number_of


@pytest.fixture
def store(tmp_path):
    with DiskStore(tmp_path / "bank") as store:
        yield store


def test_what_goes_in_comes_out_and_another_process_sees_it(store):
    for number in range(3):
        store.add(f"task {number}", adapter(number))
    assert store.names() == ["task 0", "task 1", "task 2"]
    assert len(store) == 3
    assert "task 1" in store
    assert "task" not in store
    assert 1 not in store
    with DiskStore(store.path, read_only=True) as other:
        for number in range(3):
            assert_is(other.read(f"task {number}"), adapter(number))
    store.close()
    assert os.listdir(store.path.parent) == ["bank.sqlite"]


def test_replacing_renaming_and_removing(store):
    store.add_many([("a", adapter(0)), ("b", adapter(1)), ("c", adapter(2))])
    first = {name: store.version(name) for name in "abc"}
    assert len(set(first.values())) == 3
    with pytest.raises(ValueError, match=r"has a task 'a' already.*--replace"):
        store.add("a", adapter(3))
    assert number_of(store.read("a")) == 0
    store.add("a", adapter(3), replace=True)
    assert number_of(store.read("a")) == 3
    assert store.version("a") not in first.values()
    store.remove("b")
    for call in (store.read, store.version, store.remove, store.info):
        with pytest.raises(KeyError, match="no task 'b'; it has 2"):
            call("b")
    store.rename("c", "b")
    assert number_of(store.read("b")) == 2
    assert store.version("b") == first["c"]
    with pytest.raises(ValueError, match="has a task 'a' already"):
        store.rename("b", "a")
    with pytest.raises(KeyError, match="no task 'c'"):
        store.rename("c", "d")
    store.add("c", adapter(4))
    assert store.version("c") > max(first.values())
    assert store.names() == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["", "x" * 201, "__base__", "a\nb", "a\0", "\ud800", "a\u2028b"])
def test_names_that_are_refused(store, name):
    with pytest.raises(ValueError, match="name"):
        store.add(name, adapter(0))
    store.add("a", adapter(0))
    with pytest.raises(ValueError, match="name"):
        store.rename("a", name)
    assert store.names() == ["a"]


def test_names_that_are_odd_and_fine(store):
    odd = sorted(["../x", "a b", "Ünïcode 鳥 👩‍🔬", "%s", "'; DROP TABLE task; --", "x" * 200])
    store.add_many((name, adapter(number)) for number, name in enumerate(odd))
    assert store.names() == odd
    assert [number_of(store.read(name)) for name in odd] == list(range(len(odd)))


def test_many_are_added_at_once_or_not_at_all(store):
    store.add("old", adapter(0))
    damaged = StoredAdapter({}, {f"{PREFIX}fc.smn_mask": torch.zeros(3)})
    no_mask = StoredAdapter({}, {f"{PREFIX}fc.weight": torch.zeros(3)})
    later = StoredAdapter({"format_version": 99}, adapter(1).tensors)
    for bad, message in ((damaged, "'bad' is damaged"), (no_mask, "holds no mask"), (later, "format version 99")):
        with pytest.raises(ValueError, match=message):
            store.add_many([("a", adapter(1)), ("old", adapter(1)), ("bad", bad)], replace=True)
        assert store.names() == ["old"]
        assert number_of(store.read("old")) == 0
    with pytest.raises(ValueError, match="Two adapters are to be the task 'a'"):
        store.add_many([("a", adapter(1)), ("a", adapter(2))])
    seen = []
    store.add_many([(f"a{n}", adapter(n)) for n in range(5)], progress=lambda: seen.append(len(store)))
    assert seen == [1] * 5  # nothing is seen before all is


def test_a_row_is_an_ordinary_safetensors_file(store):
    store.add_many((f"t{number}", adapter(number, head=15 + 3 * number)) for number in range(4))
    store.close()
    with closing(sqlite3.connect(store.path)) as connection:
        for number in range(4):
            (blob,) = connection.execute("SELECT blob FROM task WHERE name = ?", (f"t{number}",)).fetchone()
            tensors = load(blob)
            expected = adapter(number, 15 + 3 * number).tensors[f"{PREFIX}head.weight"]
            assert torch.equal(tensors[f"{PREFIX}head.weight"], expected)
            assert f"{PREFIX}blocks.smn_masks" in tensors


def test_tensors_stay_whatever_happens(store):
    store.add("a", adapter(0, head=30_000))
    held = store.read("a")
    with DiskStore(store.path) as other:
        other.read("a").tensors[f"{PREFIX}head.weight"].zero_()
    assert number_of(store.read("a")) == 0
    store.add("b", adapter(1))
    store.remove("a")
    store.compact()
    store.close()
    store.path.unlink()
    assert_is(held, adapter(0, head=30_000))


def test_removed_room_is_filled_or_given_back(store):
    store.add_many((f"t{number}", adapter(number, head=3000)) for number in range(24))
    versions = {name: store.version(name) for name in store.names()}
    store.remove_many([f"t{number}" for number in range(0, 24, 2)])
    before = store.summary()
    assert before.free > 12 * 9000
    store.add("t0", adapter(0, head=3000))
    assert store.summary().free < before.free
    store.remove("t0")
    with DiskStore(store.path) as reader:
        assert reader.names() == store.names()
        first, after = store.compact()
        assert all(number_of(reader.read(f"t{number}")) == number for number in range(1, 24, 2))
    assert after < first - 12 * 9000
    assert store.summary().free == 0
    assert {name: store.version(name) for name in store.names()} == {name: versions[name] for name in store.names()}


def test_a_copy_is_the_bank_as_it_was_when_it_was_asked_for(store, tmp_path):
    store.add_many([("a", adapter(0, head=30_000)), ("b", adapter(1))])
    store.remove("a")
    store.add_many(
        [("c", adapter(2)), ("d", adapter(3))],
        progress=lambda: (tmp_path / "x.sqlite").exists() or (store.copy(tmp_path / "x.sqlite")),
    )
    with pytest.raises(FileExistsError, match="name another file"):
        store.copy(tmp_path / "x.sqlite")
    with DiskStore(tmp_path / "x.sqlite", read_only=True, copy=RemoteFile("user/bank")) as copy:
        assert copy.names() == ["b"]
        assert number_of(copy.read("b")) == 1
        assert copy.path.stat().st_size < 30_000


def test_info(store):
    before = int(time.time())
    store.add("a", adapter(7))
    info = store.info("a")
    assert isinstance(info, TaskInfo)
    assert store.infos() == [info]
    assert (info.base, info.codec, info.fingerprint) == ("tiny", "bits", None)
    masks = [t for key, t in adapter(7).tensors.items() if key.endswith("mask")]
    bits = torch.cat(masks).numpy()
    assert info.weights == 8 * bits.size
    assert info.density == pytest.approx(int(sum(bin(byte).count("1") for byte in bits)) / info.weights)
    assert (info.sizes.head, info.sizes.statistics, info.sizes.scores) == (66, 8, 0)
    assert 0 < info.sizes.mask < bits.size
    assert info.sizes.total > info.sizes.mask + 66 + 8
    moment = datetime.fromisoformat(info.added)
    assert moment.tzinfo is not None
    assert before <= moment.timestamp() <= time.time()
    store.close()
    with DiskStore(store.path) as store:
        assert store.summary().bytes == store.path.stat().st_size
        assert (store.summary().tasks, store.summary().version) == (1, 1)


def test_opening(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no bank.*smn bank build"):
        DiskStore(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"is no bank and holds other files \(file\)"):
        DiskStore(tmp_path)
    with DiskStore(tmp_path / "deep" / "bank") as store:
        store.add("a", adapter(0))
    with pytest.raises(ValueError, match="is closed"):
        store.read("a")
    with DiskStore(tmp_path / "deep" / "bank" / "bank.sqlite") as store:
        assert store.names() == ["a"]
    with DiskStore(tmp_path / "mine.sqlite") as store:  # a file may lie among others
        store.add("b", adapter(1))
    with DiskStore(tmp_path / "mine.sqlite", read_only=True) as store:
        assert store.names() == ["b"]
    with DiskStore(tmp_path / "deep" / "bank", read_only=True) as store:
        assert number_of(store.read("a")) == 0
        with pytest.raises(PermissionError, match="read-only"):
            store.remove("a")


def unwritable(path, mode):
    return mode != os.W_OK


def test_a_store_on_a_disk_that_cannot_be_written(store, monkeypatch):
    store.add("a", adapter(0))
    store.close()
    monkeypatch.setattr(os, "access", unwritable)
    with DiskStore(store.path) as reader:
        assert number_of(reader.read("a")) == 0
        assert os.listdir(store.path.parent) == ["bank.sqlite"]
        for pragma in ("user_version = 2", "query_only = OFF"):
            with suppress(sqlite3.OperationalError):
                reader._connection.execute(f"PRAGMA {pragma}")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._connection.execute("DELETE FROM task")


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root can be another user")
def test_a_store_in_another_users_folder(store, tmp_path):
    """Left in write-ahead mode, as by a reader that was open: without files beside it, it cannot be read as usual."""
    store.add("a", adapter(0))
    with DiskStore(store.path, read_only=True) as reader:
        reader.names()
        store.close()
    assert store.path.read_bytes()[18:20] == b"\2\2"
    for folder in store.path.parents:
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)

    def work():
        os.setuid(65534)
        with DiskStore(store.path) as mine:
            assert number_of(mine.read("a")) == 0
            with pytest.raises(PermissionError, match="check the permissions"):
                mine.remove("a")

    assert os.waitpid(fork(work), 0)[1] == 0
    assert os.listdir(store.path.parent) == ["bank.sqlite"]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_norm": "adapt"},
        {"codec": "entropy", "save_dtype": "bfloat16"},
        {"codec": "entropy", "save_dtype": "int8"},
        {"codec": "entropy", "trainable_fraction": 0.5},
        {"save_scores": True},
    ],
    ids=["bits", "coded", "int8", "selected", "scores"],
)
def test_an_adapter_of_peft_goes_in_and_comes_out_unchanged(store, tmp_path, options):
    def build():
        torch.manual_seed(0)
        return timm.create_model("resnet10t", num_classes=3)

    config = MaskConfig(modules_to_save=["fc"], target_modules=["layer1.0.conv1", "layer4.0.conv1"], **options)
    model = get_peft_model(build(), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "smn_" in key:
                parameter.uniform_(-0.1, 0.9)
    with pytest.warns(UserWarning, match="rounded") if "save_dtype" in options else nullcontext():
        model.save_pretrained(tmp_path / "in")
    config_file = tmp_path / "in" / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text())))  # not as PEFT writes it
    store.add("a", tmp_path / "in")
    assert [check.error for check in store.verify()] == [None]
    store.export("a", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == config_file.read_bytes()
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (tmp_path / "in" / WEIGHTS_NAME).read_bytes()
    again = PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    images = torch.randn(2, 3, 32, 32)
    expected = PeftModel.from_pretrained(build(), tmp_path / "in").eval()(images)
    assert torch.equal(again(images), expected)
    with pytest.raises(FileExistsError, match="holds an adapter already"):
        store.export("a", tmp_path / "out")


@pytest.mark.parametrize("stopped", [CONFIG_NAME, WEIGHTS_NAME])
def test_an_export_that_did_not_come_to_its_end_is_taken_up(store, tmp_path, monkeypatch, stopped):
    store.add("a", adapter(0))
    replace = os.replace

    def full(source, target):
        if Path(target).name == stopped:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            store.export("a", tmp_path / "out")
    store.export("a", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [CONFIG_NAME, WEIGHTS_NAME]
    store.add("b", adapter(1))
    (tmp_path / "out" / WEIGHTS_NAME).unlink()
    with pytest.raises(FileExistsError):  # what is there is another adapter's
        store.export("b", tmp_path / "out")
