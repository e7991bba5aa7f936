# SPDX-License-Identifier: Apache-2.0
"""`import smn_peft` loads no library that only some uses need."""

from __future__ import annotations

import json
import subprocess
import sys

from .processes import ROOT

HEAVY = ["datasets", "timm", "torchvision", "sklearn", "matplotlib", "click", "pydantic"]
HEAVY += ["fastapi", "uvicorn", "prometheus_client"]

# What PEFT loads by itself is not ours to avoid, so its import comes first and is left out. In a process of its own,
# where nothing else is imported; the second line shows that the check can fail.
PROBE = """
import json, sys
import peft
before = set(sys.modules)
for statement in ("import smn_peft", "import smn_peft, matplotlib"):
    exec(statement)
    print(json.dumps([name for name in {heavy} if name in set(sys.modules) - before]))
"""


def test_importing_the_package_is_light():
    line = [sys.executable, "-c", PROBE.format(heavy=HEAVY)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    light, with_more = map(json.loads, done.stdout.splitlines())
    assert light == []
    assert "matplotlib" in with_more
