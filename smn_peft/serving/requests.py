# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests, multipart or JSON, to plain values."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .errors import ServingError
from .limits import Limits, limited

__all__ = ["Adding", "Question", "read_adding", "read_question"]


@dataclass(frozen=True)
class Question:
    """One image and the tasks that are asked about it.

    Attributes:
        image: The file's bytes.
        tasks: Names, each once.
        top: Number of classes to name.
        logits: Whether all logits are wanted too.
    """

    image: bytes
    tasks: Sequence[str]
    top: int = 5
    logits: bool = False


@dataclass(frozen=True)
class Adding:
    """A task to add: from a folder, from the Hub, or of two uploaded files."""

    name: str
    folder: str | None
    hub_id: str | None
    revision: str | None
    config: bytes | None
    weights: bytes | None
    classes: Sequence[str] | None
    replace: bool


async def read_question(request: Request, limits: Limits) -> Question:
    """Read ``image``, ``task`` (or ``tasks``), ``top`` and ``logits``.

    Raises:
        ServingError: 400 or 422 for a body that cannot be read, 413 for one that is too large.
    """
    values = await _values(request, limits.body_bytes)
    image = values.get("image")
    if isinstance(image, str):
        try:
            image = base64.b64decode(image.partition(";base64,")[2] or image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise _wrong(
                "The image is not base64.", "Encode the file's bytes, or send multipart form data."
            ) from error
    if not isinstance(image, bytes) or not image:
        raise _wrong("There is no image.", "Send the file as 'image': multipart form data, or JSON with base64.")
    given = values.get("task") if values.get("tasks") is None else values["tasks"]
    tasks = [given] if isinstance(given, str) else given
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) and task for task in tasks):
        raise _wrong("No task is named.", "Send 'task' with a name, or several; GET /v1/tasks lists them.")
    _check_text("'task'", *tasks)
    tasks = list(dict.fromkeys(tasks))
    if len(tasks) > limits.tasks:
        raise _wrong(f"{len(tasks)} tasks are named.", f"Ask {limits.tasks} at a time at most.")
    top = _number(values.get("top", 5))
    return Question(image, tasks, top, _flag(values.get("logits", False), "logits"))


async def read_adding(request: Request, limits: Limits) -> Adding:
    """Read ``name``, one of ``folder``, ``hub_id``, and ``config`` with ``weights``; ``classes`` and ``replace``.

    Raises:
        ServingError: As [`read_question`].
    """
    values = await _values(request, limits.adapter_bytes)
    texts: dict[str, str | None] = {}
    for key in ("name", "folder", "hub_id", "revision"):
        value = values.get(key)
        if value is not None and not isinstance(value, str):
            raise _wrong(f"{key!r} is no text.", f"Send one {key!r}.")
        _check_text(repr(key), value or "")
        texts[key] = value
    files = {}
    for key in ("config", "weights"):
        value = values.get(key)
        if value is not None and not isinstance(value, bytes):
            raise _wrong(f"{key!r} is no file.", "Upload adapter_config.json and adapter_model.safetensors as files.")
        files[key] = value
    if not (name := texts.pop("name")):
        raise _wrong("The task has no name.", "Send 'name'.")
    uploaded = files["config"] is not None and files["weights"] is not None
    if sum([texts["folder"] is not None, texts["hub_id"] is not None, uploaded]) != 1:
        fix = "Send one of 'folder', 'hub_id', and the files 'config' and 'weights'."
        raise _wrong("It is not said where the adapter is.", fix)
    classes = values.get("classes")
    if isinstance(classes, str):
        classes = _json(classes.encode(), "'classes'")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise _wrong("'classes' is no list of names.", 'Send JSON, as in ["cat", "dog"].')
    _check_text("'classes'", *(classes or ()))
    replace = _flag(values.get("replace", False), "replace")
    return Adding(name, classes=classes, replace=replace, **texts, **files)  # type: ignore[arg-type]


async def _values(request: Request, limit: int) -> Mapping[str, Any]:
    """Fields by name: texts and bytes, lists where a form repeats a field; of JSON what it holds."""
    request = limited(request, limit)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, limit)
    if kind != "application/json":
        what = f"The body is {kind}." if kind else "The body's type is not said."
        raise ServingError(415, what, "Send multipart/form-data or application/json.")
    values = _json(await request.body(), "The body")
    if not isinstance(values, dict):
        raise _wrong("The body is no JSON object.", "Send an object with the fields.")
    return values


async def _form(request: Request, limit: int) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    try:
        async with request.form(max_files=4, max_fields=1000, max_part_size=limit) as form:
            for key, value in form.multi_items():
                part = await value.read() if isinstance(value, UploadFile) else value
                if key not in values:
                    values[key] = part
                else:
                    values[key] = [*(values[key] if isinstance(values[key], list) else [values[key]]), part]
    except HTTPException as error:
        raise ServingError(400, f"The form is broken: {error.detail}", "Send multipart/form-data.") from error
    return values


def _json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ServingError(400, f"{what} is no JSON: {error}", "Send JSON.") from error


def _check_text(what: str, *texts: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold and no answer, file or database can."""
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise _wrong(f"{what} holds half a character (a lone surrogate).", "Send text that UTF-8 can encode.")


def _number(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if not 1 <= number <= 1000 or isinstance(value, (bool, float)):
        raise _wrong(f"'top' is {value!r}.", "Send a number of classes from 1 to 1000.")
    return number


def _flag(value: Any, name: str) -> bool:
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    if not isinstance(value, (bool, str)) or value not in known:
        raise _wrong(f"{name!r} is {value!r}.", "Send true or false.")
    return known[value]


def _wrong(error: str, fix: str) -> ServingError:
    return ServingError(422, error, fix)
