# SPDX-License-Identifier: Apache-2.0
"""Evaluation reports: what they refuse, that JSON gives them back, how they merge and what their table shows."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import torch

from smn_peft.evaluation import EvalReport, library_versions, merge_reports, report_table


def report(**changed: Any) -> EvalReport:
    fields = {
        "label": "mask",
        "dataset": "cifar10",
        "split": "test",
        "metric": "knn_accuracy",
        "values": (0.9, 0.92, 0.94),
        "seeds": (0, 1, 2),
        "revision": "abc123",
        "settings": {"k": 200, "temperature": 0.1, "sizes": (1, 2)},
    }
    return EvalReport(**{**fields, **changed})


def test_value_and_spread_are_mean_and_standard_deviation():
    found = report()
    assert found.value == pytest.approx(0.92)
    assert found.spread == pytest.approx(statistics.stdev([0.9, 0.92, 0.94]))
    assert str(found) == "mask: knn_accuracy on cifar10 (test) 92.0 ± 2.0 % over 3 seeds"
    single = report(values=[0.5], seeds=())
    assert (single.value, single.spread) == (0.5, None)
    assert str(single) == "mask: knn_accuracy on cifar10 (test) 50.0 %"


def test_versions_are_those_installed():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "peft", "scikit-learn"} <= set(versions)
    assert report().versions == versions


def test_json_gives_back_the_same_report():
    for original in (report(), report(values=(1,), seeds=(), revision=None, label="Δ | é")):
        assert EvalReport.from_json(original.to_json()) == original
    stated = json.loads(report().to_json())
    assert stated["value"] == report().value
    assert stated["spread"] == report().spread
    assert report().settings["sizes"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(value=0.99), r"says value 0\.99, but its values give 0\.9[12]"),
        (lambda d: d.update(value=True), r"says value True"),
        (lambda d: d.update(spread=None), r"says spread None, but its values give 0\.0"),
        (lambda d: d.update(format=2), r"no evaluation report of format 1"),
        (lambda d: d.pop("format"), r"no evaluation report of format 1"),
        (lambda d: d.pop("split"), r"The evaluation report lacks split: write it anew"),
        (lambda d: d.pop("spread"), r"The evaluation report lacks spread"),
        (lambda d: d.update(colour="red", age=3), r"The evaluation report: unknown option 'colour'"),
        (
            lambda d: d.update(values=[0.9, 0.92, "0.94"]),
            r"values must be list of float; got \[0\.9, ",
        ),
        (lambda d: d.update(values="many"), r"values must be list of float; got 'many'"),
        (lambda d: d.update(seeds=[0, 1, True]), r"seeds must be list of int; got \[0, 1, True\]"),
        (lambda d: d.update(seeds=[0, 1, [2]]), r"seeds must be list of int"),
        (lambda d: d.update(settings=[1]), r"settings must be .*; got \[1\]"),
        (lambda d: d.update(versions={"torch": 2}), r"versions must be .*; got"),
    ],
)
def test_a_report_changed_by_hand_is_refused(change, message):
    found = json.loads(report().to_json())
    change(found)
    with pytest.raises(ValueError, match=message):
        EvalReport.from_json(json.dumps(found))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", b"\xff\xfe\x00"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match=r"This is no (JSON|evaluation report)"):
        EvalReport.from_json(text)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": ""}, r"label must not be empty"),
        ({"dataset": None}, r"dataset must be str; got None"),
        ({"revision": 3}, r"revision must be str or none; got 3"),
        ({"values": (92.1, 0.1, 0.1)}, r"fractions from 0 to 1, got 92\.1: 92 % is 0\.92"),
        ({"values": (float("nan"),) * 3}, r"fractions from 0 to 1, got nan"),
        ({"values": (0.1, 0.2)}, r"values has 2 entries for 3 seeds: give one per seed"),
        ({"values": (0.1, 0.2), "seeds": ()}, r"values has 2 entries for 0 seeds: .* one value and no seeds"),
        ({"values": (), "seeds": ()}, r"values has 0 entries"),
        ({"seeds": (1, 1, 2)}, r"seeds must be integers, each once; got \[1, 1, 2\]"),
        ({"settings": {"x": torch.ones(1)}}, r"settings must hold what JSON can.*Tensor"),
        ({"settings": {"lr": float("inf")}}, r"settings must hold what JSON can: texts, finite numbers"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        report(**changed)


def test_dataset_split_and_revision_come_from_the_dataset(images):
    found = EvalReport.of(images(), label="mask", metric="accuracy", values=[0.5])
    assert (found.dataset, found.split, found.revision) == ("images", "test", "abc123")


def test_seeds_merge_in_their_order():
    runs = [report(values=[value], seeds=[seed]) for seed, value in ((2, 0.94), (0, 0.9), (1, 0.92))]
    assert merge_reports(runs) == report()
    assert merge_reports([report()]) == report()
    single = report(values=[0.5], seeds=())
    assert merge_reports([single]) == single


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], r"There are no reports to merge"),
        ([report(seeds=(3, 4, 5), settings={"k": 20})], r"these differ: settings \{'k': 200.*\} and \{'k': 20\}"),
        (
            [report(seeds=(3, 4, 5), split="train", revision=None)],
            r"split 'test' and 'train'; revision 'abc123' and None",
        ),
        ([report(seeds=(3, 4, 5), versions={})], r"these differ: versions"),
        ([report(seeds=(2, 3, 4))], r"A seed occurs twice among \[0, 1, 2, 2, 3, 4\]"),
        ([report(values=[0.5], seeds=())], r"A report without seeds does not merge"),
    ],
)
def test_what_is_not_the_same_run_does_not_merge(others, message):
    with pytest.raises(ValueError, match=message):
        merge_reports([report(), *others] if others else [])


def test_a_table_has_a_row_per_label_and_a_column_per_dataset():
    shown = [
        report(label="frozen", values=[0.832], seeds=()),
        report(),
        report(dataset="dtd", values=[0.674, 0.674, 0.674]),
    ]
    assert report_table(shown).splitlines() == [
        "| method |  cifar10 % |      dtd % |",
        "| ------ | ---------: | ---------: |",
        "| frozen |       83.2 |          – |",
        "| mask   | 92.0 ± 2.0 | 67.4 ± 0.0 |",
    ]


def test_a_table_names_what_differs():
    header = report_table([report(), report(metric="probe_accuracy")]).splitlines()[0]
    assert header == "| method | cifar10 knn_accuracy % | cifar10 probe_accuracy % |"
    header = report_table([report(), report(split="train")]).splitlines()[0]
    assert header == "| method | cifar10 test % | cifar10 train % |"
    with pytest.raises(ValueError, match=r"Two reports of 'mask' on cifar10: merge_reports, or label them apart"):
        report_table([report(), report(settings={})])
    with pytest.raises(ValueError, match="There are no reports to show"):
        report_table([])
