# SPDX-License-Identifier: Apache-2.0
"""`model_cards/` is what the committed records render to, and the Hub's client reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import model_cards

    yield model_cards
    for path in (ROOT / "examples").glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


def test_the_cards_are_rendered_from_the_records(rendered):
    committed = {path.name: path.read_bytes() for path in CARDS.iterdir()}
    assert committed == {name: text.encode() for name, text in rendered.cards().items()}


def test_another_record_gives_another_card(rendered, monkeypatch, tmp_path):
    (tmp_path / "records").mkdir()
    for name in ("quickstart.json", *(f"records/{stem}.json" for stem in ("real_vit", "real_resnet", "swav_small"))):
        text = (ROOT / "examples" / name).read_text("utf-8")
        (tmp_path / name).write_text(text.replace('"bytes": 677072', '"bytes": 677073'), "utf-8")
    monkeypatch.setattr(rendered, "HERE", tmp_path)
    changed = {name for name, text in rendered.cards().items() if text != (CARDS / name).read_text("utf-8")}
    assert changed == {"vit-tiny-cifar10.md"}


@pytest.mark.parametrize("path", sorted(CARDS.iterdir()), ids=lambda path: path.stem)
def test_the_hub_s_client_reads_them(path):
    card = ModelCard.load(path)
    assert card.data.library_name == "peft"
    assert card.data.eval_results
    assert "import smn_peft" in card.text
    assert "/tmp" not in card.content


def test_a_number_of_the_record_is_on_the_card():
    record = json.loads((ROOT / "examples/records/swav_small.json").read_text("utf-8"))
    values = [row["after"] for row in record["rows"] if row["backbone"] == "vit"]
    card = ModelCard.load(CARDS / "vit-tiny-cifar10-swav.md")
    assert card.data.eval_results[0].metric_value == round(100 * sum(values) / 3, 2)
