# SPDX-License-Identifier: Apache-2.0
"""The tables of runs on real backbones, rendered from records; run it to put `records/` into README.md.

Used by `experiment.py`; not an example by itself.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from smn_peft.analysis import low_shot_table
from smn_peft.evaluation import EvalReport, format_fraction, markdown_table

__all__ = ["render", "render_readme"]

RECORDS = Path(__file__).with_name("records")
README = Path(__file__).resolve().parent.parent / "README.md"
COLUMNS = ("method", "learning rate", "test accuracy %", "density", "bytes", "mask / head / statistics")


def _chosen(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of one recipe at the learning rate that was best on validation."""
    best = max((run for run in runs if run["seed"] == 0), key=lambda run: run["validation"])["lr"]
    return [run for run in runs if run["lr"] == best]


def _accuracy(fractions: list[float]) -> str:
    """Mean in percent, and the spread of several seeds."""
    spread = f" ± {100 * statistics.stdev(fractions):.1f} ({len(fractions)} seeds)" if len(fractions) > 1 else ""
    return f"{100 * statistics.mean(fractions):.1f}{spread}"


def _row(runs: list[dict[str, Any]]) -> dict[str, str]:
    """One recipe: the learning rate that was best on validation, and the test accuracy of the seeds run there."""
    chosen = _chosen(runs)
    cells = {
        "method": chosen[0]["recipe"],
        "learning rate": f"{chosen[0]['lr']:g}",
        "bytes": f"{chosen[0]['bytes']:,}",
    }
    cells["test accuracy %"] = _accuracy([run["test"] for run in chosen])
    if "density" in chosen[0]:
        cells["density"] = f"{statistics.mean(run['density'] for run in chosen):.4f}"
        cells[COLUMNS[-1]] = " / ".join(f"{chosen[0][f'{p}_bytes']:,}" for p in ("mask", "head", "statistics"))
    return cells


def _forms(runs: list[dict[str, Any]], full: int) -> list[dict[str, str]]:
    """One recipe: a row per form that it can be saved in, bytes the means over its seeds."""
    rows, chosen = [], _chosen(runs)
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


def _small_recipe(record: dict[str, Any]) -> str:
    """A backbone per row: before and after, over its seeds."""
    names = {"knn": ("k-NN before %", "k-NN after %"), "accuracy": ("linear probe %", "mask %")}
    table, rows, (before, reached) = [], record["rows"], names[record["metric"]]
    for name in dict.fromkeys(row["backbone"] for row in rows):
        mine = [row for row in rows if row["backbone"] == name]
        after = [row["after"] for row in mine]
        mean, spread = statistics.mean(after), statistics.stdev(after)
        table.append(
            {
                "backbone": f"{name}, {mine[0]['image_size']} px",
                before: format_fraction(mine[0]["before"], None),
                reached: f"{format_fraction(mean, spread)} ({len(after)} seeds)",
                "density": f"{statistics.mean(row['density'] for row in mine):.4f}",
                "bytes": f"{mine[0]['bytes']:,}",
                "steps": f"{mine[0]['steps']}",
            }
        )
    return markdown_table(table)


def render(record: Any) -> str:
    """Markdown table of a record of `experiment.py`, `real_vit_bytes.py`, `small_recipes.py` or `low_shot.py`."""
    if isinstance(record, list):
        return low_shot_table([EvalReport.from_json(json.dumps(row)) for row in record])
    if "recipe" in record:
        return _small_recipe(record)
    runs = record["runs"]
    recipes = [[run for run in runs if run["recipe"] == label] for label in dict.fromkeys(r["recipe"] for r in runs)]
    if any("forms" in run for run in runs):
        full = max(run["bytes"] for run in runs)
        return markdown_table([row for mine in recipes for row in _forms(mine, full)])
    rows = [
        {"method": "frozen, k-NN", "test accuracy %": f"{100 * record['knn']:.1f}"},
        {"method": "frozen, linear probe", "test accuracy %": f"{100 * record['probe']:.1f}"},
        *map(_row, recipes),
    ]
    return markdown_table([{column: row.get(column, "") for column in COLUMNS} for row in rows])


def render_readme(readme: Path = README) -> None:
    """Replace what stands between README's markers, one pair per record, by the rendered records.

    Raises:
        ValueError: If a record has no markers.
    """
    text = readme.read_text("utf-8")
    for path in sorted(RECORDS.glob("*.json")):
        marked = re.compile(rf"(<!-- {path.stem}:begin -->\n).*(<!-- {path.stem}:end -->)", re.DOTALL)
        table = render(json.loads(path.read_text("utf-8")))
        text, count = marked.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{readme} must have <!-- {path.stem}:begin --> … <!-- {path.stem}:end --> once.")
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    render_readme()
