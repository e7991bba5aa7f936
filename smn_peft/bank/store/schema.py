# SPDX-License-Identifier: Apache-2.0
"""The index's tables, and the refusal of any other: a database from elsewhere could hold views and triggers."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ...storage import AdapterFileError

__all__ = ["LAYOUT", "check_schema", "create_schema", "is_new"]

LAYOUT = 1
"""Version of the store's layout."""
_APPLICATION = 0x534D4E42  # "SMNB", in the database's header
# Numbers of tasks are never given twice: a number stands for one content. What a listing reads stands before the rest.
_SCHEMA = (
    "CREATE TABLE shard (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, "
    "header_size INTEGER NOT NULL, header INTEGER NOT NULL)",
    "CREATE TABLE task (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, "
    "shard INTEGER NOT NULL REFERENCES shard (id), start INTEGER NOT NULL, size INTEGER NOT NULL, "
    "checksum INTEGER NOT NULL, added INTEGER NOT NULL, weights INTEGER NOT NULL, inactive INTEGER NOT NULL, "
    "mask INTEGER NOT NULL, head INTEGER NOT NULL, statistics INTEGER NOT NULL, scores INTEGER NOT NULL, "
    "base TEXT, fingerprint TEXT, codec TEXT NOT NULL, tensors BLOB NOT NULL, config BLOB NOT NULL)",
    "CREATE INDEX task_of_shard ON task (shard, size)",
)
_OWN = {"CREATE TABLE sqlite_sequence(name,seq)"}


def is_new(connection: sqlite3.Connection) -> bool:
    """Whether the database is empty."""
    (count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(count == 0)


def create_schema(connection: sqlite3.Connection) -> None:
    """Make the tables, inside the caller's transaction."""
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {LAYOUT}")


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse what is no index of this layout.

    Raises:
        AdapterFileError: If the tables are not those of the layout.
        ValueError: If it is another program's database, or of a later layout.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (layout,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise ValueError(f"{path} is no index of a bank: name the folder of one.")
    if layout > LAYOUT:
        raise ValueError(
            f"{path} has layout {layout}; this smn_peft reads up to {LAYOUT}. Upgrade it: pip install -U smn_peft."
        )
    limit = len(_SCHEMA) + len(_OWN) + 1
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT ?"
    if {sql for (sql,) in connection.execute(query, (limit,)).fetchall()} != {*_SCHEMA, *_OWN}:
        raise AdapterFileError(f"{path} does not hold a bank's tables: it is damaged. Fetch the bank again.")
