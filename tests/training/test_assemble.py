# SPDX-License-Identifier: Apache-2.0
"""From arguments to parts: which images, which base, what trains, how it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smn_peft.backbones import pooled_features
from smn_peft.evaluation import extract_features, fit_linear_probe
from smn_peft.objectives import base
from smn_peft.training.arguments import objective_kind
from smn_peft.training.assemble import (
    build_images,
    build_task,
    build_train_loader,
    evaluation_of,
    load_base,
)

from .tiny import CLASSES, SWAV, TEST, TRAIN, tiny_arguments, write_clip, write_npz


def parts(arguments):
    images = build_images(arguments)
    return images, *build_task(arguments, images)


def adapted_and_others(task):
    names = {True: [], False: []}
    for name, _, adapted in task.trainable():
        names[adapted].append(name)
    return names[True], names[False]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (TRAIN, TRAIN, TEST)),
        ({"limit": 30, "eval_limit": 10, "knn_limit": 20}, (30, 20, 10)),
        ({"fraction": 0.25}, (12, TRAIN, TEST)),
        ({"fraction": 0.5, "limit": 24}, (12, 24, TEST)),
        ({"eval_split": None}, (TRAIN, None, None)),
        ({"limit": 1000, "eval_limit": 1000, "knn_limit": 1000}, (TRAIN, TRAIN, TEST)),
    ],
)
def test_subsets(tmp_path, options, sizes):
    images = build_images(tiny_arguments(tmp_path, **options))
    assert tuple(part and len(part) for part in (images.train, images.bank, images.test)) == sizes
    assert images.num_classes == 3


def test_the_first_classes_only(tmp_path):
    images = build_images(tiny_arguments(tmp_path, class_limit=2, limit=20))
    assert (len(images.train), len(images.test), images.num_classes) == (20, 2 * TEST // 3, 2)
    assert images.train.classes == images.test.classes == list(CLASSES[:2])
    assert images.test.labels.unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"3 classes; got class_limit=4"):
        build_images(tiny_arguments(tmp_path, class_limit=4))


def test_subsets_depend_on_their_own_seed_only(tmp_path):
    rows = [
        build_images(tiny_arguments(tmp_path, limit=20, **seeds)).train.rows.tolist()
        for seeds in ({}, {"seed": 1}, {"subset_seed": 1})
    ]
    assert rows[0] == rows[1] != rows[2]


def test_a_fraction_is_balanced_where_labels_are_known(tmp_path):
    balanced = build_images(tiny_arguments(tmp_path, fraction=0.25)).train
    assert torch.bincount(balanced.labels).tolist() == [4, 4, 4]
    unlabelled = build_images(tiny_arguments(tmp_path, fraction=0.25, eval_split=None, **SWAV)).train
    assert unlabelled.labels is None
    assert len(unlabelled) == 12


def test_the_head_has_every_class_of_the_split_also_when_the_subset_lacks_one(tmp_path):
    # 0 and 1 thirty times each, 2 once: a small subset does not have it.
    path = write_npz(tmp_path / "rare.npz", labels=[0, 1] * 23 + [2] + [0] + [0, 1, 2] * (TEST // 3), named=False)
    arguments = tiny_arguments(tmp_path, dataset=str(path), limit=8)
    images, task, _ = parts(arguments)
    assert images.train.labels.max() < 2
    assert task.model.get_base_model().num_classes == 3


def test_weights_that_no_file_gives_come_from_the_seed(tmp_path):
    arguments = tiny_arguments(tmp_path)
    state = torch.get_rng_state()
    one = load_base(arguments).model.state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    two = load_base(arguments).model.state_dict()
    other = load_base(tiny_arguments(tmp_path, seed=1)).model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("head", ["trained", "probe", "masked"])
def test_heads(tmp_path, head):
    images, task, backbone = parts(tiny_arguments(tmp_path, head=head))
    scores, others = adapted_and_others(task)
    assert all("smn_scores" in name for name in scores)
    if head == "masked":
        assert [name for name in scores if ".head." in name]
        assert others == []
    else:
        assert {name.rpartition(".")[2] for name in others} == {"weight", "bias"}
        assert all(".head.modules_to_save.default." in name for name in others)
    model = backbone.model.eval()
    pixel_values = torch.stack([evaluation_of(backbone)(images.test[i]["image"]) for i in range(TEST)])
    with torch.no_grad():
        logits = task.logits_of(pooled_features(task.eval().model, pixel_values))
        expected = task.model(pixel_values)
    assert torch.equal(logits, expected)
    if head == "probe":
        bare = load_base(tiny_arguments(tmp_path), 3)
        features = extract_features(bare.model, images.train, evaluation_of(bare))
        probe = fit_linear_probe(features, standardise=True)
        test = extract_features(bare.model, images.test, evaluation_of(bare))
        torch.testing.assert_close(logits, probe.logits(test.features), atol=1e-3, rtol=1e-3)
    assert model is backbone.model


def test_scores_of_biases_are_scores(tmp_path):
    _, task, _ = parts(tiny_arguments(tmp_path, head="masked", mask={"mask_bias": True}))
    scores, others = adapted_and_others(task)
    assert [name for name in scores if name.endswith("head.smn_bias_scores.default")]
    assert others == []


def test_a_probe_of_one_image_per_class(tmp_path):
    _, task, _ = parts(tiny_arguments(tmp_path, head="probe", fraction=0.06))
    head = task.model.get_base_model().head
    assert head.modules_to_save["default"].feature_std.ne(1).all()


def test_a_masked_head_joins_the_targets_that_are_named(tmp_path):
    arguments = tiny_arguments(tmp_path, head="masked", mask={"target_modules": ["conv1"]})
    _, task, _ = parts(arguments)
    scores, _ = adapted_and_others(task)
    assert {name.rpartition(".smn_scores")[0].rpartition(".")[2] for name in scores} == {"conv1", "head"}
    assert arguments.mask.target_modules == {"conv1"}  # the arguments are not changed
    with pytest.raises(ValueError, match="give those as a list, or None"):
        parts(tiny_arguments(tmp_path, head="masked", mask={"target_modules": r".*conv1"}))


@pytest.mark.parametrize(("adapt", "body"), [("full", True), ("head", False)])
def test_the_baselines_train_what_they_say(tmp_path, adapt, body):
    _, task, _ = parts(tiny_arguments(tmp_path, adapt=adapt))
    adapted, others = adapted_and_others(task)
    assert bool(adapted) == body
    assert others == ["model.head.weight", "model.head.bias"]
    task.train()
    assert task.model.backbone.training == body
    assert task.model.head.training


def test_zero_shot_starts_at_clips_own_logits(tmp_path):
    import transformers

    folder = write_clip(tmp_path / "clip")
    arguments = tiny_arguments(
        tmp_path, backbone=folder, objective="zero_shot", templates=["a photo of a {}."], lr=1.0
    )
    images, task, backbone = parts(arguments)
    pixel_values = torch.stack([evaluation_of(backbone)(images.test[i]["image"]) for i in range(6)])
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        [f"a photo of a {name}." for name in CLASSES], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = clip(pixel_values=pixel_values, **tokens).logits_per_image
        torch.testing.assert_close(
            task.logits_of(pooled_features(task.eval().model, pixel_values)), expected, atol=1e-4, rtol=1e-4
        )
    nameless = str(write_npz(tmp_path / "nameless.npz", named=False))
    with pytest.raises(ValueError, match=r"zero_shot' needs class names, and .*nameless\.npz has none"):
        parts(tiny_arguments(tmp_path, backbone=folder, objective="zero_shot", dataset=nameless))


def test_processes_share_every_batch(tmp_path):
    arguments = tiny_arguments(tmp_path)
    images, _, backbone = parts(arguments)
    whole, *shares = (build_train_loader(arguments, images, backbone, *of) for of in ((1, 0), (2, 0), (2, 1)))
    for loader in (whole, *shares):
        loader.set_epoch(1)
    for batch, one, two in zip(whole, *shares, strict=True):
        assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"], two["pixel_values"]]))
    with pytest.raises(ValueError, match=r"batch_size=12 does not divide into 5 processes × 1 accumulated parts"):
        build_train_loader(arguments, images, backbone, 5, 0)


OWN = Path(__file__).resolve().parents[2] / "examples" / "custom_objective.py"


@pytest.fixture
def registry(monkeypatch):
    """What a file registers goes with the test."""
    monkeypatch.setattr(base, "OBJECTIVES", dict(base.OBJECTIVES))


@pytest.mark.usefixtures("registry")
def test_an_objective_of_the_users_own_file_trains(tmp_path):
    two_views = {**SWAV["multi_crop"], "local_crops": 0}
    arguments = tiny_arguments(tmp_path, objective=f"{OWN}:info_nce", multi_crop=two_views)
    images, task, backbone = parts(arguments)
    assert task.objective.name == "info_nce"
    batch = next(iter(build_train_loader(arguments, images, backbone, 1, 0)))
    assert 0 < task(batch)["loss"].item() < 20


@pytest.mark.usefixtures("registry")
def test_a_file_without_the_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match="registers no objective 'info'"):
        objective_kind(tiny_arguments(tmp_path, objective=f"{OWN}:info"))
    with pytest.raises(FileNotFoundError, match=r"There is no file nowhere\.py"):
        objective_kind(tiny_arguments(tmp_path, objective="nowhere.py:mine"))


def test_only_the_images_that_are_used_are_held_in_memory(tmp_path, monkeypatch):
    arguments = tiny_arguments(tmp_path, cache_images=True, limit=10, fraction=0.5, eval_limit=7)
    plain = build_images(replace(arguments, cache_images=False))
    expected = [[item["image"] for item in part] for part in (plain.train, plain.bank, plain.test)]
    rows, source = [], type(plain.train.source)
    read = source.read
    monkeypatch.setattr(source, "read", lambda self, row: rows.append(row) or read(self, row))
    found = build_images(arguments)
    assert len(rows) == 10 + 7
    for part, images in zip((found.train, found.bank, found.test), expected, strict=True):
        assert all(torch.equal(item["image"], image) for item, image in zip(part, images, strict=True))
    assert len(rows) == 10 + 7  # all from memory


def test_all_of_a_bfloat16_base_but_batch_norm(tmp_path):
    model = load_base(tiny_arguments(tmp_path, base_dtype="bfloat16"), 3).model
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    wide = {id(tensor) for norm in norms for tensor in norm.state_dict(keep_vars=True).values()}
    wide |= {id(tensor) for tensor in model.head.state_dict(keep_vars=True).values()}
    assert norms
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if id(tensor) in wide else torch.bfloat16)
