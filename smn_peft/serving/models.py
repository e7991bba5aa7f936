# SPDX-License-Identifier: Apache-2.0
"""What clients send and what they are answered, as pydantic models; and how a body becomes one."""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .limits import ServingError

NAME_LENGTH = 1000
"""Characters of a task's name; a bank bounds its own further."""


def _image(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            value = base64.b64decode(value.partition(";base64,")[2] or value, validate=True)
        except ValueError:
            raise PydanticCustomError("base64", "it is not base64") from None
    if not isinstance(value, bytes) or not value:
        raise PydanticCustomError("image", "There is no image")
    return value


def _from_json(value: Any) -> Any:
    try:
        return from_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise PydanticCustomError("json_invalid", str(error)) from None


Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH)]
Id = Annotated[str, Field(max_length=200)]


class _Sent(BaseModel):
    model_config = ConfigDict(frozen=True)
    # JSON with more of its separators is made to take long: base64 has none, and a question needs a few.
    max_parts: ClassVar[int]


class Question(_Sent):
    """One image and the tasks that are asked about it."""

    max_parts = 10_000
    image: Annotated[bytes, BeforeValidator(_image)] = Field(description="Image file; in JSON as base64.")
    tasks: Annotated[
        list[Name],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        AfterValidator(lambda names: list(dict.fromkeys(names))),
    ] = Field(
        min_length=1,
        validation_alias=AliasChoices("task", "tasks"),
        description='Names of tasks, which GET /v1/models lists; "__base__" is the base.',
    )
    top: int = Field(5, ge=1, le=1000, description="Number of classes to name.")
    logits: bool = Field(False, description="Whether to return all logits too.")


class Inputs(_Sent):
    """Images to embed under one task, in OpenAI's form."""

    max_parts = 10_000
    model: Name = Field(description="Name of a task, alone or after the base's, \"base:task\"; or the base's name.")
    input: Annotated[
        list[Annotated[bytes, BeforeValidator(_image)]],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    ] = Field(min_length=1, description='Images as data URLs, "data:image/png;base64,…".')
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32.")
    dimensions: None = Field(None, description="Features are given whole: leave it out.")


class NewTask(_Sent):
    """A task to add: a folder of the server, a repository on the Hub, or two uploaded files."""

    max_parts = 200_000
    name: Name
    folder: str | None = Field(None, max_length=4096, description="Folder of an adapter where the server runs.")
    hub_id: Id | None = Field(None, pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="Repository on the Hub, user/name.")
    revision: Id | None = Field(None, description="Git revision on the Hub.")
    config: bytes | None = Field(None, description="The file adapter_config.json.")
    weights: bytes | None = Field(None, description="The file adapter_model.safetensors.")
    classes: Annotated[list[Annotated[str, Field(max_length=1000)]] | None, BeforeValidator(_from_json)] = Field(
        None, description="Names of the classes; in a form as JSON."
    )
    replace: bool = Field(False, description="Whether to replace the task of this name.")

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> NewTask:
        uploaded = self.config is not None and self.weights is not None
        if sum([self.folder is not None, self.hub_id is not None, uploaded]) != 1:
            one = "one of 'folder', 'hub_id', and the files 'config' and 'weights'"
            raise PydanticCustomError("source", f"it is not said where the adapter is: {one}")
        return self


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Answer):
    """A refusal."""

    error: str = Field(description="What is wrong.")
    fix: str = Field(description="What to do about it.")


class TaskError(Error):
    """Why one of several tasks gave no answer."""

    task: str
    status: int = Field(description="HTTP status that this task alone would have given.")


class _Result(_Answer):
    task: str
    latency_ms: dict[Literal["queue", "model"], float] = Field(description="Until its batch began, and in it.")
    batch: int = Field(description="Samples in its batch.")
    warning: str | None = Field(None, description="How the image was prepared otherwise than the task was trained.")


class ClassProbability(_Answer):
    """One class."""

    index: int
    label: str = Field(description="Its name; its index where the adapter names no classes.")
    probability: float


class Prediction(_Result):
    """The likeliest classes under one task."""

    top: list[ClassProbability]
    logits: list[float] | None = None


class Results(_Answer):
    """One result per task, in the order of the question."""

    results: list[Prediction | TaskError]
    latency_ms: dict[Literal["decode", "total"], float] = Field(description="Until the image was ready, and all.")


class Embedding(_Answer):
    """The features of an image, before the task's head."""

    object: Literal["embedding"]
    index: int = Field(description="Place of the image in the input.")
    embedding: list[float] | str


class Usage(_Answer):
    """Tokens, of which images have none."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(_Answer):
    """One embedding per image, in the order of the input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage
    warning: str | None = Field(None, description="How the images were prepared otherwise than the task was trained.")


class Model(_Answer):
    """A task, as OpenAI lists models."""

    id: str = Field(description="Name of the task.")
    object: Literal["model"]
    created: int = Field(description="When the server was started, in seconds since 1970.")
    owned_by: str
    parent: str = Field(description="Name of the base.")


class ModelList(_Answer):
    """A page of the tasks, sorted by name."""

    object: Literal["list"]
    data: list[Model]
    has_more: bool = Field(description="Whether others follow; ask for those after the last.")
    total: int = Field(description="Tasks in the bank.")
    base: str
    image_size: int


class Preprocessing(_Answer):
    """How images are prepared."""

    image_size: int
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float


class TaskFacts(Model):
    """What is known of a task."""

    density: float
    decoded_bytes: int
    classes: int | None
    labels: list[str] | None = Field(description="Names of its first 1000 classes.")
    base: str | None
    base_fingerprint: str | None
    preprocessing: Preprocessing
    warning: str | None = Field(None, description="How images are prepared otherwise than it was trained.")


class Changed(_Answer):
    """A task that was added or removed."""

    name: str
    total: int = Field(description="Tasks in the bank now.")
    replaced: bool | None = Field(None, description="Whether an added task took the place of another.")


class Health(_Answer):
    """Whether the server takes requests."""

    status: Literal["ok", "draining"]
    tasks: int


M = TypeVar("M", bound=_Sent)


async def read(model: type[M], request: Request, limit: int) -> M:
    """Read the body of a `limited` request; `ServingError` 400, 415 or 422 for one that cannot be read."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8"):  # some of Python's codecs take quadratic time
        raise ServingError(415, f"The body's charset is {charset[:100].decode('latin-1')!r}.", "Send text in UTF-8.")
    try:
        if kind == b"multipart/form-data":
            return model.model_validate(await _form(request, limit))
        if kind != b"application/json":
            what = f"The body is {kind[:100].decode('latin-1')!r}." if kind else "The body's type is not said."
            raise ServingError(415, what, "Send multipart/form-data or application/json.")
        return await run_in_threadpool(_parsed, model, await request.body())
    except ValidationError as error:
        raise _refusal(error, model) from None


def _parsed(model: type[M], body: bytes) -> M:
    """Parse JSON, which keeps every other thread waiting: its parts are counted before."""
    if sum(body.count(character) for character in (b",", b"[", b"{")) > model.max_parts:
        raise ServingError(422, f"The body has more than {model.max_parts} parts.", "Send the fields alone.")
    return model.model_validate_json(body)


async def _form(request: Request, limit: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        async with request.form(max_files=4, max_fields=200, max_part_size=limit) as form:
            for key in form:
                read = [await v.read() if isinstance(v, UploadFile) else v for v in form.getlist(key)]
                values[key] = read if len(read) > 1 else read[0]
    except HTTPException as error:
        raise ServingError(400, f"The form is broken: {error.detail}", "Send multipart/form-data.") from error
    return values


def _refusal(error: ValidationError, model: type[BaseModel]) -> ServingError:
    """The first error of a body; what its field wants is the remedy."""
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    kind, why, field = found["type"], found["msg"][:200], str(found["loc"][0]) if found["loc"] else ""
    what = repr(field) if field else "The body"
    if "hex escape" in why:
        return ServingError(422, f"{what} holds half a character (a lone surrogate).", "Send text in UTF-8.")
    if kind == "json_invalid":
        return ServingError(400, f"{what} is no JSON: {why}", "Send JSON.")
    wanted = model.model_fields.get("tasks" if field == "task" else field)
    fix = f"Send {what}. {wanted.description or ''}".strip() if wanted else "Send the fields of /openapi.json."
    return ServingError(422, f"{what} is missing." if kind == "missing" else f"{what}: {why}.", fix)
