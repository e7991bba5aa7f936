# SPDX-License-Identifier: Apache-2.0
"""Bases that are compiled, recomputed, quantised, sharded, or have modules named as PEFT names its own."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from smn_peft import MaskBank, MaskConfig, explain_targets
from smn_peft.storage.adapter_file import read_adapter_file
from smn_peft.tuner import MaskLayer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.fc(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
OPTIONS = {"init_weights": False, "modules_to_save": ["head"], "batch_norm": "adapt"}


def compiled(module: nn.Module, calls: list[int]) -> nn.Module:
    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    return torch.compile(module, backend=backend)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "targets"),
    [("model", ["fc"]), ("block", r"blocks\.\d+\.fc"), ("block", "all-linear"), ("layer", "all-linear")],
)
def test_a_compiled_base_is_masked_saved_and_loaded_as_any_other(part, targets, tmp_path):
    base, calls = Net(), []
    if part == "model":
        base = compiled(base, calls)
    elif part == "block":
        base.blocks[1] = compiled(base.blocks[1], calls)
    else:
        base.blocks[1].fc = compiled(base.blocks[1].fc, calls)
    base.eval()(X)
    calls.clear()
    model = get_peft_model(base, MaskConfig(target_modules=targets, **OPTIONS)).eval()
    with torch.no_grad():
        expected = model(X)
    assert calls or part == "layer"  # still compiled; a layer's own wrapper is around what a masked layer replaces
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in key for key in read_adapter_file(tmp_path))
    bare = get_peft_model(Net(), MaskConfig(target_modules=targets, **OPTIONS)).eval()
    assert bare.base_model.masks().keys() == model.base_model.masks().keys()
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path).eval()(X), expected)
    with torch.no_grad():
        assert torch.equal(
            PeftModel.from_pretrained(torch.compile(Net(), backend="eager"), tmp_path).eval()(X), expected
        )


def test_blocks_compiled_after_masking_are_saved_without_it(tmp_path):
    model = get_peft_model(Net(), MaskConfig(target_modules=["fc"], **OPTIONS)).eval()
    base = model.get_base_model()
    base.blocks[0] = torch.compile(base.blocks[0], backend="eager")
    with torch.no_grad():
        expected = model(X)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path).eval()(X), expected)
    model.load_adapter(tmp_path, "again")


def test_what_would_be_masked_in_a_compiled_base_is_what_would_be_masked():
    bare, wrapped = explain_targets(Net(), verbose=False), explain_targets(torch.compile(Net()), verbose=False)
    assert wrapped.rows == bare.rows


# --- Names that PEFT has too -----------------------------------------------------------------------------------------


class Named(nn.Module):
    """Modules named as wrappers name theirs, and a twin that a shortened key would fall on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.stage = nn.Module()
        self.stage.conv = nn.Conv2d(4, 4, 1)
        self.stage.original_module = nn.Module()
        self.stage.original_module.conv = nn.Conv2d(4, 4, 1)
        self.modules_to_save = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage.original_module.conv(self.stage.conv(self.base_layer(x)))
        return self.modules_to_save(x).mean((2, 3))


def test_wrappers_are_known_by_type(tmp_path):
    images = torch.randn(3, 3, 8, 8)
    base = Named()
    assert explain_targets(base, verbose=False).total_parameters == sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, MaskConfig(target_modules="all-conv", init_weights=False)).eval()
    assert len(model.base_model.masks()) == 4
    with torch.no_grad():
        expected = model(images)
    model.save_pretrained(tmp_path)
    assert sum("smn_mask" in key for key in read_adapter_file(tmp_path)) == 4
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(Named(), tmp_path).eval()(images), expected)
        with MaskBank.open([tmp_path], base=Named().eval()) as bank, bank.use(tmp_path.name) as live:
            torch.testing.assert_close(live(images), expected)


# --- Weights that are not parameters ---------------------------------------------------------------------------------


def weight_normed(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


def by_hand(layer: nn.Linear) -> None:
    value = layer.weight.detach()
    del layer.weight
    layer.weight = value


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda net: prune.l1_unstructured(net.blocks[0].fc, "weight", 0.5), r"prune.remove\(layer, 'weight'\)"),
        (lambda net: prune.random_unstructured(net.blocks[0].fc, "bias", 0.5), r"prune.remove\(layer, 'bias'\)"),
        (lambda net: weight_normed(net.blocks[0].fc), "remove_weight_norm"),
        (lambda net: spectral_norm(net.blocks[0].fc), "remove_spectral_norm"),
        (lambda net: parametrizations.orthogonal(net.blocks[0].fc), "remove_parametrizations"),
        (lambda net: by_hand(net.blocks[0].fc), r"layer.weight = torch.nn.Parameter\(layer.weight\)"),
    ],
    ids=["prune", "prune-bias", "weight_norm", "spectral_norm", "parametrization", "by-hand"],
)
def test_a_recomputed_weight_is_refused_with_the_way_out(change, remedy):
    base = Net()
    change(base)
    with pytest.raises(ValueError, match=rf"'blocks.0.fc'.*{remedy}"):
        get_peft_model(base, MaskConfig(target_modules=["fc"]))
    assert not any(isinstance(module, MaskLayer) for module in base.modules())


def test_a_pruned_projection_of_attention_is_refused():
    base = nn.Sequential(nn.MultiheadAttention(8, 2))
    prune.l1_unstructured(base[0].out_proj, "weight", 0.5)
    with pytest.raises(ValueError, match=r"'0' has no parameter out_proj.weight: pruning"):
        get_peft_model(base, MaskConfig(target_modules=["0"]))


def test_after_the_way_out_it_is_masked():
    base = Net()
    prune.l1_unstructured(base.blocks[0].fc, "weight", 0.5)
    prune.remove(base.blocks[0].fc, "weight")
    assert get_peft_model(base, MaskConfig(target_modules=["fc"])).eval()(X).shape == (5, 3)


# --- Quantised and sharded -------------------------------------------------------------------------------------------


class Packed(Tensor):
    """A tensor that says float32 and holds something else, as torchao's do."""


def packed(net: Net) -> None:
    net.blocks[0].fc.weight = nn.Parameter(net.blocks[0].fc.weight.detach().as_subclass(Packed), requires_grad=False)


def replaced(module: str, name: str):
    def change(net: Net) -> None:
        kind = type(name, (nn.Linear,), {"__module__": module})
        net.blocks[0].fc = kind(8, 8)

    return change


def dynamic(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.blocks = torch.ao.quantization.quantize_dynamic(net.blocks, {nn.Linear})


@pytest.mark.parametrize(
    "change",
    [
        packed,
        dynamic,
        replaced("bitsandbytes.nn.modules", "Linear4bit"),
        replaced("bitsandbytes.nn.modules", "Linear8bitLt"),
        replaced("optimum.quanto.nn.qlinear", "QLinear"),
        replaced("gptqmodel.nn_modules.qlinear.marlin", "MarlinQuantLinear"),
        replaced("awq.modules.linear.gemm", "WQLinear_GEMM"),
        replaced("transformers.integrations.finegrained_fp8", "FP8Linear"),
        replaced("torch.ao.nn.qat.modules.linear", "Linear"),
    ],
    ids=["subclass", "dynamic", "4bit", "8bit", "quanto", "gptq", "awq", "fp8", "qat"],
)
@pytest.mark.parametrize("targets", [["fc"], "all-linear"], ids=str)
def test_a_quantised_base_is_refused_as_one(change, targets):
    base = Net()
    try:
        change(base)
    except RuntimeError as error:
        pytest.skip(f"this torch cannot quantise here: {error}")
    with pytest.raises(ValueError, match=r"quantised.*without quantization_config"):
        get_peft_model(base, MaskConfig(target_modules=targets))
    assert not any(isinstance(module, MaskLayer) for module in base.modules())


class VectorQuantizer(nn.Module):
    """Quantises features, not weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.add = torch.ao.nn.quantized.FloatFunctional()
        self.stub = torch.ao.quantization.QuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.add.add(self.fc(self.stub(x)), x)


def test_a_float_model_with_such_names_is_masked():
    class Mine(nn.Parameter):
        pass

    model = VectorQuantizer()
    model.fc.weight = Mine(model.fc.weight.detach())
    assert get_peft_model(model, MaskConfig(target_modules=["fc"]))(X).shape == X.shape


def test_a_sharded_weight_gets_the_advice_of_its_kind():
    base = Net()
    base.blocks[0].fc.weight = nn.Parameter(
        base.blocks[0].fc.weight.detach().as_subclass(type("DTensor", (Tensor,), {}))
    )
    with pytest.raises(ValueError, match=r"device mesh.*without tp_plan.*before the model is sharded"):
        get_peft_model(base, MaskConfig(target_modules=["fc"]))


@pytest.mark.parametrize("train", [False, True])
def test_a_forward_on_the_meta_device_gives_shapes(train):
    with torch.device("meta"):
        base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    model = get_peft_model(base, MaskConfig(target_modules=["0", "2"])).train(train)
    assert model(torch.empty(5, 3, 8, 8, device="meta")).shape == (5, 2)
