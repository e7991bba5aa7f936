# SPDX-License-Identifier: Apache-2.0
"""The tables of what `quickstart.py` measured; not an example by itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from smn_peft.evaluation import markdown_table


def _mean(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _cells(row: Mapping[str, Any], measures: Mapping[str, str], checkpoint: int) -> dict[str, str]:
    sizes = {part: row["bytes"].get(part) for part in ("mask", "head", "statistics", "total")}
    return {
        "method": row["method"],
        **{words: _mean(row[key]) for key, words in measures.items()},
        "density": f"{_mean([statistics.mean(row['density'])])} %" if row.get("density") else "–",
        **{f"{part} kB": f"{size / 1000:,.1f}" if size else "–" for part, size in sizes.items()},
        "of full": f"{100 * sizes['total'] / checkpoint:.1f} %" if sizes["total"] else "–",
    }


def render(record: Mapping[str, Any]) -> str:
    """Markdown of a record: what was done, a table with labels, one without, and what it cost."""
    frozen, rows, images = record["frozen"], record["rows"], record["images"]
    by_method = {row["method"]: row for row in rows}
    full, mask, swav = (by_method[label] for label in ("full fine-tuning", "mask, the defaults", "SwAV, mask"))
    head = 4 * rows[0]["trained"]  # of a new head alone; a probe is one
    labelled = [
        {"method": "frozen, k-NN (k = 200)", "accuracy": [frozen["knn"]], "bytes": {}},
        {"method": "frozen, linear probe", "accuracy": [frozen["probe"]], "bytes": {"head": head, "total": head}},
        *(row for row in rows if row["labels"]),
    ]
    bare = {"method": "frozen", "bytes": {}, **{name: [value] for name, value in frozen.items()}}
    unlabelled = [bare, *(row for row in rows if not row["labels"])]
    features = {"knn": "k-NN %", "knn_20": "k-NN %, k = 20", "probe": "linear probe %"}
    tables = ((labelled, {"accuracy": "accuracy %"}), (unlabelled, features))
    same = "gave outputs identical to the bit" if record["reload_identical"] else "DID NOT GIVE THE SAME OUTPUTS"
    named = [f"{name} {record['versions'][name]}" for name in ("python", "torch", "smn_peft", "peft", "timm")]
    seeds = len(mask["accuracy"])
    spread = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    done = (
        f"A narrow ResNet-18, trained on the handwritten digits 0–4 until {_mean([record['old_accuracy']])} % of "
        f"them are right, is adapted to the digits 5–9 with {images['train']} images and tested on "
        f"{images['test']} others: {mask['epochs']} epochs with labels, {swav['epochs']} by SwAV without, {spread}."
    )
    cost = f"All of it took {record['cpu_seconds']:.0f} s of one CPU core, with {', '.join(named)}."
    made = [markdown_table([_cells(row, names, full["bytes"]["total"]) for row in part]) for part, names in tables]
    return "\n\n".join([done, *made, f"Base and masks, loaded from their files in a fresh process, {same}. {cost}"])
