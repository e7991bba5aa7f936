# SPDX-License-Identifier: Apache-2.0
"""A bank on the Hub: pushed as one file, opened by the repository's name, and what is said when that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model

from smn_peft import MaskBank, MaskConfig
from smn_peft.bank.source import StoredAdapter
from smn_peft.bank.store import DiskStore
from tests.bank.stores import adapter
from tests.bank.tiny import IMAGES, build
from tests.hub.state import Repository

REPO = "user/smn-tasks"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def folders(place):
    for seed, name in enumerate(("a", "b")):
        model = get_peft_model(build("vit"), MaskConfig(init_weights=False, seed=seed))
        model.save_pretrained(place / name)
    return [place / "a", place / "b"]


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "in memory"])
def test_a_bank_there_and_back(hub, folders, place, stored, monkeypatch):
    if stored:
        with MaskBank.open(place / "bank", build("vit")) as bank:
            bank.add("gone", folders[0])
            bank.remove("gone")
            for folder in folders:
                bank.add(folder.name, folder)
            bank.push_to_hub(REPO, commit_message="Two tasks")
            expected = [bank(IMAGES, name) for name in bank.names]
    else:
        with MaskBank.open(folders, build("vit")) as bank:
            bank.push_to_hub(REPO)
            expected = [bank(IMAGES, name) for name in bank.names]
    content = hub.tree(REPO)["bank.sqlite"]
    assert b"gone" not in content  # removed tasks are not published
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with MaskBank.open(REPO, build("vit")) as bank:
            assert bank.names == ["a", "b"]
            assert all(torch.equal(bank(IMAGES, n), e) for n, e in zip(bank.names, expected, strict=True))
            with pytest.raises(PermissionError, match="read-only"):
                bank.remove("a")
    cache = Path(constants.HF_HUB_CACHE)
    (file,) = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink() and "blobs" in path.parts]
    assert file.read_bytes() == content  # not even its mode was written
    assert not [path for path in cache.rglob("*") if path.name.endswith(("-wal", "-shm", "-journal"))]


def test_a_branch_and_a_private_repository(hub, folders):
    with MaskBank.open(folders, build("vit")) as bank:
        bank.push_to_hub(REPO, private=True)
        bank.remove("b")
        bank.push_to_hub(REPO, revision="less")
        assert hub.repositories[REPO].private
        bank.push_to_hub("user/open", private=False)
        with pytest.raises(ValueError, match="is public: nothing was sent"):
            bank.push_to_hub("user/open", private=True)
    for revision, names in ((None, ["a", "b"]), ("less", ["a"])):
        with MaskBank.open(REPO, build("vit"), revision=revision) as bank:
            assert bank.names == names


def test_names_that_are_of_this_disk_stay_so(hub, place):
    for where in ("./user/bank", "user.sqlite", place / "user" / "bank", "bank"):
        with MaskBank.open(where, build("vit")) as bank:
            assert bank.names == []
    with MaskBank.open("user/other", build("vit")) as bank:  # there is a folder "user" now
        assert bank.names == []
    assert hub.requests == []


def test_what_is_not_there(hub, place):
    with pytest.raises(FileNotFoundError, match=r"(?s)no folder user/none.*name \./user/none"):
        MaskBank.open("user/none", build("vit"))
    assert not (place / "here" / "user").exists()
    hub.repositories[REPO] = Repository(REPO, private=False)
    hub.repositories[REPO].commit("main", {"adapter_config.json": b"{}"}, "an adapter")
    with pytest.raises(FileNotFoundError, match=r"(?s)no bank\.sqlite in that repository.*give a list"):
        MaskBank.open(REPO, build("vit"))


def test_a_base_that_is_a_path_is_said(hub, place):
    given = adapter(0)
    with DiskStore(place / "bank") as store:
        store.add("a", StoredAdapter({**given.config, "base_model_name_or_path": "/home/me/base"}, given.tensors))
    with MaskBank.open(place / "bank", build("vit")) as bank, pytest.warns(UserWarning, match="/home/me/base"):
        bank.push_to_hub(REPO)
