# SPDX-License-Identifier: Apache-2.0
"""Tables are what the committed records render to, not what somebody typed; the records keep promises."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from .processes import ROOT
from .scripts import import_example, run_example

CARDS = ROOT / "model_cards"
CONTROL, FULL, MASK, PAPER, SWAV_CONTROL, SWAV = range(6)


@pytest.fixture(scope="module")
def results():
    return import_example("results")


@pytest.fixture(scope="module")
def blocks(results):
    return results.blocks()


def test_the_pages_are_rendered_from_the_records(results, blocks):
    for page in results.PAGES:
        text = page.read_text("utf-8")
        assert results.fill(text, blocks) == text, (
            f"{page.name} is not what the records say: python examples/results.py"
        )
    shown = "".join(page.read_text("utf-8") for page in results.PAGES)
    assert [name for name in blocks if f"<!-- {name}:begin -->" not in shown] == []


def test_a_typed_number_is_found(results, blocks):
    text = results.PAGES[0].read_text("utf-8")
    record = results.load("paper/methods-small")
    number = results.accuracy(results.best(record, results.sections(record)[0])["mask"]["values"])
    assert number in text
    assert results.fill(text.replace(number, "99.9 ± 0.1"), blocks) == text


def test_readme_s_words_have_numbers_of_the_tables(results):
    page, readme = (path.read_text("utf-8") for path in results.PAGES)
    numbers = re.findall(r"\d+\.\d ± \d+\.\d", readme)
    assert numbers
    assert [number for number in numbers if number not in page] == []


def test_only_what_is_between_known_markers_is_rendered(results):
    text = "before\n<!-- a:begin -->\nold\n\nold\n<!-- a:end -->\nafter\n"
    assert results.fill(text, {"a": "new"}) == "before\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n"
    with pytest.raises(ValueError, match="There is no block 'a': blocks are b"):
        results.fill(text, {"b": "new"})
    with pytest.raises(ValueError, match="must stand once; it stands 0 times"):
        results.fill("<!-- a:begin -->\n", {"a": "new"})


def test_a_record_of_too_few_seeds_is_not_taken(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    for name, seeds in (("table1", [0]), ("figure9", [0, 1]), ("table3", [0, 1, 2]), ("table7", [0]), ("table5", [0])):
        (tmp_path / f"{name}-small.json").write_text(json.dumps({"seeds": seeds}), "utf-8")
    for name in ("table3", "figure9"):
        Image.new("RGBA", (60, 40), "red").save(tmp_path / f"{name}-small.png")
    results.take(tmp_path)
    taken = sorted(path.name for path in (tmp_path / "records/paper").iterdir())
    # The first two judge claims, and the last two none.
    assert taken == ["table3-small.json", "table3-small.png", "table5-small.json", "table7-small.json"]
    with Image.open(tmp_path / "records/paper/table3-small.png") as picture:
        assert (picture.size, picture.convert("RGB").getpixel((5, 5))) == ((60, 40), (255, 0, 0))


def test_the_cards_are_those_of_the_chosen_masks(results):
    chosen = []
    for name in ("methods", "unlabelled"):
        record = results.load(f"paper/{name}-small")
        chosen += [results.best(record, section)["mask"]["values"][0] for section in results.sections(record)]
    shown = []
    for path in CARDS.iterdir():
        card, metric = ModelCard.load(path), "k-NN" if path.stem.endswith("unlabelled") else "accuracy"
        assert card.data.library_name == "peft"
        assert "import smn_peft" in card.text
        assert not re.search("/tmp|/home", card.content)
        shown += [each.metric_value for each in card.data.eval_results if each.metric_name.startswith(metric)]
    assert sorted(shown) == sorted(round(100 * value, 2) for value in chosen)


def test_the_card_of_the_best_mask_is_taken(results, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "CARDS", tmp_path)
    (tmp_path / "runs/b").mkdir(parents=True)
    (tmp_path / "runs/b/README.md").write_text("loads b", "utf-8")
    place = {"section": "ViT, digits", "method": "mask"}
    finals = [{**place, "trial": trial, "values": [value]} for trial, value in (("lr=1", 0.4), ("lr=2", 0.5))]
    trials = [{**place, "trial": "lr=1", "final": "a"}, {**place, "trial": "lr=2", "final": "b"}]
    results.take_cards({"name": "methods", "details": {"finals": finals, "trials": trials}}, tmp_path / "runs")
    assert [path.name for path in tmp_path.glob("*.md")] == ["vit-digits-labels.md"]
    assert (tmp_path / "vit-digits-labels.md").read_text("utf-8") == "loads smn-vit-digits-labels"


def keeps_its_promises(record: dict) -> None:
    rows, frozen = record["rows"], record["frozen"]
    means = [statistics.mean(row.get("accuracy") or row["knn"]) for row in rows]
    for mask, gap in ((MASK, 0.02), (PAPER, 0.01)):
        assert means[mask] >= means[FULL] - gap
        assert means[mask] >= frozen["knn"] + 0.1
        assert means[mask] > max(frozen["probe"], means[CONTROL]), "a new head and new statistics do as well"
    assert means[SWAV] >= frozen["knn"] + 0.05, "SwAV teaches the features nothing"
    assert means[SWAV] >= means[SWAV_CONTROL] + 0.05, "new statistics do as well"
    assert statistics.mean(rows[SWAV]["probe"]) >= frozen["probe"] - 0.01
    assert record["reload_identical"] is True
    assert [len(row["cpu_seconds"]) for row in rows] == [3] * 6
    assert record["cpu_seconds"] < 240
    size = rows[PAPER]["bytes"]
    assert size["statistics"] > rows[MASK]["bytes"]["statistics"] == 0
    assert size["mask"] + size["head"] + size["statistics"] <= size["total"]
    assert rows[SWAV]["bytes"]["head"] == 0
    assert size["total"] < rows[FULL]["bytes"]["total"] / 20


def test_the_quickstart_s_record_keeps_the_promises(results):
    keeps_its_promises(results.load("quickstart"))


@pytest.mark.slow
def test_a_whole_quickstart_keeps_the_promises(tmp_path):
    (tmp_path / "run").mkdir()
    run_example("quickstart.py", "--json", tmp_path / "record.json", folder=tmp_path / "run")
    keeps_its_promises(json.loads((tmp_path / "record.json").read_text("utf-8")))


def test_a_failed_reload_is_said_loudly(results):
    render, record = import_example("quickstart").render, results.load("quickstart")
    assert "identical to the bit" in render(record)
    failed = render({**record, "reload_identical": False})
    assert "identical to the bit" not in failed
    assert "DID NOT GIVE THE SAME OUTPUTS" in failed
