# SPDX-License-Identifier: Apache-2.0
"""What a record says, whoever wrote it, stays text on a card: no code, no link, no HTML, no metadata of its own."""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from smn_peft.hub import plan_push, render_card
from smn_peft.hub.card import collection_card, loading_code
from smn_peft.hub.facts import (
    as_code,
    as_span,
    as_text,
    base_code,
    facts_of_folder,
    hub_id,
)
from tests.hub.folders import code_of, write_run

ATTACKS = [
    'a/b"); import os; os.system("x") #',
    "a/b')\nimport os\nos.system('x') #",
    "a/b\n```\n\n# Owned\n\n```python\nimport os",
    "ViTModel\nimport os; os.system('x')\nfrom transformers import ViTModel",
    "ViTModel; __import__('os').system('x')",
    "x --- \nlicense: owned\n---\n",
    "<script>alert(1)</script>",
    "![x](https://evil.example/track.png) [click](https://evil.example)",
    "a | b\n| --- |\n| c |",
    "<!-- smn:end --> <!-- smn:tasks:end -->",
    "`; rm -rf /`",
    "a\\` <b>x</b>",
    "\u2028import os\u2028",
    "a/b\n",
]
ALLOWED = {
    "load_backbone",
    "load_classifier",
    "load_from_file",
    "create_model",
    "manual_seed",
    "from_pretrained",
    "eval",
}


def check_code(code: str) -> None:
    """It is Python that calls what a card's code calls, and imports what that imports."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "?")
            assert called in ALLOWED, code
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {str(module).partition(".")[0] for module in modules} <= {
                "smn_peft",
                "peft",
                "timm",
                "torch",
                "transformers",
            }, code


def check_card(text: str) -> None:
    body = ModelCard(text).text
    assert body.count("```") == 2
    check_code(code_of(body))
    assert body.count("<!-- smn:end -->") == body.count("<!-- smn:begin") == 1
    assert "<script" not in body
    assert "<b>" not in body
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)\]\((?!https://huggingface\.co/|https://arxiv\.org/)", prose)
    assert not re.search(r"^# Owned|^license: owned|^\| c \|", text, re.MULTILINE)
    assert ModelCard(text).data.get("license") is None


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder as a run leaves it."""
    folder = tmp_path_factory.mktemp("written") / "out"
    write_run(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_of_a_config(folder, attack):
    (folder / "run.json").unlink()
    path = folder / "adapter_config.json"
    plain = json.loads(path.read_text()) | {"base_model_name_or_path": "a/b"}
    for library in ("transformers.models.vit", "timm.models.vit", "smn_peft.backbones.classifier"):
        for field in ("base_model_name_or_path", "base_model_class", "revision"):
            config = {**plain, "auto_mapping": {"base_model_class": "ViTModel", "parent_library": library}}
            (config["auto_mapping"] if field == "base_model_class" else config)[field] = attack
            path.write_text(json.dumps(config))
            check_card(str(render_card(facts_of_folder(folder), "user/x")))


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_of_a_run(folder, attack):
    plain = (folder / "run.json").read_text()
    for field in ("backbone", "backbone_revision", "weights", "dataset", "dataset_revision", "objective"):
        (folder / "run.json").write_text(plain)
        write_argument(folder, field, attack)
        facts = facts_of_folder(folder)
        check_card(str(render_card(facts, "user/x", tags=["t"])))
        rows = collection_card(None, "user/many", {"a": facts}, None)
        assert len([line for line in rows.splitlines() if line.startswith("| [a](a)")]) == 1
        rows = ModelCard(rows).text
        assert rows.count("<!-- smn:tasks:end -->") == 1
        check_code(code_of(rows))
    assert ModelCard(plan_push(folder, "user/x").card()).data.get("license") is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_deeper_parts_of_a_run(folder, attack):
    path = folder / "run.json"
    run = json.loads(path.read_text())
    run["versions"] = {attack: attack}
    run["arguments"]["objective_options"] = {attack: attack, "b": [attack] * 9}
    run["arguments"]["epochs"] = attack
    path.write_text(json.dumps(run))
    check_card(str(render_card(facts_of_folder(folder), "user/x")))


def test_numbers_that_are_none(folder):
    attack = "10); import os; os.system('x') #"
    plain = (folder / "run.json").read_text()
    for field in ("head_classes", "seed", "image_size", "pretrained"):
        (folder / "run.json").write_text(plain)
        write_argument(folder, field, attack)
        with pytest.raises(ValueError, match=rf"run\.json: {field} is .10\); import os"):
            facts_of_folder(folder)
        arguments = {"backbone": "a/b", "pretrained": False, field: attack}  # whoever calls it without that check
        check_code(loading_code(base_code(folder, {}, arguments), "user/x"))


def write_argument(folder: Path, field: str, value: Any) -> None:
    run = json.loads((folder / "run.json").read_text())
    run["arguments"][field] = value
    (folder / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_three_ways_to_write_a_value(attack):
    assert ast.literal_eval(as_code(attack)) == attack
    assert ast.literal_eval(as_code({"a": [attack, 1.5, None, True]})) == {"a": [attack, 1.5, None, True]}
    for written in (as_text(attack), as_span(attack)[1:-1]):
        assert "\n" not in written
        assert "<" not in written
        assert "`" not in written.replace("\\`", "")
    assert hub_id(attack) is None


def test_plain_names_read_as_before(folder):
    facts = replace(facts_of_folder(folder), dataset_revision="main_2")
    text = str(render_card(facts, "user/x"))
    assert "`main_2`" in text
    assert as_text("vit_tiny_patch16_224.augreg (k = 200)") == "vit_tiny_patch16_224.augreg (k = 200)"
