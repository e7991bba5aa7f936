# SPDX-License-Identifier: Apache-2.0
"""`smn bank build|add|rm|…` and `smn serve`: thousands of adapters in one file, on disk and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ..bank.store import DiskStore
from ..evaluation import format_fraction, markdown_table
from ..serving.settings import Settings
from .options import PATH, Group, field_options, given

_bank = click.argument("bank", type=PATH)
_adapters = click.argument("adapters", nargs=-1, required=True)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("bank", cls=Group)
def bank() -> None:
    """A bank: thousands of adapters over one base, in one file.

    BANK is the bank's folder, or its .sqlite file. ADAPTERS are folders or Hub ids, each a task under the last part of
    its name, or as NAME=FOLDER.
    """


@contextmanager
def _opened(path: Path, *, read_only: bool = False, create: bool = False, timeout: float = 5.0) -> Iterator[DiskStore]:
    """Open a store; its unknown names become errors of one line."""
    if not create and not path.exists():
        raise FileNotFoundError(f"{path} holds no bank: name its folder, or make one: smn bank build.")
    with DiskStore(path, read_only=read_only, timeout=timeout) as store:
        try:
            yield store
        except KeyError as error:
            raise ValueError(str(error.args[0]).replace("bank.names", f"smn bank ls {path}")) from error


def _named(adapter: str) -> tuple[str, str]:
    """Split NAME=FOLDER; what is a folder as it stands has its last part as name."""
    name, is_named, place = adapter.partition("=")
    if not is_named or Path(adapter).is_dir():
        return Path(adapter).resolve().name, adapter
    if not (name and place):
        raise ValueError(f"{adapter!r} lacks one of its halves: NAME=FOLDER, as in birds=runs/birds/adapter.")
    return name, place


def _add(store: DiskStore, adapters: Sequence[str], replace: bool = False) -> None:
    pairs = [_named(adapter) for adapter in adapters]
    with tqdm(total=len(pairs), desc="adding", unit="task", disable=None) as bar:
        store.add_many(pairs, replace=replace, progress=bar.update)
    click.echo(f"{store.path}: {len(store):,} tasks, {store.summary().bytes:,} bytes")


@bank.command("build")
@_bank
@_adapters
def _build(bank: Path, adapters: tuple[str, ...]) -> None:
    """Make a bank of adapters."""
    with _opened(bank, create=True) as store:
        if len(store):
            raise ValueError(f"{bank} is a bank with {len(store):,} tasks: smn bank add puts adapters into it.")
        _add(store, adapters)


@bank.command("add")
@_bank
@_adapters
@click.option("--replace", is_flag=True, help="In place of tasks of the same names.")
@click.option("--timeout", type=float, default=5.0, help="Seconds to wait while another process writes.")
def _add_tasks(bank: Path, adapters: tuple[str, ...], replace: bool, timeout: float) -> None:
    """Put adapters into a bank, all or none; whoever reads it meanwhile is not disturbed."""
    with _opened(bank, timeout=timeout) as store:
        _add(store, adapters, replace)


@bank.command("rm")
@_bank
@click.argument("names", nargs=-1, required=True)
def _remove(bank: Path, names: tuple[str, ...]) -> None:
    """Take tasks out, all or none; `smn bank compact` frees what room is left of them."""
    with _opened(bank) as store:
        store.remove_many(names)


@bank.command("rename")
@_bank
@click.argument("old")
@click.argument("new")
def _rename(bank: Path, old: str, new: str) -> None:
    """Give a task another name."""
    with _opened(bank) as store:
        store.rename(old, new)


@bank.command("ls")
@_bank
@_as_json
def _list(bank: Path, as_json: bool) -> None:
    """List the tasks: density, and bytes by what they are for."""
    with _opened(bank, read_only=True) as store:
        infos = store.infos()
    if as_json:
        click.echo(json.dumps([asdict(info) for info in infos], indent=1))
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
    click.echo(markdown_table(rows) if rows else f"{bank}: no tasks")


@bank.command("info")
@_bank
@click.argument("name", required=False)
@_as_json
def _info(bank: Path, name: str | None, as_json: bool) -> None:
    """Tell what is known of a bank, or of the task that is named."""
    with _opened(bank, read_only=True) as store:
        facts = asdict(store.summary() if name is None else store.info(name))
        if name is not None:
            facts["config"] = dict(store.read(name).config)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        for part, inner in value.items() if isinstance(value, dict) else [("", value)]:
            click.echo(f"{f'{key} {part}'.strip():<32} {inner}")


@bank.command("verify")
@_bank
def _verify(bank: Path) -> None:
    """Check every task, down to its decoded masks, and the file; exit code 1 if something is damaged."""
    with _opened(bank, read_only=True) as store:
        checks = list(tqdm(store.verify(), total=len(store), desc="verifying", unit="task", disable=None))
    bad = [f"{check.name!r}: {check.error}" for check in checks if check.error is not None]
    if bad:
        click.echo("\n".join(bad), err=True)
        raise ValueError(f"{len(bad):,} of {len(checks):,} tasks are damaged: add them again with --replace, or rm.")
    click.echo(f"{bank}: {len(checks):,} tasks, all whole")


@bank.command("compact")
@_bank
def _compact(bank: Path) -> None:
    """Give the room of removed tasks back to the disk; whoever reads meanwhile is not disturbed."""
    with _opened(bank) as store:
        before, after = store.compact()
    click.echo(f"{bank}: {before:,} -> {after:,} bytes")


@bank.command("export")
@_bank
@click.argument("name")
@click.argument("out", type=PATH)
def _export(bank: Path, name: str, out: Path) -> None:
    """Write a task's adapter as the folder that it came from; PEFT loads it."""
    with _opened(bank, read_only=True) as store:
        store.export(name, out)


@click.command("serve")
@click.argument("bank")
@click.option("--base", required=True, help="Base of the tasks: Hub id, timm name, folder, or file.py:function.")
@click.option("--host", default="127.0.0.1", help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port; 0 takes a free one.")
@click.option("--workers", type=click.IntRange(1), default=1, help="Processes that share the port.")
@field_options(Settings)
@click.pass_context
def serve(context: click.Context, bank: str, base: str, host: str, port: int, workers: int, **_: Any) -> None:
    """Serve predictions and embeddings of a bank's tasks over HTTP, with a page to try them at /.

    BANK is a bank: its folder or file, user/name on the Hub, or the URL of its file (s3://…, hf://…), which is copied;
    or the folder of an adapter, or of several adapters' folders.
    """
    try:
        from ..serving.app import key_from, make_server, run_workers
        from ..serving.service import Service
    except ImportError as error:
        raise ImportError(f'smn serve needs the extra serve ({error.name}): pip install "smn_peft[serve]"') from error
    try:
        settings = Settings(bank, base, **given(context, Settings))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if workers > 1:
        run_workers(settings, workers, host=host, port=port)
        return
    key = key_from(settings.api_key_env)
    service = Service.open(settings)
    click.echo(f"{len(service.bank)} tasks", err=True)
    make_server(service, host=host, port=port, api_key=key, allowed_hosts=settings.allowed_hosts).run()
