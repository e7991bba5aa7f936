#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What `smn reproduce` made at the small scale and what it says of the paper's claims: RESULTS.md and README's block.

``paper_results.py runs/paper`` takes records and pictures from that folder into `records/paper/`; without a folder
the pages are rendered again from the records that are there; not an example by itself.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from smn_peft.paper import ARTEFACTS, render
from smn_peft.paper.claims import CLAIMS, claims_table

RECORDS = Path(__file__).with_name("records") / "paper"
PAGE = Path(__file__).with_name("RESULTS.md")
README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(<!-- claims:begin -->\n).*(<!-- claims:end -->)", re.DOTALL)


def take(folder: Path) -> None:
    """Copy what was made at the small scale; what judges a claim needs three seeds, or as many as the table wants."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name, artefact in ARTEFACTS.items():
        path = folder / f"{name}-small.json"
        needed = min(3, artefact.seeds) if any(claim.artefact == name for claim in CLAIMS) else 1
        if path.is_file() and len(json.loads(path.read_text("utf-8"))["seeds"]) >= needed:
            shutil.copyfile(path, RECORDS / path.name)
            for file in folder.glob(f"{name}-small*.png"):
                with Image.open(file) as picture:  # few colours: a third of the bytes
                    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
                        RECORDS / file.name, optimize=True
                    )


def records() -> dict[str, Any]:
    """Records by the name of their table or figure, in the paper's order."""
    paths = {name: RECORDS / f"{name}-small.json" for name in ARTEFACTS}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.is_file()}


def page(found: dict[str, Any]) -> str:
    """RESULTS.md."""
    missing = [name for name in ARTEFACTS if name not in found]
    parts = [
        "# The paper at a small scale",
        "Rendered by `examples/paper_results.py` from `records/paper/`, which `smn reproduce` wrote. 2,000 lossy "
        "CIFAR-10 images at 64 or 48 px, six epochs: only the order of methods can be compared with the paper's.",
        claims_table(found),
        *(render(found[name]).rstrip() + _pictures(name) for name in found),
    ]
    parts += [f"Not run yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts) + "\n"


def _pictures(name: str) -> str:
    return "".join(f"\n\n![](records/paper/{path.name})" for path in sorted(RECORDS.glob(f"{name}-small*.png")))


def readme(text: str, found: dict[str, Any]) -> str:
    """README with its block of claims rendered.

    Raises:
        ValueError: If the block has no markers.
    """
    table = claims_table(found)
    text, count = MARKED.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    if count != 1:
        raise ValueError("README.md must have <!-- claims:begin --> … <!-- claims:end --> once.")
    return text


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        take(Path(argument))
    everything = records()
    PAGE.write_text(page(everything), "utf-8")
    README.write_text(readme(README.read_text("utf-8"), everything), "utf-8")
