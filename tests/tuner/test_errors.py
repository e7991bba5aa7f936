# SPDX-License-Identifier: Apache-2.0
"""Every mistake gets a message that names the fix, and leaves the model and the old files as they were."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smn_peft import MaskConfig
from smn_peft.storage.adapter_config import CONFIG_NAME
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from smn_peft.storage.files import AdapterFileError
from smn_peft.tuner import MaskLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*saved as bits", "ignore:Could not find a config file")


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.group = nn.BatchNorm1d(7)
        self.layers = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7)])
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.words = nn.Embedding(4, 7, max_norm=1.0)
        self.doubled = Doubled(7, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.norm, self.group, *self.layers):
            x = layer(x)
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return self.last(self.doubled(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def config(targets: object = ("first", "last"), **options) -> MaskConfig:
    return MaskConfig(target_modules=list(targets) if isinstance(targets, tuple) else targets, **options)


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def picture(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Types and tensors of a model."""
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    return types, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    types, tensors = picture(model)
    assert types == before[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in tensors.items())


def saved(folder: Path, **options) -> Path:
    model = get_peft_model(net(), config(init_weights=False, **options))
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **values: object) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor], str], None]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    edit(tensors, next(key for key in tensors if "first" in key))
    save_file(tensors, folder / WEIGHTS_NAME)


# --- What is refused before the model is touched ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("nothing",)}, r"Target modules .*nothing.* not found in the base model"),
        ({"targets": ("norm",)}, r"'norm' is a norm layer \(LayerNorm\).*take it out of target_modules"),
        ({"targets": ("first", "group")}, r"'group' is a norm layer \(BatchNorm1d\).*batch_norm='adapt'"),
        ({"targets": ("words",)}, r"'words' is an Embedding with max_norm.*set it to None"),
        ({"targets": ("last", "doubled")}, r"'doubled' is a .*Doubled, which has no masked form.*explain_targets"),
        ({"targets": ("out_proj",)}, r"'attention.out_proj' is inside an nn.MultiheadAttention.*itself: 'attention'"),
        ({"targets": r".*\.out_proj"}, r"inside an nn.MultiheadAttention"),
        ({"targets": ("layers",)}, r"'layers' is a .*ModuleList, which has no masked form"),
        ({"targets": None}, r"has no default target modules.*Pass target_modules="),
        ({"targets": "all-conv"}, r"finds no convolution"),
    ],
    ids=lambda value: str(value.get("targets")) if isinstance(value, dict) else "",
)
def test_targets_that_cannot_be_masked(options, message):
    model = net()
    before = picture(model)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(model, config(**options))
    assert_unchanged(model, before)


def test_targets_of_a_second_adapter_that_cannot_be_masked():
    model = get_peft_model(net(), config())
    before = picture(model)
    for targets in (("nothing",), ("first", "norm"), ("out_proj",)):
        with pytest.raises(ValueError, match=r"not found in the base model|norm layer|inside an nn"):
            model.add_adapter("second", config(targets))
        assert list(model.peft_config) == ["default"]
        assert_unchanged(model, before)
    model.add_adapter("second", config())
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("targets", [("first", "norm"), "all-linear"], ids=str)
def test_a_refused_base_is_as_trainable_as_before(targets):
    model = net()
    model.norm.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"norm layer|inside an nn|no masked form"):
        get_peft_model(model, config(targets))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_the_base_of_another_adapter_is_as_trainable_as_before(tmp_path):
    saved(tmp_path)
    model = net(seed=1)
    with pytest.raises(ValueError, match="does not belong to this base model"):
        PeftModel.from_pretrained(model, tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights():
    model = net()
    model.layers[1].weight = model.layers[0].weight
    before = picture(model)
    for targets in (("layers.0",), ("layers.0", "layers.1"), "all-linear"):
        options = {"exclude_modules": ["out_proj", "doubled"]} if targets == "all-linear" else {}
        with pytest.raises(ValueError, match=r"is tied: layers\.0\.weight, layers\.1\.weight are one tensor.*exclude"):
            get_peft_model(model, config(targets, **options))
        assert_unchanged(model, before)
    get_peft_model(model, config())  # tied weights elsewhere do not matter


def test_one_layer_in_two_places():
    model = net()
    model.twin = model.layers[0]
    with pytest.raises(ValueError, match=r"is tied: layers\.0\.weight, twin\.weight are one tensor"):
        get_peft_model(model, config(("layers.0",)))


def test_one_parent_in_two_places_is_no_tie():
    model = net()
    model.twins = model.layers  # the layer still has one place: wrapped there, it is wrapped everywhere
    masked = get_peft_model(model, config(("layers.0",)))
    assert masked.base_model.model.twins[0] is masked.base_model.model.layers[0]
    assert isinstance(model.twins[0], MaskLayer)


@pytest.mark.parametrize("flag", ["is_quantized", "hf_quantizer"])
def test_a_quantised_model(flag):
    model = net()
    setattr(model, flag, True)
    before = picture(model)
    with pytest.raises(ValueError, match=r"Quantised base models are not supported yet.*without quantization_config"):
        get_peft_model(model, config())
    assert_unchanged(model, before)


def test_a_quantised_weight():
    model = net()
    model.last.weight = nn.Parameter(torch.zeros(3, 7, dtype=torch.int8), requires_grad=False)
    before = picture(model)
    with pytest.raises(ValueError, match=r"'last' is torch.int8.*load the base in float32, bfloat16 or float16"):
        get_peft_model(model, config())
    assert_unchanged(model, before)


def test_a_sharded_weight():
    model = net()
    model.last.weight.ds_id = 3  # as DeepSpeed's ZeRO marks it
    before = picture(model)
    with pytest.raises(ValueError, match=r"'last' is partitioned by DeepSpeed's ZeRO-3.*shard it by FSDP2"):
        get_peft_model(model, config())
    assert_unchanged(model, before)


def test_an_offloaded_weight():
    model = net()
    model.last._hf_hook = type("AlignDevicesHook", (), {"offload": True})()
    with pytest.raises(ValueError, match=r"'last' is offloaded to CPU or disk.*without device_map"):
        get_peft_model(model, config())
    assert not any(isinstance(module, MaskLayer) for module in model.modules())


@pytest.mark.parametrize(
    "name",
    ["first", "layers", "0", "out_proj", "weight", "running_var", "modules_to_save", "base_layer", "my.task", ""],
)
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.filterwarnings("ignore:Adapter name")
def test_names_that_would_lose_tensors(name, existing):
    model = get_peft_model(net(), config()) if existing else net()
    before = picture(model)
    with pytest.raises(ValueError, match=r"cannot name an adapter.*Choose another name"):
        model.add_adapter(name, config()) if existing else get_peft_model(model, config(), adapter_name=name)
    assert_unchanged(model, before)
    assert not existing or list(model.peft_config) == ["default"]


def test_two_adapters_of_one_name():
    model = get_peft_model(net(), config())
    before = picture(model)
    with pytest.raises(ValueError, match=r"default'? already exists"):
        model.add_adapter("default", config(init_weights=False))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"'default' already exists: delete it or choose another name"):
        model.base_model.add_weighted_adapter(["default"], adapter_name="default", combination_type="union")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [0], "targets": "all-linear"}, "works with a list of target_modules only.*regex"),
        ({"layers_to_transform": [0], "targets": ".*last"}, "works with a list of target_modules only"),
        ({"layers_pattern": "layers"}, "no effect without layers_to_transform"),
        ({"target_parameters": ["first.weight"]}, "target_parameters is not supported.*target_modules"),
        ({"init_score": 0.0}, "init_score equals threshold.*a tie is off"),
        ({"init_score": "normal"}, "init_score must be a number or 'kaiming_uniform'"),
        ({"trainable_fraction": 0.0}, "trainable_fraction must be above 0 and at most 1; got 0.0"),
        ({"trainable_fraction": 1.5}, "trainable_fraction must be above 0 and at most 1; got 1.5"),
        ({"mask_type": "topk"}, r"needs density in \(0, 1\]; got None"),
        ({"mask_type": "topk", "density": 1.1}, "density must be above 0 and at most 1, or None; got 1.1"),
        ({"density": 0.5}, "belong to mask_type='topk'"),
        ({"mask_type": "soft"}, "mask_type must be one of threshold, topk; got 'soft'"),
        ({"select": "largest"}, "select must be one of random, magnitude"),
        ({"batch_norm": "train"}, "batch_norm must be one of frozen, adapt"),
        ({"rank_by": "size"}, "rank_by must be one of score, absolute"),
        ({"density_schedule": "cosine"}, "density_schedule must be one of linear, or None"),
        ({"codec": "zip"}, "codec must be one of bits, entropy"),
        ({"format_version": 99}, "format version 99; this smn_peft reads up to 1.*pip install -U smn_peft"),
        ({"format_version": "1"}, "format_version must be a positive integer, got '1'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


# --- What is refused while loading -----------------------------------------------------------------------------------


def assert_load_refused(folder: Path, error: type[Exception], message: str) -> None:
    """Refused onto a bare base and onto one with an adapter; both are as they were."""
    for is_trainable in (False, True):
        bare = net()
        before = picture(bare)
        with pytest.raises(error, match=f"(?s){message}"):
            PeftModel.from_pretrained(bare, folder, is_trainable=is_trainable)
        assert_unchanged(bare, before)
        host = get_peft_model(net(), config(init_weights=False), adapter_name="host").eval()
        before = picture(host)
        with pytest.raises(error, match=f"(?s){message}"):
            host.load_adapter(folder, "task", is_trainable=is_trainable)
        assert_unchanged(host, before)
        assert host.active_adapters == list(host.peft_config) == ["host"]


def test_an_adapter_of_another_base(tmp_path):
    saved(tmp_path)
    expected = json.loads((tmp_path / CONFIG_NAME).read_text())["base_fingerprint"]
    edit_config(tmp_path, base_model_name_or_path="someone/model")
    other = net(seed=1)
    other.name_or_path = "someone/other"
    before = picture(other)
    message = rf"made for someone/model \({expected}\), this base is someone/other \(float32:\w+\).*check_base=False"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)
    assert_unchanged(other, before)
    host = get_peft_model(other, config(), adapter_name="host")
    before = picture(host)
    with pytest.raises(ValueError, match=message):
        host.load_adapter(tmp_path, "task")
    assert_unchanged(host, before)
    assert list(host.peft_config) == ["host"]
    edit_config(tmp_path, check_base=False)
    host.load_adapter(tmp_path, "task")


def test_a_base_in_another_dtype_is_not_refused_but_said(tmp_path):
    saved(tmp_path)
    with pytest.warns(UserWarning, match=r"cannot be verified in another dtype.*float32:.*bfloat16:"):
        PeftModel.from_pretrained(net().bfloat16(), tmp_path)


def test_a_base_of_another_shape(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, check_base=False)
    other = net()
    other.first = nn.Linear(9, 7)
    before = picture(other)
    message = r"first\.smn_mask has shape \(5,\), but the base weight has 63 entries and takes \(8,\) bytes.*load"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)
    assert_unchanged(other, before)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file(tmp_path, keep):
    path = saved(tmp_path) / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    before = picture(model := net())
    with pytest.raises(AdapterFileError, match=r"truncated|promises.*fetch it again"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_unchanged(model, before)
    assert_load_refused(tmp_path, AdapterFileError, r"truncated|promises")


def test_a_header_that_promises_gigabytes(tmp_path):
    path = saved(tmp_path) / WEIGHTS_NAME
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])
    assert_load_refused(tmp_path, AdapterFileError, "promises a header of 1099511627776 bytes.*fetch it again")
    entry = {"x.smn_mask": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}
    header = json.dumps(entry).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert_load_refused(tmp_path, AdapterFileError, "cannot be read.*fetch it again")


def shift(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].float()


def shorten(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key][:-1].clone()


def reshape(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key][None]


def pad(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key][-1] |= 1


def rename(tensors: dict[str, Tensor], key: str) -> None:
    tensors["base_model.model.elsewhere.smn_mask"] = tensors.pop(key)


def drop(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (shift, TypeError, "first.smn_mask is torch.float32, a packed mask is uint8.*save it again"),
        (
            shorten,
            ValueError,
            r"first.smn_mask has shape \(4,\), but the base weight has 35 entries.*load the base",
        ),
        (reshape, ValueError, r"first.smn_mask has shape \(1, 5\)"),
        (pad, ValueError, "first.smn_mask has non-zero padding bits after its 35 bits: the file is damaged"),
        (rename, ValueError, "1 missing .*first.smn_mask.*1 that no masked layer takes .*elsewhere.*key_mapping"),
        (drop, ValueError, "1 missing .*first.smn_mask"),
    ],
)
def test_a_damaged_mask(tmp_path, edit, error, message):
    edit_tensors(saved(tmp_path), edit)
    assert_load_refused(tmp_path, error, message)


def test_damaged_scores(tmp_path):
    saved(tmp_path, save_scores=True)

    def widen(tensors: dict[str, Tensor], _: str) -> None:
        key = next(key for key in tensors if "first" in key and "scores" in key)
        tensors[key] = torch.ones(3, 3)
        del tensors["base_model.model.smn_settings"]  # with its checksum

    edit_tensors(tmp_path, widen)
    assert_load_refused(tmp_path, ValueError, r"first.smn_scores has shape \(3, 3\), the base weight \(7, 5\)")


@pytest.mark.parametrize("version", [2, 10**6])
def test_a_format_of_the_future(tmp_path, version):
    edit_config(saved(tmp_path), format_version=version)
    assert_load_refused(tmp_path, ValueError, f"format version {version}.*pip install -U smn_peft")


@pytest.mark.parametrize("version", [0, -1, 1.0, None, True, "one"])
def test_a_format_version_that_is_none(tmp_path, version):
    edit_config(saved(tmp_path), format_version=version)
    assert_load_refused(tmp_path, ValueError, "format_version must be a positive integer.*damaged")


# --- Saving ----------------------------------------------------------------------------------------------------------


def nan_model() -> PeftModel:
    model = get_peft_model(net(), config())
    with torch.no_grad():
        model.base_model.model.first.smn_scores["default"][2, 3] = torch.nan
    return model


def test_scores_that_are_nan_are_not_saved(tmp_path):
    saved(tmp_path)
    before = (tmp_path / WEIGHTS_NAME).read_bytes()
    with pytest.raises(ValueError, match=r"'default' hold NaN at .*first.*nothing was saved.*lower learning rate"):
        nan_model().save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_not_merged(value):
    model = nan_model()
    with torch.no_grad():
        model.base_model.model.first.smn_scores["default"][2, 3] = value
    before = picture(model)
    with pytest.raises(ValueError, match=r"NaNs detected.*adapter default seems to be broken.*Nothing was merged"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    after = picture(model)[1]
    assert all(torch.equal(after[name], tensor) for name, tensor in before[1].items() if "base_layer" in name)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path):
    def masked(seed: int) -> PeftModel:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(700, 700))
        return get_peft_model(base, MaskConfig(target_modules=["0"], init_weights=False, seed=seed))

    masked(1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(30_000), pytest.raises(Exception, match="File too large"):  # safetensors raises an error of its own
        masked(2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    masked(3).load_adapter(tmp_path, "task")


def test_a_disk_that_is_full_before_the_config_leaves_the_old_one(tmp_path, monkeypatch):
    saved(tmp_path)
    before = (tmp_path / CONFIG_NAME).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"Cannot write .*{CONFIG_NAME}: No space left on device.*untouched"):
        config(init_weights=False, seed=5).save_pretrained(str(tmp_path))
    monkeypatch.undo()
    assert (tmp_path / CONFIG_NAME).read_bytes() == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- Use -------------------------------------------------------------------------------------------------------------


def test_merging_twice_warns_and_changes_nothing():
    model = get_peft_model(net(), config(init_weights=False))
    model.merge_adapter()
    before = picture(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert_unchanged(model, before)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        model.unmerge_adapter()
    assert torch.equal(model.base_model.model.first.base_layer.weight, net().first.weight)


def test_packed_bits_cannot_train(tmp_path):
    saved(tmp_path)
    model = PeftModel.from_pretrained(net(), tmp_path)
    with pytest.raises(ValueError, match=r"'default' was loaded for inference.*Load it with is_trainable=True"):
        model.set_requires_grad("default")
    model.set_requires_grad("default", requires_grad=False)
    model.set_adapter("default")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_mixed_batches_that_make_no_sense():
    model = get_peft_model(net(), config(init_weights=False)).eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(X, adapter_names=["nobody"] * len(X))
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 6"):
        model(X, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match=r"training mode: call model.eval\(\) first"):
        model.train()(X, adapter_names=["default"] * len(X))
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter` first"):
        model(X, adapter_names=["default"] * len(X))
    model.unmerge_adapter()
    with torch.no_grad():
        assert torch.allclose(model(X, adapter_names=["default"] * len(X)), model(X))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ["one", "nobody"]}, r"\['nobody'\] do not exist, only \['one', 'two', 'other'\]"),
        ({"adapters": []}, "do not exist"),
        ({"adapters": ["one", "two"], "combination_type": "sum"}, "must be one of union, intersection, majority"),
        ({"adapters": ["one", "other"]}, "do not mask the same weights"),
        ({"adapters": ["one", "two"], "weights": [1.0]}, "weights must be 2 non-negative numbers"),
        ({"adapters": ["one", "two"], "weights": [1.0, -1.0]}, "weights must be 2 non-negative numbers"),
        ({"adapters": ["one", "two"], "weights": [0.0, 0.0]}, "weights must be 2 non-negative numbers, not all 0"),
        ({"adapters": ["one", "two"], "adapter_name": "two"}, "'two' already exists"),
        ({"adapters": ["one", "two"], "adapter_name": "first"}, "'first' cannot name an adapter"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_combinations_that_make_no_sense(arguments, message):
    model = get_peft_model(net(), config(), adapter_name="one")
    model.add_adapter("two", config())
    model.add_adapter("other", config(("first",)))
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(**arguments)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["one", "two", "other"]


def test_a_schedule_that_was_not_asked_for():
    model = get_peft_model(net(), config(mask_type="topk", density=0.5, init_score="kaiming_uniform"))
    with pytest.raises(ValueError, match="set density_schedule='linear' in its config"):
        model.base_model.update_density(0.5)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file; save_pretrained writes into a folder|should be a directory"):
        config().save_pretrained(str(tmp_path / "file"))
