# SPDX-License-Identifier: Apache-2.0
"""The table of a repository of many tasks grows row by row, and what stands around it stays."""

from __future__ import annotations

from huggingface_hub import ModelCard

from smn_peft.evaluation import EvalReport
from smn_peft.hub import AdapterFacts
from smn_peft.hub.card import collection_card
from smn_peft.storage.adapter_file import AdapterSizes


def facts(dataset: str, value: float, base: str | None = "timm/vit") -> AdapterFacts:
    report = EvalReport("this adapter", dataset, "test", "knn", (value,), settings={"k": 5})
    sizes = AdapterSizes(1000, 0, 0, 0, 1234)
    return AdapterFacts(
        "t", sizes, base or "", base, dataset=dataset, density=0.5, reports=[report], code="\nbase = 0"
    )


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| [")]


def test_rows_come_and_change():
    first = collection_card(None, "user/many", {"b": facts("cifar10", 0.5)}, None)
    assert 'from_pretrained(base, "user/many", subfolder="b")' in first
    second = collection_card(first, "user/many", {"a|x": facts("pets", 0.25, None)}, first)
    third = collection_card(second, "user/many", {"b": facts("cifar10", 0.75)}, second)
    assert [row.split()[1] for row in rows(third)] == ["[a\\|x](a\\|x)", "[b](b)"]
    assert "k-NN accuracy (k = 5) 75.0 %" in rows(third)[1]
    assert "50.0 %" not in third
    assert "1,234" in rows(third)[1]
    data = ModelCard(third).data
    assert (data.base_model, data.datasets) == (["timm/vit"], ["uoft-cs/cifar10", "timm/oxford-iiit-pet"])
    assert collection_card(third, "user/many", {"b": facts("cifar10", 0.75)}, third) == third


def test_a_card_of_somebody_s_own_gets_a_table_and_keeps_the_rest():
    own = "---\nlicense: mit\n---\n# Mine\n\n| task | other |\n| --- | --- |\n| a | b |\n"
    card = collection_card(own, "user/many", {"a": facts("cifar10", 0.5)}, own)
    assert "| a | b |" in card
    assert ModelCard(card).data.license == "mit"
    assert len(rows(card)) == 1


def test_without_tasks_there_is_no_table():
    assert collection_card("# One\n", "user/one", {}, None) == "# One\n"
