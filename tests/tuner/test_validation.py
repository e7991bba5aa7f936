# SPDX-License-Identifier: Apache-2.0
"""What a config of anybody's may hold, and how long it may take: patterns, lists of modules, classes, images."""

from __future__ import annotations

import json
import time

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.tuner.config import check_pattern
from smn_peft.tuner.targets import default_targets

PLAIN = [
    r".*conv\d?",
    r".*\.layers\.\d+\.attn\.(q|k|v)_proj",
    r"^(?!.*visual).*(q_proj|k_proj).*",
    r"(?:.*\.)?blocks\.(?:1|2|10)\.mlp\.fc[12]",
    r"encoder\.layer\.([0-9]|1[01])\.attention",
    r"[^.]+\.\w+",
    r"(?:.*){3}(?:x|y)",
    r"(?i).*conv\d{1,2}",
    r"[]().*]+(?:\(\))?",
    "",
]
HOSTILE = [
    "(a+)+$",
    "(a|a)*b",
    r"([a-z]+)*\d$",
    "(?:.?){30}x",
    "a?" * 30 + "a" * 30,
    ".*.*.*.*.*.*x",
    r"(?:(?:.*)x?){50}",
    r"((a{0,100}){0,100}){0,100}$",
    r"(?=(?:\w+\.?)+$)x",
    r"(x)?(?(1)(a+)+|(b|b)*)$",
    "(a+){2,}",
    "(?P<n>a*)*",
    r"(\(a*)+",
    r"[)]*[(]*.*.*",
    "(?:a*?)*?",
    "(?i:(a+)+)",
    "((((a+))))+",
    "a{,}b{,}c{,}d{,}",
    "(?#()(a+)+",
    "(?:[0-9]{}+)+x",
]


@pytest.mark.parametrize("pattern", PLAIN)
def test_patterns_that_people_write_are_taken(pattern):
    MaskConfig(target_modules=pattern, exclude_modules=pattern)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_default_targets_are_taken(name):
    MaskConfig(target_modules=default_targets(timm.create_model(name)))


def test_the_exact_names_of_a_large_model_are_taken():
    names = [f"stages\\.{i}\\.blocks\\.{j}\\.conv{k}" for i in range(4) for j in range(60) for k in range(3)]
    MaskConfig(target_modules="|".join(names))


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_take_for_ever_are_refused_at_once(pattern):
    start = time.perf_counter()
    for option in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=rf"{option} is a pattern that may take for ever"):
            MaskConfig(**{option: pattern})
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("pattern", ["(?x) (a+ # )\n )+", "(?x:(a+ # )\n)+)"])
def test_comments_hide_no_repetition(pattern):
    with pytest.raises(ValueError, match="may take for ever"):
        check_pattern("target_modules", pattern)


@pytest.mark.parametrize(
    "pattern", ["(", "*a", "[", "(" * 5000, "a{99999999999}", "(?<=a+)b"], ids=lambda pattern: pattern[:9]
)
def test_what_is_no_pattern_is_said(pattern):
    with pytest.raises(ValueError, match="is no regular expression"):
        check_pattern("target_modules", pattern)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": [f"head{i}" for i in range(1000)]}, "modules_to_save has 1,000 names, and may have 128"),
        ({"modules_to_save": ["(a+)+$"]}, "modules_to_save is a pattern that may take for ever"),
        ({"modules_to_save": [""]}, "0 characters"),
        ({"modules_to_save": ["a" * 2000]}, "2,000 characters"),
        ({"target_modules": [str(i) for i in range(30_000)]}, "target_modules has 30,000 names"),
        (
            {"target_modules": ["a"], "layers_to_transform": 1, "layers_pattern": "(a+)+"},
            "layers_pattern is a pattern",
        ),
        (
            {"target_modules": ["a"], "layers_to_transform": 1, "layers_pattern": ["(a+)+"]},
            "layers_pattern is a pattern",
        ),
        ({"target_modules": "a" * 2_000_000}, "2,000,000 characters"),
    ],
    ids=str,
)
def test_lists_have_a_limit(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        MaskConfig(**options)


def test_a_list_of_anything_else_is_refused():
    with pytest.raises(TypeError, match="target_modules must hold names of modules; got 3"):
        MaskConfig(target_modules=["a", 3])


def test_a_downloaded_pattern_is_refused_before_the_base_is_touched(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4))
    get_peft_model(base, MaskConfig(target_modules=["0"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "(a+)+$"}))
    host = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="take for ever"):
        PeftModel.from_pretrained(host, tmp_path)
    assert type(host[0]) is nn.Linear


def test_names_of_classes_have_one_form_in_memory_and_in_the_file(tmp_path):
    given = MaskConfig(target_modules=["0"], id2label={"10": "ten", 2: "two", "0": "zero"})
    assert list(given.id2label.items()) == [(0, "zero"), (2, "two"), (10, "ten")]
    given.save_pretrained(tmp_path)
    assert MaskConfig.from_pretrained(tmp_path).id2label == given.id2label


@pytest.mark.parametrize(
    "value",
    [
        ["cat"],
        "cat",
        {"a": "cat"},
        {-1: "cat"},
        {True: "cat"},
        {1.0: "cat"},
        {1: 2},
        {1: None},
        {1: "x" * 1001},
        {1: "cat", "1": "dog"},
        {"٣": "cat"},
        {"9" * 20: "cat"},
        dict.fromkeys(range(100_001), "cat"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_classes_of_any_other_form_are_refused(value):
    with pytest.raises(ValueError, match="id2label must") as error:
        MaskConfig(id2label=value)
    assert len(str(error.value)) < 300


def test_the_preparation_of_images_has_one_form():
    given = {"std": (1, 0.5, 0.25), "mean": [0, 0, 0.1], "image_size": 224, "crop_pct": 1, "interpolation": "bicubic"}
    assert MaskConfig(preprocessing=given).preprocessing == {
        "crop_pct": 1.0,
        "image_size": 224,
        "interpolation": "bicubic",
        "mean": [0.0, 0.0, 0.1],
        "std": [1.0, 0.5, 0.25],
    }


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"size": 3},
        {3: 3},
        {"image_size": 0},
        {"image_size": 4097},
        {"image_size": 224.0},
        {"image_size": True},
        {"mean": [0.5]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"mean": [0.5, 0.5, 10**400]},
        {"std": [1, 1, 0]},
        {"std": "abc"},
        {"crop_pct": 0},
        {"crop_pct": 1.1},
        {"interpolation": "cubic spline"},
        {"interpolation": ["bicubic"]},
    ],
    ids=lambda value: repr(value)[:30],
)
def test_images_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match="preprocessing"):
        MaskConfig(preprocessing=value)


# --- modules_to_save -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.name = head
        setattr(self, head, nn.Sequential(nn.Linear(8, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.name)(self.body(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", ["mask", "layer", "scores", "mean", "k", "base_layer"])
def test_a_head_named_as_parts_of_wrappers_are_is_trained_alone(head, tmp_path):
    options = {"target_modules": ["body.0"], "modules_to_save": [head], "init_weights": False}
    model = get_peft_model(Net(head), MaskConfig(**options, batch_norm="adapt")).eval()
    model.add_adapter("second", MaskConfig(**options, seed=1))
    for name in ("second", "default"):
        model.set_adapter(name)
        prefix = "base_model.model."
        assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == [
            f"{prefix}body.0.smn_scores.{name}",
            f"{prefix}{head}.modules_to_save.{name}.0.weight",
            f"{prefix}{head}.modules_to_save.{name}.0.bias",
        ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    expected = model(X)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(head), tmp_path).eval()(X), expected)
    model.set_adapter("second")
    assert torch.equal(PeftModel.from_pretrained(Net(head), tmp_path / "second").eval()(X), model(X))


@pytest.mark.parametrize("name", ["base_layer", "smn_scores", "layer", "head2"])
def test_modules_to_save_that_name_nothing_of_the_base_are_refused(name):
    base = Net("head")
    with pytest.raises(ValueError, match=rf"modules_to_save=\['{name}'\] names no module of Net"):
        get_peft_model(base, MaskConfig(target_modules=["body.0"], modules_to_save=[name]))
    assert type(base.body[0]) is nn.Linear


@pytest.mark.parametrize("name", ["head.0", "original_module", "0"])
def test_a_part_of_what_another_adapter_trains_whole_is_refused(name):
    model = get_peft_model(Net("head"), MaskConfig(target_modules=["body.0"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"names a part of 'head'|names no module"):
        model.add_adapter("second", MaskConfig(target_modules=["body.0"], modules_to_save=[name]))
    assert list(model.peft_config) == ["default"]
