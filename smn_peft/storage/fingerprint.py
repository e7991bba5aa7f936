# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of base weights, so that a mask is never laid over weights that it was not learned for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

PARTS = ("masked weights", "weights or statistics outside the mask")
"""What an adapter has fingerprints of: `base_fingerprint` and `unmasked_fingerprint`."""


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes in C order, as hex; the same on every device."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    data = tensor.detach().contiguous().cpu()
    if data.numel():
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(digests: Iterable[str], dtype: torch.dtype) -> str:
    """Fingerprint of a set of weights, from their digests: ``"float32:9f86d081884c7d65…"``.

    Names and order do not count: the same weights have other names in another version of transformers. The dtype
    stands in front because the same checkpoint loaded in another dtype has other bytes: two fingerprints can be
    compared only if their dtypes agree. `digests` are from [`tensor_digest`].
    """
    digest = hashlib.sha256("".join(sorted(digests)).encode())
    return f"{str(dtype).removeprefix('torch.')}:{digest.hexdigest()[:32]}"


def compare_fingerprints(
    what: str, part: str, expected: str, present: str, bases: tuple[str | None, str]
) -> str | None:
    """Refuse a base with another fingerprint than expected; a warning where the dtypes differ, so that none compare.

    `what` is an adapter in words, `part` one of PARTS, and `bases` the name of its base, and of the present one.
    """
    if present == expected:
        return None
    names = f"made for {bases[0] or 'a base without a name'} ({expected}), this base is {bases[1]} ({present})"
    if expected.partition(":")[0] == present.partition(":")[0]:
        raise ValueError(
            f"{what} does not belong to this base model, whose {part} differ: {names}. Load the base that it names; "
            "check_base=False in the config overrides the check."
        )
    return f"{what}: its base model cannot be verified in another dtype: {names}."
