# SPDX-License-Identifier: Apache-2.0
"""Every table and figure at every scale: its runs are valid, and its numbers those that the paper prints."""

from __future__ import annotations

import pytest

from smn_peft.paper import ARTEFACTS, SCALES, artefact_named, listing, needed_runs, scale_named
from smn_peft.paper.runs import METRICS


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_run_is_valid_and_every_cell_once(name, scale):
    cells = ARTEFACTS[name].cells(SCALES[scale])
    places = [(cell.section, cell.row, cell.column) for cell in cells]
    assert len(set(places)) == len(places) > 0
    metrics = {cell.metric.removeprefix("frozen_").partition("@")[0] for cell in cells}
    cascades = {"cascade_knn", "cascade_linear_probe", "cascade_bytes"}
    assert metrics <= {*METRICS}
    runs = needed_runs(ARTEFACTS[name], SCALES[scale], [0, 1])
    assert {cell.run.seeded(0).id for cell in cells} <= {run.id for run in runs}


def test_runs_are_shared():
    small = SCALES["small"]
    runs = {name: {run.id for run in needed_runs(ARTEFACTS[name], small, [0])} for name in ARTEFACTS}
    assert runs["figure6"] < runs["table8"] < runs["table1"]
    assert len(runs["table9"] - runs["table2"]) == 1  # the progressive one
    assert runs["table10"] < runs["table2"]
    assert len(runs["figure8"] & runs["figure9"]) == 3
    assert runs["figure10"] == runs["figure11"] == runs["table3"]


def test_the_papers_numbers():
    assert ARTEFACTS["table1"].paper["ViT-B/32, CLIP"]["mask"]["cifar10"] == 0.971
    assert ARTEFACTS["table2"].paper["k-NN"]["topk 50 %"]["flowers102"] == 0.403
    assert ARTEFACTS["table8"].paper[""]["ResNet-18, supervised"]["inatloc500"] == 0.512
    assert ARTEFACTS["table10"].paper[""]["ucf101"]["std"] == 0.007


def test_names():
    text = listing([SCALES["small"]])
    assert all(f"| {name} " in text for name in ARTEFACTS)
    with pytest.raises(ValueError, match=r"There is no table or figure 'tabel2'; .* Did you mean table2\?"):
        artefact_named("tabel2")
    with pytest.raises(ValueError, match="There is no scale 'huge'; there are small, paper"):
        scale_named("huge")
