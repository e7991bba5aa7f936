# SPDX-License-Identifier: Apache-2.0
"""`Service`: from a question to its answer, through decoding, preparation, batching and the bank."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from torch import Tensor

from .._options import did_you_mean
from ..backbones import Backbone
from ..bank.bank import BASE, MaskBank
from ..bank.task import Task
from ..data import check_preprocessing, preprocessing_transform
from ..data.decoding import open_image, to_rgb
from .bank import class_name, class_names, open_bank
from .batching import Batcher, Output, Workers
from .limits import Budget, Limits, ServingError, explained
from .models import Inputs, Question
from .settings import Settings

__all__ = ["Metrics", "Service"]

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What clients may send: what browsers show, and nothing of libtiff's."""
_COMPARED = 64  # names that an unknown one is compared with, which takes 0.1 ms each
_LABELS = 1000
# Larger images wait for one another, so that few of them are in memory and small ones pass.
_LARGE_BYTES, _LARGE_PIXELS = 2 << 20, 4_000_000
_PREPARED_PIXELS = 4096**2  # of one image in the sizes of all tasks
_PREPROCESSING = "preprocessing"

Way = str | ServingError
"""How an image is prepared for a task, as JSON; or why it cannot be."""


class Service:
    """Answer questions about images with the tasks of a bank.

    Args:
        bank: Its model is the `ServedModel` of `backbone`.
        backbone: How images are prepared for tasks that do not say it.
        limits: Bounds on requests.
        max_batch: See [`Batcher`].
        max_wait: See [`Batcher`].
        image_size: Pixels of a side for every task, whatever it was trained on.
        refresh: Seconds between looks at whether a bank that is read through a copy has changed.

    Attributes:
        metrics: Figures for Prometheus.
        places: Samples that are waiting or worked on.
        bodies: Bytes of the questions that are being read or answered.
        lookups: Threads for what is read of the bank.
        writer: The thread for its changes, one at a time.
        draining: Whether the server finishes what it has and takes nothing more.
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
        refresh: float = 60.0,
    ) -> None:
        self.bank, self.limits, self.draining = bank, limits or Limits(), False
        self._backbone, self._size, self._refresh = backbone, image_size, refresh
        self._started = int(time.time())
        self._preprocessing = check_preprocessing(backbone.preprocessing)
        decoders = min(4, os.cpu_count() or 1)
        self._decoders = Workers(decoders, "smn-decode")
        self._large = Workers(max(1, decoders // 2), "smn-decode-large")
        self.lookups = Workers(2, "smn-lookup")
        self.writer = Workers(1, "smn-write")
        self.places, self.bodies = Budget(self.limits.queue), Budget(self.limits.bodies_bytes)
        self.metrics = Metrics(self)
        self.batcher = Batcher(bank, max_batch=max_batch, max_wait=max_wait, watch=self.metrics.batch)

    @classmethod
    def open(cls, settings: Settings) -> Service:
        """Open bank and base; ValueError if they cannot be, or do not belong together."""
        bank, backbone, left_out = open_bank(
            settings.bank,
            settings.base,
            weights=settings.weights,
            image_size=settings.image_size,
            head_name=settings.head,
            device=settings.device,
            ram_budget=settings.ram_budget << 20,
            read_only=settings.api_key_env is None,
        )
        for name, why in left_out.items():
            logger.warning("left out %s: %s", name, why)
        service = cls(
            bank,
            backbone,
            limits=Limits(queue=settings.queue, timeout=settings.timeout, grace=settings.grace),
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            image_size=settings.image_size,
            refresh=settings.refresh,
        )
        if warnings := service.warnings():
            name, why = next(iter(warnings.items()))
            logger.warning("%d tasks are served otherwise than trained, as %r: %s", len(warnings), name, why)
        return service

    @contextmanager
    def _places(self, count: int, what: str) -> Iterator[None]:
        """Hold a place for each of a request's samples, `what` in the plural; 429 if there are not so many."""
        taken = self.places.held
        if count > self.limits.samples:
            raise ServingError(422, f"There are {count} {what}.", f"Send {self.limits.samples} at a time at most.")
        wait = max(1, math.ceil(taken * self.batcher.seconds_each))
        full = f"The queue is full: {taken} of {self.places.limit} places are taken."
        fix = f"Try again in {wait} s, or with fewer {what} at a time."
        self.places.take(count, ServingError(429, full, fix, {"Retry-After": str(wait)}))
        try:
            yield
        finally:
            self.places.held -= count

    async def _run(self, file: bytes, tasks: Sequence[str]) -> tuple[list[Way], list[Output | BaseException], float]:
        """Per task, how an image was prepared and what the model gave; and when the image was ready."""
        pool = self._large if len(file) > _LARGE_BYTES else self._decoders
        image, ways = await pool.run(self._opened, file, tasks)
        if image.width * image.height > _LARGE_PIXELS:
            pool = self._large
        images = await pool.run(_prepared, image, ways)
        del image
        prepared = time.perf_counter()
        return ways, await asyncio.gather(*map(self._output, images, tasks), return_exceptions=True), prepared

    async def predictions(self, question: Question) -> bytes:
        """`Results` as JSON: the likeliest classes under each task."""
        started = time.perf_counter()
        with self._places(len(question.tasks), "tasks"):
            ways, outputs, prepared = await self._run(question.image, question.tasks)

        def rendered() -> bytes:
            results, errors = [], []
            for task, way, output in zip(question.tasks, ways, outputs, strict=True):
                try:
                    if isinstance(output, BaseException):
                        raise explained(output, task)
                    latency = {"queue": _ms(output.waited), "model": _ms(output.ran)}
                    facts = {"latency_ms": latency, "batch": output.batch, **self._circumstances(output, way)}
                    results.append({"task": task, **self._prediction(question, output), **facts})
                except ServingError as error:
                    errors.append(error)
                    results.append({"task": task, **error.body, "status": error.status})
            if len(errors) == len(results):
                raise errors[0]
            latency = {"decode": _ms(prepared - started), "total": _ms(time.perf_counter() - started)}
            # Result by result: Python lets no other thread run while it writes one.
            parts = (json.dumps(each, separators=(",", ":")) for each in results)
            return f'{{"results":[{",".join(parts)}],"latency_ms":{json.dumps(latency)}}}'.encode()

        return await self.lookups.run(rendered)

    async def embeddings(self, asked: Inputs) -> bytes:
        """`Embeddings` as JSON: the features of each image."""
        task = await self.lookups.run(self._named, asked.model)
        with self._places(len(asked.input), "images"):
            runs = await asyncio.gather(*(self._run(file, [task]) for file in asked.input), return_exceptions=True)

        def rendered() -> bytes:
            parts, warning = [], {}
            for index, run in enumerate(runs):
                if isinstance(run, BaseException):
                    raise explained(run)
                (way,), (output,), _ = run
                if isinstance(output, BaseException):
                    raise explained(output, task)
                _check_finite(output.features, output)
                warning = self._circumstances(output, way)
                values = output.features.numpy()
                coded = (
                    values.tolist()
                    if asked.encoding_format == "float"
                    else base64.b64encode(values.tobytes()).decode()
                )
                part = {"object": "embedding", "index": index, "embedding": coded}
                parts.append(json.dumps(part, separators=(",", ":")))
            rest = {"model": asked.model, "usage": {"prompt_tokens": 0, "total_tokens": 0}, **warning}
            return f'{{"object":"list","data":[{",".join(parts)}],{json.dumps(rest)[1:]}'.encode()

        return await self.lookups.run(rendered)

    def _named(self, model: str) -> str:
        """The task that "base:task", "task" or "base" names; one that does not exist is refused later."""
        if model in self.bank:
            return model
        base, colon, task = model.partition(f"{self._backbone.name}:")
        return task if colon and not base else BASE if model == self._backbone.name else model

    def _opened(self, file: bytes, tasks: Sequence[str]) -> tuple[Image.Image, list[Way]]:
        """The image, its header checked and nothing decoded, and how it is prepared for each task."""
        for task in tasks:
            if task != BASE and task not in self.bank:
                raise self._unknown(task)
        image = open_image(file, "The image", formats=FORMATS, max_pixels=self.limits.pixels)
        width, height = image.size
        if max(width, height) > self.limits.aspect * min(width, height):
            fix = f"Crop it: the longer side may be {self.limits.aspect} times the shorter."
            raise ServingError(422, f"The image is a strip of {width} × {height} pixels.", fix)
        return image, [self._way(task) for task in tasks]

    def _way(self, task: str) -> Way:
        try:
            return self._way_of({} if task == BASE else self.bank.config(task))
        except Exception as error:  # this task alone
            return explained(error, task)

    def _used(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """How images are prepared for the task of this config: as it says, else as the base; in the server's size."""
        own = config.get(_PREPROCESSING)
        used = check_preprocessing(own) if own else self._preprocessing
        return used if self._size is None else {**used, "image_size": self._size}

    def _way_of(self, config: Mapping[str, Any]) -> str:
        return json.dumps(self._used(config), sort_keys=True)

    def _warning(self, config: Mapping[str, Any]) -> dict[str, str]:
        """What the server does otherwise than the task was trained, as the field "warning" of an answer."""
        own = config.get(_PREPROCESSING)
        if not own or self._size in (None, trained := check_preprocessing(own)["image_size"]):
            return {}
        return {"warning": f"It was trained on {trained} pixels; the server prepares {self._size}."}

    async def _output(self, image: Tensor | ServingError, task: str) -> Output:
        if isinstance(image, ServingError):
            raise image
        return await asyncio.wrap_future(self.batcher.submit(image, task))

    def _circumstances(self, output: Output, way: Way) -> dict[str, str]:
        """[`_warning`] of a result, which is refused if its task was replaced after the image was prepared."""
        if output.task is None:
            return {}
        if self._way_of(output.task.info) != way:
            raise ServingError(503, f"Task {output.task.name!r} was replaced meanwhile.", "Ask again.")
        return self._warning(output.task.info)

    def _prediction(self, question: Question, output: Output) -> dict[str, Any]:
        """The likeliest classes."""
        task, logits = output.task, output.logits
        if task is None or self._head(task) is None:
            what = "The base" if task is None else f"Task {task.name!r}"
            raise ServingError(422, f"{what} has no classes.", "Ask /v1/embeddings for its features.")
        if question.logits and len(logits) > self.limits.classes:
            fix = f"Logits are given up to {self.limits.classes}: ask for the 'top' alone."
            raise ServingError(422, f"Task {task.name!r} has {len(logits)} classes.", fix)
        _check_finite(logits, output)
        best = logits.softmax(0).topk(min(question.top, len(logits)))
        found = [
            {"index": index, "label": class_name(task.info, index), "probability": round(value, 6)}
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return {"top": found, **({"logits": logits.tolist()} if question.logits else {})}

    def _head(self, task: Task) -> Tensor | None:
        return task.tensors.get(f"{self._backbone.model.head_name}.weight")

    def tasks(self, text: str, after: str, limit: int, resident: bool) -> dict[str, Any]:
        """`ModelList`: tasks whose names contain a text, sorted, a page of them; those decoded, or all."""
        if resident:
            part = text.lower()
            names = sorted(name for name in self.bank.resident if name > after and part in name.lower())
        else:
            names = self.bank.find(text, after=after, limit=limit + 1)
        page = {"data": [self._model(name) for name in names[:limit]], "has_more": len(names) > limit}
        base = {"base": self._backbone.name, "image_size": self._used({})["image_size"]}
        return {"object": "list", **page, "total": len(self.bank), **base}

    def _model(self, name: str) -> dict[str, Any]:
        facts = {"object": "model", "created": self._started, "owned_by": "smn_peft"}
        return {"id": name, **facts, "parent": self._backbone.name}

    def task(self, name: str) -> dict[str, Any]:
        """`TaskFacts` of a task."""
        if name not in self.bank:
            raise self._unknown(name)
        try:
            task = self.bank.task(name)
            preparation = {"preprocessing": self._used(task.info), **self._warning(task.info)}
        except Exception as error:
            raise explained(error, name) from error
        head = self._head(task)
        return {
            **self._model(name),
            "density": task.density,
            "decoded_bytes": task.nbytes,
            "classes": None if head is None else len(head),
            "labels": class_names(task.info, min(_LABELS, 0 if head is None else len(head))),
            "base": task.info.get("base_model_name_or_path"),
            "base_fingerprint": task.info.get("base_fingerprint"),
            **preparation,
        }

    def warnings(self, first: int = 1000) -> dict[str, str]:
        """What the server does otherwise than tasks were trained, by name, among the first tasks."""
        found = {}
        for name in self.bank.find(limit=first):
            try:
                if warning := self._warning(self.bank.config(name)):
                    found[name] = warning["warning"]
            except Exception as error:  # told to whoever asks for the task
                found[name] = str(explained(error, name))
        return found

    def remove(self, name: str) -> dict[str, Any]:
        """Remove a task; `Changed`."""
        if name not in self.bank:
            raise self._unknown(name)
        try:
            self.bank.remove(name)
        except Exception as error:
            raise explained(error, name, change=True) from error
        return {"name": name, "total": len(self.bank)}

    def _unknown(self, name: str) -> ServingError:
        close = did_you_mean(name, self.bank.near(name, _COMPARED // 2))  # those that begin alike stand side by side
        return ServingError(404, f"There is no task {name!r}.", f"GET /v1/models lists the tasks.{close}")

    async def refresh(self) -> None:
        """Look now and then whether the bank has changed where it was copied from, until this is cancelled."""
        while True:
            await asyncio.sleep(self._refresh)
            try:
                if await self.writer.run(self.bank.refresh):
                    logger.warning("the bank has changed, and was fetched anew: %d tasks", len(self.bank))
            except Exception as error:  # the network's, or a file that is being replaced
                logger.warning("the bank was not fetched anew: %s", error)

    def close(self) -> None:
        """Finish what was submitted and close the bank; what hangs is left behind."""
        for workers in (self._decoders, self._large, self.lookups, self.writer):
            workers.close()
        if self.batcher.close(self.limits.grace):
            self.bank.close()


def _prepared(image: Image.Image, ways: Sequence[Way]) -> list[Tensor | ServingError]:
    """Decode an image and prepare it in each way, once for all that are the same."""
    with image:
        pixels = to_rgb(image, "The image")
    distinct = {way for way in ways if isinstance(way, str)}
    if sum(json.loads(way)["image_size"] ** 2 for way in distinct) > _PREPARED_PIXELS:
        raise ServingError(422, "The tasks want the image in too many sizes.", "Ask fewer tasks at a time.")
    done = {way: _transform(way)(pixels) for way in distinct}
    return [done[way] if isinstance(way, str) else way for way in ways]


@functools.lru_cache(64)
def _transform(way: str) -> Any:
    return preprocessing_transform(json.loads(way))


def _check_finite(values: Tensor, output: Output) -> None:
    if not torch.isfinite(values).all():
        name = BASE if output.task is None else output.task.name
        fix = "Add a sound adapter in its place; other tasks are served."
        raise ServingError(500, f"Task {name!r} gives values that are not finite.", fix)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Collector):
    """Figures of one service for Prometheus; no label grows with the number of tasks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        registry = self._registry = CollectorRegistry()
        # Where several processes serve one port, each tells what all have counted, and of itself with its number.
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        histogram = functools.partial(Histogram, registry=registry)
        self._requests = Counter("smn_requests", "Requests answered", ["method", "route", "status"], registry=registry)
        self._seconds = histogram("smn_request_seconds", "Time to answer", ["route"])
        self._samples = histogram("smn_batch_samples", "Samples per forward", buckets=_SIZES)
        self._tasks = histogram("smn_batch_tasks", "Tasks per forward", buckets=_SIZES)
        self._batch_seconds = histogram("smn_batch_seconds", "Time per forward")
        if self._shared:
            registry = self._registry = CollectorRegistry()
            MultiProcessCollector(registry)
        registry.register(self)
        ProcessCollector(registry=registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, samples: int, tasks: int, seconds: float) -> None:
        """Count a batch."""
        self._samples.observe(samples)
        self._tasks.observe(tasks)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read the figures that the service and its bank count themselves."""
        service, stats = self._service, self._service.bank.stats
        labels = {"pid": str(os.getpid())} if self._shared else {}

        def gauge(name: str, text: str, value: float, kind: Any = GaugeMetricFamily) -> Metric:
            family: Metric = kind(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), value)  # type: ignore[attr-defined]
            return family

        counter = functools.partial(gauge, kind=CounterMetricFamily)
        yield gauge("smn_queue_depth", "Samples that wait for a batch", service.batcher.depth)
        yield gauge("smn_places_taken", "Samples that are waiting or worked on", service.places.held)
        yield gauge("smn_bank_tasks", "Tasks in the bank", len(service.bank))
        yield gauge("smn_bank_resident_bytes", "Bytes of decoded tasks", stats.resident_bytes)
        yield gauge("smn_bank_resident_tasks", "Decoded tasks", stats.resident)
        yield counter("smn_bank_hits", "Lookups of decoded tasks", stats.hits)
        yield counter("smn_bank_misses", "Lookups that had to decode", stats.misses)
        yield counter("smn_bank_evictions", "Decoded tasks that made room", stats.evictions)
        yield counter("smn_bank_switches", "Rewrites of the model's weights", stats.switches)
