# SPDX-License-Identifier: Apache-2.0
"""`import smn_peft` loads no library that only some uses need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["datasets", "timm", "sklearn", "matplotlib", "typer", "fastapi", "uvicorn", "prometheus_client"]

# What PEFT loads by itself is not ours to avoid, so its import comes first and is left out.
PROBE = """
import json, sys
import peft
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set({heavy!r}) & (set(sys.modules) - before))))
"""


def heavy_modules_loaded_by(statement: str) -> list[str]:
    code = PROBE.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_is_light():
    assert heavy_modules_loaded_by("import smn_peft") == []


def test_the_check_can_fail():
    assert "timm" in heavy_modules_loaded_by("import smn_peft, timm")
