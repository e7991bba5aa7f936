# SPDX-License-Identifier: Apache-2.0
"""A bank while its model, its tasks or their names change: what is live stays right, and nothing hangs."""

from __future__ import annotations

import copy
import shutil
import threading
import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from smn_peft import MaskBank, MaskConfig
from smn_peft.bank.source import StoredAdapter, read_adapter
from smn_peft.bank.store import DiskStore
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from smn_peft.storage.files import AdapterFileError
from tests.bank.tiny import IMAGES, adapter, build, save_sealed, state_of

DENSITIES = {"a": 0.999, "b": 0.7, "c": 0.99}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of adapters of the small ViT, one whose selected weights are coded, one of a ResNet."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, density) in enumerate(DENSITIES.items()):
        adapter("vit", density, seed)[1].save_pretrained(root / name)
    adapter("vit", 0.9, 5, codec="entropy", trainable_fraction=0.5)[1].save_pretrained(root / "selected")
    adapter("resnet", 0.9, 6)[1].save_pretrained(root / "resnet")
    return root


@pytest.fixture
def bank(saved):
    with MaskBank.open([saved / name for name in DENSITIES], build("vit")) as bank:
        yield bank


def logits(bank, name):
    with bank.use(name) as model, torch.no_grad():
        return model(IMAGES)


def in_time(work, seconds=20):
    """Run in another thread, which must end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"


def test_a_bank_closes_while_tasks_are_prefetched(saved, tmp_path):
    def work():
        with DiskStore(tmp_path / "bank") as store:
            store.add_many((f"{name}{copy}", saved / name) for copy in range(3) for name in DENSITIES)
        with MaskBank.open(tmp_path / "bank", build("vit")) as bank:
            bank.prefetch(bank.names)
            bank.prefetch(bank.names)
        bank.close()
        done.append(bank)

    done = []
    in_time(work)
    assert done


def test_tasks_are_decoded_while_another_is_in_use(bank, saved):
    expected = logits(bank, "b")
    bank.add("selected", saved / "selected")
    for name in ("c", "selected"):
        bank._tasks.drop(name)

    def work():
        with bank.use("b") as model:
            bank.prefetch(["c", "selected"]).result(10)
            bank.add("more", saved / "selected")
            with torch.no_grad():
                done.append(torch.equal(model(IMAGES), expected))

    done = []
    in_time(work)
    assert done == [True]


def test_an_adapter_with_other_layers_leaves_the_active_task_live(bank, saved, tmp_path):
    config = MaskConfig(init_weights=False, seed=7, target_modules=["qkv"])
    get_peft_model(build("vit"), config).save_pretrained(tmp_path)
    with MaskBank.open([tmp_path], build("vit")) as other, torch.no_grad():
        other.activate(other.names[0])
        expected = other.model(IMAGES)
        other.add("a", saved / "a")
        assert torch.equal(other.model(IMAGES), expected)


def test_an_active_task_that_another_process_removed(saved, tmp_path):
    with DiskStore(tmp_path) as store:
        store.add_many((name, saved / name) for name in DENSITIES)
    with MaskBank.open(tmp_path, build("vit")) as bank, DiskStore(tmp_path) as other:
        base = logits(bank, None)
        bank.activate("a")
        other.remove("a")
        with pytest.warns(UserWarning, match="'a' was active and is gone from the bank: the base is live"):
            answer = bank(IMAGES, "b")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            assert torch.equal(bank(IMAGES, "b"), answer)
            assert torch.equal(bank.model(IMAGES), base)


def test_a_task_that_another_process_replaced(saved, tmp_path):
    with DiskStore(tmp_path) as store:
        store.add_many((name, saved / name) for name in DENSITIES)
    with MaskBank.open(tmp_path, build("vit")) as bank, DiskStore(tmp_path) as other:
        before = {name: logits(bank, name) for name in ("a", "b")}
        other.add("a", saved / "b", replace=True)
        assert torch.equal(logits(bank, "a"), before["b"])
        other.rename("b", "c2")
        other.rename("a", "b")
        assert torch.equal(logits(bank, "b"), before["b"])


def test_an_active_task_that_goes_while_another_is_in_use(bank):
    base = logits(bank, None)
    bank.activate("a")
    with pytest.warns(UserWarning, match="gone from the bank"), bank.use("b"):
        bank.remove("a")
    with torch.no_grad():
        assert torch.equal(bank.model(IMAGES), base)


def test_replacing_and_renaming_the_active_task(bank, saved):
    expected = {name: logits(bank, name) for name in ("a", "b")}
    bank.activate("a")
    bank.add("a", saved / "b", replace=True)
    with torch.no_grad():
        assert torch.equal(bank.model(IMAGES), expected["b"])
        bank.rename("a", "first")
        assert torch.equal(bank.model(IMAGES), expected["b"])
        bank(IMAGES, "c")
        assert torch.equal(bank.model(IMAGES), expected["b"])


def test_pins_follow_names(saved):
    with MaskBank.open([saved / "a", saved / "b"], build("vit"), ram_budget=0) as bank:
        with pytest.raises(KeyError):
            bank.pin("none")
        assert bank._tasks.pinned == set()
        bank.pin("a")
        bank.rename("a", "x")
        assert (bank._tasks.pinned, bank.stats.resident) == ({"x"}, 1)
        bank.add("x", saved / "b", replace=True)
        bank.task("x")
        assert (bank._tasks.pinned, bank.stats.resident) == ({"x"}, 1)
        bank.remove("x")
        assert (bank._tasks.pinned, bank.stats.resident) == (set(), 0)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_inference_mode_is_one_way_of_many(name, saved):
    base = build(name)
    before, tasks = state_of(base), ["b", "c", "a"] if name == "vit" else ["resnet"]
    with MaskBank.open([saved / task for task in tasks], base) as bank:
        expected = logits(bank, tasks[0])
    with MaskBank.open([saved / task for task in tasks], base) as bank:
        with torch.inference_mode():
            bank(IMAGES, [tasks[-1], "__base__", tasks[-1]])
            for task in tasks:
                bank.activate(task)
        bank.activate(tasks[0])
        inputs = IMAGES.clone().requires_grad_()
        output = base(inputs)
        torch.testing.assert_close(output.detach(), expected, rtol=1e-4, atol=1e-4)
        output.sum().backward()
        assert inputs.grad is not None
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_base_that_was_built_in_inference_mode(saved):
    with torch.inference_mode():
        base = build("vit")
    before = state_of(base)
    with MaskBank.open([saved / "b"], base) as bank, torch.no_grad():
        bank(IMAGES, "b")
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_one_bank_for_one_model(bank, saved):
    with pytest.raises(ValueError, match=r"has a bank already.*close that one first"):
        MaskBank.open([saved / "a"], bank.model)
    with pytest.raises(ValueError, match="has a bank already"):
        MaskBank.open([saved / "a"], nn.Sequential(bank.model))
    bank.close()
    MaskBank.open([saved / "a"], bank.model).close()


def test_a_bank_that_cannot_be_opened_leaves_the_model_alone(saved):
    base, count = build("vit"), threading.active_count()
    with pytest.raises(ValueError, match=r"Two adapters would be called 'a': put one in by bank\.add"):
        MaskBank.open([saved / "a", saved / "a"], base)
    with pytest.raises(KeyError):
        MaskBank.open([saved / "a"], base, hot=["none"])
    assert "forward" not in base.__dict__
    assert threading.active_count() == count


@pytest.mark.parametrize("live", [None, "a", "b"])
def test_a_base_that_moves_to_another_dtype(saved, live):
    base = build("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fingerprint is of fp32
        with MaskBank.open([saved / "a", saved / "b"], build("vit").bfloat16()) as bank:
            expected = {name: logits_of(bank, IMAGES.bfloat16(), name) for name in ("a", "b", None)}
        with MaskBank.open([saved / "a", saved / "b"], base) as bank:
            for name in ("b", "a", live):
                bank.activate(name)
            base.bfloat16()
            for name in ("a", "b", None):
                assert torch.equal(logits_of(bank, IMAGES.bfloat16(), name), expected[name]), name
    assert all(torch.equal(value, build("vit").bfloat16().state_dict()[key]) for key, value in state_of(base).items())


def logits_of(bank, images, name):
    with bank.use(name) as model, torch.no_grad():
        return model(images)


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(saved, when):
    base, layout = build("resnet"), torch.channels_last
    before = state_of(base)
    with MaskBank.open([saved / "resnet"], build("resnet")) as bank:
        expected = logits(bank, "resnet")
    if when == "before":
        base.to(memory_format=layout)
    with MaskBank.open([saved / "resnet"], base) as bank:
        for _ in range(2):
            torch.testing.assert_close(bank(IMAGES, "resnet"), expected, rtol=1e-4, atol=1e-4)
            base.to(memory_format=layout)
    assert base.layer1[0].conv1.weight.is_contiguous(memory_format=layout)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_sparse_task_where_memory_is_in_another_order(saved):
    base = build("vit")
    with MaskBank.open([saved / "a"], build("vit")) as bank:
        expected = logits(bank, "a")
    before = state_of(base)
    weight = base.blocks[0].mlp.fc1.weight
    weight.data = weight.data.t().contiguous().t()
    with MaskBank.open([saved / "a", saved / "b"], base) as bank:
        for names in ("a", ["a", "__base__", "a"]):
            rows = bank(IMAGES, names)
            torch.testing.assert_close(rows[::2], expected[::2], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("live", [None, "a", "b"])
def test_a_base_whose_weights_somebody_else_writes(saved, live):
    base = build("vit")
    bank = MaskBank.open([saved / "a", saved / "b"], base)
    bank.activate(live)
    base.load_state_dict({key: value + 1 for key, value in state_of(base).items()})
    with pytest.raises(RuntimeError, match=r"weight was written to.*Close the bank before the base is changed"):
        bank(IMAGES, "b")
    if live is None:
        bank.close()
    else:
        with pytest.raises(RuntimeError, match="was written to"):
            bank.close()
    assert not any("forward" in module.__dict__ for module in base.modules())
    bank.close()


def test_a_head_that_somebody_writes_to_is_not_the_tasks(bank):
    expected = logits(bank, "b")
    with bank.use("b") as model, torch.no_grad():
        model.head.weight.mul_(0)
    assert torch.equal(logits(bank, "b"), expected)


def test_tied_weights_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3)).eval()
    get_peft_model(copy.deepcopy(model), MaskConfig(target_modules=["0"], check_base=False)).save_pretrained(tmp_path)
    model[2].weight = model[0].weight
    with MaskBank.open([], model) as bank:
        with pytest.raises(ValueError, match=r"'t' cannot be taken: .*0.weight, 2.weight are tied"):
            bank.add("t", tmp_path)


def test_empty_batches_and_wrong_names(bank):
    for tasks in ("a", None, []):
        assert bank(IMAGES[:0], tasks).shape == (0, 4)
    with pytest.raises(TypeError, match=r"tasks holds 1 \(int\)"):
        bank(IMAGES, [1, 2, 3])


MISFITS = [
    ({"head.bias": (3,)}, r"has a head head with a weight of 4 and a bias of 3 classes"),
    ({"head.weight": (3, 32)}, r"a weight of 3 and a bias of 4 classes"),
    ({"head.weight": (3, 31), "head.bias": (3,)}, r"head.weight has shape \(3, 31\), the base \(4, 32\)"),
    ({"blocks.0.mlp.fc2.weight": (7, 128)}, r"fc2.weight has shape \(7, 128\), .* and is no head"),
    ({"blocks.0.norm1.weight": (7,)}, r"norm1.weight has shape \(7,\)"),
    ({"blocks.0.norm1.running_mean": (7,)}, "for which the base has no place"),
]


def test_adapters_that_could_not_run_are_not_taken(saved, tmp_path):
    with MaskBank.open([], build("vit")) as bank:
        for index, (change, message) in enumerate(MISFITS):
            folder = shutil.copytree(saved / "a", tmp_path / str(index))
            tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS_NAME).items()}
            tensors |= {f"base_model.model.{key}": torch.zeros(shape) for key, shape in change.items()}
            save_sealed(folder, tensors)
            with pytest.raises(ValueError, match=message):
                bank.add("x", folder)
        bank.add("a", saved / "a")
        assert bank(IMAGES, "a").shape == (3, 4)


def test_an_adapter_whose_config_is_damaged_is_not_taken(saved, tmp_path):
    with DiskStore(tmp_path / "bank") as store:
        good = read_adapter(saved / "a")
        with pytest.raises(AdapterFileError, match=r"the task 'bad' is damaged: .*trainable_fraction is 'abc'"):
            store.add("bad", StoredAdapter({**good.config, "trainable_fraction": "abc"}, good.tensors))
