# SPDX-License-Identifier: Apache-2.0
"""`Scale`: on which backbones and images a table is made, and by which settings; data, so that there can be more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .run_spec import RunSpec, merged

__all__ = ["Scale", "Setting"]


@dataclass(frozen=True)
class Setting:
    """A backbone and how it is trained: a block of a table.

    Attributes:
        label: How tables call it.
        base: Arguments that name the backbone and its image size.
        methods: Arguments of every method, such as a recipe's, below those: "mask", "full", "statistics", "topk" …
        datasets: Names of the scale's datasets that it is trained on.
        minutes: Rough duration of a run.
        has_statistics: Whether the backbone has BatchNorm.
    """

    label: str
    base: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    datasets: tuple[str, ...]
    minutes: float
    has_statistics: bool = False


@dataclass(frozen=True)
class Scale:
    """Everything that differs between reproducing at the paper's size and at a small one.

    Attributes:
        name: Of `--scale`.
        machine: What the durations are for.
        datasets: Arguments of every dataset.
        supervised: Settings that train with labels, by key.
        unsupervised: Settings that train without, by key.
        main: Key of the unsupervised setting of Tables 3 and 10 and of the figures.
        varied: Key of the one where one thing is varied many times: Tables 5 and 9, Figures 8 and 9, the ablations.
        vit: Key of the supervised transformer of Figure 6.
        resnet: Key of the supervised network of Figure 7, the same as `main` uses.
        choices: What a table or figure varies or shows, by its name.
    """

    name: str
    machine: str
    datasets: Mapping[str, Mapping[str, Any]]
    supervised: Mapping[str, Setting]
    unsupervised: Mapping[str, Setting]
    main: str
    varied: str
    vit: str
    resnet: str
    choices: Mapping[str, Any]

    def run(self, setting: Setting, method: str, dataset: str, **changes: Any) -> RunSpec:
        """A run of a setting's method on a dataset, with some arguments changed."""
        arguments = merged(setting.methods[method], setting.base, self.datasets[dataset], changes)
        return RunSpec(arguments, minutes=setting.minutes)

    def self_supervised(self, method: str, dataset: str, **changes: Any) -> RunSpec:
        """A run of the main unsupervised setting."""
        return self.run(self.unsupervised[self.main], method, dataset, **changes)

    def variation(self, method: str, dataset: str, **changes: Any) -> RunSpec:
        """A run of the unsupervised setting in which one thing is varied many times."""
        return self.run(self.unsupervised[self.varied], method, dataset, **changes)
