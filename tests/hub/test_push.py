# SPDX-License-Identifier: Apache-2.0
"""A run's folder goes to the Hub and comes back: one task or many, branches, pull requests, private repositories."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, snapshot_download
from peft import PeftModel

from smn_peft.hub import HubError, plan_push, push_run
from tests.hub.folders import X, base, code_of, masked, write_run
from tests.hub.state import OTHER_TOKEN, TOKEN, blob_oid


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def pulled(repo_id: str, **options) -> torch.Tensor:
    return outputs(PeftModel.from_pretrained(base(), repo_id, **options).eval())


def test_what_is_pushed_is_what_is_pulled(hub, tmp_path):
    model = write_run(tmp_path / "out")
    info = push_run(tmp_path / "out", "user/cifar10", license="apache-2.0")
    assert info.oid == hub.repositories["user/cifar10"].refs["main"]
    assert info.commit_url == f"{hub.endpoint}/user/cifar10/commit/{info.oid}"
    tree = hub.tree("user/cifar10")
    assert sorted(tree) == [
        ".eval_results/cifar10-knn.yaml",
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert hub.repositories["user/cifar10"].lfs_paths == {"adapter_model.safetensors"}
    assert torch.equal(pulled("user/cifar10"), outputs(model))
    card = ModelCard.load("user/cifar10")
    assert card.data.license == "apache-2.0"
    assert 'PeftModel.from_pretrained(base, "user/cifar10")' in code_of(str(card))
    (entry,) = yaml.safe_load(tree[".eval_results/cifar10-knn.yaml"])
    assert (entry["dataset"]["id"], entry["value"]) == ("uoft-cs/cifar10", 75.0)


def test_the_same_again_is_no_commit(hub, tmp_path):
    write_run(tmp_path)
    first, second = (push_run(tmp_path, "user/same") for _ in range(2))
    assert first.oid == second.oid
    assert hub.asked("PUT", "^/lfs/") == 1


def test_many_tasks_share_a_repository(hub, tmp_path):
    datasets = {"vit/cifar10": "cifar10", "pets": "pets"}
    models = {}
    for seed, (task, dataset) in enumerate(datasets.items()):
        models[task] = write_run(tmp_path / task, seed, 0.7 + seed / 10, dataset=dataset)
        push_run(tmp_path / task, "user/many", subfolder=task)
    assert not torch.equal(*(outputs(model) for model in models.values()))
    for task, model in models.items():
        assert torch.equal(pulled("user/many", subfolder=task), outputs(model))
    tree = hub.tree("user/many")
    root = ModelCard(tree["README.md"].decode())
    assert root.text.index("[pets](pets)") < root.text.index("[vit/cifar10](vit/cifar10)")
    assert root.data.datasets == ["uoft-cs/cifar10", "timm/oxford-iiit-pet"]
    assert 'subfolder="pets"' in code_of(tree["pets/README.md"].decode()).replace("'", '"')
    assert {".eval_results/vit-cifar10-cifar10-knn.yaml", ".eval_results/pets-pets-knn.yaml"} <= set(tree)
    # Pushed again with another result, a task keeps its one row.
    write_run(tmp_path / "pets", 1, 0.95, dataset="pets")
    push_run(tmp_path / "pets", "user/many", subfolder="pets")
    table = hub.tree("user/many")["README.md"].decode()
    assert table.count("[pets](pets)") == 1
    assert "95.0 %" in table
    assert "80.0 %" not in table


def test_two_pushes_at_once_do_not_lose_a_row(hub, tmp_path, monkeypatch):
    write_run(tmp_path)
    push_run(tmp_path, "user/many", subfolder="one")
    from smn_peft.hub import push

    read = push._root_card

    def read_and_somebody_commits(*args):
        found = read(*args)
        repository = hub.repositories["user/many"]
        repository.commit("main", {**hub.tree("user/many"), "other.txt": b"x"}, "another")
        return found

    monkeypatch.setattr(push, "_root_card", read_and_somebody_commits)
    with pytest.raises(HubError, match="changed by somebody else meanwhile: push again"):
        push_run(tmp_path, "user/many", subfolder="two")


def test_a_branch_and_pinned_commits(hub, tmp_path):
    models = [write_run(tmp_path / str(seed), seed) for seed in range(2)]
    first = push_run(tmp_path / "0", "user/pins")
    second = push_run(tmp_path / "1", "user/pins", revision="better")
    assert torch.equal(pulled("user/pins"), outputs(models[0]))
    assert torch.equal(pulled("user/pins", revision="better"), outputs(models[1]))
    assert 'revision="better"' in code_of(hub.tree("user/pins", "better")["README.md"].decode())
    push_run(tmp_path / "1", "user/pins")
    assert torch.equal(pulled("user/pins"), outputs(models[1]))
    assert torch.equal(pulled("user/pins", revision=first.oid), outputs(models[0]))
    assert torch.equal(pulled("user/pins", revision=second.oid), outputs(models[1]))


def test_a_pull_request_leaves_the_branch_alone(hub, tmp_path):
    models = [write_run(tmp_path / str(seed), seed) for seed in range(2)]
    push_run(tmp_path / "0", "user/open")
    # Somebody without write access proposes another mask.
    info = push_run(tmp_path / "1", "user/open", create_pr=True, token=OTHER_TOKEN, commit_message="A better mask")
    assert info.pr_url == f"{hub.endpoint}/user/open/discussions/1"
    assert hub.repositories["user/open"].messages[info.oid] == "A better mask"
    assert torch.equal(pulled("user/open"), outputs(models[0]))
    assert torch.equal(pulled("user/open", revision="refs/pr/1"), outputs(models[1]))
    with pytest.raises(ValueError, match="against the main branch: leave out the revision"):
        push_run(tmp_path / "1", "user/open", create_pr=True, revision="better")


def test_private_needs_a_token(hub, tmp_path, monkeypatch):
    model = write_run(tmp_path)
    push_run(tmp_path, "user/secret", private=True)
    assert hub.repositories["user/secret"].private
    assert torch.equal(pulled("user/secret"), outputs(model))
    monkeypatch.delenv("HF_TOKEN")
    assert torch.equal(pulled("user/secret", token=TOKEN), outputs(model))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'user/secret'"):
        pulled("user/secret")
    with pytest.raises(HubError, match="log in by `hf auth login`"):
        push_run(tmp_path, "user/secret")


def test_what_is_wanted_private_does_not_land_in_public(hub, tmp_path):
    write_run(tmp_path)
    push_run(tmp_path, "user/public")
    before = hub.repositories["user/public"].refs["main"]
    with pytest.raises(HubError, match="user/public exists and is public: nothing was sent"):
        push_run(tmp_path, "user/public", private=True, license="mit")
    assert hub.repositories["user/public"].refs["main"] == before


def test_offline_what_was_pulled_is_there(hub, tmp_path, monkeypatch):
    model = write_run(tmp_path)
    push_run(tmp_path, "user/cached")
    push_run(tmp_path, "user/tasks", subfolder="one")
    pulled("user/cached")
    pulled("user/tasks", subfolder="one")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(pulled("user/cached"), outputs(model))
    # By the repository's name PEFT 0.21 looks for one/one/… when it is offline; by the cache's folder it does not.
    folder = snapshot_download("user/tasks")
    assert torch.equal(pulled(folder, subfolder="one"), outputs(model))
    with pytest.raises(HubError, match=r"cannot be reached, .* offline mode is enabled"):
        push_run(tmp_path, "user/cached", license="mit")
    assert len(hub.requests) == asked


def test_a_name_without_a_user_is_completed(hub, tmp_path):
    write_run(tmp_path)
    push_run(tmp_path, "short")
    assert '"user/short"' in code_of(hub.tree("user/short")["README.md"].decode())


def test_nothing_of_the_own_disk_goes_out(hub, tmp_path):
    own = tmp_path / "home" / "model.py"
    own.parent.mkdir()
    write_run(tmp_path / "out", backbone=f"{own}:build", dataset=str(tmp_path / "home" / "photos.npz"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"{own}:build"
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    plan = plan_push(tmp_path / "out", "user/own")
    assert any("is a path on this disk" in note for note in plan.notes)
    push_run(tmp_path / "out", "user/own")
    everything = b"".join(hub.tree("user/own").values())
    assert str(tmp_path).encode() not in everything
    assert b"model.py:build" in everything
    assert json.loads(hub.tree("user/own")["adapter_config.json"])["base_model_name_or_path"] is None
    assert torch.equal(pulled("user/own"), outputs(masked()))


def test_own_words_in_the_card_are_kept(hub, tmp_path):
    write_run(tmp_path)
    push_run(tmp_path, "user/words")
    text = hub.tree("user/words")["README.md"].decode()
    (tmp_path / "README.md").write_text(text.replace("<!-- smn:end -->", "<!-- smn:end -->\n\nTrained for Ann."))
    push_run(tmp_path, "user/words", license="mit")
    again = hub.tree("user/words")["README.md"].decode()
    assert "\nTrained for Ann.\n" in again
    assert "The adapter: mit." in again
    assert "named no licence" not in again


def test_what_was_written_on_the_page_is_kept(hub, tmp_path):
    write_run(tmp_path)
    push_run(tmp_path, "user/page", subfolder="one")
    push_run(tmp_path, "user/page")  # an adapter at the root joins; the table of tasks stays
    both = hub.tree("user/page")["README.md"].decode()
    assert "[one](one)" in both
    assert "A mask adapter for PEFT" in both
    edited = both.replace("<!-- smn:begin", "Hello from the page.\n\n<!-- smn:begin").replace(
        "---\n", "---\nfoo: bar\n", 1
    )
    repository = hub.repositories["user/page"]
    repository.commit("main", {**hub.tree("user/page"), "README.md": edited.encode()}, "edit on the page")
    push_run(tmp_path, "user/page", license="mit")
    again = hub.tree("user/page")["README.md"].decode()
    for words in ("Hello from the page.", "foo: bar", "license: mit", "[one](one)", "The adapter: mit."):
        assert again.count(words) == 1


def test_damaged_and_foreign_folders_are_refused_before_anything_is_sent(hub, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config\.json does not exist: name the output folder of smn train"
    ):
        push_run(tmp_path, "user/x")
    write_run(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="fetch it again"):
        push_run(tmp_path, "user/x")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="holds a LORA adapter, no mask"):
        push_run(tmp_path, "user/x")
    for name in ("a/b/c", "-x", "a..b", ""):
        with pytest.raises(ValueError, match="is no repository name"):
            push_run(tmp_path, name)
    for name in ("../up", "/abs", "a//b", "a/..", ".hidden", "a b"):
        with pytest.raises(ValueError, match=r"a task's folder has letters, digits"):
            plan_push(tmp_path, "user/x", subfolder=name)
    assert hub.requests == []


def test_the_server_checks_what_it_stores():
    assert blob_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # `git hash-object`
