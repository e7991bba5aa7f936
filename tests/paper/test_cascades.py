# SPDX-License-Identifier: Apache-2.0
"""Table 3 and Figures 10 and 11 on one tiny cascade, through the real path."""

from __future__ import annotations

import pytest

from smn_peft.paper import ARTEFACTS, reproduce
from tests.training.tiny import base_of

cascade = pytest.importorskip("smn_peft.cascade")


def test_a_cascade_serves_its_table_and_figures(tiny_scale, tiny_folder, store):
    said: list[str] = []
    made = [
        reproduce(ARTEFACTS[name], tiny_scale, seeds=1, output=store.folder, say=said.append)
        for name in ("table3", "figure10", "figure11")
    ]
    assert len(said) == 1
    table, embeddings, clusters = (result.record for result in made)
    values = {(cell["section"], cell["row"]): cell["values"][0] for cell in table["cells"]}
    folder = store.folder / "runs" / table["cells"][0]["runs"][0]
    found = cascade.evaluate_cascade(folder, backbone=base_of(tiny_folder))
    reports = {(report.metric, report.label): report.value for report in found}
    for row in ("dispatcher", "dispatcher, whitened", "cascade, conditional", "cascade, unconditional"):
        assert values["k-NN", row] == reports["knn", row]
        assert values["Linear probe", row] == reports["linear_probe", row]
    assert 0 < values["Storage", "masks"] < values["Storage", "all files"]
    assert not list(folder.rglob("checkpoint-*"))
    assert [len(one["points"]) for one in embeddings["details"]] == [24, 24, 24]
    assert embeddings["details"][0]["points"] != embeddings["details"][2]["points"]
    assert sum(row["images"] for row in clusters["details"]) == 48
    assert all(row["cumulative"][-1] == pytest.approx(1.0) for row in clusters["details"])
    assert [path.suffix for result in made[1:] for path in result.files].count(".png") == 2
