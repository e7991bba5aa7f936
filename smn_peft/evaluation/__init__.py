# SPDX-License-Identifier: Apache-2.0
"""How good features and classifiers are: k-NN, linear probe, low-shot, accuracy, and reports of what was measured."""

from __future__ import annotations

from .accuracy import evaluate_accuracy, evaluate_knn
from .features import Features, extract_features
from .linear_probe import FRACTIONS, PAPER_DECAY, fit_linear_probe, linear_probe, low_shot_reports
from .report import EvalReport, format_fraction, library_versions, markdown_table, merge_reports, report_table

__all__ = [
    "FRACTIONS",
    "PAPER_DECAY",
    "EvalReport",
    "Features",
    "evaluate_accuracy",
    "evaluate_knn",
    "extract_features",
    "fit_linear_probe",
    "format_fraction",
    "library_versions",
    "linear_probe",
    "low_shot_reports",
    "markdown_table",
    "merge_reports",
    "report_table",
]
