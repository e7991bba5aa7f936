# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests, multipart or JSON, to checked values."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .errors import ServingError
from .limits import Limits

__all__ = ["NAME_LENGTH", "Adding", "Question", "read_adding", "read_question"]

NAME_LENGTH = 1000
"""Characters of a task's name; a bank bounds its own further."""
# JSON that holds more of these is made to take long: base64 has none, and a question needs a few.
_PARTS_OF_QUESTION, _PARTS_OF_ADDING = 10_000, 200_000


def _image(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            value = base64.b64decode(value.partition(";base64,")[2] or value, validate=True)
        except (binascii.Error, ValueError):
            raise PydanticCustomError("base64", "it is not base64") from None
    if not isinstance(value, bytes) or not value:
        raise PydanticCustomError("image", "There is no image")
    return value


def _file(value: Any) -> bytes | None:
    if value is not None and not isinstance(value, bytes):
        raise PydanticCustomError("file", "it is no file")
    return value


def _classes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return from_json(value)
    except ValueError as error:
        raise PydanticCustomError("json_invalid", str(error)) from None


Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH)]
Id = Annotated[str, Field(max_length=200)]


class Question(BaseModel):
    """One image and the tasks that are asked about it.

    Attributes:
        image: The file's bytes.
        tasks: Names, each once; the field `task` is the same.
        top: Number of classes to name.
        logits: Whether all logits are wanted too.
    """

    model_config = ConfigDict(frozen=True)
    image: Annotated[bytes, BeforeValidator(_image)]
    tasks: Annotated[
        list[Name],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        AfterValidator(lambda names: list(dict.fromkeys(names))),
        Field(min_length=1, validation_alias=AliasChoices("tasks", "task")),
    ]
    top: Annotated[int, Field(ge=1, le=1000)] = 5
    logits: bool = False


class Adding(BaseModel):
    """A task to add: from a folder, from the Hub, or of two uploaded files."""

    model_config = ConfigDict(frozen=True)
    name: Name
    folder: Annotated[str, Field(max_length=4096)] | None = None
    hub_id: Id | None = None
    revision: Id | None = None
    config: Annotated[bytes | None, BeforeValidator(_file)] = None
    weights: Annotated[bytes | None, BeforeValidator(_file)] = None
    classes: Annotated[list[Annotated[str, Field(max_length=1000)]] | None, BeforeValidator(_classes)] = None
    replace: bool = False


M = TypeVar("M", Question, Adding)


async def read_question(request: Request, limits: Limits) -> Question:
    """Read ``image``, ``task`` (or ``tasks``), ``top`` and ``logits`` of a `limited` request.

    Raises:
        ServingError: 400 or 422 for a body that cannot be read, 413 for one that is too large.
    """
    question = await _read(Question, request, limits.body_bytes, _PARTS_OF_QUESTION)
    if len(question.tasks) > limits.tasks:
        raise ServingError(422, f"{len(question.tasks)} tasks are named.", f"Ask {limits.tasks} at a time at most.")
    return question


async def read_adding(request: Request, limits: Limits) -> Adding:
    """Read ``name``, one of ``folder``, ``hub_id``, and ``config`` with ``weights``; ``classes`` and ``replace``.

    Raises:
        ServingError: As [`read_question`].
    """
    adding = await _read(Adding, request, limits.adapter_bytes, _PARTS_OF_ADDING)
    uploaded = adding.config is not None and adding.weights is not None
    if sum([adding.folder is not None, adding.hub_id is not None, uploaded]) != 1:
        fix = "Send one of 'folder', 'hub_id', and the files 'config' and 'weights'."
        raise ServingError(422, "It is not said where the adapter is.", fix)
    return adding


async def _read(model: type[M], request: Request, limit: int, parts: int) -> M:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8"):  # some of Python's codecs take quadratic time
        what = f"The body's charset is {charset.decode('latin-1')[:100]!r}."
        raise ServingError(415, what, "Send text in UTF-8.")
    try:
        if kind == b"multipart/form-data":
            return model.model_validate(await _form(request, limit))
        if kind != b"application/json":
            what = f"The body is {kind.decode('latin-1')[:100]!r}." if kind else "The body's type is not said."
            raise ServingError(415, what, "Send multipart/form-data or application/json.")
        body = await request.body()
        return await run_in_threadpool(_parsed, model, body, parts)
    except ValidationError as error:
        raise _refusal(error) from None


def _parsed(model: type[M], body: bytes, parts: int) -> M:
    """One call that keeps every other thread waiting: so what it would read is counted before."""
    if sum(body.count(character) for character in (b",", b"[", b"{")) > parts:
        raise ServingError(422, f"The body has more than {parts} parts.", "Send the fields alone.")
    return model.model_validate_json(body)


async def _form(request: Request, limit: int) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    try:
        async with request.form(max_files=4, max_fields=200, max_part_size=limit) as form:
            for key in form:
                read = [await v.read() if isinstance(v, UploadFile) else v for v in form.getlist(key)]
                values[key] = read if len(read) > 1 else read[0]
    except HTTPException as error:
        raise ServingError(400, f"The form is broken: {error.detail}", "Send multipart/form-data.") from error
    return values


_FIXES = {
    "image": "Send the file as 'image': multipart form data, or JSON with base64.",
    "task": "Send 'task' with a name, or several; GET /v1/tasks lists them.",
    "tasks": "Send 'task' with a name, or several; GET /v1/tasks lists them.",
    "top": "Send a number of classes from 1 to 1000.",
    "name": "Send 'name'.",
    "config": "Upload adapter_config.json and adapter_model.safetensors as files.",
    "weights": "Upload adapter_config.json and adapter_model.safetensors as files.",
    "classes": 'Send JSON, as in ["cat", "dog"].',
}
_MISSING = {"image": "There is no image.", "tasks": "No task is named.", "name": "The task has no name."}


def _refusal(error: ValidationError) -> ServingError:
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = str(found["loc"][0]) if found["loc"] else "The body"
    what = field if not found["loc"] else f"{field!r}"
    if found["type"] == "json_invalid":
        if "hex escape" in found["msg"]:
            return ServingError(422, f"{what} holds half a character (a lone surrogate).", "Send text in UTF-8.")
        return ServingError(400, f"{what} is no JSON: {found['msg'][:200]}", "Send JSON.")
    if found["type"] == "missing":
        return ServingError(422, _MISSING.get(field, f"{what} is missing."), _FIXES.get(field, "Send it."))
    return ServingError(422, f"{what}: {found['msg'][:200]}.", _FIXES.get(field, "Correct it."))
