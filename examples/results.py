# SPDX-License-Identifier: Apache-2.0
"""Render `records/` into RESULTS.md and README.md, each between the markers that bear its name.

``results.py runs/paper`` first takes what `smn reproduce … --scale small --output-dir runs/paper` made. A tool for
maintainers, not an example by itself.
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
from real_recipes import accuracy, chosen_runs, method_rows

from smn_peft.analysis import low_shot_table
from smn_peft.evaluation import EvalReport, markdown_table
from smn_peft.paper import ARTEFACTS, render
from smn_peft.paper.claims import CLAIMS, claims_table

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
METHODS = ("real_vit", "real_vit_bytes", "real_resnet", "real_resnet_effects")
PAGES = (HERE / "RESULTS.md", HERE.parent / "README.md")


def load(name: str) -> Any:
    """A record by its name."""
    return json.loads((RECORDS / f"{name}.json").read_text("utf-8"))


def headline(record: dict[str, Any]) -> str:
    """README's table: four rows of the record, without the columns that explain them."""
    rows = {row["method"]: row for row in method_rows(record)}
    mask = "mask, Adam on the scores, head from the probe"
    rows["frozen, linear probe"]["bytes"] = (
        f"{chosen_runs(record['runs'], mask)[0]['head_bytes']:,}"  # as large a head
    )
    labels = {
        "frozen, linear probe": "frozen, linear probe",
        "LoRA, rank 8, bfloat16": "LoRA, rank 8, bf16",
        "full fine-tuning, Adam": "full fine-tuning",
        f"{mask}, coded": "mask, entropy-coded",
    }
    shown = [{**rows[label], "method": name} for label, name in labels.items()]
    return markdown_table([{key: row[key] for key in ("method", "test accuracy %", "bytes")} for row in shown])


def recipe_table(record: dict[str, Any]) -> str:
    """Markdown of a record of `small_recipes.py`: a row per backbone, before and after."""
    names = {"knn": ("k-NN before %", "k-NN after %"), "accuracy": ("linear probe %", "mask %")}
    table, (before, reached) = [], names[record["metric"]]
    for name in dict.fromkeys(row["backbone"] for row in record["rows"]):
        mine = [row for row in record["rows"] if row["backbone"] == name]
        table.append(
            {
                "backbone": f"{name}, {mine[0]['image_size']} px",
                before: accuracy([mine[0]["before"]]),
                reached: accuracy([row["after"] for row in mine]),
                "density": f"{statistics.mean(row['density'] for row in mine):.4f}",
                "bytes": f"{mine[0]['bytes']:,}",
                "steps": f"{mine[0]['steps']}",
            }
        )
    return markdown_table(table)


def trial_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of trials; a list holds a fraction per seed."""

    def text(value: Any) -> str:
        return accuracy(value) if isinstance(value, list) else "" if value is None else f"{value}"

    return markdown_table([{name: text(value) for name, value in row.items()} for row in rows])


def paper_records() -> dict[str, Any]:
    """Records of the paper's tables and figures at the small scale, in the paper's order."""
    return {
        name: load(f"paper/{name}-small") for name in ARTEFACTS if (RECORDS / f"paper/{name}-small.json").is_file()
    }


def _artefacts(found: dict[str, Any]) -> str:
    parts = []
    for name, record in found.items():
        pictures = sorted((RECORDS / "paper").glob(f"{name}-small*.png"))
        parts += [render(record).rstrip(), *(f"![](records/paper/{path.name})" for path in pictures)]
    return "\n\n".join(parts)


def blocks() -> dict[str, str]:
    """What stands between the markers of each name."""
    paper = paper_records()
    return {
        "headline": headline(load("real_vit_bytes")),
        "quickstart": quickstart.render(load("quickstart")),
        **{name: markdown_table(method_rows(load(name))) for name in METHODS},
        **{name: recipe_table(load(name)) for name in ("supervised_small", "swav_small")},
        **{path.stem: trial_table(load(path.stem)) for path in RECORDS.glob("*_trials.json")},
        "low_shot": low_shot_table([EvalReport.from_json(json.dumps(row)) for row in load("low_shot")]),
        "claims": claims_table(paper),
        "paper": _artefacts(paper),
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


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        take(Path(argument))
    everything = blocks()
    for page in PAGES:
        page.write_text(fill(page.read_text("utf-8"), everything), "utf-8")
