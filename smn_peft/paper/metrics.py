# SPDX-License-Identifier: Apache-2.0
"""What can be read from a finished run, by name: accuracies after and before, density, loss, bytes, few labels."""

from __future__ import annotations

from collections.abc import Callable

from ..training import RunSummary
from .cascades import read_result
from .run_spec import RunSpec
from .store import RunStore

__all__ = ["METRICS", "format_value", "is_frozen", "measure"]

_LOW_SHOT = "low_shot@"
_FROZEN = "frozen_"
_CASCADE = "cascade_"

METRICS: dict[str, Callable[[RunSummary], float | None]] = {
    "knn": lambda run: run.after.get("knn"),
    "linear_probe": lambda run: run.after.get("linear_probe"),
    "accuracy": lambda run: run.after.get("accuracy"),
    "frozen_knn": lambda run: run.before.get("knn"),
    "frozen_linear_probe": lambda run: run.before.get("linear_probe"),
    "density": lambda run: run.density,
    "loss": lambda run: run.loss,
}
"""Metrics of a run's summary. Beside them there are ``bytes``, ``low_shot@0.01`` and ``frozen_low_shot@0.01``; of a
cascade ``cascade_knn@LABEL``, ``cascade_linear_probe@LABEL`` and ``cascade_bytes@PART``, as `smn_peft.cascade` names
reports and sizes."""


def is_frozen(metric: str) -> bool:
    """Whether a metric is the frozen base's, the same for every seed."""
    return metric.startswith(_FROZEN)


def measure(store: RunStore, spec: RunSpec, metric: str) -> float | None:
    """A metric of a finished run; None if the run failed.

    Raises:
        ValueError: For an unknown metric, or one that such a run does not have.
    """
    bare = metric.removeprefix(_FROZEN)
    special = metric == "bytes" or bare.startswith(_LOW_SHOT) or metric.startswith(_CASCADE)
    if metric not in METRICS and not special:
        raise ValueError(f"Unknown metric {metric!r}; there are {', '.join(METRICS)}, bytes and {_LOW_SHOT}….")
    if store.failure(spec) is not None:
        return None
    if metric == "bytes":
        return float(store.size(spec))
    if bare.startswith(_LOW_SHOT):
        fraction = float(bare.removeprefix(_LOW_SHOT))
        return store.low_shot(spec, [fraction], base=is_frozen(metric))[fraction]
    if metric.startswith(_CASCADE):
        result, (name, _, part) = read_result(store.path(spec)), metric.removeprefix(_CASCADE).partition("@")
        found = result["sizes"] if name == "bytes" else result["values"][name]
        return float(found[part])
    value = METRICS[metric](store.summary(spec))
    if value is None:
        raise ValueError(f"The run {spec.id} has no {metric!r}: its arguments do not ask for it.")
    return value


def format_value(metric: str, value: float, spread: float | None = None) -> str:
    """A metric as a table shows it: percent, kilobytes, or the loss in nats."""
    kind = metric.partition("@")[0].removeprefix(_CASCADE)
    scale, digits = {"bytes": (1e-3, 1), "loss": (1.0, 4), "density": (100.0, 2)}.get(kind, (100.0, 1))
    shown = f"{scale * value:,.{digits}f}"
    return shown if spread is None else f"{shown} ± {scale * spread:,.{digits}f}"
