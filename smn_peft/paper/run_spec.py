# SPDX-License-Identifier: Apache-2.0
"""`RunSpec`: a training run as data, known by a hash of what it does, so that tables share what is run once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..training import TrainArguments

__all__ = ["PLACES", "RunSpec", "merged", "missing_files"]

_PACKAGE = Path(__file__).resolve().parent
#: Folders that arguments name as "{assets}/…": the environment variable of each, and what it should hold.
PLACES = {
    "assets": ("SMN_ASSETS", "the weights of small backbones, and cifar10_jpeg.npz"),
    "weights": ("SMN_WEIGHTS", "resnet50_swav.safetensors and resnet50_dino.safetensors, of timm's resnet50"),
}
#: What does not change what comes of a run.
_IGNORED = frozenset("output_dir resume log_every log_with checkpoint_every keep_checkpoints num_workers".split())


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings laid over each other, the later on top; what is itself a mapping is merged too."""
    result: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


@dataclass(frozen=True)
class RunSpec:
    """One run, or one cascade, of the arguments of `TrainArguments` that are not their defaults.

    Attributes:
        arguments: By name, nested as in a recipe. "{assets}" and "{weights}" stand for the folders of `PLACES`,
            "{package}" for the folder of this file, so that no hash depends on where these are.
        found: A run whose found density is this one's `mask.density`; None where there is nothing to find.
        cascade: Options of the cascade whose dispatcher the arguments describe; None for a run alone.
        minutes: Rough duration on the machine that the scale is made for; no part of the hash.
    """

    arguments: Mapping[str, Any]
    found: RunSpec | None = None
    cascade: Mapping[str, Any] | None = None
    minutes: float = 0.0

    def at(self, **changes: Any) -> RunSpec:
        """The same with some arguments changed."""
        return replace(self, arguments=merged(self.arguments, changes))

    def seeded(self, seed: int) -> RunSpec:
        """The same under a seed; which labels it sees, and the run whose density it takes, have that seed too."""
        found = None if self.found is None else self.found.seeded(seed)
        few = {"fraction_seed": seed} if "fraction" in self.arguments else {}
        return replace(self.at(seed=seed, **few), found=found)

    @property
    def backbone(self) -> str:
        """The base by name: what a run's folder says of it is not taken for a program to run."""
        return str(_expanded(self.arguments["backbone"]))

    @cached_property
    def id(self) -> str:
        """Hash of the arguments that are not defaults: a default of a later option orphans no run.

        Raises:
            ValueError: If the arguments are wrong.
        """
        density = {} if self.found is None else {"mask": {"density": 0.5}}
        facts: dict[str, Any] = _differing(TrainArguments(**merged(self.arguments, density)))
        if self.found is not None:
            facts["found"] = self.found.id
        if self.cascade is not None:
            facts["cascade"] = dict(self.cascade)
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode()).hexdigest()[:12]

    def to_arguments(self, folder: Path, density: float | None = None) -> TrainArguments:
        """What to call `run` with, in a folder.

        Args:
            folder: Its `output_dir`.
            density: What `found` has found.

        Raises:
            ValueError: If a folder that is needed is named by no environment variable, or lacks a file.
        """
        if problem := missing_files([self]):
            raise ValueError(problem)
        values = merged(self.arguments, {} if density is None else {"mask": {"density": density}})
        return TrainArguments(**{**_expanded(values), "output_dir": str(folder), "resume": True})


def _differing(given: Any) -> dict[str, Any]:
    """Fields of a dataclass that a user sets and that are not their defaults."""
    defaults = type(given)(**({"backbone": "-", "dataset": "-"} if isinstance(given, TrainArguments) else {}))
    found = {}
    for field in fields(given):
        value, default = getattr(given, field.name), getattr(defaults, field.name)
        if "help" not in field.metadata or field.name in _IGNORED or value == default:
            continue
        found[field.name] = _differing(value) if is_dataclass(value) else value
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _expanded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_expanded(item) for item in value]
    if not isinstance(value, str):
        return value
    for name, (variable, _) in PLACES.items():
        value = value.replace(f"{{{name}}}", os.environ.get(variable, ""))
    return value.replace("{package}", str(_PACKAGE))


def missing_files(specs: list[RunSpec]) -> str:
    """What has to be there and is not, in a sentence with the remedy; empty if nothing is missing."""
    texts = {text for spec in specs for text in spec.arguments.values() if isinstance(text, str)}
    for name, (variable, content) in PLACES.items():
        wanted = sorted(text for text in texts if text.startswith(f"{{{name}}}/"))
        if not wanted:
            continue
        if not os.environ.get(variable):
            return f"{variable} is unset: it names the folder with {content}. These runs read {', '.join(wanted)}."
        if absent := [text for text in wanted if not Path(_expanded(text).partition(".py:")[0]).exists()]:
            return f"{variable}={os.environ[variable]} lacks {', '.join(absent)}: it should hold {content}."
    return ""
