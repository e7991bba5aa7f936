# SPDX-License-Identifier: Apache-2.0
"""What a bank takes and what it refuses, as PEFT does; neither a refusal nor a failed switch leaves traces."""

from __future__ import annotations

import gc
import json
import shutil
import tracemalloc
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file
from torch import nn

from smn_peft import MaskBank, MaskConfig
from smn_peft.backbones import Classifier
from smn_peft.bank.source import StoredAdapter
from smn_peft.serving.bank import ServedModel
from smn_peft.storage.adapter_config import CONFIG_NAME
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from tests.bank.tiny import IMAGES, adapter, build, save_sealed, state_of

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    adapter("vit", 0.99, 1)[1].save_pretrained(root / "vit")
    adapter("vit", 0.6, 2)[1].save_pretrained(root / "dense")
    adapter("resnet", 0.9, 3, batch_norm="adapt")[1].save_pretrained(root / "adapt")
    adapter("resnet", 0.9, 4)[1].save_pretrained(root / "frozen")
    return root


def changed(saved, folder, name, change):
    """A copy of an adapter whose tensors a function changes."""
    shutil.copytree(saved / name, folder)
    tensors = {key.removeprefix(PREFIX): tensor.clone() for key, tensor in load_file(folder / WEIGHTS_NAME).items()}
    tensors = change(tensors)
    save_sealed(folder, {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()})
    return folder


def filled(key, value):
    return lambda tensors: {**tensors, key: torch.full_like(tensors[key], value)}


def brought(key, tensor):
    return lambda tensors: {**tensors, key: tensor}


def without(*ends):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(ends)}


NORM = "layer1.0.bn1.smn_running_var"
CHANGES = {
    "masked and whole": (
        "vit",
        brought("blocks.0.mlp.fc1.weight", torch.zeros(128, 32)),
        "masks blocks.0.mlp.fc1.weight",
    ),
    "masked and whole, a convolution": (
        "frozen",
        brought("conv1.weight", torch.zeros(64, 3, 7, 7)),
        "masks conv1.weight",
    ),
    "negative variance": ("adapt", filled(NORM, -1.0), "negative layer1.*running_var"),
    "infinite variance": ("adapt", filled(NORM, float("inf")), "not finite"),
    "NaN mean": ("adapt", filled(NORM.replace("var", "mean"), float("nan")), "not finite"),
    "no variance": ("adapt", without(NORM), "lacks layer1.0.bn1.running_var.*batch_norm='adapt'"),
    "no statistics": ("adapt", without("smn_running_mean", "smn_running_var", "tracked"), "lacks bn1.running_mean"),
    "no head": ("vit", without("head.weight", "head.bias"), "lacks head.bias.*modules_to_save"),
    "no bias of the head": ("adapt", without("fc.bias"), "lacks fc.bias.*modules_to_save"),
    "NaN head": ("vit", filled("head.weight", float("nan")), "not finite"),
    "whole numbers for a head": ("vit", brought("head.bias", torch.zeros(4, dtype=torch.int64)), "in torch.int64"),
    "tracked batches as a float": (
        "adapt",
        brought("bn1.smn_num_batches_tracked", torch.tensor(0.5)),
        "in torch.float32",
    ),
    "an unknown part": ("vit", brought("blocks.0.mlp.fc1.smn_other", torch.zeros(3)), "which no masked layer takes"),
    "statistics of a layer that has none": ("vit", brought("norm.smn_running_mean", torch.zeros(32)), "no place"),
}


@pytest.mark.parametrize("name", ["vit", "adapt", "frozen"])
def test_adapters_that_peft_would_not_run_right_are_not_taken(name, saved, tmp_path):
    base = build("vit" if name == "vit" else "resnet")
    with torch.no_grad(), MaskBank.open([saved / name], base) as bank:
        expected = bank(IMAGES, name), base(IMAGES)
        for what, (changed_one, change, message) in CHANGES.items():
            if changed_one == name:
                folder = changed(saved, tmp_path / what, name, change)
                with pytest.raises(ValueError, match=message):
                    bank.add("x", folder)
        assert bank.names == [name]
        assert torch.equal(bank(IMAGES, name), expected[0])
        assert torch.equal(base(IMAGES), expected[1])


@pytest.mark.parametrize("task", ["vit", "dense"])
@pytest.mark.parametrize("where", ["blocks.1.mlp.fc1.weight", "blocks.0.attn.qkv.weight"])
def test_a_switch_that_cannot_write_leaves_the_base_and_a_bank_that_works(task, where, saved, tmp_path):
    """A weight whose rows are one row in memory: torch refuses to write it."""

    def make():
        base = build("vit")
        weight = base.get_parameter(where)
        weight.data = weight.data[:1].expand(weight.shape)
        return base

    for name in ("vit", "dense"):
        shutil.copytree(saved / name, tmp_path / name)
        config = json.loads((tmp_path / name / CONFIG_NAME).read_text())
        (tmp_path / name / CONFIG_NAME).write_text(json.dumps({**config, "check_base": False}))
    other = changed(tmp_path, tmp_path / "other", "vit", without(where.replace("weight", "smn_mask")))
    base = make()
    before = state_of(base)
    with torch.no_grad(), MaskBank.open([tmp_path / "vit", tmp_path / "dense", other], base) as bank:
        own, expected = base(IMAGES), bank(IMAGES, "other")
        for _ in range(2):
            for live in (None, "other"):
                bank.activate(live)
                with pytest.raises(RuntimeError):
                    bank(IMAGES, task)
                assert torch.equal(base(IMAGES), own if live is None else expected)
                with pytest.raises(RuntimeError), bank.use(task):
                    pass
                assert torch.equal(bank(IMAGES, "other"), expected)
                bank.activate(None)
                assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_what_somebody_wrote_stays_and_the_rest_is_put_back(saved):
    base = build("vit")
    before = state_of(base)
    bank = MaskBank.open([saved / "vit"], base)
    bank.activate("vit")
    with torch.no_grad():
        base.blocks[0].mlp.fc1.weight.fill_(7.0)
    with pytest.raises(RuntimeError, match="was written to"):
        bank.close()
    after = base.state_dict()
    assert (after.pop("blocks.0.mlp.fc1.weight") == 7).all()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


NAMES = {
    ".": "or a folder",
    "..": "or a folder",
    "": "1 to 200 characters",
    "x" * (1 << 20): r"1 to 200 characters; 'x{20}'… has 1048576",
    "a\nb": "control characters",
    "a\x1b[2J": "control characters",
    "a\u2028b": "control characters",
    "a\ud800": "control characters",
    "__base__": "names the base",
}


@pytest.mark.parametrize("stored", [False, True])
def test_names_that_nobody_could_show(stored, saved, tmp_path):
    with MaskBank.open(tmp_path / "bank" if stored else [], build("vit")) as bank:
        bank.add("good", saved / "vit")
        for name, message in NAMES.items():
            for change in (partial(bank.add, name, saved / "vit"), partial(bank.rename, "good", name)):
                with pytest.raises(ValueError, match=message) as error:
                    change()
                assert len(str(error.value)) < 300
            with pytest.raises(KeyError) as unknown:
                bank.task(name)
            assert len(str(unknown.value)) < 300
            assert name not in bank
            with pytest.raises(KeyError):
                bank.remove(name)
        assert bank.names == ["good"]
        with pytest.raises(TypeError, match="is text"):
            bank.add(7, saved / "vit")


def in_norm(base):
    with torch.no_grad():
        base.get_buffer("layer2.0.bn1.running_mean").add_(1)


def in_scale(base):
    with torch.no_grad():
        base.get_parameter("layer2.0.bn1.weight").mul_(1.5)


def in_head(base):
    with torch.no_grad():
        base.fc.weight.add_(1)


def masked_body(base):
    """An adapter of the second stage alone: all else is outside of its mask."""
    return get_peft_model(base, MaskConfig(target_modules=r"layer2.*conv\d", modules_to_save=["fc"])).eval()


@pytest.mark.parametrize("change", [in_norm, in_scale, lambda base: base.conv1.weight.data.add_(1)])
def test_another_rest_of_the_base_is_refused(change, saved, tmp_path):
    masked_body(build("resnet")).save_pretrained(tmp_path / "x")
    other = build("resnet")
    change(other)
    with MaskBank.open([], other) as bank:
        with pytest.raises(
            ValueError, match="whose weights or statistics outside the mask differ: made for timm/resnet18"
        ):
            bank.add("x", tmp_path / "x")
    own = build("resnet")
    in_head(own)
    with MaskBank.open([saved / "adapt"], own) as bank:
        bank.activate("adapt")  # its statistics and head are live, and not the base's
        bank.add("x", tmp_path / "x")
        config = json.loads((tmp_path / "x" / CONFIG_NAME).read_text())
        (tmp_path / "x" / CONFIG_NAME).write_text(json.dumps({**config, "check_base": False}))
    with MaskBank.open([], other) as bank:
        bank.add("x", tmp_path / "x")


def test_statistics_that_the_adapter_brings_are_not_the_bases(saved):
    other = build("resnet")
    in_norm(other)
    with MaskBank.open([], other) as bank:
        bank.add("own", saved / "adapt")
        with pytest.raises(ValueError, match="outside the mask differ"):
            bank.add("none", saved / "frozen")


@pytest.mark.parametrize("around", [lambda body: Classifier(body, 32, 3), lambda body: ServedModel(body, 32)])
def test_the_rest_of_the_base_is_the_same_in_a_classifier(around, tmp_path):
    def made(body):
        torch.manual_seed(1)
        return around(body).eval()

    config = MaskConfig(modules_to_save=["head"], target_modules=["qkv", "fc1"])
    torch.manual_seed(1)
    get_peft_model(Classifier(build("vit", 0), 32, 3).eval(), config).save_pretrained(tmp_path / "x")
    with MaskBank.open([], made(build("vit", 0))) as bank:
        bank.add("x", tmp_path / "x")
    body = build("vit", 0)
    body.norm.weight.data.add_(1)
    with MaskBank.open([], made(body)) as bank, pytest.raises(ValueError, match="outside the mask differ"):
        bank.add("x", tmp_path / "x")


class Shared(nn.Module):
    """One block in two places, as timm's CoaT has its convolutional position encodings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.first, self.second, self.head = block, nn.ModuleList([block]), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.second[0](torch.relu(self.first(x))))


@pytest.mark.parametrize("density", [0.98, 0.6])
def test_a_module_whose_parent_stands_in_two_places_is_taken(density, tmp_path):
    base = Shared().eval()
    for index, name in enumerate(("a", "b")):
        config = MaskConfig(target_modules=r"first\.0", modules_to_save=["head"], batch_norm="adapt")
        model = get_peft_model(Shared(), config).eval()
        with torch.no_grad():
            for key, tensor in (*model.named_parameters(), *model.named_buffers()):
                if "smn_scores" in key:
                    tensor.copy_(density - torch.rand(tensor.shape, generator=torch.Generator().manual_seed(index)))
                elif "smn_running" in key:
                    tensor.add_(0.5 + index)
        model.save_pretrained(tmp_path / name)
    x, before = torch.randn(5, 16), state_of(base)
    with torch.no_grad(), MaskBank.open([tmp_path / "a", tmp_path / "b"], base) as bank:
        own = base(x)
        expected = {n: PeftModel.from_pretrained(Shared().eval(), tmp_path / n).eval()(x) for n in "ab"} | {None: own}
        for name in ("a", "b", None, "b", "a"):
            torch.testing.assert_close(bank(x, name), expected[name])
            assert torch.equal(base(x), own)
        names = ["a", None, "b", "a", "b"]
        torch.testing.assert_close(bank(x, names), torch.stack([expected[n][i] for i, n in enumerate(names)]))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_base_whose_modules_are_called_as_wrappers_are(tmp_path):
    def make():
        torch.manual_seed(0)
        base = nn.Module()
        base.base_layer, base.head = nn.Linear(16, 16), nn.Linear(16, 3)
        return nn.Sequential(base.base_layer, base).eval()

    with MaskBank.open([], make()) as bank:
        assert bank.names == []


class Parsed:
    """Adapters that are read from bytes every time, as from a disk, each with labels of its own."""

    def __init__(self, folder, labels):
        self._config, self._labels = (folder / CONFIG_NAME).read_text(), labels
        self._weights = (folder / WEIGHTS_NAME).read_bytes()

    def names(self):
        return [f"t{index}" for index in range(100)]

    def __contains__(self, name):
        return name in self.names()

    def __len__(self):
        return 100

    def version(self, name):
        return 1

    def read(self, name):
        labels = {str(index): f"class {index} of {name}" for index in range(self._labels)}
        return StoredAdapter({**json.loads(self._config), "id2label": labels}, load(self._weights))

    def close(self):
        pass


@pytest.mark.parametrize(("density", "labels"), [(0.99, 100), (0.5, 0)])
def test_the_budget_counts_what_tasks_take(density, labels, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(79, 79) for _ in range(4)), nn.Linear(79, 5)).eval()

    model = get_peft_model(make(), MaskConfig(target_modules=["0", "1", "2", "3"], modules_to_save=["4"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "smn_" in key:
                parameter.copy_(density - torch.rand(parameter.shape))
    model.save_pretrained(tmp_path)
    with MaskBank(Parsed(tmp_path, labels), make()) as bank:
        names = bank.names
        bank.task(names[0])
        gc.collect()
        tracemalloc.start()
        before, counted = tracemalloc.get_traced_memory()[0], bank.stats.resident_bytes
        for name in names[1:]:
            bank.task(name)
        gc.collect()
        taken, counted = tracemalloc.get_traced_memory()[0] - before, bank.stats.resident_bytes - counted
        tracemalloc.stop()
        # What torch holds of its own, some 400 bytes a tensor and the head, is not traced.
        taken += len(names[1:]) * (6 * 400)
        print(f"{taken / len(names):.0f} bytes a task, {counted / len(names):.0f} counted: {taken / counted:.2f}")
        assert counted / 1.3 < taken < 1.3 * counted


def test_one_head_is_masked_under_one_task_and_whole_under_another(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 5)).eval()

    expected, x = {}, torch.randn(4, 64)
    for name, options in {"masked": {"target_modules": ["1"]}, "whole": {"modules_to_save": ["1"]}}.items():
        model = get_peft_model(make(), MaskConfig(**{"target_modules": ["0"], **options})).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "smn_" in key:
                    parameter.copy_(0.985 - torch.rand(parameter.shape))
                elif "modules_to_save" in key:
                    parameter.add_(1)
            model.save_pretrained(tmp_path / name)
            expected[name] = model(x)
    with torch.no_grad(), MaskBank.open([tmp_path / "masked", tmp_path / "whole"], make()) as bank:
        names = ["masked", "whole", "masked", "whole"]
        rows = torch.stack([expected[name][i] for i, name in enumerate(names)])
        torch.testing.assert_close(bank(x, names), rows, rtol=1e-4, atol=1e-5)
