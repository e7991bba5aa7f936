# SPDX-License-Identifier: Apache-2.0
"""The built wheel holds the whole package and nothing else, and adapts a model without the checkout (`make dist`).

This file is copied alone into an empty folder and run there against the installed wheel, so it imports no helper.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = "smn_peft"
in_wheel_environment = pytest.mark.skipif(
    os.environ.get("SMN_TEST_WHEEL") != "1", reason="needs the wheel installed in an empty environment: make dist"
)


def content_problems(installed: list[str], package_files: list[str]) -> list[str]:
    """What the wheel lacks or should not hold; both lists are posix paths relative to the package's parent."""
    packed = {name for name in installed if not name.endswith(".pyc")}
    own = {name for name in packed if PurePosixPath(name).parts[0] == PACKAGE}
    metadata = {name for name in packed if PurePosixPath(name).parts[0].endswith(".dist-info")}
    problems = [f"missing: {name}" for name in sorted(set(package_files) - own)]
    problems += [f"not in the source tree: {name}" for name in sorted(own - set(package_files))]
    scripts = {name for name in packed if PurePosixPath(name).parts[-2:] in (("bin", "smn"), ("Scripts", "smn.exe"))}
    problems += [f"outside the package: {name}" for name in sorted(packed - own - metadata - scripts)]
    if f"{PACKAGE}/py.typed" not in own:
        problems.append("no py.typed: type checkers would ignore the annotations")
    if not any("LICENSE" in name for name in metadata):
        problems.append("no licence")
    return problems


def tree(checkout: Path) -> list[str]:
    """The files of the package in the source tree."""
    found = (path.relative_to(checkout) for path in (checkout / PACKAGE).rglob("*") if path.is_file())
    return [path.as_posix() for path in found if "__pycache__" not in path.parts]


@in_wheel_environment
def test_wheel_holds_the_package_and_nothing_else():
    installed = [str(PurePosixPath(*file.parts)) for file in importlib.metadata.files(PACKAGE)]
    assert content_problems(installed, tree(Path(os.environ["SMN_CHECKOUT"]))) == []


@in_wheel_environment
def test_every_module_comes_from_the_wheel():
    checkout = Path(os.environ["SMN_CHECKOUT"]).resolve()
    assert checkout not in {Path(entry).resolve() for entry in sys.path}
    assert Path(importlib.import_module(PACKAGE).__file__).is_relative_to(sys.prefix)
    without_extra = importlib.util.find_spec("fastapi") is None
    for name in tree(checkout):
        if without_extra and name.startswith(f"{PACKAGE}/serving/"):
            continue
        if name.endswith(".py"):
            parts = PurePosixPath(name).with_suffix("").parts
            module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            assert Path(module.__file__).is_relative_to(sys.prefix), module.__file__


@in_wheel_environment
def test_wheel_adapts_saves_and_loads(tmp_path):
    import torch
    from peft import PeftModel, get_peft_model

    from smn_peft import MaskConfig

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))

    x, y = torch.randn(64, 16), torch.randint(0, 4, (64,))
    model = get_peft_model(base(), MaskConfig(target_modules=["0", "2"]))
    scores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(scores, lr=50.0, momentum=0.9)
    before = torch.nn.functional.cross_entropy(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < before
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert not torch.equal(loaded(x), base()(x))


GOOD = ["smn_peft/__init__.py", "smn_peft/py.typed", "smn_peft/tuner/layer.py"]
DIST_INFO = ["smn_peft-0.1.0.dist-info/METADATA", "smn_peft-0.1.0.dist-info/licenses/LICENSE"]


def test_a_right_wheel_has_no_problem():
    assert content_problems([*GOOD, *DIST_INFO, "smn_peft/__pycache__/__init__.cpython-312.pyc"], GOOD) == []


@pytest.mark.parametrize(
    ("installed", "package_files", "problem"),
    [
        ([*GOOD[:2], *DIST_INFO], GOOD, "missing: smn_peft/tuner/layer.py"),
        ([*GOOD, *DIST_INFO, "tests/conftest.py"], GOOD, "outside the package: tests/conftest.py"),
        ([*GOOD, *DIST_INFO, "smn_peft/old.py"], GOOD, "not in the source tree: smn_peft/old.py"),
        ([GOOD[0], *DIST_INFO], [GOOD[0]], "no py.typed: type checkers would ignore the annotations"),
        ([*GOOD, DIST_INFO[0]], GOOD, "no licence"),
    ],
)
def test_a_wrong_wheel_is_found(installed, package_files, problem):
    assert content_problems(installed, package_files) == [problem]
