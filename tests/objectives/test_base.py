# SPDX-License-Identifier: Apache-2.0
"""The registry of objectives: names, options with help, a user's own class, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest
import torch

from smn_peft.objectives import (
    CrossEntropyOptions,
    NoOptions,
    Objective,
    SwAVOptions,
    create_objective,
    list_objectives,
    objective_class,
    register_objective,
)
from smn_peft.objectives import base as registry


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))


@dataclass(frozen=True)
class MeanOptions:
    target: float = field(default=0.0, metadata={"help": "Where the mean feature should be."})


def make(name: str, **attributes):
    """A registered objective that pulls the mean feature to a number, with other class attributes."""

    class Mean(Objective):
        Options = MeanOptions

        def forward(self, model, batch):
            return {"loss": (model(batch["pixel_values"]).mean() - self.options.target) ** 2}

    for key, value in {"views": "one", "needs_labels": False, "consumes": "features", **attributes}.items():
        if value is not None:
            setattr(Mean, key, value)
    return register_objective(name)(Mean)


def test_the_built_in_objectives_are_listed():
    assert {"cross_entropy", "swav", "zero_shot"} <= set(list_objectives())


@pytest.mark.parametrize("name", ["cross_entropy", "swav", "zero_shot"])
def test_every_option_has_a_help_and_a_default(name):
    for option in fields(objective_class(name).Options):
        assert option.metadata["help"].endswith("."), option.name
    objective_class(name).Options()


def test_a_registered_objective_is_created_with_its_options():
    cls = make("mean")
    assert cls.name == "mean"
    assert "mean" in list_objectives()
    for options, target in [(None, 0.0), ({"target": 2.0}, 2.0), (MeanOptions(target=3.0), 3.0)]:
        objective = create_objective("mean", feature_dim=4, options=options)
        assert (objective.feature_dim, objective.num_classes) == (4, None)
        loss = objective(lambda images: images, {"pixel_values": torch.ones(2, 4)})["loss"]
        assert loss.item() == (1 - target) ** 2


def test_hooks_of_the_base_do_nothing():
    objective = create_objective(make("mean").name, feature_dim=4)
    assert [objective.begin(10), objective.before_step(0), objective.after_backward(0)] == [None] * 3
    assert objective.collapsed({"loss": 1.0}) is None


def test_a_name_belongs_to_one_class_that_may_be_defined_again():
    make("mean")
    make("mean")

    with pytest.raises(ValueError, match=r"'swav' belongs to smn_peft.objectives.swav.SwAV: take another name"):
        make("swav")


@pytest.mark.parametrize(
    ("attribute", "value"), [("views", "two"), ("needs_labels", None), ("consumes", None), ("consumes", "tokens")]
)
def test_a_class_without_the_attributes_is_refused(attribute, value):
    with pytest.raises(TypeError, match=f"Mean has to set the class attribute {attribute} to one of"):
        make("mean", **{attribute: value})


def test_what_is_no_objective_is_refused():
    with pytest.raises(TypeError, match="derive the class from Objective"):
        register_objective("linear")(torch.nn.Linear)


def test_a_subclass_without_forward_says_so():
    class Empty(Objective):
        pass

    with pytest.raises(NotImplementedError, match="Empty has to define forward"):
        Empty(4, None, NoOptions())(lambda x: x, {})


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match=r"Unknown objective 'swaw'. Did you mean swav\? Known: cross_entropy"):
        create_objective("swaw", feature_dim=4)
    with pytest.raises(ValueError, match=r"Options of 'swav': unknown option 'prototype'. Did you mean prototypes\?"):
        create_objective("swav", feature_dim=4, options={"prototype": 4})


def test_options_are_of_their_type_as_yaml_reads_them():
    read = create_objective("swav", feature_dim=4, options={"epsilon": "5e-2", "temperature": 1}).options
    assert (read.epsilon, read.temperature) == (0.05, 1.0)
    for options, message in [
        ({"prototypes": "abc"}, r"^Options of 'swav': prototypes must be int; got 'abc'\.$"),
        ({"epsilon": "small"}, "epsilon must be float; got 'small'"),
        ({"allow_few_rows": "maybe"}, "allow_few_rows must be true or false; got 'maybe'"),
        ({"queue_from_step": 0.5}, r"queue_from_step must be int or none; got 0\.5"),
        ({"projection": "conv"}, r"projection must be linear\|mlp; got 'conv'"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_objective("swav", feature_dim=4, options=options)


def test_options_of_another_objective_are_refused():
    with pytest.raises(TypeError, match="'swav' takes SwAVOptions or a mapping, got CrossEntropyOptions"):
        create_objective("swav", feature_dim=4, options=CrossEntropyOptions())


def test_labels_need_a_number_of_classes():
    with pytest.raises(ValueError, match="'cross_entropy' learns from labels: pass num_classes"):
        create_objective("cross_entropy", feature_dim=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "cnn"}, "projection must be one of linear, mlp; got 'cnn'"),
        ({"prototypes": 1}, "prototypes must be at least 2; got 1"),
        ({"output_dim": 0}, "output_dim must be at least 1; got 0"),
        ({"global_crops": 0}, "global_crops must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be above 0; got -1.0"),
        ({"queue_length": -1}, "queue_length must be at least 0; got -1"),
        ({"queue_from_step": -5}, "queue_from_step must be at least 0, or None; got -5"),
        ({"queue_from": 30}, "queue_from must be at least 0 and at most 1; got 30"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SwAVOptions(**options)
