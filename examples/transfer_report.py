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

from transfer_rows import form_rows, method_row

from smn_peft.analysis import low_shot_table
from smn_peft.evaluation import EvalReport, format_fraction, markdown_table

__all__ = ["render", "render_readme"]

RECORDS = Path(__file__).with_name("records")
README = Path(__file__).resolve().parent.parent / "README.md"
COLUMNS = ("method", "learning rate", "test accuracy %", "density", "bytes", "mask / head / statistics")


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
        return markdown_table([row for mine in recipes for row in form_rows(mine, full)])
    rows = [
        {"method": "frozen, k-NN", "test accuracy %": f"{100 * record['knn']:.1f}"},
        {"method": "frozen, linear probe", "test accuracy %": f"{100 * record['probe']:.1f}"},
        *map(method_row, recipes),
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
