# SPDX-License-Identifier: Apache-2.0
"""Coded adapters through PEFT: saved, loaded, switched, renamed, refused over another base; heads in narrow dtypes."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from smn_peft import MaskConfig, round_extras
from smn_peft.storage.adapter_file import WEIGHTS_NAME, adapter_sizes, check_adapter_file
from smn_peft.storage.files import AdapterFileError
from smn_peft.storage.repack import pack_adapter, unpack_adapter

from .cases import REPRESENTATIVES, Case, mask_bits, masked_model

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:Unable to fetch remote file")
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(576, 20), nn.Linear(20, 4)]
    return nn.Sequential(*layers).requires_grad_(False)


def adapter(codec: str = "entropy", **options) -> PeftModel:
    options = {"batch_norm": "adapt", "init_weights": False, "modules_to_save": ["4"], **options}
    model = get_peft_model(base(), MaskConfig(target_modules=["0", "3"], codec=codec, **options))
    with torch.no_grad():  # statistics and a head that no half-precision float can hold
        run(model.train())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter) / 999)
    return model.eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PIXELS)


def saved(model: PeftModel, folder: Path) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(folder)
    return (folder / WEIGHTS_NAME).read_bytes()


def reload(folder: Path, **options) -> PeftModel:
    return PeftModel.from_pretrained(base(), folder, **options).eval()


@pytest.mark.parametrize("case", REPRESENTATIVES, ids=lambda case: case.name)
def test_every_layer_type_round_trips(case: Case, tmp_path):
    model = masked_model(case, case.random(codec="entropy"))
    data = saved(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "a").eval()
    found, expected = mask_bits(loaded), mask_bits(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    with torch.no_grad():
        assert torch.equal(loaded(case.inputs()), model(case.inputs()))
    assert saved(loaded, tmp_path / "b") == data


OPTIONS = [
    {},
    {"trainable_fraction": 0.1},
    {"trainable_fraction": 0.3, "select": "magnitude"},
    {"mask_bias": True, "seed": 3},
    {"mask_type": "topk", "density": 0.9, "init_score": "kaiming_uniform", "init_weights": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_coded_adapter_is_what_its_bits_are(tmp_path, options):
    model = adapter(**options)
    data = saved(model, tmp_path / "coded")
    model.peft_config["default"].codec = "bits"
    saved(model, tmp_path / "bits")
    loaded = reload(tmp_path / "coded", low_cpu_mem_usage=bool(options))
    assert torch.equal(run(loaded), run(reload(tmp_path / "bits")))
    assert saved(loaded, tmp_path / "again") == data
    if "trainable_fraction" in options:  # what does not train costs no bits
        assert adapter_sizes(tmp_path / "coded").mask < 0.5 * adapter_sizes(tmp_path / "bits").mask


def test_files_are_repacked_without_a_base(tmp_path):
    bits, coded = saved(adapter("bits"), tmp_path / "bits"), saved(adapter(), tmp_path / "coded")
    pack_adapter(tmp_path / "bits", tmp_path / "packed")
    assert (tmp_path / "packed" / WEIGHTS_NAME).read_bytes() == coded
    unpack_adapter(tmp_path / "packed", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / WEIGHTS_NAME).read_bytes() == bits
    assert reload(tmp_path / "packed").peft_config["default"].codec == "entropy"
    assert reload(tmp_path / "unpacked").peft_config["default"].codec == "bits"


def test_the_checksum_is_of_what_peft_saves(tmp_path):
    for codec in ("bits", "entropy"):
        saved(adapter(codec), tmp_path / codec)
        assert check_adapter_file(tmp_path / codec).endswith(" of 5")  # three statistics, weight and bias of the head
    tensors = load_file(tmp_path / "bits" / WEIGHTS_NAME)
    save_file({**tensors, "base_model.model.embed_tokens.weight": torch.ones(3)}, tmp_path / "file")
    assert check_adapter_file(tmp_path / "file") is None  # PEFT adds embeddings to what it was computed of


def test_several_coded_adapters_load_switch_and_train_on(tmp_path):
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        model = adapter(seed=seed)
        saved(model, tmp_path / name)
        outputs[name] = run(model)
    host = PeftModel.from_pretrained(base(), tmp_path / "one", adapter_name="one").eval()
    host.load_adapter(tmp_path / "two", "two")
    for name in ("two", "one"):
        host.set_adapter(name)
        assert torch.equal(run(host), outputs[name])
    host.load_adapter(tmp_path / "two", "one")  # into its slot
    assert torch.equal(run(host), outputs["two"])
    with pytest.warns(UserWarning, match="saved as bits"):
        trainable = reload(tmp_path / "one", is_trainable=True)
    assert torch.equal(run(trainable), outputs["one"])
    assert any("smn_scores" in name and p.requires_grad for name, p in trainable.named_parameters())


def test_saved_scores_stand_beside_coded_masks(tmp_path):
    model = adapter(save_scores=True)
    saved(model, tmp_path)
    names = {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS_NAME)}
    assert {"smn_masks", "smn_scores"} <= names
    assert "smn_mask" not in names
    loaded = reload(tmp_path, is_trainable=True)
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters())


def clip(seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()


class Outer(nn.Module):
    """The same tower one level deeper, as another version of a library might have it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = clip()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values).pooler_output


def test_a_key_mapping_renames_coded_masks_too(tmp_path):
    config = MaskConfig(target_modules=["q_proj", "fc1"], init_weights=False, codec="entropy")
    model = get_peft_model(clip(), config)
    saved(model, tmp_path)
    with pytest.raises(ValueError, match=r"4 missing .* 4 that no masked layer takes.*key_mapping"):
        PeftModel.from_pretrained(Outer(), tmp_path)
    loaded = PeftModel.from_pretrained(Outer(), tmp_path, key_mapping={r"^(?!tower)": "tower."})
    first, second = mask_bits(model), mask_bits(loaded)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_transformers_own_loader_says_that_it_cannot(tmp_path, is_trainable):
    saved(get_peft_model(clip(), MaskConfig(init_weights=False, codec="entropy")), tmp_path)
    model = clip()
    model.load_adapter(str(tmp_path), is_trainable=is_trainable)
    with pytest.raises(RuntimeError, match=r"never arrived.*PeftModel.from_pretrained.*smn unpack"):
        model(pixel_values=torch.zeros(1, 3, 16, 16))
    unpack_adapter(tmp_path, tmp_path / "bits")
    native = clip()
    native.load_adapter(str(tmp_path / "bits"))
    expected = PeftModel.from_pretrained(clip(), tmp_path).eval()
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(native(pixel_values=pixels).pooler_output, expected(pixel_values=pixels).pooler_output)


def test_the_config_of_a_coded_adapter_starts_a_fresh_one(tmp_path):
    saved(adapter(), tmp_path)
    with pytest.raises(RuntimeError, match=r"replace\(config, base_fingerprint=None\)"):
        get_peft_model(base(), MaskConfig.from_pretrained(str(tmp_path))).eval()(PIXELS)
    config = replace(
        MaskConfig.from_pretrained(str(tmp_path)), base_fingerprint=None, inference_mode=False, init_weights=True
    )
    model = get_peft_model(base(), config).eval()
    assert all(mask.all() for mask in model.base_model.masks().values())
    run(model)


def test_another_base_is_refused(tmp_path):
    saved(adapter(), tmp_path)
    with pytest.raises(ValueError, match="does not belong to this base model"):
        PeftModel.from_pretrained(base(seed=1), tmp_path)


def test_magnitudes_in_another_dtype_are_a_checksum_error(tmp_path):
    saved(adapter(trainable_fraction=0.3, select="magnitude"), tmp_path)
    with pytest.raises(AdapterFileError, match="checksum"), pytest.warns(UserWarning, match="another dtype"):
        PeftModel.from_pretrained(base().bfloat16(), tmp_path)


@pytest.mark.parametrize("save_dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("codec", ["bits", "entropy"])
@pytest.mark.parametrize("low", [False, True])
def test_what_is_rounded_before_is_what_is_saved(tmp_path, save_dtype, codec, low):
    full = saved(adapter(codec), tmp_path / "full")
    model = adapter(codec, save_dtype=save_dtype)
    before = run(model)
    assert round_extras(model) > 100
    assert round_extras(model) == 0
    after = run(model)
    assert not torch.equal(before, after)
    data = saved(model, tmp_path / "half")
    assert len(data) < len(full)
    sizes, wide = adapter_sizes(tmp_path / "half"), adapter_sizes(tmp_path / "full")
    assert wide.head == 4 * (80 + 4)
    assert sizes.head == (4 * (20 + 2) + 2 * 4 if save_dtype == "int8" else wide.head / 2)
    assert sizes.statistics == 2 * 2 * 16 + 8
    assert sizes.mask == wide.mask
    loaded = reload(tmp_path / "half", low_cpu_mem_usage=low)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.equal(run(loaded), after)
    assert saved(loaded, tmp_path / "again") == data


def test_rounding_on_saving_alone_warns(tmp_path):
    model = adapter(save_dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"values of head and statistics were rounded to bfloat16.*round_extras"):
        model.save_pretrained(tmp_path)


def test_a_matrix_of_int8_beside_the_masks_stays_what_it_is(tmp_path):
    def model():
        made = base()
        made[4].register_buffer("table", torch.arange(12, dtype=torch.int8).reshape(3, 4))
        return made

    adapted = get_peft_model(model(), MaskConfig(target_modules=["0", "3"], modules_to_save=["4"]))
    adapted.base_model.model[4].modules_to_save["default"].table.mul_(2)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path)
    table = loaded.base_model.model[4].modules_to_save["default"].table
    assert torch.equal(table, 2 * torch.arange(12, dtype=torch.int8).reshape(3, 4))


def test_values_beyond_fp16_are_refused(tmp_path):
    model = adapter(save_dtype="float16")
    with torch.no_grad():
        model.base_model.model[1].statistics("running_var")["default"].fill_(1e6)
    for action in (lambda: round_extras(model), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="beyond what float16 can hold"):
            action()


@pytest.mark.parametrize("codec", ["bits", "entropy"])
def test_damage_is_found_on_loading(codec, tmp_path):
    data = saved(adapter(codec), tmp_path / "whole")
    start = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:start])
    del header["__metadata__"]
    for name, entry in header.items():
        if codec == "bits" and name.endswith("mask"):
            continue
        first, last = entry["data_offsets"]
        bent = bytearray(data)
        bent[start + (first + last) // 2] ^= 0x01
        shutil.copytree(tmp_path / "whole", tmp_path / "bent", dirs_exist_ok=True)
        (tmp_path / "bent" / WEIGHTS_NAME).write_bytes(bent)
        model = base().eval()
        before = run(model)
        with pytest.raises(AdapterFileError):
            PeftModel.from_pretrained(model, tmp_path / "bent")
        assert torch.equal(run(model), before)


def test_a_blob_of_another_dtype_is_refused(tmp_path):
    model = adapter()
    saved(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    (key,) = [key for key in tensors if key.endswith("smn_masks")]
    for bad in (tensors[key].float(), tensors[key].view(torch.int8)):
        from peft import set_peft_model_state_dict

        with pytest.raises(AdapterFileError, match="coded masks are uint8"):
            set_peft_model_state_dict(model, {**tensors, key: bad})


def test_masks_of_another_size_are_refused(tmp_path):
    saved(adapter(modules_to_save=None), tmp_path)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(576, 20))
    config = MaskConfig.from_pretrained(str(tmp_path))
    config.check_base = False
    with pytest.raises(ValueError, match=r"has shape \(54,\), but the base weight has 216 entries and takes \(27,\)"):
        PeftModel.from_pretrained(other, tmp_path, config=config)
