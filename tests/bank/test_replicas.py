# SPDX-License-Identifier: Apache-2.0
"""Banks that many read: pages of names, copies of a file elsewhere, pickles, and a budget that counts what is held."""

from __future__ import annotations

import pickle
from itertools import pairwise

import fsspec
import pytest
import torch

from smn_peft import MaskBank
from smn_peft.bank import remote
from smn_peft.bank.source import MemorySource
from smn_peft.bank.store import DiskStore
from tests.bank.stores import adapter as stored
from tests.bank.tiny import IMAGES, adapter, build, state_of

DENSITIES = {"sparse": 0.99, "dense": 0.6}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of adapters, and each one's logits."""
    root, logits = tmp_path_factory.mktemp("replicas"), {}
    for seed, (name, density) in enumerate(DENSITIES.items()):
        _, model = adapter("vit", density, seed)
        model.save_pretrained(root / name)
        with torch.no_grad():
            logits[name] = model(IMAGES)
    return root, logits


def filled(path, saved, **folders):
    with DiskStore(path) as store:
        store.add_many((name, saved[0] / folder) for name, folder in (folders or {n: n for n in DENSITIES}).items())
    return path


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["disk", "memory"])
def named(request, tmp_path):
    """A source of 30 tasks, their names in no order."""
    source = DiskStore(tmp_path) if request.param == "disk" else MemorySource()
    one = stored(0)
    for number in range(30):
        source.add(f"{'Task' if number % 3 else '100%_é'}-{7 * number % 30:02}", one)
    yield source
    source.close()


def test_names_come_in_pages(named):
    names, pages = named.names(), [named.find(limit=7)]
    while pages[-1]:
        pages.append(named.find(after=pages[-1][-1], limit=7))
    assert [name for page in pages for name in page] == names
    assert [len(page) for page in pages] == [7, 7, 7, 7, 2, 0]
    assert named.find("tAsK-1") == [name for name in names if "Task-1" in name]
    assert named.find("%_é") == [name for name in names if "%_é" in name]
    assert named.find("nothing") == []
    for name in (names[0], names[11], names[-1], "", "Task-115", "zzz"):
        smaller, others = [one for one in names if one < name], [one for one in names if one >= name]
        found = named.near(name, 3)
        assert found == [*smaller[-3:], *others[:3]], name


def test_the_number_of_tasks_follows_other_writers(tmp_path):
    with DiskStore(tmp_path) as reader, DiskStore(tmp_path) as writer:
        assert len(reader) == 0
        for count in (1, 2, 3):
            writer.add(f"t{count}", stored(count))
            assert [len(reader), len(writer), len(reader)] == [count] * 3
        writer.remove("t1")
        assert len(reader) == 2


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_bank_pickles_with_its_own_base_whatever_is_live(saved, tmp_path, where):
    root, logits = saved
    place = filled(tmp_path, saved) if where == "disk" else [root / name for name in DENSITIES]
    with MaskBank.open(place, build("vit"), ram_budget=12345, read_only=True, timeout=7) as bank:
        bank.pin("sparse")
        bank.activate("dense")
        sent = pickle.dumps(bank)
        close(bank.model(IMAGES), logits["dense"])
    with pickle.loads(sent) as copy:
        assert copy.names == sorted(DENSITIES)
        assert copy.resident == ["sparse"]
        for key, value in build("vit").state_dict().items():
            assert torch.equal(copy.model.state_dict()[key], value), key
        for name in DENSITIES:
            close(copy(IMAGES, name), logits[name])
        assert copy.resident == ["sparse"]  # the budget came along, and what is pinned stays
        if where == "disk":
            with pytest.raises(PermissionError, match="read-only"):
                copy.remove("dense")
    with pytest.raises(ValueError, match="closed cannot be pickled"):
        pickle.dumps(bank)


def test_a_timeout_is_a_number_of_seconds(tmp_path):
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"timeout must be from 0 to 1e\+06 seconds"):
            DiskStore(tmp_path, timeout=wrong)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def url(tmp_path, monkeypatch):
    """Puts a file where only fsspec finds it, and gives its URL; copies are made below tmp_path."""
    monkeypatch.setattr(remote, "HF_HOME", str(tmp_path / "home"))
    memory = fsspec.filesystem("memory")

    def put(data):
        memory.pipe("/bucket/bank.sqlite", data)
        return "memory://bucket/bank.sqlite"

    yield put
    memory.rm("/bucket", recursive=True)


def test_a_bank_of_a_url_follows_what_is_there(saved, tmp_path, url):
    first = filled(tmp_path / "first.sqlite", saved).read_bytes()
    # Built anew, so that the same names and numbers stand for other contents.
    second = filled(tmp_path / "second.sqlite", saved, sparse="dense", dense="sparse").read_bytes()
    where, (_, logits) = url(first), saved
    with MaskBank.open(where, build("vit")) as bank:
        close(bank(IMAGES, "sparse"), logits["sparse"])
        assert bank.refresh() is False
        before = state_of(bank.model)
        with pytest.raises(PermissionError, match="read-only"):
            bank.add("new", saved[0] / "dense")
        url(second)
        close(bank(IMAGES, "sparse"), logits["sparse"])  # until it is told to look
        assert bank.refresh() is True
        assert bank.refresh() is False
        close(bank(IMAGES, "sparse"), logits["dense"])
        close(bank(IMAGES, "dense"), logits["sparse"])
        for data, error in ((b"no bank at all" * 100, "damaged|no bank"), (b"", "damaged|no bank|file")):
            url(data)
            with pytest.raises((ValueError, OSError), match=error):
                bank.refresh()
            close(bank(IMAGES, "sparse"), logits["dense"])
        with pickle.loads(pickle.dumps(MaskBank.open(url(first), build("vit")))) as other:
            close(other(IMAGES, "sparse"), logits["sparse"])
        assert all(torch.equal(value, before[key]) for key, value in state_of(bank.model).items())
    with pytest.raises(FileNotFoundError, match=r"no file memory://bucket/none\.sqlite"):
        MaskBank.open("memory://bucket/none.sqlite", build("vit"))
    with pytest.raises(FileNotFoundError, match="is a folder: name the file"):
        MaskBank.open("memory://bucket", build("vit"))


def test_copies_do_not_pile_up(saved, tmp_path, url):
    files = [filled(tmp_path / f"{name}.sqlite", saved, **{name: "dense"}).read_bytes() for name in "abcd"]
    assert all(one != other for one, other in pairwise(files))
    for data in files:
        with MaskBank.open(url(data), build("vit")):
            pass
    assert len(list((tmp_path / "home").rglob("*.sqlite"))) == 2
