# SPDX-License-Identifier: Apache-2.0
"""`smn bank build|add|rm|rename|ls|info|verify|compact|export`: thousands of adapters in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..bank.store import DiskStore
from ..evaluation import format_fraction, markdown_table

__all__ = ["app"]

app = typer.Typer(help="A bank: thousands of adapters over one base, in one file.")

Bank = Annotated[Path, typer.Argument(help="Folder of the bank, or its .sqlite file.")]
Name = Annotated[str, typer.Argument(help="Name of a task.")]
Adapters = Annotated[
    list[str],
    typer.Argument(help="Folders or Hub ids of adapters, each under the last part of its name, or as NAME=FOLDER."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _opened(bank: Path, *, read_only: bool = False, create: bool = False) -> Iterator[DiskStore]:
    """A store, whose unknown names are errors of one line."""
    if not create and not bank.exists():
        raise FileNotFoundError(f"{bank} holds no bank: name its folder, or make one: smn bank build.")
    with DiskStore.open(bank, read_only=read_only) as store:
        try:
            yield store
        except KeyError as error:
            raise ValueError(str(error.args[0]).replace("bank.names", f"smn bank ls {bank}")) from error


def _named(adapters: Sequence[str]) -> list[tuple[str, str]]:
    """Names and places; what is a folder as it stands is no NAME=FOLDER."""
    pairs = []
    for adapter in adapters:
        name, is_named, place = adapter.partition("=")
        if not is_named or Path(adapter).is_dir():
            name, place = Path(adapter).resolve().name, adapter
        elif not (name and place):
            raise ValueError(f"{adapter!r} lacks one of its halves: NAME=FOLDER, as in birds=runs/birds/adapter.")
        pairs.append((name, place))
    return pairs


def _add(store: DiskStore, adapters: Sequence[str], replace: bool) -> None:
    pairs = _named(adapters)
    with tqdm(total=len(pairs), desc="adding", unit="task", disable=None) as bar:
        store.add_many(pairs, replace=replace, progress=bar.update)
    typer.echo(f"{store.path}: {len(store):,} tasks, {store.summary().bytes:,} bytes")


@app.command()
def build(bank: Bank, adapters: Adapters) -> None:
    """Make a bank of adapters."""
    with _opened(bank, create=True) as store:
        if len(store):
            raise ValueError(f"{bank} is a bank with {len(store):,} tasks: smn bank add puts adapters into it.")
        _add(store, adapters, replace=False)


@app.command()
def add(
    bank: Bank,
    adapters: Adapters,
    replace: Annotated[bool, typer.Option("--replace", help="In place of tasks of the same names.")] = False,
) -> None:
    """Put adapters into a bank, all or none; whoever reads it meanwhile is not disturbed."""
    with _opened(bank) as store:
        _add(store, adapters, replace)


@app.command()
def rm(bank: Bank, names: Annotated[list[str], typer.Argument(help="Names of tasks.")]) -> None:
    """Take tasks out, all or none; `smn bank compact` frees what room is left of them."""
    with _opened(bank) as store:
        store.remove_many(names)


@app.command()
def rename(bank: Bank, old: Name, new: Annotated[str, typer.Argument(help="Its other name.")]) -> None:
    """Give a task another name."""
    with _opened(bank) as store:
        store.rename(old, new)


@app.command()
def ls(bank: Bank, as_json: Json = False) -> None:
    """List the tasks: density, and bytes by what they are for."""
    with _opened(bank, read_only=True) as store:
        infos = store.infos()
    if as_json:
        typer.echo(json.dumps([asdict(info) for info in infos], indent=1))
        return
    rows = [
        {
            "task": info.name,
            "active %": format_fraction(info.density),
            **{what: f"{size:,}" for what, size in asdict(info.sizes).items()},
            "base": info.base or "",
            "added": info.added[:19],
        }
        for info in infos
    ]
    typer.echo(markdown_table(rows) if rows else f"{bank}: no tasks")


@app.command()
def info(
    bank: Bank,
    name: Annotated[str | None, typer.Argument(help="Name of a task; the whole bank without.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what is known of a bank, or of a task."""
    with _opened(bank, read_only=True) as store:
        facts = asdict(store.summary() if name is None else store.info(name))
        if name is not None:
            facts["config"] = dict(store.read(name).config)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, inner in parts:
            typer.echo(f"{f'{key} {part}'.strip():<32} {inner}")


@app.command()
def verify(bank: Bank) -> None:
    """Check every task, down to its decoded masks, and the file; exit code 1 if something is damaged."""
    with _opened(bank, read_only=True) as store:
        count, bad = 0, 0
        for check in tqdm(store.verify(), total=len(store), desc="verifying", unit="task", disable=None):
            count += 1
            if check.error is not None:
                bad += 1
                typer.echo(f"{check.name!r}: {check.error}", err=True)
    if bad:
        raise ValueError(f"{bad:,} of {count:,} tasks are damaged: add them again with --replace, or rm.")
    typer.echo(f"{bank}: {count:,} tasks, all whole")


@app.command()
def compact(bank: Bank) -> None:
    """Give the room of removed tasks back to the disk; whoever reads meanwhile is not disturbed."""
    with _opened(bank) as store:
        before, after = store.compact()
    typer.echo(f"{bank}: {before:,} -> {after:,} bytes")


@app.command()
def export(bank: Bank, name: Name, out: Annotated[Path, typer.Argument(help="Folder to write.")]) -> None:
    """Write a task's adapter as the folder that it came from; PEFT loads it."""
    with _opened(bank, read_only=True) as store:
        store.export(name, out)
