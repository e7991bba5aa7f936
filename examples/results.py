# SPDX-License-Identifier: Apache-2.0
"""Render `records/` into RESULTS.md and README.md, each between the markers that bear its name.

``results.py runs/paper`` first takes what `smn reproduce … --scale small --output-dir runs/paper` made, and the cards
of the masks that were chosen. A tool for maintainers, not an example by itself.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import quickstart
from PIL import Image

from smn_peft.evaluation import format_fraction, markdown_table
from smn_peft.paper import ARTEFACTS, render
from smn_peft.paper.claims import CLAIMS, claims_table

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
CARDS = HERE.parent / "model_cards"
PAGES = (HERE / "RESULTS.md", HERE.parent / "README.md")
OWN = ("methods", "unlabelled", "figure3")  # artefacts with a place of their own on the page


def load(name: str) -> Any:
    """A record by its name."""
    return json.loads((RECORDS / f"{name}.json").read_text("utf-8"))


def accuracy(fractions: list[float]) -> str:
    """Mean in percent, and the spread of several seeds."""
    spread = statistics.stdev(fractions) if len(fractions) > 1 else None
    return format_fraction(statistics.mean(fractions), spread)


def best(record: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """Of a comparison's section the best of each method's runs that were tested, by method."""
    finals = [final for final in record["details"]["finals"] if final["section"] == section]
    finals.sort(key=lambda final: statistics.fmean(final["values"]))
    return {final["method"]: final for final in finals}


def sections(record: dict[str, Any]) -> list[str]:
    """Sections of a comparison, in their order."""
    return list(dict.fromkeys(final["section"] for final in record["details"]["finals"]))


def headline(record: dict[str, Any]) -> str:
    """README's table: what each method reached on the first backbone, smallest file first."""
    rows = best(record, sections(record)[0])
    order = sorted(rows, key=lambda method: statistics.fmean(rows[method]["bytes"]))
    sizes = {method: f"{statistics.fmean(rows[method]['bytes']) / 1e3:,.0f}" for method in order}
    columns = ("method", "file (kB)", "test accuracy %")
    cells = ((method, sizes[method], accuracy(rows[method]["values"])) for method in order)
    return markdown_table([dict(zip(columns, row, strict=True)) for row in cells])


def trial_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of trials; a list holds a fraction per seed."""

    def text(value: Any) -> str:
        return accuracy(value) if isinstance(value, list) else "" if value is None else f"{value}"

    return markdown_table([{name: text(value) for name, value in row.items()} for row in rows])


def paper_records() -> dict[str, Any]:
    """Records of the paper's tables and figures, and of comparisons, at the small scale, in the paper's order."""
    return {
        name: load(f"paper/{name}-small") for name in ARTEFACTS if (RECORDS / f"paper/{name}-small.json").is_file()
    }


def _artefact(name: str, record: dict[str, Any]) -> str:
    pictures = sorted((RECORDS / "paper").glob(f"{name}-small*.png"))
    return "\n\n".join([render(record).rstrip(), *(f"![](records/paper/{path.name})" for path in pictures)])


def blocks() -> dict[str, str]:
    """What stands between the markers of each name."""
    paper = paper_records()
    rendered = {name: _artefact(name, record) for name, record in paper.items()}
    return {
        "headline": headline(paper["methods"]),
        "quickstart": quickstart.render(load("quickstart")),
        **{name: rendered[name] for name in OWN},
        **{path.stem: trial_table(load(path.stem)) for path in RECORDS.glob("*_trials.json")},
        "claims": claims_table(paper),
        "paper": "\n\n".join(text for name, text in rendered.items() if name not in OWN),
    }


def fill(text: str, rendered: dict[str, str]) -> str:
    """A page with every marked block rendered.

    Raises:
        ValueError: If a marker has no end, or no block of its name.
    """
    for name in re.findall(r"<!-- (\w+):begin -->", text):
        if name not in rendered:
            raise ValueError(f"There is no block {name!r}: blocks are {', '.join(rendered)}.")
        marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, count = marked.subn(lambda match, name=name: f"{match[1]}{rendered[name]}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"<!-- {name}:begin --> … <!-- {name}:end --> must stand once; it stands {count} times.")
    return text


def take(folder: Path) -> None:
    """Copy the paper's records; what judges a claim needs three seeds, or as many as the table wants."""
    (RECORDS / "paper").mkdir(parents=True, exist_ok=True)
    for name, artefact in ARTEFACTS.items():
        path = folder / f"{name}-small.json"
        needed = min(3, artefact.seeds) if any(claim.artefact == name for claim in CLAIMS) else 1
        if path.is_file() and len(json.loads(path.read_text("utf-8"))["seeds"]) >= needed:
            shutil.copyfile(path, RECORDS / "paper" / path.name)
            for file in folder.glob(f"{name}-small*.png"):
                with Image.open(file) as picture:  # few colours: a third of the bytes
                    few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
                    few.save(RECORDS / "paper" / file.name, optimize=True)
            if name in ("methods", "unlabelled"):
                take_cards(load(f"paper/{path.stem}"), folder / "runs")


def take_cards(record: dict[str, Any], runs: Path) -> None:
    """Copy the card of the best mask of every section, first seed, as `smn train` wrote it."""
    for section in sections(record):
        label = best(record, section)["mask"]["trial"]
        trials = [t for t in record["details"]["trials"] if (t["section"], t["method"]) == (section, "mask")]
        run = next(trial["final"] for trial in trials if trial["trial"] == label)
        name = re.sub(r"\W+", "-", f"{section} {'labels' if record['name'] == 'methods' else 'unlabelled'}".lower())
        text = (runs / run / "README.md").read_text("utf-8")
        (CARDS / f"{name}.md").write_text(text.replace(run, f"smn-{name}"), "utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        take(Path(argument))
    everything = blocks()
    for page in PAGES:
        page.write_text(fill(page.read_text("utf-8"), everything), "utf-8")
