# SPDX-License-Identifier: Apache-2.0
"""Facts of a run come back from JSON as they are, and what moves a weight may not differ."""

from __future__ import annotations

import json

import pytest

from smn_peft import MaskConfig
from smn_peft.training import TrainArguments
from smn_peft.training.arguments import as_facts, check_same


def arguments(**options) -> TrainArguments:
    return TrainArguments(backbone="resnet18", dataset="cifar10", **options)


def test_facts_are_json_and_sets_are_sorted():
    facts = as_facts(arguments(mask=MaskConfig(target_modules={"b", "a"})), {"images": 3})
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["images"], facts["mask"]["target_modules"]) == (3, ["a", "b"])


def test_only_what_moves_a_weight_has_to_be_the_same():
    saved = as_facts(arguments(log_every=5, knn_k=7))
    check_same(saved, as_facts(arguments(output_dir="elsewhere", num_workers=3, cache_images=True)), "x")
    for name in ("init_from", "peft", "save_dtype", "base_dtype"):  # a run of a version without them
        saved.pop(name)
    check_same(saved, as_facts(arguments()), "x")
    with pytest.raises(ValueError, match="save_dtype: was 'float32', is 'bfloat16'"):
        check_same(saved, as_facts(arguments(save_dtype="bfloat16")), "x")
    with pytest.raises(ValueError, match=r"run\.json was written .*other settings(?s:.*)\n  lr: was 50\.0, is 2\.0\n"):
        check_same(saved, as_facts(arguments(lr=2.0)), "run.json")


def test_classes_are_compared_where_both_know_them():
    named = as_facts(arguments(), {"classes": ["a", "b"]})
    unnamed = as_facts(arguments(eval_split=None), {"classes": None})
    check_same(named, unnamed, "x")
    check_same(unnamed, named, "x")
    with pytest.raises(ValueError, match=r"classes: was \['a', 'b'\], is \['a', 'c'\]"):
        check_same(named, as_facts(arguments(), {"classes": ["a", "c"]}), "x")
