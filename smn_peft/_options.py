# SPDX-License-Identifier: Apache-2.0
"""Options as dataclass fields: default, help and range are written once, and values are checked against them."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
import operator
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

T = TypeVar("T")
get_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)

_COMPARISONS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
# Fields of a mask's configuration that are written by the package, not by users.
_WRITTEN = ("preprocessing", "id2label", "format_version", "base_fingerprint", "unmasked_fingerprint")


def option(default: Any, help: str, **limits: float) -> Any:
    """Declare a dataclass field: a default, copied for each instance if it is mutable, or a class to call for one.

    [`check_options`] compares the value with `limits`: `least`, `above`, `most`, `below`.
    """
    metadata = {"help": help, "limits": limits}
    if isinstance(default, (dict, list, set, type)):
        return field(default_factory=default if isinstance(default, type) else default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """Check every field of a dataclass against its limits and its `Literal` type; ValueError names the field."""
    hints = get_type_hints(type(options))
    for each in fields(options):
        value, members = getattr(options, each.name), members_of(hints[each.name])
        or_none = ", or None" if NoneType in members else ""
        if value is None and or_none:
            continue
        if get_origin(members[0]) is Literal and value not in get_args(members[0]):
            raise ValueError(f"{each.name} must be one of {', '.join(get_args(members[0]))}{or_none}; got {value!r}.")
        limits = each.metadata.get("limits", {})
        in_range = (_COMPARISONS[kind][1](value, limit) for kind, limit in limits.items())
        if limits and not (math.isfinite(value) and all(in_range)):
            wanted = " and ".join(f"{_COMPARISONS[kind][0]} {limit}" for kind, limit in limits.items())
            raise ValueError(f"{each.name} must be {wanted}{or_none}; got {value}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean X?`` with the closest known name, or nothing where none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the later ones win."""
    result: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def user_fields(kind: type) -> dict[str, Field[Any]]:
    """Fields that users set: those with help, without what a dataclass inherits from another library."""
    package = kind.__module__.partition(".")[0]
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == package]
    own = {name for base in bases for name in inspect.get_annotations(base)} - set(_WRITTEN)
    return {each.name: each for each in fields(kind) if "help" in each.metadata and each.name in own}


def read_values(
    kind: type, values: Mapping[str, Any], where: str, *, build: bool = False, prefix: str = ""
) -> dict[str, Any]:
    """Convert what YAML or JSON holds to the types of a dataclass's fields, strictly: no bool or fraction is an int.

    `where` begins messages, `prefix` is the path of `kind` in an outer dataclass. With `build`, nested dataclasses are
    constructed and every field is taken, not only what users set. ValueError names the field that is wrong.
    """
    hints = get_type_hints(kind)
    known = [each.name for each in fields(kind)] if build else list(user_fields(kind))
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in known:
            close = did_you_mean(path, [f"{prefix}{name}" for name in known])
            raise ValueError(f"{where}: unknown option {path!r}.{close}")
        hint = hints[key]
        if not is_dataclass(hint):
            found[key] = _typed(value, hint, f"{where}: {path}")
        elif isinstance(value, Mapping):
            inner = read_values(hint, value, where, build=build, prefix=f"{path}.")  # type: ignore[arg-type]
            found[key] = hint(**inner) if build else inner  # type: ignore[operator]
        elif is_dataclass(value):
            found[key] = value
        else:
            raise ValueError(f"{where}: {path} has values of its own, such as {path}: {{…}}; got {value!r}.")
    return found


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from what YAML or JSON holds; raises as [`read_values`]."""
    return kind(**read_values(kind, values, where, build=True))


def from_words(words: Sequence[str], hint: Any) -> Any:
    """Words of the command line as a value of a type, "none" as None where it allows that; else ValueError."""
    members = members_of(hint)
    if NoneType in members and [word.lower() for word in words] in (["none"], ["null"]):
        return None
    if any(get_origin(member) is dict for member in members):
        if not all(re.match("[^=]+=", word) for word in words):
            raise ValueError("not key=value")
        return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    if len(words) == 1:  # one word is one value where the type takes that: a regex
        with suppress(ValueError):
            return _adapter(hint).validate_python(words[0])
    return _adapter(hint).validate_python(list(words))


def _typed(value: Any, hint: Any, where: str) -> Any:
    adapter = _adapter(hint)
    with suppress(ValueError):
        return adapter.validate_python(value, strict=True)
    with suppress(ValueError, TypeError):  # TypeError: a key that JSON does not have
        text = json.dumps(value, default=lambda other: sorted(other) if isinstance(other, set) else str(other))
        return adapter.validate_json(text, strict=True)
    if isinstance(value, str):  # such as 1e-3, which YAML does not take for a number
        with suppress(ValueError, yaml.YAMLError):
            return from_words([value], hint)
    raise ValueError(f"{where} must be {describe(hint)}; got {value!r}.")


def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter  # on use: `import smn_peft` is done without

    return TypeAdapter(hint, config={"arbitrary_types_allowed": True})


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union; another type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_list(hint: Any) -> bool:
    """Whether a type holds any number of values: list, set or tuple[T, …]."""
    return get_origin(hint) in (list, set) or (get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis)


def describe(hint: Any) -> str:
    """The type in a user's words, such as "int or none"."""
    members, inner = members_of(hint), get_args(hint)
    if len(members) > 1:
        return " or ".join(map(describe, members))
    if get_origin(hint) is Literal:
        return "|".join(map(str, inner))
    if is_list(hint):
        return f"list of {describe(inner[0])}"
    if get_origin(hint) is tuple:
        return f"({', '.join(map(describe, inner))})"
    names = {NoneType: "none", bool: "true or false", dict: "key=value"}
    return names.get(get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))
