# SPDX-License-Identifier: Apache-2.0
"""Per-adapter tensors of a layer: containers whose cost does not grow with the number of resident adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

__all__ = ["ResidentBuffers", "ScoreDict"]


class ScoreDict(nn.ParameterDict):
    """Scores by adapter name; a cast of the model to a narrower dtype leaves them as wide as they were.

    A score that crosses its threshold in steps of 1e-4 does not move at all in bf16.
    """

    def __getitem__(self, key: str) -> nn.Parameter:
        """Scores of an adapter; without the detour that `nn.ParameterDict` takes, since this runs in every forward."""
        own = self._parameters.get(key)
        return self.__dict__[key] if own is None else own  # a replica of nn.DataParallel has attributes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoreDict:
        def keep_width(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(result.device)
            return result

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]
        return self


class _Offer(NamedTuple):
    """A place where a loader may write.

    Attributes:
        buffer: The place.
        version: Its version before anybody wrote.
        content: What it held then.
    """

    buffer: Tensor
    version: int
    content: Tensor


class ResidentBuffers(BufferDict):
    """Buffers by adapter name, of which only the newest is a registered buffer.

    The newest stands in the module's state dict under exactly the key of the checkpoint, where every loader finds it,
    transformers' native one included. The older ones move to a plain dict: `state_dict()`, `named_buffers()` and all
    that loops over them cost the same with two adapters as with a thousand.

    An adapter that trains has its state elsewhere (its scores), and a buffer here only as a place for a loader to
    write to: see [`expect`].
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.older: dict[str, Tensor] = {}
        self._expected: dict[str, _Offer | None] = {}

    def expect(self, key: str, buffer: Tensor) -> None:
        """Offer a place where a loader may write, for an adapter whose state is elsewhere."""
        self[key] = buffer
        self._expected[key] = _Offer(buffer, buffer._version, buffer.clone())

    def take_arrived(self, key: str) -> Tensor | None:
        """What a loader wrote to an expected buffer, or None; the place is withdrawn either way."""
        expected = self._expected.get(key)
        if expected is None or not (key in self._buffers or key in self.older):
            return None
        current = self[key]
        del self[key]
        self._expected[key] = None
        if current is expected.buffer and current._version == expected.version:
            return None
        # DistributedDataParallel writes every buffer, with what is there already.
        known = "meta" not in (current.device.type, expected.content.device.type)
        return None if known and torch.equal(current, expected.content.to(current.device)) else current

    @property
    def replaced(self) -> bool:
        """Whether another buffer stands where one is expected, as transformers' loader leaves it."""
        return any(
            place is not None and (key in self._buffers or key in self.older) and self[key] is not place.buffer
            for key, place in self._expected.items()
        )

    def forget(self, key: str) -> None:
        """Drop every trace of an adapter."""
        if key in self._buffers or key in self.older:
            del self[key]
        self._expected.pop(key, None)

    def __getitem__(self, key: str) -> Tensor:
        buffer = self._buffers.get(key)
        return self.older[key] if buffer is None else buffer

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        if key in self.older:
            self.older[key] = buffer
            return
        if key not in self._buffers:
            self.older.update((name, old) for name, old in self._buffers.items() if old is not None)
            self._buffers.clear()
        self._buffers[key] = buffer

    def __delitem__(self, key: str) -> None:
        if self._buffers.pop(key, None) is None:
            del self.older[key]
        elif self.older:  # the newest of the rest takes its place
            newest = next(reversed(self.older))
            self._buffers[newest] = self.older.pop(newest)

    def __len__(self) -> int:
        return len(self._buffers) + len(self.older)

    def __iter__(self) -> Iterator[str]:
        yield from self.older
        yield from self._buffers

    def __contains__(self, key: object) -> bool:
        """Whether an adapter has its state here; a place that is only offered to a loader does not count."""
        return self._expected.get(str(key)) is None and (key in self._buffers or key in self.older)

    def keys(self) -> KeysView[str]:
        """Names of all resident adapters, the newest last."""
        return dict.fromkeys(self).keys()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidentBuffers:
        moved = {key: self._buffers[key] for key in self._buffers if self._expected.get(key) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.older = {key: fn(buffer) for key, buffer in self.older.items()}
        for key, before in moved.items():  # a move to another device is not a loader's write
            place, current = self._expected[key], self[key]
            assert place is not None
            if before is place.buffer and before._version == place.version and current is not None:
                self._expected[key] = place._replace(buffer=current, version=current._version)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        optional = {prefix + key for key in self._expected} | {prefix + key for key in self.older}
        missing_keys[:] = [key for key in missing_keys if key not in optional]
        unexpected_keys[:] = [key for key in unexpected_keys if key not in optional]
        for key, buffer in self.older.items():
            if (loaded := state_dict.get(prefix + key)) is not None:
                buffer.copy_(loaded)
