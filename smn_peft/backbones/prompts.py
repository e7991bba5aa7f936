# SPDX-License-Identifier: Apache-2.0
"""The sentences that turn class names into text for CLIP, per dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["DEFAULT_TEMPLATES", "TEMPLATES", "check_templates", "fill", "templates_for"]

DEFAULT_TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)

_CIFAR = ("a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.", "a photo of the {}.")

#: Of OpenAI's public prompts for CLIP, those that name the dataset's kind of image; keys as in the data registry.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "dtd": (
        "a photo of a {} texture.",
        "a photo of a {} pattern.",
        "a photo of a {} thing.",
        "a photo of a {} object.",
    ),
    "eurosat": (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    ),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "ucf101": (
        "a photo of a person {}.",
        "a photo of a person doing {}.",
        "a photo of a person during {}.",
        "a photo of a person practicing {}.",
    ),
    "food101": ("a photo of {}, a type of food.",),
    "inatloc500": DEFAULT_TEMPLATES,
}


def templates_for(dataset: str) -> tuple[str, ...]:
    """The dataset's templates; for any other name the default, "a photo of a {}."."""
    return TEMPLATES.get(dataset, DEFAULT_TEMPLATES)


def check_templates(templates: Iterable[str]) -> list[str]:
    """The templates as a list.

    Raises:
        ValueError: If there are none, or one does not have exactly one "{}" and no other brace.
    """
    if isinstance(templates, str):
        raise ValueError(f"templates is one string: pass a list, [{templates!r}].")
    checked = list(templates)
    if not checked:
        raise ValueError(f"There are no templates: pass at least one, such as {DEFAULT_TEMPLATES[0]!r}.")
    for template in checked:
        if "{}" not in template or set("{}") & set(template.replace("{}", "", 1)):
            raise ValueError(f"A template needs exactly one {{}}, where the class name goes; got {template!r}.")
    return checked


def fill(template: str, class_name: str) -> str:
    """The sentence of a class; underscores of dataset labels become spaces ("golden_retriever")."""
    return template.replace("{}", class_name.replace("_", " "))
