# SPDX-License-Identifier: Apache-2.0
"""`render_card`: the model card of an adapter, or of a repository of many, from facts; nothing is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation import EvalReport, format_fraction, markdown_table, report_table
from ..storage.files import atomic_write
from .facts import AdapterFacts, as_code, as_options, as_span, as_text, dataset_id, facts_of_folder, shown_name

CARD_NAME = "README.md"
EVAL_FOLDER = ".eval_results"
_MARKED = re.compile(r"<!-- smn:begin\b.*?<!-- smn:end -->", re.DOTALL)
_TASKS_BEGIN, _TASKS_END = "<!-- smn:tasks:begin -->", "<!-- smn:tasks:end -->"
_TASKS_HEAD = "| task | base | dataset | result | density | bytes |\n| --- | --- | --- | --- | ---: | ---: |"
_TASKS = re.compile(rf"{_TASKS_BEGIN}\n(?P<table>.*?){_TASKS_END}", re.DOTALL)
_PEFT_VERSIONS = re.compile(r"\n*### Framework versions\n\n(- PEFT [^\n]*\n?)+")
_UNFILLED = "[More Information Needed]"  # in the cards of PEFT and transformers
_OURS = ("base_model", "base_model_relation", "datasets", "library_name", "model-index", "pipeline_tag", "tags")
_METRICS = {"knn": "k-NN accuracy", "linear_probe": "linear probe accuracy", "accuracy": "accuracy"}


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
    recipe = [{"option": as_span(name), "value": as_text(value)} for name, value in facts.recipe.items()]
    dataset = dataset_id(facts.dataset)
    return ModelCard.from_template(
        _front_matter(facts, license, tags),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        facts=facts,
        dataset=shown_name(facts.dataset),
        dataset_address=f"datasets/{dataset}" if dataset else None,
        code=loading_code(facts.code, where, subfolder, revision),
        evaluation=_evaluation(facts),
        sizes=_sizes(facts),
        recipe=markdown_table(recipe) if recipe else "",
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        license=license,
        text=as_text,
        span=as_span,
        link=_link,
    )


def loading_code(base: str, where: str, subfolder: str | None = None, revision: str | None = None) -> str:
    """Whole code of a card: imports, the base by the lines `base`, and PEFT's loader of an adapter at `where`."""
    options = as_options(subfolder=subfolder or None, revision=revision or None)
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
    if existing is None or (_UNFILLED in existing and not _MARKED.search(existing)):
        return ""
    return _MARKED.sub("", _PEFT_VERSIONS.sub("\n", _parsed(existing).text)).strip()


def _parsed(text: str) -> ModelCard:
    try:
        return ModelCard(text.replace("\r\n", "\n"), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The lines between --- at the top of {CARD_NAME} are no metadata: {error}") from error


def read_card(folder: Path) -> str | None:
    """README.md of a folder, if it has one."""
    card = folder / CARD_NAME
    return card.read_text("utf-8") if card.is_file() else None


def write_card(folder: str | Path) -> None:
    """Write README.md and `.eval_results/` of an adapter's folder, from the records in it."""
    folder = Path(folder)
    facts = facts_of_folder(folder)
    files = {CARD_NAME: merged_with(render_card(facts, folder.resolve().name), read_card(folder)).encode()}
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


def _evaluation(facts: AdapterFacts) -> str:
    """Before and after, in percent; the spread is the standard deviation over the seeds."""
    if not facts.reports:
        return "No evaluation was recorded."
    reports = [*facts.baselines, *facts.reports]
    parts = {(r.dataset, r.split): f"{as_text(shown_name(r.dataset))} (split {as_text(r.split)})" for r in reports}
    rows = []
    for report in reports:  # a column is named by its metric, and by its dataset where there are several
        column = as_text(metric_name(report))
        column += f", {parts[report.dataset, report.split]}" if len(parts) > 1 else ""
        rows.append(replace(report, label=as_text(report.label) or "–", dataset=column, split="test", metric="value"))
    seeds = max(len(report.seeds) for report in reports)
    spread = f"Mean and standard deviation over {seeds} seeds." if seeds > 1 else "One run; no spread is known."
    return f"On {' and '.join(parts.values())}. {spread}\n\n{report_table(rows)}"


def _sizes(facts: AdapterFacts) -> str:
    sizes, full = facts.sizes, facts.full_bytes
    parts = {"mask": sizes.mask, "head and other modules in full": sizes.head}
    parts |= {"BatchNorm statistics": sizes.statistics, "scores": sizes.scores}
    parts["header"] = sizes.total - sum(parts.values())
    parts = {name: size for name, size in parts.items() if size and sizes.mask}  # else the split is not known
    parts |= {"the file": sizes.total, **({"full fine-tuning, all weights": full} if full else {})}
    rows = []
    for name, size in parts.items():
        share = {"of full": f"{100 * size / full:.2f} %"} if full else {}
        rows.append({"part": name, "bytes": f"{size:,}", **share})
    return markdown_table(rows)


def metric_name(report: EvalReport) -> str:
    """The metric in words: ``k-NN accuracy (k = 200)``, ``linear probe accuracy, 10 % of the labels``."""
    kind, _, fraction = report.metric.partition("@")
    words = _METRICS.get(kind, kind)
    if fraction:
        return f"{words}, {100 * float(fraction):g} % of the labels"
    return f"{words} (k = {report.settings['k']})" if kind == "knn" and "k" in report.settings else words


def model_index(reports: Sequence[EvalReport]) -> list[EvalResult]:
    """Entries of a card's `model-index`, in percent; `metric_args` holds the seeds and their standard deviation."""
    found = []
    for report in reports:
        name, args = shown_name(report.dataset), {"seeds": len(report.seeds)} if report.seeds else {}
        spread = {} if report.spread is None else {"standard_deviation": _percent(report.spread)}
        texts = {"dataset_name": name, "dataset_type": dataset_id(report.dataset) or name}
        texts |= {"dataset_split": report.split, "dataset_revision": report.revision or ""}
        texts |= {"metric_type": "accuracy", "metric_name": metric_name(report)}
        lines: dict[str, Any] = {key: " ".join(text.split()) or None for key, text in texts.items()}
        values: dict[str, Any] = {"metric_value": _percent(report.value), "metric_args": {**args, **spread} or None}
        found.append(EvalResult(task_type="image-classification", **lines, **values))
    return found


def _percent(value: float) -> float:
    return round(100 * value, 2)


def eval_result_files(reports: Sequence[EvalReport], task: str | None = None) -> dict[str, bytes]:
    """Files of `.eval_results/` (https://huggingface.co/docs/hub/eval-results), by path in the repository.

    A dataset that only its owner has cannot be named there, so its reports give no file. `task` is the folder of the
    adapter in a repository of several, which becomes part of the names.
    """
    files = {}
    for report in reports:
        if (repository := dataset_id(report.dataset)) is None:
            continue
        dataset = {"id": repository, "task_id": "default"}
        if report.revision is not None:
            dataset["revision"] = report.revision
        notes = f"{metric_name(report)} in percent; split {report.split}"  # the format has no fields for them
        if report.spread is not None:
            notes += f"; mean of {len(report.seeds)} seeds, standard deviation {_percent(report.spread)}"
        name = "-".join(filter(None, [task, shown_name(report.dataset), report.metric]))
        path = f"{EVAL_FOLDER}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.yaml"
        entry = {"dataset": dataset, "value": _percent(report.value), "notes": notes}
        files[path] = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True).encode()
    return files


def collection_card(text: str | None, repo_id: str, tasks: Mapping[str, AdapterFacts], existing: str | None) -> str:
    """README.md at the root of a repository of many tasks, with a row per folder in its table.

    The table goes into `text`, an adapter's card or the README.md there is, or into a fresh card. `tasks` are what is
    pushed, by folder; the rows of all others come from `existing`, the README.md there is.
    """
    found = _TASKS.search(existing or "")
    lines = [line for line in found["table"].splitlines() if line.startswith("| [")] if found else []
    lines += [_task_row(folder, facts) for folder, facts in tasks.items()]
    rows = {re.split(r"(?<!\\)\|", line)[1].strip(): line for line in lines}
    if not rows:
        assert text is not None
        return text
    card = ModelCard(text or _fresh_collection(repo_id, tasks), ignore_metadata_errors=True)
    block = "\n".join([_TASKS_BEGIN, _TASKS_HEAD, *(rows[name] for name in sorted(rows)), _TASKS_END])
    if _TASKS.search(card.text):
        card.text = _TASKS.sub(lambda _: block, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n## Tasks\n\n{block}\n"
    bases = [facts.base_id for facts in tasks.values() if facts.base_id]
    datasets = [name for facts in tasks.values() if (name := dataset_id(facts.dataset))]
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
    title = repo_id.rpartition("/")[2]
    words = (
        "Masks for several tasks, each in a folder with a card of its own: one bit per frozen weight says whether it"
    )
    code = loading_code(facts.code, repo_id, folder)
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{words} stays on.\n\n```python\n{code}\n```\n"


def _task_row(folder: str, facts: AdapterFacts) -> str:
    results = [f"{metric_name(r)} {format_fraction(r.value, r.spread)} %" for r in facts.reports]
    texts = [as_text(text) or "–" for text in (facts.base, shown_name(facts.dataset), ", ".join(results))]
    density = "–" if facts.density is None else f"{facts.density:.4f}"
    cells = [f"[{folder}]({folder})", *texts, density, f"{facts.sizes.total:,}"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
