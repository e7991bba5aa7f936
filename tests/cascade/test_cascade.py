# SPDX-License-Identifier: Apache-2.0
"""Embeddings against a plain reference, one model in memory, and files that give the same bits in a fresh process."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smn_peft.backbones import pooled_features
from smn_peft.cascade import Cascade, Router, cascade_sizes
from smn_peft.data import load_images
from smn_peft.embedding import Embedder
from smn_peft.training import load_run
from smn_peft.training.assemble import evaluation_of
from tests.training.tiny import TEST, TRAIN

NAMES = ("dispatcher", "expert-0", "expert-1")


@pytest.fixture(scope="module")
def cascade(fitted, arguments) -> Cascade:
    return Cascade.load(fitted, backbone=arguments.backbone)


@pytest.fixture(scope="module")
def images(arguments):
    return {split: load_images(arguments.dataset, split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def features(fitted, arguments, images) -> dict[str, list[np.ndarray]]:
    """Features of each run's own model, image by image, per split."""
    found = {split: [] for split in images}
    for name in NAMES:
        _, backbone = load_run(fitted / name, backbone=arguments.backbone)
        transform = evaluation_of(backbone)
        for split, part in images.items():
            with torch.no_grad():
                rows = [pooled_features(backbone.model, transform(item["image"])[None])[0] for item in part]
            found[split].append(torch.stack(rows).double().numpy())
    return found


@pytest.mark.parametrize("mode", ["whitened", "conditional", "unconditional"])
def test_an_embedding_is_the_papers_formula(cascade, fitted, images, features, mode):
    router = Router.load(fitted)
    raw = {}
    for split, (dispatcher, *experts) in features.items():
        if mode == "conditional":
            route = router.assign(torch.tensor(dispatcher).float()).numpy()
            experts = [expert * (route == number)[:, None] for number, expert in enumerate(experts)]
        raw[split] = dispatcher if mode == "whitened" else np.concatenate([dispatcher, *experts], 1)
    mean = raw["train"].mean(0)
    _, values, vectors = np.linalg.svd(raw["train"] - mean, full_matrices=False)
    expected = ((raw["test"] - mean) @ vectors[:16].T) / values[:16]
    found = cascade.embed(images["test"], mode)
    assert torch.equal(found.labels, images["test"].labels)
    signs = np.sign((found.features.numpy() * expected).sum(0))
    np.testing.assert_allclose(found.features.numpy() * signs, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    # Each mask alone could not: the experts' features are not the dispatcher's.
    assert not np.allclose(features["test"][0], features["test"][1], atol=1e-3)


def test_all_modes_at_once_are_each_alone(cascade, images):
    everything = cascade.embed_all(images["test"])
    assert list(everything) == ["dispatcher", "whitened", "conditional", "unconditional"]
    for mode, found in everything.items():
        torch.testing.assert_close(cascade.embed(images["test"], mode).features, found.features, rtol=1e-4, atol=1e-4)


def test_an_embedder_is_the_cascade_batch_by_batch(fitted, arguments, cascade, images):
    batch = {"image": [item["image"] for item in images["test"]]}
    digests = set()
    for mode in (None, "dispatcher", "unconditional"):
        embedder = pickle.loads(pickle.dumps(Embedder(arguments.backbone, fitted, mode=mode, batch_size=10)))
        expected = cascade.embed(images["test"], mode or "conditional", batch_size=10)
        found = torch.from_numpy(embedder(batch)["embedding"])
        torch.testing.assert_close(found, expected.features, rtol=1e-5, atol=1e-6)
        assert embedder.dim == found.shape[1]
        digests.add(embedder.digest)
    assert len(digests) == 3
    with pytest.raises(ValueError, match="no mode 'conditional' here; there are dispatcher, whitened, unconditional"):
        Embedder(arguments.backbone, fitted / "ensemble")
    with pytest.raises(ValueError, match="is a cascade, which takes images of its own size: leave image_size out"):
        Embedder(arguments.backbone, fitted, image_size=32)


@pytest.mark.parametrize(("mode", "passes"), [("dispatcher", 1), ("conditional", 2), ("unconditional", 3)])
def test_only_the_passes_that_are_needed_over_one_model(cascade, images, mode, passes):
    model = cascade.backbone.model
    seen = []
    handle = model.get_base_model().conv1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    cascade.embed(images["test"], mode)
    handle.remove()
    assert sum(seen) == passes * TEST
    weights = [p for p in model.parameters() if p.is_floating_point()]
    one = sum(
        p.numel()
        for p in load_run(cascade.arguments.output_dir, base=True, backbone=cascade.backbone.name)[
            1
        ].model.parameters()
    )
    assert sum(p.numel() for p in weights) == one  # no scores, and no second copy of the base


def test_saved_and_loaded_it_is_identical_to_the_bit_without_scikit_learn(
    cascade, fitted, images, tmp_path, monkeypatch
):
    cascade.save(tmp_path / "copy")
    for name in NAMES:
        file = f"{name}/adapter_model.safetensors"
        assert (tmp_path / "copy" / file).read_bytes() == (fitted / file).read_bytes()
    suffixes = {path.suffix for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".md"}
    expected = cascade.embed_all(images["test"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails: it is needed to fit, not to embed
    found = Cascade.load(tmp_path / "copy", backbone=cascade.backbone.name).embed_all(images["test"])
    assert [mode for mode in cascade.modes if not torch.equal(found[mode].features, expected[mode].features)] == []


def test_sizes_are_those_of_the_files(cascade, fitted, tmp_path):
    cascade.save(tmp_path)
    saved, trained = cascade_sizes(tmp_path), cascade_sizes(fitted)
    assert saved == trained
    files = [
        path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".json") and path.name != "run.json"
    ]
    assert saved.total == sum(path.stat().st_size for path in files)
    model = load_run(fitted / "dispatcher", base=True, backbone=cascade.backbone.name)[1].model
    base = sum(p.numel() for p in model.parameters())
    masked = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert (saved.paper, saved.masks) == (3 * base // 8, 3 * masked // 8)
    assert f"{saved.total / 1e3:.1f} kB (masks {saved.masks / 1e3:.1f} kB" in saved.text()


def test_what_is_pushed_is_a_cascade(cascade, images, tmp_path, monkeypatch):
    """The upload itself is huggingface_hub's; what it is given has to load again."""
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, **options):
            calls.append((name, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(repo_id)
            shutil.copytree(folder_path, tmp_path / "pushed")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert cascade.push_to_hub("user/cascade", private=True, token="t") == "https://huggingface.co/user/cascade"
    assert calls == ["t", ("user/cascade", {"private": True, "exist_ok": True}), "user/cascade"]
    found = Cascade.load(tmp_path / "pushed", backbone=cascade.backbone.name).embed(images["test"])
    assert torch.equal(found.features, cascade.embed(images["test"]).features)


def test_modes_that_there_are_not(fitted, arguments, images):
    ensemble = Cascade.load(fitted / "ensemble", backbone=arguments.backbone)
    assert ensemble.modes == ("dispatcher", "whitened", "unconditional")
    assert ensemble.embed(images["test"], "unconditional").features.shape == (TEST, 16)
    with pytest.raises(ValueError, match="no mode 'conditional' here; there are dispatcher, whitened, unconditional"):
        ensemble.embed(images["test"])
    folders = {name: fitted / name for name in NAMES}
    unfinished = Cascade.from_runs(folders, Router.load(fitted), backbone=arguments.backbone)
    with pytest.raises(ValueError, match="no projection for 'conditional' yet: call fit_projections"):
        unfinished.embed(images["test"])
    unfinished.fit_projections(images["train"], 5)
    assert unfinished.embed(images["test"]).features.shape == (TEST, 5)
    with pytest.raises(ValueError, match="The router knows 2 experts, but there are 1 masks"):
        Cascade.from_runs({name: fitted / name for name in NAMES[:2]}, Router.load(fitted))
    assert len(images["train"]) == TRAIN


def edited(folder: Path, **changes) -> None:
    path = folder / "cascade.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_a_mode(folder: Path) -> None:
    path = folder / "projection.safetensors"
    save_file({name: part for name, part in load_file(path).items() if not name.startswith("cond")}, path)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / "cascade.json").unlink(), FileNotFoundError, "holds no finished cascade"),
        (lambda f: edited(f, adapters=["dispatcher", "../x", "expert-1"]), ValueError, "names of two or more folders"),
        (
            lambda f: edited(f, adapters=["dispatcher", "expert-0"]),
            ValueError,
            "The router knows 2 experts, but there are 1 masks",
        ),
        (lambda f: edited(f, router=False), ValueError, r"projection\.safetensors holds .*conditional\.mean.*, not"),
        (without_a_mode, ValueError, r"projection\.safetensors holds "),
        (lambda f: (f / "projection.safetensors").write_bytes(b"1234567890"), ValueError, "is damaged"),
        (lambda f: (f / "expert-1" / "adapter_model.safetensors").write_bytes(b"12"), ValueError, "truncated"),
    ],
)
def test_damaged_folders_are_refused(cascade, tmp_path, damage, kind, message):
    cascade.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        Cascade.load(tmp_path, backbone=cascade.backbone.name)


def test_a_program_inside_the_folder_runs_only_if_it_is_named(cascade, fitted, tmp_path):
    cascade.save(tmp_path)
    model = tmp_path / "model.py"
    shutil.copy(fitted.parent / "model.py", model)
    marker = tmp_path / "it_ran"
    model.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n" + model.read_text())
    path = tmp_path / "dispatcher" / "run.json"
    facts = json.loads(path.read_text())
    facts["arguments"]["backbone"] = f"{model}:build"
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="a program, which is run only if you name it yourself"):
        Cascade.load(tmp_path)
    assert not marker.exists()
    Cascade.load(tmp_path, backbone=f"{model}:build")
    assert marker.exists()
