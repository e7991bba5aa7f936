# SPDX-License-Identifier: Apache-2.0
"""`MaskBank`: every answer is the task's own, whatever was live before and whoever asks at the same time."""

from __future__ import annotations

import random
import threading
import time
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smn_peft import MaskBank, MaskConfig
from smn_peft.bank import mixed
from smn_peft.bank.task import TaskMask
from smn_peft.functional.packing import pack_bits
from smn_peft.storage.codec.blob import BLOB_NAME
from smn_peft.storage.files import AdapterFileError
from smn_peft.storage.repack import pack_adapter
from tests.bank.tiny import IMAGES, adapter, build, state_of

DENSITIES = {"sparse": 0.999, "dense": 0.7, "mixed": 0.995}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of adapters of the small ViT, and the logits of each."""
    root = tmp_path_factory.mktemp("adapters")
    logits = {}
    for seed, (name, density) in enumerate(DENSITIES.items()):
        _, model = adapter("vit", density, seed)
        model.save_pretrained(root / name)
        with torch.no_grad():
            logits[name] = model(IMAGES)
    pack_adapter(root / "sparse", root / "sparse")
    _, model = adapter("vit", DENSITIES["mixed"], 2, codec="entropy")
    model.save_pretrained(root / "mixed")
    with torch.no_grad():
        logits["__base__"] = build("vit")(IMAGES)
    return root, logits


@pytest.fixture
def bank(saved):
    with MaskBank.open([saved[0] / name for name in DENSITIES], build("vit")) as bank:
        yield bank


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_use_activate_and_the_base(bank, saved):
    _, logits = saved
    assert bank.names == sorted(DENSITIES)
    with torch.no_grad():
        for name in ("dense", "sparse", "mixed", "__base__", "sparse"):
            with bank.use(name) as model:
                close(model(IMAGES), logits[name])
                with bank.use("dense"):
                    close(model(IMAGES), logits["dense"])
                close(model(IMAGES), logits[name])
            assert torch.equal(bank.model(IMAGES), logits["__base__"])
        bank.activate("mixed")
        with bank.use("sparse") as model:
            close(model(IMAGES), logits["sparse"])
        close(bank.model(IMAGES), logits["mixed"])
        bank.activate(None)
        assert torch.equal(bank.model(IMAGES), logits["__base__"])


def test_mixed_batches_by_switching_and_over_a_shared_product(bank, saved, monkeypatch):
    _, logits = saved
    names = ["dense", "__base__", "sparse"]
    rows = bank.forward(IMAGES, names)
    close(rows, torch.stack([logits[name][i] for i, name in enumerate(names)]))
    before = bank.stats.switches
    names = ["sparse", None, "mixed"]
    close(bank(IMAGES, names), torch.stack([logits[name or "__base__"][i] for i, name in enumerate(names)]))
    assert bank.stats.switches == before  # the base's weights served all three
    monkeypatch.setattr("smn_peft.bank.mixed.SHARED_BELOW", 0)
    close(bank(IMAGES, names), torch.stack([logits[name or "__base__"][i] for i, name in enumerate(names)]))
    assert bank.stats.switches > before
    with pytest.raises(ValueError, match="3 samples and 2 tasks"):
        bank(IMAGES, ["sparse", "mixed"])
    with pytest.raises(KeyError, match="no task 'other'"):
        bank(IMAGES, "other")


class Outputs(nn.Module):
    """A model that gives more than logits, and takes a gain for each sample."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.form = nn.Linear(64, 64), nn.Linear(64, 5), form

    def forward(self, inputs, gain=None):
        features = self.body(inputs) if gain is None else self.body(inputs) * gain
        return self.form(self.head(features), features)


class Pair(NamedTuple):
    logits: torch.Tensor
    parts: list


FORMS = {
    "tensor": lambda logits, features: logits,
    "mapping": lambda logits, features: {"logits": logits, "features": features, "nothing": None},
    "tuple": lambda logits, features: (logits, features),
    "named": lambda logits, features: Pair(logits, [features]),
    "probabilities": lambda logits, features: {"logits": logits, "probabilities": logits.softmax(-1)},
    "constant": lambda logits, features: (logits, torch.tensor(3.0)),
}


def flat(output):
    if isinstance(output, dict):
        output = [value for value in output.values() if value is not None]
    return [output] if isinstance(output, torch.Tensor) else [t for part in output for t in flat(part)]


@pytest.mark.parametrize("below", [0, 6])
@pytest.mark.parametrize("form", FORMS)
def test_mixed_batches_of_models_that_give_more_than_logits(form, below, tmp_path, monkeypatch):
    """Tasks of 2, 3 and, without a head of its own, the base's 5 classes; 64 features, as many as no head has."""
    monkeypatch.setattr("smn_peft.bank.mixed.SHARED_BELOW", below)
    base, generator = Outputs(FORMS[form]).eval(), torch.Generator().manual_seed(1)
    classes = {"two": 2, "three": 3, "headless": None}
    for name, count in classes.items():
        model = Outputs(FORMS[form])
        if count is not None:
            model.head = nn.Linear(64, count)
        saved = ["head"] if count is not None else None
        peft = get_peft_model(model, MaskConfig(target_modules=["body"], modules_to_save=saved))
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                if "smn_" in key:
                    parameter.copy_(0.99 - torch.rand(parameter.shape, generator=generator))
        peft.save_pretrained(tmp_path / name)
    inputs, gain = torch.randn(6, 64, generator=generator), torch.arange(1.0, 7.0).view(6, 1)
    tasks = ["two", "__base__", "three", "headless", "two", "three"]
    with MaskBank.open([tmp_path / name for name in classes], base) as bank:
        for _ in range(2):
            rows = [bank(inputs[i : i + 1], [task], gain=gain[i : i + 1]) for i, task in enumerate(tasks)]
            mixed = bank(inputs, tasks, gain=gain)
            assert type(mixed) is type(rows[0]) or form == "tensor"
            if form == "tensor":
                assert [len(row) for row in mixed] == [2, 5, 3, 5, 2, 3]
                mixed = [mixed]
            for index, alone in enumerate(zip(*map(flat, rows), strict=True)):
                found = list(mixed.values())[index] if isinstance(mixed, dict) else mixed[index]
                found = found[0] if form == "named" and index else found
                for i, row in enumerate(alone):
                    close(found[i] if row.dim() else found, row[0] if row.dim() else row)
        same = bank(inputs[:2], ["two", "two"], gain=gain[:2])
        assert flat(same)[0].shape == (2, 2)


@pytest.mark.parametrize("is_compiled", [True, False], ids=["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_tasks_removed_is_taken_off_a_shared_product(is_compiled, dtype, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(mixed, "compiled", lambda function: None)
    generator = torch.Generator().manual_seed(0)
    for outputs, width, counts in ((5, 7, [1, 2, 3]), (33, 64, [4, 1, 20]), (16, 16, [17, 3, 2])):
        weight, bias = (
            torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((outputs, width), (outputs,))
        )
        masks, weights = [], []
        for off in (0.0, None, 0.1):
            kept = torch.rand(weight.shape, generator=generator) >= (off or 0.0)
            mask = TaskMask.from_packed("x", pack_bits(kept), kept.numel(), scaled=True, sparse_below=1.0)
            masks.append(None if off is None else mask)
            weights.append(weight * kept * mask.scale)
        inputs = torch.randn(sum(counts), width, generator=generator, dtype=dtype)
        product = inputs @ weight.t()
        mixed._remove(product, inputs, np.cumsum(counts).tolist(), masks, weight, bias)
        parts = zip(inputs.split(counts), weights, strict=True)
        torch.testing.assert_close(product, torch.cat([part @ own.t() + bias for part, own in parts]))


def test_mixed_batches_in_half_precision(saved):
    root, _ = saved
    names = ["sparse", "__base__", "sparse"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fingerprint is of fp32
        with MaskBank.open([root / "sparse"], build("vit").bfloat16()) as bank:
            rows, images = bank(IMAGES.bfloat16(), names), IMAGES.bfloat16()
            expected = torch.cat([bank(images[i : i + 1], name) for i, name in enumerate(names)])
    torch.testing.assert_close(rows, expected, rtol=0.05, atol=0.05)


def test_tasks_come_and_go(bank, saved, tmp_path):
    root, logits = saved
    bank.rename("dense", "strong")
    assert "dense" not in bank
    close(bank(IMAGES, "strong"), logits["dense"])
    with pytest.raises(ValueError, match="already"):
        bank.add("strong", root / "sparse")
    bank.add("strong", root / "sparse", replace=True)
    close(bank(IMAGES, "strong"), logits["sparse"])
    bank.activate("strong")
    bank.remove("strong")
    with torch.no_grad():
        assert torch.equal(bank.model(IMAGES), logits["__base__"])
    with pytest.raises(KeyError):
        bank.info("strong")
    assert bank.info("mixed")["density"] == pytest.approx(0.995, abs=0.005)
    with pytest.raises(ValueError, match="names the base"):
        bank.add("__base__", root / "sparse")
    with pytest.raises(FileNotFoundError):
        bank.add("none", tmp_path)


def test_an_adapter_of_another_base_is_refused(saved):
    root, _ = saved
    other = build("vit")
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 1
    with MaskBank.open([], other) as bank:
        with pytest.raises(
            ValueError,
            match=r"'x' does not belong to this base model, whose masked weights differ: made for timm/vit.*float32:",
        ):
            bank.add("x", root / "sparse")
        assert "x" not in bank


def test_a_damaged_task_errs_and_the_rest_serve(bank, saved):
    _, logits = saved
    stored = bank._source.read("sparse")
    blob = next(key for key in stored.tensors if key.endswith(BLOB_NAME))
    stored.tensors[blob][-3] ^= 0x10
    bank._tasks.clear()
    with pytest.raises(AdapterFileError):
        bank(IMAGES, "sparse")
    close(bank(IMAGES, "dense"), logits["dense"])
    stored.tensors[blob][-3] ^= 0x10
    close(bank(IMAGES, "sparse"), logits["sparse"])


@pytest.mark.parametrize("budget", [0, 30_000, 1 << 30])
def test_memory_stays_within_its_budget(saved, budget):
    root, logits = saved
    with MaskBank.open([root / name for name in DENSITIES], build("vit"), ram_budget=budget) as bank:
        for name in [name for name in DENSITIES for _ in range(2)]:
            close(bank(IMAGES, name), logits[name])
            assert bank.stats.resident_bytes <= budget
        assert (bank.stats.evictions > 0) == (budget < 1 << 30)
        assert (bank.stats.hits > 0) == (budget > 0)
        bank.pin("dense")
        misses = bank.stats.misses
        for name in DENSITIES:
            bank(IMAGES, name)
        close(bank(IMAGES, "dense"), logits["dense"])
        assert bank.stats.resident >= 1
        assert bank.stats.misses <= misses + 2
        bank.prefetch(["mixed"]).result(30)


@pytest.mark.parametrize(
    ("count", "seconds"), [(16, 0.7), pytest.param(64, 120, marks=pytest.mark.slow)], ids=["short", "minutes"]
)
def test_threads_that_switch_at_random_get_their_own_answers(bank, saved, count, seconds):
    _, logits = saved
    answers, wrong, names = [], [], [*DENSITIES, "__base__"]
    end = time.monotonic() + seconds

    def work(seed):
        generator = random.Random(seed)
        while time.monotonic() < end:
            name, way = generator.choice(names), generator.randrange(3)
            expected = logits[name]
            with torch.no_grad():
                if way == 0:
                    answer = bank(IMAGES, name)
                elif way == 1:
                    with bank.use(name) as model:
                        answer = model(IMAGES)
                else:
                    chosen = generator.choices(names, k=len(IMAGES))
                    answer = bank.forward(IMAGES, tasks=chosen)
                    expected = torch.stack([logits[task][row] for row, task in enumerate(chosen)])
            answers.append(name)
            if not torch.allclose(answer, expected, rtol=1e-4, atol=1e-4):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{len(answers)} answers of {count} threads in {seconds} s, {len(wrong)} wrong")
    assert not wrong
    assert len(answers) > count


def test_exclusive_banks_leave_the_last_task_live(saved):
    root, logits = saved
    base = build("vit")
    before = state_of(base)
    with MaskBank.open([root / name for name in DENSITIES], base, exclusive=True) as bank:
        bank(IMAGES, "sparse")
        switches = bank.stats.switches
        close(bank(IMAGES, "sparse"), logits["sparse"])
        assert bank.stats.switches == switches
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert "forward" not in base.__dict__


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.filterwarnings("ignore:.* were rounded to")
def test_selected_weights_and_a_classifier(tmp_path, save_dtype):
    from smn_peft.backbones import Classifier

    def classifier():
        return Classifier(build("vit", 0), 32, 3).eval()

    config = MaskConfig(modules_to_save=["head"], trainable_fraction=0.3, select="magnitude", codec="entropy")
    config.save_dtype = save_dtype
    model = get_peft_model(classifier(), config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "smn_" in key:
                parameter.copy_(0.9 - torch.rand_like(parameter))
        model.base_model.model.head.modules_to_save["default"].feature_mean.fill_(0.3)
        model.base_model.model.head.modules_to_save["default"].feature_std.fill_(2.0)
        model.save_pretrained(tmp_path)
        expected = PeftModel.from_pretrained(classifier(), tmp_path).eval()(IMAGES)
        with MaskBank.open([tmp_path], classifier()) as bank:
            close(bank(IMAGES, bank.names[0]), expected)
        plain = build("vit", 1)
        plain.load_state_dict({k: v for k, v in build("vit", 0).state_dict().items()}, strict=False)
        with MaskBank.open([tmp_path], plain) as bank:
            close(bank(IMAGES, bank.names[0]), expected)
