# SPDX-License-Identifier: Apache-2.0
"""1/σ is right for whoever reads a weight; copies of a model with an open bank are plain models of what is live."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from smn_peft import MaskBank, MaskConfig
from smn_peft.bank.live import LiveParameter
from tests.bank.tiny import IMAGES, adapter, build, state_of

SPARSE, DENSE = 0.985, 0.6


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.t()


def by_torch_function(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def by_composed_name(layer, x):
    return x @ getattr(layer, "wei" + "ght").t() + layer.bias


def by_parameters(layer, x):
    return F.linear(x, *layer.parameters())


def by_normalisation(layer, x):
    return F.linear(F.normalize(x), F.normalize(layer.weight) * layer.weight.norm())


def by_state_dict(layer, x):
    return x @ layer.state_dict()["weight"].t()


def by_functional_call(layer, x):
    own = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    return torch.func.functional_call(layer, own, (x,))


def by_autograd_function(layer, x):
    return Squared.apply(x, layer.weight)


def by_memory(layer, x):
    weight = layer.weight
    data = torch.from_numpy(weight.detach().numpy())
    assert data.data_ptr() == weight.data_ptr()
    return x @ data.t()


def by_a_copy(layer, x):
    return copy.deepcopy(layer)(x)


def by_dispatcher(layer, x):
    return torch.ops.aten.mm(x, layer.weight.transpose(0, 1))


READERS = [
    by_torch_function,
    by_composed_name,
    by_parameters,
    by_normalisation,
    by_state_dict,
    by_functional_call,
    by_autograd_function,
    by_memory,
    by_a_copy,
    by_dispatcher,
    nn.Linear.__call__,
]


class Net(nn.Module):
    """A layer that is read, once more through a reference that no name leads to, and one that is called."""

    def __init__(self, reader, *, kept):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.called, self.reader = nn.Linear(24, 24), nn.Linear(24, 5), reader
        self.kept = [self.read.weight] if kept else None

    def forward(self, x):
        x = self.reader(self.read, x) if self.kept is None else x @ self.kept[0].t()
        return self.called(torch.relu(x))


def masked(make, density, seed, folder):
    model = get_peft_model(make(), MaskConfig(target_modules=["read", "called"])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "smn_" in key:
                parameter.copy_(density - torch.rand(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        return model.merge_and_unload()


@pytest.mark.parametrize("reader", [*READERS, "kept"], ids=lambda reader: getattr(reader, "__name__", reader))
def test_a_weight_is_the_tasks_for_every_reader(reader, tmp_path):
    def make():
        net = Net(reader, kept=reader == "kept").eval()
        return net

    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    # Merged weights go through a copy of the model, whose kept reference would be the old one.
    expected, tasks = {}, {"s": (SPARSE, 1), "t": (SPARSE, 2), "d": (DENSE, 3)}
    for name, (density, seed) in tasks.items():
        model = masked(make, density, seed, tmp_path / name)
        model.kept = None if model.kept is None else [model.read.weight]
        with torch.no_grad():
            expected[name] = model(x)
    base = make()
    before = state_of(base)
    with torch.no_grad(), MaskBank.open([tmp_path / name for name in tasks], base) as bank:
        own = base(x)
        assert bank.task("s").masks["read.weight"].removed is not None
        for name in ("s", "t", "d", "s", "d", "t"):
            with bank.use(name) as model:
                for _ in range(2):
                    torch.testing.assert_close(model(x), expected[name], rtol=1e-4, atol=1e-5)
            assert torch.equal(base(x), own)
        names = ["s", "t", None, "d", "s", "t"]
        for batch in (names, ["s", "t", None, "s", "s", "t"]):
            rows = torch.stack([own[i] if name is None else expected[name][i] for i, name in enumerate(batch)])
            torch.testing.assert_close(bank(x, batch), rows, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert type(base.read.weight) is nn.Parameter


def test_facts_of_a_weight_do_not_make_it_dense(tmp_path):
    model = Net(nn.Linear.__call__, kept=False).eval()
    masked(lambda: copy.deepcopy(model), SPARSE, 1, tmp_path)
    with MaskBank.open([], model) as bank, torch.no_grad():
        bank.add("s", tmp_path)
        bank.activate("s")
        weight = model.read.weight
        model(torch.ones(2, 24))
        assert (weight.shape, weight.dtype, weight.device.type) == ((24, 24), torch.float32, "cpu")
        assert sum(p.numel() for p in model.parameters()) > 600
        live = bank._live._live["read.weight"]
        assert live.outside > 1
        weight.sum()
        assert live.outside == 1


@pytest.mark.parametrize("reads", [False, True], ids=["called", "read"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_graph_follows_the_task(reads, backend, tmp_path):
    reader = by_composed_name if reads else by_torch_function

    def make():
        return Net(reader, kept=False).eval()

    x = torch.randn(3, 24)
    expected = {
        name: masked(make, d, i, tmp_path / name) for i, (name, d) in enumerate({"s": SPARSE, "d": DENSE}.items())
    }
    base = make()
    with MaskBank.open([tmp_path / "s", tmp_path / "d"], base) as bank, torch.no_grad():
        bank.activate("s")
        compiled = torch.compile(base, backend=backend, fullgraph=True)
        for name in ("s", "d", "s", "d"):
            bank.activate(name)
            torch.testing.assert_close(compiled(x), expected[name](x), rtol=1e-4, atol=1e-5)


def test_copies_are_plain_models_of_what_is_live(tmp_path):
    adapter("vit", 0.99, 1)[1].save_pretrained(tmp_path)
    base = build("vit")
    with MaskBank.open([tmp_path], base) as bank, torch.no_grad():
        (name,) = bank.names
        for task in (None, name):
            with bank.use(task) as model:
                expected = model(IMAGES)
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                exported = torch.export.export(model, (IMAGES,)).module()(IMAGES)
                copies = [
                    copy.deepcopy(model),
                    copy.copy(copy.deepcopy(model)),
                    torch.load(file, weights_only=False),
                    pickle.loads(pickle.dumps(model)),
                ]
            for other in copies:
                assert type(other) is type(build("vit"))
                assert not any(isinstance(parameter, LiveParameter) for parameter in other.parameters())
                torch.testing.assert_close(other(IMAGES), expected, rtol=1e-5, atol=1e-5)
                if task is None:
                    MaskBank.open([tmp_path], other).close()
            torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5)
    assert type(base) is type(build("vit"))


def test_a_forward_that_somebody_put_on_the_base_stays(tmp_path):
    adapter("vit", 0.99, 1)[1].save_pretrained(tmp_path)
    base, calls = build("vit"), []
    own = base.forward

    def counted(*args):
        calls.append(args)
        return own(*args)

    base.forward = counted
    with MaskBank.open([tmp_path], base) as bank:
        bank(IMAGES, bank.names[0])
        bank(IMAGES)
        assert len(calls) == 2
    assert base.forward is counted


@pytest.mark.parametrize("density", [SPARSE, DENSE])
def test_a_bank_that_nobody_holds_puts_the_base_back(density, tmp_path):
    adapter("vit", density, 1)[1].save_pretrained(tmp_path)
    base = build("vit")
    before = state_of(base)
    bank = MaskBank.open([tmp_path], base)
    bank.activate(bank.names[0])
    bank.prefetch(bank.names).result(30)
    assert not torch.equal(base.head.weight, before["head.weight"])
    gone = weakref.ref(bank)
    del bank
    assert gone() is None  # at once, not when cycles are looked for
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert type(base) is type(build("vit"))
    MaskBank.open([tmp_path], base).close()
    model = weakref.ref(base)
    del base
    gc.collect()
    assert model() is None
