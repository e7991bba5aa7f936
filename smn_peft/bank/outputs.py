# SPDX-License-Identifier: Apache-2.0
"""What a model returns, tensors in whatever containers: taken apart by the runs of a mixed batch, and put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .complement import NotPerSample, Padded, PaddingUsed, Rows

__all__ = ["joined", "run_of"]


def run_of(output: Any, number: int, rows: Sequence[Rows], padded: Sequence[Padded]) -> Any:
    """One run of what a model returned for a sorted batch, its logits without the padding.

    Args:
        output: What the model returned.
        number: Of the run.
        rows: All runs.
        padded: What the heads gave; a model may return it, and nothing that it makes of it.

    Raises:
        NotPerSample: If it holds a tensor that has no row for each sample.
        PaddingUsed: If the model made something else of padded logits.
    """
    seen: set[int] = set()

    def cut(parts: Sequence[Any]) -> Any:
        (tensor,) = parts
        if not tensor.dim() or len(tensor) != rows[-1].stop:
            raise NotPerSample
        part = tensor[rows[number].start : rows[number].stop]
        for index, (logits, widths) in enumerate(padded):
            if tensor is logits:
                seen.add(index)
                return part[..., : widths[number]]
            if tensor.shape == logits.shape:
                raise PaddingUsed  # probabilities, say, over classes that a task does not have
        return part

    result = _mapped(cut, [output])
    if len(seen) != len(padded):
        raise PaddingUsed
    return result


def joined(parts: Sequence[tuple[list[int], Any]], count: int) -> Any:
    """Rows of several outputs in the order of the batch; a list where their shapes differ.

    Args:
        parts: Positions in the batch, and what the model returned for them.
        count: Samples of the batch.

    Raises:
        ValueError: If a tensor has no row for each sample, and is not the same for all.
    """

    def join(tensors: Sequence[Any]) -> Any:
        first = tensors[0]
        if not all(len(t) == len(at) if t.dim() else False for t, (at, _) in zip(tensors, parts, strict=True)):
            if all(torch.equal(first, tensor) for tensor in tensors):
                return first
            raise ValueError(
                f"The model returned a tensor of shape {tuple(first.shape)}, which has no row for each sample, for a "
                "batch of several tasks: ask for one task at a time."
            )
        if len({tensor.shape[1:] for tensor in tensors}) == 1:
            result = first.new_empty(count, *first.shape[1:])
            for tensor, (at, _) in zip(tensors, parts, strict=True):
                result[torch.as_tensor(at, device=tensor.device)] = tensor
            return result
        rows: dict[int, Tensor] = {}
        for tensor, (at, _) in zip(tensors, parts, strict=True):
            rows.update(zip(at, tensor, strict=True))
        return [rows[position] for position in range(count)]

    return _mapped(join, [output for _, output in parts])


def _mapped(function: Callable[[Sequence[Any]], Any], outputs: Sequence[Any]) -> Any:
    """The outputs' container, with the function's result for the tensors of each place."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return function(outputs)
    if isinstance(first, Mapping):
        parts = {key: _mapped(function, [output[key] for output in outputs]) for key in first}
        return type(first)(**parts) if all(isinstance(key, str) for key in parts) else parts
    if isinstance(first, (tuple, list)):
        items = [_mapped(function, items) for items in zip(*outputs, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first
