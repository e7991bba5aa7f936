# SPDX-License-Identifier: Apache-2.0
"""`render_card`: the model card of an adapter, or of a repository of many, from facts; nothing is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation import EvalReport, format_fraction, markdown_table
from ..storage.files import atomic_write
from .facts import AdapterFacts, as_code, as_span, as_text, dataset_id, facts_of_folder, shown_name

CARD_NAME = "README.md"
EVAL_FOLDER = ".eval_results"
_BEGIN = "<!-- smn:begin: rendered from the adapter's records; what stands outside of the two marks is kept -->"
_END = "<!-- smn:end -->"
_MARKED = re.compile(r"<!-- smn:begin\b.*?<!-- smn:end -->", re.DOTALL)
_TASKS_BEGIN, _TASKS_END = "<!-- smn:tasks:begin -->", "<!-- smn:tasks:end -->"
_TASKS = re.compile(rf"{_TASKS_BEGIN}\n(?P<table>.*?)\n{_TASKS_END}", re.DOTALL)
_COLUMNS = ("task", "base", "dataset", "result", "density", "bytes")
_PEFT_VERSIONS = re.compile(r"\n*### Framework versions\n\n(- PEFT [^\n]*\n?)+")
_TEMPLATE = "[More Information Needed]"
_OURS = ("base_model", "base_model_relation", "datasets", "library_name", "model-index", "pipeline_tag", "tags")
_METRICS = {"knn": "k-NN accuracy", "linear_probe": "linear probe accuracy", "accuracy": "accuracy"}
_PAPER = "[Self-Masking Networks for Unsupervised Adaptation](https://arxiv.org/abs/2409.07577)"
_LIMITS = (
    "The mask fits the base weights it was learned on and no others: the adapter holds their fingerprint, and another "
    "base is refused.",
    "`import smn_peft` has to come before PEFT loads the adapter; the Hub's own code snippets do not know that.",
    "It holds the mask, not the scores it came from: training that goes on from it starts at even scores.",
)


def render_card(
    facts: AdapterFacts,
    where: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """Render a card: its front matter, and its text between two marks.

    The code in it loads from `where`, a repository or folder, with `subfolder` and `revision`; `license` is as the Hub
    spells it, such as "apache-2.0", and the card says if there is none.
    """
    own = f"The adapter: {license}." if license else "Whoever published the adapter named no licence."
    sections = [
        _BEGIN,
        f"# {as_text(facts.title)}\n\n{_opening(facts)}",
        f"## Use\n\n```python\n{loading_code(facts.code, where, subfolder, revision)}\n```",
        _evaluation(facts),
        _sizes(facts),
        _recipe(facts),
        f"## Licence\n\n{own} Base model and dataset have licences of their own, which hold for what is made of them.",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in [*map(as_text, facts.notes), *_LIMITS]),
        f"The method: {_PAPER} (Warmerdam, Caron and Asano, GCPR 2024), by `smn_peft`.",
        _END,
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{_front_matter(facts, license, tags).to_yaml()}\n---\n\n{body}\n")


def loading_code(base: str, where: str, subfolder: str | None = None, revision: str | None = None) -> str:
    """Whole code of a card: imports, the base by the lines `base`, and PEFT's loader of an adapter at `where`."""
    place = {"subfolder": subfolder, "revision": revision}
    options = "".join(f", {name}={as_code(value)}" for name, value in place.items() if value)
    return (
        "import smn_peft  # registers masks with PEFT; without it loading fails: KeyError: 'SMN'\n"
        f"from peft import PeftModel\n{base}\n\n"
        f"model = PeftModel.from_pretrained(base, {as_code(where)}{options}).eval()"
    )


def merged_with(card: ModelCard, existing: str | None) -> str:
    """The card as text, with what an earlier README.md has outside of the marks and in fields that are not ours.

    An unfilled template of PEFT or transformers counts as no README.md; ValueError if its front matter is not YAML.
    """
    words = own_words(existing)
    if existing is None or not words:
        return str(card)
    old = _parsed(existing)
    for name, value in old.data.to_dict().items():
        if name not in _OURS and card.data.get(name) is None:
            card.data[name] = value
    text, rendered = _PEFT_VERSIONS.sub("\n", old.text), card.text.strip("\n")
    kept = _MARKED.sub(lambda _: rendered, text) if _MARKED.search(text) else f"\n{words}\n\n{rendered}\n"
    return f"---\n{card.data.to_yaml()}\n---\n{kept}"


def own_words(existing: str | None) -> str:
    """What somebody wrote into a README.md: without front matter, rendered parts and unfilled templates."""
    if existing is None or (_TEMPLATE in existing and not _MARKED.search(existing)):
        return ""
    return _MARKED.sub("", _PEFT_VERSIONS.sub("\n", _parsed(existing).text)).strip()


def _parsed(text: str) -> ModelCard:
    try:
        return ModelCard(text.replace("\r\n", "\n"), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The lines between --- at the top of {CARD_NAME} are no metadata: {error}") from error


def write_card(folder: str | Path) -> None:
    """Write README.md and `.eval_results/` of an adapter's folder, from the records in it."""
    folder = Path(folder)
    facts = facts_of_folder(folder)
    card = folder / CARD_NAME
    existing = card.read_text("utf-8") if card.is_file() else None
    files = {CARD_NAME: merged_with(render_card(facts, folder.resolve().name), existing).encode()}
    for name, content in {**files, **eval_result_files(facts.reports)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with atomic_write(folder / name) as file:
            file.write(content)


def _front_matter(facts: AdapterFacts, license: str | None, tags: Sequence[str]) -> ModelCardData:
    base = [f"base_model:adapter:{facts.base_id}"] if facts.base_id else []
    dataset = dataset_id(facts.dataset)
    classifies = any(report.metric == "accuracy" for report in facts.reports)
    return ModelCardData(
        base_model=facts.base_id,
        base_model_relation="adapter" if facts.base_id else None,
        library_name="peft",
        license=license,
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        tags=list(dict.fromkeys(["smn", "mask", *base, *tags])),
        datasets=[dataset] if dataset else None,
        model_name=" ".join(facts.title.split()) if facts.reports else None,
        eval_results=model_index(facts.reports) or None,
    )


def _link(name: str, address: str | None, revision: str | None) -> str:
    shown = f"[{as_text(name)}](https://huggingface.co/{address})" if address else as_span(name)
    return f"{shown} at revision {as_span(revision)}" if revision else shown


def _opening(facts: AdapterFacts) -> str:
    base = "a base model that its config does not name"
    if facts.base:
        base = f"the frozen {_link(facts.base, facts.base_id, facts.base_revision)}"
    words = f"A mask adapter for PEFT: one bit per masked weight of {base} says whether the weight stays on."
    if facts.dataset:
        dataset = dataset_id(facts.dataset)
        address = f"datasets/{dataset}" if dataset else None
        words += f" Learned on {_link(shown_name(facts.dataset), address, facts.dataset_revision)}"
        words += f" by {as_span(facts.objective)}." if facts.objective else "."
    words += f" The file has {facts.sizes.total:,} bytes"
    if facts.full_bytes:
        words += f", {100 * facts.sizes.total / facts.full_bytes:.1f} % of a checkpoint of all weights"
    if facts.density is not None:
        words += f"; {100 * facts.density:.2f} % of the masked weights stay on"
    return words + "."


def _evaluation(facts: AdapterFacts) -> str:
    """Before and after, in percent; the spread is the standard deviation over the seeds."""
    if not facts.reports:
        return "## Evaluation\n\nNo evaluation was recorded."
    reports = [*facts.baselines, *facts.reports]
    parts = dict.fromkeys((shown_name(report.dataset), report.split) for report in reports)
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, str] = {}
    for report in reports:
        words = as_text(metric_name(report))
        if len(parts) > 1:
            words += f", {as_text(shown_name(report.dataset))} ({as_text(report.split)})"
        columns[f"{words} %"] = "–"
        row = cells.setdefault(label := as_text(report.label), {"": label})
        row.setdefault(f"{words} %", format_fraction(report.value, report.spread))
    rows = [{"": label, **columns, **row} for label, row in cells.items()]
    seeds = max(len(report.seeds) for report in facts.reports)
    spread = f"Mean and standard deviation over {seeds} seeds." if seeds > 1 else "One run; no spread is known."
    tested = " and ".join(f"{as_text(dataset)} (split {as_text(split)})" for dataset, split in parts)
    return f"## Evaluation\n\nOn {tested}. {spread}\n\n{markdown_table(rows)}"


def _sizes(facts: AdapterFacts) -> str:
    parts = {"mask": facts.sizes.mask, "head and other modules in full": facts.sizes.head}
    parts |= {"BatchNorm statistics": facts.sizes.statistics, "scores": facts.sizes.scores}
    parts["header"] = facts.sizes.total - sum(parts.values())
    parts = {name: size for name, size in parts.items() if size and facts.sizes.mask}  # else the split is not known
    parts["the file"] = facts.sizes.total
    if facts.full_bytes:
        parts["full fine-tuning, all weights"] = facts.full_bytes
    rows = [{"part": name, "bytes": f"{size:,}"} for name, size in parts.items()]
    if facts.full_bytes:
        for row, size in zip(rows, parts.values(), strict=True):
            row["of full"] = f"{100 * size / facts.full_bytes:.2f} %"
    return f"## Size\n\n{markdown_table(rows)}"


def _recipe(facts: AdapterFacts) -> str:
    if not facts.recipe:
        return ""
    rows = [{"option": as_span(name), "value": as_text(value)} for name, value in facts.recipe.items()]
    versions = ", ".join(as_text(f"{name} {version}") for name, version in facts.versions.items())
    return f"## How it was learned\n\n{markdown_table(rows)}" + (f"\n\nWith {versions}." if versions else "")


# --- Evaluations in the Hub's two formats ----------------------------------------------------------------------------


def metric_name(report: EvalReport) -> str:
    """The metric in words: ``k-NN accuracy (k = 200)``, ``linear probe accuracy, 10 % of the labels``."""
    kind, _, fraction = report.metric.partition("@")
    words = _METRICS.get(kind, kind)
    if fraction:
        return f"{words}, {100 * float(fraction):g} % of the labels"
    return f"{words} (k = {report.settings['k']})" if kind == "knn" and "k" in report.settings else words


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _line(text: str) -> str:
    return " ".join(text.split())


def model_index(reports: Sequence[EvalReport]) -> list[EvalResult]:
    """Entries of a card's `model-index`, in percent; `metric_args` holds the seeds and their standard deviation."""
    found = []
    for report in reports:
        spread: dict[str, Any] = {"seeds": len(report.seeds)} if report.seeds else {}
        if report.spread is not None:
            spread["standard_deviation"] = _percent(report.spread)
        found.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset_id(report.dataset) or _line(shown_name(report.dataset)),
                dataset_name=_line(shown_name(report.dataset)),
                dataset_split=_line(report.split),
                dataset_revision=None if report.revision is None else _line(report.revision),
                metric_type="accuracy",
                metric_name=_line(metric_name(report)),
                metric_value=_percent(report.value),
                metric_args=spread or None,
            )
        )
    return found


def eval_result_files(reports: Sequence[EvalReport], task: str | None = None) -> dict[str, bytes]:
    """Files of `.eval_results/` (https://huggingface.co/docs/hub/eval-results), by path in the repository.

    A dataset that only its owner has cannot be named there, so its reports give no file. `task` is the folder of the
    adapter in a repository of several, which becomes part of the names.
    """
    files = {}
    for report in reports:
        repository = dataset_id(report.dataset)
        if repository is None:
            continue
        dataset: dict[str, Any] = {"id": repository, "task_id": "default"}
        if report.revision is not None:
            dataset["revision"] = report.revision
        notes = [f"{metric_name(report)} in percent", f"split {report.split}"]  # the format has no fields for them
        if report.spread is not None:
            notes.append(f"mean of {len(report.seeds)} seeds, standard deviation {_percent(report.spread)}")
        entry = {"dataset": dataset, "value": _percent(report.value), "notes": "; ".join(notes)}
        name = "-".join(filter(None, [task, shown_name(report.dataset), report.metric]))
        path = f"{EVAL_FOLDER}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.yaml"
        files[path] = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True).encode()
    return files


# --- Repositories of many tasks --------------------------------------------------------------------------------------


def collection_card(text: str | None, repo_id: str, tasks: Mapping[str, AdapterFacts], existing: str | None) -> str:
    """README.md at the root of a repository of many tasks, with a row per folder in its table.

    The table goes into `text`, an adapter's card or the README.md there is, or into a fresh card. `tasks` are what is
    pushed, by folder; the rows of all others come from `existing`, the README.md there is.
    """
    rows = {row["task"]: row for row in _task_rows(existing or "")}
    rows |= {f"[{folder}]({folder})": _task_row(folder, facts) for folder, facts in tasks.items()}
    if not rows:
        assert text is not None
        return text
    card = ModelCard(text or _fresh_collection(repo_id, tasks), ignore_metadata_errors=True)
    block = f"{_TASKS_BEGIN}\n{markdown_table([rows[name] for name in sorted(rows)])}\n{_TASKS_END}"
    if _TASKS.search(card.text):
        card.text = _TASKS.sub(lambda _: block, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n## Tasks\n\n{block}\n"
    bases = [facts.base_id for facts in tasks.values() if facts.base_id]
    datasets = [found for facts in tasks.values() if (found := dataset_id(facts.dataset))]
    tags = ["smn", "mask", *(f"base_model:adapter:{base}" for base in bases)]
    for name, new in (("base_model", bases), ("datasets", datasets), ("tags", tags)):
        old = card.data.get(name) or []
        if merged := list(dict.fromkeys([*([old] if isinstance(old, str) else old), *new])):
            card.data[name] = merged
    card.data["library_name"] = "peft"
    if not card.data.get("base_model"):
        card.data.pop("base_model_relation")
    return str(card)


def _fresh_collection(repo_id: str, tasks: Mapping[str, AdapterFacts]) -> str:
    folder, facts = next(iter(tasks.items()))
    data = ModelCardData(library_name="peft", base_model_relation="adapter")
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\nMasks for several tasks, each in a folder "
        "with a card of its own: one bit per frozen weight says whether it stays on.\n\n"
        f"{_TASKS_BEGIN}\n\n{_TASKS_END}\n\n```python\n{loading_code(facts.code, repo_id, folder)}\n```\n"
    )


def _task_rows(text: str) -> list[dict[str, str]]:
    """The rows of the table there is; none of a table with other columns, since it is not ours."""
    found = _TASKS.search(text)
    lines = found["table"].strip().splitlines() if found else []
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    if not cells or tuple(cells[0]) != _COLUMNS:
        return []
    rows = [dict(zip(_COLUMNS, line, strict=True)) for line in cells[2:] if len(line) == len(_COLUMNS)]
    return [{name: cell.replace("\\|", "|") for name, cell in row.items()} for row in rows]


def _task_row(folder: str, facts: AdapterFacts) -> dict[str, str]:
    results = [f"{metric_name(r)} {format_fraction(r.value, r.spread)} %" for r in facts.reports]
    return {
        "task": f"[{folder}]({folder})",
        "base": as_text(facts.base) or "–",
        "dataset": as_text(shown_name(facts.dataset)) or "–",
        "result": as_text(", ".join(results)) or "–",
        "density": "–" if facts.density is None else f"{facts.density:.4f}",
        "bytes": f"{facts.sizes.total:,}",
    }
