# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/ work: python blocks run, commands exist, links lead somewhere, and README stays short.

The blocks of a page run one after another in one folder and one namespace, as a reader would type them; commands that
work on what is there then are run in their turn, all others are parsed. `<!-- test: skip REASON -->` on the line
before a block leaves it out.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import NamedTuple

import pytest
import timm
import torch
import yaml

from smn_peft.cli import app, main

from .processes import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_CODE = [ROOT / "CHANGELOG.md", ROOT / "examples/RESULTS.md"]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<skip>skip)[^\n]*? -->\n+)?```(?P<language>python|bash|yaml)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
#: Verbs that need nothing but what the page has made, unless they name a base.
RUN = ("pack", "inspect", "verify", "unpack", "bank", "recipes")


class Block(NamedTuple):
    """One fenced block and the line its code starts at."""

    language: str
    line: int
    code: str


def blocks(text: str) -> list[Block]:
    return [
        Block(found["language"], text.count("\n", 0, found.start("code")) + 1, found["code"])
        for found in BLOCK.finditer(text)
        if not found["skip"]
    ]


def smn_problem(words: list[str]) -> str | None:
    """Why `smn` would refuse the words: they are parsed as the command line parses them, and nothing is run."""
    name, command, rest = "smn", app, words
    try:
        while hasattr(command, "resolve_command"):  # a group, possibly in a group
            group = command
            name, command, rest = group.resolve_command(group.make_context(name, [], resilient_parsing=True), rest)
        context = command.make_context(name, rest)
    except Exception as error:  # whatever the parser raises
        return f"smn refuses it: {getattr(error, 'message', error)}"
    return f"smn has no option {context.args[0]}" if context.args and "--launch" not in words else None


def command_problem(line: str, make_knows) -> str | None:
    """Why the shell command cannot work in a checkout, or None where it can."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words or words[0] in {"cd", "source"} or words[:2] == ["git", "clone"]:
        return None
    if words[:2] == ["python", "-m"] and words[2:3] in (["venv"], ["pip"]):
        words = words[2:]
    if words[0] == "venv":
        return None
    if words[0] == "make":
        unknown = [word for word in words[1:] if "=" not in word and not make_knows(word)]
        return f"no such target: {unknown}" if unknown else None
    if words[:2] == ["pip", "install"]:
        asked = [extra for word in words[2:] for group in re.findall(r"\[(.*?)\]", word) for extra in group.split(",")]
        unknown = [extra.strip() for extra in asked if extra.strip() not in EXTRAS]
        return f"no such extra: {unknown}" if unknown else None
    if words[0] == "smn":
        return smn_problem(words[1:])
    if words[0] == "python" and words[1:] and words[1].endswith(".py"):
        return None if (ROOT / words[1]).is_file() else f"no such file: {words[1]}"
    return f"no test knows the command {words[0]!r}"


@pytest.fixture(scope="module")
def make_knows(run_make):
    """Whether a word is a target of the Makefile (a folder's name satisfies make too, so `make help` decides)."""
    listed = {line.split()[0] for line in run_make("help").stdout.splitlines() if line.startswith("  ")}
    return listed.__contains__


def smn(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """Exit code of a command."""
    patch.setattr(sys, "argv", ["smn", *words])
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.fixture
def without_hub(monkeypatch):
    """`pretrained=True` gives the same random weights each time."""
    create = timm.create_model

    def create_model(*args, pretrained=False, **options):
        torch.manual_seed(0)
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_works(page, tmp_path, monkeypatch, without_hub, make_knows):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(page.read_text("utf-8")):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        elif block.language == "yaml":
            assert yaml.safe_load(block.code)
        else:
            problems = {line: command_problem(line, make_knows) for line in block.code.splitlines()}
            assert {line: why for line, why in problems.items() if why} == {}
            for words in (shlex.split(line, comments=True) for line in block.code.splitlines()):
                if words[:1] == ["smn"] and words[1] in RUN and "--backbone" not in words:
                    assert smn(words[1:], monkeypatch) == 0, words


@pytest.mark.parametrize("page", [*PAGES, *WITHOUT_CODE], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_readme_is_short_and_has_what_a_reader_tries_first():
    readme = PAGES[0].read_text("utf-8")
    assert len(readme.encode()) <= 12_000
    commands = [line for block in blocks(readme) if block.language == "bash" for line in block.code.splitlines()]
    assert "make test" in commands
    assert any(line.startswith("make quickstart") for line in commands)
    assert all(f"docs/{page.name}" in readme for page in PAGES[1:])


def test_blocks_are_found():
    text = (
        "a\n```python\nx = 1\n```\n```bash\nmake\n```\n"
        "<!-- test: skip no GPU -->\n\n```python\ny\n```\n```text\nz\n```\n"
    )
    assert blocks(text) == [Block("python", 3, "x = 1\n"), Block("bash", 6, "make\n")]


def test_a_wrong_command_is_found_and_a_right_one_passes(make_knows):
    wrong = {
        "make no-such-target": "no such target",
        "make tests": "no such target",
        'pip install -e ".[nonsense]"': "no such extra",
        "python -m pip install 'smn_peft[eval,nonsense]'": "no such extra",
        "python examples/no_such_file.py": "no such file",
        "smn trian --recipe swav-small": "smn",
        "smn train --recipe swav-small --epoch 3": "ption",
        "smn cascade trian --experts 3": "smn",
        "smn cascade train --expertz 3": "ption",
        "smn analyze densty runs/a": "smn",
        "curl https://example.org | sh": "no test knows",
    }
    for line, why in wrong.items():
        assert why in (command_problem(line, make_knows) or ""), line
    right = ("make test  # seconds", "A=b make test ARGS=x", 'pip install ".[eval]"', "# only words", "cd smn_peft")
    assert [line for line in right if command_problem(line, make_knows)] == []
