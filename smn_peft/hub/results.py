# SPDX-License-Identifier: Apache-2.0
"""Evaluation reports in the Hub's two formats: `model-index` of a card, and the files of `.eval_results/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult

from ..evaluation import EvalReport
from .names import dataset_id, shown_name

__all__ = ["EVAL_FOLDER", "eval_result_files", "metric_name", "model_index"]

EVAL_FOLDER = ".eval_results"
_METRICS = {"knn": "k-NN accuracy", "linear_probe": "linear probe accuracy", "accuracy": "accuracy"}


def metric_name(report: EvalReport) -> str:
    """The metric in words: ``k-NN accuracy (k = 200)``, ``linear probe accuracy, 10 % of the labels``."""
    kind, _, fraction = report.metric.partition("@")
    words = _METRICS.get(kind, kind)
    if fraction:
        return f"{words}, {100 * float(fraction):g} % of the labels"
    return f"{words} (k = {report.settings['k']})" if kind == "knn" and "k" in report.settings else words


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _line(text: str) -> str:
    return " ".join(text.split())


def model_index(reports: Sequence[EvalReport]) -> list[EvalResult]:
    """One entry per report, values in percent; `metric_args` holds how many seeds and their standard deviation."""
    found = []
    for report in reports:
        spread: dict[str, Any] = {"seeds": len(report.seeds)} if report.seeds else {}
        if report.spread is not None:
            spread["standard_deviation"] = _percent(report.spread)
        found.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset_id(report.dataset) or _line(shown_name(report.dataset)),
                dataset_name=_line(shown_name(report.dataset)),
                dataset_split=_line(report.split),
                dataset_revision=None if report.revision is None else _line(report.revision),
                metric_type="accuracy",
                metric_name=_line(metric_name(report)),
                metric_value=_percent(report.value),
                metric_args=spread or None,
            )
        )
    return found


def eval_result_files(reports: Sequence[EvalReport], task: str | None = None) -> dict[str, bytes]:
    """Files of `.eval_results/`, by path in the repository: one for each report on a dataset of the Hub.

    The format is the Hub's (https://huggingface.co/docs/hub/eval-results): a list of entries with `dataset`, `value`
    and `notes`. A dataset that only its owner has cannot be named there, so its reports give no file.

    Args:
        reports: Evaluations of the adapter.
        task: Folder of the adapter in a repository of several, which becomes part of the names.
    """
    files = {}
    for report in reports:
        repository = dataset_id(report.dataset)
        if repository is None:
            continue
        dataset: dict[str, Any] = {"id": repository, "task_id": "default"}
        if report.revision is not None:
            dataset["revision"] = report.revision
        entry = {"dataset": dataset, "value": _percent(report.value), "notes": _notes(report)}
        name = "-".join(filter(None, [task, shown_name(report.dataset), report.metric]))
        path = f"{EVAL_FOLDER}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.yaml"
        files[path] = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True).encode()
    return files


def _notes(report: EvalReport) -> str:
    """What the number is, since the Hub's format has no field for metric, split and spread."""
    parts = [f"{metric_name(report)} in percent", f"split {report.split}"]
    if report.spread is not None:
        parts.append(f"mean of {len(report.seeds)} seeds, standard deviation {_percent(report.spread)}")
    return "; ".join(parts)
