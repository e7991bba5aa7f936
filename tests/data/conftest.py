# SPDX-License-Identifier: Apache-2.0
"""Small images on disk in every form that `load_images` reads."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(number: int, height: int = 12, width: int = 10) -> np.ndarray:
    """(height, width, 3) uint8, smooth, another one for every number."""
    y, x = np.mgrid[:height, :width]
    return np.stack([9 * y + number, 9 * x + 2 * number, 5 * (x + y) + 3 * number], -1).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(name="picture")
def _picture() -> Callable[..., np.ndarray]:
    return picture


@pytest.fixture(name="encoded")
def _encoded() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """``split/class/number.png``: train has 3 cats and 2 dogs, test one of each; the number gives the picture."""
    number = 0
    for split, label, count in (("train", "dog", 2), ("train", "cat", 3), ("test", "cat", 1), ("test", "dog", 1)):
        folder = tmp_path / "pets" / split / label
        folder.mkdir(parents=True)
        for _ in range(count):
            (folder / f"{number}.png").write_bytes(encoded(picture(number)))
            number += 1
    return tmp_path / "pets"


@pytest.fixture
def npz_file(tmp_path: Path) -> Path:
    """6 JPEG pictures: numbers 0 to 3 are for training, 4 and 5 for testing; labels alternate."""
    files = [encoded(picture(i), "JPEG", quality=95) for i in range(6)]
    path = tmp_path / "set.npz"
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(files), dtype=np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        label=np.array([0, 1, 0, 1, 0, 1], dtype=np.int16),
        split=np.array([0, 0, 0, 0, 1, 1], dtype=np.uint8),
        classes=np.array(["even", "odd"]),
    )
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets` converts files into this empty folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
