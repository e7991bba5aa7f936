# SPDX-License-Identifier: Apache-2.0
"""`Scale`: backbones, images and hyper-parameters of a reproduction, from ``scales.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml

from .._options import did_you_mean, merged
from ..data import list_datasets
from ..training import load_recipe
from .runs import RunSpec


@dataclass(frozen=True)
class Setting:
    """A backbone and its training recipes: a block of a table."""

    label: str  # its name in tables
    base: Mapping[str, Any]  # arguments that name the backbone and its image size
    methods: Mapping[str, Mapping[str, Any]]  # arguments of every method: "mask", "full", "statistics", "topk" …
    minutes: float  # rough duration of a run
    datasets: Sequence[str] = ()  # names of the scale's datasets that tables show it on


@dataclass(frozen=True)
class Scale:
    """What differs between reproducing at the paper's size and at a small one."""

    name: str  # value of `--scale`
    machine: str  # the machine that durations are for
    datasets: Mapping[str, Mapping[str, Any]]  # arguments of every dataset
    supervised: Mapping[str, Setting]  # settings that train with labels, by key
    unsupervised: Mapping[str, Setting]  # settings that train without
    main: Setting  # without labels: of Tables 3 and 10 and of the figures
    varied: Setting  # without labels: where single options are varied, as in Tables 5 and 9 and the ablations
    vit: Setting  # with labels: the transformer of Figure 6
    resnet: Setting  # with labels: the network of Figure 7, the same as `main` uses
    choices: Mapping[str, Any]  # what a table or figure varies or shows, by its name

    def run(self, setting: Setting, method: str, dataset: str, **changes: Any) -> RunSpec:
        """A run of a setting's method on a dataset, with some arguments changed."""
        arguments = merged(setting.methods[method], setting.base, self.datasets[dataset], changes)
        return RunSpec(arguments, minutes=setting.minutes)

    def cascade(self, dataset: str) -> RunSpec:
        """The cascade of a dataset: dispatcher, experts, and at some scales an ensemble over seeds as a control."""
        setting, method = self.choices["table3_run"]
        changes, options = self.choices["table3_options"].get(dataset, {}), self.choices["cascade"]
        dispatcher = self.run(self.unsupervised[setting], method, dataset, **changes)
        masks = 1 + options["experts"] * (2 if options["ensemble"] else 1)
        return replace(dispatcher, cascade=options, minutes=dispatcher.minutes * masks)


def read_yaml(name: str) -> Any:
    """Read a file of this folder."""
    return yaml.safe_load(resources.files(__package__).joinpath(name).read_text("utf-8"))


def _method(content: Any) -> Mapping[str, Any]:
    """Arguments of a method: a recipe's name, a mapping, or a list of these."""
    if isinstance(content, str):
        return load_recipe(content)
    return content if isinstance(content, Mapping) else merged(*map(_method, content))


def _settings(content: Mapping[str, Any]) -> dict[str, Setting]:
    found = {}
    for key, values in content.items():
        methods = {name: _method(method) for name, method in values["methods"].items()}
        found[key] = Setting(**{**values, "methods": methods})
    return found


def _scale(name: str, content: Mapping[str, Any]) -> Scale:
    with_labels, without = _settings(content["supervised"]), _settings(content["unsupervised"])
    main, varied = without[content["main"]], without[content["varied"]]
    vit, resnet = with_labels[content["vit"]], with_labels[content["resnet"]]
    datasets = content.get("datasets") or {dataset: {"dataset": dataset} for dataset in list_datasets()}
    machine, choices = content["machine"], content["choices"]
    return Scale(name, machine, datasets, with_labels, without, main, varied, vit, resnet, choices)


SCALES = {name: _scale(name, content) for name, content in read_yaml("scales.yaml").items()}


def scale_named(name: str) -> Scale:
    """Look up a scale; ValueError if there is none of this name."""
    if name not in SCALES:
        raise ValueError(f"There is no scale {name!r}; there are {', '.join(SCALES)}.{did_you_mean(name, SCALES)}")
    return SCALES[name]
