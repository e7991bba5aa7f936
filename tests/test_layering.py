# SPDX-License-Identifier: Apache-2.0
"""Imports inside the package run downwards only, and every file keeps the house's form."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "smn_peft"
MAX_LINES = 600
SPDX = "# SPDX-License-Identifier: Apache-2.0"

# Each layer and the layers directly below it; what is below those is allowed too.
DIRECTLY_BELOW: dict[str, set[str]] = {
    "_options": set(),
    "functional": {"_options"},
    "storage": {"functional"},
    "tuner": {"storage"},
    "bank": {"tuner"},
    "objectives": {"functional"},
    "backbones": {"tuner"},
    "data": {"tuner"},
    "evaluation": {"backbones", "data", "tuner"},
    "training": {"objectives", "data", "evaluation", "tuner", "hub"},
    "cascade": {"tuner", "evaluation", "training"},
    "embedding": {"bank", "cascade"},
    "analysis": {"storage", "evaluation"},
    "hub": {"storage", "evaluation"},
    "paper": {"training", "cascade", "analysis"},
    "serving": {"bank", "backbones", "data"},
}
DIRECTLY_BELOW["_push_to_hub"] = {"hub"}
DIRECTLY_BELOW["cli"] = set(DIRECTLY_BELOW)
# The package's own __init__ holds the public names: it may import every layer but the command line.
DIRECTLY_BELOW[PACKAGE] = set(DIRECTLY_BELOW) - {"cli"}

# Third-party modules and the only layers that may import them.
ONLY_IN: dict[str, set[str]] = {
    "peft": set(DIRECTLY_BELOW) - {"functional", "objectives"},
    "accelerate.commands": {"training", "cli"},
    "accelerate.launchers": {"training", "cli"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
}


def allowed(layer: str) -> set[str]:
    """The layers that `layer` may import: itself and everything below it."""
    found, todo = {layer}, [layer]
    while todo:
        new = DIRECTLY_BELOW[todo.pop()] - found
        found |= new
        todo += new
    return found


def imported_modules(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import at any depth; `package` holds the parts relative ones start from.

    `from a import b` gives `a.b`: b may be a module, and where it is a name, `a.b` still lies in the layer of `a`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in {"import_module", "__import__"} and isinstance(name, str) and not name.startswith("."):
                yield node.lineno, name


def layer_of(module: str) -> str:
    """The layer of a dotted name inside the package; a public name of the package itself is the package's."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in DIRECTLY_BELOW else PACKAGE


def layering_violations(package_dir: Path) -> list[str]:
    """One line per import of the tree that does not run downwards, and per module that the table does not know."""
    found = []
    for path in sorted(package_dir.rglob("*.py")):
        where = path.relative_to(package_dir)
        parts = [PACKAGE, *where.with_suffix("").parts]
        is_root = where.parts == ("__init__.py",)
        layer = PACKAGE if is_root else parts[1]
        if layer not in DIRECTLY_BELOW:
            found.append(f"{where}: layer {layer!r} is not in the table of tests/test_layering.py")
            continue
        for line, module in imported_modules(ast.parse(path.read_text("utf-8")), parts[:-1]):
            if module.split(".")[0] == PACKAGE:
                target = layer_of(module)
                if target not in allowed(layer):
                    found.append(f"{where}:{line}: {layer} imports {module}, which is not below it")
            for limited, layers in ONLY_IN.items():
                if f"{module}.".startswith(f"{limited}.") and layer not in layers:
                    found.append(f"{where}:{line}: {layer} imports {module}, which only {sorted(layers)} may")
    return found


def form_violations(path: Path) -> list[str]:
    """What one file lacks of the house's form: licence line, first sentence, size."""
    text = path.read_text("utf-8")
    lines = text.splitlines()
    head = lines[1:] if lines and lines[0].startswith("#!") else lines
    found = []
    if not head or head[0] != SPDX:
        found.append(f"{path}: does not start with {SPDX!r}")
    docstring = ast.get_docstring(ast.parse(text))
    if not docstring or not docstring.splitlines()[0].strip():
        found.append(f"{path}: has no docstring whose first line says what the module is for")
    if len(lines) > MAX_LINES:
        found.append(f"{path}: {len(lines)} lines, more than {MAX_LINES}")
    return found


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root / PACKAGE


def test_imports_run_downwards_only():
    assert layering_violations(ROOT / PACKAGE) == []


def test_every_module_keeps_the_form():
    assert [line for path in sorted((ROOT / PACKAGE).rglob("*.py")) for line in form_violations(path)] == []


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_every_script_and_test_names_its_licence_and_purpose(folder):
    found = [line for path in sorted((ROOT / folder).rglob("*.py")) for line in form_violations(path)]
    assert [line for line in found if "more than" not in line] == []


def test_the_table_has_no_cycle():
    for layer in DIRECTLY_BELOW:
        for below in allowed(layer) - {layer}:
            assert layer not in allowed(below), f"{layer} and {below} are below each other"


def test_the_checker_accepts_a_clean_tree(tmp_path):
    clean = {
        "__init__.py": "from .tuner import MaskConfig\nfrom smn_peft.bank import MaskBank\n",
        "functional/__init__.py": "from .masking import f\n",
        "functional/masking.py": "import torch\nfrom . import packing\n",
        "storage/codec.py": "from ..functional import packing\n",
        "tuner/layer.py": "import peft\nfrom smn_peft.functional.masking import f\nfrom smn_peft import storage\n",
        "cli/main.py": "from smn_peft.training import fit\nimport accelerate.commands.launch\n",
    }
    assert layering_violations(write(tmp_path, clean)) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("functional/a.py", "from smn_peft.tuner import layer"),
        ("functional/a.py", "import smn_peft.storage.codec"),
        ("functional/a.py", "from smn_peft import tuner"),
        ("functional/a.py", "from smn_peft import MaskConfig"),
        ("functional/a.py", "from ..tuner.layer import MaskLayer"),
        ("functional/a.py", "from .. import storage"),
        ("functional/deep/a.py", "from ... import storage"),
        ("functional/__init__.py", "from ..storage import codec"),
        ("functional/a.py", "def f():\n    from smn_peft.tuner import layer"),
        ("functional/a.py", "if TYPE_CHECKING:\n    from ..bank import MaskBank"),
        ("functional/a.py", "importlib.import_module('smn_peft.tuner')"),
        ("functional/a.py", "import peft.utils"),
        ("objectives/a.py", "from peft import get_peft_model"),
        ("objectives/a.py", "from smn_peft.tuner import MaskConfig"),
        ("storage/a.py", "from smn_peft.tuner import MaskConfig"),
        ("backbones.py", "from .cli import main"),
        ("data/a.py", "from smn_peft.evaluation import knn"),
        ("evaluation/a.py", "from accelerate import launchers"),
        ("cli/a.py", "import uvicorn"),
        ("bank/a.py", "from ..serving import service"),
        ("__init__.py", "from .cli import main"),
        ("unheard_of/a.py", "import torch"),
    ],
)
def test_the_checker_finds_a_violation(tmp_path, name, text):
    found = layering_violations(write(tmp_path, {name: text}))
    assert len(found) == 1
    assert found[0].startswith(name)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('"""Purpose."""\n', "does not start with"),
        (f"{SPDX}\nx = 1\n", "no docstring"),
        (f'{SPDX}\n"""\n"""\n', "no docstring"),
        (f'{SPDX}\n"""Purpose."""\n' + "x = 1\n" * MAX_LINES, "more than 600"),
    ],
)
def test_the_form_check_finds_a_violation(tmp_path, text, what):
    path = write(tmp_path, {"a.py": text}) / "a.py"
    (found,) = form_violations(path)
    assert what in found


def test_the_form_check_accepts_a_script_with_a_shebang(tmp_path):
    path = write(tmp_path, {"a.py": f'#!/usr/bin/env python\n{SPDX}\n"""Purpose."""\n'}) / "a.py"
    assert form_violations(path) == []
