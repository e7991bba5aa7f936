# SPDX-License-Identifier: Apache-2.0
"""Prompt templates: each has one place for the class name, and a bad one is refused."""

from __future__ import annotations

import pytest

from smn_peft.backbones.clip import DEFAULT_TEMPLATES, TEMPLATES, check_templates, templates_for


@pytest.mark.parametrize("dataset", [*TEMPLATES, "anything else"])
def test_every_template_has_one_place(dataset):
    templates = templates_for(dataset)
    assert check_templates(templates) == list(templates)
    assert len(set(templates)) == len(templates)
    assert [template.format("X").count("X") for template in templates] == [1] * len(templates)


def test_an_unknown_dataset_has_the_default():
    assert templates_for("mine") == DEFAULT_TEMPLATES == ("a photo of a {}.",)
    assert templates_for("pets") == ("a photo of a {}, a type of pet.",)


@pytest.mark.parametrize("template", ["a photo.", "{} and {}.", "a {name}.", "a { {}", ""])
def test_a_bad_template_is_refused(template):
    with pytest.raises(ValueError, match=r"exactly one \{\}, where the class name goes"):
        check_templates(["a {}.", template])


def test_no_templates_and_one_string():
    with pytest.raises(ValueError, match="There are no templates"):
        check_templates([])
    with pytest.raises(ValueError, match=r"templates is one string: pass a list, \['a \{\}\.'\]"):
        check_templates("a {}.")
