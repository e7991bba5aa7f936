# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.zoo.table`: sweep the zoo and write docs/zoo.md; with names, sweep these and print the verdicts."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from smn_peft.evaluation import markdown_table
from tests.zoo.checks import CHECKS, is_bad, reload_all, try_model
from tests.zoo.models import BY_NAME, ZOO, Entry

__all__ = ["DOCUMENT", "render", "sweep"]

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
_HEAD = """# Architectures that were tried

{models} models with random weights: {timm} of timm from {families} families, {transformers} classes of transformers,
{torchvision} of torchvision. Each is masked on its default layers (where it has none, on all Linear and Conv2d layers
but the last), with random scores and with BatchNorm statistics that are no identity, and compared with a copy whose
weights were masked by hand. `python -m tests.zoo.table` writes this page.

{checks}

{counts}

A refusal is an error that says why and what to do instead; nothing here gives a wrong answer or an error without that.
The footnotes give the refusals' first words.
"""


def sweep(entries: list[Entry], say: bool = False) -> dict[str, dict[str, str]]:
    """All verdicts by model and check."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {entry.name: Path(temporary, str(number)) for number, entry in enumerate(entries)}
        found: dict[str, dict[str, str]] = {}
        for entry in entries:
            start = time.perf_counter()
            found[entry.name] = try_model(entry, folders[entry.name])
            if say:
                shown = {check: verdict for check, verdict in found[entry.name].items() if verdict != "ok"}
                print(f"{entry.name}: {time.perf_counter() - start:.1f} s {shown or 'ok'}", flush=True)
        saved = {name: path for name, path in folders.items() if found[name]["reload"] == "ok"}
        for name, verdict in reload_all(saved).items():
            found[name]["reload"] = verdict
            if say and verdict != "ok":
                print(f"{name}: reload {verdict}", flush=True)
    return found


def counts_of(found: Mapping[str, Mapping[str, str]]) -> dict[str, Counter[str]]:
    """Number of verdicts of each kind by check."""
    kinds = {check: [verdicts[check].partition(":")[0] for verdicts in found.values()] for check in CHECKS}
    return {check: Counter(values) for check, values in kinds.items()}


def render(found: Mapping[str, Mapping[str, str]]) -> str:
    """The page."""
    notes: dict[str, int] = {}
    rows = []
    for entry in ZOO:
        if entry.name not in found:
            continue
        row = {"model": entry.name, "family": f"{entry.library}: {entry.family}"}
        for check in CHECKS:
            kind, _, why = found[entry.name][check].partition(": ")
            row[check] = kind if kind == "ok" else f"{kind} [^{notes.setdefault(_reason(why), len(notes) + 1)}]"
        rows.append(row)
    libraries = Counter(entry.library for entry in ZOO if entry.name in found)
    families = {entry.family for entry in ZOO if entry.library == "timm" and entry.name in found}
    counted = counts_of(found)
    counts = [
        {"check": check, **{kind: str(counted[check][kind]) for kind in ("ok", "refused", "wrong", "crash")}}
        for check in CHECKS
    ]
    head = _HEAD.format(
        models=len(found),
        families=len(families),
        **{name: libraries[name] for name in ("timm", "transformers", "torchvision")},
        checks="\n".join(f"- **{check}**: {words}" for check, words in CHECKS.items()),
        counts=markdown_table(counts),
    )
    feet = "\n".join(f"[^{number}]: {reason}" for reason, number in notes.items())
    return f"{head}\n{markdown_table(rows)}\n" + (f"\n{feet}\n" if feet else "")


def _reason(why: str) -> str:
    """A refusal without what differs from model to model: names of layers and numbers."""
    words = [word for word in why.split() if not any(sign in word for sign in "._()'\"0123456789")]
    return " ".join(words[:14])


if __name__ == "__main__":
    chosen = [BY_NAME[name] for name in sys.argv[1:]] or ZOO
    verdicts = sweep(chosen, say=True)
    for kind, counter in counts_of(verdicts).items():
        print(kind, dict(counter))
    if chosen is ZOO:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(render(verdicts), "utf-8")
    sys.exit(any(is_bad(verdict) for each in verdicts.values() for verdict in each.values()))
