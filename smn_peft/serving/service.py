# SPDX-License-Identifier: Apache-2.0
"""`Service`: from a question to its answer, through decoding, batching and the bank."""

from __future__ import annotations

import asyncio
import bisect
import difflib
import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backbones import Backbone
from ..bank.bank import BASE, MaskBank
from ..data import evaluation_transform
from .adding import add_folder, add_from_hub, add_uploaded, adding_refused
from .batching import Batcher, Output
from .decoding import decoded
from .errors import ServingError, explained, explained_for_task
from .labels import class_names
from .limits import Limits, Room
from .metrics import Metrics
from .requests import Adding, Question

__all__ = ["Service"]

T = TypeVar("T")
_COMPARED = 64


class Service:
    """What the routes call.

    Attributes:
        bank: Its model is a `ServedModel`.
        limits: Bounds on requests.
        metrics: Figures of the server.
        room: Places for samples.
        draining: Whether the server is about to stop, finishes what it has and takes nothing more.
    """

    def __init__(
        self,
        bank: MaskBank,
        backbone: Backbone,
        *,
        limits: Limits | None = None,
        max_batch: int = 32,
        max_wait: float = 0.005,
    ) -> None:
        """Serve a bank.

        Args:
            bank: Over `backbone`'s model.
            backbone: How images are prepared.
            limits: Bounds on requests.
            max_batch: Samples in one forward.
            max_wait: Seconds that a sample waits for others.
        """
        self.bank, self.limits = bank, limits or Limits()
        self.metrics = Metrics(bank)
        self.draining = False
        self._backbone = backbone
        self._transform: Any = evaluation_transform(backbone.image_size, backbone.mean, backbone.std)
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "smn-decode")
        self._writer = ThreadPoolExecutor(1, "smn-write")
        self._batcher = Batcher(bank, max_batch=max_batch, max_wait=max_wait, watch=self.metrics.batch)
        self.room = Room(self.limits.queue, lambda: self._batcher.seconds_each)
        self.metrics.gauge("smn_queue_depth", "Samples that wait for a batch", lambda: self._batcher.depth)
        self.metrics.gauge("smn_places_taken", "Samples in the house", lambda: self.room.taken)

    def place(self) -> AbstractContextManager[None]:
        """A place for a request, before its body is read; it counts for its first task."""
        return self.room.place(1)

    async def predict(self, question: Question) -> dict[str, Any]:
        """The likeliest classes under each task."""
        return await self._answer(question, functools.partial(self._prediction, question))

    async def embed(self, question: Question) -> dict[str, Any]:
        """The features under each task, before its head."""
        return await self._answer(question, self._embedding)

    async def _answer(self, question: Question, form: Callable[[Output], dict[str, Any]]) -> dict[str, Any]:
        with self.room.place(len(question.tasks) - 1):
            started = time.perf_counter()
            image = await self._in(self._decoders, self._prepared, question)
            prepared = time.perf_counter()
            futures = [asyncio.wrap_future(self._batcher.submit(image, task)) for task in question.tasks]
            outputs = await asyncio.gather(*futures, return_exceptions=True)
        results, errors = [], []
        for task, output in zip(question.tasks, outputs, strict=True):
            try:
                if isinstance(output, BaseException):
                    raise explained_for_task(output, task)
                results.append({"task": task, **form(output), "latency_ms": _latency(output), "batch": output.batch})
            except ServingError as error:
                errors.append(error)
                results.append({"task": task, **error.body, "status": error.status})
        if len(errors) == len(results):
            raise errors[0]
        total = time.perf_counter() - started
        return {"results": results, "latency_ms": {"decode": _ms(prepared - started), "total": _ms(total)}}

    def _prepared(self, question: Question) -> Tensor:
        for task in question.tasks:
            if task != BASE and task not in self.bank:
                raise self._unknown(task)
        return decoded(question.image, self._transform, self.limits)

    def _prediction(self, question: Question, output: Output) -> dict[str, Any]:
        head = f"{self._backbone.model.head_name}.weight"
        if output.task is None or head not in output.task.tensors:
            what = "The base" if output.task is None else f"Task {output.task.name!r}"
            raise ServingError(422, f"{what} has no classes.", "Ask /v1/embed for its features.")
        _check_finite(output.logits, output.task.name)
        names = class_names(output.task.info) or []
        probabilities = output.logits.softmax(0)
        top = probabilities.topk(min(question.top, len(probabilities)))
        found = [
            {
                "index": index,
                "label": names[index] if index < len(names) else str(index),
                "probability": round(value, 6),
            }
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        return {"top": found, **({"logits": output.logits.tolist()} if question.logits else {})}

    @staticmethod
    def _embedding(output: Output) -> dict[str, Any]:
        _check_finite(output.features, BASE if output.task is None else output.task.name)
        return {"embedding": output.features.tolist()}

    async def tasks(self, query: str, offset: int, limit: int) -> dict[str, Any]:
        """Names that contain a text, sorted, a stretch of them."""

        def find() -> dict[str, Any]:
            names = self.bank.names
            found = [name for name in names if query.casefold() in name.casefold()]
            return {"total": len(names), "matched": len(found), "tasks": found[offset : offset + limit]}

        answer = await self._in(self._decoders, find)
        return {**answer, "base": self._backbone.name, "image_size": self._backbone.image_size}

    async def task(self, name: str) -> dict[str, Any]:
        """What is known of a task."""

        def describe() -> dict[str, Any]:
            if name not in self.bank:
                raise self._unknown(name)
            try:
                task = self.bank.task(name)
            except Exception as error:
                raise explained_for_task(error, name) from error
            head = task.tensors.get(f"{self._backbone.model.head_name}.weight")
            return {
                "name": name,
                "density": task.density,
                "decoded_bytes": task.nbytes,
                "classes": None if head is None else len(head),
                "labels": class_names(task.info),
                "base": task.info.get("base_model_name_or_path"),
                "base_fingerprint": task.info.get("base_fingerprint"),
            }

        return await self._in(self._decoders, describe)

    async def add(self, adding: Adding) -> dict[str, Any]:
        """Add a task; one change at a time."""

        def work() -> dict[str, Any]:
            name, replaced = adding.name, adding.name in self.bank
            if replaced and not adding.replace:
                raise ServingError(409, f"There is a task {name!r} already.", "Send replace=true, or another name.")
            try:
                if adding.config is not None and adding.weights is not None:
                    files = adding.config, adding.weights
                    add_uploaded(self.bank, name, *files, classes=adding.classes, replace=adding.replace)
                elif adding.hub_id is not None:
                    add_from_hub(self.bank, name, adding.hub_id, adding.revision, replace=adding.replace)
                else:
                    folder = Path(adding.folder or "")
                    add_folder(self.bank, name, folder, classes=adding.classes, replace=adding.replace)
            except Exception as error:
                raise adding_refused(error, name) or explained(error) from error
            return {"name": name, "replaced": replaced, "total": len(self.bank)}

        return await self._in(self._writer, work)

    async def remove(self, name: str) -> dict[str, Any]:
        """Take a task out; one change at a time."""

        def work() -> dict[str, Any]:
            try:
                self.bank.remove(name)
            except KeyError:
                raise self._unknown(name) from None
            except Exception as error:
                raise adding_refused(error, name) or explained(error) from error
            return {"name": name, "total": len(self.bank)}

        return await self._in(self._writer, work)

    def _unknown(self, name: str) -> ServingError:
        names = self.bank.names
        if len(names) > _COMPARED:  # comparing takes 0.1 ms a name: those that begin alike stand side by side
            place = bisect.bisect(names, name)
            names = names[max(0, place - _COMPARED // 2) : place + _COMPARED // 2]
        close = difflib.get_close_matches(name, names, n=3)
        fix = f"Did you mean {', '.join(close)}?" if close else "GET /v1/tasks lists the tasks."
        return ServingError(404, f"There is no task {name!r}.", fix)

    @staticmethod
    async def _in(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)

    def close(self) -> None:
        """Finish what was submitted, and let go of the bank."""
        self._batcher.close()
        self._decoders.shutdown()
        self._writer.shutdown()
        self.bank.close()


def _check_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        fix = "Add a sound adapter in its place; other tasks are served."
        raise ServingError(500, f"Task {name!r} gives values that are not finite.", fix)


def _latency(output: Output) -> dict[str, float]:
    return {"queue": _ms(output.waited), "model": _ms(output.ran)}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
