# SPDX-License-Identifier: Apache-2.0
"""Every script of examples/ runs as a user would run it, from another folder, and prints what it promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .scripts import EXAMPLES, import_example, run_example

NO_EXAMPLE = "not an example by itself"

# Scripts that run as they are, offline, and what their output has to match.
ALONE: dict[str, tuple[list[str], list[str]]] = {
    "custom_objective.py": ([], [r"step 0: loss [2-9]\.\d+, accuracy", r"step 19: loss 0\.[0-4]\d+, accuracy"]),
    "embed.py": ([], [r"datasets: 12 embeddings of dim 64"]),
    "nano_smn.py": ([], [r"accuracy 0\.9\d+, density 0\.9\d+, file \d+ bytes", r"reloaded, logits identical: True"]),
    "plain_pytorch.py": (
        [],
        [r"accuracy (1\.0|0\.9\d)\d+, density 0\.9\d+, file \d+ bytes", r"reloaded, logits identical: True"],
    ),
    "serve_load.py": (
        ["--seconds=1", "--clients=4"],
        [
            r"10 tasks, 4 clients, \d+ requests in .* requests/s, p50 .* ms, p99 .* ms, 0 errors",
            r"resident memory \d+ MiB at the start, \d+ at the end",
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


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def missing(promised: list[str], output: str) -> list[str]:
    return [pattern for pattern in promised if not re.search(pattern, output)]


@pytest.mark.parametrize("name", ALONE)
def test_example_runs(name, tmp_path):
    arguments, promised = ALONE[name]
    output = run_example(name, *arguments, folder=tmp_path)
    assert missing(promised, output) == [], output


@pytest.mark.slow
def test_embeddings_by_ray_are_those_of_datasets(tmp_path):
    pytest.importorskip("ray.data", reason="the extra ray is not installed")
    output = run_example("embed.py", "--ray", folder=tmp_path)
    assert "Ray: the same up to rounding: True" in output, output


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A fast run of the quickstart: its output and the folder of what it saved."""
    outputs = tmp_path_factory.mktemp("quickstart") / "out"
    output = run_example("quickstart.py", "--fast", "--out", outputs, folder=tmp_path_factory.mktemp("elsewhere"))
    return output, outputs


def test_the_quickstart_runs(quickstart):
    promised = [
        r"Reloaded mask-adapt in a fresh process: 2000 logits identical to the bit\.",
        r"Reloaded mask-frozen in a fresh process: 2000 logits identical to the bit\.",
        r"Reloaded mask-swav in a fresh process: 51200 features identical to the bit\.",
        r"\| full fine-tuning +\|",
        r"\| SwAV, mask +\|",
        r"in a fresh process, gave outputs identical to the bit\.",
    ]
    assert missing(promised, quickstart[0]) == [], quickstart[0]


def test_the_quickstart_s_check_of_reloaded_masks_can_fail(quickstart, capsys, tmp_path):
    module, (_, folder) = import_example("quickstart"), quickstart
    saved = folder / "mask-swav/outputs.safetensors"
    right = saved.read_bytes()
    ((kind, outputs),) = load_file(saved).items()
    outputs[7, 1] = torch.nextafter(outputs[7, 1], torch.tensor(9.0))
    save_file({kind: outputs}, saved)
    try:
        assert not module.verify(folder)
        assert "51200 features NOT identical" in capsys.readouterr().out
    finally:
        saved.write_bytes(right)
    assert not module.verify(tmp_path), "verifying nothing is no success"


def test_the_quickstart_s_control_has_all_but_the_mask(quickstart):
    module, (_, folder) = import_example("quickstart"), quickstart
    train = module.digits(module.NEW)[0].subset(range(128))
    before = module.load(folder / "base", head=False).state_dict()
    model = module.adapt(module.METHODS["SwAV, statistics adapt"], folder, train, epochs=1, seed=0)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("running_" in name or name.endswith("num_batches_tracked") for name in moved)


def test_the_quickstart_s_digits_are_split_without_overlap():
    module = import_example("quickstart")
    train, test = module.digits(range(5, 10))
    assert (len(train), len(test)) == (496, 400)
    assert (train[0]["image"].shape, train[0]["image"].dtype) == ((3, 32, 32), torch.uint8)
    assert train.classes == ["5", "6", "7", "8", "9"]
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(5))
    seen, others = ({image.numpy().tobytes() for image in images_of(part)} for part in (train, test))
    assert not seen & others


def images_of(part):
    return [part[i]["image"].contiguous() for i in range(len(part))]


def test_every_example_is_run_by_a_test_and_says_what_it_does_not_reproduce():
    texts = {path.name: docstring(path) for path in sorted(EXAMPLES.glob("*.py"))}
    examples = [name for name, text in texts.items() if NO_EXAMPLE not in text]
    assert examples == sorted({*ALONE, "quickstart.py"})
    assert [name for name in examples if "paper" not in texts[name]] == []


def test_what_fits_on_a_page():
    lines = (EXAMPLES / "plain_pytorch.py").read_text("utf-8").splitlines()
    assert len(lines) <= 60
    lines = (EXAMPLES / "custom_objective.py").read_text("utf-8").splitlines()
    assert len(lines) <= 60
    start = lines.index('@register_objective("info_nce")')
    end = next(i for i, line in enumerate(lines) if line.startswith('if __name__ == "__main__"'))
    assert sum(bool(line.strip()) for line in lines[start:end]) <= 20, "README says: an objective in 20 lines"
