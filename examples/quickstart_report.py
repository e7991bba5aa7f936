# SPDX-License-Identifier: Apache-2.0
"""The quickstart's tables and summary, rendered from its record, on the terminal and in README.md.

Used by `quickstart.py`; not an example by itself.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smn_peft.evaluation import markdown_table

RECORD = Path(__file__).with_name("quickstart.json")
README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = re.compile(r"(<!-- quickstart:begin -->\n).*(<!-- quickstart:end -->)", re.DOTALL)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _mean(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _kilobytes(size: int | None) -> str:
    return f"{size / 1000:,.1f}" if size else "–"


def _cells(row: Mapping[str, Any], measures: Mapping[str, str], checkpoint: int) -> dict[str, str]:
    size = row["bytes"]
    cells = {"method": row["method"], **{words: _mean(row[key]) for key, words in measures.items()}}
    return cells | {
        "trained": f"{row['trained']:,}",
        "density": _percent(statistics.mean(row["density"])) if row.get("density") else "–",
        "mask kB": _kilobytes(size.get("mask")),
        "head kB": _kilobytes(size.get("head")),
        "statistics kB": _kilobytes(size.get("statistics")),
        "file kB": _kilobytes(size["total"]),
        "of full": _percent(size["total"] / checkpoint) if size["total"] else "–",
    }


def _tables(record: Mapping[str, Any]) -> tuple[str, str]:
    """With labels, and without."""
    frozen, rows = record["frozen"], record["rows"]
    full = next(row["bytes"]["total"] for row in rows if row["method"] == "full fine-tuning")
    base = {"trained": 0, "bytes": {"total": 0}}
    numbers = rows[0]["trained"]  # of a new head alone; a probe is one
    probe = {"trained": numbers, "bytes": {"head": 4 * numbers, "total": 4 * numbers}}
    knn_row = {"method": "frozen, k-NN (k = 200)", "accuracy": [frozen["knn"]], **base}
    probe_row = {"method": "frozen, linear probe", "accuracy": [frozen["probe"]], **probe}
    labelled = [knn_row, probe_row, *(row for row in rows if row["labels"])]
    bare = {"method": "frozen", **base, **{name: [value] for name, value in frozen.items()}}
    unlabelled = [bare, *(row for row in rows if not row["labels"])]
    measures = {"knn": "k-NN %", "knn_20": "k-NN %, k = 20", "probe": "linear probe %"}
    return (
        markdown_table([_cells(row, {"accuracy": "accuracy %"}, full) for row in labelled]),
        markdown_table([_cells(row, measures, full) for row in unlabelled]),
    )


def _words(record: Mapping[str, Any]) -> list[str]:
    """Summary: the task, what labels gave, what SwAV gave without them, the files, and the costs."""
    frozen, rows = record["frozen"], {row["method"]: row for row in record["rows"]}
    control, full, mask, paper, swav_control, swav = rows.values()
    seeds, images = len(mask["accuracy"]), record["images"]
    spread = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    gain = 100 * (statistics.mean(swav["knn"]) - frozen["knn"])
    without = 100 * (statistics.mean(swav_control["knn"]) - frozen["knn"])
    same = "gave outputs identical to the bit" if record["reload_identical"] else "DID NOT GIVE THE SAME OUTPUTS"
    names = ("smn_peft", "peft", "timm", "torch", "python")
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in names if name in record["versions"])
    return [
        f"A narrow ResNet-18, trained on the handwritten digits 0–4 until it tells {_percent(record['old_accuracy'])} "
        f"of them right, is adapted to the digits 5–9 with {images['train']} images and tested on {images['test']} "
        f"others: {mask['epochs']} epochs with labels, {swav['epochs']} without, {spread}.",
        f"With labels: a linear probe on the base's features gets {_percent(frozen['probe'])} right, a mask with the "
        f"defaults {_mean(mask['accuracy'])} %, fine-tuning every weight {_mean(full['accuracy'])} %. The mask keeps "
        f"{_percent(statistics.mean(mask['density']))} of the weights, unchanged up to one factor per layer, and "
        "switches the others off. The defaults keep the base's BatchNorm statistics; here their scores learn by Adam. "
        "The paper's recipe, SGD at a large learning rate and statistics re-estimated, which then belong to the "
        f"adapter, gives {_mean(paper['accuracy'])} %; new statistics and a new head without a mask "
        f"{_mean(control['accuracy'])} %.",
        f"Without labels: SwAV on the same {images['train']} images learns a mask that keeps "
        f"{_percent(statistics.mean(swav['density']))} of the weights. k-NN on the features goes from "
        f"{_percent(frozen['knn'])} to {_mean(swav['knn'])} % ({gain:+.1f} points), a linear probe from "
        f"{_percent(frozen['probe'])} to {_mean(swav['probe'])} %. Statistics that adapt to the same crops, without a "
        f"mask, move k-NN by {without:+.1f} points. Labels serve to measure, and on held-out training "
        "images to choose the settings; no test image takes part in either training or choosing.",
        f"The default mask's file has {_kilobytes(mask['bytes']['total'])} kB, header included, a full fp32 "
        f"checkpoint {_kilobytes(full['bytes']['total'])} kB. Base and masks, loaded from their files in a fresh "
        f"process, {same}.",
        f"All of it took {record['cpu_seconds']:.0f} s of one CPU core, with {versions}.",
    ]


def render(record: Mapping[str, Any]) -> str:
    """Tables and summary of a record of `quickstart.py`, as Markdown."""
    labelled, unlabelled = _tables(record)
    task, with_labels, without_labels, *rest = _words(record)
    return "\n\n".join((task, labelled, with_labels, unlabelled, without_labels, *rest))


def render_readme(record: Path = RECORD, readme: Path = README) -> None:
    """Replace what stands between the quickstart markers of README.md by the rendered record.

    Raises:
        ValueError: If the markers are not there.
    """
    text = readme.read_text("utf-8")
    if not MARKERS.search(text):
        raise ValueError(f"{readme} has no <!-- quickstart:begin --> … <!-- quickstart:end -->.")
    block = render(json.loads(record.read_text("utf-8")))
    readme.write_text(MARKERS.sub(lambda match: f"{match[1]}{block}\n{match[2]}", text), "utf-8")
