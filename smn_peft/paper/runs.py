# SPDX-License-Identifier: Apache-2.0
"""`RunSpec`: a training run as data, identified by a hash. `RunStore`: a folder of runs, each done once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .._options import merged
from ..cascade import Cascade, CascadeArguments, cascade_sizes, evaluate_cascade
from ..objectives import objective_class
from ..storage.files import atomic_write
from ..training import RunSummary, TrainArguments, TrainingFailure, evaluate_run, run
from ..training.budget import BudgetError
from ..training.checkpoint import list_checkpoints
from ..training.run import RUN_NAME

# Folders that arguments name as "{assets}/…": the environment variable of each, and what it should hold.
_PLACES = {
    "assets": ("SMN_ASSETS", "the weights of small backbones, and cifar10_jpeg.npz"),
    "weights": ("SMN_WEIGHTS", "resnet50_swav.safetensors and resnet50_dino.safetensors, of timm's resnet50"),
}
# Arguments that do not change the result of a run.
_IGNORED = frozenset("output_dir resume log_every log_with checkpoint_every keep_checkpoints num_workers".split())
_CASCADE_NAME = "cascade_result.json"
_FAILED_NAME = "failed.json"


@dataclass(frozen=True)
class RunSpec:
    """One run, or one cascade.

    In arguments "{assets}" and "{weights}" stand for the folders that SMN_ASSETS and SMN_WEIGHTS name, "{package}" for
    the folder of this file, so that the hash does not depend on where they are.
    """

    arguments: Mapping[str, Any]  # of `TrainArguments` by name, nested as in a recipe
    found: RunSpec | None = None  # a run whose density becomes this one's `mask.density`
    start: RunSpec | None = None  # a run without labels whose mask this one starts from
    cascade: Mapping[str, Any] | None = None  # options of the cascade whose dispatcher the arguments describe
    minutes: float = 0.0  # rough duration on the scale's machine; not part of the hash

    def at(self, **changes: Any) -> RunSpec:
        """Copy with some arguments changed."""
        return replace(self, arguments=merged(self.arguments, changes))

    def seeded(self, seed: int) -> RunSpec:
        """Copy with a seed, which also chooses the labels of a `fraction` and is that of the runs before it."""
        earlier: dict[str, Any] = {name: run.seeded(seed) for name, run in self.earlier.items()}
        few = {"fraction_seed": seed} if "fraction" in self.arguments else {}
        return replace(self.at(seed=seed, **few), **earlier)

    @property
    def earlier(self) -> dict[str, RunSpec]:
        """The runs that come before this one, by the field that holds them."""
        return {name: run for name, run in (("found", self.found), ("start", self.start)) if run is not None}

    @property
    def backbone(self) -> str:
        """The base model's name with its folder filled in; `run.json` is not trusted to name a program."""
        return str(_expanded(self.arguments["backbone"]))

    @cached_property
    def id(self) -> str:
        """Hash of the arguments that are not defaults, so that a new option leaves old runs valid.

        Raises:
            ValueError: The arguments are wrong.
        """
        arguments = merged(self.arguments, {} if self.found is None else {"mask": {"density": 0.5}})
        facts = _differing(TrainArguments(**arguments), TrainArguments(backbone="-", dataset="-"))
        facts |= {name: run.id for name, run in self.earlier.items()}
        if self.cascade is not None:
            facts["cascade"] = dict(self.cascade)
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode()).hexdigest()[:12]

    def to_arguments(self, folder: Path, changes: Mapping[str, Any] | None = None) -> TrainArguments:
        """Arguments to call `run` with, for an `output_dir` and what comes of earlier runs.

        Raises:
            ValueError: A folder that is needed is named by no environment variable, or lacks a file.
        """
        if problem := missing_files([self]):
            raise ValueError(problem)
        values = {**_expanded(self.arguments), "output_dir": str(folder), "resume": True}
        return TrainArguments(**merged(values, changes or {}))


def _differing(given: Any, defaults: Any) -> dict[str, Any]:
    """Options of a dataclass that change results and are not the defaults."""
    found = {}
    for field in fields(given):
        value, default = getattr(given, field.name), getattr(defaults, field.name)
        if "help" in field.metadata and field.name not in _IGNORED and value != default:
            found[field.name] = _differing(value, default) if is_dataclass(value) else value
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _expanded(value: Any) -> Any:
    """Fill in "{assets}", "{weights}" and "{package}" in all strings of nested containers."""
    if isinstance(value, Mapping):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_expanded(item) for item in value]
    if not isinstance(value, str):
        return value
    for name, (variable, _) in _PLACES.items():
        value = value.replace(f"{{{name}}}", os.environ.get(variable, ""))
    return value.replace("{package}", str(Path(__file__).resolve().parent))


def missing_files(specs: list[RunSpec]) -> str:
    """Name the files that runs need and that are missing, with the remedy; "" if all are there."""
    texts = {text for spec in specs for text in spec.arguments.values() if isinstance(text, str)}
    for name, (variable, content) in _PLACES.items():
        wanted = sorted(text for text in texts if text.startswith(f"{{{name}}}/"))
        if not wanted:
            continue
        if not os.environ.get(variable):
            return f"{variable} is unset: it names the folder with {content}. These runs read {', '.join(wanted)}."
        if absent := [text for text in wanted if not Path(_expanded(text).partition(".py:")[0]).exists()]:
            return f"{variable}={os.environ[variable]} lacks {', '.join(absent)}: it should hold {content}."
    return ""


@dataclass(frozen=True)
class RunStore:
    """Finished runs in a folder, which is made with the first: ``runs/<hash>/``, without most checkpoints."""

    folder: Path

    def path(self, spec: RunSpec) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / spec.id

    def is_done(self, spec: RunSpec) -> bool:
        """Whether a run is finished, or has failed for good."""
        result = RUN_NAME if spec.cascade is None else _CASCADE_NAME
        return (self.path(spec) / result).is_file() or self.failure(spec) is not None

    def failure(self, spec: RunSpec) -> str | None:
        """Why a run, or one that comes before it, failed; None if it did not."""
        for earlier in spec.earlier.values():
            if (reason := self.failure(earlier)) is not None:
                return reason
        path = self.path(spec) / _FAILED_NAME
        return str(json.loads(path.read_text("utf-8"))["error"]) if path.is_file() else None

    def ensure(self, spec: RunSpec) -> None:
        """Run what is not done yet, from its newest checkpoint if there is one.

        A run that fails (a loss that is not finite, an empty mask, collapsed codes, a budget below the head's size)
        counts as done, with its reason in the folder: it would fail again. Delete the folder to try anew.

        Raises:
            ValueError: It cannot be started, such as for missing files, or for a cluster smaller than a batch.
            Interrupted: After Ctrl-C, once a checkpoint is written.
        """
        for earlier in spec.earlier.values():
            self.ensure(earlier)
        if not self.is_done(spec):
            changes: dict[str, Any] = {}
            if spec.found is not None:
                changes["mask"] = {"density": self.summary(spec.found).density}
            if spec.start is not None:
                changes["init_from"] = str(self.path(spec.start))
            arguments = spec.to_arguments(self.path(spec), changes)
            try:
                if spec.cascade is None:
                    run(arguments)
                else:
                    _train_cascade(arguments, spec.cascade)
            except (TrainingFailure, BudgetError) as error:
                _write_json(self.path(spec) / _FAILED_NAME, {"error": str(error)})
        objective = spec.arguments.get("objective", TrainArguments.objective)
        adapts = spec.arguments.get("adapt", TrainArguments.adapt)
        if spec.cascade is None and adapts == "mask" and not objective_class(objective).needs_labels:
            return  # another run may start from its scores
        for folder in {path.parent for path in self.path(spec).rglob("checkpoint-*")}:
            for checkpoint in list_checkpoints(folder):
                shutil.rmtree(checkpoint)

    def summary(self, spec: RunSpec) -> RunSummary:
        """Summary of a finished run."""
        return RunSummary.load(self.path(spec))

    def low_shot(self, spec: RunSpec, fraction: float, *, base: bool = False) -> float:
        """Accuracy of linear probes on a fraction of the labels, the mean over three draws; measured once."""
        path = self.path(spec) / f"low_shot{'_base' if base else ''}.json"
        known: dict[float, float] = dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
        if fraction not in known:
            (report,) = evaluate_run(self.path(spec), base=base, backbone=spec.backbone, low_shot=[fraction], seeds=3)
            known[fraction] = report.value
            _write_json(path, sorted(known.items()))
        return known[fraction]

    def cascade(self, spec: RunSpec) -> Any:
        """Result of a finished cascade: "values" by metric and label, "sizes" in bytes."""
        return json.loads((self.path(spec) / _CASCADE_NAME).read_text("utf-8"))

    def measure(self, spec: RunSpec, metric: str) -> float | None:
        """Read a metric of a finished run; None if the run failed.

        A metric is a key of [`METRICS`], with "@part" where it has parts: "knn", "cascade_knn@dispatcher".

        Raises:
            ValueError: The metric is unknown, or such a run does not have it.
        """
        name, _, part = metric.partition("@")
        if name not in METRICS:
            raise ValueError(f"Unknown metric {metric!r}; there are {', '.join(METRICS)}.")
        if self.failure(spec) is not None:
            return None
        value = METRICS[name](self, spec, part)
        if value is None:
            raise ValueError(f"The run {spec.id} has no {metric!r}: its arguments do not ask for it.")
        return float(value)


#: Metrics by name: (store, run, what follows "@") -> value. Those of the base are named "frozen_…".
METRICS: dict[str, Callable[[RunStore, RunSpec, str], float | None]] = {
    "knn": lambda store, spec, _: store.summary(spec).after.get("knn"),
    "linear_probe": lambda store, spec, _: store.summary(spec).after.get("linear_probe"),
    "accuracy": lambda store, spec, _: store.summary(spec).after.get("accuracy"),
    "start_accuracy": lambda store, spec, _: store.summary(spec).before.get("accuracy"),
    "low_shot": lambda store, spec, part: store.low_shot(spec, float(part)),
    "frozen_knn": lambda store, spec, _: store.summary(spec).before.get("knn"),
    "frozen_linear_probe": lambda store, spec, _: store.summary(spec).before.get("linear_probe"),
    "frozen_low_shot": lambda store, spec, part: store.low_shot(spec, float(part), base=True),
    "density": lambda store, spec, _: store.summary(spec).density,
    "loss": lambda store, spec, _: store.summary(spec).loss,
    "bytes": lambda store, spec, _: max(file.stat().st_size for file in store.path(spec).glob("*.safetensors")),
    "cascade_knn": lambda store, spec, part: store.cascade(spec)["values"]["knn"][part],
    "cascade_linear_probe": lambda store, spec, part: store.cascade(spec)["values"]["linear_probe"][part],
    "cascade_bytes": lambda store, spec, part: store.cascade(spec)["sizes"][part],
}


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _train_cascade(arguments: TrainArguments, options: Mapping[str, Any]) -> None:
    """Fit a cascade in `output_dir`, and write its accuracies and sizes beside it."""
    folder = Path(arguments.output_dir)
    Cascade.fit(arguments, CascadeArguments(**options))
    values: dict[str, dict[str, float]] = {}
    for report in evaluate_cascade(folder, backbone=arguments.backbone):
        values.setdefault(report.metric, {})[report.label] = report.value
    _write_json(folder / _CASCADE_NAME, {"values": values, "sizes": asdict(cascade_sizes(folder))})
