# SPDX-License-Identifier: Apache-2.0
"""The Hub refuses, is busy, or the line breaks: what is tried again, and what the user is told to do."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from peft import PeftModel

from smn_peft.hub import HubError, push_run
from smn_peft.hub.push import patiently
from tests.hub.folders import X, base, write_run
from tests.hub.state import OTHER_TOKEN


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "user/x", r"does not know you: log in by `hf auth login`, or set HF_TOKEN to a token with write"),
        (False, "user/x", "log in by `hf auth login`"),
        (OTHER_TOKEN, "user/x", r"may not write to user/x: .*your own user name, or --create-pr"),
    ],
)
def test_refusals_say_what_to_do(hub, folder, token, repo_id, message):
    with pytest.raises(HubError, match=message) as caught:
        push_run(folder, repo_id, token=token)
    assert "\n" not in str(caught.value)
    assert hub.repositories == {}


def test_a_repository_that_nobody_sees_is_missing(hub):
    for token in (None, OTHER_TOKEN):
        with pytest.raises(HubError, match=r"shows no user/gone: check the spelling"):
            patiently(lambda token=token: HfApi().model_info("user/gone", token=token), "user/gone")


def test_other_answers_are_named(hub, folder):
    hub.fail("POST", "^/api/repos/create", status=402)
    with pytest.raises(HubError, match=r"The Hub answered 402 for user/x\. The Hub says: as ordered"):
        push_run(folder, "user/x")
    push_run(folder, "user/x")
    hub.fail("GET", "^/api/models/user/x$", status=404, headers={"X-Error-Code": "RevisionNotFound"})
    with pytest.raises(HubError, match="user/x has no such revision: name a branch"):
        push_run(folder, "user/x")
    hub.fail("GET", "^/api/models/user/x$", status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(HubError, match="user/x is gated: ask for access"):
        push_run(folder, "user/x")


@pytest.mark.parametrize("path", ["^/api/repos/create", "/preupload/", "/objects/batch", "^/lfs/", "/commit/"])
def test_busy_is_waited_for_as_long_as_the_hub_says(hub, folder, waits, path):
    hub.fail("PUT" if path == "^/lfs/" else "POST", path, status=429, headers={"Retry-After": "7"}, times=2)
    info = push_run(folder, "user/busy")
    assert len(waits) == 2
    assert all(7 <= wait <= 8 for wait in waits)
    assert hub.repositories["user/busy"].refs["main"] == info.oid
    assert len(hub.repositories["user/busy"].trees) == 2  # the first commit and this


def test_the_rate_limit_header_says_how_long(hub, folder, waits):
    hub.fail("POST", "/commit/", status=429, headers={"RateLimit": '"api";r=0;t=42'})
    hub.fail("POST", "/commit/", status=503)
    push_run(folder, "user/busy")
    assert waits == [42.0, 10.0]


def test_patience_ends(hub, folder, waits):
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubError, match="takes no more requests for now: push again in 3600 seconds"):
        push_run(folder, "user/busy")
    assert waits == []
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "1"}, times=100)
    with pytest.raises(HubError, match="push again in 1 seconds"):
        push_run(folder, "user/busy")
    assert waits == [1.0] * 3


def test_an_upload_that_is_cut_is_sent_again(hub, folder):
    hub.fail("PUT", "^/lfs/", after=100, times=2)
    push_run(folder, "user/cut")
    assert hub.asked("PUT", "^/lfs/") == 3
    assert hub.tree("user/cut")["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_an_upload_in_parts_goes_on_where_it_was_cut(hub, folder):
    hub.part_size = 200
    hub.fail("PUT", "^/lfs/[0-9a-f]+/2", after=50)
    push_run(folder, "user/parts")
    parts = [int(path.rpartition("/")[2]) for method, path in hub.requests if method == "PUT"]
    count = -(-(folder / "adapter_model.safetensors").stat().st_size // hub.part_size)
    assert parts == [1, 2, *range(2, count + 1)]
    assert hub.tree("user/parts")["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_an_upload_that_stays_cut_commits_nothing_and_is_taken_up_later(hub, folder):
    hub.fail("PUT", "^/lfs/", after=100, times=6)
    with pytest.raises(
        HubError, match=r"the connection broke .* push again: what is uploaded already is not sent again"
    ):
        push_run(folder, "user/cut")
    assert list(hub.tree("user/cut")) == [".gitattributes"]
    hub.fail("POST", "/commit/", after=10)
    with pytest.raises(HubError, match="the connection broke"):
        push_run(folder, "user/cut")
    uploads = hub.asked("PUT", "^/lfs/")
    push_run(folder, "user/cut")
    assert hub.asked("PUT", "^/lfs/") == uploads
    assert "adapter_config.json" in hub.tree("user/cut")


def test_where_xet_does_not_work_the_upload_goes_over_http(hub, folder, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    info = push_run(folder, "user/xet")  # this Hub has no Xet
    assert hub.asked("GET", "/xet-write-token/") == hub.asked("PUT", "^/lfs/") == hub.asked("POST", "/commit/") == 1
    assert hub.repositories["user/xet"].refs["main"] == info.oid


def test_a_download_that_is_cut_goes_on_where_it_was(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
    model = write_run(folder)
    push_run(folder, "user/down")
    hub.fail("GET", "^/cdn/", after=100)
    loaded = PeftModel.from_pretrained(base(), "user/down").eval()
    assert hub.asked("GET", "^/cdn/") == 2
    assert hub.ranges == ["bytes=64-"]
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_a_download_that_stays_cut_leaves_no_half_file(hub, folder):
    push_run(folder, "user/down")
    hub.fail("GET", "^/cdn/", status=500, times=100)
    with pytest.raises(OSError, match="500"):
        hf_hub_download("user/down", "adapter_model.safetensors")
    hub.faults.clear()
    path = hf_hub_download("user/down", "adapter_model.safetensors")
    with open(path, "rb") as file:
        assert file.read() == (folder / "adapter_model.safetensors").read_bytes()


def test_what_is_not_the_hub_s_comes_as_it_is():
    for error in (FileNotFoundError("own file"), RuntimeError("own bug"), ValueError("own value")):
        with pytest.raises(type(error), match="own"):
            patiently(lambda error=error: (_ for _ in ()).throw(error), "user/x")
    assert issubclass(HubError, OSError)
