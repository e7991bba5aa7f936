# SPDX-License-Identifier: Apache-2.0
"""The cards of the masks that `make quickstart` trains.

Used by `model_cards.py`; not an example by itself.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import quickstart_methods
from model_cards_parts import report, shown

from smn_peft.hub import AdapterFacts
from smn_peft.storage import AdapterSizes

__all__ = ["quickstart"]

RECORD = Path(__file__).with_name("quickstart.json")


def quickstart(method: str) -> AdapterFacts:
    """A mask of `make quickstart`."""
    record = json.loads(RECORD.read_text("utf-8"))
    rows = {row["method"]: row for row in record["rows"]}
    row, full, chosen = rows[method], rows["full fine-tuning"], quickstart_methods.METHODS[method]
    dataset = "digits 5 to 9 of scikit-learn"
    frozen = {"knn": record["frozen"]["knn"], "linear_probe": record["frozen"]["probe"]}
    names = {"accuracy": "accuracy"} if chosen.labels else {"knn": "knn", "probe": "linear_probe"}
    reports = [report("this adapter", metric, row[key], dataset) for key, metric in names.items()]
    baselines = [report("frozen base", metric, [value], dataset) for metric, value in frozen.items()]
    if chosen.labels:
        baselines.append(report("full fine-tuning", "accuracy", full["accuracy"], dataset))
    options = {**chosen.settings, "epochs": row["epochs"], "batch_norm": chosen.batch_norm}
    return AdapterFacts(
        title="A narrow ResNet-18 masked for digits" + ("" if chosen.labels else " without labels"),
        sizes=AdapterSizes(**row["bytes"]),
        base="a narrow ResNet-18 trained on the digits 0 to 4",
        full_bytes=full["bytes"]["total"],
        density=statistics.mean(row["density"]),
        dataset=dataset,
        objective="cross_entropy" if chosen.labels else "swav",
        recipe=shown({**options, "images": record["images"]["train"], "seeds": len(row["density"])}),
        reports=reports,
        baselines=baselines,
        code="\nbase = ...  # the base that examples/quickstart.py trains",
        versions=record["versions"],
        notes=["A toy of 8 × 8 pixels, to show the method in minutes."],
    )
