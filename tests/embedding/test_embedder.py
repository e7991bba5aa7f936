# SPDX-License-Identifier: Apache-2.0
"""`Embedder` gives what `smn eval` measures, takes images in every form, and works under `datasets.map`."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image

from smn_peft.bank.store import DiskStore
from smn_peft.data import ImageError, load_images
from smn_peft.embedding import Embedder
from smn_peft.evaluation import extract_features
from smn_peft.training import load_run
from smn_peft.training.assemble import evaluation_of
from tests.training.tiny import base_of

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def images(finished):
    return load_images(finished / "set.npz", "test")


def expected(finished: Path, images, *, base: bool = False) -> np.ndarray:
    _, loaded = load_run(finished / "out", base=base, backbone=base_of(finished))
    found = extract_features(loaded.model, images, evaluation_of(loaded), batch_size=5)
    return found.features.numpy()


def pixels(images, count: int) -> list[np.ndarray]:
    """Images as (height, width, 3)."""
    return [images[index]["image"].permute(1, 2, 0).numpy() for index in range(count)]


def test_an_embedding_is_what_is_evaluated_of_base_run_adapter_and_task(finished, images, tmp_path):
    for name in FILES:
        (tmp_path / "adapter").mkdir(exist_ok=True)
        shutil.copy(finished / "out" / name, tmp_path / "adapter" / name)
    with DiskStore(tmp_path / "bank") as store:
        store.add_many([("birds", tmp_path / "adapter")])
    adapters = [finished / "out", tmp_path / "adapter", f"{tmp_path / 'bank'}:birds"]
    batch = {"image": pixels(images, len(images)), "other": list(range(len(images)))}
    of_mask, of_base = expected(finished, images), expected(finished, images, base=True)
    assert not np.allclose(of_mask, of_base, atol=1e-3)
    for adapter, features in [*((adapter, of_mask) for adapter in adapters), (None, of_base)]:
        embedder = Embedder(base_of(finished), adapter, batch_size=5)
        found = embedder(batch)
        assert found.keys() == {"image", "other", "embedding"}
        assert found["embedding"].dtype == np.float32
        assert np.array_equal(found["embedding"], features), adapter
        assert embedder.dim == features.shape[1]
    assert "embedding" not in batch
    assert embedder({"image": []})["embedding"].shape == (0, embedder.dim)


def test_images_come_as_libraries_hand_them_over(finished, images):
    embedder, arrays = Embedder(base_of(finished), finished / "out", column="photo"), pixels(images, 3)
    files = []
    for array in arrays:
        Image.fromarray(array).save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    same = embedder({"photo": np.stack(arrays)})["embedding"]
    forms = {
        "PIL": [Image.fromarray(array) for array in arrays],
        "with alpha": [np.dstack([array, array[..., :1]]) for array in arrays],
        "files": files,
        "records": [{"bytes": file, "path": None} for file in files],
        "tensors": torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays]),
    }
    for form, values in forms.items():
        assert np.array_equal(embedder({"photo": values})["embedding"], same), form
    grey = [array[..., 0] for array in arrays]
    repeated = [np.repeat(array[..., None], 3, 2) for array in grey]
    found = [embedder({"photo": form})["embedding"] for form in (grey, [g[..., None] for g in grey], repeated)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"photo": [None]}, r"no column 'image'; it has photo: pass column="),
        ({"image": [np.zeros((4, 4, 3))]}, r"image, number 0 is a ndarray of float64 \(4, 4, 3\): give a PIL image"),
        ({"image": [np.zeros((4, 4, 3), np.uint8), b"GIF89a"]}, r"image, number 1: .*cannot be read"),
        ({"image": [{"bytes": b"x", "path": "a.png"}]}, r"image, number 0 \(a\.png\): "),
        ({"image": [None]}, r"image, number 0 is a NoneType"),
    ],
)
def test_a_wrong_image_is_named(finished, batch, message):
    with pytest.raises(ValueError, match=message):
        Embedder(base_of(finished), finished / "out")(batch)
    assert issubclass(ImageError, ValueError)


def test_pickled_it_is_the_same_model_or_an_error(finished, images, tmp_path):
    adapter = shutil.copytree(finished / "out", tmp_path / "out")
    embedder = Embedder(base_of(finished), adapter)
    data, known = pickle.dumps(embedder), Hasher.hash(embedder)
    assert len(data) < 2000
    batch = {"image": pixels(images, 3)}
    assert np.array_equal(pickle.loads(data)(batch)["embedding"], embedder(batch)["embedding"])
    assert Hasher.hash(Embedder(base_of(finished), adapter)) == known
    model = load_run(adapter, backbone=base_of(finished))[1].model
    mask = next(tensor for name, tensor in model.named_buffers() if "smn_" in name and tensor.dtype == torch.uint8)
    mask[:4] ^= 255
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    with pytest.raises(RuntimeError, match=r"out is another model than the one that was pickled: make a new"):
        pickle.loads(data)
    assert Hasher.hash(Embedder(base_of(finished), adapter)) != known


def test_it_maps_a_dataset_in_processes_whose_images_stay_as_they_are(finished, images, tmp_path):
    files = []
    for array in pixels(images, 8):
        Image.fromarray(array).save(file := io.BytesIO(), "JPEG", quality=60)
        files.append({"bytes": file.getvalue(), "path": None})
    column = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": files}, features=column)
    embedder = Embedder(base_of(finished), finished / "out")
    found = dataset.map(embedder, batched=True, batch_size=2, num_proc=2, cache_file_name=str(tmp_path / "c.arrow"))
    stored = found.cast_column("image", datasets.Image(decode=False))["image"]
    assert [record["bytes"] for record in stored] == [record["bytes"] for record in files]
    same = embedder({"image": [record["bytes"] for record in files]})["embedding"]
    assert found.features["image"] == datasets.Image()
    # In other batches, and with another number of threads.
    np.testing.assert_allclose(np.array(found["embedding"], np.float32), same, rtol=1e-5, atol=1e-6)


def test_what_does_not_go_together_is_said_before_work(finished, tmp_path):
    base = base_of(finished)
    with DiskStore(tmp_path / "bank") as store:
        store.add_many([("birds", finished / "out")])
    bank = tmp_path / "bank"
    for named, options, message in [
        ((None, None), {}, "Name a base, an adapter, or both"),
        ((base, bank), {}, r"is a bank: name one of its tasks, as in .*bank:TASK; it has birds"),
        ((base, f"{bank}:bird"), {}, r"'bird'.*smn bank ls"),
        ((base, finished / "out"), {"mode": "conditional"}, "mode='conditional' is of a cascade, and .* is none"),
        ((base, finished / "out"), {"weights": "x"}, "weights is no option of an adapter; there are image_size"),
        ((base, None), {"wieghts": "x"}, "wieghts is no option of a base; there are weights, pretrained"),
        ((base, None), {"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ((None, finished / "out"), {}, "a program, which is run only if you name it yourself"),
    ]:
        with pytest.raises(ValueError, match=message):
            Embedder(*named, **options)
    with pytest.raises(FileNotFoundError, match="does not exist, and is no user/name on the Hub"):
        Embedder(base, tmp_path / "gone")
