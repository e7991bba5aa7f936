# SPDX-License-Identifier: Apache-2.0
"""Other people's architectures under a mask: never a wrong answer in silence, never an error without the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from smn_peft.backbones import load_backbone
from tests.zoo.checks import CHECKS, Trial, attempt, differs, is_bad, reload_all, try_model
from tests.zoo.models import BY_NAME, FEW, ZOO, Entry
from tests.zoo.table import DOCUMENT, render

_FOUND: dict[str, dict[str, str]] = {}


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums are the same to the bit in the fresh process only if they are split alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def bad(verdicts: dict[str, str]) -> dict[str, str]:
    return {check: verdict for check, verdict in verdicts.items() if is_bad(verdict)}


def test_a_few_on_every_commit(tmp_path):
    folders = {name: tmp_path / str(number) for number, name in enumerate(FEW)}
    found = {name: try_model(BY_NAME[name], folders[name]) for name in FEW}
    for name, verdict in reload_all(folders).items():
        found[name]["reload"] = verdict
    assert {name: bad(verdicts) for name, verdicts in found.items() if bad(verdicts)} == {}
    assert all(list(verdicts) == list(CHECKS) for verdicts in found.values())
    assert all(found[name][check] == "ok" for name in FEW for check in CHECKS if "mixed" not in check)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_the_zoo(entry, folder):
    _FOUND[entry.name] = try_model(entry, folder / entry.name.replace(" ", "-"))
    assert bad(_FOUND[entry.name]) == {}


@pytest.mark.slow
def test_the_zoo_in_a_fresh_process_and_the_table_of_it(folder):
    saved = {name: folder / name.replace(" ", "-") for name, found in _FOUND.items() if found["reload"] == "ok"}
    for name, verdict in reload_all(saved).items():
        _FOUND[name]["reload"] = verdict
    assert {name: found["reload"] for name, found in _FOUND.items() if is_bad(found["reload"])} == {}
    if len(_FOUND) == len(ZOO):  # not where a part was chosen
        assert DOCUMENT.read_text("utf-8") == render(_FOUND), "write it anew: python -m tests.zoo.table"


def test_it_is_wide():
    assert len({entry.family for entry in ZOO if entry.library == "timm"}) >= 60
    assert len({entry.name for entry in ZOO if entry.library == "transformers"}) >= 25
    assert len(BY_NAME) == len(ZOO)


class Broken(nn.Module):
    """Counts its calls into its output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.two(self.one(x.flatten(1))) * (1.5 if self.calls > 2 else 1.0)


def test_a_wrong_answer_would_be_found(tmp_path):
    trial = Trial(Entry("none", "none", "broken", 2, Broken), tmp_path)
    assert attempt(trial.wrap) == "ok"
    assert attempt(trial.forward) == "ok"
    trial.model.get_base_model().calls = 9
    assert attempt(trial.forward).startswith("wrong: off by")
    weight = trial.model.get_base_model().one.base_layer.weight
    weight.data[0, 0] += 1
    assert "unmerged, the base differs: one.weight" in attempt(trial.merge)


def test_what_counts_as_a_refusal():
    def raised(text: str, kind: type[Exception] = ValueError) -> str:
        return attempt(lambda: (_ for _ in ()).throw(kind(text)))

    assert raised("a sentence that is long enough but was raised by nobody of us").startswith("crash: ValueError")
    assert raised("x", KeyError).startswith("crash: KeyError")
    assert attempt(lambda: load_backbone("no such model")).startswith("refused: Unknown backbone")
    assert differs(torch.ones(2), torch.ones(3)) == "shape (2,), not (3,)"
    assert differs(torch.ones(2), torch.ones(2) + 1e-6) is None
