# SPDX-License-Identifier: Apache-2.0
"""`Service`: from a question to its answer, through decoding, batching and the bank."""

from __future__ import annotations

import asyncio
import bisect
import difflib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..backbones import Backbone
from ..bank.bank import BASE, MaskBank
from .adding import add_task, adding_refused
from .batching import Batcher, Output
from .decoding import opened, pixels_of
from .errors import ServingError, explained, explained_for_task
from .labels import class_name, class_names
from .limits import Bodies, Limits, Room
from .metrics import Metrics
from .preparation import Preparations
from .requests import Adding, Question
from .workers import Workers

__all__ = ["Service"]

_COMPARED = 64
_LABELS = 1000
# What is larger waits for other such images, so that few of them are in memory and small ones pass.
_LARGE_BYTES, _LARGE_PIXELS = 2 << 20, 4_000_000

Way = dict[str, Any] | ServingError


class Service:
    """What the routes call.

    Attributes:
        bank: Its model is a `ServedModel`.
        limits: Bounds on requests.
        metrics: Figures of the server.
        room: Places for samples.
        bodies: Bytes of the questions that are being read or answered.
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
        image_size: int | None = None,
    ) -> None:
        """Serve a bank.

        Args:
            bank: Over `backbone`'s model.
            backbone: How images are prepared for tasks that do not say it.
            limits: Bounds on requests.
            max_batch: Samples in one forward.
            max_wait: Seconds that a sample waits for others.
            image_size: Pixels of a side for every task, whatever it was trained on.
        """
        self.bank, self.limits = bank, limits or Limits()
        self.metrics = Metrics(bank)
        self.draining = False
        self._backbone = backbone
        self._preparations = Preparations(backbone, image_size)
        decoders = min(4, os.cpu_count() or 1)
        self._decoders = Workers(decoders, "smn-decode")
        self._large = Workers(max(1, decoders // 2), "smn-decode-large")
        self._lookups = Workers(2, "smn-lookup")
        self._writer = Workers(1, "smn-write")
        self._batcher = Batcher(bank, max_batch=max_batch, max_wait=max_wait, watch=self.metrics.batch)
        self.room = Room(self.limits.queue, lambda: self._batcher.seconds_each)
        self.bodies = Bodies(self.limits.bodies_bytes)
        self.metrics.gauge("smn_queue_depth", "Samples that wait for a batch", lambda: self._batcher.depth)
        self.metrics.gauge("smn_places_taken", "Samples in the house", lambda: self.room.taken)

    def place(self, question: Question) -> AbstractContextManager[None]:
        """Places for a question's samples."""
        return self.room.place(len(question.tasks))

    async def predict(self, question: Question) -> bytes:
        """The likeliest classes under each task, as JSON."""
        return await self._answer(question, functools.partial(self._prediction, question))

    async def embed(self, question: Question) -> bytes:
        """The features under each task, before its head, as JSON."""
        return await self._answer(question, self._embedding)

    async def _answer(self, question: Question, form: Callable[[Output], dict[str, Any]]) -> bytes:
        started = time.perf_counter()
        pool = self._large if len(question.image) > _LARGE_BYTES else self._decoders
        image, ways = await pool.run(self._opened, question)
        if image.width * image.height > _LARGE_PIXELS:
            pool = self._large
        images = await pool.run(self._prepared, image, ways)
        del image
        prepared = time.perf_counter()
        asked = [self._output(*each) for each in zip(images, question.tasks, strict=True)]
        outputs = await asyncio.gather(*asked, return_exceptions=True)

        def formed() -> bytes:
            results, errors = [], []
            for task, way, output in zip(question.tasks, ways, outputs, strict=True):
                try:
                    if isinstance(output, BaseException):
                        raise explained_for_task(output, task)
                    self._check_unchanged(output, way)
                    timing = {"latency_ms": _latency(output), "batch": output.batch}
                    results.append({"task": task, **form(output), **timing, **self._said(output)})
                except ServingError as error:
                    errors.append(error)
                    results.append({"task": task, **error.body, "status": error.status})
            if len(errors) == len(results):
                raise errors[0]
            total = time.perf_counter() - started
            return _rendered(results, {"decode": _ms(prepared - started), "total": _ms(total)})

        return await self._lookups.run(formed)

    def _opened(self, question: Question) -> tuple[Image.Image, list[Way]]:
        """The image's header, and how it is prepared for each task."""
        for task in question.tasks:
            if task != BASE and task not in self.bank:
                raise self._unknown(task)
        return opened(question.image, self.limits), [self._way(task) for task in question.tasks]

    def _way(self, task: str) -> Way:
        try:
            return self._preparations.used({} if task == BASE else self.bank.config(task))
        except Exception as error:  # this task's trouble alone
            return explained_for_task(error, task)

    @staticmethod
    def _prepared(image: Image.Image, ways: Sequence[Way]) -> list[Tensor | ServingError]:
        images = iter(Preparations.apply(pixels_of(image), [way for way in ways if isinstance(way, dict)]))
        return [next(images) if isinstance(way, dict) else way for way in ways]

    async def _output(self, image: Tensor | ServingError, task: str) -> Output:
        if isinstance(image, ServingError):
            raise image
        return await asyncio.wrap_future(self._batcher.submit(image, task))

    def _check_unchanged(self, output: Output, way: Way) -> None:
        if output.task is not None and self._preparations.used(output.task.info) != way:
            what = f"Task {output.task.name!r} was replaced meanwhile."
            raise ServingError(503, what, "Ask again.", {"Retry-After": "1"})

    def _said(self, output: Output) -> dict[str, str]:
        difference = None if output.task is None else self._preparations.difference(output.task.info)
        return {} if difference is None else {"warning": difference}

    def _prediction(self, question: Question, output: Output) -> dict[str, Any]:
        head = f"{self._backbone.model.head_name}.weight"
        if output.task is None or head not in output.task.tensors:
            what = "The base" if output.task is None else f"Task {output.task.name!r}"
            raise ServingError(422, f"{what} has no classes.", "Ask /v1/embed for its features.")
        if question.logits and len(output.logits) > self.limits.classes:
            what = f"Task {output.task.name!r} has {len(output.logits)} classes."
            raise ServingError(422, what, f"Logits are given up to {self.limits.classes}: ask for the 'top' alone.")
        _check_finite(output.logits, output.task.name)
        probabilities = output.logits.softmax(0)
        top = probabilities.topk(min(question.top, len(probabilities)))
        found = [
            {"index": index, "label": class_name(output.task.info, index), "probability": round(value, 6)}
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
            names, part = self.bank.names, query.casefold()
            found = [name for name in names if part in name.casefold()]
            return {"total": len(names), "matched": len(found), "tasks": found[offset : offset + limit]}

        answer = await self._lookups.run(find)
        return {**answer, "base": self._backbone.name, "image_size": self._preparations.used({})["image_size"]}

    async def task(self, name: str) -> dict[str, Any]:
        """What is known of a task."""

        def describe() -> dict[str, Any]:
            if name not in self.bank:
                raise self._unknown(name)
            try:
                task = self.bank.task(name)
                used, difference = self._preparations.used(task.info), self._preparations.difference(task.info)
            except Exception as error:
                raise explained_for_task(error, name) from error
            head = task.tensors.get(f"{self._backbone.model.head_name}.weight")
            classes = None if head is None else len(head)
            return {
                "name": name,
                "density": task.density,
                "decoded_bytes": task.nbytes,
                "classes": classes,
                "labels": class_names(task.info, min(_LABELS, classes or 0)),
                "base": task.info.get("base_model_name_or_path"),
                "base_fingerprint": task.info.get("base_fingerprint"),
                "preprocessing": used,
                **({} if difference is None else {"warning": difference}),
            }

        return await self._lookups.run(describe)

    def warnings(self, first: int = 1000) -> dict[str, str]:
        """What the server does otherwise than tasks were trained, by name, among the first tasks."""
        found = {}
        for name in self.bank.names[:first]:
            try:
                found[name] = self._preparations.difference(self.bank.config(name)) or ""
            except Exception as error:  # said to whoever asks for it
                found[name] = str(explained_for_task(error, name))
        return {name: why for name, why in found.items() if why}

    async def add(self, adding: Adding) -> dict[str, Any]:
        """Add a task; one change at a time."""
        return await self._writer.run(add_task, self.bank, adding)

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

        return await self._writer.run(work)

    def _unknown(self, name: str) -> ServingError:
        names = self.bank.names
        if len(names) > _COMPARED:  # comparing takes 0.1 ms a name: those that begin alike stand side by side
            place = bisect.bisect(names, name)
            names = names[max(0, place - _COMPARED // 2) : place + _COMPARED // 2]
        close = difflib.get_close_matches(name, names, n=3)
        fix = f"Did you mean {', '.join(close)}?" if close else "GET /v1/tasks lists the tasks."
        return ServingError(404, f"There is no task {name!r}.", fix)

    def close(self) -> None:
        """Finish what was submitted, and let go of the bank; what hangs is left behind after a while."""
        for workers in (self._decoders, self._large, self._lookups, self._writer):
            workers.close()
        if self._batcher.close(self.limits.grace):
            self.bank.close()


def _rendered(results: Sequence[dict[str, Any]], latency: dict[str, float]) -> bytes:
    """The answer as JSON, result by result: Python lets no other thread run while it writes one."""
    parts = (json.dumps(result, separators=(",", ":")) for result in results)
    return f'{{"results":[{",".join(parts)}],"latency_ms":{json.dumps(latency)}}}'.encode()


def _check_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        fix = "Add a sound adapter in its place; other tasks are served."
        raise ServingError(500, f"Task {name!r} gives values that are not finite.", fix)


def _latency(output: Output) -> dict[str, float]:
    return {"queue": _ms(output.waited), "model": _ms(output.ran)}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
