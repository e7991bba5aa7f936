# SPDX-License-Identifier: Apache-2.0
"""Which names are the Hub's, and which are paths that nobody else should see."""

from __future__ import annotations

from smn_peft.hub.facts import dataset_id, hub_id, shown_name


def test_models():
    for name, repository, shown in (
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("hf-hub:timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k"),
        ("resnet50.a1_in1k", None, "resnet50.a1_in1k"),
        ("/home/me/clip", None, "clip"),
        ("./clip/vit", None, "vit"),
        ("~/clip", None, "clip"),
        ("mine/model.py:build", None, "model.py:build"),
        ("photos/set.npz", None, "set.npz"),
        ("a/b/c", None, "a/b/c"),
        (None, None, ""),
        ("", None, ""),
    ):
        assert (hub_id(name), shown_name(name)) == (repository, shown)


def test_a_folder_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/vit") == "org/vit"
    (tmp_path / "org/vit").mkdir(parents=True)
    assert (hub_id("org/vit"), shown_name("org/vit")) == (None, "vit")


def test_datasets():
    assert dataset_id("cifar100") == "uoft-cs/cifar100"
    assert dataset_id("org/set") == "org/set"
    assert dataset_id("ucf101") is None  # the paper's, but on nobody's Hub
    assert dataset_id("/data/set.parquet") is None
