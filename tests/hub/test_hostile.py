# SPDX-License-Identifier: Apache-2.0
"""Repositories and folders made to do harm: pickles, names that climb, links, damaged files."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, try_to_load_from_cache
from peft import PeftModel

from smn_peft import MaskConfig
from smn_peft.bank.source import read_adapter
from smn_peft.cli import app
from smn_peft.hub import plan_push, push_run
from smn_peft.storage.files import AdapterFileError
from smn_peft.storage.hub_files import locate_adapter
from tests.hub.folders import X, base, masked

PICKLE = "adapter_model.bin"
WEIGHTS = "adapter_model.safetensors"


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def upload(name: str, folder: Path) -> None:
    api = HfApi()
    api.create_repo(name)
    files = [CommitOperationAdd(path.name, path) for path in folder.iterdir() if path.suffix != ".md"]
    api.create_commit(name, files, commit_message="all of it")


@pytest.fixture
def folder(tmp_path) -> Path:
    masked().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def pickled(folder) -> Path:
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_bytes(pickle.dumps(Trap()))
    return folder


def test_a_folder_with_a_pickle_alone_is_refused(pickled):
    for load in (MaskConfig.from_pretrained, lambda name: PeftModel.from_pretrained(base(), name)):
        with pytest.raises(ValueError, match=r"in a pickle \(adapter_model\.bin\), which can run code"):
            load(str(pickled))


def test_a_repository_with_a_pickle_alone_is_refused_online_and_offline(hub, pickled, monkeypatch):
    upload("user/pickle", pickled)
    with pytest.raises(ValueError, match=r"user/pickle has its masks in a pickle"):
        PeftModel.from_pretrained(base(), "user/pickle")
    assert not isinstance(try_to_load_from_cache("user/pickle", PICKLE), str)
    hf_hub_download("user/pickle", PICKLE)  # as another program might have
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"user/pickle has its masks in a pickle"):
        PeftModel.from_pretrained(base(), "user/pickle")


def test_a_pickle_beside_the_masks_is_never_fetched(hub, folder):
    (folder / PICKLE).write_bytes(pickle.dumps(Trap()))
    upload("user/both", folder)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base(), "user/both").eval()(X), masked()(X))
    locate_adapter("user/both")
    read_adapter("user/both")
    asked = [path for _, path in hub.requests if "/resolve/" in path]
    assert any(path.endswith(WEIGHTS) for path in asked)
    assert not any(path.endswith(PICKLE) for path in asked)


def test_a_damaged_file_of_the_hub_is_found_before_a_model_is_touched(hub, folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    upload("user/cut", folder)
    with pytest.raises(AdapterFileError, match=r"cannot be read.*fetch it again"):
        MaskConfig.from_pretrained("user/cut")


def test_names_that_climb_out_of_a_repository_write_nothing_outside(hub, folder, tmp_path):
    upload("user/climbs", folder)
    repository = hub.repositories["user/climbs"]
    for name in ("../evil.txt", "a/../../../evil.txt", "/tmp/evil.txt", "..\\evil.txt"):
        repository.trees[repository.refs["main"]][name] = b"evil"
    asked = len(hub.requests)
    MaskConfig.from_pretrained("user/climbs")
    locate_adapter("user/climbs")
    read_adapter("user/climbs")
    assert len(hub.requests) > asked
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert WEIGHTS in found
    assert not any("evil" in name for name in found)
    assert not any("evil" in path for _, path in hub.requests)


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc"])
def test_a_subfolder_inside_only(tmp_path, folder, subfolder):
    (folder / "a").mkdir()
    result = CliRunner().invoke(app, ["inspect", str(folder / "a"), "--subfolder", subfolder])
    assert result.exit_code == 1
    assert "leads out of" in result.output
    with pytest.raises(ValueError, match="leads out of"):
        locate_adapter("user/x", subfolder=subfolder)


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", WEIGHTS])
def test_what_links_out_of_the_folder_is_not_pushed(hub, folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "private")
    os.symlink(tmp_path / "private", folder / name)
    with pytest.raises(ValueError, match=r"is a link to .*private, outside its folder"):
        push_run(folder, "user/x")
    assert hub.requests == []


def test_links_inside_the_folder_and_into_the_cache_are_pushed(hub, folder):
    shutil.move(folder / WEIGHTS, folder / "blob")
    os.symlink("blob", folder / WEIGHTS)
    plan_push(folder, "user/x")
    (folder / WEIGHTS).unlink()
    shutil.move(folder / "blob", folder / WEIGHTS)
    upload("user/x", folder)
    snapshot = locate_adapter("user/x")
    assert (snapshot / WEIGHTS).is_symlink()
    plan_push(snapshot, "user/y")


def test_packing_over_a_link_leaves_what_it_leads_to(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "private").write_text("mine")
    for name in ("adapter_config.json", WEIGHTS):
        os.symlink(tmp_path / "private", tmp_path / "out" / name)
    result = CliRunner().invoke(app, ["pack", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "private").read_text() == "mine"
    assert not (tmp_path / "out" / WEIGHTS).is_symlink()
