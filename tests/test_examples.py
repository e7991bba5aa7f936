# SPDX-License-Identifier: Apache-2.0
"""Every script of examples/ runs as a user would run it, from another folder, and prints what it promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .processes import ROOT, run_python

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NO_EXAMPLE = "not an example by itself"

# Scripts that run as they are, offline: their arguments, and what their output has to match.
ALONE: dict[str, tuple[list[str], list[str]]] = {
    "custom_objective.py": ([], [r"step 0: loss [2-9]\.\d+, accuracy", r"step 19: loss 0\.[0-4]\d+, accuracy"]),
    "nano_smn.py": ([], [r"accuracy 0\.9\d+, density 0\.9\d+, file \d+ bytes", r"reloaded, logits identical: True"]),
    "plain_pytorch.py": (
        [],
        [r"accuracy (1\.0|0\.9\d)\d+, density 0\.9\d+, file \d+ bytes", r"reloaded, logits identical: True"],
    ),
    "quickstart.py": (
        ["--fast"],
        [
            r"Reloaded mask-adapt in a fresh process: 2000 logits identical to the bit\.",
            r"Reloaded mask-frozen in a fresh process: 2000 logits identical to the bit\.",
            r"Reloaded mask-swav in a fresh process: 51200 features identical to the bit\.",
            r"\| full fine-tuning +\|",
            r"\| SwAV, mask +\|",
            r"in a fresh process, gave outputs identical to the bit\.",
        ],
    ),
    "serve_load.py": (
        ["--seconds=2", "--clients=4"],
        [
            r"20 tasks, 4 clients, \d+ requests in .* requests/s, p50 .* ms, p99 .* ms, 0 errors",
            r"resident memory \d+ MiB at the start, \d+ half-way, \d+ at the end",
            r"Finished server process",
        ],
    ),
    "transformers_trainer.py": (
        [],
        [
            r"test accuracy on 5–9: (1\.0|0\.9\d)\d+, density 0\.9\d+",
            r"resumed from half-way, exported file identical: True",
            r"logits identical: True",
        ],
    ),
}
# Half a minute each, of a dozen runs that other tests make singly.
LONG = ("low_shot.py", "small_recipes.py")
# Scripts on real weights and images: a table of methods comes out.
ON_ASSETS = {
    "cascade.py": [r"clusters \(\d+, \d+, \d+\)", r"\| cascade, conditional +\|", r"\| dispatchers of 4 seeds +\|"],
    "low_shot.py": [r"\| frozen, linear probe +\|", r"\| mask without labels"],
    "real_resnet.py": [r"\| frozen, k-NN +\|", r"\| mask"],
    "real_vit_bytes.py": [
        r"\| full fine-tuning, Adam +\| +float32 \|",
        r"\| LoRA, rank 8 +\| +bfloat16 \|",
        r"\| mask.* \| +coded \| .* mask \d+ / head 7,720 / statistics 0 \|",
    ],
    "real_vit.py": [r"\| frozen, k-NN +\|", r"\| mask"],
    "small_recipes.py": [r"backbone vit, .* after 0\.\d+", r"backbone resnet, .* after 0\.\d+"],
}


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def run(name: str, arguments: list[str], folder: Path) -> str:
    """Output of an example, run from a folder of its own without a network."""
    done = run_python(ROOT / "examples" / name, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.iterdir()) == [], "an example leaves nothing behind in the folder that it is run from"
    return done.stdout


@pytest.mark.parametrize("name", ALONE)
def test_example_runs(name, tmp_path):
    arguments, promised = ALONE[name]
    output = run(name, arguments, tmp_path)
    assert [pattern for pattern in promised if not re.search(pattern, output)] == [], output


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in ON_ASSETS]
)
def test_example_on_real_weights_runs(name, tmp_path, assets):
    output = run(name, ["--smoke"], tmp_path)
    assert [pattern for pattern in ON_ASSETS[name] if not re.search(pattern, output)] == [], output


def test_a_server_of_real_tasks_is_loaded(tmp_path, assets):
    few = ["--real", "--tasks=6", "--masks=2", "--steps=12", "--seconds=2", "--clients=2"]
    output = run("serve_load.py", few, tmp_path)
    promised = [r"2 real masks of density 0\.9\d+ to 0\.9\d+ and 4 perturbed", r"6 tasks, 2 clients, .* 0 errors"]
    assert [pattern for pattern in promised if not re.search(pattern, output)] == [], output


def test_every_example_is_run_by_a_test():
    examples = [path.name for path in EXAMPLES if NO_EXAMPLE not in docstring(path)]
    assert examples == sorted([*ALONE, *ON_ASSETS])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_what_it_does_not_reproduce(path):
    text = docstring(path)
    if NO_EXAMPLE not in text:
        assert "paper" in text


def test_plain_pytorch_fits_on_a_page_and_needs_nothing_of_the_other_examples():
    path = ROOT / "examples/plain_pytorch.py"
    names = {node.module for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)}
    assert len(path.read_text("utf-8").splitlines()) <= 60
    assert not names & {other.stem for other in EXAMPLES}


def test_custom_objective_fits_on_a_page_and_the_objective_in_twenty_lines():
    lines = (ROOT / "examples/custom_objective.py").read_text("utf-8").splitlines()
    assert len(lines) <= 60
    start = lines.index('@register_objective("info_nce")')
    end = next(i for i, line in enumerate(lines) if line.startswith('if __name__ == "__main__"'))
    assert sum(bool(line.strip()) for line in lines[start:end]) <= 20
