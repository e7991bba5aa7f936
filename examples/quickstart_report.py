# SPDX-License-Identifier: Apache-2.0
"""The quickstart's table and summary, rendered from its record, on the terminal and in README.md.

Used by `quickstart.py`; not an example by itself.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import markdown_table

RECORD = Path(__file__).with_name("quickstart.json")
README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = re.compile(r"(<!-- quickstart:begin -->\n).*(<!-- quickstart:end -->)", re.DOTALL)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _kilobytes(size: int | None) -> str:
    return f"{size / 1000:,.1f}" if size else "–"


def _cells(row: Mapping[str, Any], checkpoint: int) -> dict[str, str]:
    accuracy, size = row["accuracy"], row["bytes"]
    spread = f" ± {100 * statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
    return {
        "method": row["method"],
        "accuracy %": f"{100 * statistics.mean(accuracy):.1f}{spread}",
        "trained": f"{row['trained']:,}",
        "density": _percent(statistics.mean(row["density"])) if row.get("density") else "–",
        "mask kB": _kilobytes(size.get("mask")),
        "head kB": _kilobytes(size.get("head")),
        "statistics kB": _kilobytes(size.get("statistics")),
        "file kB": _kilobytes(size["total"]),
        "of full": _percent(size["total"] / checkpoint) if size["total"] else "–",
    }


def _words(record: Mapping[str, Any]) -> list[str]:
    rows = record["rows"]
    knn, probe, control, full, mask, paper = (_percent(statistics.mean(row["accuracy"])) for row in rows)
    kept, kept_too = (_percent(statistics.mean(row["density"])) for row in rows[4:6])
    images, seeds = record["images"], len(rows[4]["accuracy"])
    spread = f", mean and standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    same = "gave logits identical to the bit" if record["reload_identical"] else "DID NOT GIVE THE SAME LOGITS"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        f"A narrow ResNet-18, trained on the handwritten digits 0–4 until it tells {_percent(record['old_accuracy'])} "
        f"of them right, is adapted to the digits 5–9 with {images['train']} images and tested on {images['test']} "
        f"others: {record['epochs']} epochs{spread}.",
        f"What it learned of the old digits is not enough for the new ones: k-NN on its features gets {knn} right "
        f"({_percent(record['knn_20_accuracy'])} with k = 20), a linear probe {probe}. A mask with the defaults "
        f"brings that to {mask}: it keeps {kept} of the weights, unchanged up to one factor per layer, and switches "
        f"the others off. Fine-tuning every weight gives {full}.",
        "The defaults keep the base's BatchNorm statistics; here their scores learn by Adam. The paper's recipe, SGD "
        "at a large learning rate and statistics re-estimated, which then belong to the adapter, keeps "
        f"{kept_too} of the weights and gives {paper}. New statistics and a new head without a mask give {control}.",
        f"The default mask's file has {_kilobytes(rows[4]['bytes']['total'])} kB, header included, a full fp32 "
        f"checkpoint {_kilobytes(rows[3]['bytes']['total'])} kB. Base and masks, loaded from their files in a fresh "
        f"process, {same}.",
        f"Measured in {record['seconds']:.0f} s on one CPU core, with {versions}.",
    ]


def render(record: Mapping[str, Any]) -> str:
    """Table and summary of a record of `quickstart.py`, as Markdown."""
    checkpoint = record["rows"][3]["bytes"]["total"]
    table = markdown_table([_cells(row, checkpoint) for row in record["rows"]])
    return "\n\n".join((table, *_words(record)))


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
