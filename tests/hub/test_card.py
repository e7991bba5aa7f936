# SPDX-License-Identifier: Apache-2.0
"""The card says what the records say, the Hub's own parser reads it, and its code runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from smn_peft.evaluation import EvalReport
from smn_peft.hub import AdapterFacts, render_card, write_card
from smn_peft.hub.card import merged_with
from smn_peft.hub.facts import facts_of_folder
from smn_peft.storage.adapter_file import AdapterSizes, adapter_sizes
from tests.hub.folders import code_of, masked, write_run


@pytest.fixture
def facts(tmp_path) -> AdapterFacts:
    write_run(tmp_path / "0", 0, 0.70, lr=7.0)
    write_run(tmp_path / "1", 1, 0.80, lr=7.0)
    return facts_of_folder(tmp_path / "0", seeds=[tmp_path / "1"])


def test_front_matter(facts):
    data = ModelCard(str(render_card(facts, "user/x", license="mit", tags=["toy"]))).data
    base = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert (data.base_model, data.base_model_relation, data.library_name) == (base, "adapter", "peft")
    assert data.tags == ["smn", "mask", f"base_model:adapter:{base}", "toy"]
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.license == "mit"
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_value) == ("uoft-cs/cifar10", "test", 75.0)
    assert result.metric_name == "k-NN accuracy (k = 200)"
    assert result.metric_args == {"seeds": 2, "standard_deviation": 7.07}


def test_what_a_reader_finds(facts):
    text = render_card(facts, "user/x", subfolder="one").text
    for words in (
        f"{100 * facts.density:.2f} % of the masked weights stay on",
        "https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "https://huggingface.co/datasets/uoft-cs/cifar10",
        "Mean and standard deviation over 2 seeds.",
        "50.0",  # the frozen base
        "75.0 ± 7.1",
        "k-NN accuracy (k = 200) %",
        "| `lr` ",
        "named no licence",
        "## Limits",
        "another base is refused",
        'subfolder="one"',
    ):
        assert words in text
    sizes = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if " % |" in line}
    assert sizes["mask"] == f"{facts.sizes.mask:,}" == "384"
    assert sizes["full fine-tuning, all weights"] == f"{4 * (32 * 64 + 64 + 64 * 16 + 16):,}"
    parts = [int(sizes[name].replace(",", "")) for name in ("mask", "header")]
    assert sum(parts) == int(sizes["the file"].replace(",", "")) == facts.sizes.total


def test_what_is_not_known_is_not_said():
    bare = AdapterFacts("A mask", AdapterSizes(10, 0, 0, 0, 20), code="\nbase = ...")
    card = render_card(bare, "user/x")
    assert "base_model" not in card.data.to_dict()
    for words in ("None", "of full", "stay on;", "How it was learned"):
        assert words not in card.text
    assert "No evaluation was recorded." in card.text
    one = replace(bare, reports=[EvalReport("this adapter", "own", "test", "accuracy", (0.5,))])
    assert "One run; no spread is known." in render_card(one, "user/x").text
    assert render_card(one, "user/x").data.pipeline_tag == "image-classification"


def test_peft_s_template_is_replaced_and_own_words_stay(facts, tmp_path):
    card = render_card(facts, "user/x")
    masked().save_pretrained(tmp_path / "peft")
    template = (tmp_path / "peft" / "README.md").read_text()
    assert "[More Information Needed]" in template
    assert merged_with(card, template) == merged_with(card, None) == str(card)
    assert merged_with(card, str(card)) == str(card)
    assert merged_with(card, f"{card}\n### Framework versions\n\n- PEFT 0.21.2") == str(card)
    own = str(ModelCard(f"---\n{ModelCardData(license='mit').to_yaml()}\n---\n# Mine\n\nWords.\n"))
    first = merged_with(card, own)
    assert first.index("Words.") < first.index("<!-- smn:begin")
    assert ModelCard(first).data.license == "mit"
    other = render_card(replace(facts, density=0.125), "user/x")
    second = merged_with(other, first.replace("<!-- smn:end -->", "<!-- smn:end -->\nAfter."))
    assert second.count("Words.") == second.count("After.") == second.count("<!-- smn:begin") == 1
    assert "12.50 % of the masked weights" in second


def test_a_broken_front_matter_is_named(facts):
    for front in ("a: [", "- 1"):
        with pytest.raises(ValueError, match=r"at the top of README\.md are no metadata"):
            merged_with(render_card(facts, "user/x"), f"---\n{front}\n---\nWords.")


def test_a_folder_gets_its_card_and_results(tmp_path):
    write_run(tmp_path / "out")
    for _ in range(2):
        write_card(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "out")' in code_of(text)
    assert f"{adapter_sizes(tmp_path / 'out').total:,} bytes" in text
    assert (tmp_path / "out" / ".eval_results" / "cifar10-knn.yaml").is_file()
