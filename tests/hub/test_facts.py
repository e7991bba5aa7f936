# SPDX-License-Identifier: Apache-2.0
"""Facts are read from what a real run writes; folders that do not belong together are told apart."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from smn_peft.hub import push_run, render_card
from smn_peft.hub.facts import facts_of_folder
from smn_peft.training import run
from smn_peft.training.assemble import load_base
from smn_peft.training.saved import load_run
from tests.hub.folders import code_of, write_run
from tests.training.tiny import base_of, tiny_arguments


def test_a_real_run_has_a_card_whose_code_loads_it(hub, tmp_path, monkeypatch):
    summary = run(tiny_arguments(tmp_path, epochs=1, mask={"batch_norm": "adapt"}))
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / "out"
    facts = facts_of_folder(out)
    assert {report.metric: report.value for report in facts.reports} == summary.after
    assert [report.metric for report in facts.baselines] == ["knn"]
    assert facts.density == summary.density
    assert (facts.objective, facts.recipe["epochs"], facts.recipe["mask.batch_norm"]) == (
        "cross_entropy",
        "1",
        "adapt",
    )
    arguments, loaded = load_run(out, backbone=base_of(tmp_path))
    bare = load_base(arguments, 3).model.state_dict().values()
    assert facts.full_bytes == sum(tensor.numel() * tensor.element_size() for tensor in bare)
    assert str(tmp_path) not in (out / "README.md").read_text()
    push_run(out, "user/run")
    code = code_of(hub.tree("user/run")["README.md"].decode())
    assert "load_classifier(backbone, 3)" in code
    monkeypatch.chdir(tmp_path)  # where model.py lies
    names: dict = {}
    exec(code, names)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(names["model"](images), loaded.model.eval()(images))


def test_seeds_of_another_run_are_refused(tmp_path):
    for name, options in {"a": {}, "b": {"seed": 1, "lr": 3.0}, "c": {"seed": 0}}.items():
        write_run(tmp_path / name, **options)
    with pytest.raises(ValueError, match=r"b/run\.json is no other seed of the same run: lr differ"):
        facts_of_folder(tmp_path / "a", seeds=[tmp_path / "b"])
    with pytest.raises(ValueError, match=r"c/run\.json: A seed occurs twice"):
        facts_of_folder(tmp_path / "a", seeds=[tmp_path / "c"])
    with pytest.raises(FileNotFoundError, match="name the output folders of smn train"):
        facts_of_folder(tmp_path / "a", seeds=[tmp_path])


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_damaged_records_are_named(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged: .* Copy it again"):
        facts_of_folder(tmp_path)


def test_what_a_record_leaves_null_is_not_known(tmp_path):
    write_run(tmp_path)
    for name in ("arguments", "after", "before", "sizes", "versions"):
        record = json.loads((tmp_path / "run.json").read_text())
        (tmp_path / "run.json").write_text(json.dumps({**record, name: None}))
        assert "# A mask for vit" in render_card(facts_of_folder(tmp_path), "user/x").text


def test_limits_of_the_very_run(tmp_path):
    write_run(tmp_path, weights="/disk/own.safetensors", eval_limit=100, dataset="flowers102", objective="swav")
    text = render_card(facts_of_folder(tmp_path), "user/x").text
    assert "The base's weights came from a file (own.safetensors)" in text
    assert "Evaluated on 100 images of the split" in text
    assert "CoOp drew its own" in text
    assert "/disk" not in text
