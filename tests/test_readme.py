# SPDX-License-Identifier: Apache-2.0
"""Every python block of README.md runs, and every bash block names commands that exist.

On the line before a block, `<!-- test: slow -->` moves it to the slow tests and `<!-- test: skip REASON -->` leaves
it out.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import NamedTuple

import click
import pytest

from smn_peft.cli import app

from .processes import ROOT, run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = (ROOT / "README.md").read_text("utf-8")
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>slow|skip)(?P<reason>[^\n]*?) -->\n+)?```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One fenced block and the line its code starts at."""

    language: str
    line: int
    code: str
    mark: str
    reason: str


def blocks(text: str) -> list[Block]:
    return [
        Block(
            m["language"],
            text.count("\n", 0, m.start("code")) + 1,
            m["code"],
            m["mark"] or "",
            (m["reason"] or "").strip(),
        )
        for m in BLOCK.finditer(text)
    ]


def params(language: str) -> list:
    found = []
    for block in blocks(README):
        if block.language != language:
            continue
        marks = {"slow": [pytest.mark.slow], "skip": [pytest.mark.skip(reason=block.reason)], "": []}[block.mark]
        found.append(pytest.param(block.code, id=f"line{block.line}", marks=marks))
    return found


def smn_problem(words: list[str]) -> str | None:
    """Why `smn` would refuse the words: they are parsed as the command line parses them, and nothing is run."""
    name, command, rest = "smn", app, words
    try:
        while hasattr(command, "resolve_command"):  # a group, possibly in a group
            group = command
            name, command, rest = group.resolve_command(click.Context(group), rest)
        context = command.make_context(name, rest)
    except click.ClickException as error:
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


@pytest.fixture
def make_knows(run_make):
    """Whether a word is a target of the Makefile (a folder's name satisfies make too, so `make help` decides)."""
    listed = {line.split()[0] for line in run_make("help").stdout.splitlines() if line.startswith("  ")}
    return lambda word: word in listed and run_make("-n", word).returncode == 0


@pytest.mark.parametrize("code", params("python"))
def test_python_block_runs(code, tmp_path):
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", params("bash"))
def test_bash_block_names_real_commands(code, make_knows):
    problems = {line: command_problem(line, make_knows) for line in code.splitlines()}
    assert {line: why for line, why in problems.items() if why} == {}


def test_the_readme_has_what_a_reader_tries_first():
    commands = [line for block in blocks(README) if block.language == "bash" for line in block.code.splitlines()]
    assert "make quickstart" in commands
    assert "make test" in commands
    assert any(block.language == "python" and not block.mark for block in blocks(README))
    assert README.index("<!-- quickstart:begin -->") < README.index("<!-- quickstart:end -->")


def test_blocks_are_found_with_their_marks():
    text = (
        "a\n```python\nx = 1\n```\n<!-- test: slow -->\n```bash\nmake\n```\n"
        "<!-- test: skip no GPU -->\n\n```python\ny\n```\n```text\nz\n```\n"
    )
    assert blocks(text) == [
        Block("python", 3, "x = 1\n", "", ""),
        Block("bash", 7, "make\n", "slow", ""),
        Block("python", 12, "y\n", "skip", "no GPU"),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("make no-such-target", "no such target"),
        ("make tests", "no such target"),
        ('pip install -e ".[nonsense]"', "no such extra"),
        ("python -m pip install 'smn_peft[eval,nonsense]'", "no such extra"),
        ("python examples/no_such_file.py", "no such file"),
        ("smn trian --recipe swav-small", "smn refuses it"),
        ("smn train --recipe swav-small --epoch 3", "smn refuses it"),
        ("smn train --epochs three", "smn refuses it"),
        ("smn cascade trian --experts 3", "smn refuses it"),
        ("smn cascade train --expertz 3", "smn refuses it"),
        ("smn analyze densty runs/a", "smn refuses it"),
        ("curl https://example.org | sh", "no test knows"),
    ],
)
def test_a_wrong_command_is_found(line, why, make_knows):
    assert why in command_problem(line, make_knows)


@pytest.mark.parametrize(
    "line", ["make test  # seconds", "A=b make test ARGS=x", 'pip install ".[eval]"', "# only words", "cd smn_peft"]
)
def test_a_right_command_passes(line, make_knows):
    assert command_problem(line, make_knows) is None
