# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin that runs PEFT's own tests on `MaskConfig`: its lists of cases are replaced while it collects."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
from cases import LISTS, TABLES, reason_to_leave_out
from PIL import Image

from smn_peft import MaskConfig

_left_out: Counter[str] = Counter()


def pytest_configure() -> None:
    """Do without what PEFT's test helpers import or download, for tests that are left out or run on stand-ins."""
    for package in ("datasets", "diffusers"):
        if importlib.util.find_spec(package) is None:
            stub = ModuleType(package)
            stub.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
            sys.modules[package] = stub
    helpers = importlib.import_module("peft_tests.testing_utils")
    helpers.load_cat_image = lambda: Image.effect_mandelbrot((48, 48), (-2, -1, 1, 1), 100).convert("RGB")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the rows in the lists that the decorators hold, before pytest reads them."""
    for name, rows in TABLES.get(metafunc.module.__name__.rpartition(".")[2], {}).items():
        table = getattr(metafunc.module, name)
        if table is not rows:
            table.clear()
            table.update(rows) if isinstance(table, dict) else table.extend(rows)
    if hasattr(metafunc.cls, "model_id"):
        name = metafunc.cls.model_id.rpartition("/")[2]
        metafunc.cls.model_id = f"models/{name}"
    rows = LISTS.get(metafunc.function.__name__)
    if rows is not None:
        (mark,) = (m for m in metafunc.definition.iter_markers("parametrize") if len(m.args[1][0]) == len(rows[0]))
        mark.args[1][:] = rows


def _is_ours(item: pytest.Item) -> bool:
    values: list[Any] = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    return any(issubclass(v if isinstance(v, type) else type(v), MaskConfig) for v in values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that take a configuration, but for those that cannot hold for a mask."""
    kept, gone = [], []
    for item in items:
        owner = f"{item.cls.__name__}." if getattr(item, "cls", None) else ""
        reason = reason_to_leave_out(owner + item.name) if _is_ours(item) else "about other PEFT methods"
        if reason is None:
            kept.append(item)
        else:
            gone.append(item)
            _left_out[reason] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=gone)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was left out and why."""
    if _left_out:
        terminalreporter.section("left out")
        for reason, count in _left_out.most_common():
            terminalreporter.line(f"{count:5} {reason}")
