# SPDX-License-Identifier: Apache-2.0
"""A recipe's runs as rows of a table: the seeds at the learning rate that was best on validation.

Used by `transfer_report.py` and `model_cards.py`; not an example by itself.
"""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["chosen_runs", "form_rows", "method_row"]


def chosen_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of one recipe at the learning rate that was best on validation."""
    best = max((run for run in runs if run["seed"] == 0), key=lambda run: run["validation"])["lr"]
    return [run for run in runs if run["lr"] == best]


def _accuracy(fractions: list[float]) -> str:
    """Mean in percent, and the spread of several seeds."""
    spread = f" ± {100 * statistics.stdev(fractions):.1f} ({len(fractions)} seeds)" if len(fractions) > 1 else ""
    return f"{100 * statistics.mean(fractions):.1f}{spread}"


def method_row(runs: list[dict[str, Any]]) -> dict[str, str]:
    """One recipe: the learning rate that was best on validation, and the test accuracy of the seeds run there."""
    chosen = chosen_runs(runs)
    cells = {
        "method": chosen[0]["recipe"],
        "learning rate": f"{chosen[0]['lr']:g}",
        "bytes": f"{chosen[0]['bytes']:,}",
    }
    cells["test accuracy %"] = _accuracy([run["test"] for run in chosen])
    if "density" in chosen[0]:
        cells["density"] = f"{statistics.mean(run['density'] for run in chosen):.4f}"
        parts = ("mask", "head", "statistics")
        cells[" / ".join(parts)] = " / ".join(f"{chosen[0][f'{part}_bytes']:,}" for part in parts)
    return cells


def form_rows(runs: list[dict[str, Any]], full: int) -> list[dict[str, str]]:
    """One recipe: a row per form that it can be saved in, bytes the means over its seeds."""
    rows, chosen = [], chosen_runs(runs)
    for form in chosen[0].get("forms", {"float32": {}}):
        sizes = [run["forms"][form] if "forms" in run else {"total": run["bytes"]} for run in chosen]
        parts = [key for key in ("mask", "factors", "head", "statistics") if key in sizes[0]]
        means = {key: statistics.mean(size[key] for size in sizes) for key in (*parts, "total")}
        rows.append(
            {
                "method": chosen[0]["recipe"],
                "saved as": form,
                "learning rate": f"{chosen[0]['lr']:g}",
                "test accuracy %": _accuracy([s.get("test", r["test"]) for s, r in zip(sizes, chosen, strict=True)]),
                "density": f"{statistics.mean(r['density'] for r in chosen):.4f}" if "density" in chosen[0] else "",
                "bytes": f"{means['total']:,.0f}",
                "of full": f"{100 * means['total'] / full:.2f} %",
                "of which": " / ".join(f"{key} {means[key]:,.0f}" for key in parts),
            }
        )
    return rows
